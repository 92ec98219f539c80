//! What each side of a packed ring wants to hear of (VIRTIO 1.2 §2.8.14).
//!
//! One of the files with unsafe code in this crate: both structures were checked at set-up to lie whole and aligned in mapped
//! memory, and whoever has them keeps that memory mapped (`packed.rs`).

use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::bindings::virtio_ring::{
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use super::position::Position;

/// `struct pvirtq_event_suppress`: offset and wrap counter, flags.
pub(super) const EVENT_BYTES: u64 = 4;
pub(super) const EVENT_ENABLE: u16 = VRING_PACKED_EVENT_FLAG_ENABLE as u16;
pub(super) const EVENT_DISABLE: u16 = VRING_PACKED_EVENT_FLAG_DISABLE as u16;
pub(super) const EVENT_DESC: u16 = VRING_PACKED_EVENT_FLAG_DESC as u16;
/// §2.8.10: two bits of flags, the others are reserved.
const EVENT_FLAGS: u16 = 3;

/// Host addresses of the driver's and the device's event suppression structure, aligned to 4.
#[derive(Debug, Clone, Copy)]
pub(super) struct Events {
    pub(super) driver: usize,
    pub(super) device: usize,
}

impl Events {
    /// What the device wants. Both halves in one store: drivers read them in one load.
    pub(super) fn want(self, at: Position, flags: u16) {
        let word = u32::from(at.bits()) | u32::from(flags) << 16;
        // SAFETY: see the module's text.
        unsafe { AtomicU32::from_ptr(self.device as *mut u32) }.store(word.to_le(), Ordering::Relaxed);
    }

    /// Whether the driver wants to hear that the last `slots` descriptors before `next` were used, in a ring of `size`.
    #[inline]
    pub(super) fn driver_wants(self, next: Position, slots: u32, size: u16, event_idx: bool) -> bool {
        let (event, flags) = self.wanted();
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESC if event_idx => {
                // §2.8.10: notify when the descriptor at `event` was used just now. Counted from the start of this lap:
                // `next` lies there, what was used goes back up to a whole ring, and so does an event of the lap before.
                let (size, new) = (i32::from(size), i32::from(next.index));
                let behind = if event.wrap == next.wrap { 0 } else { size };
                let event = i32::from(event.index) - behind;
                (new - slots.min(size as u32) as i32..new).contains(&event)
            }
            _ => true,
        }
    }

    /// Which descriptor the driver waits for, and its flags.
    #[inline]
    fn wanted(self) -> (Position, u16) {
        // SAFETY: see the module's text.
        let word = unsafe { AtomicU32::from_ptr(self.driver as *mut u32) }.load(Ordering::Relaxed);
        let word = u32::from_le(word);
        (Position::from_bits(word as u16), (word >> 16) as u16 & EVENT_FLAGS)
    }
}

/// What the device area says about kicks, as last written by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kicks {
    /// Whoever served the ring before us wrote it.
    Unknown,
    Wanted,
    Unwanted,
}
