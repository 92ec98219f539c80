//! The switch stage: learns where a frame came from and decides where it goes.

use crate::burst::{Burst, NextHop, Origin};
use crate::drop_reason::DropReason;
use crate::fdb::{Fdb, Learned, Location, refresh_ns};
use crate::flow_cache::{self, FlowCache};
use crate::mac::Mac;
use crate::snapshot::{Network, Snapshot};
use crate::stage::parse;

/// MAC control frames (pause) end at the next station (IEEE 802.3 annex 31B). Other reserved addresses of IEEE 802.1Q
/// table 8-1 pass, as over a wire.
const PAUSE: Mac = Mac([0x01, 0x80, 0xc2, 0x00, 0x00, 0x01]);

/// Sets the next hop of every frame that has none. `tag` gives what `cache` keeps apart beside the stations.
#[inline]
pub(crate) fn switch<T: Copy + Eq>(
    burst: &mut Burst,
    snapshot: &Snapshot,
    fdb: &mut Fdb,
    cache: &mut FlowCache<T>,
    tag: impl Fn(&Burst, usize) -> T,
    now_ns: u64,
) {
    // What the cache has just said.
    let mut last = None;
    for index in 0..burst.length {
        if burst.next_hops[index] != NextHop::Undecided {
            continue;
        }
        let stations = flow_cache::stations(burst.frames[index].headers());
        let (network, tag) = (burst.networks[index], tag(burst, index));
        if let Some((asked, next_hop)) = last
            && asked == (stations, network, tag)
        {
            burst.next_hops[index] = next_hop;
            continue;
        }
        burst.next_hops[index] = match cache.get(stations, network, tag, fdb.epoch(network), now_ns) {
            Some(next_hop) => {
                last = Some(((stations, network, tag), next_hop));
                next_hop
            }
            None => {
                last = None;
                let (next_hop, until_ns) = decide(burst, index, snapshot, fdb, now_ns);
                if matches!(next_hop, NextHop::Port(_) | NextHop::Vtep(_)) && until_ns > now_ns {
                    cache.put(stations, network, tag, fdb.epoch(network), until_ns, next_hop);
                }
                next_hop
            }
        };
    }
}

/// Learns where frame `index` came from and decides where it goes. That holds until the returned time (ns), unless the
/// FDB's epoch rises before.
pub(super) fn decide(burst: &Burst, index: usize, snapshot: &Snapshot, fdb: &mut Fdb, now_ns: u64) -> (NextHop, u64) {
    let header = burst.frames[index].headers();
    let (source, destination) = (parse::source(header), parse::destination(header));
    let (id, origin) = (burst.networks[index], burst.origins[index]);
    let Some(network) = snapshot.network(id) else { return (NextHop::Drop(DropReason::Removed), 0) };
    if !source.is_station() {
        return (NextHop::Drop(DropReason::BadSource), 0);
    }
    if destination == PAUSE {
        return (NextHop::Drop(DropReason::Reserved), 0);
    }
    let mut until_ns = u64::MAX;
    if network.learning && !network.static_macs.contains_key(&source) {
        let location = match origin {
            Origin::Port(port) => Location::Port(port),
            Origin::Vtep(vtep) => Location::Vtep(vtep),
        };
        // One that could not be learned is tried again with each frame, and each time counted.
        until_ns = now_ns + refresh_ns(network.age_ns);
        if fdb.learn(id, source, location, now_ns, network.age_ns) == Learned::Refused {
            network.counters.learn_refused.add(1);
            until_ns = now_ns;
        }
    }
    let known = match network.static_macs.get(&destination) {
        _ if destination.is_group() => None,
        Some(&port) => Some((Location::Port(port), u64::MAX)),
        None => fdb.lookup(id, destination, now_ns),
    };
    let (location, expires_ns) = known.map_or((None, now_ns), |(location, expires_ns)| (Some(location), expires_ns));
    (next_hop(network, origin, location), until_ns.min(expires_ns))
}

