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

    /// Which descriptor the driver waits for, and its flags.
    #[inline]
    pub(super) fn wanted(self) -> (Position, u16) {
        // SAFETY: see the module's text.
        let word = unsafe { AtomicU32::from_ptr(self.driver as *mut u32) }.load(Ordering::Relaxed);
        let word = u32::from_le(word);
        (Position::from_bits(word as u16), (word >> 16) as u16 & EVENT_FLAGS)
    }
}
