//! Places in a packed ring, and the flags that tell whose the descriptor there is (VIRTIO 1.2 §2.8.1).

/// VIRTQ_DESC_F_AVAIL.
pub const DESC_AVAIL: u16 = 1 << 7;
/// VIRTQ_DESC_F_USED.
pub const DESC_USED: u16 = 1 << 15;
/// Wrap counter in a u16 position.
const WRAP: u16 = 1 << 15;

/// A place in a packed ring: index and wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Below the ring's size.
    pub index: u16,
    /// Of whoever stands there; begins with true.
    pub wrap: bool,
}

impl Position {
    /// The start of a ring that nobody has used.
    pub const START: Self = Self { index: 0, wrap: true };

    /// Where a ring of `size` stands after `base` descriptors.
    pub fn after_start(base: u16, size: u16) -> Self {
        Self { index: base % size, wrap: (base / size).is_multiple_of(2) }
    }

    /// As in vhost-user messages and event suppression structures.
    pub fn bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// The reverse of [`Self::bits`].
    pub fn from_bits(bits: u16) -> Self {
        Self { index: bits & !WRAP, wrap: bits & WRAP != 0 }
    }

    /// `count` descriptors on; at most a whole ring.
    #[inline]
    pub fn after(self, count: u16, size: u16) -> Self {
        let index = self.index + count;
        if index < size { Self { index, ..self } } else { Self { index: index - size, wrap: !self.wrap } }
    }

    /// Flags that make a descriptor here available.
    #[inline]
    pub fn available_flags(self) -> u16 {
        if self.wrap { DESC_AVAIL } else { DESC_USED }
    }

    /// Flags that a device leaves on a descriptor that it has used here.
    #[inline]
    pub fn used_flags(self) -> u16 {
        if self.wrap { DESC_AVAIL | DESC_USED } else { 0 }
    }
}
