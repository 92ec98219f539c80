//! What the end-to-end tests share: configurations, guests that fit them, frames.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod conversation;
pub(crate) mod counters;
pub(crate) mod documents;
pub(crate) mod front_ends;
pub(crate) mod process;
pub(crate) mod vxlan_peers;

use std::path::Path;
use std::time::Duration;

use dreamwire_bench::topology::{
    BOOT_LIMIT, Daemon, DaemonSpec, Frame, FrameDigest, Guest, GuestSpec, Netns, Nic, Wire, skip,
};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

/// For what takes milliseconds here and may take seconds on a loaded machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);
/// Experimental ethertype (IEEE 802): nobody else sends it.
pub(crate) const ETHER_TYPE: u16 = 0x88b5;
/// Frames sent before they are waited for: few against a ring of 256, so that a guest that is slow just now loses none.
pub(crate) const CHUNK_FRAMES: usize = 64;
/// Time between two probes of a stream.
pub(crate) const PROBE_INTERVAL: Duration = Duration::from_millis(10);

/// The `[daemon]` table, for `DaemonSpec`.
pub(crate) const DAEMON: &str = "[daemon]\nrun_dir = \"{run_dir}\"\n";
/// A network of this host alone.
pub(crate) const LOCAL_NETWORK: &str = "[[network]]\nname = \"blue\"\n";

/// The configuration of a host whose network is local, with ports `vm1` and so on.
pub(crate) fn local_config(ports: &[u8]) -> String {
    let ports: String = ports.iter().map(|&number| port(number, "")).collect();
    format!("{DAEMON}{LOCAL_NETWORK}{ports}")
}

/// Port `vmN` in network blue, listening at `vmN.sock`, with further keys.
pub(crate) fn port(number: u8, keys: &str) -> String {
    format!("[[port]]\nname = \"vm{number}\"\nnetwork = \"blue\"\nsocket = \"{{run_dir}}/vm{number}.sock\"\n{keys}\n")
}

/// Network blue, VNI 100, over an underlay at `local`.
pub(crate) fn tunnel_config(local: &str, remotes: &[&str], underlay_mtu: u32) -> String {
    format!(
        "{DAEMON}[[underlay]]\nname = \"fabric\"\naddress = \"{local}\"\nmtu = {underlay_mtu}\n\
         [[network]]\nname = \"blue\"\nvni = 100\nunderlay = \"fabric\"\nremotes = {remotes:?}\n"
    )
}

/// The first two CPUs that tests may use, for two workers; `None`, with a line that says so, where there is one alone. Panics instead
/// where `DREAMWIRE_E2E=1` says that nothing may be skipped.
pub(crate) fn two_cpus() -> Option<[usize; 2]> {
    let mine = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpus: Vec<_> = (0..CpuSet::count()).filter(|&cpu| mine.is_set(cpu).unwrap()).take(2).collect();
    let found = cpus.try_into().ok();
    if found.is_none() {
        skip("two workers need two CPUs");
    }
    found
}

/// A configuration whose daemon has two workers.
pub(crate) fn with_workers(config: &str, cpus: [usize; 2]) -> String {
    config.replace("[daemon]\n", &format!("[daemon]\nworkers = {cpus:?}\n"))
}

/// Starts a daemon inside a namespace.
pub(crate) fn start_daemon(name: &str, netns: &Netns, config: &str) -> Daemon {
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    Daemon::start(&DaemonSpec { name, binary, netns: Some(netns), config }).unwrap()
}

/// The MAC address of guest `number`.
pub(crate) fn mac(number: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, 0, number]
}

/// The same for people.
pub(crate) fn mac_text(number: u8) -> String {
    format!("52:54:00:00:00:{number:02x}")
}

/// The card of guest `number`: 10.0.0.N and fd00::N.
pub(crate) fn nic(wire: Wire, number: u8) -> Nic {
    Nic::new(wire, &mac_text(number)).address(&format!("10.0.0.{number}/24")).address(&format!("fd00::{number}/64"))
}

/// Guest `vmN` at port `vmN` of a daemon.
pub(crate) fn guest(daemon: &Daemon, number: u8) -> GuestSpec {
    let socket = daemon.path(&format!("vm{number}.sock"));
    GuestSpec::new(&format!("vm{number}")).nic(nic(Wire::VhostUser(socket), number))
}

/// Boots guests side by side and waits for their links.
pub(crate) fn boot<const N: usize>(specs: [GuestSpec; N]) -> [Guest; N] {
    let mut guests = specs.map(|spec| Guest::start(&spec).unwrap());
    for guest in &mut guests {
        guest.wait_ready(BOOT_LIMIT).unwrap();
    }
    for guest in &guests {
        guest.wait_link("eth0", BOOT_LIMIT).unwrap();
    }
    guests
}

/// Pings an address, IPv4 or IPv6; all must come back.
#[track_caller]
pub(crate) fn assert_ping(from: &Guest, target: &str) {
    assert!(from.ping(target, 3).unwrap(), "{} cannot ping {target}", from.name());
}

/// A frame: addresses, then `rest` from the ethertype on.
pub(crate) fn frame(destination: [u8; 6], source: [u8; 6], rest: &[u8]) -> Vec<u8> {
    [&destination[..], &source[..], rest].concat()
}

/// A frame of [`ETHER_TYPE`] with that text, padded to 60 bytes.
pub(crate) fn text_frame(destination: [u8; 6], source: [u8; 6], text: &str) -> Vec<u8> {
    let mut bytes = frame(destination, source, &ETHER_TYPE.to_be_bytes());
    bytes.extend(text.as_bytes());
    bytes.resize(bytes.len().max(60), 0);
    bytes
}

/// A UDP packet over IPv4 between two addresses of 10.0.0.0/24, in its frame; checksum 0.
pub(crate) fn udp_frame(ends: [([u8; 6], u8); 2], source_port: u16, payload: &[u8]) -> Vec<u8> {
    let [(source, from), (destination, to)] = ends;
    let udp_bytes = u16::try_from(8 + payload.len()).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_bytes).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, from, 10, 0, 0, to]);
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&folded.to_be_bytes());
    let mut bytes = frame(destination, source, &[8, 0]);
    bytes.extend(ip);
    bytes.extend(source_port.to_be_bytes());
    bytes.extend(9_u16.to_be_bytes());
    bytes.extend(udp_bytes.to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    bytes
}

/// Frames as they arrived are those that were sent, in that order; says where they differ.
#[track_caller]
pub(crate) fn assert_same_frames(got: &[Frame], sent: &[Vec<u8>]) {
    let digests: Vec<_> = got.iter().map(|frame| FrameDigest::of(&frame.bytes)).collect();
    assert_same_digests(&digests, sent);
}

/// As [`assert_same_frames`].
#[track_caller]
pub(crate) fn assert_same_digests(got: &[FrameDigest], sent: &[Vec<u8>]) {
    let wanted: Vec<_> = sent.iter().map(|frame| FrameDigest::of(frame)).collect();
    let differs = got.iter().zip(&wanted).position(|(got, wanted)| got != wanted);
    let at = differs.unwrap_or(got.len().min(wanted.len()));
    let around = |list: &[FrameDigest]| {
        list.iter().skip(at.saturating_sub(2)).take(8).map(|digest| digest.bytes).collect::<Vec<_>>()
    };
    assert!(
        got == wanted,
        "{} of {} frames came; from number {at} on they differ: lengths {:?} came, {:?} were sent",
        got.len(),
        wanted.len(),
        around(got),
        around(&wanted)
    );
}
