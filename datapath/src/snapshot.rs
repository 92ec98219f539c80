//! Everything that workers read and never write, replaced as a whole.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use dreamwire_policy::{Classifier, MeterLimits, SourceGuard};

use crate::counters::{NetworkCounters, PortCounters, RuleCounters};
use crate::mac::Mac;
use crate::stage::parse::ETHERNET_BYTES;
use crate::vni::Vni;

/// Index of a port in [`Snapshot::ports`]. Reused only after every worker has adopted a snapshot without it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub u16);

/// Index of a network in [`Snapshot::networks`]; reuse as for [`PortId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkId(pub u16);

/// Index of a worker, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct WorkerId(pub u16);

/// Index of an underlay in a worker's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UnderlayId(pub u16);

/// Ports that one daemon serves at most.
pub const PORTS_MAX: usize = 1024;
/// Networks that one daemon serves at most.
pub const NETWORKS_MAX: usize = 1024;
/// Workers that one daemon has at most: hand-off rings grow with the square.
pub const WORKERS_MAX: usize = 16;
/// Underlays that one daemon has at most.
pub const UNDERLAYS_MAX: usize = 16;
/// Remotes on the flood list of one network at most.
pub const REMOTES_MAX: usize = 256;

/// The datapath's whole configuration, as one worker sees it. Built by the control thread, published to that worker, freed
/// by the control thread once every worker has passed its generation.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Rises by one with every change that was applied.
    pub generation: u64,
    /// By [`PortId`].
    pub ports: Vec<Option<Port>>,
    /// By [`NetworkId`].
    pub networks: Vec<Option<Network>>,
    /// Which network a VNI on an underlay belongs to.
    pub by_vni: HashMap<(UnderlayId, Vni), NetworkId, foldhash::quality::RandomState>,
    /// Whose it is.
    pub worker: WorkerId,
    /// The worker of each underlay, by [`UnderlayId`]; those that are not listed are the first worker's.
    pub uplinks: Vec<WorkerId>,
    /// Changes whenever a classifier does: then every connection is judged again.
    pub policy_generation: u32,
    /// Whether any port has a policy.
    pub has_policies: bool,
    /// By [`RuleId`](dreamwire_policy::RuleId), written by the worker. Rules that are not here are not counted.
    pub rules: Vec<Arc<RuleCounters>>,
}

/// What a port may send and receive, beside its source guard.
#[derive(Debug, Clone)]
pub struct PortPolicy {
    /// Its rules.
    pub classifier: Arc<Classifier>,
    /// By [`Direction`](dreamwire_policy::Direction): packets and bits per second.
    pub meters: [MeterLimits; 2],
}

/// A virtual machine's card.
#[derive(Debug, Clone)]
pub struct Port {
    /// Name in the configuration, for traces.
    pub name: Arc<str>,
    /// The network it is in.
    pub network: NetworkId,
    /// Its own address, if configured.
    pub mac: Option<Mac>,
    /// What the guest may claim to be; `None` where it may claim anything.
    pub guard: Option<SourceGuard>,
    /// What it may send and receive; `None`: everything.
    pub policy: Option<PortPolicy>,
    /// The group that other hosts are told it is in, by tunnels that carry it (VXLAN group policy); 0: none.
    pub group: u16,
    /// Who it is to the ports of this host; `None`: its frames' addresses say so.
    pub identity: Option<u16>,
    /// Queue pairs.
    pub queue_pairs: u16,
    /// The worker that owns its rings.
    pub worker: WorkerId,
    /// Written by the snapshot's worker.
    pub counters: Arc<PortCounters>,
}

