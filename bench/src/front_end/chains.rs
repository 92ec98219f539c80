//! Buffers and the descriptor chains that describe them: slot `s` of a ring owns descriptors
//! `s * n .. (s + 1) * n` and, by default, one buffer. Shared by the transmit and the receive queue.

use super::error::FrontEndError;
use super::layout::{DESC_INDIRECT, DESC_NEXT, DESCRIPTOR_BYTES, Descriptor};
use super::memory::{Arena, GuestMemory};
use super::packed::PackedRing;
use super::ring::Ring;
use super::split::RingError;

/// Longest chain that we make. Linux's virtio-net never exceeds MAX_SKB_FRAGS + 2 = 19.
pub const CHAIN_DESCRIPTORS_MAX: u16 = 32;

/// How a buffer is described to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChainShape {
    /// 1: header and frame in one descriptor. 2: header, frame. n: header, frame in n - 1 pieces.
    pub descriptors: u16,
    /// In a table of their own (INDIRECT_DESC), one ring descriptor per chain.
    pub indirect: bool,
}

impl Default for ChainShape {
    fn default() -> Self {
        Self { descriptors: 1, indirect: false }
    }
}

/// A piece of guest memory with both of its names.
#[derive(Clone, Copy, Debug)]
pub(super) struct Buffer {
    pub(super) offset: usize,
    pub(super) guest_address: u64,
}

impl Buffer {
    pub(super) fn take(memory: &GuestMemory, arena: &mut Arena, bytes: usize) -> Result<Self, FrontEndError> {
        let offset = arena.take(bytes, 64).ok_or(FrontEndError::MemoryExhausted { bytes })?;
        Ok(Self { offset, guest_address: memory.guest_address(offset) })
    }
}

/// A ring cut into chains of one shape.
#[derive(Debug)]
pub(super) struct Chains {
    pub(super) ring: Ring,
    pub(super) header_bytes: usize,
    shape: ChainShape,
    /// Ring descriptors per chain.
    stride: u16,
    buffers: Box<[Buffer]>,
    buffer_bytes: usize,
    tables: Box<[Buffer]>,
    outstanding: Box<[bool]>,
}

impl Chains {
    pub(super) fn new(
        ring: Ring,
        arena: &mut Arena,
        shape: ChainShape,
        header_bytes: usize,
        buffer_bytes: usize,
    ) -> Result<Self, FrontEndError> {
        let stride = if shape.indirect { 1 } else { shape.descriptors };
        let size = ring.layout().size;
        if !(1..=CHAIN_DESCRIPTORS_MAX).contains(&shape.descriptors) || stride > size {
            return Err(FrontEndError::Options(format!(
                "{} descriptors per chain in a ring of {size}",
                shape.descriptors
            )));
        }
        // An odd number of cache lines: with a power of two every header would fall into the same few cache sets.
        let buffer_stride = (buffer_bytes.div_ceil(64) | 1) * 64;
        let memory = ring.memory().clone();
        let mut pieces =
            |bytes, count| (0..count).map(|_| Buffer::take(&memory, arena, bytes)).collect::<Result<Box<[_]>, _>>();
        let slots = size / stride;
        Ok(Self {
            header_bytes,
            shape,
            stride,
            buffers: pieces(buffer_stride, slots)?,
            buffer_bytes,
            tables: pieces(usize::from(shape.descriptors) * DESCRIPTOR_BYTES, if shape.indirect { slots } else { 0 })?,
            outstanding: vec![false; usize::from(slots)].into(),
            ring,
        })
    }

    pub(super) fn slots(&self) -> u16 {
        self.outstanding.len() as u16
    }

    /// Bytes of a slot's buffer, header included.
    pub(super) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    #[inline(always)]
    pub(super) fn buffer(&self, slot: u16) -> Buffer {
        self.buffers[usize::from(slot)]
    }

    /// Where the buffer of the chain at `head` begins; `None` for a head that there is not.
    #[inline(always)]
    pub(super) fn offset_of(&self, head: u32) -> Option<usize> {
        let stride = u32::from(self.stride);
        let slot = if stride == 1 { head } else { head / stride };
        self.buffers.get(slot as usize).map(|buffer| buffer.offset)
    }

