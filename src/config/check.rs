//! What only shows when objects are seen together: names twice, references to nothing, addresses that clash.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::path::Path;

use dreamwire_datapath::underlay::af_xdp::MTU_MAX;

use super::decode::{PLACEHOLDER_ADDRESS, SOCKET_PATH_BYTES_MAX};
use super::document::{Document, Driver, Kind, Network, Underlay, Wire};
use super::fields::{At, Findings};
use super::mistake::Mistake;

/// Files in the run directory that are the daemon's own.
const OWN_FILES: [&str; 3] = ["api.sock", "stats.sock", "lock"];

/// Names in one message at most.
const NAMES_SHOWN_MAX: usize = 16;

/// VXLAN around a frame: Ethernet 14, IPv4 20 or IPv6 40, UDP 8, VXLAN 8 (RFC 7348 §5).
fn overhead_bytes(underlay: &Underlay) -> u32 {
    if underlay.address.is_ipv4() { 50 } else { 70 }
}

pub(super) fn document(document: &Document, findings: &mut Findings) {
    underlays(document, findings);
    networks(document, findings);
    ports(document, findings);
}

fn underlays(document: &Document, findings: &mut Findings) {
    let mut names = Seen::new(Kind::Underlay, "name");
    let mut addresses = Seen::new(Kind::Underlay, "address");
    for (index, underlay) in document.underlay.iter().enumerate() {
        names.once(underlay.name.clone(), index, &underlay.name, findings, |first| {
            format!("the name {:?} is taken{first}; choose another", underlay.name)
        });
        if underlay.address != PLACEHOLDER_ADDRESS {
            addresses.once((underlay.address, underlay.port), index, &underlay.name, findings, |first| {
                format!("{} port {} is another underlay's{first}; give each its own", underlay.address, underlay.port)
            });
        }
        worker(document, underlay.worker, Kind::Underlay, index, &underlay.name, findings);
        if underlay.driver == Driver::AfXdp {
            xdp(document, underlay, index, findings);
        }
        if let Some(wire) = &underlay.wire {
            self::wire(document, underlay, wire, index, findings);
        }
    }
}

/// What a network device needs that is used past the kernel.
fn xdp(document: &Document, underlay: &Underlay, index: usize, findings: &mut Findings) {
    let others = document.underlay.iter().take(index).filter(|other| other.driver == Driver::AfXdp);
    if let Some(other) = others.into_iter().find(|other| other.device.is_some() && other.device == underlay.device) {
        let message = format!("underlay {:?} has that device; one program takes all of its tunnel packets", other.name);
        mistake(findings, Kind::Underlay, index, &underlay.name, "device", message);
    }
    if underlay.mtu > MTU_MAX {
        let message = format!("{}: driver \"af_xdp\" carries packets of up to {MTU_MAX} bytes", underlay.mtu);
        mistake(findings, Kind::Underlay, index, &underlay.name, "mtu", message);
    }
}

/// What a wire that the kernel does not serve needs beyond that.
fn wire(document: &Document, underlay: &Underlay, wire: &Wire, index: usize, findings: &mut Findings) {
    let name = &underlay.name;
    let mut report = |key, message| mistake(findings, Kind::Underlay, index, name, key, message);
    if let Some(message) = bad_socket(document, &wire.socket) {
        report("socket", message);
    }
    let others = document.underlay.iter().take(index).filter_map(|other| Some((&other.name, other.wire.as_ref()?)));
    if let Some((other, _)) = others.into_iter().find(|(_, other)| other.socket == wire.socket) {
        report("socket", format!("{} is underlay {other:?}'s socket; give each its own", wire.socket.display()));
    }
    if let Some(port) = document.port.iter().find(|port| port.socket == wire.socket) {
        report("socket", format!("{} is port {:?}'s socket; give each its own", wire.socket.display(), port.name));
    }
    if underlay.address == PLACEHOLDER_ADDRESS {
        return;
    }
    let addresses = wire.neighbours.iter().map(|neighbour| ("neighbours", neighbour.address));
    for (key, address) in addresses.chain(wire.gateway.map(|gateway| ("gateway", gateway))) {
        if address.is_ipv4() != underlay.address.is_ipv4() {
            report(
                key,
                format!("{address} is of another address family than {}; use one of the same", underlay.address),
            );
        } else if address == underlay.address {
            report(key, format!("{address} is this host's own address"));
        }
    }
    let mut listed = HashSet::new();
    for neighbour in &wire.neighbours {
        if !listed.insert(neighbour.address) {
            report("neighbours", format!("{} is listed twice", neighbour.address));
        }
    }
}

