//! A ring without manners: the handle for tests that play a hostile guest.
//!
//! Writes whatever it is told wherever the ring has room for it, beside (and to the confusion of) the ring's owner.
//! Start the front-end with `fill_receive: false` to have a receive ring that nobody has touched yet.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::doorbell::Doorbell;
use super::layout::{DESC_NEXT, Descriptor, RingLayout, Used};
use super::memory::GuestMemory;
use super::position::{DESC_AVAIL, DESC_USED, Position};

/// One descriptor of a chain: address, length, flags.
pub type Piece = (u64, u32, u16);

/// Direct access to one ring's memory and eventfds.
#[derive(Clone, Debug)]
pub struct RawDriver {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    doorbell: Doorbell,
    /// Where the next chain goes: a place in a packed ring; of a split ring's descriptor table the index.
    next: Position,
    is_packed: bool,
}

impl RawDriver {
    /// A handle on the split ring at `layout`.
    pub fn new(memory: Arc<GuestMemory>, layout: RingLayout, doorbell: Doorbell) -> Self {
        Self { memory, layout, doorbell, next: Position::START, is_packed: false }
    }

    /// A handle on the packed ring at `layout`, whose driver goes on at `next`.
    pub fn packed_at(memory: Arc<GuestMemory>, layout: RingLayout, doorbell: Doorbell, next: Position) -> Self {
        Self { memory, layout, doorbell, next, is_packed: true }
    }

    /// Whether the ring is packed.
    pub fn is_packed(&self) -> bool {
        self.is_packed
    }

    /// Where the next chain goes.
    pub fn next(&self) -> Position {
        self.next
    }

    /// SET_VRING_BASE's number for a ring that begins where the next chain goes: nothing is in flight.
    pub fn base(&self) -> u32 {
        let bits = u32::from(self.next.bits());
        if self.is_packed { bits | bits << 16 } else { u32::from(self.next.index) }
    }

    /// As a driver that has reset its ring: empty, at the start.
    pub fn restart(&mut self) {
        self.next = Position::START;
        self.set_driver_event(0);
        self.memory.store_u32(self.layout.used_ring, 0);
        if self.is_packed {
            (0..self.layout.size).for_each(|index| self.write_descriptor(index, Descriptor::default()));
        }
    }

    /// Writes a chain where the ring goes on, makes it available and kicks. NEXT is added between the pieces; whether
    /// the device is done with what was there is not looked at.
    pub fn submit_chain(&mut self, pieces: &[Piece]) {
        self.submit_chain_as(self.next.index, pieces);
    }

    /// The same with a buffer id of one's own, which a packed ring has.
    pub fn submit_chain_as(&mut self, id: u16, pieces: &[Piece]) {
        let head = self.next;
        let mut written = Vec::with_capacity(pieces.len());
        for (number, &(address, bytes, flags)) in (1..).zip(pieces) {
            let next = if number < pieces.len() { DESC_NEXT } else { 0 };
            written.push((self.next, address, bytes, flags | next));
            self.next = self.next.after(1, self.layout.size);
        }
        // The first one last: with it the device sees all of them.
        for (at, address, bytes, flags) in written.into_iter().rev() {
            if self.is_packed {
                self.write_packed(at, address, bytes, id, flags);
            } else {
                let next = at.after(1, self.layout.size).index;
                self.write_descriptor(at.index, Descriptor { address, bytes, flags, next });
            }
        }
        if self.is_packed { self.doorbell.kick() } else { self.submit(head.index) }
    }

    /// The next chain goes `count` descriptors further on, at most a whole ring.
    pub fn skip(&mut self, count: u16) {
        self.next = self.next.after(count, self.layout.size);
    }

    /// Whether the device has given back `count` chains since the ring's start. Each had one descriptor, and no more than
    /// a ring of them was under way.
    pub fn has_used(&self, count: u32) -> bool {
        if self.is_packed {
            let last =
                Position::after_start(((count - 1) % (2 * u32::from(self.layout.size))) as u16, self.layout.size);
            return self.packed(last.index).2 & (DESC_AVAIL | DESC_USED) == last.used_flags();
        }
        // u16 wraps: it is ahead by less than half of them, or behind.
        self.used_index().wrapping_sub(count as u16) < 1 << 15
    }

    /// Overwrites a packed ring's descriptor's flags alone.
    pub fn set_packed_flags(&self, index: u16, flags: u16) {
        // Release: as in `write_packed_as`.
        self.memory.store_u16(self.layout.descriptor(index) + 14, flags, Ordering::Release);
    }

    /// All of guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where the ring's parts lie: any of them can be overwritten through [`Self::memory`].
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// Its eventfds.
    pub fn doorbell(&mut self) -> &mut Doorbell {
        &mut self.doorbell
    }

