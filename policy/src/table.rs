//! The connection table of one port: fixed size, two choices of a 15-way bucket, seeded hash.
//!
//! A connection is in one of two buckets that its hash names, or nowhere, so every operation is bounded. It is in the first
//! unless that was crowded, and each bucket knows how many of its own went to their second: mostly none, so one cache line says
//! that a connection is new. Buckets say where entries are; entries are taken in order, and again once freed. All is
//! allocated at start and nothing grows, but a page is resident only once a connection has used it, or its owner has it in
//! memory ahead: a table costs what its busiest moment needed. When there is no room, the least useful connection of both
//! buckets goes: expired, then cut by its rules, then closed, then never answered, then closing. An assured connection
//! (answered, and not closing) never goes for another. Owned by a [`crate::Conntrack`].

use std::hash::BuildHasher;
use std::ops::Range;

use foldhash::SharedSeed;
use foldhash::quality::SeedableRandomState;

use crate::buckets::{AWAY, Buckets, SLOT_BITS, TAG, WAYS, places, places_mut, slot_of, ways};
use crate::conn_key::ConnKey;
use crate::entry::{Entry, Tracked};
use crate::model::Direction;
use crate::slab::{Link, Memory, Slab};
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

/// [`ConnKey::addresses`]: half a cache line.
#[derive(Debug)]
#[repr(align(32))]
struct Addresses([u64; 4]);

const _: () = assert!(size_of::<Tracker>() == 64 && size_of::<Addresses>() == 32);

impl Link for Addresses {
    fn link(&self) -> u32 {
        self.0[0] as u32
    }

    fn set_link(&mut self, place: u32) {
        self.0[0] = place.into();
    }
}

