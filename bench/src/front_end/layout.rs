//! Where the three parts of a ring lie in guest memory, and the names of a split ring's bits (VIRTIO 1.2 §2.7). A packed
//! ring (§2.8) has its event suppression structures in the places of the available and used rings: the driver's and
//! the device's.

use super::memory::Arena;

/// VIRTQ_DESC_F_NEXT: the chain goes on at `next`.
pub const DESC_NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE: the device may write here (and only here).
pub const DESC_WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT: the buffer holds a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;
/// VIRTQ_AVAIL_F_NO_INTERRUPT: the driver polls (without EVENT_IDX).
pub const AVAIL_NO_INTERRUPT: u16 = 1;
/// VIRTQ_USED_F_NO_NOTIFY: the device polls (without EVENT_IDX).
pub const USED_NO_NOTIFY: u16 = 1;

/// Bytes of one descriptor.
pub const DESCRIPTOR_BYTES: usize = 16;

/// Largest ring (VIRTIO 1.2 §2.7, §2.8).
pub const RING_SIZE_MAX: u16 = 32768;

/// A virtqueue descriptor (VIRTIO 1.2 §2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest-physical address of the buffer.
    pub address: u64,
    /// Bytes in the buffer.
    pub bytes: u32,
    /// `DESC_*`.
    pub flags: u16,
    /// The chain's next descriptor, if [`DESC_NEXT`].
    pub next: u16,
}

impl Descriptor {
    /// The two words as they lie in memory, each in the byte order of an integer store.
    #[inline]
    pub fn words(self) -> [u64; 2] {
        [self.address, u64::from(self.bytes) | u64::from(self.flags) << 32 | u64::from(self.next) << 48]
    }

    /// The reverse of [`Self::words`].
    #[inline]
    pub fn from_words([address, rest]: [u64; 2]) -> Self {
        Self { address, bytes: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }
}

/// An entry of the used ring (VIRTIO 1.2 §2.7.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain that the device is done with.
    pub head: u32,
    /// Bytes that the device wrote into it.
    pub bytes: u32,
}

/// Offsets of a split ring's parts in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingLayout {
    /// Descriptors in the ring: up to [`RING_SIZE_MAX`], a split ring's a power of two.
    pub size: u16,
    /// Offset of the descriptor table.
    pub descriptor_table: usize,
    /// Offset of the available ring.
    pub available_ring: usize,
    /// Offset of the used ring.
    pub used_ring: usize,
}

impl RingLayout {
    /// A place for a ring of `size`, its parts on cache lines of their own; `None` when memory is short.
    ///
    /// # Panics
    /// If `size` is not a power of two up to [`RING_SIZE_MAX`].
    pub fn place(arena: &mut Arena, size: u16) -> Option<Self> {
        assert!(
            size.is_power_of_two() && size <= RING_SIZE_MAX,
            "ring size {size}: a power of two up to {RING_SIZE_MAX}"
        );
        let entries = usize::from(size);
        Some(Self {
            size,
            descriptor_table: arena.take(DESCRIPTOR_BYTES * entries, 64)?,
            available_ring: arena.take(6 + 2 * entries, 64)?,
            used_ring: arena.take(6 + 8 * entries, 64)?,
        })
    }

    /// A place for a packed ring of `size`, its parts on cache lines of their own; `None` when memory is short.
    ///
    /// # Panics
    /// If `size` is not between 1 and [`RING_SIZE_MAX`].
    pub fn place_packed(arena: &mut Arena, size: u16) -> Option<Self> {
        assert!((1..=RING_SIZE_MAX).contains(&size), "packed ring size {size}: 1 to {RING_SIZE_MAX}");
        Some(Self {
            size,
            descriptor_table: arena.take(DESCRIPTOR_BYTES * usize::from(size), 64)?,
            available_ring: arena.take(4, 64)?,
            used_ring: arena.take(4, 64)?,
        })
    }

    /// Offset of descriptor `index`.
    #[inline]
    pub fn descriptor(&self, index: u16) -> usize {
        self.descriptor_table + DESCRIPTOR_BYTES * usize::from(index)
    }

    /// Offset of the available ring's flags.
    #[inline]
    pub fn available_flags(&self) -> usize {
        self.available_ring
    }

    /// Offset of the available ring's idx.
    #[inline]
    pub fn available_index(&self) -> usize {
        self.available_ring + 2
    }

    /// Offset of the available ring's entry for running index `index`.
    #[inline]
    pub fn available_entry(&self, index: u16) -> usize {
        self.available_ring + 4 + 2 * usize::from(index & (self.size - 1))
    }

    /// Offset of used_event, at the end of the available ring.
    #[inline]
    pub fn used_event(&self) -> usize {
        self.available_ring + 4 + 2 * usize::from(self.size)
    }

    /// Offset of the used ring's flags.
    #[inline]
    pub fn used_flags(&self) -> usize {
        self.used_ring
    }

    /// Offset of the used ring's idx.
    #[inline]
    pub fn used_index(&self) -> usize {
        self.used_ring + 2
    }

    /// Offset of the used ring's entry for running index `index`.
    #[inline]
    pub fn used_entry(&self, index: u16) -> usize {
        self.used_ring + 4 + 8 * usize::from(index & (self.size - 1))
    }

    /// Offset of avail_event, at the end of the used ring.
    #[inline]
    pub fn available_event(&self) -> usize {
        self.used_ring + 4 + 8 * usize::from(self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front_end::memory::GuestMemory;

    #[test]
    fn descriptor_survives_its_words() {
        let descriptor = Descriptor { address: 0x1122_3344_5566_7788, bytes: 0xdead_beef, flags: 0x1234, next: 0x5678 };
        assert_eq!(Descriptor::from_words(descriptor.words()), descriptor);
    }

    #[test]
    fn parts_do_not_overlap_and_entries_wrap() {
        let memory = GuestMemory::new(1 << 16, 1).unwrap();
        let mut arena = Arena::new(&memory);
        let ring = RingLayout::place(&mut arena, 8).unwrap();
        assert_eq!(ring, RingLayout { size: 8, descriptor_table: 0, available_ring: 128, used_ring: 192 });
        assert_eq!(ring.used_event(), 128 + 4 + 16);
        assert_eq!(ring.available_event(), 192 + 4 + 64);
        assert_eq!(ring.available_entry(8), ring.available_entry(0));
        assert_eq!(ring.used_entry(65535), 192 + 4 + 56);
    }
}
