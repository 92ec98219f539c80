//! The few calls of bpf(2) that the driver needs: a map of sockets, a program, a link to a device.
//!
//! One of the files with unsafe code in this crate: bpf(2) has no safe name. Each call's attributes are a structure of
//! plain numbers of the kernel's layout (`linux/bpf.h`, `union bpf_attr`), passed with its size; pointers in them are to
//! memory that outlives the call. Every descriptor that comes back is owned. The link's is all that keeps the program on
//! the device: it goes with the process, however that ends.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use super::program::Instruction;

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;

const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// What the verifier may say about a program that it refuses.
const VERIFIER_LOG_BYTES: usize = 16384;

#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries_max: u32,
    flags: u32,
}

#[repr(C)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    device: u32,
    expected_attach: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    device: u32,
    attach: u32,
    flags: u32,
}

/// Calls bpf(2) with attributes of the kernel's layout.
fn bpf<T>(command: libc::c_int, attributes: &mut T) -> io::Result<RawFd> {
    // SAFETY: the attributes are a structure of `size` bytes that this file laid out for `command`, borrowed for the call;
    // the pointers in it are to memory that their owners hold until after the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

fn own(descriptor: RawFd) -> OwnedFd {
    // SAFETY: bpf(2) has just made it, for whoever called.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// A map from queues to sockets.
#[derive(Debug)]
pub(super) struct SocketMap(OwnedFd);

impl SocketMap {
    pub(super) fn new(queues: u32) -> io::Result<Self> {
        let mut attributes =
            MapCreate { map_type: MAP_TYPE_XSKMAP, key_bytes: 4, value_bytes: 4, entries_max: queues, flags: 0 };
        Ok(Self(own(bpf(MAP_CREATE, &mut attributes)?)))
    }

    pub(super) fn set(&self, queue: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        let value = socket.as_raw_fd() as u32;
        let mut attributes = MapUpdate {
            map: self.descriptor() as u32,
            padding: 0,
            key: std::ptr::from_ref(&queue) as u64,
            value: std::ptr::from_ref(&value) as u64,
            flags: 0,
        };
        bpf(MAP_UPDATE_ELEM, &mut attributes).map(drop)
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Loads a program. The error has what the verifier said.
pub(super) fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let mut log = vec![0u8; VERIFIER_LOG_BYTES];
    let mut name = [0; 16];
    name[..9].copy_from_slice(b"dreamwire");
    let mut attributes = ProgLoad {
        prog_type: PROG_TYPE_XDP,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        // No helper that is used is for GPL programs alone.
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 1,
        log_bytes: log.len() as u32,
        log: log.as_mut_ptr() as u64,
        kernel_version: 0,
        flags: 0,
        name,
        device: 0,
        expected_attach: ATTACH_XDP,
    };
    let loaded = bpf(PROG_LOAD, &mut attributes);
    loaded.map(own).map_err(|error| {
        let said = String::from_utf8_lossy(&log);
        let said = said.trim_end_matches('\0').trim();
        if said.is_empty() {
            error
        } else {
            io::Error::new(error.kind(), format!("{error}; the verifier says: {said}"))
        }
    })
}

/// How a program runs on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// In the device's driver.
    Native,
    /// In the network stack, for any device.
    Generic,
}

/// A program on a device, for as long as this lives.
#[derive(Debug)]
pub(super) struct Link {
    _descriptor: OwnedFd,
}

impl Link {
    /// In the driver, or where it cannot in the network stack.
    pub(super) fn new(program: &OwnedFd, device: u32) -> io::Result<(Self, Mode)> {
        let create = |flags| {
            let program = program.as_fd().as_raw_fd() as u32;
            bpf(LINK_CREATE, &mut LinkCreate { program, device, attach: ATTACH_XDP, flags }).map(own)
        };
        let (descriptor, mode) = match create(XDP_FLAGS_DRV_MODE) {
            Ok(descriptor) => (descriptor, Mode::Native),
            // Somebody else's program is there: the other mode would not run beside it either.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(error),
            Err(_) => (create(XDP_FLAGS_SKB_MODE)?, Mode::Generic),
        };
        Ok((Self { _descriptor: descriptor }, mode))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::underlay::af_xdp::program::assemble;

    #[test]
    fn the_verifier_takes_the_program() {
        let map = SocketMap::new(4).expect("needs CAP_BPF and CAP_NET_ADMIN");
        for address in ["192.0.2.1", "255.254.253.252", "2001:db8::1", "fe80:ffff:ffff:ffff:ffff:ffff:ffff:ffff"] {
            load(&assemble(address.parse().unwrap(), 4789, map.descriptor())).unwrap();
        }
    }

    #[test]
    fn a_program_that_is_none_is_refused_with_the_reason() {
        let error = load(&[0]).unwrap_err().to_string();
        assert!(error.contains("the verifier says"), "{error}");
    }
}
