//! Flows that may pass without being judged again, for a while: the flow cache of a port with a policy.
//!
//! An entry says where the flow goes and that both perimeters on its way have let it through. It holds as long as nothing
//! was changed that it was made from: its `epoch` is the sum of counters that only rise (of the FDB for the network, which
//! rises with every snapshot too, and of both perimeters' connections), so the sum is the same only if each of them is. (A
//! port that moves takes its leases along; FDBs of two workers never have the same epoch.) And
//! for [`LEASE_NS`](super::LEASE_NS) at most: then it is renewed, and tables hear that the flow is alive.
//!
//! Eight places for each key, the first of which is nearly always its own; 64 bytes for IPv4; zeroed pages, so that what is
//! not used costs nothing. A bit says of each eight whether any of them was ever taken: flows that never got a lease are told
//! from those by a small table alone, and no page is touched for them. (But in the burst with the first of them, after one in which all flows
//! were known: there nobody looks into the small table.) Only the port's own guest and those who speak to it fill it.

use std::hash::BuildHasher;
use std::ops::Range;

use dreamwire_policy::Connection;
use dreamwire_vhost::memory::{Wish, prefetch};
use foldhash::quality::RandomState;

use super::flow_key::{FlowKey, WORDS4, WORDS6};

/// Places of one key.
const WAYS: usize = 8;

/// Of these, the first ones: where a lease is found in nearly all cases while half of the entries are taken.
const LIKELY: usize = 4;

/// Words of a cache line.
const LINE_WORDS: usize = 8;

/// What an entry says behind its key: the connections at the sender's and the receiver's perimeter
/// ([`Connection::to_bits`]), the sum of epochs << 16 | hop with [`IS_TCP`], and until when (ns).
type Said = [u64; 4];

/// Which bit stands for a place and the others that have the same keys: its word, and the bit in it.
#[inline]
const fn group(place: u32) -> (usize, u64) {
    let group = place as usize / WAYS;
    (group / 64, 1 << (group % 64))
}

/// Beside the hop.
const IS_TCP: u16 = 1 << 15;

/// Where a flow goes, whether it is TCP, and what its lease was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Way(u64);

impl Way {
    /// No lease's: there are not so many hops.
    pub(crate) const NONE: Self = Self(u64::MAX);

    /// Where it leads.
    #[inline]
    pub(crate) fn hop(self) -> u16 {
        self.0 as u16 & !IS_TCP
    }

    #[inline]
    pub(crate) fn is_tcp(self) -> bool {
        self.0 as u16 & IS_TCP != 0
    }

    /// What the lease was made from.
    #[inline]
    pub(crate) fn epoch(self) -> u64 {
        self.0 >> 16
    }
}

/// Until when an entry holds whose lease was ended.
const OVER_NS: u64 = 1;

/// Whether an entry is nobody's, and never was: a lease's time is never 0.
#[inline]
fn is_free(said: &Said) -> bool {
    said[3] == 0
}

/// Where a flow's lease is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// At its first place.
    Here,
    /// That is another's: it may be at one of the others.
    Elsewhere,
    /// It has none.
    Nowhere,
}

/// An entry that holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Held<'a>(&'a Said);

impl Held<'_> {
    #[inline]
    pub(crate) fn way(self) -> Way {
        Way(self.0[2])
    }

    /// When it is to be renewed, ns.
    #[inline]
    pub(crate) fn until_ns(self) -> u64 {
        self.0[3]
    }

    /// At the sender's and the receiver's perimeter.
    #[inline]
    pub(crate) fn connections(self) -> [Option<Connection>; 2] {
        [self.0[0], self.0[1]].map(Connection::from_bits)
    }
}

