//! The in-flight region: which descriptors a device has taken and not given back, in memory that outlives the device.
//!
//! vhost-user, "Inflight I/O tracking". The front-end keeps the file (GET_INFLIGHT_FD makes it here, SET_INFLIGHT_FD
//! brings it back after a restart) and gives it to the next back-end, who finds in it what the last one had begun. It
//! holds one part per ring; what they look like, `ring/inflight_split.rs` and `ring/inflight_packed.rs` say. Owned by the
//! session, and by each ring that keeps its part.
//!
//! The front-end can write to it at any time: what is read is believed of that front-end's own rings alone, and checked
//! before it is used as an index. It can truncate the file too, if it is not sealed: the region then is zeros of our own
//! (`sigbus.rs`), and the next back-end finds nothing.
//!
//! Only what the parts need is mapped, whatever length the front-end claims. Limits: 32 rings of 32768 entries, 32 MiB.
//! One of the files with unsafe code in this crate.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::ftruncate;

use crate::sigbus::Guarded;

/// Parts begin at multiples of this, as in DPDK and QEMU's libvhost-user.
const ALIGNMENT: u64 = 64;
/// `QueueRegionSplit` without its array, and `DescStateSplit`.
const SPLIT_BYTES: (u64, u64) = (16, 16);
/// `QueueRegionPacked` without its array (29 bytes, and padding), and `DescStatePacked`.
const PACKED_BYTES: (u64, u64) = (32, 32);

/// Bytes of one ring's part.
fn part_bytes(packed: bool, queue_size: u16) -> u64 {
    let (header, entry) = if packed { PACKED_BYTES } else { SPLIT_BYTES };
    (header + entry * u64::from(queue_size)).next_multiple_of(ALIGNMENT)
}

/// Bytes of a region for `queues` rings.
pub fn region_bytes(packed: bool, queues: u16, queue_size: u16) -> u64 {
    part_bytes(packed, queue_size) * u64::from(queues)
}

/// A mapped region.
#[derive(Debug)]
pub struct Inflight {
    base: NonNull<u8>,
    bytes: usize,
    queues: u16,
    queue_size: u16,
    /// Until it is unmapped.
    guarded: Option<Guarded>,
}

// SAFETY: the mapping belongs to this value alone, stays at its place until it is dropped, and is only accessed through
// atomics.
unsafe impl Send for Inflight {}
// SAFETY: as above; all accesses take `&self` and are atomic.
unsafe impl Sync for Inflight {}

