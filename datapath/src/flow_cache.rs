//! What the switch decided for the last pairs of stations: one per guest transmitq and underlay, so that whoever fills one
//! with invented addresses fills his own.
//!
//! A direct-mapped table keyed by the first 12 bytes of a frame. An entry holds as long as nothing changed that the
//! decision was made from: its `epoch` is the FDB's for the network, which rises with every address that comes, moves or goes
//! there and with every new snapshot, and its `until_ns` is when the FDB wants to be asked again (an address grows old, or has to be
//! refreshed). So a hit answers what the FDB would answer, without two hash look-ups. Only known unicast is kept.

use std::hash::BuildHasher;

use foldhash::quality::SeedableRandomState;

use crate::burst::NextHop;
use crate::snapshot::NetworkId;

/// Entries. 256 of 64 bytes are 16 KiB, of which a guest with few peers touches few.
const ENTRIES: usize = 256;

#[derive(Debug, Clone, Copy)]
struct Entry<T> {
    /// Destination and source address as they lie in the frame.
    stations: (u64, u32),
    network: NetworkId,
    /// What else the decision depends on.
    tag: T,
    epoch: u64,
    until_ns: u64,
    next_hop: NextHop,
}

/// The table. `T` is what frames of one source may differ in beside their stations: nothing for a guest's, the VTEP for
/// an underlay's.
#[derive(Debug)]
pub(crate) struct FlowCache<T> {
    entries: Box<[Entry<T>; ENTRIES]>,
    /// Seeded: which pairs share a place cannot be foreseen.
    hasher: SeedableRandomState,
}

impl<T: Copy + Default + Eq> Default for FlowCache<T> {
    fn default() -> Self {
        Self::new(SeedableRandomState::random())
    }
}

impl<T: Copy + Default + Eq> FlowCache<T> {
    fn new(hasher: SeedableRandomState) -> Self {
        let free = Entry {
            stations: (0, 0),
            network: NetworkId(0),
            tag: T::default(),
            epoch: 0,
            until_ns: 0,
            next_hop: NextHop::Undecided,
        };
        Self { entries: Box::new([free; ENTRIES]), hasher }
    }
}

/// Destination and source address, the key.
#[inline]
pub(crate) fn stations(header: &[u8]) -> (u64, u32) {
    let (low, rest) = header.split_first_chunk().expect("frames shorter than an Ethernet header were dropped");
    let high = rest.first_chunk().expect("frames shorter than an Ethernet header were dropped");
    (u64::from_ne_bytes(*low), u32::from_ne_bytes(*high))
}

impl<T: Copy + Eq> FlowCache<T> {
    #[inline]
    fn place(&self, stations: (u64, u32), network: NetworkId) -> usize {
        let hash = self.hasher.hash_one((stations.0, u64::from(stations.1) | u64::from(network.0) << 32));
        hash as usize % ENTRIES
    }

    /// What was decided for `stations`, if it still holds.
    #[inline]
    pub(crate) fn get(
        &self,
        stations: (u64, u32),
        network: NetworkId,
        tag: T,
        epoch: u64,
        now_ns: u64,
    ) -> Option<NextHop> {
        let entry = &self.entries[self.place(stations, network)];
        let holds = entry.stations == stations
            && entry.network == network
            && entry.epoch == epoch
            && now_ns < entry.until_ns
            && entry.tag == tag;
        holds.then_some(entry.next_hop)
    }

    /// Keeps a decision, in the place of another one.
    pub(crate) fn put(
        &mut self,
        stations: (u64, u32),
        network: NetworkId,
        tag: T,
        epoch: u64,
        until_ns: u64,
        next_hop: NextHop,
    ) {
        self.entries[self.place(stations, network)] = Entry { stations, network, tag, epoch, until_ns, next_hop };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use foldhash::SharedSeed;

    use super::*;
    use crate::snapshot::PortId;

    const NET: NetworkId = NetworkId(4);
    const HOP: NextHop = NextHop::Port(PortId(3));

    #[test]
    fn an_entry_holds_for_its_stations_tag_epoch_and_time() {
        let mut cache = FlowCache::<u8>::default();
        cache.put((1, 2), NET, 7, 5, 100, HOP);
        assert_eq!(cache.get((1, 2), NET, 7, 5, 99), Some(HOP));
        assert_eq!(cache.get((1, 2), NET, 7, 5, 100), None);
        assert_eq!(cache.get((1, 2), NET, 7, 6, 99), None);
        assert_eq!(cache.get((1, 2), NET, 8, 5, 99), None);
        assert_eq!(cache.get((2, 1), NET, 7, 5, 99), None);
        assert_eq!(cache.get((1, 2), NetworkId(5), 7, 5, 99), None);
    }

    #[test]
    fn addresses_that_count_up_spread_whatever_the_seed() {
        let header = |n: u16| {
            let [a, b] = n.to_be_bytes();
            [2, 0, 0, 0, a, b, 2, 0, 0, 0, 0, 1]
        };
        for seed in 0..500 {
            let shared = Box::leak(Box::new(SharedSeed::from_u64(seed)));
            let cache = FlowCache::<u8>::new(SeedableRandomState::with_seed(seed, shared));
            let places: HashSet<_> = (0..256).map(|n| cache.place(stations(&header(n)), NET)).collect();
            // Thrown at random they would take 162, give or take 5.
            assert!(places.len() > 130, "seed {seed}: {}", places.len());
        }
    }
}
