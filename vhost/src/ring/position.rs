//! Where a device stands in a packed ring, and what the flags of a descriptor say there (VIRTIO 1.2 §2.8.1).

use virtio_bindings::bindings::virtio_ring::{VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED};

use super::RING_SIZE_MAX;

const FLAG_USED: u16 = 1 << VRING_PACKED_DESC_F_USED;
const FLAG_AVAIL: u16 = 1 << VRING_PACKED_DESC_F_AVAIL;
/// Where a u16 position has its wrap counter (§2.8.10; vhost-user, "Vring descriptor indices for packed virtqueues").
const WRAP: u16 = 1 << 15;

const _: () = assert!(RING_SIZE_MAX <= WRAP, "an index must leave room for the wrap counter");

/// A place in the ring: an index below its size, and the wrap counter of whoever stands there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) index: u16,
    pub(super) wrap: bool,
}

impl Position {
    /// Index in bits 0 to 14, wrap counter in bit 15.
    pub(super) fn from_bits(bits: u16) -> Self {
        Self { index: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    #[inline]
    pub(super) fn bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// `count` descriptors further on in a ring of `size`; `count` is at most `size`.
    #[inline]
    pub(super) fn after(self, count: u16, size: u16) -> Self {
        debug_assert!(self.index < size && count <= size);
        // Both at most 32768, and the index is less: no overflow.
        let index = self.index + count;
        if index < size { Self { index, ..self } } else { Self { index: index - size, wrap: !self.wrap } }
    }

    /// The flags of a descriptor that the device has used here.
    #[inline]
    pub(super) fn used_flags(self) -> u16 {
        if self.wrap { FLAG_AVAIL | FLAG_USED } else { 0 }
    }

    /// Whether `flags` are those of a descriptor that the driver has made available here (§2.8.1).
    #[inline]
    pub(super) fn is_available(self, flags: u16) -> bool {
        flags & (FLAG_AVAIL | FLAG_USED) == if self.wrap { FLAG_AVAIL } else { FLAG_USED }
    }
}

/// Whether the last that happened to a descriptor with these flags is that a device used it.
pub(super) fn is_used(flags: u16) -> bool {
    (flags & FLAG_AVAIL != 0) == (flags & FLAG_USED != 0)
}

/// The wrap counter with which a descriptor with these flags was made available last; used ones kept it.
pub(super) fn lap(flags: u16) -> bool {
    flags & FLAG_AVAIL != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_survives_its_bits_and_wraps_at_any_size() {
        for (index, wrap) in [(0, true), (0, false), (32767, true), (5, false)] {
            let position = Position { index, wrap };
            assert_eq!(Position::from_bits(position.bits()), position);
        }
        let at = |index, wrap| Position { index, wrap };
        assert_eq!(at(2, true).after(1, 3), at(0, false));
        assert_eq!(at(2, true).after(3, 3), at(2, false));
        assert_eq!(at(32767, false).after(32768, 32768), at(32767, true));
        assert_eq!(at(0, true).after(1, 1), at(0, false));
    }

    /// §2.8.1: available when AVAIL is the wrap counter and USED is not, used when both are.
    #[test]
    fn flags_mean_what_the_specification_says() {
        let (first, second) = (Position { index: 0, wrap: true }, Position { index: 0, wrap: false });
        assert!(first.is_available(0x80) && !first.is_available(0x8000));
        assert!(second.is_available(0x8000) && !second.is_available(0x80));
        for flags in [0, 0x8080] {
            assert!(!first.is_available(flags) && !second.is_available(flags) && is_used(flags));
        }
        assert_eq!((first.used_flags(), second.used_flags()), (0x8080, 0));
    }
}
