//! A frame out of a frame: what a tunnel's packet carries.
//!
//! One of the files with unsafe code in this crate (see `memory.rs`): the private header copy is filled up again from the
//! bytes behind it, each of which is thereby still read once.

use super::{Layout, Ring};
use crate::frame::{HEADER_COPY_BYTES, RawFrame};
use crate::memory::Segment;

impl Ring {
    /// Makes a frame of the current burst the part of itself that is `bytes` long and starts at `start`, which is within
    /// the header copy. The copy has up to [`HEADER_COPY_BYTES`] of that part again.
    ///
    /// # Panics
    /// If the part is not within the frame, or starts behind the header copy.
    #[inline(always)]
    pub fn narrow(&mut self, frame: &mut RawFrame, start: u16, bytes: u32) {
        let end = u64::from(start) + u64::from(bytes);
        assert!(start <= frame.header_bytes, "{start} is behind the header copy of {} bytes", frame.header_bytes);
        assert!(end <= u64::from(frame.frame_bytes), "the part is not within the frame");
        if frame.tail_bytes() > 0 {
            return self.narrow_long(frame, start, bytes);
        }
        // As much as can be there: of a start that is known beforehand nothing is counted or called.
        frame.header.copy_within(usize::from(start).min(HEADER_COPY_BYTES).., 0);
        (frame.header_bytes, frame.frame_bytes) = (bytes as u16, bytes);
    }

    fn narrow_long(&mut self, frame: &mut RawFrame, start: u16, bytes: u32) {
        let segments = match &mut self.layout {
            Layout::Split(ring) => ring.burst_segments(),
            Layout::Packed(ring) => ring.burst_segments(),
        };
        let (old, start) = (usize::from(frame.header_bytes), usize::from(start));
        let first = usize::from(frame.tail.first);
        // A frame of another ring or burst would name segments that are not there: then it has no tail.
        let tail = segments.get_mut(first..first + usize::from(frame.tail.count)).unwrap_or_default();

        let wanted = HEADER_COPY_BYTES.min(bytes as usize);
        frame.header.copy_within(start..old, 0);
        let mut filled = (old - start).min(wanted);
        let mut skipped = 0;
        while filled < wanted
            && let Some(segment) = tail.get_mut(skipped)
        {
            let part = (segment.bytes() as usize).min(wanted - filled);
            // SAFETY: the segment was checked against the ring's memory, which is alive.
            unsafe { segment.copy_out(&mut frame.header[filled..filled + part]) };
            *segment = segment.skip(part as u32);
            filled += part;
            if segment.bytes() == 0 {
                skipped += 1;
            }
        }
        frame.header_bytes = filled as u16;
        let kept = limit(&mut tail[skipped..], bytes - filled as u32);
        frame.frame_bytes = bytes;
        frame.tail.first += skipped as u16;
        frame.tail.count = kept as u16;
    }
}

/// Cuts segments off behind `bytes` bytes; returns how many are left.
fn limit(segments: &mut [Segment], bytes: u32) -> usize {
    let mut left = bytes;
    for (index, segment) in segments.iter_mut().enumerate() {
        if left == 0 {
            return index;
        }
        *segment = segment.limit(left);
        left -= segment.bytes();
    }
    segments.len()
}
