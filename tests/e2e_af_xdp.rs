//! A daemon whose underlay is a network device past the kernel, and the Linux kernel's vxlan device on the other side.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::net::{SocketAddr, UdpSocket};

use common::counters::{assert_conserved, assert_quiet_log, drops, number, wait_drops};
use common::vxlan_peers::{IPV4, IPV6, Underlay, VNI, ip, vxlan};
use common::*;
use dreamwire_bench::front_end::{FrontEnd, Options};
use dreamwire_bench::hostile::attack;
use dreamwire_bench::topology::{
    Daemon, FrameFilter, KernelVxlan, KernelVxlanSpec, Needs, Netns, VXLAN_PORT, VethEnd, available, wait_until,
};

const IN_GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BEHIND: [u8; 6] = [2, 0, 0, 0, 1, 1];

/// The daemon's host and another one, joined by a veth pair; both have it as `eth1`.
struct Hosts {
    underlay: Underlay,
    daemon: Netns,
    peer: Netns,
}

impl Hosts {
    fn join(underlay: Underlay) -> Self {
        let (daemon, peer) = (Netns::new("host").unwrap(), Netns::new("peer").unwrap());
        let long = |address: &str| format!("{address}/{}", underlay.prefix);
        let (here, there) = (long(underlay.daemon), [long(underlay.peers[0]), long(underlay.stranger)]);
        let ends = [
            VethEnd { netns: &daemon, interface: "eth1", addresses: &[&here] },
            VethEnd { netns: &peer, interface: "eth1", addresses: &[&there[0], &there[1]] },
        ];
        Netns::join(ends, 1600).unwrap();
        // A checksum that is left to a device that does not exist would never be computed.
        peer.disable_offloads("eth1").unwrap();
        daemon.disable_offloads("eth1").unwrap();
        Self { underlay, daemon, peer }
    }

    fn config(&self, keys: &str) -> String {
        let text = tunnel_config(self.underlay.daemon, &self.underlay.peers[..1], 1600) + &port(1, "");
        text.replace(
            "name = \"fabric\"\n",
            &format!("name = \"fabric\"\ndriver = \"af_xdp\"\ndevice = \"eth1\"\n{keys}\n"),
        )
    }

    fn device(&self) -> KernelVxlan<'_> {
        let mut spec = KernelVxlanSpec::new(VNI, ip(self.underlay.peers[0]), Some(ip(self.underlay.daemon)));
        spec.mtu = 1508;
        KernelVxlan::new(&self.peer, &spec).unwrap()
    }

    /// Whether a program is on the daemon's device.
    fn has_program(&self) -> bool {
        self.daemon.sh("ip -details link show eth1").unwrap().contains("xdp")
    }

    fn send_datagram(&self, from: &str, datagram: &[u8]) {
        let target = SocketAddr::new(ip(self.underlay.daemon), VXLAN_PORT);
        self.peer.enter(|| UdpSocket::bind((ip(from), 0)).unwrap().send_to(datagram, target).unwrap()).unwrap();
    }
}

fn guest(daemon: &Daemon) -> FrontEnd {
    FrontEnd::connect(&daemon.path("vm1.sock"), Options { ring_size: 256, ..attack::small() }).unwrap()
}

/// Waits for `count` frames from the other host.
fn receive(guest: &mut FrontEnd, count: usize) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let waited = wait_until(LIMIT, "frames", || {
        guest
            .receive_burst(|bytes, _| {
                // The other host's kernel has things to say of its own.
                if bytes[6..12] == BEHIND {
                    frames.push(bytes.to_vec());
                }
            })
            .unwrap();
        frames.len() >= count
    });
    assert!(waited.is_ok(), "{} of {count}", frames.len());
    frames
}

fn sent(guest: &mut FrontEnd, text: &str) {
    let frame = text_frame(BEHIND, IN_GUEST, text);
    assert_eq!(guest.send_burst(&[&frame]).unwrap(), 1);
}

