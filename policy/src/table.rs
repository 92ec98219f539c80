//! The connection table of one port: fixed size, two choices of a 15-way bucket, seeded hash.
//!
//! A connection is in one of two buckets that its hash names, or nowhere, so every operation is bounded. It is in the first
//! unless that was crowded, and each bucket knows how many of its own went to their second: mostly none, so one cache line says
//! that a connection is new. Buckets say where entries are; entries are taken in order, and again once freed. All is allocated at start and nothing grows, but a page is
//! resident only once a connection has used it: a table costs what its busiest moment needed. When there is no room, the
//! least useful connection of both buckets goes: expired, then cut by its rules, then closed, then never answered, then closing. An assured
//! connection (answered, and not closing) never goes for another. Owned by a [`crate::Conntrack`].

use std::hash::BuildHasher;
use std::ops::Range;

use foldhash::SharedSeed;
use foldhash::quality::SeedableRandomState;

use crate::buckets::{AWAY, Buckets, SLOT_BITS, TAG, WAYS, places, places_mut, slot_of, ways};
use crate::conn_key::ConnKey;
use crate::model::Direction;
use crate::tcp::{TcpState, Tracker};

/// Free places that leave a bucket to those who have it as their first. Beyond, the emptier of two is taken.
const CROWDED: u32 = 4;

/// Four fifths of the places may be taken.
const TAKEN_MAX: usize = 12;

/// As many as slots can tell apart.
const CONNECTIONS_MAX: u32 = 1 << SLOT_BITS;
const CONNECTIONS_MIN: u32 = 8;

/// Buckets searched for a victim when the quota is reached and both buckets hold assured connections only.
const SEARCHED_BUCKETS_MAX: usize = 16;

/// What the protocol's tracking keeps.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tracked {
    Tcp(Tracker),
    /// UDP and UDP-Lite.
    Udp {
        /// When it counts as a stream, in ms of the caller's clock.
        stream_ms: u32,
    },
    Icmp,
    Other,
}

/// One connection: two cache lines.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Entry {
    pub(crate) key: ConnKey,
    pub(crate) expires_ns: u64,
    /// Odd while taken. Counts up when taken and when freed, so an old reference is told from a new connection.
    pub(crate) generation: u32,
    /// The policy that last judged it.
    pub(crate) policy_generation: u32,
    /// The rule that let it pass; `u32::MAX`: none.
    pub(crate) rule: u32,
    /// Of the far end, from a tunnel header, if `FLAG_IDENTITY`.
    pub(crate) identity: u16,
    pub(crate) flags: u8,
    /// Which way its first packet went.
    pub(crate) initiator: Direction,
    pub(crate) tracked: Tracked,
}

const _: () = assert!(size_of::<Entry>() == 128);

impl Entry {
    pub(crate) const REPLIED: u8 = 1;
    pub(crate) const ASSURED: u8 = 2;
    pub(crate) const LOG: u8 = 4;
    pub(crate) const IDENTITY: u8 = 8;
    /// The rules no longer let it pass.
    pub(crate) const REVOKED: u8 = 16;

    pub(crate) const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// One that nobody has used.
    const fn free(key: ConnKey) -> Self {
        Self {
            key,
            expires_ns: 0,
            generation: 0,
            policy_generation: 0,
            rule: u32::MAX,
            identity: 0,
            flags: 0,
            initiator: Direction::Egress,
            tracked: Tracked::Other,
        }
    }

    /// How useful it is; `None`: too useful to be dropped. Of two that are equally useful, the one that expires first goes.
    pub(crate) fn worth(&self, now_ns: u64) -> Option<(u8, u64)> {
        let state = match &self.tracked {
            Tracked::Tcp(tracker) => tracker.state(),
            _ => TcpState::None,
        };
        let class = match state {
            _ if self.expires_ns <= now_ns => 0,
            _ if self.has(Self::REVOKED) => 1,
            TcpState::Close | TcpState::TimeWait => 2,
            _ if !self.has(Self::ASSURED) => 3,
            TcpState::FinWait | TcpState::CloseWait | TcpState::LastAck => 4,
            _ => return None,
        };
        Some((class, self.expires_ns))
    }
}

