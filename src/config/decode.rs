//! From the tree to a [`Document`]. What is wrong is noted and replaced by a placeholder, so that everything else is
//! looked at as well and indices stay those of the text.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::card::SWITCHES;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::snapshot::{NETWORKS_MAX, PORTS_MAX, REMOTES_MAX, UNDERLAYS_MAX, WORKERS_MAX};
use dreamwire_datapath::underlay::NEIGHBOURS_MAX;
use dreamwire_datapath::underlay::af_xdp::QUEUES_MAX as XDP_QUEUES_MAX;
use dreamwire_datapath::vni::Vni;
use dreamwire_datapath::vxlan::UDP_PORT;
use dreamwire_datapath::worker::Polling;
use dreamwire_policy::Posture;
use dreamwire_policy::model::{GROUPS_MAX, MEMBERS_MAX, RULES_MAX};

use super::document::{
    Daemon, Document, Driver, Encapsulation, Kind, Mode, Neighbour, Network, Port, Underlay, Wire, polling_word,
};
use super::fields::{At, Fields, Findings, NAME_BYTES_MAX};
use super::mistake::Mistake;
use super::notation::POSTURES;
use super::tree::{Node, Value};
use super::{Context, RUN_DIR_DEFAULT};
use super::{decode_limits, decode_rules};

/// RFC 791: every host must take 68 bytes; 65535 is what a length field can say.
const MTU_RANGE: std::ops::RangeInclusive<i64> = 68..=65535;
/// `sun_path` has 108 bytes with its terminator (unix(7)).
pub(super) const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Queue pairs of a port.
const QUEUES_MAX: i64 = 16;
/// CPU numbers that Linux's affinity masks can name.
const CPU_MAX: i64 = 1023;
/// A second: no idle state takes as long.
const RESUME_LATENCY_US_MAX: i64 = 1_000_000;
/// Linux: IFNAMSIZ with its terminator is 16.
const DEVICE_NAME_BYTES_MAX: usize = 15;
/// Seconds of silence after which an address is forgotten: IEEE 802.1D's default, and a month at most.
const AGE_SECONDS_DEFAULT: u32 = 300;
const AGE_SECONDS_MAX: i64 = 31 * 24 * 3600;
const MTU_DEFAULT: u16 = 1500;

pub(super) fn document(root: &Node, context: Context<'_>) -> (Document, Findings) {
    let mut findings = Findings::default();
    let mut document = Document::default();
    let Value::Table(entries) = &root.value else {
        findings.mistakes.push(|| Mistake::new("", format!("expected an object, found {}", root.value.kind())));
        return (document, findings);
    };
    top_level(entries, &mut findings);

    let daemon = entries.iter().find(|(key, _)| key == "daemon");
    document.daemon = decode_daemon(daemon.map(|(_, node)| node), context, &mut findings);
    let run_dir = document.daemon.run_dir.clone();
    document.underlay =
        objects(entries, Kind::Underlay, UNDERLAYS_MAX, &mut findings, |f| decode_underlay(f, &run_dir));
    document.network = objects(entries, Kind::Network, NETWORKS_MAX, &mut findings, decode_network);
    document.group = objects(entries, Kind::Group, GROUPS_MAX, &mut findings, decode_rules::group);
    document.rule = objects(entries, Kind::Rule, RULES_MAX, &mut findings, decode_rules::rule);
    decode_rules::name_rules(&mut document.rule);
    document.port = objects(entries, Kind::Port, PORTS_MAX, &mut findings, |f| decode_port(f, &run_dir));
    (document, findings)
}

fn top_level(entries: &[(String, Node)], findings: &mut Findings) {
    for (key, node) in entries {
        let message = match key.as_str() {
            "daemon" | "underlay" | "network" | "group" | "rule" | "port" => continue,
            _ => format!("unknown key {key:?}; allowed here: daemon, underlay, network, group, rule, port"),
        };
        findings.mistakes.push(|| Mistake { path: key.clone(), line: node.line, message });
    }
}

