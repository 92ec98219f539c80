//! The guest's memory: one sealed memfd, mapped once, described to the back-end as one or several regions.
//!
//! The only unsafe file of the harness. Every access goes through a checked offset, so a wrong offset is a
//! panic in the test and never a stray write. No reference into the mapping ever exists: the back-end on the
//! other side writes whenever it likes. Limits: [`REGIONS_MAX`] regions, because a back-end without
//! CONFIGURE_MEM_SLOTS takes no more.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// VHOST_MEMORY_BASELINE_NREGIONS: what every back-end must take (vhost-user, "Memory regions description").
pub const REGIONS_MAX: usize = 8;

/// Guest-physical address of the first region. Not zero and not the mapping's address, so that a back-end
/// which confuses guest addresses with front-end addresses or file offsets fails at once.
const GUEST_BASE: u64 = 0x4000_0000;

/// Hole between two regions in guest-physical space, bytes.
const GUEST_GAP_BYTES: u64 = 0x4000_0000;

/// Regions begin at page boundaries: mmap(2) takes nothing else as an offset.
const PAGE_BYTES: usize = 4096;

/// What a cache line is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// To be read.
    Read,
    /// To be written.
    Write,
}

/// One entry of the memory table sent to the back-end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the guest's driver believes it to be: what descriptors carry.
    pub guest_address: u64,
    /// Length, bytes.
    pub bytes: u64,
    /// Where this process has it mapped: what SET_VRING_ADDR carries.
    pub front_end_address: u64,
    /// Where it starts in the memfd, bytes.
    pub file_offset: u64,
}

/// Shared memory of the pretended guest. Offsets are bytes from the start of the memfd.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    base: NonNull<u8>,
    bytes: usize,
    regions: Vec<Region>,
}

