//! The driver's end of a transmitq: frames copied in one by one, or a set of frames written once and reposted.
//!
//! Reposting is what the throughput harness does: the generator's core then writes one index per burst and the
//! device's core does all the work that is measured. Limits: a frame per slot.

use super::chains::{Buffer, ChainShape, Chains};
use super::doorbell::Doorbell;
use super::error::FrontEndError;
use super::header::VirtioNetHeader;
use super::memory::{Arena, GuestMemory};
use super::ring::Ring;
use super::split::RingError;

/// Chains handled at a time. 64 = 8 cache lines of used entries; more gained nothing.
pub const BURST: u16 = 64;

/// A frame that lies in guest memory, ready to be posted any number of times.
#[derive(Clone, Copy, Debug)]
struct Template {
    buffer: Buffer,
    bytes: usize,
}

/// One transmit queue.
#[derive(Debug)]
pub struct Transmit {
    chains: Chains,
    templates: Vec<Template>,
    /// Memory of all templates that there ever were, and how many bytes each piece holds.
    rooms: Vec<(Buffer, usize)>,
    next_template: usize,
    doorbell: Doorbell,
    sent: u64,
}

impl Transmit {
    pub(super) fn new(
        ring: Ring,
        arena: &mut Arena,
        shape: ChainShape,
        header_bytes: usize,
        buffer_bytes: usize,
        doorbell: Doorbell,
    ) -> Result<Self, FrontEndError> {
        let chains = Chains::new(ring, arena, shape, header_bytes, header_bytes + buffer_bytes)?;
        Ok(Self { chains, templates: Vec::new(), rooms: Vec::new(), next_template: 0, doorbell, sent: 0 })
    }

    /// The ring, for looking at.
    pub fn ring(&self) -> &Ring {
        &self.chains.ring
    }

    /// Kick, call and error eventfds.
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    /// Frames posted since the start.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Frames posted that the device has not finished with, as of the last reaping.
    pub fn in_flight(&self) -> u16 {
        self.chains.slots.count() - self.chains.slots.free()
    }

    /// Takes finished chains back; returns how many.
    ///
    /// # Errors
    /// If the device broke the ring's rules.
    #[inline(never)]
    pub fn reap(&mut self) -> Result<u16, RingError> {
        self.chains.reap(u16::MAX, |_, _| ())
    }

    /// Sends frames with empty headers until the ring is full; returns how many went in.
    ///
    /// # Errors
    /// [`FrontEndError::FrameTooLong`], or a broken ring.
    pub fn send_burst(&mut self, frames: &[&[u8]]) -> Result<usize, FrontEndError> {
        self.send_with(frames.iter().map(|frame| (VirtioNetHeader::default(), *frame)))
    }

    /// Sends frames with headers of the caller's choice until the ring is full; returns how many went in.
    ///
    /// # Errors
    /// As [`Self::send_burst`].
    pub fn send_burst_with_headers(&mut self, frames: &[(VirtioNetHeader, &[u8])]) -> Result<usize, FrontEndError> {
        self.send_with(frames.iter().copied())
    }

    fn send_with<'a>(
        &mut self,
        frames: impl Iterator<Item = (VirtioNetHeader, &'a [u8])>,
    ) -> Result<usize, FrontEndError> {
        self.reap()?;
        let (memory, header_bytes) = (self.chains.memory.clone(), self.chains.header_bytes);
        let most = self.chains.buffer_bytes() - header_bytes;
        let mut count = 0;
        for (header, frame) in frames {
            if frame.len() > most {
                self.publish(count);
                return Err(FrontEndError::FrameTooLong { bytes: frame.len(), most });
            }
            let sent = self
                .chains
                .offer_each(1, 0, |buffer| (buffer, write_frame(&memory, buffer, header, header_bytes, frame)));
            if sent == 0 {
                break;
            }
            count += 1;
        }
        self.publish(count);
        Ok(count)
    }

    #[inline]
    fn publish(&mut self, count: usize) {
        self.sent += count as u64;
        if self.chains.ring.publish() {
            self.doorbell.kick();
        }
    }

    /// Writes frames into guest memory once, for [`Self::repost_burst`], each behind `header`; replaces the set before, in its
    /// memory where a frame fits there. Only while nothing is in flight.
    ///
    /// # Errors
    /// [`FrontEndError::MemoryExhausted`].
    pub fn load_templates(
        &mut self,
        arena: &mut Arena,
        frames: &[Vec<u8>],
        header: VirtioNetHeader,
    ) -> Result<(), FrontEndError> {
        let header_bytes = self.chains.header_bytes;
        self.templates.clear();
        self.next_template = 0;
        for (index, frame) in frames.iter().enumerate() {
            // An odd number of cache lines, as in Chains.
            let room = ((header_bytes + frame.len()).div_ceil(64) | 1) * 64;
            if self.rooms.get(index).is_none_or(|(_, bytes)| *bytes < room) {
                let fresh = (Buffer::take(&self.chains.memory, arena, room)?, room);
                match self.rooms.get_mut(index) {
                    Some(place) => *place = fresh,
                    None => self.rooms.push(fresh),
                }
            }
            let (buffer, _) = self.rooms[index];
            let bytes = write_frame(&self.chains.memory, buffer, header, header_bytes, frame);
            self.templates.push(Template { buffer, bytes });
        }
        Ok(())
    }

    /// Posts the next up to `most` frames of the set, going round for ever; returns how many went in.
    ///
    /// # Errors
    /// If the device broke the ring's rules.
    ///
    /// # Panics
    /// If no set was loaded.
    #[inline]
    pub fn repost_burst(&mut self, most: u16) -> Result<u16, RingError> {
        assert!(!self.templates.is_empty(), "no frames were loaded to be reposted");
        self.reap()?;
        let (templates, next) = (&self.templates[..], &mut self.next_template);
        let count = self.chains.offer_each(most, 0, |_| {
            let Template { buffer, bytes } = templates[*next];
            *next = if *next + 1 == templates.len() { 0 } else { *next + 1 };
            (buffer, bytes)
        });
        self.publish(usize::from(count));
        Ok(count)
    }

    /// Index of the frame of the set that goes next.
    pub fn next_template(&self) -> usize {
        self.next_template
    }

    /// Has [`Self::repost_burst`] go on with that frame.
    ///
    /// # Panics
    /// If the set has no such frame.
    pub fn skip_to(&mut self, index: usize) {
        assert!(index < self.templates.len(), "frame {index} of {}", self.templates.len());
        self.next_template = index;
    }

    /// Asks for a call when the device finishes something; false if it already has. See [`Ring::enable_calls`].
    pub fn enable_calls(&mut self) -> bool {
        self.chains.ring.enable_calls()
    }

    /// Back to polling.
    pub fn suppress_calls(&mut self) {
        self.chains.ring.suppress_calls();
    }
}

/// Header and frame at `buffer`; returns the bytes of both.
fn write_frame(
    memory: &GuestMemory,
    buffer: Buffer,
    header: VirtioNetHeader,
    header_bytes: usize,
    frame: &[u8],
) -> usize {
    memory.write(buffer.offset, &header.to_bytes()[..header_bytes]);
    memory.write(buffer.offset + header_bytes, frame);
    header_bytes + frame.len()
}
