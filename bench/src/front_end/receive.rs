//! The driver's end of a receiveq: keeps every buffer posted, hands frames to a sink, puts mergeable ones together.
//!
//! A frame in one buffer is not copied unless the sink asks for all of it; a sink that looks at headers alone reads
//! 64 bytes. Limits: [`BURST`] buffers per call; a frame of at most [`FRAME_BYTES_MAX`].

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
                sink(Received {
                    memory: self.chains.ring.memory(),
                    offset: None,
                    bytes: frame_bytes,
                    header,
                    scratch: &mut self.scratch,
                });
                done += header.num_buffers;
            } else {
                let header_bytes = self.chains.header_bytes;
                sink(Received {
                    memory: self.chains.ring.memory(),
                    offset: Some(offset + header_bytes),
                    bytes: bytes - header_bytes,
                    header,
                    scratch: &mut self.scratch,
                });
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
        // Without num_buffers the last two bytes are the frame's: read all, keep ten.
        let mut bytes = self.chains.ring.memory().read_array::<HEADER_BYTES_MAX>(offset);
        if self.chains.header_bytes < HEADER_BYTES_MAX {
            bytes[self.chains.header_bytes..].fill(0);
        }
        VirtioNetHeader::from_bytes(bytes)
    }

    /// Puts a frame of `buffers` together in scratch and reposts them; `None` if not all are used yet.
    fn merge(&mut self, done: u16, buffers: u16, first: u16, first_bytes: usize) -> Result<Option<usize>, RingError> {
        if buffers == 0 || buffers > self.chains.slots() {
            return Err(RingError::BufferCount(buffers));
        }
        if self.chains.ring.pending()? < done + buffers {
            return Ok(None);
        }
        let mut frame_bytes = 0;
        for ahead in 0..buffers {
            let (slot, start, bytes) = if ahead == 0 {
                (first, self.chains.header_bytes, first_bytes)
            } else {
                let used = self.chains.ring.peek(done + ahead);
                (self.chains.take_back(used.head)?, 0, self.written(used.bytes, 0)?)
            };
            let end = frame_bytes + bytes - start;
            let piece = self.scratch.get_mut(frame_bytes..end).ok_or(RingError::FrameTooLong(end))?;
            self.chains.ring.memory().read(self.chains.buffer(slot).offset + start, piece);
            frame_bytes = end;
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

/// A frame that has arrived, in guest memory or (when merged) in private memory.
#[derive(Debug)]
pub struct Received<'a> {
    memory: &'a GuestMemory,
    /// Where the frame begins; `None`: it lies in scratch.
    offset: Option<usize>,
    bytes: usize,
    header: VirtioNetHeader,
    scratch: &'a mut [u8],
}

#[cfg(test)]
impl<'a> Received<'a> {
    /// A frame that never was in a ring: `scratch` as it stands.
    pub(crate) fn fake(memory: &'a GuestMemory, scratch: &'a mut [u8]) -> Self {
        Self { memory, offset: None, bytes: scratch.len(), header: VirtioNetHeader::default(), scratch }
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

    /// A private copy of the first `N` little-endian words, `None` if the frame is shorter. (Words, because bytes copied as a
    /// block and then looked at across its seams stall the core for 20 cycles: half of what a frame cost.)
    #[inline]
    pub fn words<const N: usize>(&self) -> Option<[u64; N]> {
        if self.bytes < 8 * N {
            return None;
        }
        match self.offset {
            Some(offset) => Some(self.memory.read_words(offset)),
            None => {
                let (words, _) = self.scratch[..8 * N].as_chunks::<8>();
                Some(std::array::from_fn(|index| u64::from_le_bytes(words[index])))
            }
        }
    }

    /// A private copy of the whole.
    pub fn bytes(&mut self) -> &[u8] {
        if let Some(offset) = self.offset.take() {
            self.memory.read(offset, &mut self.scratch[..self.bytes]);
        }
        &self.scratch[..self.bytes]
    }
}
