//! Where a packed ring stands, read from the ring itself.
//!
//! Theory of operation. A split ring has its indices in memory. A packed ring has none: a device that is to take it over
//! has only SET_VRING_BASE's word for it, and after a back-end was lost that word is old. QEMU then repeats what it knew
//! when the ring was last started or stopped in order (hw/virtio/virtio.c: "We don't have a reference like avail idx in
//! shared memory"), the device waits in a place that the driver has long passed, and the guest is cut off until it
//! reboots. But we leave every descriptor either available or used (`packed.rs`), each with the wrap counter of the lap
//! in which the driver wrote it last; and that is enough:
//!
//! ```text
//!      0          A                        D                 size
//!      | lap w,   | lap !w, used: free     | lap !w,         |
//!      | avail    | for the driver         | available       |      (one of four such pictures)
//! ```
//! The driver has written each descriptor from the start of the table up to its own place A once more than those from A
//! to the end: A is where the lap changes (never: at the start). From A on, around the table, come first the descriptors
//! that the device has used and then those that wait for it: D, where it goes on, is the first available one, and if
//! there is none, D is A. A ring that no driver has touched is all zero: A and D are its start, with wrap counter 1.
//!
//! Of a batch that got one used descriptor (IN_ORDER) only the last is marked, with the batch's length; those between look
//! available, and are not: the driver may have written some of them anew already, but then not yet the marked one, or not
//! one of them looks so any more.
//!
//! A device that was killed between staging and publishing leaves used descriptors behind an available one, at which
//! the driver still waits. Their buffers may hold parts of frames: that burst is finished on its behalf, each chain
//! given back with length 0, which drivers count as an error and drop ("short packet").
//!
//! The driver may be at work meanwhile. It only turns used descriptors into available ones, at A: D does not move. What
//! is read can be torn only where a chain of several descriptors is just being written, whose first is written last:
//! then the laps change more than once, and the ring is read again.
//!
//! The front-end's word counts only where the ring says nothing. Limit: a ring that was served by another back-end
//! before, with chains of several descriptors that are not in tables of their own or with IN_ORDER's batches, has old
//! descriptors in it that look available, and may be taken up in the wrong place. DPDK and Linux make such chains only where
//! INDIRECT_DESC was refused; DPDK's back-end makes such batches.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::RingSetup;
use super::packed_chain::{DESCRIPTOR_BYTES, FLAG_BATCH_END, FLAG_NEXT, second_word};
use super::position::{Position, is_used, lap};
use crate::memory::Memory;

/// A driver stands inside a chain for as long as it takes to write it, unless its processor was taken away.
const READS_MAX: u32 = 100;
const PAUSE: Duration = Duration::from_micros(100);

const _: () = assert!(READS_MAX as u128 * PAUSE.as_micros() <= 10_000, "the front-end waits for this");

/// A packed ring's table as it lies in memory. Slow, checked access: this runs once per start of a ring.
struct Table<'a> {
    memory: &'a Memory,
    address: u64,
    size: u16,
}

/// Where the ring stands, and how far a burst reached that was never published.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    position: Position,
    /// Descriptors from `position` on that belong to it.
    interrupted: u16,
}

/// Puts the position that the ring itself tells into `setup`, and finishes a burst that was cut off. Leaves `setup`
/// alone where the ring tells none. `setup` is of a packed ring; whether it can be served is not checked here.
pub(super) fn recover(setup: &mut RingSetup) {
    let table = Table { memory: &setup.memory, address: setup.descriptors, size: setup.size };
    let claimed = Position::from_bits(setup.next_avail);
    let Some(found) = table.find() else {
        tracing::warn!(?claimed, "a packed ring tells no position; the front-end's is taken");
        return;
    };
    let position = table.finish_burst(&found).unwrap_or(found.position);
    if position != claimed {
        tracing::info!(?position, ?claimed, interrupted = found.interrupted, "a packed ring resumes where it stands");
    }
    (setup.next_avail, setup.next_used) = (position.bits(), position.bits());
}

