//! A device that echoes frames, built from virtio-queue: the oracle for our driver's ring code.
#![allow(clippy::unwrap_used)] // test code, outside of a test function

use std::sync::Arc;

use dreamwire_bench::front_end::header::HEADER_BYTES_MAX;
use dreamwire_bench::front_end::layout::RingLayout;
use dreamwire_bench::front_end::memory::GuestMemory;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// Head, and address and length of each buffer.
type Chain = (u16, Vec<(u64, u32)>);

/// Receives on the driver's transmit ring and sends on its receive ring.
pub(crate) struct EchoDevice {
    memory: GuestMemoryMmap<()>,
    from_driver: Queue,
    to_driver: Queue,
    waiting: Vec<Vec<u8>>,
    /// Calls that the driver wanted.
    pub(crate) calls: u64,
}

impl EchoDevice {
    /// A device on these two rings.
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        transmit: RingLayout,
        receive: RingLayout,
        event_idx: bool,
        base: u16,
    ) -> Self {
        let ranges = memory.regions().iter().map(|region| {
            let file = FileOffset::new(memory.file().unwrap(), region.file_offset);
            (GuestAddress(region.guest_address), region.bytes as usize, Some(file))
        });
        let mapped = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let queue = |layout| queue(memory, &mapped, layout, event_idx, base);
        let (from_driver, to_driver) = (queue(transmit), queue(receive));
        Self { memory: mapped, from_driver, to_driver, waiting: Vec::new(), calls: 0 }
    }

    /// Takes everything that the driver sent, headers (`header_bytes`) cut off, and finishes the chains.
    pub(crate) fn take(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some(chain) = self.from_driver.pop_descriptor_chain(&self.memory) {
            let head = chain.head_index();
            let mut bytes = Vec::new();
            for descriptor in chain {
                assert!(!descriptor.is_write_only(), "a transmit descriptor that the device may write");
                assert!(descriptor.len() > 0, "an empty descriptor");
                let at = bytes.len();
                bytes.resize(at + descriptor.len() as usize, 0);
                self.memory.read_slice(&mut bytes[at..], descriptor.addr()).unwrap();
            }
            self.from_driver.add_used(&self.memory, head, 0).unwrap();
            frames.push(bytes);
        }
        self.calls += u64::from(self.from_driver.needs_notification(&self.memory).unwrap());
        frames
    }

    /// Queues a frame (with header) for the driver.
    pub(crate) fn give(&mut self, frame: Vec<u8>) {
        self.waiting.push(frame);
    }

    /// Delivers what is queued as far as there are buffers; a frame that needs several gets them. Returns how many
    /// frames are left.
    pub(crate) fn deliver(&mut self) -> usize {
        while !self.waiting.is_empty() {
            let Some(chains) = self.reserve(self.waiting[0].len()) else { break };
            let mut frame = self.waiting.remove(0);
            let count = chains.len() as u16;
            frame[10..HEADER_BYTES_MAX].copy_from_slice(&count.to_le_bytes());
            let mut at = 0;
            for (head, pieces) in chains {
                let start = at;
                for (address, bytes) in pieces {
                    let end = frame.len().min(at + bytes as usize);
                    self.memory.write_slice(&frame[at..end], GuestAddress(address)).unwrap();
                    at = end;
                }
                self.to_driver.add_used(&self.memory, head, (at - start) as u32).unwrap();
            }
        }
        self.calls += u64::from(self.to_driver.needs_notification(&self.memory).unwrap());
        self.waiting.len()
    }

    /// Chains with room for `bytes`, or none taken at all.
    fn reserve(&mut self, bytes: usize) -> Option<Vec<Chain>> {
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < bytes {
            let Some(chain) = self.to_driver.pop_descriptor_chain(&self.memory) else {
                let next = self.to_driver.next_avail();
                self.to_driver.set_next_avail(next.wrapping_sub(chains.len() as u16));
                return None;
            };
            let head = chain.head_index();
            let pieces: Vec<_> = chain
                .map(|descriptor| {
                    assert!(descriptor.is_write_only(), "a receive descriptor that the device may not write");
                    (descriptor.addr().0, descriptor.len())
                })
                .collect();
            room += pieces.iter().map(|(_, bytes)| *bytes as usize).sum::<usize>();
            chains.push((head, pieces));
        }
        Some(chains)
    }

    /// Whether the driver has to kick for its transmit ring; asks for it.
    pub(crate) fn want_kicks(&mut self) {
        self.from_driver.enable_notification(&self.memory).unwrap();
        self.to_driver.enable_notification(&self.memory).unwrap();
    }
}

fn queue(guest: &GuestMemory, mapped: &GuestMemoryMmap<()>, layout: RingLayout, event_idx: bool, base: u16) -> Queue {
    let mut queue = Queue::new(layout.size).unwrap();
    let halves = |offset| {
        let address = guest.guest_address(offset);
        (Some(address as u32), Some((address >> 32) as u32))
    };
    let (low, high) = halves(layout.descriptor_table);
    queue.set_desc_table_address(low, high);
    let (low, high) = halves(layout.available_ring);
    queue.set_avail_ring_address(low, high);
    let (low, high) = halves(layout.used_ring);
    queue.set_used_ring_address(low, high);
    queue.set_event_idx(event_idx);
    queue.set_next_avail(base);
    queue.set_next_used(base);
    queue.set_ready(true);
    assert!(queue.is_valid(mapped), "virtio-queue finds the ring invalid: {layout:?}");
    queue
}