/// Sends until the other host has a frame: it takes the kernel a moment to find its neighbour.
fn wait_reached(guest: &mut FrontEnd, peer: &KernelVxlan<'_>, text: &str) {
    let filter = FrameFilter::any().source(IN_GUEST).bytes_at(14, text.as_bytes());
    wait_until(LIMIT, "the other host to be reached", || {
        sent(guest, text);
        let wait = std::time::Duration::from_millis(100);
        peer.receive(&filter, 1, wait).is_ok_and(|frames| !frames.is_empty())
    })
    .unwrap();
}

fn interoperates(underlay: Underlay) {
    if !available(Needs::Netns) {
        return;
    }
    let hosts = Hosts::join(underlay);
    let peer = hosts.device();
    let daemon = start_daemon("host", &hosts.daemon, &hosts.config(""));
    assert!(hosts.has_program());
    let mut guest = guest(&daemon);
    peer.send(&text_frame(IN_GUEST, BEHIND, "hello")).unwrap();
    receive(&mut guest, 1);
    let before_guest = drops(&daemon).get("ports/vm1/port_down").copied();
    wait_reached(&mut guest, &peer, "hello too");
    // What was sent before the neighbour was known is gone, for that reason alone; what came late is not waited for. The other
    // host's device may have spoken (IPv6) between the opening of the underlay and the network's first snapshot, or the guest's start.
    let early = ["networks/blue/unresolved", "underlays/fabric/unknown_vni", "ports/vm1/port_down"];
    assert!(drops(&daemon).keys().all(|name| early.contains(&name.as_str())), "{:?}", drops(&daemon));
    assert_eq!(drops(&daemon).get("ports/vm1/port_down").copied(), before_guest);
    let _ = peer.receive(&FrameFilter::any().source(IN_GUEST), 10_000, std::time::Duration::from_millis(200));

    let before = drops(&daemon);
    let lengths: Vec<usize> = (60..=1514).collect();
    let frame = |to: [u8; 6], from: [u8; 6], bytes: usize| {
        let mut frame = text_frame(to, from, "");
        frame.resize(bytes, bytes as u8);
        frame
    };
    for chunk in lengths.chunks(CHUNK_FRAMES) {
        let out: Vec<_> = chunk.iter().map(|&bytes| frame(BEHIND, IN_GUEST, bytes)).collect();
        for half in out.chunks(32) {
            let burst: Vec<&[u8]> = half.iter().map(Vec::as_slice).collect();
            let mut next = 0;
            wait_until(LIMIT, "room", || {
                next += guest.send_burst(&burst[next..]).unwrap();
                next == burst.len()
            })
            .unwrap();
        }
        let got = peer.receive(&FrameFilter::any().source(IN_GUEST), out.len(), LIMIT).unwrap();
        assert_eq!(got.into_iter().map(|frame| frame.bytes).collect::<Vec<_>>(), out);
        let back: Vec<_> = chunk.iter().map(|&bytes| frame(IN_GUEST, BEHIND, bytes)).collect();
        back.iter().for_each(|frame| peer.send(frame).unwrap());
        assert_eq!(receive(&mut guest, back.len()), back);
    }
    wait_drops(&daemon, &before, &[]);
    // The host keeps its network on the same device.
    hosts.daemon.sh(&format!("ping -q -c 2 -i 0.1 {}", underlay.peers[0])).unwrap();
    hosts.peer.sh(&format!("ping -q -c 2 -i 0.1 {}", underlay.daemon)).unwrap();

    let to_guest = |text: &str| text_frame(IN_GUEST, BEHIND, text);
    let jumbo = [&to_guest("jumbo")[..], &[0; 1470]].concat();
    for (from, datagram, reason) in [
        (underlay.stranger, vxlan(VNI, &to_guest("stranger")), "networks/blue/unknown_vtep"),
        (underlay.peers[0], vxlan(VNI + 1, &to_guest("other VNI")), "underlays/fabric/unknown_vni"),
        (underlay.peers[0], b"anything but VXLAN".to_vec(), "underlays/fabric/bad_encapsulation"),
        (underlay.peers[0], b"short".to_vec(), "underlays/fabric/bad_encapsulation"),
        (underlay.peers[0], vxlan(VNI, &to_guest("cut")[..13]), "networks/blue/too_short"),
        (underlay.peers[0], vxlan(VNI, &jumbo), "networks/blue/too_long"),
    ] {
        let before = drops(&daemon);
        hosts.send_datagram(from, &datagram);
        wait_drops(&daemon, &before, &[(reason, 1)]);
    }
    assert!(number(&daemon, "networks", "blue", "/tunnel_rx/frames") > lengths.len() as u64);
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

#[test]
fn guest_and_kernel_vxlan_understand_each_other_past_the_kernel_over_ipv4() {
    interoperates(IPV4);
}

#[test]
fn guest_and_kernel_vxlan_understand_each_other_past_the_kernel_over_ipv6() {
    interoperates(IPV6);
}

#[test]
fn a_neighbour_that_changes_its_card_and_a_link_that_comes_back_are_followed() {
    if !available(Needs::Netns) {
        return;
    }
    let hosts = Hosts::join(IPV4);
    let peer = hosts.device();
    let daemon = start_daemon("host", &hosts.daemon, &hosts.config(""));
    let mut guest = guest(&daemon);
    wait_reached(&mut guest, &peer, "first");

    hosts.peer.sh("ip link set eth1 address 02:00:00:00:77:77").unwrap();
    // As any host does with a new card, it makes itself heard.
    hosts.peer.sh(&format!("ping -q -c 1 {}", IPV4.daemon)).unwrap();
    wait_reached(&mut guest, &peer, "another card");
    let wire = hosts.peer.packet_socket("eth1").unwrap();
    sent(&mut guest, "seen on the wire");
    let seen = FrameFilter::any().bytes_at(0, &[2, 0, 0, 0, 0x77, 0x77]).bytes_at(36, &VXLAN_PORT.to_be_bytes());
    assert_eq!(wire.receive(&seen, 1, LIMIT).unwrap().len(), 1);

    hosts.daemon.sh("ip link set eth1 down").unwrap();
    let unresolved = || drops(&daemon).get("networks/blue/unresolved").copied().unwrap_or(0);
    let before = unresolved();
    wait_until(LIMIT, "the next hop to be gone", || {
        sent(&mut guest, "into the void");
        unresolved() > before
    })
    .unwrap();
    hosts.daemon.sh("ip link set eth1 up").unwrap();
    wait_reached(&mut guest, &peer, "up again");
    peer.send(&text_frame(IN_GUEST, BEHIND, "and back")).unwrap();
    receive(&mut guest, 1);
    assert_conserved(&daemon);
}

#[test]
fn no_program_stays_behind_whether_the_underlay_goes_or_the_daemon_is_killed() {
    if !available(Needs::Netns) {
        return;
    }
    let hosts = Hosts::join(IPV4);
    let mut daemon = start_daemon("host", &hosts.daemon, &hosts.config(""));
    assert!(hosts.has_program());
    daemon.kill().unwrap();
    wait_until(LIMIT, "the program to go", || !hosts.has_program()).unwrap();
    let daemon = start_daemon("host", &hosts.daemon, &hosts.config(""));
    assert!(hosts.has_program());
    let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
    std::fs::write(file.path(), LOCAL_NETWORK).unwrap();
    daemon.cli(&["apply", file.path().to_str().unwrap()]).unwrap();
    wait_until(LIMIT, "the program to go", || !hosts.has_program()).unwrap();
}

#[test]
fn what_cannot_be_opened_is_said_and_nothing_is_left_behind() {
    if !available(Needs::Netns) {
        return;
    }
    let hosts = Hosts::join(IPV4);
    let daemon = start_daemon("host", &hosts.daemon, &format!("{DAEMON}{LOCAL_NETWORK}"));
    let refusal = |config: String| {
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        std::fs::write(file.path(), config.replace(DAEMON, "").replace("{run_dir}", "/tmp")).unwrap();
        daemon.cli(&["apply", file.path().to_str().unwrap()]).unwrap_err().to_string()
    };
    let said = refusal(hosts.config("").replace("eth1", "eth7"));
    assert!(said.contains("underlay.fabric.device") && said.contains("no Ethernet device eth7"), "{said}");
    let said = refusal(hosts.config("").replace(IPV4.daemon, "192.0.2.9"));
    assert!(said.contains("192.0.2.9 is no address of this host"), "{said}");
    let said = refusal(hosts.config("queues = 64"));
    assert!(said.contains("fewer queues"), "{said}");
    assert!(!hosts.has_program());
}