/// Why a path cannot be a vhost-user socket, if so.
fn bad_socket(document: &Document, socket: &Path) -> Option<String> {
    let shown = socket.display();
    if socket.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Some(format!("{shown} is longer than a socket path may be (107 bytes): set a shorter one"));
    }
    let is_own = OWN_FILES.iter().any(|own| document.daemon.run_dir.join(own) == socket);
    is_own.then(|| format!("{shown} is the daemon's own; choose another path"))
}

fn networks(document: &Document, findings: &mut Findings) {
    let mut names = Seen::new(Kind::Network, "name");
    let mut vnis = Seen::new(Kind::Network, "vni");
    let known = Known::new("underlay", document.underlay.iter().map(|known| known.name.as_str()));
    for (index, network) in document.network.iter().enumerate() {
        names.once(network.name.clone(), index, &network.name, findings, |first| {
            format!("the name {:?} is taken{first}; choose another", network.name)
        });
        let Some(underlay_name) = &network.underlay else { continue };
        let Some(underlay) = document.find_underlay(underlay_name) else {
            let message = known.without(underlay_name);
            mistake(findings, Kind::Network, index, &network.name, "underlay", message);
            continue;
        };
        if let Some(vni) = network.vni {
            vnis.once((underlay_name.clone(), vni), index, &network.name, findings, |first| {
                format!("vni {vni} on underlay {underlay_name:?} is another network's{first}; choose another")
            });
        }
        remotes(network, underlay, index, findings);
        let outer = u32::from(network.mtu) + overhead_bytes(underlay);
        if outer > u32::from(underlay.mtu) {
            let fate = match underlay.driver {
                Driver::Socket => "the kernel will fragment outer packets",
                Driver::VhostUser | Driver::AfXdp => "what is too long will be dropped",
            };
            let message = format!(
                "mtu {} and {} bytes of encapsulation exceed underlay {underlay_name:?}'s mtu of {}: {fate}; lower it to {} or raise the underlay's to {outer}",
                network.mtu,
                overhead_bytes(underlay),
                underlay.mtu,
                u32::from(underlay.mtu).saturating_sub(overhead_bytes(underlay)),
            );
            let warning = at(findings, Kind::Network, index, &network.name, "mtu", message);
            findings.warnings.push(warning);
        }
    }
}

fn remotes(network: &Network, underlay: &Underlay, index: usize, findings: &mut Findings) {
    let mut report = |message| mistake(findings, Kind::Network, index, &network.name, "remotes", message);
    let mut listed = HashSet::new();
    for remote in &network.remotes {
        if !listed.insert(remote) {
            report(format!("{remote} is listed twice; every frame would arrive twice"));
        }
        if underlay.address == PLACEHOLDER_ADDRESS {
            continue;
        }
        if remote.is_ipv4() != underlay.address.is_ipv4() {
            report(format!(
                "{remote} is of another address family than underlay {:?} ({}); use one of the same",
                underlay.name, underlay.address
            ));
        } else if *remote == underlay.address {
            report(format!("{remote} is this host's own address; list the other hosts only"));
        }
    }
}