/// Reads every table of one kind.
fn objects<T>(
    entries: &[(String, Node)],
    kind: Kind,
    max: usize,
    findings: &mut Findings,
    read: impl Fn(&mut Fields<'_>) -> T,
) -> Vec<T> {
    let Some((_, node)) = entries.iter().find(|(key, _)| key == kind.key()) else {
        return Vec::new();
    };
    let mut complain = |line, message| {
        findings.mistakes.push(|| Mistake { path: kind.key().to_owned(), line, message });
    };
    let Value::List(items) = &node.value else {
        let message = format!("expected a list of tables, each headed [[{}]], found {}", kind.key(), node.value.kind());
        complain(node.line, message);
        return Vec::new();
    };
    if let Some(first_over) = items.get(max) {
        complain(first_over.line, format!("{} objects; one daemon serves {max} at most", items.len()));
    }
    let mut values = Vec::with_capacity(items.len().min(max));
    for (index, item) in items.iter().take(max).enumerate() {
        let table: &[(String, Node)] = match &item.value {
            Value::Table(table) => table,
            other => {
                let message = format!("expected a table, found {}", other.kind());
                findings.mistakes.push(|| Mistake {
                    path: format!("{}[{index}]", kind.key()),
                    line: item.line,
                    message,
                });
                &[]
            }
        };
        let mut fields = Fields::new(At { kind, index }, item.line, table, findings);
        values.push(read(&mut fields));
        fields.finish();
    }
    values
}

fn decode_daemon(node: Option<&Node>, context: Context<'_>, findings: &mut Findings) -> Daemon {
    let (line, entries): (_, &[_]) = match node.map(|node| (node.line, &node.value)) {
        Some((line, Value::Table(entries))) => (line, entries),
        Some((line, other)) => {
            let message = format!("expected a table, found {}", other.kind());
            findings.mistakes.push(|| Mistake { path: "daemon".to_owned(), line, message });
            (line, &[])
        }
        None => (None, &[]),
    };
    let mut fields = Fields::new(At { kind: Kind::Daemon, index: 0 }, line, entries, findings);
    let run_dir = fields.text("run_dir", absolute_path);
    let workers = fields
        .integers("workers", 0..=CPU_MAX)
        .map(|cpus| cpus.into_iter().filter_map(|cpu| usize::try_from(cpu).ok()).collect::<Vec<_>>());
    if let Some(cpus) = &workers {
        let twice = cpus.iter().enumerate().find(|(place, cpu)| cpus[..*place].contains(cpu));
        if cpus.is_empty() {
            fields.mistake(
                "workers",
                "empty: name a CPU for each, as in [1, 2], or remove the key: one that is not pinned",
            );
        } else if cpus.len() > WORKERS_MAX {
            fields.mistake("workers", format!("{} workers; one daemon has {WORKERS_MAX} at most", cpus.len()));
        } else if let Some((_, cpu)) = twice {
            fields.mistake(
                "workers",
                format!("CPU {cpu} is listed twice; two workers on one take turns for milliseconds"),
            );
        }
    }
    let modes = [Polling::Poll, Polling::Adaptive, Polling::Interrupt];
    let polling = fields.word("polling", &modes.map(|mode| (polling_word(mode), mode)), &[]);

    let resume_latency_us = fields
        .integer("resume_latency_us", 0..=RESUME_LATENCY_US_MAX, "microseconds")
        .and_then(|latency| u32::try_from(latency).ok());
    if resume_latency_us.is_some() && workers.is_none() && context.running.is_none() {
        fields.mistake("resume_latency_us", "only for workers that are pinned: add workers = [1]");
    }

    let daemon = if let Some(running) = context.running {
        let fixed = "takes effect at start only; restart the daemon to change it (now:";
        if let Some(path) = run_dir.filter(|path| *path != running.run_dir) {
            let message = format!("{} {fixed} {})", path.display(), running.run_dir.display());
            fields.mistake("run_dir", message);
        }
        if let Some(cpus) = workers.filter(|cpus| *cpus != running.workers) {
            fields.mistake("workers", format!("{cpus:?} {fixed} {:?})", running.workers));
        }
        if let Some(mode) = polling.filter(|mode| *mode != running.polling) {
            let now = polling_word(running.polling);
            fields.mistake("polling", format!("{} {fixed} {now})", polling_word(mode)));
        }
        if let Some(latency) = resume_latency_us.filter(|latency| Some(*latency) != running.resume_latency_us) {
            let now = running.resume_latency_us.map_or("none".to_owned(), |latency| latency.to_string());
            fields.mistake("resume_latency_us", format!("{latency} {fixed} {now})"));
        }
        running.clone()
    } else {
        Daemon {
            run_dir: context.run_dir.map(Path::to_owned).or(run_dir).unwrap_or_else(|| RUN_DIR_DEFAULT.into()),
            workers: workers.unwrap_or_default(),
            polling: polling.unwrap_or_default(),
            resume_latency_us,
        }
    };
    // Both sockets of the daemon itself must fit as well.
    let longest = daemon.run_dir.join("stats.sock");
    if longest.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        let message = format!("{} is longer than a socket path may be (107 bytes); shorten it", longest.display());
        fields.mistake("run_dir", message);
    }
    fields.finish();
    daemon
}

