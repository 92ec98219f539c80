//! Guest memory as a worker sees it: a table of mapped regions, and runs of bytes in it.
//!
//! The guest writes to this memory at any time. So no Rust reference to it ever exists: a `Segment` is an address and
//! a length that were checked against the region table once, and bytes move by raw copies into or out of private
//! memory. What was copied is what is judged; it is never read a second time.
//!
//! A front-end that can truncate the file behind it may do so: see [`crate::sigbus`] and [`Memory::is_truncated`].
//!
//! One of the files with unsafe code in this crate; the others are `sigbus.rs`, `dirty_log.rs`, `interrupt.rs`, `stream.rs`,
//! `distance.rs` and those of `ring/`: `buffers.rs`, `far.rs`, `split.rs`, `packed.rs`, their `_chain.rs`, `split_entries.rs`,
//! `narrow.rs`.

use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{Ordering, compiler_fence};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::frame::NetHeader;
use crate::sigbus::Guarded;
use crate::stream;

/// One mapped region, guest-physical `start..end`.
#[derive(Debug, Clone, Copy)]
struct Region {
    start: u64,
    end: u64,
    /// Host address of `start`.
    host: usize,
}

/// The regions of one session's memory table. Keeps them mapped for as long as it lives.
#[derive(Debug)]
pub struct Memory {
    /// Sorted by address, not overlapping (vm-memory refuses overlaps).
    regions: Box<[Region]>,
    /// Before `mapped`: fields are dropped in order, and what is unmapped must not be guarded any more.
    guarded: Guarded,
    mapped: Arc<GuestMemoryMmap<()>>,
}

impl Memory {
    /// Takes over the mapped regions of a memory table. Fails when the process has too many.
    pub fn new(mapped: Arc<GuestMemoryMmap<()>>) -> io::Result<Self> {
        let mut regions: Vec<Region> = mapped
            .iter()
            .map(|region| {
                let start = region.start_addr().raw_value();
                Region { start, end: start + region.len(), host: region.as_ptr() as usize }
            })
            .collect();
        regions.sort_unstable_by_key(|region| region.start);
        let guarded = Guarded::new(regions.iter().map(|region| (region.host, (region.end - region.start) as usize)))?;
        Ok(Self { regions: regions.into_boxed_slice(), guarded, mapped })
    }

    /// Whether an access found the file behind it shorter than the region. What lies there are zeros, ours alone, from
    /// then on. One relaxed load: asked once per burst.
    #[inline]
    pub fn is_truncated(&self) -> bool {
        self.guarded.is_truncated()
    }

    /// The mapping itself, for set-up code and oracles.
    pub fn mapped(&self) -> &Arc<GuestMemoryMmap<()>> {
        &self.mapped
    }

    /// The host address of `bytes` bytes at guest-physical `address`, if all of them lie in one region.
    /// `bytes` must not be zero.
    #[inline]
    pub(crate) fn translate(&self, address: u64, bytes: u64) -> Option<*mut u8> {
        let end = address.checked_add(bytes)?;
        self.regions
            .iter()
            .find(|region| address >= region.start && address < region.end)
            .filter(|region| end <= region.end)
            .map(|region| (region.host + (address - region.start) as usize) as *mut u8)
    }

    /// As [`Memory::translate`], for as many bytes as a descriptor can name.
    #[inline]
    pub(crate) fn segment(&self, address: u64, bytes: u32) -> Option<Segment> {
        Some(Segment { host: self.translate(address, u64::from(bytes))? as usize, bytes })
    }

    /// To find several segments.
    #[inline]
    pub(crate) fn finder(&self) -> Finder<'_> {
        let region = self.regions.first().copied().unwrap_or(Region { start: 0, end: 0, host: 0 });
        Finder { memory: self, region }
    }

    /// The guest-physical address of a segment's first byte; `None` if it does not lie in this memory. Segments never
    /// cross a region, so that the whole of it is there.
    pub(crate) fn guest_address(&self, segment: Segment) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let at = segment.host.checked_sub(region.host)? as u64;
            (at < region.end - region.start).then(|| region.start + at)
        })
    }

    /// The segments that make up `bytes` bytes at `address`, in order, given to `take` one by one. More than one where
    /// the bytes span regions that are neighbours for the guest but not here. `false` if any byte is not mapped.
    #[inline]
    pub(crate) fn segments(&self, address: u64, bytes: u32, mut take: impl FnMut(Segment) -> bool) -> bool {
        if let Some(segment) = self.segment(address, bytes) {
            return take(segment);
        }
        let Some(end) = address.checked_add(u64::from(bytes)) else { return false };
        let mut at = address;
        // At most one turn per region: each turn ends at the end of another one.
        while at < end {
            let Some(region) = self.regions.iter().find(|region| at >= region.start && at < region.end) else {
                return false;
            };
            let stop = end.min(region.end);
            let host = region.host + (at - region.start) as usize;
            // The difference is at most `bytes`, a u32.
            if !take(Segment { host, bytes: (stop - at) as u32 }) {
                return false;
            }
            at = stop;
        }
        true
    }
}

