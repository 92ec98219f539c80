//! What must hold of memory regions and descriptors before anything of them is mapped or used.
//!
//! vm-memory 0.18 maps past the end of a file without a word; the first access there is a SIGBUS that takes every VM's
//! port down. So the size is checked here, against the file. That the file stays that long, F_SEAL_SHRINK promises.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::socket::{UnixAddr, getpeername, getsockname};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use super::message::{LogRange, Region};
use crate::eventfd::EventFd;

/// mmap(2): the offset must be a multiple of the page size; 4096 is the smallest of all targets.
const PAGE_BYTES: u64 = 4096;

/// Reads that empty a channel that was just made. Each byte with a descriptor takes one of its own; a socket's usual buffer
/// has room for a few hundred of them.
const CHANNEL_READS_MAX: usize = 4096;

/// Whether the file of a region can still be truncated under our mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shrink {
    Sealed,
    Possible,
}

/// Checks the numbers of one region: not empty, and no sum overflows.
pub(super) fn region(region: &Region) -> Result<(), String> {
    let Region { guest_address, bytes, front_end_address, file_offset } = *region;
    if bytes == 0 {
        return Err(format!("the memory region at {guest_address:#x} has size 0"));
    }
    let sums = [guest_address, front_end_address, file_offset].map(|start| start.checked_add(bytes));
    if sums.contains(&None) {
        return Err(format!(
            "the memory region at {guest_address:#x} (front-end address {front_end_address:#x}, file offset \
             {file_offset:#x}) wraps around with its {bytes:#x} bytes"
        ));
    }
    if !file_offset.is_multiple_of(PAGE_BYTES) {
        return Err(format!(
            "the memory region at {guest_address:#x} starts at file offset {file_offset:#x}, inside a page"
        ));
    }
    Ok(())
}

/// Checks that two vetted regions overlap neither in the guest nor in the front-end: an address has one meaning.
pub(super) fn disjoint(one: &Region, other: &Region) -> Result<(), String> {
    let overlap = |a: u64, b: u64| a < b + other.bytes && b < a + one.bytes;
    if overlap(one.guest_address, other.guest_address) || overlap(one.front_end_address, other.front_end_address) {
        return Err(format!(
            "the memory regions at {:#x} ({:#x} bytes) and {:#x} ({:#x} bytes) overlap",
            one.guest_address, one.bytes, other.guest_address, other.bytes
        ));
    }
    Ok(())
}

/// Checks that the file really holds a vetted region and that we may write to it.
pub(super) fn region_file(region: &Region, file: &OwnedFd) -> Result<Shrink, String> {
    range_in_file(&format!("memory region at {:#x}", region.guest_address), region.file_offset, region.bytes, file)
}

/// Checks the dirty log's numbers and that its file really holds it (CVE-2020-10722: the sum wrapped around).
pub(super) fn log_file(log: &LogRange, file: &OwnedFd) -> Result<Shrink, String> {
    file_range("dirty log", log.offset, log.bytes, file)
}

/// Checks that `bytes` bytes from `offset` can be mapped and written to: the numbers, and the file. `what` is for people.
pub(super) fn file_range(what: &str, offset: u64, bytes: u64, file: &OwnedFd) -> Result<Shrink, String> {
    if bytes == 0 {
        return Err(format!("the {what} has size 0"));
    }
    if offset.checked_add(bytes).is_none() {
        return Err(format!("the {what} at file offset {offset:#x} wraps around with its {bytes:#x} bytes"));
    }
    if !offset.is_multiple_of(PAGE_BYTES) {
        return Err(format!("the {what} starts at file offset {offset:#x}, inside a page"));
    }
    range_in_file(what, offset, bytes, file)
}

