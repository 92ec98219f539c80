//! Buffers and the descriptor chains that describe them: slot `s` of a ring owns descriptors
//! `s * n .. (s + 1) * n` and, by default, one buffer. Shared by the transmit and the receive queue.

use std::sync::Arc;

use super::error::FrontEndError;
use super::layout::{DESC_INDIRECT, DESC_NEXT, DESCRIPTOR_BYTES, Descriptor};
use super::memory::{Arena, GuestMemory};
use super::packed::PackedRing;
use super::ring::{Ring, either};
use super::slots::Slots;
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
    pub(super) memory: Arc<GuestMemory>,
    pub(super) header_bytes: usize,
    shape: ChainShape,
    /// Ring descriptors per chain.
    stride: u16,
    buffers: Box<[Buffer]>,
    buffer_bytes: usize,
    tables: Box<[Buffer]>,
    pub(super) slots: Slots,
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
            slots: Slots::new(slots, stride),
            memory,
            ring,
        })
    }

    /// Bytes of a slot's buffer, header included.
    pub(super) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    #[inline(always)]
    pub(super) fn buffer(&self, slot: u16) -> Buffer {
        self.buffers[usize::from(slot)]
    }

    /// A chain is one descriptor of the ring's.
    #[inline(always)]
    fn is_plain(&self) -> bool {
        self.shape.descriptors == 1 && !self.shape.indirect
    }

    /// Offers chains with `contents` (of a slot: its buffer and bytes), as many as are free but `most`; returns how many.
    #[inline(always)]
    pub(super) fn offer_each(
        &mut self,
        most: u16,
        flags: u16,
        mut contents: impl FnMut(Buffer) -> (Buffer, usize),
    ) -> u16 {
        let count = most.min(self.slots.free());
        let mut left = count;
        while left > 0 {
            let run = self.slots.next(left);
            let length = run.len();
            if self.is_plain() {
                let describe = |slot: u16| {
                    let (buffer, bytes) = contents(self.buffers[usize::from(slot)]);
                    Descriptor { address: buffer.guest_address, bytes: bytes as u32, flags, next: 0 }
                };
                either!(&mut self.ring, ring => ring.offer_run(run, describe));
            } else {
                for at in 0..length {
                    let slot = self.slots.next(left)[at];
                    let (buffer, bytes) = contents(self.buffer(slot));
                    self.describe(slot, buffer, bytes, flags);
                    self.ring.offer(slot * self.stride);
                }
            }
            self.slots.give(length);
            left -= length as u16;
        }
        count
    }

    /// Takes up to `most` chains back that the device is done with; shows each slot's buffer, and the bytes that were written, to
    /// `each`. Returns how many.
    #[inline(always)]
    pub(super) fn reap(&mut self, most: u16, mut each: impl FnMut(Buffer, u32)) -> Result<u16, RingError> {
        let mut count = 0;
        let (plain, slots, buffers) = (self.is_plain(), &mut self.slots, &self.buffers);
        either!(&mut self.ring, ring => {
            // As they were offered, while that is how they come.
            while plain && count < most {
                let run = slots.oldest(most - count);
                let taken = ring.reap_run(run, |at, bytes| each(buffers[usize::from(run[at])], bytes));
                count += taken as u16;
                let is_all = taken < run.len() || taken == 0;
                slots.take_oldest(taken);
                if is_all {
                    break;
                }
            }
            // The rest, if there is one.
            count += ring.reap(most - count, |used| {
                let slot = slots.take_back(used.head)?;
                each(buffers[usize::from(slot)], used.bytes);
                Ok(())
            })?;
        });
        Ok(count)
    }

    /// Describes `bytes` (header included) at `buffer` as slot's chain. `flags`: DESC_WRITE or 0.
    #[inline(never)]
    fn describe(&mut self, slot: u16, buffer: Buffer, bytes: usize, flags: u16) {
        let head = slot * self.stride;
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
}