/// Keys of an underlay that only a driver `vhost-user` has.
const WIRE_KEYS: [&str; 5] = ["socket", "mode", "mac", "gateway", "neighbours"];

fn decode_underlay(fields: &mut Fields<'_>, run_dir: &Path) -> Underlay {
    let name = name_of(fields);
    let drivers = [("socket", Driver::Socket), ("af_xdp", Driver::AfXdp), ("vhost-user", Driver::VhostUser)];
    let driver = fields.word("driver", &drivers, &[]).unwrap_or(Driver::Socket);
    let wire = match driver {
        Driver::VhostUser => Some(decode_wire(fields, &name, run_dir)),
        Driver::Socket | Driver::AfXdp => {
            for key in WIRE_KEYS.into_iter().filter(|key| fields.has(key)).collect::<Vec<_>>() {
                fields.not_here(key, "only driver \"vhost-user\" has it: set that driver, or remove it");
            }
            None
        }
    };
    if driver == Driver::VhostUser {
        fields.not_here("device", "driver \"vhost-user\" uses no network device of this host: remove it");
    }
    let queues = match driver {
        Driver::AfXdp => {
            let queues = fields.integer("queues", 1..=i64::from(XDP_QUEUES_MAX), "queues of the device");
            Some(queues.and_then(|queues| u16::try_from(queues).ok()).unwrap_or(1))
        }
        Driver::Socket | Driver::VhostUser => {
            fields.not_here("queues", "only driver \"af_xdp\" has it: set that driver, or remove it");
            None
        }
    };
    let device = match driver {
        Driver::AfXdp => fields.required("device", "\"eth1\"", device_name),
        Driver::Socket => fields.text("device", device_name),
        Driver::VhostUser => None,
    };
    Underlay {
        name,
        driver,
        queues,
        wire,
        address: fields.required("address", "\"192.0.2.1\"", vtep).unwrap_or(PLACEHOLDER_ADDRESS),
        port: fields
            .integer("port", 1..=65535, "UDP port")
            .and_then(|port| u16::try_from(port).ok())
            .unwrap_or(UDP_PORT),
        mtu: mtu(fields),
        device,
        worker: worker(fields).unwrap_or(0),
    }
}

