//! A packed ring's part of the in-flight region (vhost-user, `QueueRegionPacked`), kept while the ring is served.
//!
//! As in `inflight_split.rs`, with one difference: a used descriptor may lie where a chain in flight was, so the part has
//! copies of the descriptors, in entries that are handed out from a free list. We keep that list here and write its
//! links there for the next device; nothing there is read again once the part was opened.

use std::io;

use super::BURST;
use super::position::Position;
use crate::inflight::{COUNTER, ENTRIES, INFLIGHT, InflightPart, VERSION, VERSION_1};

/// Offsets in `QueueRegionPacked`; those of the committed state are 2 (wrap counter: 1) behind.
const FREE_HEAD: usize = 12;
const OLD_FREE_HEAD: usize = 14;
const USED_IDX: usize = 16;
const OLD_USED_IDX: usize = 18;
const USED_WRAP: usize = 20;
const OLD_USED_WRAP: usize = 21;
/// Offsets in `DescStatePacked`.
const NEXT: usize = 2;
const LAST: usize = 4;
const NUM: usize = 6;
/// `id`, `flags` and `len`, which are 8 bytes; not the order of the descriptor's second word.
const ID: usize = 16;
const FLAGS: usize = 18;
const LEN: usize = 20;
const ADDR: usize = 24;

/// A descriptor as a part has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Copied {
    pub(super) address: u64,
    pub(super) bytes: u32,
    pub(super) id: u16,
    pub(super) flags: u16,
}

/// A chain in flight: the entries that its descriptors are copied to, first to last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chained {
    entries: Vec<u16>,
}

/// What a device before us took and did not give back.
#[derive(Debug)]
pub(super) struct Found {
    /// Where the first of it is to be given back.
    pub(super) position: Position,
    /// In the order in which they were taken: never empty, all together at most as many descriptors as the ring has.
    pub(super) chains: Vec<(Chained, Vec<Copied>)>,
}

#[derive(Debug)]
pub(super) struct PackedTracker {
    part: InflightPart,
    /// Of the next chain that is taken.
    counter: u64,
    /// Entries not in use; the last is the head of the list.
    free: Vec<u16>,
    /// Chains taken and not given back.
    batch: Vec<Chained>,
}

/// Whether the part has anything in flight. Its ring cannot tell then where it stands.
pub(super) fn has_inflight(part: &InflightPart) -> bool {
    part.version() != 0 && (0..part.size()).any(|index| part.is_inflight(index))
}

