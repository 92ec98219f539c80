//! The entries of a split ring (VIRTIO 1.2 §2.7.6 and §2.7.8): a copy of where they are, which a loop keeps in registers.
//!
//! One of the files with unsafe code in this crate: both rings were checked at set-up to lie whole in mapped memory, an index is
//! masked by their size, and whoever makes one keeps that memory mapped (`split.rs`).

use std::sync::atomic::{AtomicU16, Ordering};

use crate::dirty_log::RingLog;
use crate::memory::Segment;

/// The heads in an available ring that was checked to lie whole in mapped memory.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    host: usize,
    /// Of an index: which of them.
    mask: u16,
}

impl Heads {
    /// Of a ring of `size` at host address `available`.
    #[inline]
    pub(super) fn new(available: usize, size: u16) -> Self {
        Self { host: available + 4, mask: size - 1 }
    }

    #[inline]
    pub(super) fn get(self, index: u16) -> u16 {
        let entry = (self.host + 2 * usize::from(index & self.mask)) as *mut u16;
        // SAFETY: a masked index is below the size, so the entry lies in the ring, which is 2-byte aligned and mapped while
        // the ring's `buffers.memory` lives.
        unsafe { AtomicU16::from_ptr(entry) }.load(Ordering::Relaxed)
    }
}

/// The entries of a used ring that was checked likewise.
#[derive(Clone, Copy)]
pub(super) struct UsedEntries {
    host: usize,
    mask: u16,
}

impl UsedEntries {
    /// Of a ring of `size` at host address `used`.
    #[inline]
    pub(super) fn new(used: usize, size: u16) -> Self {
        Self { host: used + 4, mask: size - 1 }
    }

    #[inline]
    pub(super) fn write(self, index: u16, head: u16, bytes: u32) {
        let entry = (self.host + 8 * usize::from(index & self.mask)) as *mut u64;
        // `struct virtq_used_elem`: id in the lower half, len in the upper, little-endian.
        let value = (u64::from(head) | u64::from(bytes) << 32).to_le();
        // SAFETY: as in `Heads::get`; 4-byte aligned. The guest does not read it before the used index is published.
        unsafe { entry.write_unaligned(value) };
    }

    /// Logs the entries with indices from `old` to `new`, before the guest can see them.
    #[cold]
    pub(super) fn log(self, log: &RingLog, old: u16, new: u16) {
        let first = old & self.mask;
        // At most two runs: up to the end of the ring, and from its start.
        let count = new.wrapping_sub(old);
        let before_end = count.min(self.mask + 1 - first);
        for (slot, count) in [(first, before_end), (0, count - before_end)] {
            log.used(4 + 8 * u64::from(slot), 8 * u64::from(count));
        }
    }
}

/// A chain seen before its turn comes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Posted {
    pub(super) head: u16,
    /// Empty: to be looked at in the general way.
    pub(super) buffer: Segment,
}

impl Posted {
    pub(super) const GENERAL: Posted = Posted { head: 0, buffer: Segment::EMPTY };
}