/// What a flow may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lease {
    /// Where it goes: see [`super::hops::Hops`].
    pub(crate) hop: u16,
    /// Each of its frames moves its connections' state.
    pub(crate) is_tcp: bool,
    /// At the sender's and the receiver's perimeter.
    pub(crate) connections: [Option<Connection>; 2],
    /// The sum of everything that it was made from: 48 bits, which no worker counts to the end of.
    pub(crate) epoch: u64,
    /// When it ends, ns.
    pub(crate) until_ns: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Leases<const WORDS: usize, const STRIDE: usize> {
    /// Entries of `STRIDE` words from `first` on. Plain words: only their zeroed pages come untouched from the
    /// allocator, not those of a type that asks for an alignment.
    words: Box<[u64]>,
    first: usize,
    /// A bit for each [`WAYS`] places that have the same keys.
    ever_taken: Box<[u64]>,
    /// Their number, a power of two.
    count: usize,
    /// Seeded: which flows share a place cannot be foreseen.
    hasher: RandomState,
}

/// Of IPv4 flows.
pub(crate) type Leases4 = Leases<WORDS4, 8>;
/// Of IPv6 flows.
pub(crate) type Leases6 = Leases<WORDS6, 16>;

impl<const WORDS: usize, const STRIDE: usize> Leases<WORDS, STRIDE> {
    /// Room for `flows`, and as much again, so that few find their first place taken.
    pub(crate) fn new(flows: u32) -> Self {
        let entries = (flows.max(4) as usize * 2).next_power_of_two();
        const { assert!(STRIDE == (WORDS + size_of::<Said>() / 8).next_multiple_of(LINE_WORDS)) };
        let ever_taken = vec![0u64; (entries / WAYS).div_ceil(64)].into_boxed_slice();
        let words = vec![0u64; entries * STRIDE + LINE_WORDS].into_boxed_slice();
        // Entries begin where a cache line does.
        let first = (words.as_ptr() as usize / 8).wrapping_neg() % LINE_WORDS;
        Self { words, first, ever_taken, count: entries, hasher: RandomState::default() }
    }

    /// Its addresses.
    pub(crate) fn memory(&self) -> Range<usize> {
        let words = self.words.as_ptr_range();
        words.start as usize..words.end as usize
    }

    /// For look-ups.
    #[inline]
    pub(crate) fn open(&self) -> Opened<'_, WORDS, STRIDE> {
        let (entries, _) = self.words[self.first..].as_chunks();
        Opened { entries: &entries[..self.count], ever_taken: &self.ever_taken, hasher: &self.hasher }
    }

    /// The same, to be written to.
    fn entry_mut(&mut self, place: u32) -> &mut [u64; STRIDE] {
        &mut self.words[self.first..].as_chunks_mut().0[place as usize]
    }

    /// Keeps a lease.
    pub(crate) fn put(&mut self, key: FlowKey<WORDS>, lease: Lease) {
        let place = self.open().place_for(&key);
        let (word, bit) = group(place);
        self.ever_taken[word] |= bit;
        let [egress, ingress] = lease.connections.map(|connection| connection.map_or(0, Connection::to_bits));
        let hop = lease.hop | if lease.is_tcp { IS_TCP } else { 0 };
        let said: Said = [egress, ingress, lease.epoch << 16 | u64::from(hop), lease.until_ns];
        let (words, rest) = self.entry_mut(place).split_at_mut(WORDS);
        words.copy_from_slice(key.words());
        rest[..said.len()].copy_from_slice(&said);
    }

    /// Ends a flow's lease.
    pub(crate) fn end(&mut self, key: &FlowKey<WORDS>) {
        let Some(place) = self.open().place(key) else { return };
        for place in places(place) {
            if key.is(self.open().entry(place).0) {
                let entry = self.entry_mut(place);
                entry.fill(0);
                // Nobody's, but not free: others may have gone elsewhere from here.
                entry[WORDS + 3] = OVER_NS;
            }
        }
    }
}

/// All places where a flow's lease may be, that one first.
#[inline]
fn places(place: u32) -> [u32; WAYS] {
    std::array::from_fn(|way| place ^ way as u32)
}

/// An entry's key, and what it says.
#[inline]
fn parts<const WORDS: usize, const STRIDE: usize>(entry: &[u64; STRIDE]) -> (&[u64; WORDS], &Said) {
    let (key, said) = entry.split_first_chunk().expect("an entry has room for its key");
    (key, said.first_chunk().expect("an entry has room for what it says"))
}