// SAFETY: the mapping is owned by this value until drop, and is only touched by atomic or raw-pointer accesses
// to memory that a foreign process writes too: there is nothing that a second thread could invalidate.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; there are no references into the mapping, and no interior state beside it.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// A zeroed memfd of at least `bytes`, sealed with F_SEAL_SHRINK and F_SEAL_GROW as QEMU's
    /// memory-backend-memfd is, split into `regions` (1 to [`REGIONS_MAX`]) of equal size.
    ///
    /// # Errors
    /// What memfd_create(2), ftruncate(2), fcntl(2) or mmap(2) say.
    ///
    /// # Panics
    /// If `bytes` is 0 or `regions` out of range.
    pub fn new(bytes: usize, regions: usize) -> io::Result<Self> {
        let memory = Self::unsealed(bytes, regions)?;
        fcntl(&memory.file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
        Ok(memory)
    }

    /// As [`Self::new`], but the file can be truncated: for a hostile front-end. Whoever truncates it must not touch what
    /// lies behind its new end.
    ///
    /// # Errors
    /// As [`Self::new`].
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn unsealed(bytes: usize, regions: usize) -> io::Result<Self> {
        assert!((1..=REGIONS_MAX).contains(&regions), "{regions} regions: 1 to {REGIONS_MAX} can be described");
        let region_bytes = bytes.div_ceil(regions).next_multiple_of(PAGE_BYTES);
        let bytes = region_bytes * regions;
        let length = NonZeroUsize::new(bytes).expect("guest memory of zero bytes");

        let fd = memfd_create(c"dreamwire-guest", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        let file = File::from(fd);
        file.set_len(bytes as u64)?;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice replaces nothing; the file has
        // `bytes` bytes and is sealed against shrinking (or its truncator keeps away), so that no access raises SIGBUS.
        let base = unsafe {
            mmap(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &file, 0)
        }?
        .cast::<u8>();

        let regions = (0..regions)
            .map(|index| {
                let file_offset = (index * region_bytes) as u64;
                Region {
                    guest_address: GUEST_BASE + file_offset + index as u64 * GUEST_GAP_BYTES,
                    bytes: region_bytes as u64,
                    front_end_address: base.as_ptr() as u64 + file_offset,
                    file_offset,
                }
            })
            .collect();
        Ok(Self { file, base, bytes, regions })
    }

    /// Length of the whole, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The memory table, in order of file offset.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The memfd behind it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A second descriptor of the memfd, for a back-end in this process.
    ///
    /// # Errors
    /// What dup(2) says.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// The address to put into a descriptor for the byte at `offset`.
    ///
    /// # Panics
    /// If `offset` lies outside.
    pub fn guest_address(&self, offset: usize) -> u64 {
        let region = self.region_of(offset);
        region.guest_address + (offset as u64 - region.file_offset)
    }

    /// The address to put into SET_VRING_ADDR for the byte at `offset`.
    ///
    /// # Panics
    /// If `offset` lies outside.
    pub fn front_end_address(&self, offset: usize) -> u64 {
        let region = self.region_of(offset);
        region.front_end_address + (offset as u64 - region.file_offset)
    }

    fn region_of(&self, offset: usize) -> &Region {
        assert!(offset < self.bytes, "offset {offset} outside of {} bytes of guest memory", self.bytes);
        let region_bytes = self.bytes / self.regions.len();
        &self.regions[offset / region_bytes]
    }

    /// Pointer to `bytes` bytes at `offset`, all inside the mapping.
    #[inline(always)]
    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        if bytes > self.bytes || offset > self.bytes - bytes {
            self.outside(offset, bytes);
        }
        // SAFETY: offset + bytes <= self.bytes was just checked, and the mapping covers self.bytes.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// As [`Self::at`], and aligned for an atomic access of its size.
    #[inline(always)]
    fn aligned_at(&self, offset: usize, bytes: usize) -> *mut u8 {
        if !offset.is_multiple_of(bytes) {
            self.outside(offset, bytes);
        }
        self.at(offset, bytes)
    }

    // Apart from the accesses, so that those stay small enough to be inlined.
    #[cold]
    #[inline(never)]
    fn outside(&self, offset: usize, bytes: usize) -> ! {
        panic!("{bytes} bytes at {offset}: unaligned, or outside of {} bytes of guest memory", self.bytes);
    }

    /// Reads a u16 with the given ordering (ring indices: Acquire, pairs with the back-end's release store).
    ///
    /// # Panics
    /// As all accesses here: if out of range or unaligned.
    #[inline]
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        let pointer = self.aligned_at(offset, 2).cast::<u16>();
        // SAFETY: in range and aligned (the mapping is page-aligned); valid as long as self; accessed by both
        // sides as plain integers of this width.
        u16::from_le(unsafe { AtomicU16::from_ptr(pointer) }.load(order))
    }

    /// Writes a u16 with the given ordering (ring indices: Release, pairs with the back-end's acquire load).
    #[inline]
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        let pointer = self.aligned_at(offset, 2).cast::<u16>();
        // SAFETY: as in load_u16.
        unsafe { AtomicU16::from_ptr(pointer) }.store(value.to_le(), order);
    }

    /// Reads a u32 (relaxed).
    #[inline]
    pub fn load_u32(&self, offset: usize) -> u32 {
        let pointer = self.aligned_at(offset, 4).cast::<u32>();
        // SAFETY: as in load_u16.
        u32::from_le(unsafe { AtomicU32::from_ptr(pointer) }.load(Ordering::Relaxed))
    }

    /// Writes a u32 (relaxed).
    #[inline]
    pub fn store_u32(&self, offset: usize, value: u32) {
        let pointer = self.aligned_at(offset, 4).cast::<u32>();
        // SAFETY: as in load_u16.
        unsafe { AtomicU32::from_ptr(pointer) }.store(value.to_le(), Ordering::Relaxed);
    }

    /// Reads a u64 (relaxed).
    #[inline]
    pub fn load_u64(&self, offset: usize) -> u64 {
        let pointer = self.aligned_at(offset, 8).cast::<u64>();
        // SAFETY: as in load_u16.
        u64::from_le(unsafe { AtomicU64::from_ptr(pointer) }.load(Ordering::Relaxed))
    }

    /// Writes a u64 (relaxed).
    #[inline]
    pub fn store_u64(&self, offset: usize, value: u64) {
        let pointer = self.aligned_at(offset, 8).cast::<u64>();
        // SAFETY: as in load_u16.
        unsafe { AtomicU64::from_ptr(pointer) }.store(value.to_le(), Ordering::Relaxed);
    }

    /// Copies bytes in. Order them with a release store of an index afterwards.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `to` is good for bytes.len() (checked), `bytes` is private memory and cannot overlap.
        // JUSTIFICATION: bytewise atomic copies would cost 10 to 20 times a memcpy at 1500 bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies bytes out. Order them with an acquire load of an index before.
    #[inline]
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        self.view(offset, into.len()).read(into);
    }

    /// Asks for the cache line at `offset`, which another core wrote last: fetching it takes as long as a frame costs.
    #[inline(always)]
    pub fn prefetch(&self, offset: usize, wish: Wish) {
        let pointer = self.at(offset, 1);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: neither instruction accesses memory as the program sees it; the pointer is in range besides. PREFETCHW does
        // nothing where a processor lacks it.
        // JUSTIFICATION: a burst of 64 frames waits for its lines together instead of one by one.
        unsafe {
            match wish {
                Wish::Read => {
                    std::arch::asm!("prefetcht0 [{}]", in(reg) pointer, options(nostack, preserves_flags, readonly))
                }
                Wish::Write => {
                    std::arch::asm!("prefetchw [{}]", in(reg) pointer, options(nostack, preserves_flags, readonly))
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (pointer, wish);
    }

    /// The `bytes` bytes at `offset`, for several reads with one check.
    #[inline(always)]
    pub fn view(&self, offset: usize, bytes: usize) -> View<'_> {
        View { start: self.at(offset, bytes), bytes, memory: PhantomData }
    }
}

/// A part of guest memory that has been found to be inside of it. Not what is in it: the other side may write at any time.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    start: *const u8,
    bytes: usize,
    memory: PhantomData<&'a GuestMemory>,
}

