//! The buffers of chains, whatever the layout that names them: a frame is gathered out of them, or spread over them.
//!
//! Owned by a ring. The usual chain is one buffer in one region, and has a short way ([`Buffers::gather_one`],
//! [`Buffers::fill_one`]); any other is walked by its layout, which gives the pieces one by one.
//!
//! One of the files with unsafe code in this crate: every segment was checked against `memory`, which lives as long as it
//! is used here.

use std::sync::Arc;

use super::far;
use super::{BURST_SEGMENTS_MAX, CHAIN_SEGMENTS_MAX, FRAME_BYTES_MAX, RingFault, RingSetup};
use crate::dirty_log::RingLog;
use crate::distance::Distance;
use crate::frame::{Before, FrameFault, HEADER_COPY_BYTES, NetHeader, RawFrame, Tail};
use crate::memory::{Memory, Payload, PayloadCursor, Segment, Wish};
use crate::stream;

/// Takes the pieces of a chain one by one; false to be given no more.
pub(super) type Take<'a> = &'a mut dyn FnMut(Segment) -> bool;

/// Which way the buffers of a ring go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    DeviceReads,
    DeviceWrites,
}

/// A u64 wherever it lies: an indirect table may have any alignment.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub(super) struct Unaligned(pub(super) u64);

#[derive(Debug)]
pub(super) struct Buffers {
    pub(super) memory: Arc<Memory>,
    pub(super) log: Option<RingLog>,
    /// Bytes before each frame.
    pub(super) net_header_bytes: u32,
    /// Pieces of the burst (from the guest) or of the frame being written (to the guest).
    segments: Box<[Segment]>,
    used: usize,
    /// Of the guest's driver.
    pub(super) distance: Distance,
}

impl Buffers {
    pub(super) fn new(setup: &RingSetup) -> Self {
        Self {
            memory: Arc::clone(&setup.memory),
            log: setup.log.clone(),
            net_header_bytes: super::net_header_bytes(setup.features) as u32,
            segments: vec![Segment::EMPTY; BURST_SEGMENTS_MAX].into_boxed_slice(),
            used: 0,
            distance: Distance::new(),
        }
    }

    /// What the first lines of a buffer are wanted for.
    #[inline]
    pub(super) fn wish(&self, direction: Direction) -> Wish {
        match direction {
            Direction::DeviceReads => Wish::Read,
            // What has to be told of goes one by one.
            Direction::DeviceWrites if self.distance.is_far() && self.log.is_none() => Wish::Stream,
            Direction::DeviceWrites => Wish::Write,
        }
    }

    /// Forgets all pieces.
    #[inline]
    pub(super) fn clear(&mut self) {
        self.used = 0;
    }