/// The table.
#[derive(Debug)]
pub(crate) struct Table {
    hasher: SeedableRandomState,
    buckets: Buckets,
    /// Those taken so far, within the capacity of `limit`.
    entries: Vec<Entry>,
    /// Slots of entries that are free again.
    freed: Vec<u32>,
    limit: u32,
    search_at: usize,
    sweep_at: usize,
    pub(crate) dropped_early: u64,
    /// Connections that have ended so far.
    pub(crate) ended: u64,
}

impl Table {
    /// Room for `limit` connections, 8 at least and 2^20 at most: a quarter more places, or up to twice that. With half of them taken, one
    /// connection in 60 has found its first bucket crowded; with four fifths, one in 7, and one in 300,000 both of them full.
    pub(crate) fn new(limit: u32, seed: u64) -> Self {
        Self::with_hasher(limit, SeedableRandomState::with_seed(seed, SharedSeed::global_random()))
    }

    fn with_hasher(limit: u32, hasher: SeedableRandomState) -> Self {
        let limit = limit.clamp(CONNECTIONS_MIN, CONNECTIONS_MAX);
        let buckets = (limit as usize).div_ceil(TAKEN_MAX).next_power_of_two();
        Self {
            hasher,
            buckets: Buckets::new(buckets),
            entries: Vec::with_capacity(limit as usize),
            freed: Vec::with_capacity(limit as usize),
            limit,
            search_at: 0,
            sweep_at: 0,
            dropped_early: 0,
            ended: 0,
        }
    }

    /// Addresses of buckets and entries.
    pub(crate) fn memory(&self) -> [Range<usize>; 2] {
        let entries = self.entries.as_ptr() as usize;
        let entries_end = entries + self.entries.capacity() * size_of::<Entry>();
        [self.buckets.memory(), entries..entries_end]
    }

    /// Addresses of entries that were ever taken.
    #[inline]
    pub(crate) fn used(&self) -> Range<usize> {
        let used = self.entries.as_ptr_range();
        used.start as usize..used.end as usize
    }

    pub(crate) fn count(&self) -> u32 {
        (self.entries.len() - self.freed.len()) as u32
    }

    /// Those in `count` places from `first` on.
    pub(crate) fn entries_among(&self, first: usize, count: usize) -> impl Iterator<Item = &Entry> {
        self.entries.iter().skip(first).take(count).filter(|entry| entry.generation % 2 == 1)
    }

    /// Places that were ever taken.
    pub(crate) fn places_used(&self) -> usize {
        self.entries.len()
    }

    #[inline]
    pub(crate) fn entry(&self, slot: usize) -> &Entry {
        &self.entries[slot]
    }

    #[inline]
    pub(crate) fn entry_mut(&mut self, slot: usize) -> &mut Entry {
        &mut self.entries[slot]
    }

    /// The slot, if that reference is still to the same connection.
    #[inline]
    pub(crate) fn resolve(&self, slot: u32, generation: u32) -> Option<usize> {
        let slot = slot as usize;
        self.entries.get(slot).is_some_and(|entry| entry.generation == generation).then_some(slot)
    }

    /// What [`Table::find`] and [`Table::insert`] want beside a key.
    #[inline]
    pub(crate) fn hash(&self, key: &ConnKey) -> u64 {
        self.hasher.hash_one(key)
    }

    /// The two buckets of a connection, and its part of the hash in its place.
    #[inline]
    fn places(&self, hash: u64) -> ([usize; 2], u32) {
        let mask = self.buckets.count - 1;
        let tag = ((hash >> 52) as u32).max(1) << SLOT_BITS;
        ([hash as usize & mask, (hash >> 24) as usize & mask], tag)
    }

    /// Where a connection's slot is looked for first.
    #[inline]
    pub(crate) fn bucket(&self, hash: u64) -> &[u32; WAYS + 1] {
        &self.buckets[self.places(hash).0[0]]
    }

    /// The slot of a connection that has not expired.
    #[inline]
    pub(crate) fn find(&mut self, key: &ConnKey, hash: u64, now_ns: u64) -> Option<usize> {
        let slot = self.peek(key, hash)?;
        if self.entries[slot].expires_ns <= now_ns {
            self.free(slot);
            return None;
        }
        Some(slot)
    }

