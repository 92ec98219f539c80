//! A split ring's part of the in-flight region (vhost-user, `QueueRegionSplit`), kept while the ring is served.
//!
//! A chain is in flight from [`SplitTracker::took`] to [`SplitTracker::used`], around which the used index is published.
//! Buffers of a guest receiveq are taken, filled and given back in one go: a device that dies meanwhile leaves them
//! available, and the next one takes them again; for them only the used index is kept.

use std::io;

use super::BURST;
use crate::inflight::{COUNTER, ENTRIES, INFLIGHT, InflightPart, VERSION, VERSION_1};

/// Offsets in `QueueRegionSplit` and `DescStateSplit`.
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const NEXT: usize = 6;

#[derive(Debug)]
pub(super) struct SplitTracker {
    part: InflightPart,
    /// Of the next chain that is taken.
    counter: u64,
    /// Heads taken and not given back.
    batch: Vec<u16>,
}

impl SplitTracker {
    /// Opens the part of a ring whose used index is `used`. Also returns the heads of chains that the device before us took
    /// and did not give back, in the order in which it took them; `None` if there was none before.
    pub(super) fn open(part: &InflightPart, used: u16) -> (Self, Option<Vec<u16>>) {
        let mut tracker = Self { part: part.clone(), counter: 0, batch: Vec::new() };
        let found = (part.version() != 0).then(|| tracker.find(used));
        let found = found.transpose().unwrap_or_else(|error| {
            tracing::warn!(%error, "an in-flight region is not believed; its ring resumes from the used index");
            None
        });
        if found.is_none() {
            part.clear();
        }
        part.store16(ENTRIES, part.size());
        part.store16(USED_IDX, used);
        part.store16(VERSION, VERSION_1);
        tracker.batch.reserve_exact(BURST + found.as_ref().map_or(0, Vec::len));
        (tracker, found)
    }

    /// "When reconnecting".
    fn find(&mut self, used: u16) -> io::Result<Vec<u16>> {
        let part = &self.part;
        let (version, entries) = (part.version(), part.load16(ENTRIES));
        if version != VERSION_1 || entries != part.size() {
            return Err(io::Error::other(format!("version {version} with {entries} entries")));
        }
        // The last batch was shown to the driver, but its entries may not have been cleared yet.
        let batch = used.wrapping_sub(part.load16(USED_IDX));
        if batch > part.size() {
            return Err(io::Error::other(format!("a last batch of {batch} chains")));
        }
        let mut index = part.load16(LAST_BATCH_HEAD);
        for _ in 0..batch {
            // A batch of a guest receiveq is not listed.
            if index >= part.size() {
                break;
            }
            part.store8(part.entry(index) + INFLIGHT, 0);
            index = part.load16(part.entry(index) + NEXT);
        }
        let counter = |index| part.load64(part.entry(index) + COUNTER);
        let mut heads: Vec<_> = (0..part.size()).filter(|&index| part.is_inflight(index)).collect();
        heads.sort_by_key(|&index| counter(index));
        self.counter = heads.last().map_or(0, |&last| counter(last).wrapping_add(1));
        Ok(heads)
    }

    pub(super) fn part(&self) -> &InflightPart {
        &self.part
    }

    /// A chain was taken. One that is in flight already, of the device before us, keeps its place in the order.
    pub(super) fn took(&mut self, head: u16) {
        let entry = self.part.entry(head);
        if self.part.load8(entry + INFLIGHT) == 0 {
            self.part.store64(entry + COUNTER, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.part.store8(entry + INFLIGHT, 1);
        }
        self.batch.push(head);
    }

    /// The used index is about to be published.
    pub(super) fn using(&self) {
        for &head in &self.batch {
            self.part.store16(self.part.entry(head) + NEXT, self.part.load16(LAST_BATCH_HEAD));
            self.part.store16(LAST_BATCH_HEAD, head);
        }
    }

    /// The used index was published: `index`.
    pub(super) fn used(&mut self, index: u16) {
        for head in self.batch.drain(..) {
            self.part.store8(self.part.entry(head) + INFLIGHT, 0);
        }
        self.part.store16(USED_IDX, index);
    }
}