    /// Whether the pieces of a chain of the longest kind can still be noted.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.used + CHAIN_SEGMENTS_MAX <= BURST_SEGMENTS_MAX
    }

    /// Where the bytes behind a gathered frame's header copy lie.
    #[inline]
    pub(super) fn payload(&self, frame: &RawFrame) -> Payload<'_> {
        let first = usize::from(frame.tail.first);
        let end = first + usize::from(frame.tail.count);
        // A frame of another ring or burst would name segments that are not there: then it has no payload.
        match self.segments[..self.used].get(first..end) {
            Some(segments) => Payload::segments(segments),
            None => Payload::EMPTY,
        }
    }

    /// The pieces of memory that the current burst refers to.
    #[inline]
    pub(super) fn burst_segments(&mut self) -> &mut [Segment] {
        &mut self.segments[..self.used]
    }

    /// A frame out of a chain of one piece, which has at least the net header's bytes.
    #[inline]
    pub(super) fn gather_one(&mut self, segment: Segment, frame: &mut RawFrame) {
        // SAFETY: see the module's text.
        frame.net = unsafe { segment.read_net_header() };
        let segment = segment.skip(self.net_header_bytes);
        let header_bytes = (segment.bytes() as usize).min(HEADER_COPY_BYTES);
        // SAFETY: as above.
        unsafe { segment.copy_out(&mut frame.header[..header_bytes]) };
        frame.header_bytes = header_bytes as u16;
        frame.frame_bytes = segment.bytes();
        (frame.fault, frame.tail) = (None, Tail::default());
        let tail = segment.skip(header_bytes as u32);
        if tail.bytes() > 0 {
            self.segments[self.used] = tail;
            frame.tail = Tail { first: self.used as u16, count: 1 };
            self.used += 1;
        }
        if frame.frame_bytes > FRAME_BYTES_MAX {
            frame.refuse(FrameFault::TooLarge);
        }
    }

    /// A frame out of the pieces that `walk` gives; `walk` tells whether it gave all of them.
    pub(super) fn gather<T>(
        &mut self,
        frame: &mut RawFrame,
        walk: impl FnOnce(&Memory, Take<'_>) -> Result<(T, bool), RingFault>,
    ) -> Result<T, RingFault> {
        let net_header_bytes = self.net_header_bytes as usize;
        let mut net = [0u8; NetHeader::BYTES];
        let mut net_bytes = 0;
        let mut header_bytes = 0;
        let mut tail_bytes = 0u64;
        let first = self.used;
        let segments = &mut self.segments;
        let mut used = first;
        let (chain, whole) = walk(&self.memory, &mut |mut segment: Segment| {
            if net_bytes < net_header_bytes {
                let bytes = segment.bytes().min((net_header_bytes - net_bytes) as u32);
                let end = net_bytes + bytes as usize;
                // SAFETY: see the module's text.
                unsafe { segment.copy_out(&mut net[net_bytes..end]) };
                net_bytes = end;
                segment = segment.skip(bytes);
            }
            if segment.bytes() > 0 && header_bytes < HEADER_COPY_BYTES {
                let bytes = segment.bytes().min((HEADER_COPY_BYTES - header_bytes) as u32);
                let end = header_bytes + bytes as usize;
                // SAFETY: as above.
                unsafe { segment.copy_out(&mut frame.header[header_bytes..end]) };
                header_bytes = end;
                segment = segment.skip(bytes);
            }
            if segment.bytes() > 0 {
                if used - first == CHAIN_SEGMENTS_MAX {
                    return false;
                }
                tail_bytes += u64::from(segment.bytes());
                segments[used] = segment;
                used += 1;
            }
            true
        })?;
        let bytes = header_bytes as u64 + tail_bytes;
        frame.net = NetHeader::from_bytes(&net);
        if !whole || bytes > u64::from(FRAME_BYTES_MAX) {
            frame.refuse(FrameFault::TooLarge);
            return Ok(chain);
        }
        frame.fault = (net_bytes < net_header_bytes).then_some(FrameFault::NoHeader);
        frame.header_bytes = header_bytes as u16;
        frame.frame_bytes = bytes as u32;
        frame.tail = Tail { first: first as u16, count: (used - first) as u16 };
        self.used = used;
        Ok(chain)
    }

    /// Notes the pieces that `walk` gives, to be written to; returns their bytes. Of a chain of more pieces than the
    /// maximum those are used that were noted.
    pub(super) fn note<T>(
        &mut self,
        walk: impl FnOnce(&Memory, Take<'_>) -> Result<(T, bool), RingFault>,
    ) -> Result<(T, u64), RingFault> {
        let first = self.used;
        let segments = &mut self.segments;
        let mut used = first;
        let mut room = 0u64;
        let (chain, _) = walk(&self.memory, &mut |segment: Segment| {
            if used - first == CHAIN_SEGMENTS_MAX {
                return false;
            }
            room += u64::from(segment.bytes());
            segments[used] = segment;
            used += 1;
            true
        })?;
        self.used = used;
        Ok((chain, room))
    }

    /// Writes a frame into one piece that has room for it and its net header.
    #[inline(always)]
    pub(super) fn fill_one(&mut self, into: Segment, net: NetHeader, header: &[u8], payload: Payload<'_>) {
        let rest = self.fill_start(into, net.to_words(), header);
        if payload.bytes() > 0 {
            if self.distance.is_far() {
                far::fill_rest(rest, payload);
            } else {
                fill_rest(rest, payload);
            }
        }
        if let Some(log) = &self.log {
            let need = u64::from(self.net_header_bytes) + header.len() as u64 + u64::from(payload.bytes());
            log.written(&self.memory, &[into], need);
        }
    }

    /// The net header and a frame's first bytes; returns what is left behind them.
    #[inline(always)]
    fn fill_start(&self, into: Segment, net: (u64, u16), header: &[u8]) -> Segment {
        // SAFETY: see the module's text.
        unsafe { into.write_net_header(net, self.net_header_bytes) };
        let into = into.skip(self.net_header_bytes);
        // SAFETY: as above.
        unsafe { into.copy_in(header) };
        into.skip(header.len() as u32)
    }

    /// As [`Buffers::fill_one`] for a frame of a run, where nobody has to be told of what was written. Returns the bytes in
    /// use, or `None`, with nothing that matters written, if the frame does not fit, is not to be sent, or has lost its tail.
    #[inline(always)]
    pub(super) fn fill_frame<'f, const BYTES: usize, const WORDS: usize>(
        &self,
        way: &mut impl Way,
        into: Segment,
        net: Option<NetHeader>,
        before: &mut impl Before<BYTES, WORDS>,
        frame: &RawFrame,
        payload: impl FnOnce() -> Payload<'f>,
    ) -> Option<u32> {
        let need = u64::from(self.net_header_bytes) + BYTES as u64 + u64::from(frame.frame_bytes);
        if need > u64::from(into.bytes()) {
            return None;
        }
        let words = before.words(frame)?;
        let net = net.map_or((0, 0), NetHeader::to_words);
        let start = way.place::<BYTES>(into);
        let mut rest = self.fill_start(start, net, if BYTES > 0 { before.same() } else { frame.headers() });
        if BYTES > 0 {
            // Written, not read again: what differs is not waited for.
            let start = start.skip(self.net_header_bytes);
            // SAFETY: see the module's text.
            words.into_iter().for_each(|(at, word)| unsafe { start.write_word(at, word) });
            // SAFETY: as above.
            unsafe { rest.copy_in(frame.headers()) };
            rest = rest.skip(u32::from(frame.header_bytes));
        }
        let tail_bytes = frame.tail_bytes();
        let payload = if tail_bytes > 0 { payload() } else { Payload::EMPTY };
        if payload.bytes() != tail_bytes {
            return None;
        }
        way.finish(rest, payload, into);
        // At most the piece's bytes.
        Some(need as u32)
    }

    /// Writes a frame over the noted pieces, which have room for it and its net header.
    pub(super) fn fill(&mut self, net: NetHeader, chains: u16, header: &[u8], payload: Payload<'_>) {
        let net = net.to_bytes(chains);
        let net = &net[..self.net_header_bytes as usize];
        let mut segments = self.segments[..self.used].iter();
        let (mut into, is_far) = (Segment::EMPTY, self.distance.is_far());
        for piece in [Payload::private(net), Payload::private(header), payload] {
            let mut cursor = PayloadCursor::new(piece);
            let mut left = piece.bytes();
            while left > 0 {
                if into.bytes() == 0 {
                    into = *segments.next().expect("the chains have room for the whole frame");
                    continue;
                }
                let before = into.bytes();
                // SAFETY: see the module's text.
                into = unsafe { if is_far { cursor.copy_into::<true>(into) } else { cursor.copy_into::<false>(into) } };
                left -= before - into.bytes();
            }
        }
        if is_far {
            stream::fence();
        }
        if let Some(log) = &self.log {
            let need = net.len() as u64 + header.len() as u64 + u64::from(payload.bytes());
            log.written(&self.memory, &self.segments[..self.used], need);
        }
    }
}

