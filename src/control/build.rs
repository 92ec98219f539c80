//! From desired state and live objects to what workers and readers get.

use std::net::IpAddr;
use std::sync::Arc;

use dreamwire_datapath::snapshot::{Beyond, Network, Port, Snapshot, Tunnel, WorkerId};

use super::core::Control;
use super::inventory::{Inventory, NetworkEntry, PortEntry, UnderlayEntry};
use super::totals::Counted;
use crate::config;

const SECOND_NS: u64 = 1_000_000_000;

impl Control {
    /// A worker's snapshot of the current document and generation. Every object of the document is live by now.
    pub(super) fn build_snapshot(&self, worker: WorkerId) -> Snapshot {
        let mut snapshot = Snapshot {
            generation: self.generation,
            worker,
            policy_generation: self.rulebook.generation(),
            rules: self.rulebook.counters(worker),
            ..Snapshot::default()
        };
        for live in self.underlays.values() {
            let index = usize::from(live.id.0);
            snapshot.uplinks.resize(snapshot.uplinks.len().max(index + 1), WorkerId(0));
            snapshot.uplinks[index] = WorkerId(live.bound.worker);
        }
        for network in &self.document.network {
            let live = &self.networks[&network.name];
            if let Some((underlay, vni)) = live.wire {
                snapshot.by_vni.insert((underlay, vni), live.id);
            }
            put(&mut snapshot.networks, live.id.0, self.build_network(network, worker));
        }
        let identities = self.document.identities();
        for port in &self.document.port {
            let live = &self.ports[&port.name];
            let network = self.networks[&port.network].id;
            let built = Port {
                name: port.name.as_str().into(),
                network,
                mac: port.mac,
                guard: port.source_guard(),
                policy: self.port_policy(port),
                group: port.identity(&identities).unwrap_or(0),
                identity: port.identity_without_addresses(&identities),
                queue_pairs: port.queues,
                worker: live.worker,
                counters: live.counters.of(worker),
            };
            snapshot.has_policies |= built.policy.is_some();
            put(&mut snapshot.ports, live.id.0, built);
            let segment = snapshot.networks[usize::from(network.0)].as_mut().expect("every network was put above");
            segment.ports.push(live.id);
            if port.hears_unknown() {
                segment.hear_unknown.push(live.id);
            }
            if let Some(mac) = port.mac {
                segment.static_macs.insert(mac, live.id);
            }
        }
        snapshot.divide();
        snapshot
    }

    fn build_network(&self, network: &config::Network, worker: WorkerId) -> Network {
        let live = &self.networks[&network.name];
        let remotes: Vec<IpAddr> = network.remotes.clone();
        Network {
            name: network.name.as_str().into(),
            mtu: network.mtu,
            ports: Vec::new(),
            hear_unknown: Vec::new(),
            beyond: Beyond::default(),
            static_macs: Default::default(),
            learning: network.learning,
            age_ns: u64::from(network.age_seconds) * SECOND_NS,
            tunnel: live.wire.map(|(underlay, vni)| Tunnel {
                vni,
                underlay,
                remotes,
                carries_group: network.group_policy,
                trusted: network.trusted_remotes.clone(),
            }),
            counters: live.counters.of(worker),
        }
    }

    /// The inventory of the current document.
    pub(super) fn build_inventory(&self, retiring: Vec<Counted>) -> Inventory {
        let ports = self.document.port.iter().map(|port| {
            let live = &self.ports[&port.name];
            let (counters, session) = (live.counters.clone(), Arc::clone(&live.session));
            PortEntry { port: port.clone(), id: live.id, worker: live.worker, counters, session }
        });
        let networks = self.document.network.iter().map(|network| {
            let live = &self.networks[&network.name];
            NetworkEntry { network: network.clone(), id: live.id, counters: live.counters.clone() }
        });
        let underlays = self.document.underlay.iter().map(|underlay| {
            let live = &self.underlays[&underlay.name];
            let session = live.endpoint.as_ref().map(|endpoint| Arc::clone(endpoint.session()));
            UnderlayEntry { underlay: underlay.clone(), id: live.id, counters: Arc::clone(&live.counters), session }
        });
        Inventory {
            generation: self.generation,
            document: Arc::clone(&self.document),
            started: self.started,
            workers: Arc::clone(&self.workers),
            ports: ports.collect(),
            networks: networks.collect(),
            underlays: underlays.collect(),
            retiring,
            retired: self.retired,
            rules: Arc::clone(self.rulebook.index()),
            news: Arc::clone(&self.news),
        }
    }
}

fn put<T>(table: &mut Vec<Option<T>>, index: u16, value: T) {
    let index = usize::from(index);
    if table.len() <= index {
        table.resize_with(index + 1, || None);
    }
    table[index] = Some(value);
}