/// Finds one segment after the other. The region that the last one was in is tried first: no other is looked at for most.
pub(crate) struct Finder<'a> {
    memory: &'a Memory,
    region: Region,
}

impl Finder<'_> {
    /// As [`Memory::segment`].
    #[inline(always)]
    pub(crate) fn segment(&mut self, address: u64, bytes: u32) -> Option<Segment> {
        let Region { start, end, host } = self.region;
        if address >= start && u64::from(bytes) <= end - start && address - start <= end - start - u64::from(bytes) {
            return Some(Segment { host: host + (address - start) as usize, bytes });
        }
        self.elsewhere(address, bytes)
    }

    #[inline(never)]
    fn elsewhere(&mut self, address: u64, bytes: u32) -> Option<Segment> {
        let has_it = |region: &&Region| address >= region.start && address < region.end;
        self.region = *self.memory.regions.iter().find(has_it)?;
        self.memory.segment(address, bytes)
    }
}

pub(crate) const CACHE_LINE_BYTES: usize = 64;

/// What a cache line is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// To be read.
    Read,
    /// To be written.
    Write,
    /// To be written past the caches, where whole lines are.
    Stream,
}

/// Asks for the cache line at address `host`. A hint: it reads nothing, and an address that is not mapped does no harm. What is to be
/// read comes to the second-level cache: the first level can wait for far fewer lines at once than a burst has.
#[inline]
pub fn prefetch(host: usize, wish: Wish) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: neither instruction accesses memory as the program sees it. PREFETCHW does nothing where a processor lacks it.
    unsafe {
        match wish {
            Wish::Read => std::arch::asm!("prefetcht1 [{}]", in(reg) host, options(nostack, preserves_flags, readonly)),
            Wish::Write | Wish::Stream => {
                std::arch::asm!("prefetchw [{}]", in(reg) host, options(nostack, preserves_flags, readonly))
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (host, wish);
}

/// Copies `bytes` bytes that do not overlap; up to 128 of them without a call, in blocks of fixed size of which the last
/// one may cover bytes of the one before.
///
/// # Safety
/// As for [`ptr::copy_nonoverlapping`].
#[inline(always)]
unsafe fn copy_short(from: *const u8, to: *mut u8, bytes: usize) {
    /// The first and the last `N` of `bytes` bytes, `N <= bytes <= 2 * N`.
    ///
    /// # Safety
    /// As for [`copy_short`].
    #[inline(always)]
    unsafe fn ends<const N: usize>(from: *const u8, to: *mut u8, bytes: usize) {
        // SAFETY: both blocks lie inside the `bytes` bytes that the caller vouches for.
        unsafe {
            ptr::copy_nonoverlapping(from, to, N);
            ptr::copy_nonoverlapping(from.add(bytes - N), to.add(bytes - N), N);
        }
    }
    // SAFETY: the caller's promise, and each length fits its block.
    unsafe {
        match bytes {
            32..=64 => ends::<32>(from, to, bytes),
            65..=128 => ends::<64>(from, to, bytes),
            16..32 => ends::<16>(from, to, bytes),
            8..16 => ends::<8>(from, to, bytes),
            _ => ptr::copy_nonoverlapping(from, to, bytes),
        }
    }
}

/// A run of bytes: in guest memory (checked against a [`Memory`] that whoever holds the segment keeps alive), or
/// private. Only this crate makes and reads segments; outside they are seen as [`Payload`]s, which borrow their owner.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    host: usize,
    bytes: u32,
}

impl Segment {
    pub(crate) const EMPTY: Segment = Segment { host: 0, bytes: 0 };

    /// Private memory, for whoever keeps it.
    #[inline]
    pub(crate) fn private(start: *mut u8, bytes: u32) -> Segment {
        Segment { host: start as usize, bytes }
    }

    #[inline]
    pub(crate) fn bytes(self) -> u32 {
        self.bytes
    }

    /// How many bytes it is from its start to the first end of a cache line behind `bytes` bytes, or `bytes` if it ends before.
    #[inline]
    pub(crate) fn to_line_end(self, bytes: u32) -> u32 {
        let start = self.host % CACHE_LINE_BYTES;
        let whole = ((start + bytes as usize).next_multiple_of(CACHE_LINE_BYTES) - start) as u32;
        if whole <= self.bytes { whole } else { bytes }
    }

    /// What remains after the first `bytes` bytes.
    #[inline]
    pub(crate) fn skip(self, bytes: u32) -> Segment {
        debug_assert!(bytes <= self.bytes);
        Segment { host: self.host + bytes as usize, bytes: self.bytes - bytes }
    }

    /// The first `bytes` bytes of it, or all if there are no more.
    #[inline]
    pub(crate) fn limit(self, bytes: u32) -> Segment {
        Segment { bytes: self.bytes.min(bytes), ..self }
    }

    /// Copies the first `into.len()` bytes out.
    ///
    /// # Safety
    /// The memory that the segment was checked against is mapped.
    #[inline]
    pub(crate) unsafe fn copy_out(self, into: &mut [u8]) {
        assert!(into.len() <= self.bytes as usize, "{} > {}", into.len(), self.bytes);
        // SAFETY: the source is `bytes` mapped bytes by the caller's promise, the length was just checked, and the
        // destination is private memory that cannot overlap guest memory. The guest may write to the source meanwhile:
        // the copy then holds some mix of old and new bytes, and every byte pattern is a valid u8.
        unsafe { copy_short(self.host as *const u8, into.as_mut_ptr(), into.len()) }
        // What was copied is what is judged: the compiler must not take a later read of the copy for one of the source.
        // No instruction comes of it.
        compiler_fence(Ordering::SeqCst);
    }

    /// Copies private bytes in, to its start.
    ///
    /// # Safety
    /// As for [`Segment::copy_out`].
    #[inline]
    pub(crate) unsafe fn copy_in(self, from: &[u8]) {
        assert!(from.len() <= self.bytes as usize, "{} > {}", from.len(), self.bytes);
        // SAFETY: as in `copy_out`, with the ends exchanged.
        unsafe { copy_short(from.as_ptr(), self.host as *mut u8, from.len()) }
    }

    /// Writes 16 bits, `at` bytes from its start.
    ///
    /// # Safety
    /// As for [`Segment::copy_out`].
    #[inline(always)]
    pub(crate) unsafe fn write_word(self, at: usize, word: [u8; 2]) {
        assert!(at + 2 <= self.bytes as usize);
        // SAFETY: mapped by the caller's promise, and long enough.
        unsafe { ((self.host + at) as *mut [u8; 2]).write_unaligned(word) }
    }

    /// Reads a virtio-net header of at least `LEGACY_BYTES` from its start: words, not bytes, so that what was just written
    /// and what is read next are the same to the processor's store buffer.
    ///
    /// # Safety
    /// As for [`Segment::copy_out`].
    #[inline(always)]
    pub(crate) unsafe fn read_net_header(self) -> NetHeader {
        assert!(self.bytes as usize >= NetHeader::LEGACY_BYTES);
        // SAFETY: mapped by the caller's promise, long enough, and each word read once.
        let (first, second) = unsafe {
            let at = self.host as *const u8;
            (at.cast::<u64>().read_unaligned(), at.add(8).cast::<u16>().read_unaligned())
        };
        compiler_fence(Ordering::SeqCst);
        NetHeader::from_words(u64::from_le(first), u16::from_le(second))
    }

    /// Writes a virtio-net header ([`NetHeader::to_words`]) of `bytes` bytes to its start, for a frame in one chain.
    ///
    /// # Safety
    /// As for [`Segment::copy_out`].
    #[inline(always)]
    pub(crate) unsafe fn write_net_header(self, (first, second): (u64, u16), bytes: u32) {
        assert!(self.bytes >= bytes);
        let at = self.host as *mut u8;
        // SAFETY: mapped by the caller's promise, and long enough.
        unsafe {
            at.cast::<u64>().write_unaligned(first.to_le());
            if bytes as usize == NetHeader::BYTES {
                let with_num_buffers = u32::from(second) | 1 << 16;
                at.add(8).cast::<u32>().write_unaligned(with_num_buffers.to_le());
            } else {
                at.add(8).cast::<u16>().write_unaligned(second.to_le());
            }
        }
    }

    /// As [`Segment::copy_from`], whole cache lines past the caches. Where both overlap it matters not what is there afterwards.
    ///
    /// # Safety
    /// As for [`Segment::copy_from`].
    #[inline]
    pub(crate) unsafe fn stream_from(self, source: Segment, bytes: u32) {
        assert!(bytes <= self.bytes && bytes <= source.bytes);
        // SAFETY: both ranges are mapped by the caller's promise and long enough.
        let lines = unsafe { stream::copy_lines(source.host as *const u8, self.host as *mut u8, bytes as usize) };
        let (start, end) = (lines.start as u32, lines.end as u32);
        if start > 0 {
            // SAFETY: as above.
            unsafe { self.copy_from(source, start) };
        }
        if end < bytes {
            // SAFETY: as above.
            unsafe { self.skip(end).copy_from(source.skip(end), bytes - end) };
        }
    }

    /// Asks for the cache lines of its first bytes, to be read or written soon. No access: any address will do.
    #[inline]
    pub(crate) fn prefetch(self, wish: Wish) {
        if wish == Wish::Stream {
            if !self.host.is_multiple_of(CACHE_LINE_BYTES) {
                prefetch(self.host, wish);
            }
            return;
        }
        // Net header and 64 bytes of frame lie in two lines. Of a longer one the processor finds the rest by itself.
        prefetch(self.host, wish);
        prefetch(self.host.wrapping_add(CACHE_LINE_BYTES), wish);
    }

    /// Copies `bytes` bytes from `source`, which may be the same guest's memory.
    ///
    /// # Safety
    /// As for [`Segment::copy_out`], for both segments.
    #[inline]
    pub(crate) unsafe fn copy_from(self, source: Segment, bytes: u32) {
        assert!(bytes <= self.bytes && bytes <= source.bytes);
        // SAFETY: both ranges are mapped by the caller's promise and long enough. `copy`, not `copy_nonoverlapping`:
        // a guest may post the same page for transmission and reception.
        unsafe { ptr::copy(source.host as *const u8, self.host as *mut u8, bytes as usize) }
    }
}

/// The bytes of a frame behind its private header copy, where they lie: a guest's memory or a private buffer.
/// Borrows whoever keeps them mapped.
#[derive(Debug, Clone, Copy)]
pub struct Payload<'a> {
    first: Segment,
    rest: &'a [Segment],
    bytes: u32,
    owner: PhantomData<&'a [u8]>,
}

