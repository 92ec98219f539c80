//! Frames for a driver that is as far away as memory (see `distance.rs`), written past the caches.
//!
//! A run's frames, or of long ones the beginnings, are put together in private memory first and written when all of them are there: what was
//! just stored in small pieces is not loaded in large ones at once. The rest of a long frame goes from where it lies.
//!
//! One of the files with unsafe code in this crate: segments are what `buffers.rs` says, or places of the run.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::BURST;
use super::buffers::Way;
use crate::frame::{HEADER_COPY_BYTES, NetHeader};
use crate::memory::{CACHE_LINE_BYTES, Payload, PayloadCursor, Segment};
use crate::stream;

/// Bytes behind a header copy up to which all of a frame is put together, and the last cache line filled up with zeros: then no line of a
/// buffer that begins where a line does is written in part.
const SHORT_BYTES: u32 = 192;
/// Bytes of outer headers at most.
const BEFORE_BYTES_MAX: usize = 64;
/// The longest beginning of a frame, the rest of a short one, and zeros.
const PLACE_BYTES: usize =
    NetHeader::BYTES + BEFORE_BYTES_MAX + HEADER_COPY_BYTES + SHORT_BYTES as usize + CACHE_LINE_BYTES;

/// A frame's beginning, or all of it, and where it is to be written.
#[repr(align(64))]
struct Place {
    bytes: MaybeUninit<[u8; PLACE_BYTES]>,
    into: Segment,
}

/// Memory for a run, which nobody has cleared.
pub(super) struct Places([MaybeUninit<Place>; BURST]);

impl Places {
    pub(super) fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; BURST])
    }
}

/// The frames of a run. It alone uses its places, and through `places` alone: they are written to by way of segments too.
pub(super) struct FarRun<'a> {
    places: *mut Place,
    count: usize,
    owner: PhantomData<&'a mut Places>,
}

impl<'a> FarRun<'a> {
    pub(super) fn new(places: &'a mut Places) -> Self {
        Self { places: places.0.as_mut_ptr().cast(), count: 0, owner: PhantomData }
    }

    /// The next frame's.
    ///
    /// # Panics
    /// If it has no more: a ring notes no more buffers than a burst has frames.
    #[inline(always)]
    fn next(&self) -> *mut Place {
        assert!(self.count < BURST);
        // SAFETY: one of the places.
        unsafe { self.places.add(self.count) }
    }

    /// Writes all frames.
    #[inline(never)]
    fn write(&mut self) {
        for index in 0..self.count {
            // SAFETY: `finish` has written so many bytes of the first `count` places, and where they go; see the module's text.
            unsafe {
                let place = self.places.add(index);
                let into = (*place).into;
                into.stream_from(segment(place), into.bytes());
            }
        }
        self.count = 0;
    }
}

/// The bytes of one of a run's places.
#[inline(always)]
fn segment(place: *mut Place) -> Segment {
    // SAFETY: the address of a field, of a place that is there.
    Segment::private(unsafe { &raw mut (*place).bytes }.cast(), PLACE_BYTES as u32)
}

impl Way for FarRun<'_> {
    #[inline(always)]
    fn place<const BYTES: usize>(&mut self, _: Segment) -> Segment {
        const { assert!(BYTES <= BEFORE_BYTES_MAX) };
        segment(self.next())
    }

    #[inline(always)]
    fn finish(&mut self, rest: Segment, payload: Payload<'_>, into: Segment) {
        let begun = PLACE_BYTES as u32 - rest.bytes();
        let placed = if payload.bytes() > SHORT_BYTES {
            begun + put_long(rest, payload, into.skip(begun))
        } else {
            // SAFETY: the payload borrows the owner of its memory; what is left of the place has room for it, and for a line.
            unsafe {
                let rest = PayloadCursor::new(payload).copy_into::<false>(rest);
                // VIRTIO 1.2 §2.7.8.2: a device may write more than it says that it has.
                rest.copy_in(&[0; CACHE_LINE_BYTES]);
            }
            into.to_line_end(begun + payload.bytes())
        };
        // SAFETY: one of the places.
        unsafe { (&raw mut (*self.next()).into).write(into.limit(placed)) };
        self.count += 1;
    }

    #[inline(always)]
    fn end(&mut self) {
        self.write();
        stream::fence();
    }
}

/// Writes a long payload to `into`, but for its first bytes up to the end of a cache line, which go to `rest`; returns how many those
/// are.
#[inline(never)]
fn put_long(rest: Segment, payload: Payload<'_>, into: Segment) -> u32 {
    let placed = into.to_line_end(0);
    let mut cursor = PayloadCursor::new(payload);
    // SAFETY: as in `FarRun::finish`; the payload is longer than a line.
    unsafe {
        cursor.copy_into::<false>(rest.limit(placed));
        cursor.copy_into::<true>(into.skip(placed));
    }
    placed
}

/// Writes a payload into one piece that has room for it.
#[inline(never)]
pub(super) fn fill_rest(into: Segment, payload: Payload<'_>) {
    // SAFETY: as in `FarRun::finish`.
    unsafe { PayloadCursor::new(payload).copy_into::<true>(into) };
    stream::fence();
}
