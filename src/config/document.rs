//! Desired state: what the configuration file and the API's JSON say, after validation.

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;

use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::vni::Vni;
use dreamwire_datapath::worker::Polling;
use dreamwire_policy::{Posture, SourceGuard};
use serde::{Serialize, Serializer};

use super::limits::Limits;
use super::notation::posture_word;
use super::rules::{Group, Rule};

/// The kinds of objects in a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The daemon itself; there is one.
    Daemon,
    /// A wire to other hosts.
    Underlay,
    /// A layer-2 segment.
    Network,
    /// Ports and prefixes that rules speak of.
    Group,
    /// What ports in a group may do.
    Rule,
    /// A virtual machine's card.
    Port,
}

impl Kind {
    /// The key in the document, and the singular that people use.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Daemon => "daemon",
            Self::Underlay => "underlay",
            Self::Network => "network",
            Self::Group => "group",
            Self::Rule => "rule",
            Self::Port => "port",
        }
    }
}

/// Everything that the daemon shall do. Validated: whoever holds one need not check again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Document {
    /// What is fixed while the daemon runs.
    pub daemon: Daemon,
    /// In the order of the file.
    pub underlay: Vec<Underlay>,
    /// In the order of the file.
    pub network: Vec<Network>,
    /// In the order of the file.
    pub group: Vec<Group>,
    /// In the order of the file.
    pub rule: Vec<Rule>,
    /// In the order of the file.
    pub port: Vec<Port>,
}

/// Settings that take effect at start only.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Daemon {
    /// Where the sockets are.
    pub run_dir: PathBuf,
    /// CPUs to pin workers to, one each. Empty: one worker, not pinned.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<usize>,
    /// How workers wait.
    #[serde(serialize_with = "polling")]
    pub polling: Polling,
    /// How long the CPUs of workers may take to wake up, µs: see [`crate::resume_latency`]. Only with `workers`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resume_latency_us: Option<u32>,
}

impl Daemon {
    /// How many workers there are.
    pub fn worker_count(&self) -> u16 {
        self.workers.len().max(1) as u16
    }
}

/// A wire to other hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Underlay {
    /// Unique among underlays.
    pub name: String,
    /// How packets leave the host.
    pub driver: Driver,
    /// This host's VTEP address.
    pub address: IpAddr,
    /// UDP port of the tunnels.
    pub port: u16,
    /// Bytes of an IP packet that the wire carries in one piece.
    pub mtu: u16,
    /// Network device to bind to; the driver `af_xdp` always has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The device's queues: what only the driver `af_xdp` has, and always has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// The worker that serves it: place in [`Daemon::workers`].
    pub worker: u16,
    /// What only the driver `vhost-user` has, and always has.
    #[serde(flatten)]
    pub wire: Option<Wire>,
}

/// A wire that is a vhost-user socket, and this host's card on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Wire {
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Who listens on it.
    pub mode: Mode,
    /// This host's card.
    #[serde(serialize_with = "station")]
    pub mac: Mac,
    /// Where packets for everybody but `neighbours` go. `None`: all other hosts are on the wire.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Hosts that need not be asked for their card.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub neighbours: Vec<Neighbour>,
}

/// Another host on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its card.
    #[serde(serialize_with = "station")]
    pub mac: Mac,
}

/// How an underlay sends and receives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// The kernel's UDP sockets.
    Socket,
    /// A card that is served to a vhost-user front-end.
    #[serde(rename = "vhost-user")]
    VhostUser,
    /// A network device, past the kernel.
    #[serde(rename = "af_xdp")]
    AfXdp,
}

/// What goes around a frame on the underlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Encapsulation {
    /// RFC 7348.
    Vxlan,
}

/// A layer-2 segment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Network {
    /// Unique among networks.
    pub name: String,
    /// Its identifier on the underlay. With `underlay`, or neither: then the network is local to this host.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "vni")]
    pub vni: Option<Vni>,
    /// Name of its underlay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub underlay: Option<String>,
    /// How frames travel on the underlay.
    pub encapsulation: Encapsulation,
    /// Bytes of an Ethernet payload that guests may send.
    pub mtu: u16,
    /// The other hosts' VTEPs.
    pub remotes: Vec<IpAddr>,
    /// Those of them that are believed when they say which group a frame comes from.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trusted_remotes: Vec<IpAddr>,
    /// Whether frames say on the underlay which group they come from.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub group_policy: bool,
    /// What happens to what no rule is about.
    #[serde(serialize_with = "posture")]
    pub policy: Posture,
    /// Whether source addresses are learned.
    pub learning: bool,
    /// Seconds after which a learned address that is silent is forgotten.
    pub age_seconds: u32,
}