    /// Writes descriptor `index`, whoever may be using it.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.write_descriptor_at(self.layout.descriptor(index), descriptor);
    }

    /// Writes a descriptor anywhere: indirect tables.
    pub fn write_descriptor_at(&self, offset: usize, descriptor: Descriptor) {
        let [address, rest] = descriptor.words();
        self.memory.store_u64(offset, address);
        self.memory.store_u64(offset + 8, rest);
    }

    /// Reads descriptor `index`.
    pub fn descriptor(&self, index: u16) -> Descriptor {
        let offset = self.layout.descriptor(index);
        Descriptor::from_words([self.memory.load_u64(offset), self.memory.load_u64(offset + 8)])
    }

    /// Writes a packed ring's descriptor at `at`, available there. `flags`: NEXT, WRITE, INDIRECT.
    pub fn write_packed(&self, at: Position, address: u64, bytes: u32, id: u16, flags: u16) {
        self.write_packed_as(at.index, address, bytes, id, flags | at.available_flags());
    }

    /// Writes a packed ring's descriptor with any flags.
    pub fn write_packed_as(&self, index: u16, address: u64, bytes: u32, id: u16, flags: u16) {
        let offset = self.layout.descriptor(index);
        self.memory.store_u64(offset, address);
        self.memory.store_u32(offset + 8, bytes);
        self.memory.store_u16(offset + 12, id, Ordering::Relaxed);
        // Release: pairs with the device's acquire load of the flags.
        self.memory.store_u16(offset + 14, flags, Ordering::Release);
    }

    /// A packed ring's descriptor at `index` as it lies there: length, id, flags.
    pub fn packed(&self, index: u16) -> (u32, u16, u16) {
        let offset = self.layout.descriptor(index);
        // Acquire: pairs with the device's release store of the flags.
        let flags = self.memory.load_u16(offset + 14, Ordering::Acquire);
        (self.memory.load_u32(offset + 8), self.memory.load_u16(offset + 12, Ordering::Relaxed), flags)
    }

    /// A packed ring's event suppression structures, driver's and device's: position bits, flags in the upper half.
    pub fn events(&self) -> (u32, u32) {
        (self.memory.load_u32(self.layout.available_ring), self.memory.load_u32(self.layout.used_ring))
    }

    /// Overwrites the driver's event suppression structure of a packed ring.
    pub fn set_driver_event(&self, word: u32) {
        self.memory.store_u32(self.layout.available_ring, word);
    }

    /// Writes the available entry for running index `index`.
    pub fn write_available_entry(&self, index: u16, head: u16) {
        self.memory.store_u16(self.layout.available_entry(index), head, Ordering::Relaxed);
    }

    /// Sets available idx to anything.
    pub fn set_available_index(&self, index: u16) {
        // Release: pairs with the device's acquire load; what was written before is what it finds.
        self.memory.store_u16(self.layout.available_index(), index, Ordering::Release);
    }

    /// Available idx as it stands.
    pub fn available_index(&self) -> u16 {
        self.memory.load_u16(self.layout.available_index(), Ordering::Relaxed)
    }

    /// Enters `head`, moves idx on by one, kicks.
    pub fn submit(&mut self, head: u16) {
        let index = self.available_index();
        self.write_available_entry(index, head);
        self.set_available_index(index.wrapping_add(1));
        self.doorbell.kick();
    }

    /// Sets the available ring's flags.
    pub fn set_available_flags(&self, flags: u16) {
        self.memory.store_u16(self.layout.available_flags(), flags, Ordering::Relaxed);
    }

    /// Sets used_event.
    pub fn set_used_event(&self, index: u16) {
        self.memory.store_u16(self.layout.used_event(), index, Ordering::Relaxed);
    }

    /// avail_event, as the device wrote it.
    pub fn available_event(&self) -> u16 {
        self.memory.load_u16(self.layout.available_event(), Ordering::Relaxed)
    }

    /// The used ring's flags, as the device wrote them.
    pub fn used_flags(&self) -> u16 {
        self.memory.load_u16(self.layout.used_flags(), Ordering::Relaxed)
    }

    /// Overwrites used idx, which is the device's: a device that reads it back is caught.
    pub fn set_used_index(&self, index: u16) {
        self.memory.store_u16(self.layout.used_index(), index, Ordering::Release);
    }

    /// Used idx as it stands.
    pub fn used_index(&self) -> u16 {
        // Acquire: pairs with the device's release store; the entries below it are whole.
        self.memory.load_u16(self.layout.used_index(), Ordering::Acquire)
    }

    /// The used entry for running index `index`.
    pub fn used_entry(&self, index: u16) -> Used {
        let offset = self.layout.used_entry(index);
        Used { head: self.memory.load_u32(offset), bytes: self.memory.load_u32(offset + 4) }
    }
}