fn ports(document: &Document, findings: &mut Findings) {
    let mut names = Seen::new(Kind::Port, "name");
    let mut sockets = Seen::new(Kind::Port, "socket");
    let mut macs = Seen::new(Kind::Port, "mac");
    let known = Known::new("network", document.network.iter().map(|known| known.name.as_str()));
    for (index, port) in document.port.iter().enumerate() {
        names.once(port.name.clone(), index, &port.name, findings, |first| {
            format!("the name {:?} is taken{first}; choose another", port.name)
        });
        let socket = port.socket.display();
        sockets.once(port.socket.clone(), index, &port.name, findings, |first| {
            format!("{socket} is another port's socket{first}; give each port its own")
        });
        if let Some(message) = bad_socket(document, &port.socket) {
            mistake(findings, Kind::Port, index, &port.name, "socket", message);
        }
        if document.find_network(&port.network).is_none() {
            let message = known.without(&port.network);
            mistake(findings, Kind::Port, index, &port.name, "network", message);
        }
        worker(document, port.worker.unwrap_or(0), Kind::Port, index, &port.name, findings);
        if let Some(mac) = port.mac {
            macs.once((port.network.clone(), mac), index, &port.name, findings, |first| {
                format!("{mac} is another port's in network {:?}{first}; give each its own", port.network)
            });
        }
    }
}

/// Reports a worker that does not exist.
fn worker(document: &Document, worker: u16, kind: Kind, index: usize, name: &str, findings: &mut Findings) {
    let count = document.daemon.worker_count();
    if worker >= count {
        let have = if count == 1 { "there is worker 0 alone".into() } else { format!("there are 0 to {}", count - 1) };
        let message = format!("no worker {worker}: {have}; daemon.workers lists a CPU for each, at the daemon's start");
        mistake(findings, kind, index, name, "worker", message);
    }
}

/// The names of a kind that there are.
pub(super) struct Known<'a> {
    kind: &'static str,
    names: HashSet<&'a str>,
    /// Some of them, in words. Made once: there may be thousands of names, and of mistakes.
    have: String,
}

impl<'a> Known<'a> {
    pub(super) fn new(kind: &'static str, names: impl Iterator<Item = &'a str>) -> Self {
        let names: Vec<_> = names.filter(|name| !name.starts_with('#')).collect();
        let have = match names.len() {
            0 => "there is none".to_owned(),
            count @ ..=NAMES_SHOWN_MAX => format!("there are: {}", names[..count].join(", ")),
            count => format!("there are {count}: {}, ...", names[..NAMES_SHOWN_MAX].join(", ")),
        };
        Self { kind, names: names.into_iter().collect(), have }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// What to say of a name that is not among them.
    pub(super) fn without(&self, name: &str) -> String {
        format!("no {} is called {name:?} ({}); add it or correct the name", self.kind, self.have)
    }
}

pub(super) fn at(
    findings: &Findings,
    kind: Kind,
    index: usize,
    name: &str,
    key: &'static str,
    message: String,
) -> Mistake {
    let line = findings.line(At { kind, index }, Some(key));
    let object =
        if name.starts_with('#') { format!("{}[{index}]", kind.key()) } else { format!("{}.{name}", kind.key()) };
    Mistake { path: format!("{object}.{key}"), line, message }
}

pub(super) fn mistake(
    findings: &mut Findings,
    kind: Kind,
    index: usize,
    name: &str,
    key: &'static str,
    message: String,
) {
    let mistake = at(findings, kind, index, name, key, message);
    findings.mistakes.push(|| mistake);
}

/// Values that may occur once among the objects of a kind.
pub(super) struct Seen<T> {
    kind: Kind,
    key: &'static str,
    first: HashMap<T, usize>,
}

impl<T: Hash + Eq> Seen<T> {
    pub(super) fn new(kind: Kind, key: &'static str) -> Self {
        Self { kind, key, first: HashMap::new() }
    }

    /// Reports `message` if the value was seen before; its argument says where, as in " (line 4)".
    pub(super) fn once(
        &mut self,
        value: T,
        index: usize,
        name: &str,
        findings: &mut Findings,
        message: impl Fn(String) -> String,
    ) {
        let Some(first) = self.first.get(&value).copied() else {
            self.first.insert(value, index);
            return;
        };
        let line = findings.line(At { kind: self.kind, index: first }, Some(self.key));
        let place = line.map(|line| format!(" (line {line})")).unwrap_or_default();
        mistake(findings, self.kind, index, name, self.key, message(place));
    }
}
