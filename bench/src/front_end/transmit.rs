//! The driver's end of a transmitq: frames copied in one by one, or a set of frames written once and reposted.
//!
//! Reposting is what the throughput harness does: the generator's core then writes one index per burst and the
//! device's core does all the work that is measured. Limits: a frame per slot, [`BURST`] reaped at a time.

use super::chains::{Buffer, ChainShape, Chains};
use super::doorbell::Doorbell;
use super::error::FrontEndError;
use super::header::VirtioNetHeader;
use super::memory::Arena;
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
    free: FreeSlots,
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
        let free = FreeSlots::full(chains.slots());
        Ok(Self { chains, free, templates: Vec::new(), rooms: Vec::new(), next_template: 0, doorbell, sent: 0 })
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
        self.chains.slots() - self.free.len()
    }

    /// Takes finished chains back; returns how many.
    ///
    /// # Errors
    /// If the device broke the ring's rules.
    #[inline]
    pub fn reap(&mut self) -> Result<u16, RingError> {
        let count = self.chains.ring.pending()?;
        for ahead in 0..count {
            let head = self.chains.ring.peek(ahead).head;
            let slot = self.chains.take_back(head)?;
            self.free.push(slot);
        }
        if count > 0 {
            self.chains.ring.advance(count);
        }
        Ok(count)
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
        let mut count = 0;
        for (header, frame) in frames {
            let most = self.chains.buffer_bytes() - self.chains.header_bytes;
            if frame.len() > most {
                self.publish(count);
                return Err(FrontEndError::FrameTooLong { bytes: frame.len(), most });
            }
            let Some(slot) = self.free.pop() else { break };
            let buffer = self.chains.buffer(slot);
            let bytes = self.write_frame(buffer, header, frame);
            self.chains.offer(slot, buffer, bytes, 0);
            count += 1;
        }
        self.publish(count);
        Ok(count)
    }

    fn write_frame(&self, buffer: Buffer, header: VirtioNetHeader, frame: &[u8]) -> usize {
        let header_bytes = self.chains.header_bytes;
        let memory = self.chains.ring.memory();
        memory.write(buffer.offset, &header.to_bytes()[..header_bytes]);
        memory.write(buffer.offset + header_bytes, frame);
        header_bytes + frame.len()
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
                let fresh = (Buffer::take(self.chains.ring.memory(), arena, room)?, room);
                match self.rooms.get_mut(index) {
                    Some(place) => *place = fresh,
                    None => self.rooms.push(fresh),
                }
            }
            let (buffer, _) = self.rooms[index];
            let bytes = self.write_frame(buffer, header, frame);
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
        let count = most.min(self.free.len());
        for _ in 0..count {
            let slot = self.free.pop().expect("count is at most the free slots");
            let template = self.templates[self.next_template];
            self.next_template += 1;
            if self.next_template == self.templates.len() {
                self.next_template = 0;
            }
            self.chains.offer(slot, template.buffer, template.bytes, 0);
        }
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

/// Slots not in flight, first in first out: with a device that finishes in order the available ring repeats itself,
/// and no entry has to be written again.
#[derive(Debug)]
struct FreeSlots {
    slots: Box<[u16]>,
    head: usize,
    count: u16,
}

impl FreeSlots {
    fn full(count: u16) -> Self {
        Self { slots: (0..count).collect(), head: 0, count }
    }

    #[inline]
    fn len(&self) -> u16 {
        self.count
    }

    #[inline]
    fn pop(&mut self) -> Option<u16> {
        if self.count == 0 {
            return None;
        }
        let slot = self.slots[self.head];
        self.head += 1;
        if self.head == self.slots.len() {
            self.head = 0;
        }
        self.count -= 1;
        Some(slot)
    }

    #[inline]
    fn push(&mut self, slot: u16) {
        let mut tail = self.head + usize::from(self.count);
        if tail >= self.slots.len() {
            tail -= self.slots.len();
        }
        self.slots[tail] = slot;
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_back_first_in_first_out() {
        let mut free = FreeSlots::full(3);
        assert_eq!((free.pop(), free.pop()), (Some(0), Some(1)));
        free.push(1);
        assert_eq!((free.pop(), free.pop(), free.pop()), (Some(2), Some(1), None));
        free.push(0);
        assert_eq!(free.len(), 1);
    }
}