impl Inflight {
    /// A new file for `queues` rings of `queue_size`, all zero ("an uninitialized buffer") and sealed at its length.
    ///
    /// # Errors
    /// What the system says: no descriptor, no memory.
    pub fn create(packed: bool, queues: u16, queue_size: u16) -> io::Result<(Self, OwnedFd)> {
        let file = memfd_create("inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        ftruncate(&file, region_bytes(packed, queues, queue_size) as i64)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL))?;
        Ok((Self::map(&file, 0, packed, queues, queue_size)?, file))
    }

    /// Maps the region at `offset`, a multiple of the page size. That the file is that long is for the caller to know.
    ///
    /// # Errors
    /// No queues, or what mmap(2) says.
    pub fn map(file: impl AsFd, offset: u64, packed: bool, queues: u16, queue_size: u16) -> io::Result<Self> {
        let wrong = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let bytes = usize::try_from(region_bytes(packed, queues, queue_size)).map_err(wrong)?;
        let nonzero = NonZeroUsize::new(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(offset).map_err(wrong)?;
        // SAFETY: a new mapping at a place of the kernel's choice replaces no other.
        let base = unsafe {
            mmap(None, nonzero, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, offset)?
        };
        let mut region = Self { base: base.cast(), bytes, queues, queue_size, guarded: None };
        region.guarded = Some(Guarded::new(std::iter::once((base.as_ptr() as usize, bytes)))?);
        Ok(region)
    }

    /// Whether the file was found shorter than the region.
    pub fn is_truncated(&self) -> bool {
        self.guarded.as_ref().is_some_and(Guarded::is_truncated)
    }

    /// The address of `width` bytes at `at`, which is a multiple of `width`.
    fn place(&self, at: usize, width: usize) -> NonNull<u8> {
        assert!(at.is_multiple_of(width) && at + width <= self.bytes, "{width} bytes at {at} of {}", self.bytes);
        // SAFETY: inside the mapping, which lives as long as `self`.
        unsafe { self.base.add(at) }
    }
}

impl Drop for Inflight {
    fn drop(&mut self) {
        self.guarded = None;
        // SAFETY: mapped in `map` with this length, and nobody else refers to it any more.
        if let Err(error) = unsafe { munmap(self.base.cast(), self.bytes) } {
            tracing::error!(%error, "an in-flight region cannot be unmapped");
        }
    }
}

/// One ring's part of a region, for that ring to keep.
///
/// All stores are releases: whoever maps the file when this process is gone finds each with everything that was stored
/// before it. Nobody else writes while we live, so loads need no order.
#[derive(Debug, Clone)]
pub struct InflightPart {
    region: Arc<Inflight>,
    start: usize,
    size: u16,
    packed: bool,
}

impl InflightPart {
    /// The part of ring `queue` with `size` entries; `None` if the region has none for it, or too short a one.
    pub fn new(region: &Arc<Inflight>, queue: u16, size: u16, packed: bool) -> Option<Self> {
        let start = part_bytes(packed, region.queue_size) * u64::from(queue);
        let end = start + part_bytes(packed, region.queue_size);
        // A region for split rings has less room than packed ones need.
        let fits = queue < region.queues && size <= region.queue_size && end <= region.bytes as u64;
        fits.then(|| Self { region: Arc::clone(region), start: start as usize, size, packed })
    }

    /// Entries of the ring.
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The offset of entry `index`.
    pub(crate) fn entry(&self, index: u16) -> usize {
        assert!(index < self.size, "entry {index} of {}", self.size);
        let (header, entry) = if self.packed { PACKED_BYTES } else { SPLIT_BYTES };
        header as usize + entry as usize * usize::from(index)
    }

    pub(crate) fn load8(&self, at: usize) -> u8 {
        // SAFETY: `place` checks bounds.
        unsafe { AtomicU8::from_ptr(self.region.place(self.start + at, 1).as_ptr()) }.load(Ordering::Relaxed)
    }

    pub(crate) fn store8(&self, at: usize, value: u8) {
        // SAFETY: as above.
        unsafe { AtomicU8::from_ptr(self.region.place(self.start + at, 1).as_ptr()) }.store(value, Ordering::Release);
    }

    pub(crate) fn load16(&self, at: usize) -> u16 {
        // SAFETY: `place` checks bounds and alignment; the mapping itself begins with a page.
        unsafe { AtomicU16::from_ptr(self.region.place(self.start + at, 2).cast().as_ptr()) }.load(Ordering::Relaxed)
    }

    pub(crate) fn store16(&self, at: usize, value: u16) {
        let place = self.region.place(self.start + at, 2).cast();
        // SAFETY: as above.
        unsafe { AtomicU16::from_ptr(place.as_ptr()) }.store(value, Ordering::Release);
    }

    pub(crate) fn load32(&self, at: usize) -> u32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.region.place(self.start + at, 4).cast().as_ptr()) }.load(Ordering::Relaxed)
    }

    pub(crate) fn store32(&self, at: usize, value: u32) {
        let place = self.region.place(self.start + at, 4).cast();
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(place.as_ptr()) }.store(value, Ordering::Release);
    }

    pub(crate) fn load64(&self, at: usize) -> u64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.region.place(self.start + at, 8).cast().as_ptr()) }.load(Ordering::Relaxed)
    }

    pub(crate) fn store64(&self, at: usize, value: u64) {
        let place = self.region.place(self.start + at, 8).cast();
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(place.as_ptr()) }.store(value, Ordering::Release);
    }

    /// The part's version; zero: never used, or given up.
    pub(crate) fn version(&self) -> u16 {
        self.load16(VERSION)
    }

    /// Whether entry `index` heads a chain that was taken and not given back.
    pub(crate) fn is_inflight(&self, index: u16) -> bool {
        self.load8(self.entry(index)) != 0
    }

    /// The ring was stopped in order, or its device reset: there is nothing to be found, and its indices may start
    /// elsewhere. A part with something in flight stays as it is.
    pub fn settle(&self) {
        if !(0..self.size).any(|index| self.is_inflight(index)) {
            self.clear();
        }
    }

    /// Makes it a part that was never used. The version first: whoever finds it half cleared does not look further.
    pub(crate) fn clear(&self) {
        self.store16(VERSION, 0);
        let end = part_bytes(self.packed, self.size) as usize;
        for at in (0..end).step_by(8) {
            self.store64(at, 0);
        }
    }
}

/// Offset of `version` in both layouts; `desc_num` follows.
pub(crate) const VERSION: usize = 8;
/// Offset of `desc_num` in both layouts.
pub(crate) const ENTRIES: usize = 10;
/// The version that we write and understand.
pub(crate) const VERSION_1: u16 = 1;
/// Offset of `inflight` in an entry of both layouts.
pub(crate) const INFLIGHT: usize = 0;
/// Offset of `counter` in an entry of both layouts.
pub(crate) const COUNTER: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// sizeof of the specification's structures, aligned as DPDK 22.11 (lib/vhost/vhost_user.c) does.
    #[test]
    fn parts_are_as_long_as_the_specification_says() {
        assert_eq!(region_bytes(false, 1, 256), (16 + 16 * 256_u64).next_multiple_of(64));
        assert_eq!(region_bytes(true, 1, 256), (29 + 32 * 256_u64).next_multiple_of(64));
        assert_eq!(region_bytes(true, 1, 3), (29 + 32 * 3_u64).next_multiple_of(64));
        assert_eq!(region_bytes(true, 32, 32768), 32 * (32 * 32768 + 64));
    }

    #[test]
    fn a_new_region_is_sealed_at_its_length_and_has_a_part_for_each_ring_that_fits() {
        let (region, file) = Inflight::create(false, 2, 64).unwrap();
        assert!(ftruncate(&file, 0).is_err());
        let region = Arc::new(region);
        assert!(InflightPart::new(&region, 1, 64, false).is_some_and(|part| part.version() == 0));
        assert!(InflightPart::new(&region, 2, 64, false).is_none(), "a ring too many");
        assert!(InflightPart::new(&region, 0, 128, false).is_none(), "a ring too long");
        assert!(InflightPart::new(&region, 1, 64, true).is_none(), "a region for split rings");
    }

    #[test]
    fn a_truncated_region_reads_as_one_that_was_never_used() {
        crate::sigbus::install().unwrap();
        let file = memfd_create("inflight", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&file, 1 << 16).unwrap();
        let region = Arc::new(Inflight::map(&file, 0, false, 2, 256).unwrap());
        let part = InflightPart::new(&region, 1, 256, false).unwrap();
        part.store16(VERSION, VERSION_1);
        ftruncate(&file, 0).unwrap();
        assert_eq!((part.version(), region.is_truncated()), (0, true));
        part.store64(part.entry(255) + COUNTER, 7);
    }
}