    /// Describes `bytes` (header included) at `buffer` as slot's chain and offers it. `flags`: DESC_WRITE or 0.
    #[inline(always)]
    pub(super) fn offer(&mut self, slot: u16, buffer: Buffer, bytes: usize, flags: u16) {
        let head = slot * self.stride;
        self.outstanding[usize::from(slot)] = true;
        if self.shape.descriptors == 1 && !self.shape.indirect {
            let descriptor = Descriptor { address: buffer.guest_address, bytes: bytes as u32, flags, next: 0 };
            self.ring.offer_one(head, descriptor);
        } else {
            self.describe(slot, head, buffer, bytes, flags);
            self.ring.offer(head);
        }
    }

    #[inline(never)]
    fn describe(&mut self, slot: u16, head: u16, buffer: Buffer, bytes: usize, flags: u16) {
        let mut chain = [Descriptor::default(); CHAIN_DESCRIPTORS_MAX as usize];
        let count = self.cut(&mut chain, buffer, bytes, flags);
        if !self.shape.indirect {
            for (position, descriptor) in (0..).zip(&mut chain[..count]) {
                descriptor.next = if descriptor.flags & DESC_NEXT != 0 { head + position + 1 } else { 0 };
                self.ring.set_descriptor(head + position, *descriptor);
            }
            return;
        }
        let table = self.tables[usize::from(slot)];
        for (position, descriptor) in chain[..count].iter_mut().enumerate() {
            let [address, rest] = if self.ring.is_packed() {
                // VIRTIO 1.2 §2.8.7: one after the other, and no flag but WRITE means anything.
                PackedRing::words(*descriptor, 0, descriptor.flags & !DESC_NEXT)
            } else {
                descriptor.next = if descriptor.flags & DESC_NEXT != 0 { position as u16 + 1 } else { 0 };
                descriptor.words()
            };
            let at = table.offset + position * DESCRIPTOR_BYTES;
            self.ring.memory().store_u64(at, address);
            self.ring.memory().store_u64(at + 8, rest);
        }
        let bytes = (count * DESCRIPTOR_BYTES) as u32;
        self.ring
            .set_descriptor(head, Descriptor { address: table.guest_address, bytes, flags: DESC_INDIRECT, next: 0 });
    }

    /// Header, then the rest in pieces of equal size; fewer pieces than wished if there are not enough bytes.
    fn cut(&self, chain: &mut [Descriptor], buffer: Buffer, bytes: usize, flags: u16) -> usize {
        let pieces = usize::from(self.shape.descriptors);
        let (first, rest) = if pieces == 1 {
            (bytes, 0)
        } else {
            (self.header_bytes, (bytes - self.header_bytes).div_ceil(pieces - 1))
        };
        let (mut at, mut count) = (0, 0);
        while at < bytes {
            let length = if count == 0 { first } else { rest.min(bytes - at) };
            let more = if at + length < bytes { DESC_NEXT } else { 0 };
            let address = buffer.guest_address + at as u64;
            chain[count] = Descriptor { address, bytes: length as u32, flags: flags | more, next: 0 };
            at += length;
            count += 1;
        }
        count
    }

    /// The slot of a head that the device is done with; its chain is ours again.
    #[inline(always)]
    pub(super) fn take_back(&mut self, head: u32) -> Result<u16, RingError> {
        let stride = u32::from(self.stride);
        let (slot, rest) = if stride == 1 { (head, 0) } else { (head / stride, head % stride) };
        match self.outstanding.get_mut(slot as usize) {
            Some(outstanding) if *outstanding && rest == 0 => {
                *outstanding = false;
                Ok(slot as u16)
            }
            _ => Err(RingError::HeadNotOutstanding { head }),
        }
    }

    /// The reverse of [`Self::take_back`], for a frame of which a part is still missing.
    pub(super) fn undo_take_back(&mut self, slot: u16) {
        self.outstanding[usize::from(slot)] = true;
    }
}