/// A table that is read: what look-ups need of it, at hand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opened<'a, const WORDS: usize, const STRIDE: usize> {
    entries: &'a [[u64; STRIDE]],
    ever_taken: &'a [u64],
    hasher: &'a RandomState,
}

impl<'a, const WORDS: usize, const STRIDE: usize> Opened<'a, WORDS, STRIDE> {
    /// Where a flow's lease should be; asks for its cache line. `None`: it has none.
    #[inline]
    pub(crate) fn place(&self, key: &FlowKey<WORDS>) -> Option<u32> {
        let place = self.first_place(key);
        let was_taken = self.was_taken(place);
        if was_taken {
            self.prefetch(place);
        }
        was_taken.then_some(place)
    }

    /// Whether a place, or another with the same keys, was ever taken.
    #[inline]
    pub(crate) fn was_taken(&self, place: u32) -> bool {
        let (word, bit) = group(place);
        self.ever_taken[word] & bit != 0
    }

    /// Where a lease is looked for first.
    #[inline]
    pub(crate) fn first_place(&self, key: &FlowKey<WORDS>) -> u32 {
        self.first_index(key) as u32
    }

    /// The same, and the compiler sees that there is an entry.
    #[inline]
    fn first_index(&self, key: &FlowKey<WORDS>) -> usize {
        self.hasher.hash_one(key) as usize & (self.entries.len() - 1)
    }

