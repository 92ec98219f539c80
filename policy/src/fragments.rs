//! Which fragmented datagrams have had their first fragment let through: what the ones behind it are judged by.
//!
//! Fixed size, seeded hash, four ways; the oldest goes. Allocated at start, but written to only by the first fragment. A later fragment passes only if it begins where the first one ended
//! or behind: one that would overlap it could replace the header that was judged (RFC 1858, RFC 3128, RFC 5722). Owned by a
//! [`crate::Conntrack`].

use std::hash::BuildHasher;

use foldhash::SharedSeed;
use foldhash::quality::SeedableRandomState;

use crate::key::{Family, Key};
use crate::model::Direction;

const WAYS: usize = 4;

/// How long receivers wait for the rest: Linux's ipfrag_time.
const LIFETIME_NS: u64 = 30_000_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct DatagramKey {
    source: u128,
    destination: u128,
    id: u32,
    /// RFC 791; not part of it in IPv6 (RFC 8200 §4.5), where it is 0.
    protocol: u8,
    direction: Direction,
}

#[derive(Debug, Clone, Copy)]
struct Datagram {
    key: DatagramKey,
    end_bytes: u16,
    expires_ns: u64,
}

#[derive(Debug)]
pub(crate) struct Fragments {
    hasher: SeedableRandomState,
    /// Empty before the first fragment, then as many as it has room for.
    datagrams: Vec<[Option<Datagram>; WAYS]>,
    buckets: usize,
}

impl Fragments {
    pub(crate) fn new(limit: u32, seed: u64) -> Self {
        let buckets = (limit as usize).div_ceil(WAYS).next_power_of_two();
        Self {
            hasher: SeedableRandomState::with_seed(seed, SharedSeed::global_random()),
            datagrams: Vec::with_capacity(buckets),
            buckets,
        }
    }

    /// The first fragment was let through.
    pub(crate) fn allow(&mut self, key: &Key, id: u32, end_bytes: u16, direction: Direction, now_ns: u64) {
        let key = datagram_key(key, id, direction);
        self.datagrams.resize(self.buckets, [None; WAYS]);
        let index = self.index(&key);
        let bucket = &mut self.datagrams[index];
        let place = bucket.iter().position(|datagram| datagram.is_some_and(|datagram| datagram.key == key));
        let oldest = || {
            let ages = bucket.iter().map(|datagram| datagram.map_or(0, |datagram| datagram.expires_ns));
            ages.enumerate().min_by_key(|&(_, expires_ns)| expires_ns).map_or(0, |(way, _)| way)
        };
        let way = place.unwrap_or_else(oldest);
        let known = place.and_then(|way| bucket[way]).filter(|datagram| datagram.expires_ns > now_ns);
        // A second first fragment: whichever the receiver keeps, nothing may overlap it.
        let end_bytes = known.map_or(end_bytes, |datagram| datagram.end_bytes.max(end_bytes));
        bucket[way] = Some(Datagram { key, end_bytes, expires_ns: now_ns.saturating_add(LIFETIME_NS) });
    }

    /// Whether a later fragment may follow.
    pub(crate) fn follows(&self, key: &Key, id: u32, offset_bytes: u16, direction: Direction, now_ns: u64) -> bool {
        let key = datagram_key(key, id, direction);
        let bucket = self.datagrams.get(self.index(&key));
        bucket
            .into_iter()
            .flatten()
            .flatten()
            .any(|known| known.key == key && known.expires_ns > now_ns && offset_bytes >= known.end_bytes)
    }

    /// Forgets every datagram: the policy has changed.
    pub(crate) fn clear(&mut self) {
        self.datagrams.clear();
    }

    fn index(&self, key: &DatagramKey) -> usize {
        self.hasher.hash_one(key) as usize & (self.buckets - 1)
    }
}

fn datagram_key(key: &Key, id: u32, direction: Direction) -> DatagramKey {
    let protocol = if key.family == Family::V4 { key.protocol } else { 0 };
    DatagramKey { source: key.source, destination: key.destination, id, protocol, direction }
}
