//! The driver's end of a receiveq: keeps every buffer posted, hands frames to a sink, puts mergeable ones together.
//!
//! A frame is not copied unless the sink asks for all of it; a sink that looks at headers alone reads one cache line.
//! Limits: [`BURST`] buffers per call, and the rest of the last frame; a frame of at most [`FRAME_BYTES_MAX`].

use super::chains::{ChainShape, Chains};
use super::doorbell::Doorbell;
use super::error::FrontEndError;
use super::header::{HEADER_BYTES_MAX, VirtioNetHeader};
use super::layout::DESC_WRITE;
use super::memory::{Arena, GuestMemory, View, Wish};
use super::ring::Ring;
use super::split::RingError;
use super::transmit::BURST;

/// Longest frame: 64 KiB of IP packet, Ethernet header and two VLAN tags.
pub const FRAME_BYTES_MAX: usize = 65535 + 14 + 8;

/// A buffer that the device has written to: where it begins, and how many bytes the device says.
#[derive(Clone, Copy, Debug)]
struct Written {
    offset: usize,
    bytes: usize,
}

/// One receive queue.
#[derive(Debug)]
pub struct Receive {
    chains: Chains,
    mergeable: bool,
    doorbell: Doorbell,
    scratch: Box<[u8]>,
    /// Buffers that the device is done with and nobody has seen yet.
    written: Vec<Written>,
    /// Where the parts of a merged frame lie: offset and bytes.
    pieces: Vec<(usize, usize)>,
    received: u64,
    torn: u64,
    empty: u64,
}

impl Receive {
    pub(super) fn new(
        ring: Ring,
        arena: &mut Arena,
        shape: ChainShape,
        header_bytes: usize,
        buffer_bytes: usize,
        mergeable: bool,
        doorbell: Doorbell,
    ) -> Result<Self, FrontEndError> {
        if buffer_bytes < header_bytes + 64 {
            return Err(FrontEndError::Options(format!("receive buffers of {buffer_bytes} bytes hold no frame")));
        }
        let chains = Chains::new(ring, arena, shape, header_bytes, buffer_bytes)?;
        Ok(Self {
            chains,
            mergeable,
            doorbell,
            scratch: vec![0; FRAME_BYTES_MAX].into(),
            written: Vec::with_capacity(usize::from(BURST)),
            pieces: Vec::with_capacity(usize::from(BURST)),
            received: 0,
            torn: 0,
            empty: 0,
        })
    }

    /// The ring, for looking at.
    pub fn ring(&self) -> &Ring {
        &self.chains.ring
    }

    /// Kick, call and error eventfds.
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// How many frames of `bytes` all buffers together hold.
    pub fn frames_held(&self, bytes: usize) -> u16 {
        let buffers =
            if self.mergeable { (self.chains.header_bytes + bytes).div_ceil(self.chains.buffer_bytes()) } else { 1 };
        (usize::from(self.chains.slots.count()) / buffers) as u16
    }

    /// Frames received since the start.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// How often a frame of several buffers was seen before all of them were used: against VIRTIO 1.2 §5.1.6.4
    /// ("atomically advancing idx"), but waited for here.
    pub fn torn(&self) -> u64 {
        self.torn
    }

    /// Buffers that came back with nothing in them.
    pub fn empty(&self) -> u64 {
        self.empty
    }

    /// Posts every buffer. Once, at the start.
    pub(super) fn fill(&mut self) {
        self.post(self.chains.slots.count());
    }

    /// Gives the device the `count` buffers that it has not had for longest.
    #[inline(always)]
    fn post(&mut self, count: u16) {
        let bytes = self.chains.buffer_bytes();
        self.chains.offer_each(count, DESC_WRITE, |buffer| (buffer, bytes));
        if self.chains.ring.publish() {
            self.doorbell.kick();
        }
    }

