//! Test frames: Ethernet, IPv4, UDP, then a magic number, a sequence number and a pattern that follows from both.
//!
//! A [`FlowSet`] is all the frames that a generator repeats for ever. Frame `n` belongs to flow `n % flows` and says `n` in
//! its payload, so that the receiver knows from 12 bytes what all the others have to be.

use std::net::Ipv4Addr;

/// Smallest frame: Ethernet's 64 less FCS.
pub const FRAME_BYTES_MIN: usize = 60;
/// Largest frame: an MTU of 1500 and a VLAN tag's worth more, as generators offer "1518".
pub const FRAME_BYTES_MAX: usize = 1518;
/// Flows at most: UDP source ports from `SOURCE_PORT` up.
pub const FLOWS_MAX: usize = 32768;

const ETHERNET_BYTES: usize = 14;
const IPV4_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
/// Ethernet, IPv4 and UDP headers.
pub const HEADERS_BYTES: usize = ETHERNET_BYTES + IPV4_BYTES + UDP_BYTES;
/// Where the sequence number lies: after the magic.
pub const SEQUENCE_AT: usize = HEADERS_BYTES + 4;
const PATTERN_AT: usize = SEQUENCE_AT + 8;
const _: () = assert!(PATTERN_AT <= FRAME_BYTES_MIN);

/// First four bytes of a test frame's payload.
pub const MAGIC: [u8; 4] = *b"DWTF";
/// Source port of flow 0.
const SOURCE_PORT: u16 = 16384;
/// Destination port of every flow: discard.
const DESTINATION_PORT: u16 = 9;

/// A sender or receiver of test frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub address: Ipv4Addr,
}

/// The frames that go round.
#[derive(Clone, Debug)]
pub struct FlowSet {
    frames: Vec<Vec<u8>>,
    flows: usize,
}

impl FlowSet {
    /// At least `least` frames of `bytes` bytes (without FCS) in `flows` flows, a multiple of the flows.
    ///
    /// # Panics
    /// If `bytes` or `flows` are outside of this file's limits.
    pub fn new(from: Endpoint, to: Endpoint, bytes: usize, flows: usize, least: usize) -> Self {
        assert!((1..=FLOWS_MAX).contains(&flows), "{flows} flows: 1 to {FLOWS_MAX}");
        let count = least.max(1).next_multiple_of(flows);
        let frames =
            (0..count).map(|sequence| frame(from, to, bytes, (sequence % flows) as u16, sequence as u64)).collect();
        Self { frames, flows }
    }

    /// The frames, by sequence number.
    pub fn frames(&self) -> &[Vec<u8>] {
        &self.frames
    }

    /// Number of flows.
    pub fn flows(&self) -> usize {
        self.flows
    }
}

/// One test frame of `bytes` bytes without FCS, all checksums valid.
///
/// # Panics
/// If `bytes` is outside of [`FRAME_BYTES_MIN`] to [`FRAME_BYTES_MAX`].
pub fn frame(from: Endpoint, to: Endpoint, bytes: usize, flow: u16, sequence: u64) -> Vec<u8> {
    assert!((FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes), "frames of {bytes} bytes");
    let mut frame = Vec::with_capacity(bytes);
    frame.extend(to.mac);
    frame.extend(from.mac);
    frame.extend([0x08, 0x00]);

    // RFC 791 §3.1: version and header length, TOS, total length, identification, DF, TTL, protocol, checksum, addresses.
    let ip_bytes = (bytes - ETHERNET_BYTES) as u16;
    frame.extend([0x45, 0]);
    frame.extend(ip_bytes.to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    frame.extend(from.address.octets());
    frame.extend(to.address.octets());
    let checksum = !sum(0, &frame[ETHERNET_BYTES..]);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());

    let udp_bytes = ip_bytes - IPV4_BYTES as u16;
    frame.extend((SOURCE_PORT + flow).to_be_bytes());
    frame.extend(DESTINATION_PORT.to_be_bytes());
    frame.extend(udp_bytes.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(MAGIC);
    frame.extend(sequence.to_be_bytes());
    for at in PATTERN_AT..bytes {
        frame.push(pattern(sequence, at));
    }

    // RFC 768: over a pseudo header of addresses, protocol and length; zero means none and is sent as ones.
    let pseudo = sum(17 + u32::from(udp_bytes), &frame[26..34]);
    let checksum = match !sum(u32::from(pseudo), &frame[34..]) {
        0 => 0xffff,
        checksum => checksum,
    };
    frame[40..42].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// Differs between neighbouring bytes and neighbouring frames, so that a shifted or mixed-up copy shows.
fn pattern(sequence: u64, at: usize) -> u8 {
    (at as u64).wrapping_mul(31).wrapping_add(sequence.wrapping_mul(131)) as u8
}

/// RFC 1071: the ones' complement sum of 16-bit words, folded.
fn sum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = start;
    for word in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Endpoint = Endpoint { mac: [0x52, 0x54, 0, 0, 0, 1], address: Ipv4Addr::new(10, 0, 0, 1) };
    const B: Endpoint = Endpoint { mac: [0x52, 0x54, 0, 0, 0, 2], address: Ipv4Addr::new(10, 0, 0, 2) };

    #[test]
    fn headers_are_those_of_the_rfcs() {
        let frame = frame(A, B, 64, 3, 7);
        assert_eq!(frame.len(), 64);
        #[rustfmt::skip]
        let headers = [
            0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1, 0x08, 0x00,
            0x45, 0, 0, 50, 0, 0, 0x40, 0, 64, 17, 0x26, 0xb9, 10, 0, 0, 1, 10, 0, 0, 2,
            0x40, 0x03, 0, 9, 0, 30,
        ];
        assert_eq!(frame[..40], headers);
        assert_eq!(frame[42..54], [b'D', b'W', b'T', b'F', 0, 0, 0, 0, 0, 0, 0, 7]);
    }

    #[test]
    fn checksum_is_that_of_rfc_1071() {
        assert_eq!(sum(0, &[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2, "§3, example");
    }

    #[test]
    fn both_checksums_verify_at_all_sizes() {
        for bytes in FRAME_BYTES_MIN..=FRAME_BYTES_MAX {
            let frame = frame(A, B, bytes, 9, bytes as u64 * 977);
            assert_eq!(sum(0, &frame[14..34]), 0xffff, "IPv4, {bytes} bytes");
            let pseudo = sum(17 + bytes as u32 - 34, &frame[26..34]);
            assert_eq!(sum(u32::from(pseudo), &frame[34..]), 0xffff, "UDP, {bytes} bytes");
        }
    }

    #[test]
    fn set_is_a_whole_number_of_rounds_through_its_flows() {
        let set = FlowSet::new(A, B, 64, 1000, 256);
        assert_eq!((set.frames().len(), set.flows()), (1000, 1000));
        let set = FlowSet::new(A, B, 64, 100, 256);
        assert_eq!(set.frames().len(), 300);
        assert_eq!(set.frames()[101][34..36], set.frames()[1][34..36]);
        assert_ne!(set.frames()[101], set.frames()[1]);
    }
}
