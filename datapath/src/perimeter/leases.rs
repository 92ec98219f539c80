//! Flows that may pass without being judged again, for a while: the flow cache of a port with a policy.
//!
//! An entry says where the flow goes and that both perimeters on its way have let it through. It holds as long as nothing
//! was changed that it was made from: its `epoch` is the sum of counters that only rise (of the FDB for the network, which
//! rises with every snapshot too, and of both perimeters' connections), so the sum is the same only if each of them is. And
//! for [`LEASE_NS`](super::LEASE_NS) at most: then tables are asked again, and hear that the flow is alive.
//!
//! Eight places for each key, the first of which is nearly always its own; 64 bytes for IPv4; zeroed pages, so that what is
//! not used costs nothing. Only the port's own guest and those who speak to it fill it.

use std::hash::BuildHasher;

use dreamwire_policy::Connection;
use dreamwire_vhost::memory::{Wish, prefetch};
use foldhash::fast::RandomState;
use zerocopy::{FromZeros, Immutable, KnownLayout};

use super::flow_key::FlowKey;

/// Places of one key.
const WAYS: usize = 8;

/// An entry of all zeros is free.
#[derive(Debug, Clone, Copy, FromZeros, KnownLayout, Immutable)]
#[repr(C, align(64))]
pub(crate) struct Entry<const WORDS: usize> {
    key: FlowKey<WORDS>,
    /// At the sender's and the receiver's perimeter: [`Connection::to_bits`].
    connections: [u64; 2],
    /// Sum of epochs << 16 | hop.
    epoch_hop: u64,
    until_ns: u64,
}

impl<const WORDS: usize> Entry<WORDS> {
    /// Where the flow goes.
    #[inline]
    pub(crate) fn hop(&self) -> u16 {
        self.epoch_hop as u16
    }

    /// What the lease was made from.
    #[inline]
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch_hop >> 16
    }

    /// At the sender's and the receiver's perimeter.
    #[inline]
    pub(crate) fn connections(&self) -> [Option<Connection>; 2] {
        self.connections.map(Connection::from_bits)
    }
}

const _: () = assert!(size_of::<Entry<1>>() == 64 && size_of::<Entry<4>>() == 128);

/// What a flow may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lease {
    /// Where it goes: see [`super::hops::Hops`].
    pub(crate) hop: u16,
    /// At the sender's and the receiver's perimeter.
    pub(crate) connections: [Option<Connection>; 2],
    /// The sum of everything that it was made from: 48 bits, which no worker counts to the end of.
    pub(crate) epoch: u64,
    /// When it ends, ns.
    pub(crate) until_ns: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Leases<const WORDS: usize> {
    entries: Box<[Entry<WORDS>]>,
    /// Seeded: which flows share a place cannot be foreseen.
    hasher: RandomState,
}

impl<const WORDS: usize> Leases<WORDS> {
    /// Room for `flows`, and as much again, so that few find both of their places taken.
    pub(crate) fn new(flows: u32) -> Self {
        let entries = (flows.max(4) as usize * 2).next_power_of_two();
        let entries = <[Entry<WORDS>]>::new_box_zeroed_with_elems(entries).expect("memory for leases");
        Self { entries, hasher: RandomState::default() }
    }

    /// Where a flow's lease should be; asks for its cache line.
    #[inline]
    pub(crate) fn place(&self, key: &FlowKey<WORDS>) -> usize {
        let place = (self.hasher.hash_one(key) >> 16) as usize & (self.entries.len() - 1);
        prefetch(&raw const self.entries[place] as usize, Wish::Read);
        place
    }

    /// All places where it may be, that one first.
    #[inline]
    fn places(&self, place: usize) -> [usize; WAYS] {
        std::array::from_fn(|way| place ^ way)
    }

    /// The lease of a flow, unless its time is over. `place` is its [`Leases::place`]. Whether its epoch is still right is for the
    /// caller to see.
    #[inline(always)]
    pub(crate) fn get(&self, place: usize, key: &FlowKey<WORDS>, now_ns: u64) -> Option<&Entry<WORDS>> {
        let first = &self.entries[place];
        let found = if first.key == *key { first } else { self.find_elsewhere(place, key)? };
        (now_ns < found.until_ns).then_some(found)
    }

    #[cold]
    fn find_elsewhere(&self, place: usize, key: &FlowKey<WORDS>) -> Option<&Entry<WORDS>> {
        self.places(place)[1..].iter().map(|&place| &self.entries[place]).find(|entry| entry.key == *key)
    }

    /// Keeps a lease: in the place of the flow's last one, or of that which ends first.
    pub(crate) fn put(&mut self, key: FlowKey<WORDS>, lease: Lease) {
        let places = self.places(self.place(&key));
        let own = places.into_iter().find(|&place| self.entries[place].key == key);
        // Of those that end at the same time, the first.
        let oldest = || places.into_iter().min_by_key(|&place| self.entries[place].until_ns);
        let Some(place) = own.or_else(oldest) else { return };
        self.entries[place] = Entry {
            key,
            connections: lease.connections.map(|connection| connection.map_or(0, Connection::to_bits)),
            epoch_hop: lease.epoch << 16 | u64::from(lease.hop),
            until_ns: lease.until_ns,
        };
    }

    /// Ends a flow's lease.
    pub(crate) fn end(&mut self, key: &FlowKey<WORDS>) {
        for place in self.places(self.place(key)) {
            if self.entries[place].key == *key {
                self.entries[place].until_ns = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> FlowKey<1> {
        let mut frame = [0; 60];
        frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17]);
        frame[34..36].copy_from_slice(&port.to_be_bytes());
        frame[39] = 26;
        FlowKey::ipv4(&frame, 60).unwrap()
    }

    fn lease(hop: u16, until_ns: u64) -> Lease {
        Lease { hop, connections: [None, Connection::from_bits(7 << 32)], epoch: 3, until_ns }
    }

    fn get(leases: &Leases<1>, port: u16, now_ns: u64) -> Option<Lease> {
        let found = leases.get(leases.place(&key(port)), &key(port), now_ns)?;
        let (hop, connections, epoch) = (found.hop(), found.connections(), found.epoch());
        Some(Lease { hop, connections, epoch, until_ns: found.until_ns })
    }

    #[test]
    fn a_lease_holds_for_its_flow_and_time() {
        let mut leases = Leases::new(64);
        leases.put(key(1), lease(5, 100));
        assert_eq!(get(&leases, 1, 99), Some(lease(5, 100)));
        assert_eq!(get(&leases, 1, 100), None);
        assert_eq!(get(&leases, 2, 99), None);
        leases.put(key(1), lease(6, 200));
        assert_eq!(get(&leases, 1, 150), Some(lease(6, 200)));
        leases.end(&key(1));
        assert_eq!(get(&leases, 1, 0), None);
    }

    #[test]
    fn as_many_flows_as_it_is_made_for_keep_their_leases() {
        let mut leases = Leases::new(4096);
        (0..4096).for_each(|port| leases.put(key(port), lease(port, 100)));
        let kept = (0..4096).filter(|&port| get(&leases, port, 0) == Some(lease(port, 100))).count();
        // By chance nearly all: at most eight in each of 1024 buckets.
        assert!(kept > 4000, "{kept} of 4096");
    }
}