    /// As [`Self::find`], expired or not.
    #[inline]
    pub(crate) fn peek(&self, key: &ConnKey, hash: u64) -> Option<usize> {
        let ([first, second], tag) = self.places(hash);
        let found = self.search(first, tag, key);
        if found.is_some() || self.buckets[first][AWAY] == 0 {
            return found;
        }
        self.search(second, tag, key)
    }

    #[inline]
    fn search(&self, bucket: usize, tag: u32, key: &ConnKey) -> Option<usize> {
        let bucket = &self.buckets[bucket];
        let mut likely = ways(bucket, TAG, tag);
        while likely != 0 {
            let slot = slot_of(bucket[likely.trailing_zeros() as usize]);
            if self.entries.get(slot).is_some_and(|entry| entry.key == *key) {
                return Some(slot);
            }
            likely &= likely - 1;
        }
        None
    }

    /// Takes a slot for a connection that is not in the table. `None`: there is no room, and nobody less useful.
    pub(crate) fn insert(&mut self, key: ConnKey, hash: u64, now_ns: u64) -> Option<usize> {
        let (buckets, tag) = self.places(hash);
        let (choice, way) = self.room(buckets, now_ns)?;
        if self.count() >= self.limit {
            self.make_room(now_ns)?;
        }
        let slot = match self.freed.pop() {
            Some(slot) => slot as usize,
            None => {
                assert!(self.entries.len() < self.entries.capacity(), "the quota is the capacity");
                self.entries.push(Entry::free(key));
                self.entries.len() - 1
            }
        };
        let entry = &mut self.entries[slot];
        entry.key = key;
        entry.generation = entry.generation.wrapping_add(1);
        entry.flags = 0;
        self.buckets[buckets[choice]][way] = tag | slot as u32;
        if choice == 1 {
            self.buckets[buckets[0]][AWAY] += 1;
        }
        Some(slot)
    }

    /// A free place in one of two buckets: which of the two, and which way. If both are full, that of the least useful
    /// connection.
    fn room(&mut self, buckets: [usize; 2], now_ns: u64) -> Option<(usize, usize)> {
        if let Some(place) = self.free_place(buckets) {
            return Some(place);
        }
        let slot = self.least_useful(&buckets, now_ns)?;
        self.drop_early(slot, now_ns);
        self.free_place(buckets)
    }

    fn free_place(&self, buckets: [usize; 2]) -> Option<(usize, usize)> {
        let free = |choice: usize| ways(&self.buckets[buckets[choice]], u32::MAX, 0);
        let first = free(0);
        let is_crowded = first.count_ones() < CROWDED;
        let (choice, ways) = match if is_crowded { free(1) } else { 0 } {
            second if second.count_ones() > first.count_ones() => (1, second),
            _ => (0, first),
        };
        (ways != 0).then(|| (choice, ways.trailing_zeros() as usize))
    }

    /// Frees one slot somewhere: the quota is reached.
    fn make_room(&mut self, now_ns: u64) -> Option<()> {
        for _ in 0..SEARCHED_BUCKETS_MAX {
            let bucket = self.search_at;
            self.search_at = (bucket + 1) & (self.buckets.count - 1);
            if let Some(slot) = self.least_useful(&[bucket], now_ns) {
                self.drop_early(slot, now_ns);
                return Some(());
            }
        }
        None
    }

    fn least_useful(&self, buckets: &[usize], now_ns: u64) -> Option<usize> {
        let places = buckets.iter().flat_map(|&bucket| places(&self.buckets[bucket]));
        let taken = places.filter(|&&place| place != 0).map(|&place| slot_of(place));
        let candidates = taken.filter_map(|slot| self.entries[slot].worth(now_ns).map(|worth| (worth, slot)));
        candidates.min().map(|(_, slot)| slot)
    }

    fn drop_early(&mut self, slot: usize, now_ns: u64) {
        if self.entries[slot].expires_ns > now_ns {
            self.dropped_early += 1;
        }
        self.free(slot);
    }