    /// Hands every frame that has arrived, up to a burst, to `sink` as plain bytes, and posts the buffers again.
    /// Returns how many.
    ///
    /// # Errors
    /// If the device broke the ring's rules.
    pub fn receive_burst(&mut self, mut sink: impl FnMut(&[u8], VirtioNetHeader)) -> Result<usize, RingError> {
        self.receive_views(&mut |mut frame: Received<'_>| {
            let header = frame.header();
            sink(frame.bytes(), header);
        })
    }

    /// As [`Self::receive_burst`], without copying what the sink does not ask for.
    ///
    /// # Errors
    /// As [`Self::receive_burst`].
    #[inline]
    pub fn receive_views(&mut self, taker: &mut impl Taker) -> Result<usize, RingError> {
        if self.written.len() < usize::from(BURST) {
            self.reap()?;
        }
        let memory = &*self.chains.memory.clone();
        let (header_bytes, most) = (self.chains.header_bytes, self.chains.buffer_bytes());
        // num_buffers of a frame that fills one, where it means anything.
        let of_one = if self.mergeable { (0xffff_0000, 1 << 16) } else { (0, 0) };
        let mut frames = 0;
        let mut done = 0;
        let mut outcome = Ok(());
        while let Some(&Written { offset, bytes }) = self.written.get(done)
            && done < usize::from(BURST)
        {
            let usual = (HEADER_BYTES_MAX..=most).contains(&bytes).then(|| memory.view(offset, bytes));
            let usual = usual.and_then(|view| Some((HeaderWords::read(view)?, view)));
            let Some((header, view)) = usual.filter(|(header, _)| header.1 & of_one.0 == of_one.1) else {
                match self.receive_other(done, taker) {
                    Ok(Some(0)) => done += 1,
                    Ok(Some(buffers)) => (frames, done) = (frames + 1, done + buffers),
                    Ok(None) => break,
                    Err(error) => {
                        outcome = Err(error);
                        break;
                    }
                }
                continue;
            };
            let place = Place::Memory(view.from(header_bytes));
            let bytes = bytes - header_bytes;
            taker.take(Received { place, bytes, header, header_bytes, scratch: &mut self.scratch });
            (frames, done) = (frames + 1, done + 1);
        }
        if done > 0 {
            self.written.drain(..done);
            self.received += frames as u64;
            self.post(done as u16);
        }
        // What came before a fault has been handed over, once.
        outcome.map(|()| frames)
    }

    /// What follows the usual way's end, at `done`: a frame of several buffers (how many), or nothing at all; `None`, if not all
    /// of them are used yet.
    #[inline(never)]
    fn receive_other(&mut self, done: usize, taker: &mut impl Taker) -> Result<Option<usize>, RingError> {
        let Written { offset, bytes } = self.written[done];
        if bytes == 0 {
            // Nothing was written: a device that was killed in the middle of a burst gives buffers back so when it
            // resumes. Drivers drop it as a short packet.
            self.empty += 1;
            return Ok(Some(0));
        }
        let header = HeaderWords::read(self.chains.memory.view(offset, HEADER_BYTES_MAX)).expect("room for one");
        let header_bytes = self.chains.header_bytes;
        self.check(bytes, header_bytes)?;
        let buffers = if self.mergeable { header.num_buffers() } else { 1 };
        if buffers == 0 || buffers > self.chains.slots.count() {
            return Err(RingError::BufferCount(buffers));
        }
        let buffers = usize::from(buffers);
        while self.written.len() < done + buffers {
            if self.reap()? == 0 {
                self.torn += 1;
                return Ok(None);
            }
        }
        self.pieces.clear();
        let mut frame_bytes = 0;
        for ahead in 0..buffers {
            let Written { offset, bytes } = self.written[done + ahead];
            let start = if ahead == 0 { header_bytes } else { 0 };
            self.check(bytes, start)?;
            frame_bytes += bytes - start;
            if frame_bytes > self.scratch.len() {
                return Err(RingError::FrameTooLong(frame_bytes));
            }
            self.pieces.push((offset + start, bytes - start));
        }
        let place = Place::Pieces(&self.chains.memory, &self.pieces);
        taker.take(Received { place, bytes: frame_bytes, header, header_bytes, scratch: &mut self.scratch });
        Ok(Some(buffers))
    }

    /// Notes which buffers the device is done with, up to a burst, and asks for their beginnings: it has just written them. Returns
    /// how many.
    #[inline(never)]
    fn reap(&mut self) -> Result<u16, RingError> {
        let before = self.written.len();
        let written = &mut self.written;
        let count = self.chains.reap(BURST, |buffer, bytes| {
            written.push(Written { offset: buffer.offset, bytes: bytes as usize });
        })?;
        for fresh in &self.written[before..] {
            self.chains.memory.prefetch(fresh.offset, Wish::Read);
        }
        Ok(count)
    }

    fn check(&self, bytes: usize, least: usize) -> Result<(), RingError> {
        let most = self.chains.buffer_bytes();
        let error = RingError::WrittenBytes { bytes: bytes as u32, least: least as u32, most: most as u32 };
        if (least..=most).contains(&bytes) { Ok(()) } else { Err(error) }
    }

    /// Asks for a call at the next frame; false if one is there already. See [`Ring::enable_calls`].
    pub fn enable_calls(&mut self) -> bool {
        self.chains.ring.enable_calls() && self.written.is_empty()
    }

    /// Back to polling.
    pub fn suppress_calls(&mut self) {
        self.chains.ring.suppress_calls();
    }
}