/// The table.
#[derive(Debug)]
pub(crate) struct Table {
    hasher: SeedableRandomState,
    buckets: Buckets,
    entries: Slab<Entry>,
    /// Of TCP connections.
    trackers: Slab<Tracker>,
    /// Of IPv6 connections.
    addresses: Slab<Addresses>,
    limit: u32,
    search_at: usize,
    sweep_at: u32,
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
            entries: Slab::new(limit),
            trackers: Slab::new(limit),
            addresses: Slab::new(limit),
            limit,
            search_at: 0,
            sweep_at: 0,
            dropped_early: 0,
            ended: 0,
        }
    }

    /// Addresses of buckets.
    pub(crate) fn index_memory(&self) -> Range<usize> {
        self.buckets.memory()
    }

    /// Of all else, each part of which comes to be used in order.
    #[inline]
    pub(crate) fn memory(&self) -> [Memory; 3] {
        [self.entries.memory(), self.trackers.memory(), self.addresses.memory()]
    }

    pub(crate) fn count(&self) -> u32 {
        self.entries.count()
    }

    /// Those in `count` places from `first` on.
    pub(crate) fn entries_among(&self, first: usize, count: usize) -> impl Iterator<Item = &Entry> {
        self.entries.ever_taken().iter().skip(first).take(count).filter(|entry| entry.is_taken())
    }

    /// Places that were ever taken.
    pub(crate) fn places_used(&self) -> usize {
        self.entries.ever_taken().len()
    }

    #[inline]
    pub(crate) fn entry(&self, slot: u32) -> &Entry {
        &self.entries[slot]
    }

    #[inline]
    pub(crate) fn entry_mut(&mut self, slot: u32) -> &mut Entry {
        &mut self.entries[slot]
    }

    /// An entry, and what is tracked of it if it is TCP.
    #[inline]
    pub(crate) fn tracked_mut(&mut self, slot: u32) -> (&mut Entry, Option<&mut Tracker>) {
        let entry = &mut self.entries[slot];
        let tracker = match entry.tracked {
            Tracked::Tcp { tracker } => Some(&mut self.trackers[tracker]),
            _ => None,
        };
        (entry, tracker)
    }

    /// What is tracked of an entry if it is TCP.
    pub(crate) fn tracker(&self, entry: &Entry) -> Option<&Tracker> {
        match entry.tracked {
            Tracked::Tcp { tracker } => Some(&self.trackers[tracker]),
            _ => None,
        }
    }

    /// Has a new entry tracked as TCP.
    pub(crate) fn track_tcp(&mut self, slot: u32, tracker: Tracker) {
        let entry = &mut self.entries[slot];
        entry.tcp = tracker.state();
        entry.tracked = Tracked::Tcp { tracker: self.trackers.take(|_| tracker) };
    }

    /// What an entry was found by.
    pub(crate) fn key(&self, entry: &Entry) -> ConnKey {
        let addresses = match ConnKey::is_ipv6(entry.rest) {
            false => [entry.addresses, 0, 0, 0],
            true => self.addresses[entry.addresses as u32].0,
        };
        ConnKey::from_parts(addresses, entry.rest)
    }

    #[inline]
    fn is(&self, entry: &Entry, key: &ConnKey) -> bool {
        entry.rest == key.rest()
            && match ConnKey::is_ipv6(entry.rest) {
                false => entry.addresses == key.addresses()[0],
                true => self.addresses[entry.addresses as u32].0 == *key.addresses(),
            }
    }

    /// The slot, if that reference is still to the same connection.
    #[inline]
    pub(crate) fn resolve(&self, slot: u32, generation: u32) -> Option<u32> {
        let entry = self.entries.ever_taken().get(slot as usize)?;
        (entry.generation == generation).then_some(slot)
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
    pub(crate) fn find(&mut self, key: &ConnKey, hash: u64, now_ns: u64) -> Option<u32> {
        let slot = self.peek(key, hash)?;
        if self.entries[slot].expires_ns <= now_ns {
            self.free(slot);
            return None;
        }
        Some(slot)
    }

    /// As [`Self::find`], expired or not.
    #[inline]
    pub(crate) fn peek(&self, key: &ConnKey, hash: u64) -> Option<u32> {
        let ([first, second], tag) = self.places(hash);
        let found = self.search(first, tag, key);
        if found.is_some() || self.buckets[first][AWAY] == 0 {
            return found;
        }
        self.search(second, tag, key)
    }

    #[inline]
    fn search(&self, bucket: usize, tag: u32, key: &ConnKey) -> Option<u32> {
        let bucket = &self.buckets[bucket];
        let mut likely = ways(bucket, TAG, tag);
        while likely != 0 {
            let slot = slot_of(bucket[likely.trailing_zeros() as usize]);
            if self.is(&self.entries[slot], key) {
                return Some(slot);
            }
            likely &= likely - 1;
        }
        None
    }

    /// Takes a slot for a connection that is not in the table. `None`: there is no room, and nobody less useful.
    pub(crate) fn insert(&mut self, key: ConnKey, hash: u64, now_ns: u64) -> Option<u32> {
        let (buckets, tag) = self.places(hash);
        let (choice, way) = self.room(buckets, now_ns)?;
        if self.count() >= self.limit {
            self.make_room(now_ns)?;
        }
        let addresses = match ConnKey::is_ipv6(key.rest()) {
            false => key.addresses()[0],
            true => self.addresses.take(|_| Addresses(*key.addresses())).into(),
        };
        let slot = self.entries.take(|last| Entry {
            addresses,
            rest: key.rest(),
            expires_ns: 0,
            generation: last.map_or(0, |last| last.generation).wrapping_add(1),
            policy_generation: 0,
            rule: u32::MAX,
            identity: 0,
            flags: 0,
            initiator: Direction::Egress,
            tracked: Tracked::Other,
            tcp: TcpState::None,
        });
        self.buckets[buckets[choice]][way] = tag | slot;
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

    fn least_useful(&self, buckets: &[usize], now_ns: u64) -> Option<u32> {
        // All of a bucket before any are compared: then memory is waited for once.
        let worths = |&bucket: &usize| {
            places(&self.buckets[bucket]).map(|place| match place {
                0 => (Entry::KEPT, 0),
                _ => (self.entries[slot_of(place)].worth(now_ns), slot_of(place)),
            })
        };
        let (worth, slot) = buckets.iter().flat_map(worths).min()?;
        (worth != Entry::KEPT).then_some(slot)
    }

    fn drop_early(&mut self, slot: u32, now_ns: u64) {
        if self.entries[slot].expires_ns > now_ns {
            self.dropped_early += 1;
        }
        self.free(slot);
    }

    pub(crate) fn free(&mut self, slot: u32) {
        let entry = self.entries[slot];
        assert!(entry.is_taken(), "slot {slot} is free already");
        let hash = self.hasher.hash_one(self.key(&entry));
        self.entries[slot].generation = entry.generation.wrapping_add(1);
        self.entries.give_back(slot);
        if let Tracked::Tcp { tracker } = entry.tracked {
            self.trackers.give_back(tracker);
        }
        if ConnKey::is_ipv6(entry.rest) {
            self.addresses.give_back(entry.addresses as u32);
        }
        self.ended += 1;
        let ([first, second], tag) = self.places(hash);
        let own = |place: &&mut u32| **place == tag | slot;
        if let Some(place) = places_mut(&mut self.buckets[first]).iter_mut().find(own) {
            *place = 0;
        } else if let Some(place) = places_mut(&mut self.buckets[second]).iter_mut().find(own) {
            *place = 0;
            self.buckets[first][AWAY] -= 1;
        }
    }

    /// Frees what has expired among the next `count` entries.
    pub(crate) fn sweep(&mut self, count: usize, now_ns: u64) {
        let places = self.entries.ever_taken().len();
        for _ in 0..count.min(places) {
            let slot = self.sweep_at;
            self.sweep_at = (slot + 1) % places as u32;
            let entry = &self.entries[slot];
            if entry.is_taken() && entry.expires_ns <= now_ns {
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
    use crate::key::{Family, Key};
    use crate::segment::Segment;

    fn is_tcp(port: u16) -> bool {
        port.is_multiple_of(3)
    }

    fn is_ipv6(port: u16) -> bool {
        port.is_multiple_of(2)
    }

    fn key(port: u16) -> ConnKey {
        let family = if is_ipv6(port) { Family::V6 } else { Family::V4 };
        let (source, destination) = (0x0a00_0001, 0x0a00_0002);
        let key = Key { source, destination, source_port: port, destination_port: 443, protocol: 6, family };
        ConnKey::new(&key, Direction::Egress)
    }

    fn insert(table: &mut Table, port: u16) -> Option<u32> {
        table.insert(key(port), table.hash(&key(port)), 0)
    }

    fn peek(table: &Table, port: u16) -> Option<u32> {
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
                        if is_tcp(port) {
                            let syn = Segment { flags: 2, ..Segment::default() };
                            table.track_tcp(slot, Tracker::begin(&syn, false).expect("a SYN begins a connection"));
                        }
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
                let (tcp, ipv6) = (model.keys().filter(|port| is_tcp(**port)), model.keys().filter(|port| is_ipv6(**port)));
                prop_assert_eq!(table.trackers.count() as usize, tcp.count());
                prop_assert_eq!(table.addresses.count() as usize, ipv6.count());
            }
            for port in 0..400 {
                prop_assert_eq!(peek(&table, port), model.get(&port).copied(), "port {}", port);
                if let Some(&slot) = model.get(&port) {
                    prop_assert_eq!(table.key(table.entry(slot)), key(port));
                    prop_assert_eq!(table.tracker(table.entry(slot)).is_some(), is_tcp(port));
                }
            }
            // Each bucket knows how many went elsewhere from it.
            let mut away = vec![0; table.buckets.count];
            for &port in model.keys() {
                let ([first, second], tag) = table.places(table.hash(&key(port)));
                let own = places(&table.buckets[first]).contains(&(tag | model[&port]));
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
