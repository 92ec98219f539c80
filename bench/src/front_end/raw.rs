//! A ring without manners: the handle for tests that play a hostile guest.
//!
//! Writes whatever it is told wherever the ring has room for it, beside (and to the confusion of) the ring's owner.
//! Start the front-end with `fill_receive: false` to have a receive ring that nobody has touched yet.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::doorbell::Doorbell;
use super::layout::{Descriptor, RingLayout, Used};
use super::memory::GuestMemory;
use super::packed::Position;

/// Direct access to one ring's memory and eventfds.
#[derive(Clone, Debug)]
pub struct RawDriver {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    doorbell: Doorbell,
}

impl RawDriver {
    /// A handle on the ring at `layout`.
    pub fn new(memory: Arc<GuestMemory>, layout: RingLayout, doorbell: Doorbell) -> Self {
        Self { memory, layout, doorbell }
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
        let offset = self.layout.descriptor(at.index);
        self.memory.store_u64(offset, address);
        self.memory.store_u32(offset + 8, bytes);
        self.memory.store_u16(offset + 12, id, Ordering::Relaxed);
        // Release: pairs with the device's acquire load of the flags.
        self.memory.store_u16(offset + 14, flags | at.available_flags(), Ordering::Release);
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
