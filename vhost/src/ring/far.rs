//! Frames for a reader that is as far away as memory (see `distance.rs`): put together here, then written past the caches.
//!
//! A run's frames wait until all of them are there: what was just stored in small pieces is not loaded in large ones at once.
//!
//! One of the files with unsafe code in this crate: segments are what `buffers.rs` says, or lie in the run itself.

use std::mem::MaybeUninit;

use super::BURST;
use super::buffers::Way;
use crate::frame::{HEADER_COPY_BYTES, NetHeader};
use crate::memory::{CACHE_LINE_BYTES, Payload, PayloadCursor, Segment};
use crate::stream;

/// Bytes behind a header copy up to which all of a frame is put together: then no line of it is written in part.
const SHORT_BYTES: u32 = 192;
/// Bytes of outer headers at most.
const BEFORE_BYTES_MAX: usize = 64;
/// The longest beginning of a frame, the rest of a short one, and zeros up to the end of its last cache line.
const PLACE_BYTES: usize =
    NetHeader::BYTES + BEFORE_BYTES_MAX + HEADER_COPY_BYTES + SHORT_BYTES as usize + CACHE_LINE_BYTES;

/// A frame's beginning, or all of it.
#[repr(align(64))]
struct Place(MaybeUninit<[u8; PLACE_BYTES]>);

impl Place {
    const EMPTY: Place = Place(MaybeUninit::uninit());

    #[inline]
    fn segment(&mut self) -> Segment {
        Segment::private(self.0.as_mut_ptr().cast(), PLACE_BYTES as u32)
    }
}

/// The frames of a run.
pub(super) struct FarRun {
    places: [Place; BURST],
    /// The bytes that each is to be written to.
    into: [Segment; BURST],
    count: usize,
}

impl FarRun {
    pub(super) fn new() -> Self {
        Self { places: [Place::EMPTY; BURST], into: [Segment::EMPTY; BURST], count: 0 }
    }

    /// Writes all frames.
    #[inline(never)]
    fn write(&mut self) {
        for (place, into) in self.places.iter_mut().zip(&self.into[..self.count]) {
            // SAFETY: see the module's text; `finish` has written so many bytes of the place.
            unsafe { into.stream_from(place.segment(), into.bytes()) };
        }
        self.count = 0;
    }
}

impl Way for FarRun {
    #[inline(always)]
    fn place<const BYTES: usize>(&mut self, _: Segment) -> Segment {
        const { assert!(BYTES <= BEFORE_BYTES_MAX) };
        self.places[self.count].segment()
    }

    #[inline(always)]
    fn finish<'f>(
        &mut self,
        rest: Segment,
        tail_bytes: u32,
        payload: impl FnOnce() -> Payload<'f>,
        into: Segment,
    ) -> Option<()> {
        let payload = if tail_bytes > 0 { payload() } else { Payload::EMPTY };
        if payload.bytes() != tail_bytes {
            return None;
        }
        let begun = PLACE_BYTES as u32 - rest.bytes();
        let placed = if tail_bytes > SHORT_BYTES {
            begun + put_long(rest, payload, into.skip(begun))
        } else {
            // SAFETY: the payload borrows the owner of its memory; what is left of the place has room for it, and for a line.
            unsafe {
                let rest = PayloadCursor::new(payload).copy_into::<false>(rest);
                // VIRTIO 1.2 §2.7.8.2: a device may write more than it says that it has.
                rest.copy_in(&[0; CACHE_LINE_BYTES]);
            }
            into.to_line_end(begun + tail_bytes)
        };
        self.into[self.count] = into.limit(placed);
        self.count += 1;
        Some(())
    }

    #[inline(always)]
    fn end(&mut self) {
        self.write();
        stream::fence();
    }
}

/// Writes a payload that is not put together to `into`, but for its first bytes up to the end of a cache line, for which there is
/// `rest`; returns how many those are.
#[inline(never)]
fn put_long(rest: Segment, payload: Payload<'_>, into: Segment) -> u32 {
    let Some(piece) = payload.single() else {
        // SAFETY: as in `FarRun::finish`.
        unsafe { PayloadCursor::new(payload).copy_into::<true>(into) };
        return 0;
    };
    let placed = into.to_line_end(0);
    // SAFETY: as in `FarRun::finish`.
    unsafe {
        rest.copy_from(piece, placed);
        into.skip(placed).stream_from(piece.skip(placed), piece.bytes() - placed);
    }
    placed
}