fn decode_wire(fields: &mut Fields<'_>, name: &str, run_dir: &Path) -> Wire {
    let neighbour = |address: &str, mac: &str| Ok(Neighbour { address: vtep(address)?, mac: station(mac)? });
    Wire {
        socket: fields.text("socket", absolute_path).unwrap_or_else(|| run_dir.join(format!("{name}.sock"))),
        mode: mode(fields),
        mac: fields.required("mac", "\"02:00:00:00:00:01\"", station).unwrap_or(Mac([0; 6])),
        gateway: fields.text("gateway", vtep),
        neighbours: fields.pairs("neighbours", ["address", "mac"], NEIGHBOURS_MAX, neighbour),
    }
}

fn mode(fields: &mut Fields<'_>) -> Mode {
    fields.word("mode", &[("server", Mode::Server), ("client", Mode::Client)], &[]).unwrap_or(Mode::Server)
}

fn decode_network(fields: &mut Fields<'_>) -> Network {
    let network = Network {
        name: name_of(fields),
        vni: fields
            .integer("vni", 0..=i64::from(Vni::MAX), "RFC 7348 §5: 24 bits")
            .and_then(|vni| u32::try_from(vni).ok())
            .and_then(Vni::new),
        underlay: fields.text("underlay", |text| Ok(text.to_owned())),
        encapsulation: fields
            .word("encapsulation", &[("vxlan", Encapsulation::Vxlan)], &["geneve"])
            .unwrap_or(Encapsulation::Vxlan),
        mtu: mtu(fields),
        remotes: fields.texts("remotes", REMOTES_MAX, vtep).unwrap_or_default(),
        trusted_remotes: fields.texts("trusted_remotes", REMOTES_MAX, vtep).unwrap_or_default(),
        group_policy: fields.boolean("group_policy").unwrap_or(false),
        policy: fields.word("policy", &POSTURES, &[]).unwrap_or(Posture::Open),
        learning: fields.boolean("learning").unwrap_or(true),
        age_seconds: fields
            .integer("age_seconds", 1..=AGE_SECONDS_MAX, "seconds of silence; a month at most")
            .and_then(|age| u32::try_from(age).ok())
            .unwrap_or(AGE_SECONDS_DEFAULT),
    };
    match (fields.has("vni"), fields.has("underlay")) {
        (true, false) => {
            fields.mistake("vni", "a network with a vni needs an underlay: add underlay = \"NAME\", or remove vni");
        }
        (false, true) => {
            fields.mistake("underlay", "a network with an underlay needs a vni: add vni = 100, or remove underlay");
        }
        (false, false) if !network.remotes.is_empty() => {
            let message = "a network without vni and underlay is local to this host: add both, or remove remotes";
            fields.mistake("remotes", message);
        }
        _ => {}
    }
    network
}

fn decode_port(fields: &mut Fields<'_>, run_dir: &Path) -> Port {
    let name = name_of(fields);
    let port = Port {
        network: fields.text("network", |text| Ok(text.to_owned())).unwrap_or_else(|| "default".to_owned()),
        socket: fields.text("socket", absolute_path).unwrap_or_else(|| run_dir.join(format!("{name}.sock"))),
        mode: mode(fields),
        mac: fields.text("mac", station),
        addresses: fields.texts("addresses", MEMBERS_MAX, guest_address).unwrap_or_default(),
        unknown_unicast: fields.boolean("unknown_unicast"),
        queues: fields
            .integer("queues", 1..=QUEUES_MAX, "queue pairs")
            .and_then(|queues| u16::try_from(queues).ok())
            .unwrap_or(1),
        worker: worker(fields),
        config_space: fields.boolean("config_space").unwrap_or(false),
        switched_off: fields.switches_off("features", &SWITCHES.map(|(switch, _)| switch)),
        groups: fields.texts("groups", GROUPS_MAX, |text| Ok(text.to_owned())).unwrap_or_default(),
        limits: decode_limits::limits(fields),
        name,
    };
    if !port.addresses.is_empty() && !fields.has("mac") {
        fields.mistake("addresses", "the source guard needs the card's address too: add mac = \"52:54:00:00:00:01\"");
    }
    port
}