/// Whom frames are handed to.
pub trait Taker {
    /// Takes the next one.
    fn take(&mut self, frame: Received<'_>);
}

impl<F: FnMut(Received<'_>)> Taker for F {
    #[inline(always)]
    fn take(&mut self, frame: Received<'_>) {
        self(frame);
    }
}

/// A virtio-net header as it lies in memory, not yet taken apart: its first eight bytes and its last four.
#[derive(Clone, Copy, Debug)]
struct HeaderWords(u64, u32);

impl HeaderWords {
    /// At the beginning of a buffer; `None` if it has no room for a longest one.
    #[inline(always)]
    fn read(buffer: View<'_>) -> Option<Self> {
        let [first, last] = buffer.words(0, [0, HEADER_BYTES_MAX - 8])?;
        Some(Self(first, (last >> 32) as u32))
    }

    #[inline(always)]
    fn num_buffers(self) -> u16 {
        VirtioNetHeader::from_words(self.0, self.1).num_buffers
    }
}

/// Where a frame lies.
#[derive(Clone, Copy, Debug)]
enum Place<'a> {
    /// In guest memory, in one piece.
    Memory(View<'a>),
    /// In guest memory, in several: offset and bytes of each.
    Pieces(&'a GuestMemory, &'a [(usize, usize)]),
    /// In private memory.
    Scratch,
}

/// A frame that has arrived.
#[derive(Debug)]
pub struct Received<'a> {
    place: Place<'a>,
    bytes: usize,
    header: HeaderWords,
    header_bytes: usize,
    scratch: &'a mut [u8],
}

impl<'a> Received<'a> {
    /// A frame that came by another way than a ring: all of `frame`.
    pub fn private(frame: &'a mut [u8], header: VirtioNetHeader) -> Self {
        let (first, last) = header.to_words();
        let header = HeaderWords(first, last);
        Self { place: Place::Scratch, bytes: frame.len(), header, header_bytes: HEADER_BYTES_MAX, scratch: frame }
    }
}

impl Received<'_> {
    /// The virtio-net header.
    #[inline]
    pub fn header(&self) -> VirtioNetHeader {
        let header = VirtioNetHeader::from_words(self.header.0, self.header.1);
        // Without num_buffers the last two bytes are the frame's.
        VirtioNetHeader {
            num_buffers: if self.header_bytes < HEADER_BYTES_MAX { 0 } else { header.num_buffers },
            ..header
        }
    }

    /// Length of the frame, bytes, without virtio-net header.
    #[inline]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Nothing but a header.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// A private copy of the little-endian words at `places`, counted from byte `start` on; `None` if the frame is shorter, or
    /// if they do not all lie in its first buffer. (Words, because bytes copied as a block and then looked at across its seams
    /// stall the core for 20 cycles: half of what a frame cost.)
    #[inline(always)]
    pub fn words<const N: usize>(&self, start: usize, places: [usize; N]) -> Option<[u64; N]> {
        match self.place {
            Place::Memory(view) => view.words(start, places),
            Place::Pieces(memory, pieces) => {
                let (offset, bytes) = *pieces.first()?;
                memory.view(offset, bytes).words(start, places)
            }
            Place::Scratch => {
                let word =
                    |at: usize| Some(u64::from_le_bytes(*self.scratch[..self.bytes].get(start + at..)?.first_chunk()?));
                let mut words = [0; N];
                for (word_at, at) in words.iter_mut().zip(places) {
                    *word_at = word(at)?;
                }
                Some(words)
            }
        }
    }

    /// A private copy of the whole.
    pub fn bytes(&mut self) -> &[u8] {
        match std::mem::replace(&mut self.place, Place::Scratch) {
            Place::Memory(view) => view.read(&mut self.scratch[..self.bytes]),
            Place::Pieces(memory, pieces) => {
                let mut rest = &mut self.scratch[..self.bytes];
                for (offset, bytes) in pieces {
                    let (piece, after) = rest.split_at_mut(*bytes);
                    memory.read(*offset, piece);
                    rest = after;
                }
            }
            Place::Scratch => (),
        }
        &self.scratch[..self.bytes]
    }
}