impl Table<'_> {
    fn find(&self) -> Option<Found> {
        for _ in 0..READS_MAX {
            if let Some(found) = find(&self.all_seen()?) {
                return Some(found);
            }
            thread::sleep(PAUSE);
        }
        None
    }

    fn all_seen(&self) -> Option<Vec<Seen>> {
        (0..self.size).map(|index| self.second_word(index).map(Seen::new)).collect()
    }

    fn word_address(&self, index: u16) -> GuestAddress {
        // Wraps only where no memory is: then the access fails.
        GuestAddress(self.address.wrapping_add(DESCRIPTOR_BYTES * u64::from(index) + 8))
    }

    /// Length, id, flags.
    fn second_word(&self, index: u16) -> Option<u64> {
        self.memory.mapped().load::<u64>(self.word_address(index), Ordering::Acquire).ok().map(u64::from_le)
    }

    /// Gives back, with length 0, whatever a device that is no more had begun to give back. Returns the position after.
    fn finish_burst(&self, found: &Found) -> Option<Position> {
        let mut writes = Vec::new();
        let mut done = 0;
        while done < found.interrupted {
            let at = found.position.after(done, self.size);
            let word = self.second_word(at.index)?;
            let flags = (word >> 48) as u16;
            // A used one has its id, an available one that of its chain's last.
            let slots = if is_used(flags) { 1 } else { self.chain_slots(at, self.size - done)? };
            let id = (self.second_word(at.after(slots - 1, self.size).index)? >> 32) as u16;
            for member in 0..slots {
                let at = at.after(member, self.size);
                writes.push((at.index, second_word(0, id, at.used_flags())));
            }
            done += slots;
        }
        // The first last: the driver waits there.
        for (index, word) in writes.into_iter().rev() {
            // Release: pairs with the driver's read barrier; what lies behind is written before.
            self.memory.mapped().store(word, self.word_address(index), Ordering::Release).ok()?;
        }
        Some(found.position.after(done, self.size))
    }

    fn chain_slots(&self, head: Position, most: u16) -> Option<u16> {
        for slots in 1..most {
            let index = head.after(slots - 1, self.size).index;
            if (self.second_word(index)? >> 48) as u16 & FLAG_NEXT == 0 {
                return Some(slots);
            }
        }
        Some(most)
    }
}

/// What was read of a descriptor.
#[derive(Debug, Clone, Copy)]
struct Seen {
    flags: u16,
    /// Descriptors of the batch that ends here; 0: none does.
    batch: u32,
}

impl Seen {
    fn new(word: u64) -> Self {
        let flags = (word >> 48) as u16;
        let ends_batch = is_used(flags) && flags & FLAG_BATCH_END != 0;
        Self { flags, batch: if ends_batch { word as u32 } else { 0 } }
    }
}

/// The position in a ring of these descriptors, unless they are torn.
fn find(seen: &[Seen]) -> Option<Found> {
    let size = seen.len() as u16;
    let driver = driver_position(seen)?;
    // The place a whole ring before the driver's: the same index, the lap before.
    let oldest = Position { wrap: !driver.wrap, ..driver };
    let place = |ahead| oldest.after(ahead, size);
    let seen = |ahead: u16| seen[usize::from(place(ahead).index)];
    // Behind the last batch that the driver knows to be used: it has overwritten the start, or sees it used.
    let is_done = |&ahead: &u16| {
        let Seen { batch, .. } = seen(ahead);
        let start = (u32::from(ahead) + 1).checked_sub(batch);
        batch > 0 && start.is_none_or(|start| is_used(seen(start as u16).flags))
    };
    let done = (0..size).rev().find(is_done).map_or(0, |last| last + 1);
    let Some(first) = (done..size).find(|&ahead| place(ahead).is_available(seen(ahead).flags)) else {
        return Some(Found { position: driver, interrupted: 0 });
    };
    let last_used = (first..size).rev().find(|&ahead| is_used(seen(ahead).flags));
    Some(Found { position: place(first), interrupted: last_used.map_or(0, |last| last - first + 1) })
}

