//! The driver's end of a receiveq: keeps every buffer posted, hands frames to a sink, puts mergeable ones together.
//!
//! A frame is not copied unless the sink asks for all of it; a sink that looks at headers alone reads one cache line.
//! Limits: [`BURST`] buffers per call; a frame of at most [`FRAME_BYTES_MAX`].

use super::chains::{ChainShape, Chains};
use super::doorbell::Doorbell;
use super::error::FrontEndError;
use super::header::{HEADER_BYTES_MAX, VirtioNetHeader};
use super::layout::DESC_WRITE;
use super::memory::{Arena, GuestMemory};
use super::ring::Ring;
use super::split::RingError;
use super::transmit::BURST;

/// Longest frame: 64 KiB of IP packet, Ethernet header and two VLAN tags.
pub const FRAME_BYTES_MAX: usize = 65535 + 14 + 8;

/// One receive queue.
#[derive(Debug)]
pub struct Receive {
    chains: Chains,
    mergeable: bool,
    doorbell: Doorbell,
    scratch: Box<[u8]>,
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
        (usize::from(self.chains.slots()) / buffers) as u16
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
        for slot in 0..self.chains.slots() {
            self.post(slot);
        }
        self.publish();
    }

    #[inline]
    fn post(&mut self, slot: u16) {
        self.chains.offer(slot, self.chains.buffer(slot), self.chains.buffer_bytes(), DESC_WRITE);
    }

    #[inline]
    fn publish(&mut self) {
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
        self.receive_views(|mut frame| {
            let header = frame.header();
            sink(frame.bytes(), header);
        })
    }

    /// As [`Self::receive_burst`], without copying what the sink does not ask for.
    ///
    /// # Errors
    /// As [`Self::receive_burst`].
    #[inline]
    pub fn receive_views(&mut self, mut sink: impl FnMut(Received<'_>)) -> Result<usize, RingError> {
        let pending = self.chains.ring.pending()?.min(BURST);
        self.prefetch(pending);
        let mut frames = 0;
        let mut done = 0;
        while done < pending {
            let used = self.chains.ring.peek(done);
            let slot = self.chains.take_back(used.head)?;
            if used.bytes == 0 {
                // Nothing was written: a device that was killed in the middle of a burst gives buffers back so when it
                // resumes. Drivers drop it as a short packet.
                self.empty += 1;
                self.post(slot);
                done += 1;
                continue;
            }
            let bytes = self.written(used.bytes, self.chains.header_bytes)?;
            let offset = self.chains.buffer(slot).offset;
            let header = self.header(offset);
            if self.mergeable && header.num_buffers != 1 {
                let Some(frame_bytes) = self.merge(done, header.num_buffers, slot, bytes)? else {
                    // Not all there yet: as if it had not been seen.
                    self.chains.undo_take_back(slot);
                    self.torn += 1;
                    break;
                };
                let (memory, scratch) = (self.chains.ring.memory(), &mut self.scratch);
                sink(Received { place: Place::Pieces(memory, &self.pieces), bytes: frame_bytes, header, scratch });
                done += header.num_buffers;
            } else {
                let header_bytes = self.chains.header_bytes;
                let (memory, scratch) = (self.chains.ring.memory(), &mut self.scratch);
                let place = Place::Memory(memory, offset + header_bytes);
                sink(Received { place, bytes: bytes - header_bytes, header, scratch });
                self.post(slot);
                done += 1;
            }
            frames += 1;
        }
        if done > 0 {
            self.chains.ring.advance(done);
            self.received += frames as u64;
            self.publish();
        }
        Ok(frames)
    }

    /// Asks for the beginning of each buffer that the device has just written.
    #[inline]
    fn prefetch(&self, pending: u16) {
        for ahead in 0..pending {
            let head = self.chains.ring.peek(ahead).head;
            if let Some(offset) = self.chains.offset_of(head) {
                self.chains.ring.memory().prefetch(offset);
            }
        }
    }

    #[inline]
    fn written(&self, bytes: u32, least: usize) -> Result<usize, RingError> {
        let most = self.chains.buffer_bytes();
        if (least..=most).contains(&(bytes as usize)) {
            Ok(bytes as usize)
        } else {
            Err(RingError::WrittenBytes { bytes, least: least as u32, most: most as u32 })
        }
    }

    #[inline]
    fn header(&self, offset: usize) -> VirtioNetHeader {
        let memory = self.chains.ring.memory();
        let ([first], [last]) = (memory.read_words(offset), memory.read_words(offset + 4));
        let header = VirtioNetHeader::from_words(first, (last >> 32) as u32);
        // Without num_buffers the last two bytes are the frame's.
        let num_buffers = if self.chains.header_bytes < HEADER_BYTES_MAX { 0 } else { header.num_buffers };
        VirtioNetHeader { num_buffers, ..header }
    }

    /// Notes where the parts of a frame of `buffers` lie and reposts them, which the device does not see before the sink
    /// has seen the frame; `None` if not all are used yet.
    fn merge(&mut self, done: u16, buffers: u16, first: u16, first_bytes: usize) -> Result<Option<usize>, RingError> {
        if buffers == 0 || buffers > self.chains.slots() {
            return Err(RingError::BufferCount(buffers));
        }
        if self.chains.ring.pending()? < done + buffers {
            return Ok(None);
        }
        self.pieces.clear();
        let mut frame_bytes = 0;
        for ahead in 0..buffers {
            let (slot, start, bytes) = if ahead == 0 {
                (first, self.chains.header_bytes, first_bytes)
            } else {
                let used = self.chains.ring.peek(done + ahead);
                (self.chains.take_back(used.head)?, 0, self.written(used.bytes, 0)?)
            };
            frame_bytes += bytes - start;
            if frame_bytes > self.scratch.len() {
                return Err(RingError::FrameTooLong(frame_bytes));
            }
            self.pieces.push((self.chains.buffer(slot).offset + start, bytes - start));
            self.post(slot);
        }
        Ok(Some(frame_bytes))
    }

    /// Asks for a call at the next frame; false if one is there already. See [`Ring::enable_calls`].
    pub fn enable_calls(&mut self) -> bool {
        self.chains.ring.enable_calls()
    }

    /// Back to polling.
    pub fn suppress_calls(&mut self) {
        self.chains.ring.suppress_calls();
    }
}