/// A virtual machine's card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Port {
    /// Unique among ports.
    pub name: String,
    /// Name of its network.
    pub network: String,
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Who listens on it.
    pub mode: Mode,
    /// Its own address: frames to it are never flooded, and it is never learned elsewhere.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "mac")]
    pub mac: Option<Mac>,
    /// The guest's own addresses. If there are any, the source guard holds the guest to them and to `mac`.
    pub addresses: Vec<IpAddr>,
    /// Whether frames to stations that nobody knows are flooded to it; see [`Port::hears_unknown`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unknown_unicast: Option<bool>,
    /// Queue pairs.
    pub queues: u16,
    /// The worker that serves it: place in [`Daemon::workers`]. `None`: stays where it is, at first where the fewest are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker: Option<u16>,
    /// Whether the VMM may ask for the card's configuration space. QEMU has its own and warns; other VMMs need it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub config_space: bool,
    /// Switches of [`crate::card::SWITCHES`] that are off, in that order.
    #[serde(rename = "features", skip_serializing_if = "Vec::is_empty", serialize_with = "switches_off")]
    pub switched_off: Vec<&'static str>,
    /// Names of the groups it is in. The first that has an `id` is the port's identity in tunnel headers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// What it may use up.
    #[serde(flatten)]
    pub limits: Limits,
}

impl Port {
    /// Without the key: a port whose address is configured has no use for other stations' frames. One whose address is
    /// learned has to hear them until it has spoken.
    pub fn hears_unknown(&self) -> bool {
        self.unknown_unicast.unwrap_or(self.mac.is_none())
    }

    /// What names it in tunnel headers: its first group that has an `id`. `identities` are its document's.
    pub fn identity(&self, identities: &HashMap<&str, u16>) -> Option<u16> {
        self.groups.iter().find_map(|group| identities.get(group.as_str()).copied())
    }

    /// What other ports of this host know it by, if not by its addresses: one that has some is held to them.
    pub fn identity_without_addresses(&self, identities: &HashMap<&str, u16>) -> Option<u16> {
        self.identity(identities).filter(|_| self.addresses.is_empty())
    }

    /// A port with addresses is held to them; one without may claim anything.
    pub fn source_guard(&self) -> Option<SourceGuard> {
        let mac = self.mac.filter(|_| !self.addresses.is_empty())?;
        Some(SourceGuard::new(mac.0, self.addresses.iter().copied()))
    }
}

/// Who listens on a port's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The daemon listens, the hypervisor connects.
    Server,
    /// The hypervisor listens, the daemon connects and keeps trying.
    Client,
}

/// The word for a polling mode in documents.
pub const fn polling_word(polling: Polling) -> &'static str {
    match polling {
        Polling::Poll => "poll",
        Polling::Adaptive => "adaptive",
        Polling::Interrupt => "interrupt",
    }
}

impl Document {
    /// The port of that name.
    pub fn find_port(&self, name: &str) -> Option<&Port> {
        self.port.iter().find(|port| port.name == name)
    }

    /// The network of that name.
    pub fn find_network(&self, name: &str) -> Option<&Network> {
        self.network.iter().find(|network| network.name == name)
    }

    /// What names groups in tunnel headers, by their names.
    pub fn identities(&self) -> HashMap<&str, u16> {
        self.group.iter().filter_map(|group| Some((group.name.as_str(), group.id?))).collect()
    }

    /// The underlay of that name.
    pub fn find_underlay(&self, name: &str) -> Option<&Underlay> {
        self.underlay.iter().find(|underlay| underlay.name == name)
    }

    /// As JSON; decoding it again gives the same document.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::to_value(self).expect("a document has string keys and plain values only")
    }
}

fn polling<S: Serializer>(value: &Polling, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(polling_word(*value))
}

fn posture<S: Serializer>(value: &Posture, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(posture_word(*value))
}

fn switches_off<S: Serializer>(off: &[&'static str], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(off.iter().map(|name| (name, false)))
}

fn vni<S: Serializer>(value: &Option<Vni>, serializer: S) -> Result<S::Ok, S::Error> {
    value.map(Vni::get).serialize(serializer)
}

fn station<S: Serializer>(value: &Mac, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn mac<S: Serializer>(value: &Option<Mac>, serializer: S) -> Result<S::Ok, S::Error> {
    value.map(|mac| mac.to_string()).serialize(serializer)
}