fn guest_address(text: &str) -> Result<IpAddr, String> {
    let wrong = |why: &str| format!("{text:?} {why}: expected the guest's own address, as in 10.0.0.1 or fd00::1");
    let address: IpAddr = text.parse().map_err(|_| wrong("is not an IP address"))?;
    if address.is_multicast() || address.is_unspecified() {
        return Err(wrong("cannot be a source address"));
    }
    Ok(address)
}

/// Stands for an address that was missing or wrong; the document is refused in any case.
pub(super) const PLACEHOLDER_ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);

/// The name, or one that no object may have, so that nothing refers to it.
pub(super) fn name_of(fields: &mut Fields<'_>) -> String {
    let nameless = format!("#{}", fields.at.index);
    let example = format!("\"{}1\"", fields.at.kind.key());
    fields.required("name", &example, name).unwrap_or(nameless)
}

fn mtu(fields: &mut Fields<'_>) -> u16 {
    fields.integer("mtu", MTU_RANGE, "bytes").and_then(|mtu| u16::try_from(mtu).ok()).unwrap_or(MTU_DEFAULT)
}

/// Place in `daemon.workers`; whether there is one is seen later.
fn worker(fields: &mut Fields<'_>) -> Option<u16> {
    let place = fields.integer("worker", 0..=WORKERS_MAX as i64 - 1, "place in daemon.workers, from 0")?;
    u16::try_from(place).ok()
}

pub(super) fn name(text: &str) -> Result<String, String> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    // "." and ".." would be legal names and no legal parts of a path.
    if (1..=NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(legal) && text.bytes().any(|byte| byte != b'.') {
        return Ok(text.to_owned());
    }
    Err(format!("{text:?} is not a name: 1 to 64 letters, digits, '_', '-', '.', not dots alone"))
}

fn station(text: &str) -> Result<Mac, String> {
    let mac: Mac = text.parse().map_err(|error| format!("{error}"))?;
    if mac.is_station() {
        return Ok(mac);
    }
    let kind = if mac.is_group() { "a multicast address (the lowest bit of the first octet is set)" } else { "zero" };
    Err(format!("{mac} is {kind}: a card needs an address of its own, as in 52:54:00:12:34:56"))
}

fn vtep(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text
        .parse()
        .map_err(|_| format!("{text:?} is not an IP address: expected one like 192.0.2.1 or 2001:db8::1"))?;
    let broadcast = address == IpAddr::V4(std::net::Ipv4Addr::BROADCAST);
    if address.is_unspecified() || address.is_multicast() || broadcast {
        return Err(format!("{address} is no host's address: expected a unicast address, as in 192.0.2.1"));
    }
    match address {
        IpAddr::V6(v6) if v6.is_unicast_link_local() => {
            Err(format!("{address} is link-local, which is not implemented: use a routable address"))
        }
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Err(format!("{address} is an IPv4 address in IPv6 form: write it as IPv4"))
        }
        _ => Ok(address),
    }
}

fn device_name(text: &str) -> Result<String, String> {
    let legal = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    if (1..=DEVICE_NAME_BYTES_MAX).contains(&text.len()) && text.bytes().all(legal) {
        return Ok(text.to_owned());
    }
    Err(format!("{text:?} is not a network device's name (1 to 15 characters): see `ip link`"))
}

fn absolute_path(text: &str) -> Result<PathBuf, String> {
    if text.len() > SOCKET_PATH_BYTES_MAX {
        return Err(format!("{} bytes long; a socket's path has at most {SOCKET_PATH_BYTES_MAX}", text.len()));
    }
    if !text.starts_with('/') || text.ends_with('/') && text.len() > 1 || text.bytes().any(|byte| byte < b' ') {
        return Err(format!("{text:?} is not an absolute path: begin it with '/'"));
    }
    Ok(PathBuf::from(text))
}
