//! The dirty log of a live migration: one bit for each page of guest memory that we have written to.
//!
//! The front-end (QEMU) shares a file with us (vhost-user, "Migration"); byte `page / 8`, bit `page % 8` is set by us after
//! each write to the page, and cleared by the front-end when it sends the page on. The keeper owns the log; rings hold
//! it as long as they log, so it is unmapped when the last of them is attached without it.
//!
//! A page that the log has no bit for is counted and nothing else: a log too short loses that guest's own memory, never
//! anybody else's. The file is as long as the mapping when it is mapped (`keeper/vet.rs`); a front-end that truncates it
//! later loses marks of its own guest (`sigbus.rs`), unless the file is sealed against shrinking (QEMU's is). Its front-end
//! is warned of an unsealed one.
//!
//! One of the files with unsafe code in this crate.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::memory::{Memory, Segment};
use crate::sigbus::Guarded;

/// VHOST_LOG_PAGE: bytes of guest memory for each bit, whatever the host's pages are.
pub const LOG_PAGE_BYTES: u64 = 4096;

/// A mapped log.
#[derive(Debug)]
pub struct DirtyLog {
    base: NonNull<AtomicU8>,
    bytes: usize,
    /// Pages that were written to and have no bit here.
    outside: AtomicU64,
    /// Until it is unmapped: a front-end that truncates its log loses marks of its own guest, and nothing else happens.
    guarded: Option<Guarded>,
}

// SAFETY: the mapping belongs to this value alone, stays at its place until it is dropped, and is only accessed through
// atomics.
unsafe impl Send for DirtyLog {}
// SAFETY: as above; all accesses take `&self` and are atomic.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// Maps `bytes` bytes of `file` from `offset`, a multiple of the page size. That the file is that long is for the
    /// caller to know.
    ///
    /// # Errors
    /// No bytes, or what mmap(2) says: an unaligned offset, a descriptor of the wrong kind.
    pub fn map(file: impl AsFd, offset: u64, bytes: u64) -> io::Result<Self> {
        let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let length = usize::try_from(bytes).map_err(wrong)?;
        let nonzero = NonZeroUsize::new(length).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(offset).map_err(wrong)?;
        // SAFETY: a new mapping at a place of the kernel's choice replaces no other.
        let base = unsafe {
            mmap(None, nonzero, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, offset)?
        };
        let mut log = Self { base: base.cast(), bytes: length, outside: AtomicU64::new(0), guarded: None };
        log.guarded = Some(Guarded::new(std::iter::once((base.as_ptr() as usize, length)))?);
        Ok(log)
    }

    /// Notes that `bytes` bytes at guest-physical `address` were written. Call it after the write.
    pub fn mark(&self, address: u64, bytes: u64) {
        let Some(last) = bytes.checked_sub(1) else { return };
        let (first, last) = (address / LOG_PAGE_BYTES, address.saturating_add(last) / LOG_PAGE_BYTES);
        let pages = self.bytes as u64 * 8;
        // At most as many turns as the log has bits, whatever the address.
        for page in first..(last + 1).min(pages) {
            self.set(page);
        }
        if last >= pages {
            // Relaxed: a statistic.
            self.outside.fetch_add(last - first.max(pages) + 1, Ordering::Relaxed);
        }
    }

    fn set(&self, page: u64) {
        let byte = (page / 8) as usize;
        assert!(byte < self.bytes, "page {page} is outside the log");
        // SAFETY: `byte` is inside the mapping, which lives as long as `self`, and an AtomicU8 has no alignment.
        let byte = unsafe { self.base.add(byte).as_ref() };
        // Release: whoever sees the bit sees what was written to the page. The front-end clears the bit and then reads the
        // page; were the bit visible first, what is written after that reading would be lost. Always a locked OR, also
        // where the bit seems to be set: a plain look could be overtaken by the write before it.
        byte.fetch_or(1 << (page % 8), Ordering::Release);
    }

    /// Whether the bit of `page` is set.
    pub fn is_set(&self, page: u64) -> bool {
        let byte = (page / 8) as usize;
        if byte >= self.bytes {
            return false;
        }
        // SAFETY: as in `set`.
        let byte = unsafe { self.base.add(byte).as_ref() };
        byte.load(Ordering::Acquire) & 1 << (page % 8) != 0
    }

    /// Bytes of guest memory that it has bits for.
    pub fn covered_bytes(&self) -> u64 {
        (self.bytes as u64).saturating_mul(8 * LOG_PAGE_BYTES)
    }

    /// Pages marked so far that it has no bit for.
    pub fn pages_outside(&self) -> u64 {
        self.outside.load(Ordering::Relaxed)
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        self.guarded = None;
        // SAFETY: mapped in `map` with this length, and nobody else refers to it any more.
        if let Err(error) = unsafe { munmap(self.base.cast(), self.bytes) } {
            tracing::error!(%error, "a dirty log cannot be unmapped");
        }
    }
}