impl<'a> Payload<'a> {
    /// No bytes.
    pub const EMPTY: Payload<'static> = Payload { first: Segment::EMPTY, rest: &[], bytes: 0, owner: PhantomData };

    /// A payload in private memory.
    ///
    /// # Panics
    /// If it is longer than 4 GiB.
    #[inline]
    pub fn private(bytes: &'a [u8]) -> Self {
        let length = u32::try_from(bytes.len()).expect("frames are shorter than 4 GiB");
        let first = Segment { host: bytes.as_ptr() as usize, bytes: length };
        Self { first, rest: &[], bytes: length, owner: PhantomData }
    }

    /// The segments of a chain that the borrowed ring keeps mapped.
    #[inline]
    pub(crate) fn segments(segments: &'a [Segment]) -> Self {
        let (first, rest) = match segments.split_first() {
            Some((first, rest)) => (*first, rest),
            None => (Segment::EMPTY, segments),
        };
        // Summed, not told: a length that is not the segments' own would leave a copy waiting for bytes that never come.
        // A burst's segments are at most 32 frames.
        let bytes = first.bytes + rest.iter().map(|segment| segment.bytes).sum::<u32>();
        Self { first, rest, bytes, owner: PhantomData }
    }

    /// Length in bytes.
    #[inline]
    pub fn bytes(&self) -> u32 {
        self.bytes
    }

