//! Memory of a connection table, in memory before connections come.
//!
//! A page that nobody has used costs whoever touches it first a fault, more than a new connection does. So the control thread
//! has as much more of each part ready as is used ([`Ahead::make_ready`]). A worker that is faster than that has some ready by
//! itself (`Ahead::reach`), and says at the same time how far it has come.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use dreamwire_policy::Memory;

use crate::huge_pages::{self, HUGE_BYTES};

/// How much of each part a worker has ready at once: 1024 connections.
pub(super) const STEP_BYTES: usize = 64 << 10;
/// How much more than is used the control thread has ready at most.
const AHEAD_BYTES: usize = 16 << 20;

/// The parts of a table, for as long as its perimeter lives. Numbers, not memory: all that can go wrong is that a page is in
/// memory that need not be, or the other way round.
#[derive(Debug)]
pub struct Ahead {
    parts: [Part; 3],
}

#[derive(Debug)]
struct Part {
    all: Range<usize>,
    /// By the worker's last word.
    used_end: AtomicUsize,
    ready_end: AtomicUsize,
}

impl Ahead {
    pub(super) fn new(parts: [Memory; 3]) -> Self {
        let part = |Memory { all, used_end }| Part { used_end: used_end.into(), ready_end: all.start.into(), all };
        Self { parts: parts.map(part) }
    }

    /// How far each part may come to be used before [`Self::reach`] is to be called: until the first connection, in the
    /// beginning.
    pub(super) fn begin(&self) -> [usize; 3] {
        [0, 1, 2].map(|part| self.parts[part].all.start + 1)
    }

    /// A worker has come to use a part up to here; how far it may come until it has to call again.
    #[cold]
    pub(super) fn reach(&self, part: usize, used_end: usize) -> usize {
        let part = &self.parts[part];
        part.used_end.store(used_end, Relaxed);
        let until = part.after(used_end, STEP_BYTES);
        let ready_end = part.ready_end.load(Relaxed);
        if ready_end < until {
            huge_pages::populate(used_end.max(ready_end)..until);
            part.ready_end.fetch_max(until, Relaxed);
        }
        if until < part.all.end { until } else { usize::MAX }
    }

    /// Has more ready, `most` bytes at most: how many it were. For the control thread.
    pub fn make_ready(&self, most: usize) -> usize {
        self.parts.iter().fold(0, |bytes, part| bytes + part.make_ready(most - bytes))
    }
}

impl Part {
    /// As much further as is used, `most` at most.
    fn after(&self, used_end: usize, most: usize) -> usize {
        (used_end + (used_end - self.all.start).min(most)).min(self.all.end)
    }

    fn make_ready(&self, most: usize) -> usize {
        let (ready_end, mut until) =
            (self.ready_end.load(Relaxed), self.after(self.used_end.load(Relaxed), AHEAD_BYTES));
        if until - self.all.start >= 2 * HUGE_BYTES {
            until = until.next_multiple_of(HUGE_BYTES).min(self.all.end);
        }
        let until = until.min(ready_end.saturating_add(most));
        if until <= ready_end {
            return 0;
        }
        huge_pages::from_start(ready_end..until);
        huge_pages::populate(ready_end..until);
        self.ready_end.fetch_max(until, Relaxed);
        until - ready_end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::huge_pages::{keep_small, resident};

    /// Three parts of eight huge pages, of which the first is used as said.
    fn parts(words: &[u64], used_bytes: usize) -> Ahead {
        let start = (words.as_ptr() as usize).next_multiple_of(HUGE_BYTES);
        keep_small(start..start + 24 * HUGE_BYTES);
        let part = |index: usize, used_bytes| {
            let start = start + index * 8 * HUGE_BYTES;
            Memory { all: start..start + 8 * HUGE_BYTES, used_end: start + used_bytes }
        };
        Ahead::new([part(0, used_bytes), part(1, 0), part(2, 0)])
    }

    #[test]
    fn as_much_more_is_ready_as_is_used_and_nothing_of_what_is_not() {
        let words = vec![0u64; 25 * HUGE_BYTES / 8];
        for (used_bytes, ready_bytes) in [
            (0, 0),
            (64, 128),
            (100 << 10, 200 << 10),
            (HUGE_BYTES, 2 * HUGE_BYTES),
            // Whole huge pages then.
            (HUGE_BYTES + 4096, 3 * HUGE_BYTES),
            (5 * HUGE_BYTES, 8 * HUGE_BYTES),
        ] {
            let ahead = parts(&words, used_bytes);
            assert_eq!(ahead.make_ready(usize::MAX), ready_bytes, "{used_bytes} used");
            assert_eq!(ahead.make_ready(usize::MAX), 0, "all is ready");
            let all = ahead.parts[0].all.clone();
            assert!((all.start..all.start + ready_bytes).step_by(4096).all(resident), "{used_bytes} used");
            let after = all.start + ready_bytes.next_multiple_of(HUGE_BYTES);
            assert!((after..all.end).step_by(HUGE_BYTES).all(|page| !resident(page)), "{used_bytes} used");
            assert!(ahead.parts[1..].iter().all(|part| !resident(part.all.start)));
        }
    }

    #[test]
    fn no_more_is_ready_at_once_than_asked_for() {
        let words = vec![0u64; 25 * HUGE_BYTES / 8];
        let ahead = parts(&words, 5 << 20);
        let bytes: Vec<_> = (0..4).map(|_| ahead.make_ready(5 << 20)).collect();
        assert_eq!(bytes, [5 << 20, 5 << 20, 0, 0]);
    }

    #[test]
    fn a_worker_has_ready_only_what_is_not_and_tells_how_far_it_has_come() {
        let words = vec![0u64; 25 * HUGE_BYTES / 8];
        let ahead = parts(&words, 0);
        let start = ahead.parts[0].all.start;
        assert_eq!(ahead.begin()[0], start + 1);
        // Faster than the control thread.
        assert_eq!(ahead.reach(0, start + 64), start + 128);
        assert_eq!(ahead.reach(0, start + (1 << 20)), start + (1 << 20) + STEP_BYTES);
        assert!(resident(start + (1 << 20) + STEP_BYTES - 1) && !resident(start + (1 << 20) + STEP_BYTES));
        assert_eq!(ahead.make_ready(usize::MAX), (1 << 20) - STEP_BYTES);
        // Slower.
        let ready_end = ahead.parts[0].ready_end.load(Relaxed);
        assert_eq!(ahead.reach(0, start + (2 << 20) - 4 * STEP_BYTES), start + (2 << 20) - 3 * STEP_BYTES);
        assert_eq!(ahead.parts[0].ready_end.load(Relaxed), ready_end);
        assert_eq!(ahead.reach(0, start + 8 * HUGE_BYTES - 64), usize::MAX, "never again");
    }
}