impl PackedTracker {
    /// Opens the part of a ring that stands at `position`, unless the part knows better. `is_available` tells whether the
    /// ring has an available descriptor at a position.
    pub(super) fn open(
        part: &InflightPart,
        position: Position,
        is_available: impl Fn(Position) -> bool,
    ) -> (Self, Option<Found>) {
        let mut tracker = Self { part: part.clone(), counter: 0, free: Vec::new(), batch: Vec::new() };
        let found = (part.version() != 0).then(|| tracker.find(is_available));
        let found = found.transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "an in-flight region is not believed; its ring resumes where it stands");
            None
        });
        if found.is_none() {
            tracker.begin();
        }
        let found = found.filter(|found| !found.chains.is_empty());
        tracker.commit(found.as_ref().map_or(position, |found| found.position));
        tracker.batch.reserve_exact(BURST + found.as_ref().map_or(0, |found| found.chains.len()));
        (tracker, found)
    }

    /// An empty part: all entries free, in their order.
    fn begin(&mut self) {
        self.part.clear();
        let size = self.part.size();
        (0..size).for_each(|index| self.store(index, NEXT, index + 1));
        self.free = (0..size).rev().collect();
        self.counter = 0;
        self.part.store16(ENTRIES, size);
        self.part.store16(FREE_HEAD, 0);
        self.part.store16(VERSION, VERSION_1);
    }

    /// "When reconnecting". An error means that the part cannot be right, and must not be looked at any further.
    fn find(&mut self, is_available: impl Fn(Position) -> bool) -> io::Result<Found> {
        let part = self.part.clone();
        let wrong = |what: String| io::Error::other(what);
        let (version, size) = (part.version(), part.size());
        if version != VERSION_1 || part.load16(ENTRIES) != size {
            return Err(wrong(format!("version {version} with {} entries", part.load16(ENTRIES))));
        }
        let place = |index, wrap| Position { index: part.load16(index), wrap: part.load8(wrap) & 1 != 0 };
        let (new, old) = (place(USED_IDX, USED_WRAP), place(OLD_USED_IDX, OLD_USED_WRAP));
        if new.index >= size || old.index >= size {
            return Err(wrong(format!("used indices {} and {}", new.index, old.index)));
        }
        // The last batch reached the driver if its first descriptor is not available any more.
        let committed = new != old && !is_available(old);
        let (position, free_head) =
            if committed { (new, part.load16(FREE_HEAD)) } else { (old, part.load16(OLD_FREE_HEAD)) };
        let mut seen = vec![false; usize::from(size)];
        // Each entry once: a list that leads back into itself ends there.
        let mut visit = |index: u16| {
            let first = seen.get_mut(usize::from(index));
            first.is_some_and(|seen| !std::mem::replace(seen, true))
        };
        self.free.clear();
        let mut index = free_head;
        while visit(index) {
            self.free.push(index);
            index = self.load(index, NEXT);
        }
        self.free.reverse();
        self.free.iter().for_each(|&index| part.store8(part.entry(index) + INFLIGHT, 0));
        let counter = |index| part.load64(part.entry(index) + COUNTER);
        let mut heads: Vec<_> = (0..size).filter(|&index| part.is_inflight(index)).collect();
        heads.sort_by_key(|&index| counter(index));
        self.counter = heads.last().map_or(0, |&last| counter(last).wrapping_add(1));
        let mut chains = Vec::with_capacity(heads.len());
        for head in heads {
            let mut entries = Vec::new();
            let mut index = head;
            for _ in 0..self.load(head, NUM) {
                if !visit(index) {
                    return Err(wrong(format!("the chain at entry {head} shares entry {index}")));
                }
                entries.push(index);
                index = self.load(index, NEXT);
            }
            if entries.is_empty() {
                return Err(wrong(format!("the chain at entry {head} is empty")));
            }
            let copies = entries.iter().map(|&entry| self.copied(entry)).collect();
            chains.push((Chained { entries }, copies));
        }
        if seen.contains(&false) {
            return Err(wrong("entries that are neither free nor in flight".into()));
        }
        part.store16(FREE_HEAD, free_head);
        Ok(Found { position, chains })
    }

    pub(super) fn part(&self) -> &InflightPart {
        &self.part
    }

    /// A chain was taken: its descriptors, as the ring has them.
    pub(super) fn took(&mut self, descriptors: impl ExactSizeIterator<Item = Copied>) {
        // More than the ring has: a driver that overtakes itself. Its chain is not kept.
        let Some(left) = self.free.len().checked_sub(descriptors.len()) else { return };
        let entries: Vec<_> = self.free.drain(left..).rev().collect();
        let (Some(&head), Some(&last)) = (entries.first(), entries.last()) else { return };
        for (&entry, descriptor) in entries.iter().zip(descriptors) {
            self.part.store64(self.part.entry(entry) + ADDR, descriptor.address);
            self.part.store32(self.part.entry(entry) + LEN, descriptor.bytes);
            self.store(entry, FLAGS, descriptor.flags);
            self.store(entry, ID, descriptor.id);
        }
        self.store(head, NUM, entries.len() as u16);
        self.store(head, LAST, last);
        self.part.store64(self.part.entry(head) + COUNTER, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.part.store8(self.part.entry(head) + INFLIGHT, 1);
        let free_head = self.free_head();
        self.part.store16(FREE_HEAD, free_head);
        self.part.store16(OLD_FREE_HEAD, free_head);
        self.batch.push(Chained { entries });
    }

    /// A chain of the device before us was taken up again.
    pub(super) fn took_again(&mut self, chain: Chained) {
        self.batch.push(chain);
    }

    /// Used descriptors up to `position` are about to be shown to the driver.
    pub(super) fn using(&mut self, position: Position) {
        for Chained { entries } in &self.batch {
            let (Some(&head), Some(&last)) = (entries.first(), entries.last()) else { continue };
            let free_head = self.free.last().copied().unwrap_or(self.part.size());
            self.store(last, NEXT, free_head);
            self.part.store16(FREE_HEAD, head);
            self.free.extend(entries.iter().rev());
        }
        self.part.store16(USED_IDX, position.index);
        self.part.store8(USED_WRAP, position.wrap.into());
    }

    /// They were shown.
    pub(super) fn used(&mut self, position: Position) {
        for Chained { entries } in self.batch.drain(..) {
            entries.first().iter().for_each(|&&head| self.part.store8(self.part.entry(head) + INFLIGHT, 0));
        }
        self.commit(position);
    }

    fn commit(&self, position: Position) {
        let free_head = self.free_head();
        self.part.store16(USED_IDX, position.index);
        self.part.store8(USED_WRAP, position.wrap.into());
        self.part.store16(OLD_FREE_HEAD, free_head);
        self.part.store16(OLD_USED_IDX, position.index);
        self.part.store8(OLD_USED_WRAP, position.wrap.into());
    }

    /// The head of the free list; past the end when there is none.
    fn free_head(&self) -> u16 {
        self.free.last().copied().unwrap_or(self.part.size())
    }

    fn copied(&self, entry: u16) -> Copied {
        let at = self.part.entry(entry);
        let (address, bytes) = (self.part.load64(at + ADDR), self.part.load32(at + LEN));
        Copied { address, bytes, id: self.load(entry, ID), flags: self.load(entry, FLAGS) }
    }

    fn load(&self, entry: u16, field: usize) -> u16 {
        self.part.load16(self.part.entry(entry) + field)
    }

    fn store(&self, entry: u16, field: usize, value: u16) {
        self.part.store16(self.part.entry(entry) + field, value);
    }
}
