//! Descriptors of a packed ring (VIRTIO 1.2 §2.8.5), and the chains that they make.
//!
//! One of the files with unsafe code in this crate: descriptors are read at host addresses, from tables that were checked to
//! lie whole in mapped memory, or that are private.

use virtio_bindings::bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::buffers::{Direction, Take, Unaligned};
use super::{CHAIN_DESCRIPTORS_MAX, RingFault};
use crate::memory::{Finder, Memory, Segment};

pub(super) const DESCRIPTOR_BYTES: u64 = 16;
pub(super) const FLAG_NEXT: u16 = VRING_DESC_F_NEXT as u16;
pub(super) const FLAG_WRITE: u16 = VRING_DESC_F_WRITE as u16;
const FLAG_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
/// Ours, on the last descriptor of a batch that has one used descriptor: its length is the batch's number of descriptors.
/// The driver, which skips it, does not look, and to which it means nothing in a used one (§2.8.7).
pub(super) const FLAG_BATCH_END: u16 = FLAG_INDIRECT;

/// Length, buffer id and flags of a descriptor, as its second word has them.
pub(super) fn second_word(bytes: u32, id: u16, flags: u16) -> u64 {
    (u64::from(bytes) | u64::from(id) << 32 | u64::from(flags) << 48).to_le()
}

/// `struct pvirtq_desc`, read once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) address: u64,
    pub(super) bytes: u32,
    pub(super) id: u16,
    pub(super) flags: u16,
}

impl Descriptor {
    #[inline]
    pub(super) fn from_words(address: u64, rest: u64) -> Self {
        let rest = u64::from_le(rest);
        Self { address: u64::from_le(address), bytes: rest as u32, id: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }

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

/// A chain that was taken.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Chain {
    /// From its last descriptor (§2.8.6). It means something to the driver alone.
    pub(super) id: u16,
    /// Descriptors of the ring that it takes up.
    pub(super) slots: u16,
}

/// A chain of one descriptor and its buffer in one region, seen before it is needed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Simple {
    pub(super) id: u16,
    pub(super) buffer: Segment,
}

/// A table of descriptors: the ring's own, checked to lie whole in mapped memory, or one in private memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Table {
    pub(super) host: usize,
    pub(super) size: u16,
}

/// The first descriptor of a chain, as it was read, and where the others follow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub(super) table: Table,
    pub(super) index: u16,
    pub(super) descriptor: Descriptor,
}

/// Reads entry `index` of a descriptor table at host address `table`, once.
///
/// # Safety
/// The table has more than `index` entries and is mapped.
#[inline]
pub(super) unsafe fn descriptor(table: usize, index: u16) -> Descriptor {
    let entry = (table + usize::from(index) * DESCRIPTOR_BYTES as usize) as *const Unaligned;
    // SAFETY: by the caller's promise; `Unaligned` has no alignment. Volatile: the guest may write meanwhile, and the
    // compiler must not read twice.
    let (Unaligned(address), Unaligned(rest)) = unsafe { (entry.read_volatile(), entry.add(1).read_volatile()) };
    Descriptor::from_words(address, rest)
}

/// Walks the chain that begins with `head`, giving each non-empty segment to `take`. Returns the
/// chain, and false if `take` once did, after which it is not asked again. Every descriptor is read once and counted in
/// `visited`; a chain has at most as many as its table, or as the limit.
pub(super) fn walk(
    memory: &Memory,
    indirect: bool,
    head: Head,
    direction: Direction,
    visited: &mut usize,
    take: Take<'_>,
) -> Result<(Chain, bool), RingFault> {
    let Head { table, index: at, descriptor: head } = head;
    if head.flags & FLAG_INDIRECT != 0 {
        let whole = walk_indirect(memory, indirect, (at, head), direction, visited, take)?;
        return Ok((Chain { id: head.id, slots: 1 }, whole));
    }
    let most = table.size.min(CHAIN_DESCRIPTORS_MAX);
    let (mut entry, mut index, mut slots, mut whole) = (head, at, 1, true);
    loop {
        *visited += 1;
        // §2.8.7.1: an indirect table stands alone, it is no part of a chain.
        if entry.flags & FLAG_INDIRECT != 0 {
            return Err(RingFault::Indirect { index });
        }
        if whole {
            whole = take_buffer(memory, entry, index, direction, take)?;
        }
        if entry.flags & FLAG_NEXT == 0 {
            return Ok((Chain { id: entry.id, slots }, whole));
        }
        if slots == most {
            return Err(RingFault::Loop { head: at });
        }
        slots += 1;
        index = if index + 1 == table.size { 0 } else { index + 1 };
        // SAFETY: `index < table.size`, and the table was checked at set-up, or is private. Whether the driver has made this one
        // available is not looked at: it did before the first one (§2.8.21.1), and if not, it gets what it wrote.
        entry = unsafe { descriptor(table.host, index) };
    }
}

/// As [`walk`], for the table that `head` at `at` refers to. Its descriptors follow one another; of their flags only
/// WRITE means something, the device ignores the others (§2.8.7).
fn walk_indirect(
    memory: &Memory,
    indirect: bool,
    (at, head): (u16, Descriptor),
    direction: Direction,
    visited: &mut usize,
    take: Take<'_>,
) -> Result<bool, RingFault> {
    let entries = head.bytes / DESCRIPTOR_BYTES as u32;
    let is_whole = u64::from(head.bytes).is_multiple_of(DESCRIPTOR_BYTES);
    if !indirect || head.flags & FLAG_NEXT != 0 || !is_whole || entries == 0 {
        return Err(RingFault::Indirect { index: at });
    }
    let host = memory
        .translate(head.address, u64::from(head.bytes))
        .ok_or(RingFault::BufferAddress { address: head.address, bytes: head.bytes })?;
    // A table has no end mark: all of it is the chain.
    if entries > u32::from(CHAIN_DESCRIPTORS_MAX) {
        return Err(RingFault::Loop { head: at });
    }
    for index in 0..entries as u16 {
        *visited += 1;
        // SAFETY: the table has `entries` entries, and was just found to be mapped.
        let entry = unsafe { descriptor(host as usize, index) };
        if !take_buffer(memory, entry, index, direction, take)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Gives the segments of one descriptor's buffer to `take`; false if that wants no more.
fn take_buffer(
    memory: &Memory,
    entry: Descriptor,
    index: u16,
    direction: Direction,
    take: Take<'_>,
) -> Result<bool, RingFault> {
    if (entry.flags & FLAG_WRITE != 0) != (direction == Direction::DeviceWrites) {
        return Err(RingFault::Direction { index });
    }
    let mut wanted = true;
    if entry.bytes > 0 {
        let mapped = memory.segments(entry.address, entry.bytes, |segment| {
            wanted = take(segment);
            wanted
        });
        if wanted && !mapped {
            return Err(RingFault::BufferAddress { address: entry.address, bytes: entry.bytes });
        }
    }
    Ok(wanted)
}