/// A layer-2 segment.
#[derive(Debug, Clone)]
pub struct Network {
    /// Name in the configuration.
    pub name: Arc<str>,
    /// What the guests may send: bytes of an Ethernet payload.
    pub mtu: u16,
    /// Its ports; of those, only the snapshot's worker's once it was [divided](Snapshot::divide).
    pub ports: Vec<PortId>,
    /// Those of them that hear frames to stations that nobody knows: unknown unicast is flooded to them alone.
    pub hear_unknown: Vec<PortId>,
    /// Who else gets what is flooded.
    pub beyond: Beyond,
    /// Configured addresses of its ports. They take precedence over anything learned and are never learned elsewhere.
    pub static_macs: HashMap<Mac, PortId, foldhash::quality::RandomState>,
    /// Whether source addresses are learned.
    pub learning: bool,
    /// Seconds after which a learned address that was not seen again is forgotten, in ns.
    pub age_ns: u64,
    /// How the network reaches other hosts, if it does.
    pub tunnel: Option<Tunnel>,
    /// Written by the snapshot's worker.
    pub counters: Arc<NetworkCounters>,
}

/// Other workers that have a part of a network. [`Snapshot::divide`] fills it in.
#[derive(Debug, Clone, Default)]
pub struct Beyond {
    /// For frames to groups: those with a port in the network, or with its underlay.
    pub groups: Vec<WorkerId>,
    /// For frames to stations that nobody knows: those with a port that hears them, or with the underlay.
    pub unknown: Vec<WorkerId>,
}

/// The other hosts of a network.
#[derive(Debug, Clone)]
pub struct Tunnel {
    /// The segment's identifier.
    pub vni: Vni,
    /// Which wire it goes over.
    pub underlay: UnderlayId,
    /// The other VTEPs: the flood list, and the only sources that are believed.
    pub remotes: Vec<IpAddr>,
    /// Whether the sender's group travels with its frames (draft-smith-vxlan-group-policy).
    pub carries_group: bool,
    /// Those of `remotes` that are believed what group a frame is from.
    pub trusted: Vec<IpAddr>,
}

/// Bytes of two VLAN tags, which a frame may have beyond its network's MTU, as on any Ethernet that carries QinQ.
const TAGS_BYTES: u32 = 8;

impl Network {
    /// The longest frame that the network carries.
    #[inline]
    pub fn frame_bytes_max(&self) -> u32 {
        u32::from(self.mtu) + ETHERNET_BYTES as u32 + TAGS_BYTES
    }
}

impl Snapshot {
    /// Leaves in every flood list what [`Snapshot::worker`] reaches itself, and notes who reaches the rest. To be called
    /// once, when everything is in its place. With one worker nothing changes.
    pub fn divide(&mut self) {
        let Self { ports, networks, worker: own, uplinks, .. } = self;
        let owner = |id: PortId| {
            let port = ports.get(usize::from(id.0)).and_then(Option::as_ref);
            port.map_or(*own, |port| port.worker)
        };
        for network in networks.iter_mut().flatten() {
            let tunnel = network.tunnel.as_ref().filter(|tunnel| !tunnel.remotes.is_empty());
            let uplink = tunnel.map(|tunnel| uplink_worker(uplinks, tunnel.underlay));
            let beyond = |list: &[PortId]| {
                let workers: BTreeSet<WorkerId> = list.iter().map(|&id| owner(id)).chain(uplink).collect();
                workers.into_iter().filter(|worker| worker != own).collect()
            };
            network.beyond = Beyond { groups: beyond(&network.ports), unknown: beyond(&network.hear_unknown) };
            network.ports.retain(|&id| owner(id) == *own);
            network.hear_unknown.retain(|&id| owner(id) == *own);
        }
    }

    /// The worker that an underlay belongs to.
    #[inline]
    pub fn uplink_worker(&self, underlay: UnderlayId) -> WorkerId {
        uplink_worker(&self.uplinks, underlay)
    }

    /// The port, unless it was removed.
    #[inline]
    pub fn port(&self, id: PortId) -> Option<&Port> {
        self.ports.get(usize::from(id.0))?.as_ref()
    }

    /// The network, unless it was removed.
    #[inline]
    pub fn network(&self, id: NetworkId) -> Option<&Network> {
        self.networks.get(usize::from(id.0))?.as_ref()
    }
}

fn uplink_worker(uplinks: &[WorkerId], underlay: UnderlayId) -> WorkerId {
    uplinks.get(usize::from(underlay.0)).copied().unwrap_or_default()
}