/// Where the driver goes on: where the lap changes. `None` if it does so more than once.
fn driver_position(seen: &[Seen]) -> Option<Position> {
    let first = lap(seen.first()?.flags);
    let is_other = |seen: &Seen| lap(seen.flags) != first;
    match seen.iter().position(is_other) {
        None => Some(Position { index: 0, wrap: !first }),
        Some(at) if seen[at..].iter().all(is_other) => Some(Position { index: at as u16, wrap: first }),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const U0: u16 = 0;
    const U1: u16 = 0x8080;
    const A0: u16 = 0x8000;
    const A1: u16 = 0x80;

    fn find(flags: &[u16]) -> Option<Found> {
        super::find(&flags.iter().map(|&flags| Seen { flags, batch: 0 }).collect::<Vec<_>>())
    }

    fn at(index: u16, wrap: bool) -> Option<Found> {
        Some(Found { position: Position { index, wrap }, interrupted: 0 })
    }

    #[test]
    fn every_picture_of_a_ring_of_four_tells_its_position() {
        for (flags, expected) in [
            ([U0, U0, U0, U0], at(0, true)),
            ([A1, U0, U0, U0], at(0, true)),
            ([A1, A1, A1, A1], at(0, true)),
            ([U1, U0, U0, U0], at(1, true)),
            ([U1, A1, A1, U0], at(1, true)),
            ([U1, U1, U1, A1], at(3, true)),
            ([U1, U1, U1, U1], at(0, false)),
            ([A0, U1, U1, A1], at(3, true)),
            ([A0, A0, A1, A1], at(2, true)),
            ([A0, A0, A0, A0], at(0, false)),
            ([U0, A0, U1, U1], at(1, false)),
            ([A1, U0, U0, A0], at(3, false)),
            ([A1, A1, A1, A0], at(3, false)),
        ] {
            assert_eq!(find(&flags), expected, "{flags:x?}");
        }
    }

    #[test]
    fn a_chain_that_is_just_being_written_is_torn() {
        // Descriptor 2 is the second of a chain whose first, 1, is still to come.
        assert_eq!(find(&[U1, U0, A1, U0]), None);
        assert_eq!(find(&[]), None);
    }

    #[test]
    fn what_a_batch_left_behind_is_not_available() {
        // Each in a ring of six; the number is a batch's that ends there.
        let found = |seen: [(u16, u32); 6]| super::find(&seen.map(|(flags, batch)| Seen { flags, batch }));
        let (free, left, wait) = ((U0, 0), (A1, 0), (A1, 0));
        let (used, end) = ((U1, 0), |batch| (U1, batch));
        assert_eq!(found([used, left, end(3), free, free, free]), at(3, true));
        assert_eq!(found([used, left, end(3), wait, wait, free]), at(3, true));
        assert_eq!(found([used, left, end(3), used, end(2), wait]), at(5, true));
        assert_eq!(found([used, left, left, left, left, end(6)]), at(0, false));
        // The driver has written 0 and 1 in the lap after: of the batch of four its start is gone.
        assert_eq!(found([(A0, 0), (A0, 0), left, end(4), used, used]), at(0, false));
        assert_eq!(found([(A0, 0), (A0, 0), left, end(4), wait, wait]), at(4, true));
        // The lap ends inside a batch.
        assert_eq!(found([(A0, 0), (U0, 3), used, used, used, used]), at(2, false));
        // Marked and not published.
        let unpublished = Some(Found { position: Position { index: 1, wrap: true }, interrupted: 3 });
        assert_eq!(found([used, wait, wait, end(3), wait, free]), unpublished);
        // A guest's own: longer than the ring.
        assert_eq!(found([wait, end(u32::MAX), wait, free, free, free]), at(2, true));
    }

    #[test]
    fn a_burst_that_was_never_published_is_seen() {
        let found = |flags: &[u16]| find(flags).map(|found| (found.position.index, found.interrupted));
        assert_eq!(found(&[U1, A1, U1, U1, A1]), Some((1, 3)));
        // Across the end of the table: the driver has written 0 and 1 in the lap after.
        assert_eq!(found(&[U0, U0, U1, A1, U1]), Some((3, 4)));
    }
}
