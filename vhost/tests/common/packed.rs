//! The driver's side of a packed ring, written field by field, so that a test can write anything.

use std::sync::Arc;

use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::ring::{Ring, RingSetup};

use super::{DESCRIPTOR_BYTES, Guest, NEXT};

// VIRTIO 1.2 §2.8.
pub(crate) const F_PACKED: u64 = 1 << 34;
pub(crate) const AVAIL: u16 = 1 << 7;
pub(crate) const USED: u16 = 1 << 15;
pub(crate) const EVENT_ENABLE: u16 = 0;
pub(crate) const EVENT_DISABLE: u16 = 1;
pub(crate) const EVENT_DESC: u16 = 2;

/// Index and wrap counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct At {
    pub(crate) index: u16,
    pub(crate) wrap: bool,
}

impl At {
    pub(crate) fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    pub(crate) fn after(self, count: u16, size: u16) -> Self {
        (0..count).fold(self, |at, _| {
            if at.index + 1 == size { Self { index: 0, wrap: !at.wrap } } else { Self { index: at.index + 1, ..at } }
        })
    }

    pub(crate) fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    pub(crate) fn used(self) -> u16 {
        if self.wrap { AVAIL | USED } else { 0 }
    }
}

/// What stands where a chain's id does not.
pub(crate) const NO_ID: u16 = 0xdead;

/// One piece of a chain: address, length, flags (WRITE, INDIRECT).
pub(crate) type Piece = (u64, u32, u16);

/// The driver's side of one packed ring.
#[derive(Debug, Clone)]
pub(crate) struct PackedGuestRing {
    pub(crate) guest: Guest,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) driver_event: u64,
    pub(crate) device_event: u64,
    /// Where it began.
    pub(crate) first: At,
    /// Where the next chain goes.
    pub(crate) next: At,
    /// Where the next used descriptor is expected.
    pub(crate) reaped: At,
}

impl PackedGuestRing {
    /// A ring of `size` at `base`, a multiple of 16, that stands `start` descriptors after its beginning.
    pub(crate) fn new(guest: &Guest, base: u64, size: u16, start: u32) -> Self {
        let first = At { index: (start % u32::from(size)) as u16, wrap: (start / u32::from(size)).is_multiple_of(2) };
        let driver_event = base + DESCRIPTOR_BYTES * u64::from(size);
        let device_event = driver_event + 4;
        let ring = Self {
            guest: guest.clone(),
            size,
            descriptors: base,
            driver_event,
            device_event,
            first,
            next: first,
            reaped: first,
        };
        for index in 0..size {
            let lap = At { index, wrap: if index < first.index { first.wrap } else { !first.wrap } };
            ring.write(index, 0, 0, 0, lap.used());
        }
        guest.write(driver_event, &[0; 8]);
        ring
    }

    /// Bytes of a ring of `size`.
    pub(crate) fn bytes(size: u16) -> usize {
        16 * usize::from(size) + 8
    }

    pub(crate) fn setup(&self, features: u64) -> RingSetup {
        RingSetup {
            memory: Arc::clone(&self.guest.0),
            size: self.size,
            descriptors: self.descriptors,
            available: self.driver_event,
            used: self.device_event,
            next_avail: self.first.bits(),
            next_used: self.first.bits(),
            features: features | F_PACKED,
            enabled: true,
            kick: Some(EventFd::new().expect("an eventfd")),
            call: Some(EventFd::new().expect("an eventfd")),
            error: None,
            log: None,
            inflight: None,
            fault: None,
        }
    }

    /// The device's side of it.
    pub(crate) fn open(&self, features: u64) -> Ring {
        Ring::new(self.setup(features)).expect("a sound ring")
    }

    /// Writes descriptor `index`, flags and all.
    pub(crate) fn write(&self, index: u16, address: u64, bytes: u32, id: u16, flags: u16) {
        self.guest.descriptor(self.descriptors, index, address, bytes, id, flags);
    }

    /// Makes a chain available.
    pub(crate) fn post(&mut self, id: u16, pieces: &[Piece]) {
        let head = self.next;
        let mut at = head;
        let mut writes = Vec::new();
        for (number, &(address, bytes, flags)) in (1..).zip(pieces) {
            let next = if number < pieces.len() { NEXT } else { 0 };
            writes.push((at, address, bytes, flags | next));
            at = at.after(1, self.size);
        }
        // The first one last. Only a chain's last descriptor has its id (§2.8.6).
        for (at, address, bytes, flags) in writes.into_iter().rev() {
            let id = if flags & NEXT == 0 { id } else { NO_ID };
            self.write(at.index, address, bytes, id, flags | at.available());
        }
        self.next = at;
    }

    /// Length, id and flags of descriptor `index`.
    pub(crate) fn read(&self, index: u16) -> (u32, u16, u16) {
        let entry = self.guest.read(self.descriptors + DESCRIPTOR_BYTES * u64::from(index) + 8, 8);
        let half = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
        (u32::from(half(0)) | u32::from(half(2)) << 16, half(4), half(6))
    }

    /// The next used descriptor, if it is there: id and length. `slots` descriptors are skipped.
    pub(crate) fn reap(&mut self, slots: impl FnOnce(u16) -> u16) -> Option<(u16, u32)> {
        let (bytes, id, flags) = self.read(self.reaped.index);
        if flags & (AVAIL | USED) != self.reaped.used() {
            return None;
        }
        self.reaped = self.reaped.after(slots(id), self.size);
        Some((id, bytes))
    }

    /// What the driver says about calls.
    pub(crate) fn set_driver_event(&self, at: At, flags: u16) {
        self.guest.write_u16(self.driver_event, at.bits());
        self.guest.write_u16(self.driver_event + 2, flags);
    }

    /// What the device says about kicks: position bits and flags.
    pub(crate) fn device_event(&self) -> (u16, u16) {
        (self.guest.read_u16(self.device_event), self.guest.read_u16(self.device_event + 2))
    }
}