/// Checks that `bytes` bytes from `offset`, vetted, can be mapped and written to. `what` is for people.
fn range_in_file(what: &str, offset: u64, bytes: u64, file: &OwnedFd) -> Result<Shrink, String> {
    let unreadable = |error| format!("the file of the {what}: {error}");
    let status = fstat(file).map_err(unreadable)?;
    if SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(format!("the {what} comes with a descriptor that is not a memfd or file"));
    }
    let end = offset + bytes;
    let file_bytes = u64::try_from(status.st_size).unwrap_or(0);
    if end > file_bytes {
        return Err(format!("the {what} ends at {end:#x} of its file, which has {file_bytes:#x} bytes"));
    }
    let mode = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).map_err(unreadable)?);
    if mode & OFlag::O_ACCMODE != OFlag::O_RDWR {
        return Err(format!("the file of the {what} is not open for reading and writing"));
    }
    // munmap(2) of huge pages refuses a length that is no multiple of theirs: the mapping would leak.
    let file_system = fstatfs(file).map_err(unreadable)?;
    let huge_page_bytes = u64::try_from(file_system.block_size()).unwrap_or(0).max(1);
    if file_system.filesystem_type() == HUGETLBFS_MAGIC && !(offset | bytes).is_multiple_of(huge_page_bytes) {
        return Err(format!(
            "the {what} ({bytes:#x} bytes at file offset {offset:#x}) does not cover whole huge pages of \
             {huge_page_bytes:#x} bytes"
        ));
    }
    // Files that know no seals answer EINVAL: they can be truncated.
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_retain);
    Ok(if seals.contains(SealFlag::F_SEAL_SHRINK) { Shrink::Sealed } else { Shrink::Possible })
}

/// Checks that a file does not lie in huge pages, of which only whole ones can be mapped.
pub(super) fn usual_pages(what: &str, file: &OwnedFd) -> Result<(), String> {
    let file_system = fstatfs(file).map_err(|error| format!("the file of the {what}: {error}"))?;
    if file_system.filesystem_type() == HUGETLBFS_MAGIC {
        return Err(format!("the {what} lies in huge pages"));
    }
    Ok(())
}

/// Checks that a back-end channel is one end of a pair of stream sockets, and closes it for what comes from the other
/// end: we ask nothing there, so nothing is to be answered.
///
/// A front-end could hand us its own end of the connection that we serve it by, or send it into the channel where nobody
/// takes it out: then we would keep that end open ourselves, and never hear that the front-end is gone. Its own end has a
/// name on one side or the other, a pair has none; and what waits in the channel is thrown away.
pub(super) fn channel(descriptor: &OwnedFd) -> Result<(), String> {
    use rustix::net::{AddressFamily, RecvFlags, Shutdown, SocketType, recv, shutdown, sockopt};
    let wrong = |what: String| format!("its descriptor is not a UNIX stream socket: {what}");
    let kind = sockopt::socket_type(descriptor).map_err(|error| wrong(error.to_string()))?;
    let domain = sockopt::socket_domain(descriptor).map_err(|error| wrong(error.to_string()))?;
    if (domain, kind) != (AddressFamily::UNIX, SocketType::STREAM) {
        return Err(wrong(format!("domain {}, type {}", domain.as_raw(), kind.as_raw())));
    }
    let names = [getsockname::<UnixAddr>(descriptor.as_raw_fd()), getpeername::<UnixAddr>(descriptor.as_raw_fd())];
    if !names.iter().all(|name| name.is_ok_and(|name| name.is_unnamed())) {
        return Err("its descriptor is not one end of a socket pair".into());
    }
    let unusable = |error: rustix::io::Errno| format!("its descriptor cannot be used: {error}");
    shutdown(descriptor, Shutdown::Read).map_err(unusable)?;
    // Nothing comes after that. Descriptors that wait are closed with the bytes that they came with.
    let mut scrap = [0; 4096];
    for _ in 0..CHANNEL_READS_MAX {
        match recv(descriptor, &mut scrap[..], RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::CONNRESET) => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(unusable(error)),
        }
    }
    Err("more waits in it than is worth reading".into())
}

