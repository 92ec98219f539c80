//! The recall stage: frames of flows that hold a lease are past both perimeters and the switch.

use super::switch::decide;
use crate::burst::{Burst, bits};
use crate::fdb::Fdb;
use crate::perimeter::{Perimeters, Recalled, Stand};
use crate::snapshot::{Port, PortId, Snapshot};

/// Sets the next hop of every frame of port `id` whose flow has a lease; whether all of them are past both perimeters. A
/// lease whose time is over is renewed if the switch decides as before.
#[inline]
pub(crate) fn recall(
    burst: &mut Burst,
    id: PortId,
    port: &Port,
    snapshot: &Snapshot,
    perimeters: &mut Perimeters,
    fdb: &mut Fdb,
) -> bool {
    let mut recalled = Recalled::default();
    if port.policy.is_some() {
        recalled = perimeters.recall(id, burst, fdb.epoch(port.network), snapshot);
        for index in bits(recalled.due) {
            let (next_hop, until_ns) = decide(burst, index, snapshot, fdb, perimeters.now_ns());
            let epoch = fdb.epoch(port.network);
            perimeters.renew(id, burst, index, next_hop, until_ns, epoch, snapshot, &mut recalled);
        }
        if recalled.passed.count_ones() as usize == burst.length {
            return true;
        }
    }
    burst.unask();
    for index in bits(recalled.passed) {
        (burst.egress[index], burst.ingress[index]) = (Stand::LEASED, Stand::LEASED);
    }
    for index in bits(recalled.sent) {
        burst.egress[index] = Stand::LEASED;
    }
    false
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dreamwire_policy::{Classifier, ConntrackLimits, Policy, Posture};

    use super::*;
    use crate::burst::{NextHop, Origin};
    use crate::counters::PortCounters;
    use crate::flow_cache::FlowCache;
    use crate::mac::Mac;
    use crate::perimeter::{Perimeter, PerimeterLimits};
    use crate::snapshot::{Network, NetworkId, PortPolicy, WorkerId};
    use crate::stage::admit::admit;
    use crate::stage::police::police;
    use crate::stage::switch::switch;

    const FROM: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const TO: [Mac; 2] = [Mac([2, 0, 0, 0, 0, 2]), Mac([2, 0, 0, 0, 0, 3])];

    /// A port that may send what it likes, tracked, and two without policy.
    fn snapshot() -> Snapshot {
        let policy = Policy::new(vec![], vec![], vec![]).unwrap();
        let classifier = Arc::new(Classifier::compile(&policy, Posture::Enforced, &[]));
        let port = |policy| {
            let counters = Arc::new(PortCounters::new(1));
            let (name, network, worker) = ("vm".into(), NetworkId(0), WorkerId(0));
            let (mac, guard, group, identity, queue_pairs) = (None, None, 0, None, 1);
            Some(Port { name, network, mac, guard, policy, group, identity, queue_pairs, worker, counters })
        };
        let network = Network {
            name: "blue".into(),
            mtu: 1500,
            ports: vec![PortId(0), PortId(1), PortId(2)],
            hear_unknown: vec![],
            beyond: Default::default(),
            static_macs: [(FROM, PortId(0)), (TO[0], PortId(1)), (TO[1], PortId(2))].into_iter().collect(),
            learning: true,
            age_ns: u64::MAX,
            tunnel: None,
            counters: Default::default(),
        };
        let policed = PortPolicy { classifier, meters: Default::default() };
        Snapshot {
            ports: vec![port(Some(policed)), port(None), port(None)],
            networks: vec![Some(network)],
            has_policies: true,
            ..Snapshot::default()
        }
    }

    fn receiver(source_port: u8) -> usize {
        usize::from(source_port >= 100)
    }

    /// A port's worker without its rings.
    struct Bench {
        snapshot: Snapshot,
        perimeters: Perimeters,
        fdb: Fdb,
        cache: FlowCache<()>,
        burst: Burst,
    }

    impl Bench {
        fn new() -> Self {
            let snapshot = snapshot();
            let mut perimeters = Perimeters::default();
            perimeters.guard(&snapshot, PortId(0), Some(Box::new(Perimeter::new(PerimeterLimits::default(), 7))));
            let (fdb, cache, burst) = (Fdb::default(), FlowCache::default(), Burst::default());
            Self { snapshot, perimeters, fdb, cache, burst }
        }

        /// A burst of UDP frames from these ports, from 100 on to the second receiver; whether leases let all of them pass. What
        /// they do not is judged.
        fn passes(&mut self, source_ports: &[u8]) -> bool {
            let Self { snapshot, perimeters, fdb, cache, burst } = self;
            let port = snapshot.port(PortId(0)).unwrap();
            for (index, &source_port) in source_ports.iter().enumerate() {
                let frame = &mut burst.frames[index];
                frame.header[..6].copy_from_slice(&TO[receiver(source_port)].0);
                frame.header[6..12].copy_from_slice(&FROM.0);
                frame.header[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17]);
                (frame.header[35], frame.header[39]) = (source_port, 26);
                (frame.header_bytes, frame.frame_bytes) = (60, 60);
                (burst.networks[index], burst.origins[index]) = (NetworkId(0), Origin::Port(PortId(0)));
                burst.next_hops[index] = NextHop::Undecided;
            }
            burst.length = source_ports.len();
            burst.are_undecided = true;
            let passes = recall(burst, PortId(0), port, snapshot, perimeters, fdb);
            if !passes {
                let leased: Vec<_> = (0..burst.length).map(|index| burst.egress[index] == Stand::LEASED).collect();
                let decided: Vec<_> =
                    (0..burst.length).map(|index| burst.next_hops[index] != NextHop::Undecided).collect();
                assert_eq!(leased, decided);
                police(burst, PortId(0), port, snapshot, perimeters);
                switch(burst, snapshot, fdb, cache, |_, _| (), 0);
                admit(burst, snapshot, perimeters, fdb);
            }
            let right: Vec<_> =
                source_ports.iter().map(|&port| NextHop::Port(PortId(1 + receiver(port) as u16))).collect();
            assert_eq!(burst.next_hops[..burst.length], right);
            passes
        }
    }

    #[test]
    fn a_flows_second_frame_gets_the_lease_that_its_third_passes_by() {
        let mut bench = Bench::new();
        let passes = [1, 1, 1, 2, 2, 2, 1].map(|source_port| bench.passes(&[source_port]));
        assert_eq!(passes, [false, false, true, false, false, true, true]);
    }

    #[test]
    fn each_frame_of_a_burst_goes_where_its_own_flows_lease_leads() {
        let mut bench = Bench::new();
        // The third passes by the lease that the second got.
        for source_port in [1, 1, 1, 2, 2, 2, 100, 100, 100, 101, 101, 101] {
            bench.passes(&[source_port]);
        }
        assert!(bench.passes(&[1, 2, 100, 101, 1, 100, 2, 101, 101]));
        assert!(bench.passes(&[100, 100, 2]));
        // Those without a lease are in nobody's way.
        assert!(!bench.passes(&[3, 100, 102, 1, 101]));
    }

    #[test]
    fn a_lease_is_nobody_elses_who_shares_its_place() {
        let mut bench = Bench::new();
        let conntrack = ConntrackLimits { connections: 4, ..ConntrackLimits::default() };
        let perimeter = Perimeter::new(PerimeterLimits { conntrack }, 7);
        bench.perimeters.guard(&bench.snapshot, PortId(0), Some(Box::new(perimeter)));
        // The smallest table: of so many flows some would be where that one is.
        for source_port in 2..60 {
            for _ in 0..3 {
                bench.passes(&[1]);
            }
            assert!(bench.passes(&[1]) && !bench.passes(&[source_port]));
        }
    }

    #[test]
    fn each_frame_of_a_burst_passes_by_its_own_flows_lease() {
        let mut bench = Bench::new();
        for source_port in [1, 1, 2, 2] {
            bench.passes(&[source_port]);
        }
        assert!(bench.passes(&[1, 1, 2, 1, 2, 2]));
        // One in the middle of a run has none, and gets it with its second frame.
        assert!(!bench.passes(&[1, 3, 1]));
        assert!(!bench.passes(&[1, 1, 3, 2]));
        assert!(bench.passes(&[3, 1, 1, 3, 3, 2]));
        let all = [1, 2, 3].repeat(10);
        assert!(bench.passes(&all));
        assert!(bench.passes(&[1; dreamwire_vhost::ring::BURST]));
    }
}