    /// All of it, if it is in one piece.
    #[inline]
    pub(crate) fn single(&self) -> Option<Segment> {
        self.rest.is_empty().then_some(self.first)
    }

    /// Copies everything into private memory.
    ///
    /// # Panics
    /// If `into` is shorter than the payload.
    #[inline]
    pub fn copy_out(&self, into: &mut [u8]) {
        let mut at = 0;
        for segment in std::iter::once(&self.first).chain(self.rest) {
            let end = at + segment.bytes as usize;
            // SAFETY: the payload borrows the owner of the memory (a ring with its `Memory`, or a slice).
            unsafe { segment.copy_out(&mut into[at..end]) };
            at = end;
        }
    }
}

/// Reads a payload piece by piece into guest memory.
pub(crate) struct PayloadCursor<'a> {
    current: Segment,
    rest: &'a [Segment],
}

impl<'a> PayloadCursor<'a> {
    #[inline]
    pub(crate) fn new(payload: Payload<'a>) -> Self {
        Self { current: payload.first, rest: payload.rest }
    }

    /// Fills `into` from the payload as far as either reaches, past the caches if `FAR`; returns what is left of `into`.
    ///
    /// # Safety
    /// The memory of `into` is mapped.
    #[inline]
    pub(crate) unsafe fn copy_into<const FAR: bool>(&mut self, mut into: Segment) -> Segment {
        loop {
            let bytes = self.current.bytes.min(into.bytes);
            if bytes > 0 {
                // SAFETY: the source is mapped because the payload borrows its owner, the destination by the caller's promise.
                unsafe {
                    if FAR {
                        into.stream_from(self.current, bytes);
                    } else {
                        into.copy_from(self.current, bytes);
                    }
                }
                self.current = self.current.skip(bytes);
                into = into.skip(bytes);
            }
            if into.bytes == 0 {
                return into;
            }
            match self.rest.split_first() {
                Some((next, rest)) => (self.current, self.rest) = (*next, rest),
                None => return into,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory(regions: &[(u64, usize)]) -> Memory {
        let ranges: Vec<_> = regions.iter().map(|&(start, bytes)| (GuestAddress(start), bytes)).collect();
        Memory::new(Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())).unwrap()
    }

    #[test]
    fn only_ranges_inside_one_region_translate() {
        let memory = memory(&[(0, 0x1000), (0x4000, 0x1000)]);
        assert!(memory.translate(0, 0x1000).is_some());
        assert!(memory.translate(0x4fff, 1).is_some());
        for (address, bytes) in [(0, 0x1001), (0xfff, 2), (0x1000, 1), (0x3fff, 2), (0x5000, 1), (u64::MAX, 2)] {
            assert!(memory.translate(address, bytes).is_none(), "{address:#x} + {bytes:#x}");
        }
    }

    #[test]
    fn bytes_across_neighbouring_regions_become_two_segments() {
        let memory = memory(&[(0, 0x1000), (0x1000, 0x1000)]);
        memory.mapped().write_slice(b"left", GuestAddress(0xffc)).unwrap();
        memory.mapped().write_slice(b"right", GuestAddress(0x1000)).unwrap();
        let mut segments = Vec::new();
        assert!(memory.segments(0xffc, 9, |segment| {
            segments.push(segment);
            true
        }));
        assert_eq!(segments.iter().map(|segment| segment.bytes).collect::<Vec<_>>(), [4, 5]);
        let mut bytes = [0; 9];
        Payload::segments(&segments).copy_out(&mut bytes);
        assert_eq!(&bytes, b"leftright");
        assert_eq!(segments.iter().map(|&s| memory.guest_address(s)).collect::<Vec<_>>(), [Some(0xffc), Some(0x1000)]);
        assert_eq!(memory.guest_address(Segment::EMPTY), None);
    }

    #[test]
    fn every_length_is_copied_whole_and_no_byte_beside_it() {
        let from: Vec<u8> = (1..=200).collect();
        for bytes in 0..=200 {
            let mut to = [0; 202];
            // SAFETY: `from` has 200 bytes, `to` 201 behind its first.
            unsafe { copy_short(from.as_ptr(), to[1..].as_mut_ptr(), bytes) };
            assert_eq!(to[1..=bytes], from[..bytes]);
            assert!(to[0] == 0 && to[bytes + 1..].iter().all(|&byte| byte == 0), "{bytes}");
        }
    }

    #[test]
    fn a_hole_between_regions_is_refused() {
        let memory = memory(&[(0, 0x1000), (0x2000, 0x1000)]);
        assert!(!memory.segments(0xfff, 0x1002, |_| true));
        assert!(!memory.segments(u64::MAX - 1, 4, |_| true));
    }
}
