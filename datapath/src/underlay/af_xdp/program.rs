//! The XDP program that takes this host's tunnel packets and leaves everything else to the kernel.
//!
//! Assembled here, instruction by instruction, so that neither a compiler nor a loader is needed at run time. A packet is
//! taken if it is UDP to the VTEP's address and port, without IPv4 options or IPv6 extension headers, no fragment, and
//! came on a queue that has a socket. The rest of the checks is made where all outer packets are looked at (`open.rs`).

use std::net::IpAddr;

/// `struct bpf_insn`: opcode, registers, offset, immediate.
pub(super) type Instruction = u64;

// Opcodes, `linux/bpf_common.h` and `linux/bpf.h`.
const LOAD_BYTE: u8 = 0x71;
const LOAD_HALF: u8 = 0x69;
const LOAD_WORD: u8 = 0x61;
const LOAD_IMMEDIATE_64: u8 = 0x18;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const ADD_IMMEDIATE: u8 = 0x07;
const AND_IMMEDIATE: u8 = 0x57;
const JUMP_GREATER: u8 = 0x2d;
/// Of 32 bits: an immediate is not extended by its sign.
const JUMP_NOT_EQUAL_32: u8 = 0x56;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

const PSEUDO_MAP_FD: u8 = 1;
const REDIRECT_MAP: i32 = 51;
const XDP_PASS: i32 = 2;

// `struct xdp_md`.
const DATA: i16 = 0;
const DATA_END: i16 = 4;
const RX_QUEUE_INDEX: i16 = 16;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const UDP: i32 = 17;

/// Instructions, and the jumps to their end that wait to know where it is.
#[derive(Default)]
struct Assembler {
    code: Vec<Instruction>,
    to_pass: Vec<usize>,
}

impl Assembler {
    fn emit(&mut self, opcode: u8, target: u8, source: u8, offset: i16, immediate: i32) {
        // The layout in memory is that of a little-endian host; a big-endian one swaps the two register fields.
        let registers = if cfg!(target_endian = "little") { source << 4 | target } else { target << 4 | source };
        let [offset_a, offset_b] = offset.to_ne_bytes();
        let [a, b, c, d] = immediate.to_ne_bytes();
        self.code.push(u64::from_ne_bytes([opcode, registers, offset_a, offset_b, a, b, c, d]));
    }

    /// Lets the packet go to the kernel unless `register`, of 32 bits, is `value`.
    fn require(&mut self, register: u8, value: i32) {
        self.to_pass.push(self.code.len());
        self.emit(JUMP_NOT_EQUAL_32, register, 0, 0, value);
    }

    /// Lets the packet go to the kernel unless it has `bytes` bytes. The packet is in r2, its end in r3.
    fn require_bytes(&mut self, bytes: i32) {
        self.emit(MOVE, 4, 2, 0, 0);
        self.emit(ADD_IMMEDIATE, 4, 0, 0, bytes);
        self.to_pass.push(self.code.len());
        self.emit(JUMP_GREATER, 4, 3, 0, 0);
    }

    /// As [`Assembler::require`], for what lies in the packet at `offset`.
    fn require_at(&mut self, load: u8, offset: i16, value: i32) {
        self.emit(load, 5, 2, offset, 0);
        self.require(5, value);
    }

    /// Appends the end that all failed requirements lead to.
    fn finish(mut self) -> Vec<Instruction> {
        let end = self.code.len();
        self.emit(MOVE_IMMEDIATE, 0, 0, 0, XDP_PASS);
        self.emit(EXIT, 0, 0, 0, 0);
        for at in self.to_pass {
            let offset = i16::try_from(end - at - 1).expect("the program is shorter than 32768 instructions");
            let mut bytes = self.code[at].to_ne_bytes();
            bytes[2..4].copy_from_slice(&offset.to_ne_bytes());
            self.code[at] = u64::from_ne_bytes(bytes);
        }
        self.code
    }
}

/// A 16-bit number of the packet, as a load sees it.
fn half(value: u16) -> i32 {
    i32::from(value.to_be())
}

fn words(octets: &[u8]) -> impl Iterator<Item = i32> {
    octets.as_chunks::<4>().0.iter().map(|word| i32::from_ne_bytes(*word))
}

/// The program for a VTEP. `map` is the descriptor of the map of sockets by queue.
pub(super) fn assemble(address: IpAddr, port: u16, map: i32) -> Vec<Instruction> {
    let mut program = Assembler::default();
    // r1, the context, is overwritten by the call: r6 keeps it.
    program.emit(MOVE, 6, 1, 0, 0);
    program.emit(LOAD_WORD, 2, 1, DATA, 0);
    program.emit(LOAD_WORD, 3, 1, DATA_END, 0);
    let (udp_at, destination_at, octets) = match address {
        IpAddr::V4(v4) => {
            program.require_bytes(14 + 20 + 8);
            program.require_at(LOAD_HALF, 12, half(ETHERTYPE_IPV4));
            program.require_at(LOAD_BYTE, 14, 0x45);
            // RFC 791 §3.1: more fragments, and the offset.
            program.emit(LOAD_HALF, 5, 2, 20, 0);
            program.emit(AND_IMMEDIATE, 5, 0, 0, half(0x3fff));
            program.require(5, 0);
            program.require_at(LOAD_BYTE, 23, UDP);
            (34, 30, v4.octets().to_vec())
        }
        IpAddr::V6(v6) => {
            program.require_bytes(14 + 40 + 8);
            program.require_at(LOAD_HALF, 12, half(ETHERTYPE_IPV6));
            program.require_at(LOAD_BYTE, 20, UDP);
            (54, 38, v6.octets().to_vec())
        }
    };
    for (index, word) in words(&octets).enumerate() {
        program.require_at(LOAD_WORD, destination_at + 4 * index as i16, word);
    }
    program.require_at(LOAD_HALF, udp_at + 2, half(port));
    program.emit(LOAD_WORD, 2, 6, RX_QUEUE_INDEX, 0);
    program.emit(LOAD_IMMEDIATE_64, 1, PSEUDO_MAP_FD, 0, map);
    program.emit(0, 0, 0, 0, 0);
    // The flags say what to return for a queue without a socket.
    program.emit(MOVE_IMMEDIATE, 3, 0, 0, XDP_PASS);
    program.emit(CALL, 0, 0, 0, REDIRECT_MAP);
    program.emit(EXIT, 0, 0, 0, 0);
    program.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_jump_ends_at_the_pass() {
        for address in ["192.0.2.1", "2001:db8::ffff:1"] {
            let code = assemble(address.parse().unwrap(), 4789, 7);
            let end = code.len() - 2;
            let jumps = code.iter().enumerate().filter(|(_, word)| {
                let opcode = word.to_ne_bytes()[0];
                opcode == JUMP_NOT_EQUAL_32 || opcode == JUMP_GREATER
            });
            let targets: Vec<_> = jumps
                .map(|(at, word)| {
                    let bytes = word.to_ne_bytes();
                    at + 1 + usize::from(u16::from_ne_bytes([bytes[2], bytes[3]]))
                })
                .collect();
            assert!(targets.len() >= 7 && targets.iter().all(|target| *target == end), "{targets:?}");
        }
    }
}