/// Where a frame lies.
#[derive(Clone, Copy, Debug)]
enum Place<'a> {
    /// In guest memory, in one piece, from this offset on.
    Memory(&'a GuestMemory, usize),
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
    header: VirtioNetHeader,
    scratch: &'a mut [u8],
}

impl<'a> Received<'a> {
    /// A frame that came by another way than a ring: all of `frame`.
    pub fn private(frame: &'a mut [u8], header: VirtioNetHeader) -> Self {
        Self { place: Place::Scratch, bytes: frame.len(), header, scratch: frame }
    }
}

impl Received<'_> {
    /// The virtio-net header.
    #[inline]
    pub fn header(&self) -> VirtioNetHeader {
        self.header
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

    /// A private copy of `N` little-endian words from byte `start` on; `None` if the frame is shorter, or if they do not lie
    /// in its first buffer. (Words, because bytes copied as a block and then looked at across its seams stall the
    /// core for 20 cycles: half of what a frame cost.)
    #[inline]
    pub fn words<const N: usize>(&self, start: usize) -> Option<[u64; N]> {
        let end = start + 8 * N;
        if self.bytes < end {
            return None;
        }
        match self.place {
            Place::Memory(memory, offset) => Some(memory.read_words(offset + start)),
            Place::Pieces(memory, pieces) => match pieces.first() {
                Some((offset, bytes)) if *bytes >= end => Some(memory.read_words(offset + start)),
                _ => None,
            },
            Place::Scratch => {
                let (words, _) = self.scratch[start..end].as_chunks::<8>();
                Some(std::array::from_fn(|index| u64::from_le_bytes(words[index])))
            }
        }
    }

    /// A private copy of the whole.
    pub fn bytes(&mut self) -> &[u8] {
        match std::mem::replace(&mut self.place, Place::Scratch) {
            Place::Memory(memory, offset) => memory.read(offset, &mut self.scratch[..self.bytes]),
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