impl<'a> View<'a> {
    /// What follows its first `start` bytes.
    ///
    /// # Panics
    /// If it is shorter.
    #[inline(always)]
    #[must_use]
    pub fn from(self, start: usize) -> View<'a> {
        assert!(start <= self.bytes, "byte {start} of {}", self.bytes);
        // SAFETY: at most its end, just checked.
        View { start: unsafe { self.start.add(start) }, bytes: self.bytes - start, ..self }
    }

    /// Copies the little-endian words at `places` out, counted from byte `start` on; `None` if it ends before one of them does.
    #[inline(always)]
    pub fn words<const N: usize>(&self, start: usize, places: [usize; N]) -> Option<[u64; N]> {
        let end = places.into_iter().max().unwrap_or(0).checked_add(8)?;
        if self.bytes < end || start > self.bytes - end {
            return None;
        }
        // SAFETY: all inside of the view (just checked), and that of a mapping that outlives it; any bits are a valid word, and
        // the read has no alignment to keep.
        Some(places.map(|at| u64::from_le(unsafe { self.start.add(start + at).cast::<u64>().read_unaligned() })))
    }

    /// Copies its first bytes out.
    ///
    /// # Panics
    /// If `into` is longer.
    #[inline]
    pub fn read(&self, into: &mut [u8]) {
        assert!(into.len() <= self.bytes, "{} of {} bytes", into.len(), self.bytes);
        // SAFETY: inside of the view (just checked), `into` is private memory and cannot overlap. A back-end that still writes
        // leaves torn bytes, which are bytes.
        unsafe { std::ptr::copy_nonoverlapping(self.start, into.as_mut_ptr(), into.len()) }
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: base and bytes are those of the mapping made in `new`; &mut self means that nobody else uses it.
        // A failure cannot be handled and would leak address space only.
        let _ = unsafe { munmap(self.base.cast(), self.bytes) };
    }
}

/// Hands out pieces of a [`GuestMemory`], none across a region's end (a descriptor may cross one, a ring must not).
#[derive(Debug)]
pub struct Arena {
    next: usize,
    region_bytes: usize,
    bytes: usize,
}

impl Arena {
    /// All of `memory`, from its start.
    pub fn new(memory: &GuestMemory) -> Self {
        Self { next: 0, region_bytes: memory.bytes / memory.regions.len(), bytes: memory.bytes }
    }

    /// Offset of `bytes` fresh bytes, aligned to `align` (a power of two up to a page), or `None` when exhausted.
    pub fn take(&mut self, bytes: usize, align: usize) -> Option<usize> {
        let mut start = self.next.next_multiple_of(align);
        let end_of_region = (start / self.region_bytes + 1) * self.region_bytes;
        if start + bytes > end_of_region {
            start = end_of_region;
        }
        if bytes > self.region_bytes || start + bytes > self.bytes {
            return None;
        }
        self.next = start + bytes;
        Some(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_and_reaches_the_file() {
        use std::os::unix::fs::FileExt;
        let memory = GuestMemory::new(8192, 1).unwrap();
        memory.write(5, b"frame");
        memory.store_u16(100, 0x1234, Ordering::Release);
        let mut read = [0; 5];
        memory.read(5, &mut read);
        assert_eq!(&read, b"frame");
        let mut bytes = [0; 2];
        memory.file().unwrap().read_exact_at(&mut bytes, 100).unwrap();
        assert_eq!(bytes, [0x34, 0x12], "virtio is little-endian");
    }

    #[test]
    fn file_can_neither_shrink_nor_grow() {
        let memory = GuestMemory::new(8192, 2).unwrap();
        assert!(memory.file().unwrap().set_len(4096).is_err());
        assert!(memory.file().unwrap().set_len(16384).is_err());
    }

    #[test]
    #[should_panic(expected = "outside of 8192 bytes of guest memory")]
    fn access_past_the_end_panics() {
        GuestMemory::new(8192, 1).unwrap().write(8190, &[0; 3]);
    }

    #[test]
    fn regions_have_holes_between_them_and_pieces_never_cross_one() {
        let memory = GuestMemory::new(4 * 8192, 4).unwrap();
        assert_eq!(memory.regions().len(), 4);
        assert_eq!(memory.guest_address(8191) + 1 + GUEST_GAP_BYTES, memory.guest_address(8192));
        assert_eq!(memory.front_end_address(8191) + 1, memory.front_end_address(8192));
        let mut arena = Arena::new(&memory);
        let offsets: Vec<_> = std::iter::from_fn(|| arena.take(5000, 64)).collect();
        assert_eq!(offsets, [0, 8192, 16384, 24576]);
    }
}