/// Where a frame from `origin` goes whose destination is at `location`, if known.
#[inline]
fn next_hop(network: &Network, origin: Origin, location: Option<Location>) -> NextHop {
    match (location, origin) {
        (None, _) => NextHop::Flood,
        (Some(Location::Port(to)), Origin::Port(from)) if to == from => NextHop::Drop(DropReason::Hairpin),
        (Some(Location::Port(to)), _) => NextHop::Port(to),
        // What came from a tunnel never goes back into one: the sender's VTEP has reached all others itself.
        (Some(Location::Vtep(_)), Origin::Vtep(_)) => NextHop::Drop(DropReason::SplitHorizon),
        (Some(Location::Vtep(vtep)), Origin::Port(_)) => {
            if network.tunnel.is_some() {
                NextHop::Vtep(vtep)
            } else {
                NextHop::Flood
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{NetworkId, PortId, Tunnel, UnderlayId};
    use crate::vni::Vni;

    const NET: NetworkId = NetworkId(0);
    const STATIC: Mac = Mac([2, 0, 0, 0, 0, 9]);
    const A: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const B: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn vtep() -> std::net::IpAddr {
        "192.0.2.2".parse().unwrap()
    }

    fn snapshot() -> Snapshot {
        let network = Network {
            name: "blue".into(),
            mtu: 1500,
            ports: vec![PortId(0), PortId(1)],
            hear_unknown: vec![PortId(0), PortId(1)],
            beyond: Default::default(),
            static_macs: [(STATIC, PortId(1))].into_iter().collect(),
            learning: true,
            age_ns: 1000,
            tunnel: Some(Tunnel {
                vni: Vni::new(1).unwrap(),
                underlay: UnderlayId(0),
                remotes: vec![vtep()],
                carries_group: false,
                trusted: vec![],
            }),
            counters: Default::default(),
        };
        Snapshot { networks: vec![Some(network)], ..Snapshot::default() }
    }

    struct Bench {
        snapshot: Snapshot,
        fdb: Fdb,
        cache: FlowCache<Option<Origin>>,
        burst: Burst,
    }

    impl Bench {
        fn new() -> Self {
            Self { snapshot: snapshot(), fdb: Fdb::default(), cache: FlowCache::default(), burst: Burst::default() }
        }

        fn switch(&mut self, origin: Origin, source: Mac, destination: Mac) -> NextHop {
            let frame = &mut self.burst.frames[0];
            frame.header[..6].copy_from_slice(&destination.0);
            frame.header[6..12].copy_from_slice(&source.0);
            (frame.header_bytes, frame.frame_bytes) = (60, 60);
            self.burst.networks[0] = NET;
            self.burst.origins[0] = origin;
            self.burst.next_hops[0] = NextHop::Undecided;
            self.burst.length = 1;
            switch(&mut self.burst, &self.snapshot, &mut self.fdb, &mut self.cache, |_, _| Some(origin), 0);
            self.burst.next_hops[0]
        }
    }

    #[test]
    fn an_unknown_destination_is_flooded_until_it_speaks() {
        let mut bench = Bench::new();
        assert_eq!(bench.switch(Origin::Port(PortId(0)), A, B), NextHop::Flood);
        assert_eq!(bench.switch(Origin::Port(PortId(1)), B, A), NextHop::Port(PortId(0)));
        assert_eq!(bench.switch(Origin::Port(PortId(0)), A, B), NextHop::Port(PortId(1)));
        assert_eq!(bench.switch(Origin::Port(PortId(0)), A, Mac::BROADCAST), NextHop::Flood);
    }

    #[test]
    fn a_remote_station_is_reached_through_its_vtep_but_not_from_a_tunnel() {
        let mut bench = Bench::new();
        assert_eq!(bench.switch(Origin::Vtep(vtep()), A, B), NextHop::Flood);
        assert_eq!(bench.switch(Origin::Port(PortId(0)), B, A), NextHop::Vtep(vtep()));
        let other = "192.0.2.3".parse().unwrap();
        assert_eq!(bench.switch(Origin::Vtep(other), STATIC, A), NextHop::Drop(DropReason::SplitHorizon));
    }

    #[test]
    fn a_configured_address_cannot_be_learned_away() {
        let mut bench = Bench::new();
        assert_eq!(bench.switch(Origin::Port(PortId(0)), STATIC, B), NextHop::Flood);
        assert_eq!(bench.switch(Origin::Vtep(vtep()), STATIC, B), NextHop::Flood);
        assert_eq!(bench.switch(Origin::Port(PortId(0)), A, STATIC), NextHop::Port(PortId(1)));
        assert!(bench.fdb.rows(0).iter().all(|row| row.mac != STATIC));
    }

    #[test]
    fn frames_that_no_switch_forwards_end_here() {
        let mut bench = Bench::new();
        let from = Origin::Port(PortId(0));
        assert_eq!(bench.switch(from, Mac::BROADCAST, B), NextHop::Drop(DropReason::BadSource));
        assert_eq!(bench.switch(from, Mac([0; 6]), B), NextHop::Drop(DropReason::BadSource));
        assert_eq!(bench.switch(from, A, PAUSE), NextHop::Drop(DropReason::Reserved));
        assert_eq!(bench.switch(from, A, A), NextHop::Drop(DropReason::Hairpin));
        let spanning_tree = Mac([0x01, 0x80, 0xc2, 0, 0, 0]);
        assert_eq!(bench.switch(from, A, spanning_tree), NextHop::Flood);
    }
}