/// How one ring logs. `written` is for buffers, `used` for what lies at `used_address`; a packed ring marks the used
/// descriptors in its descriptor ring at their own addresses, with [`DirtyLog::mark`].
#[derive(Debug, Clone)]
pub struct RingLog {
    /// Where to.
    pub log: Arc<DirtyLog>,
    /// VHOST_VRING_F_LOG's `log_guest_addr`, the guest-physical address that writes to the used ring (packed: the device's
    /// event area) are logged at. `None`: they are not logged.
    pub used_address: Option<u64>,
}

impl RingLog {
    /// Notes that the first `bytes` bytes of `segments`, which lie in `memory`, were written.
    #[cold]
    pub(crate) fn written(&self, memory: &Memory, segments: &[Segment], bytes: u64) {
        let mut left = bytes;
        for segment in segments {
            let bytes = left.min(u64::from(segment.bytes()));
            let address = memory.guest_address(*segment);
            debug_assert!(address.is_some(), "a ring's segments lie in its memory");
            if let Some(address) = address {
                self.log.mark(address, bytes);
            }
            left -= bytes;
            if left == 0 {
                return;
            }
        }
    }

    /// Notes a write of `bytes` bytes at `offset` of the used ring.
    #[cold]
    pub(crate) fn used(&self, offset: u64, bytes: u64) {
        if let Some(address) = self.used_address {
            // An address of the front-end's choice: the sum may be anything, `mark` checks.
            self.log.mark(address.saturating_add(offset), bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    fn memfd(bytes: i64) -> OwnedFd {
        let file = memfd_create("log", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, bytes).unwrap();
        file
    }

    fn pages(log: &DirtyLog) -> Vec<u64> {
        (0..log.covered_bytes() / LOG_PAGE_BYTES).filter(|&page| log.is_set(page)).collect()
    }

    #[test]
    fn every_page_that_a_write_touches_is_marked() {
        let log = DirtyLog::map(memfd(4096), 0, 8).unwrap();
        log.mark(0x1fff, 1);
        log.mark(0x3fff, 2);
        log.mark(0x9000, 0x2001);
        assert_eq!(pages(&log), [1, 3, 4, 9, 10, 11]);
        assert_eq!(log.pages_outside(), 0);
    }

    /// CVE-2019-14835's class: zero-length buffers must not reach outside.
    #[test]
    fn nothing_written_marks_nothing() {
        let log = DirtyLog::map(memfd(4096), 0, 8).unwrap();
        log.mark(0, 0);
        log.mark(u64::MAX, 0);
        assert!(pages(&log).is_empty());
        assert_eq!(log.pages_outside(), 0);
    }

    /// CVE-2020-10722: a log smaller than guest memory; neighbours of the mapping stay as they are.
    #[test]
    fn pages_outside_are_counted_and_no_byte_behind_the_log_changes() {
        let file = memfd(4096);
        let whole = DirtyLog::map(&file, 0, 4096).unwrap();
        let log = DirtyLog::map(&file, 0, 2).unwrap();
        log.mark(15 * LOG_PAGE_BYTES, 3 * LOG_PAGE_BYTES);
        log.mark(u64::MAX - 1, 2);
        log.mark(u64::MAX, u64::MAX);
        assert_eq!(pages(&whole), [15]);
        assert_eq!(log.pages_outside(), 2 + 1 + 1);
        log.mark(0, u64::MAX);
        assert_eq!(pages(&whole), (0..16).collect::<Vec<_>>());
    }

    #[test]
    fn bits_lie_as_qemu_reads_them() {
        let file = memfd(8192);
        let log = DirtyLog::map(&file, 4096, 4096).unwrap();
        log.mark(9 * LOG_PAGE_BYTES, 1);
        let mut bytes = [0; 2];
        nix::sys::uio::pread(&file, &mut bytes, 4096).unwrap();
        assert_eq!(bytes, [0, 2]);
    }

    #[test]
    fn a_file_truncated_later_loses_marks_and_nothing_else() {
        crate::sigbus::install().unwrap();
        let file = memfd(4096);
        let log = DirtyLog::map(&file, 0, 4096).unwrap();
        log.mark(0, 1);
        nix::unistd::ftruncate(&file, 0).unwrap();
        log.mark(LOG_PAGE_BYTES, 1);
        assert_eq!(pages(&log), [1]);
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        DirtyLog::map(&pipe, 0, 4096).unwrap_err();
        let file = memfd(8192);
        for (offset, bytes) in [(0, 0), (1, 4096), (u64::MAX, 1), (u64::MAX - 4095, 4096), (0, u64::MAX)] {
            DirtyLog::map(&file, offset, bytes).unwrap_err();
        }
    }
}