/// Checks that a kick, call or error descriptor is an eventfd, and makes it non-blocking: a pipe in its place could
/// block whoever writes to it.
pub(super) fn eventfd(descriptor: OwnedFd) -> Result<Arc<OwnedFd>, String> {
    let checked = descriptor.try_clone().and_then(EventFd::from_front_end);
    checked.map_err(|error| error.to_string())?;
    Ok(Arc::new(descriptor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    fn memfd(bytes: i64, seals: SealFlag) -> OwnedFd {
        let file = memfd_create("guest", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, bytes).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        file
    }

    fn at(guest_address: u64, bytes: u64, front_end_address: u64, file_offset: u64) -> Region {
        Region { guest_address, bytes, front_end_address, file_offset }
    }

    #[test]
    fn sums_that_wrap_and_empty_regions_are_refused() {
        assert!(region(&at(0, 0, 0, 0)).unwrap_err().contains("size 0"));
        for wrapping in [at(u64::MAX - 4095, 8192, 0, 0), at(0, 8192, u64::MAX - 4095, 0), at(0, 8192, 0, !4095)] {
            assert!(region(&wrapping).unwrap_err().contains("wraps around"), "{wrapping:?}");
        }
        assert!(region(&at(0, 4096, 0, 100)).unwrap_err().contains("inside a page"));
        region(&at(0, 4096, 0x7000, 8192)).unwrap();
    }

    #[test]
    fn overlaps_are_found_in_both_address_spaces() {
        let low = at(0, 0x2000, 0x10000, 0);
        disjoint(&low, &at(0x2000, 0x1000, 0x12000, 0)).unwrap();
        disjoint(&low, &at(0x1fff, 0x1000, 0x12000, 0)).unwrap_err();
        disjoint(&low, &at(0x2000, 0x1000, 0x11fff, 0)).unwrap_err();
        disjoint(&low, &low).unwrap_err();
    }

    #[test]
    fn a_region_past_the_end_of_its_file_is_refused() {
        let file = memfd(0x4000, SealFlag::F_SEAL_SHRINK);
        assert_eq!(region_file(&at(0, 0x4000, 0, 0), &file), Ok(Shrink::Sealed));
        for past in [at(0, 0x4001, 0, 0), at(0, 0x4000, 0, 0x1000)] {
            assert!(region_file(&past, &file).unwrap_err().contains("which has 0x4000 bytes"), "{past:?}");
        }
        assert_eq!(region_file(&at(0, 0x4000, 0, 0), &memfd(0x4000, SealFlag::empty())), Ok(Shrink::Possible));
    }

    /// CVE-2020-10722, DPDK f83e0199c8 and bdd96d8ac7.
    #[test]
    fn a_log_that_its_file_does_not_hold_is_refused() {
        let file = memfd(0x4000, SealFlag::F_SEAL_SHRINK);
        let refused = |bytes, offset| log_file(&LogRange { bytes, offset }, &file).unwrap_err();
        assert!(refused(0, 0).contains("size 0"));
        for (bytes, offset) in [(u64::MAX, 0x1000), (0x1000, u64::MAX - 0xfff), (0x1001, u64::MAX - 0xfff)] {
            assert!(refused(bytes, offset).contains("wraps around"), "{bytes:#x} at {offset:#x}");
        }
        for (bytes, offset) in [(u64::MAX, 0), (0x4001, 0), (0x4000, 0x1000), (1, 0x4000), (1 << 63, 1 << 62)] {
            assert!(refused(bytes, offset).contains("which has 0x4000 bytes"), "{bytes:#x} at {offset:#x}");
        }
        assert!(refused(0x1000, 0x800).contains("inside a page"));
        assert_eq!(log_file(&LogRange { bytes: 0x3000, offset: 0x1000 }, &file), Ok(Shrink::Sealed));
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert!(log_file(&LogRange { bytes: 8, offset: 0 }, &pipe).unwrap_err().contains("not a memfd or file"));
    }

    #[test]
    fn a_descriptor_that_is_no_writable_file_is_refused() {
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert!(region_file(&at(0, 4096, 0, 0), &pipe).unwrap_err().contains("not a memfd or file"));
        let read_only = tempfile::NamedTempFile::new().unwrap();
        read_only.as_file().set_len(4096).unwrap();
        let read_only = OwnedFd::from(std::fs::File::open(read_only.path()).unwrap());
        assert!(region_file(&at(0, 4096, 0, 0), &read_only).unwrap_err().contains("reading and writing"));
    }
}