    pub(crate) fn free(&mut self, slot: usize) {
        let entry = &mut self.entries[slot];
        assert!(entry.generation % 2 == 1, "slot {slot} is free already");
        entry.generation = entry.generation.wrapping_add(1);
        let hash = self.hasher.hash_one(entry.key);
        let ([first, second], tag) = self.places(hash);
        let own = |place: &&mut u32| **place == tag | slot as u32;
        if let Some(place) = places_mut(&mut self.buckets[first]).iter_mut().find(own) {
            *place = 0;
        } else if let Some(place) = places_mut(&mut self.buckets[second]).iter_mut().find(own) {
            *place = 0;
            self.buckets[first][AWAY] -= 1;
        }
        self.freed.push(slot as u32);
        self.ended += 1;
    }

    /// Frees what has expired among the next `count` entries.
    pub(crate) fn sweep(&mut self, count: usize, now_ns: u64) {
        for _ in 0..count.min(self.entries.len()) {
            let slot = self.sweep_at;
            self.sweep_at = (slot + 1) % self.entries.len();
            let entry = &self.entries[slot];
            if entry.generation % 2 == 1 && entry.expires_ns <= now_ns {
                self.free(slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::key::Family;

    fn key(port: u16) -> ConnKey {
        ConnKey {
            local: [0, 0x0a00_0001],
            remote: [0, 0x0a00_0002],
            local_port: port,
            remote_port: 443,
            protocol: 6,
            family: Family::V4,
            asker: Direction::Egress,
        }
    }

    fn insert(table: &mut Table, port: u16) -> Option<usize> {
        table.insert(key(port), table.hash(&key(port)), 0)
    }

    fn peek(table: &Table, port: u16) -> Option<usize> {
        table.peek(&key(port), table.hash(&key(port)))
    }

    proptest! {
        #[test]
        fn what_is_in_the_table_is_found_and_what_is_not_is_not(
            seed: u64, limit in 8..200u32, steps in proptest::collection::vec((any::<bool>(), 0..400u16), 0..800),
        ) {
            let mut table = Table::new(limit, seed);
            let mut model = BTreeMap::new();
            for (inserts, port) in steps {
                match (inserts, model.get(&port).copied()) {
                    (true, None) => {
                        let slot = insert(&mut table, port).expect("none is assured");
                        table.entry_mut(slot).expires_ns = 1;
                        // It may have taken another's place.
                        model.retain(|&port, _| peek(&table, port).is_some());
                        model.insert(port, slot);
                    }
                    (false, Some(slot)) => {
                        table.free(slot);
                        model.remove(&port);
                    }
                    _ => {}
                }
                prop_assert_eq!(table.count() as usize, model.len());
            }
            for port in 0..400 {
                prop_assert_eq!(peek(&table, port), model.get(&port).copied(), "port {}", port);
            }
            // Each bucket knows how many went elsewhere from it.
            let mut away = vec![0; table.buckets.count];
            for &port in model.keys() {
                let ([first, second], tag) = table.places(table.hash(&key(port)));
                let own = places(&table.buckets[first]).contains(&(tag | model[&port] as u32));
                prop_assert!(own || first != second);
                away[first] += u32::from(!own);
            }
            for (bucket, away) in away.into_iter().enumerate() {
                prop_assert_eq!(table.buckets[bucket][AWAY], away, "bucket {}", bucket);
            }
        }
    }

    #[test]
    fn a_bucket_is_one_cache_line() {
        for limit in [8, 1000, 100_000, 1 << 18] {
            let table = Table::new(limit, 1);
            assert_eq!(table.bucket(table.hash(&key(1))).as_ptr() as usize % 64, 0);
        }
    }

    #[test]
    fn ports_that_count_up_have_room_whatever_the_seed() {
        // Half of the places are taken; then four fifths, the most there may be.
        for (limit, most) in [(4096, 0), (3072, 2)] {
            let mut dropped_early = 0;
            for seed in 0..200 {
                let shared = Box::leak(Box::new(SharedSeed::from_u64(seed)));
                let mut table = Table::with_hasher(limit, SeedableRandomState::with_seed(seed, shared));
                for port in 0..limit as u16 {
                    let slot = insert(&mut table, 1024 + port).expect("none is assured");
                    table.entry_mut(slot).expires_ns = 1;
                }
                assert_eq!(u64::from(table.count()) + table.dropped_early, limit.into(), "seed {seed}");
                dropped_early += table.dropped_early;
            }
            assert!(dropped_early <= most, "{dropped_early} of {}", 200 * limit);
        }
    }
}