    /// A flow's lease, if it is in its first place or in the second: nearly all of few are.
    #[inline]
    pub(crate) fn held_near(&self, key: &FlowKey<WORDS>) -> Option<Held<'a>> {
        let index = self.first_index(key);
        self.held_by(index, key).or_else(|| self.held_by(index ^ 1, key))
    }

    /// What is held at an entry, if it is this flow's.
    #[inline]
    fn held_by(&self, index: usize, key: &FlowKey<WORDS>) -> Option<Held<'a>> {
        let (own, said) = parts(&self.entries[index]);
        key.is(own).then_some(Held(said))
    }

    /// Whether a flow's lease is at its place.
    #[inline(always)]
    pub(crate) fn look(&self, place: u32, key: &FlowKey<WORDS>) -> Look {
        let (first, said) = self.entry(place);
        if key.is(first) {
            Look::Here
        } else if is_free(said) {
            // Nobody goes elsewhere while the first place is free.
            Look::Nowhere
        } else {
            Look::Elsewhere
        }
    }

    /// Asks for the lines where it is likely to be if its place is another's.
    pub(crate) fn look_elsewhere(&self, place: u32) {
        for next in &places(place)[1..LIKELY] {
            self.prefetch(*next);
        }
    }

    /// Asks for a place's line.
    #[inline]
    pub(crate) fn prefetch(&self, place: u32) {
        prefetch(self.entries.as_ptr().wrapping_add(place as usize) as usize, Wish::Read);
    }

    /// The entry at a place: its key, and what it says.
    #[inline]
    fn entry(&self, place: u32) -> (&'a [u64; WORDS], &'a Said) {
        parts(&self.entries[place as usize])
    }

    fn until_ns(&self, place: u32) -> u64 {
        self.entry(place).1[3]
    }

    /// Where a flow's lease is to be kept: in the first place if that is free or its own; else in that of its last lease, or of the
    /// lease which ends first. (Another one of it may be left where it was: it says what it said, and ends like any.)
    fn place_for(&self, key: &FlowKey<WORDS>) -> u32 {
        let places = places(self.first_place(key));
        if !self.was_taken(places[0]) {
            return places[0];
        }
        let (first, said) = self.entry(places[0]);
        if is_free(said) || key.is(first) {
            return places[0];
        }
        let own = places.into_iter().find(|&place| key.is(self.entry(place).0));
        // Of those that end at the same time, the first.
        own.or_else(|| places.into_iter().min_by_key(|&place| self.until_ns(place))).unwrap_or(places[0])
    }

    /// The lease of a flow, if it has one. Whether its epoch is still right and its time is not over is for the caller to see.
    #[inline]
    pub(crate) fn find(&self, key: &FlowKey<WORDS>) -> Option<Held<'a>> {
        let place = self.place(key)?;
        let place = match self.look(place, key) {
            Look::Here => Some(place),
            Look::Elsewhere => self.find_elsewhere(place, key),
            Look::Nowhere => None,
        };
        place.map(|place| self.held(place))
    }

    /// What is held at a place.
    #[inline(always)]
    pub(crate) fn held(&self, place: u32) -> Held<'a> {
        Held(self.entry(place).1)
    }

    /// Where the lease of a flow is that is not at its first place.
    #[cold]
    pub(crate) fn find_elsewhere(&self, place: u32, key: &FlowKey<WORDS>) -> Option<u32> {
        places(place)[1..].iter().copied().find(|&place| key.is(self.entry(place).0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::huge_pages::{HUGE_BYTES, resident_pages};

    fn key(port: u16) -> FlowKey<WORDS4> {
        let mut frame = [0; 60];
        frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17]);
        frame[34..36].copy_from_slice(&port.to_be_bytes());
        frame[39] = 26;
        FlowKey::ipv4(&frame, 60).unwrap()
    }

    fn lease(hop: u16, until_ns: u64) -> Lease {
        Lease { hop, is_tcp: hop % 2 == 1, connections: [None, Connection::from_bits(7 << 32)], epoch: 3, until_ns }
    }

    fn get(leases: &Leases4, port: u16) -> Option<Lease> {
        let found = leases.open().find(&key(port))?;
        let (way, connections) = (found.way(), found.connections());
        let (hop, is_tcp, epoch) = (way.hop(), way.is_tcp(), way.epoch());
        Some(Lease { hop, is_tcp, connections, epoch, until_ns: found.until_ns() })
    }

    #[test]
    fn a_lease_is_its_flows() {
        let mut leases = Leases4::new(64);
        leases.put(key(1), lease(5, 100));
        assert_eq!(get(&leases, 1), Some(lease(5, 100)));
        assert_eq!(get(&leases, 2), None);
        leases.put(key(1), lease(6, 200));
        assert_eq!(get(&leases, 1), Some(lease(6, 200)));
        leases.end(&key(1));
        assert_eq!(get(&leases, 1), None);
    }

    /// So many that the allocator maps memory for their leases, and does not take what was used before.
    const FLOWS: u32 = 1 << 20;

    /// Of whole huge pages.
    fn touched_pages(memory: Range<usize>) -> usize {
        let huge = memory.start.next_multiple_of(HUGE_BYTES)..memory.end - HUGE_BYTES;
        huge.step_by(HUGE_BYTES).map(resident_pages).sum()
    }

    #[test]
    fn a_table_takes_no_memory_before_it_is_used() {
        let (four, six) = (Leases4::new(FLOWS), Leases6::new(FLOWS));
        assert_eq!([four.memory(), six.memory()].map(touched_pages), [0, 0]);
    }

    #[test]
    fn flows_without_a_lease_touch_no_page() {
        let mut leases = Leases4::new(FLOWS);
        leases.put(key(1), lease(5, 100));
        assert_eq!((2..=u16::MAX).filter(|&port| get(&leases, port).is_some()).count(), 0);
        leases.end(&key(2));
        assert_eq!(get(&leases, 1), Some(lease(5, 100)));
        let touched = touched_pages(leases.memory());
        // Of 32,256 or so; where the system makes all pages huge ones, that of the one lease has 512.
        assert!(touched <= 512, "{touched} pages");
    }

    #[test]
    fn entries_begin_with_a_cache_line() {
        let (four, six) = (Leases4::new(64), Leases6::new(64));
        for (leases, first, stride) in [(&four.words, four.first, 8), (&six.words, six.first, 16)] {
            assert_eq!(&raw const leases[first] as usize % 64, 0);
            assert_eq!((leases.len() - 8) / stride, 128);
        }
    }

    #[test]
    fn as_many_flows_as_it_is_made_for_keep_their_leases() {
        let mut leases = Leases4::new(4096);
        (0..4096).for_each(|port| leases.put(key(port), lease(port, 100)));
        let kept = (0..4096).filter(|&port| get(&leases, port) == Some(lease(port, 100))).count();
        // By chance nearly all: at most eight in each of 1024 buckets.
        assert!(kept > 4000, "{kept} of 4096");
    }
}
