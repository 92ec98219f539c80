//! Descriptors of a split ring (VIRTIO 1.2 §2.7.5), and the chains that they make.
//!
//! One of the files with unsafe code in this crate: descriptors are read at host addresses, from tables that were checked to
//! lie whole in mapped memory.

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::buffers::{Direction, Take, Unaligned};
use super::{CHAIN_DESCRIPTORS_MAX, RING_SIZE_MAX, RingFault};
use crate::memory::{Finder, Memory, Segment};

pub(super) const DESCRIPTOR_BYTES: u64 = 16;
const FLAG_NEXT: u16 = VRING_DESC_F_NEXT as u16;
const FLAG_WRITE: u16 = VRING_DESC_F_WRITE as u16;
const FLAG_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// `struct virtq_desc`, read once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) bytes: u32,
    pub(super) flags: u16,
    pub(super) next: u16,
}

impl Descriptor {
    /// The buffer of a chain that is this descriptor alone and that lies in one region.
    #[inline(always)]
    pub(super) fn single(self, finder: &mut Finder<'_>, direction: Direction) -> Option<Segment> {
        let flags = if direction == Direction::DeviceWrites { FLAG_WRITE } else { 0 };
        if self.flags & (FLAG_NEXT | FLAG_INDIRECT | FLAG_WRITE) != flags || self.bytes == 0 {
            return None;
        }
        finder.segment(self.address, self.bytes)
    }
}

/// A descriptor table that was checked to lie whole in mapped memory.
#[derive(Clone, Copy)]
pub(super) struct Table {
    pub(super) host: usize,
    pub(super) size: u16,
}

/// Reads entry `index` of a descriptor table at host address `table`, once.
///
/// # Safety
/// The table has more than `index` entries and is mapped.
#[inline]
pub(super) unsafe fn descriptor(table: usize, index: u16) -> Descriptor {
    let entry = (table + usize::from(index) * DESCRIPTOR_BYTES as usize) as *const Unaligned;
    // SAFETY: by the caller's promise; `Unaligned` has no alignment. Volatile: the guest may write meanwhile, and the
    // compiler must not read twice. Two loads of 8 bytes: a volatile read of `[u8; 16]` becomes 16 loads of one.
    let (Unaligned(address), Unaligned(rest)) = unsafe { (entry.read_volatile(), entry.add(1).read_volatile()) };
    let rest = u64::from_le(rest);
    Descriptor {
        address: u64::from_le(address),
        bytes: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}

/// Walks the chain whose head, index and descriptor, was read, giving each non-empty segment to `take`. Returns false if
/// `take` did, which ends the walk. Every descriptor is read once and counted in `visited`; a chain has at most as many as
/// its table, or as the limit.
pub(super) fn walk(
    memory: &Memory,
    mut table: Table,
    indirect: bool,
    (head, first): (u16, Descriptor),
    direction: Direction,
    visited: &mut usize,
    take: Take<'_>,
) -> Result<bool, RingFault> {
    let (mut index, mut entry) = (head, first);
    let mut left = table.size.min(CHAIN_DESCRIPTORS_MAX);
    let mut in_indirect = false;
    loop {
        left -= 1;
        *visited += 1;
        if entry.flags & FLAG_INDIRECT != 0 {
            // §2.7.5.3.1: never nested, never with NEXT, and only if negotiated. It may have more descriptors than the
            // ring (Linux makes such); indices are 16 bits wide and reach no further than the largest ring's.
            let entries = entry.bytes / DESCRIPTOR_BYTES as u32;
            let whole = u64::from(entry.bytes).is_multiple_of(DESCRIPTOR_BYTES);
            if !indirect || in_indirect || entry.flags & FLAG_NEXT != 0 || !whole || entries == 0 {
                return Err(RingFault::Indirect { index });
            }
            let host = memory
                .translate(entry.address, u64::from(entry.bytes))
                .ok_or(RingFault::BufferAddress { address: entry.address, bytes: entry.bytes })?;
            table = Table { host: host as usize, size: entries.min(u32::from(RING_SIZE_MAX)) as u16 };
            (left, index, in_indirect) = (table.size.min(CHAIN_DESCRIPTORS_MAX), 0, true);
        } else {
            let writes = entry.flags & FLAG_WRITE != 0;
            if writes != (direction == Direction::DeviceWrites) {
                return Err(RingFault::Direction { index });
            }
            if entry.bytes > 0 {
                let mut wanted = true;
                let mapped = memory.segments(entry.address, entry.bytes, |segment| {
                    wanted = take(segment);
                    wanted
                });
                if !wanted {
                    return Ok(false);
                }
                if !mapped {
                    return Err(RingFault::BufferAddress { address: entry.address, bytes: entry.bytes });
                }
            }
            if entry.flags & FLAG_NEXT == 0 {
                return Ok(true);
            }
            index = entry.next;
        }
        if index >= table.size {
            return Err(RingFault::DescriptorIndex { index, size: table.size });
        }
        if left == 0 {
            return Err(RingFault::Loop { head });
        }
        // SAFETY: `index < table.size`; the ring's table was checked at set-up, an indirect one above.
        entry = unsafe { descriptor(table.host, index) };
    }
}