/// How the frames of a run get to a guest's buffers.
pub(super) trait Way {
    /// Where to write a frame's beginning that is to go to `into`, with `BYTES` bytes of outer headers.
    fn place<const BYTES: usize>(&mut self, into: Segment) -> Segment;

    /// The beginning is there and has left `rest`; behind it comes `payload`, for which `into` has room as well.
    fn finish(&mut self, rest: Segment, payload: Payload<'_>, into: Segment);

    /// All frames are there.
    fn end(&mut self);
}

/// At once.
pub(super) struct Straight;

impl Way for Straight {
    #[inline(always)]
    fn place<const BYTES: usize>(&mut self, into: Segment) -> Segment {
        into
    }

    #[inline(always)]
    fn finish(&mut self, rest: Segment, payload: Payload<'_>, _: Segment) {
        if payload.bytes() > 0 {
            fill_rest(rest, payload);
        }
    }

    #[inline(always)]
    fn end(&mut self) {}
}

/// Writes a payload into one piece that has room for it.
#[inline]
fn fill_rest(into: Segment, payload: Payload<'_>) {
    match payload.single() {
        // SAFETY: see the module's text; the payload borrows the owner of its memory.
        Some(piece) => unsafe { into.copy_from(piece, piece.bytes()) },
        // SAFETY: as above.
        None => drop(unsafe { PayloadCursor::new(payload).copy_into::<false>(into) }),
    }
}
