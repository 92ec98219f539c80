//! A guest and the Linux kernel's vxlan device: the same frames, both directions, IPv4 and IPv6 underlay.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::collections::BTreeSet;

use common::counters::{Drops, assert_conserved, assert_quiet_log, drops, number, wait_drops};
use common::vxlan_peers::{Hosts, IPV4, IPV6, Underlay, VNI, vxlan};
use common::*;
use dreamwire_bench::topology::{Daemon, FrameFilter, FramePattern, Guest, KernelVxlan, Needs, VXLAN_PORT, available};

/// A station behind the guest's card, so that the guest's own traffic is told apart, and one behind each peer.
const IN_GUEST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BEHIND_1: [u8; 6] = [2, 0, 0, 0, 1, 1];
const BEHIND_2: [u8; 6] = [2, 0, 0, 0, 2, 2];
const BROADCAST: [u8; 6] = [0xff; 6];
/// mDNS over IPv6, RFC 6762.
const MULTICAST: [u8; 6] = [0x33, 0x33, 0, 0, 0, 0xfb];
const LONGEST_BYTES: usize = 1514;
const MTU_WITH_TAGS: u32 = 1500 + 8;

#[test]
fn guest_and_kernel_vxlan_understand_each_other_over_ipv4() {
    interoperates(IPV4, "");
}

#[test]
fn guest_and_kernel_vxlan_understand_each_other_over_ipv6() {
    interoperates(IPV6, "");
}

/// The device is the bridge of the daemon's host, which has no XDP of its own: the program runs in the kernel's stack.
const PAST_THE_KERNEL: &str = "driver = \"af_xdp\"\ndevice = \"br0\"\n";

#[test]
fn guest_and_kernel_vxlan_understand_each_other_past_the_kernel_over_ipv4() {
    interoperates(IPV4, PAST_THE_KERNEL);
}

#[test]
fn guest_and_kernel_vxlan_understand_each_other_past_the_kernel_over_ipv6() {
    interoperates(IPV6, PAST_THE_KERNEL);
}

/// One guest with a daemon, two kernels.
struct Scene<'a> {
    underlay: Underlay,
    hosts: &'a Hosts,
    daemon: &'a Daemon,
    guest: &'a Guest,
    peers: &'a [KernelVxlan<'a>; 2],
}

/// `keys` are further ones of the daemon's underlay.
fn interoperates(underlay: Underlay, keys: &str) {
    if !available(Needs::Guests) {
        return;
    }
    let hosts = Hosts::join(underlay);
    let peers = hosts.devices(underlay, MTU_WITH_TAGS, &["10.0.0.101/24", "fd00::101/64"]);
    let config = tunnel_config(underlay.daemon, &underlay.peers, 1600) + &port(1, "");
    let config = config.replace("name = \"fabric\"\n", &format!("name = \"fabric\"\n{keys}"));
    let daemon = start_daemon("host", &hosts.daemon, &config);
    let [guest] = boot([guest(&daemon, 1)]);
    // A card that listens to what is for others too, as a bridge in the guest would have it.
    // Its MTU lets raw frames have two tags; the kernel would allow for one.
    guest.sh(&format!("ip link set eth0 promisc on mtu {MTU_WITH_TAGS}")).unwrap();
    let scene = Scene { underlay, hosts: &hosts, daemon: &daemon, guest: &guest, peers: &peers };
    let before = drops(&daemon);

    assert_ping(&guest, "10.0.0.101");
    assert_ping(&guest, "fd00::101");
    peers[0].netns().sh("ping -q -c 3 -i 0.1 10.0.0.1 && ping -q -c 3 -i 0.1 fd00::1").unwrap();
    scene.the_peers_addresses_are_learned();
    scene.tags_groups_and_all_lengths_pass_unchanged();
    scene.the_outer_source_port_is_the_flows();
    wait_drops(&daemon, &before, &[]);
    scene.strangers_and_rubbish_are_counted_and_go_nowhere();
    scene.nothing_goes_from_tunnel_to_tunnel();
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

impl Scene<'_> {
    fn the_peers_addresses_are_learned(&self) {
        let fdb = self.daemon.cli(&["show", "fdb"]).unwrap();
        let mac = self.peers[0].mac().unwrap();
        let learned = fdb.lines().any(|line| line.contains(&mac) && line.contains(self.underlay.peers[0]));
        assert!(learned, "{mac} is not known behind {}:\n{fdb}", self.underlay.peers[0]);
        let kernel = self.peers[0].fdb().unwrap();
        assert!(kernel.contains(&mac_text(1)) && kernel.contains(self.underlay.daemon), "{kernel}");
    }

    fn tags_groups_and_all_lengths_pass_unchanged(&self) {
        let lengths: Vec<usize> = (60..=LONGEST_BYTES).collect();
        let both = |from: [u8; 6], to: [u8; 6]| {
            let patterns = [
                (to, &ETHER_TYPE.to_be_bytes()[..], &lengths[..]),
                // 802.1Q, and QinQ (802.1ad outside): as much longer as their tags.
                (to, &[0x81, 0, 0x20, 5, 0x88, 0xb5], &[64, 1000, LONGEST_BYTES + 4]),
                (to, &[0x88, 0xa8, 0, 7, 0x81, 0, 0, 5, 0x88, 0xb5], &[68, 1000, LONGEST_BYTES + 8]),
                (BROADCAST, &ETHER_TYPE.to_be_bytes(), &[60, LONGEST_BYTES]),
                (MULTICAST, &ETHER_TYPE.to_be_bytes(), &[60, LONGEST_BYTES]),
            ];
            let chunked = patterns.into_iter().flat_map(|(to, rest, lengths)| {
                lengths.chunks(CHUNK_FRAMES).map(move |lengths| FramePattern::new(&frame(to, from, rest), lengths))
            });
            chunked.collect::<Vec<_>>()
        };

        // The kernel's station speaks first, so that frames to it are not flooded.
        let capture = self.guest.capture("eth0").unwrap();
        self.peers[0].send(&text_frame(IN_GUEST, BEHIND_1, "hello")).unwrap();
        assert_eq!(capture.frames(&FrameFilter::any().source(BEHIND_1), 1, LIMIT).unwrap().len(), 1);

        let counted = |direction: &str| number(self.daemon, "networks", "blue", &format!("/tunnel_{direction}/frames"));
        let before = [counted("tx"), counted("rx")];
        let mut total = 0;
        for pattern in both(IN_GUEST, BEHIND_1) {
            self.guest.send_pattern("eth0", &pattern).unwrap();
            let sent: Vec<_> = pattern.frames().collect();
            let got = self.peers[0].receive(&FrameFilter::any().source(IN_GUEST), sent.len(), LIMIT).unwrap();
            assert_same_frames(&got, &sent);
            total += sent.len() as u64;
        }
        for pattern in both(BEHIND_1, IN_GUEST) {
            let sent: Vec<_> = pattern.frames().collect();
            sent.iter().for_each(|frame| self.peers[0].send(frame).unwrap());
            let got = capture.digests(&FrameFilter::any().source(BEHIND_1), sent.len(), LIMIT).unwrap();
            assert_same_digests(&got, &sent);
        }
        assert!(counted("tx") - before[0] >= total && counted("rx") - before[1] >= total);
    }

    fn the_outer_source_port_is_the_flows(&self) {
        let wire = self.peers[0].netns().packet_socket("eth1").unwrap();
        let udp = if self.underlay.daemon.contains(':') { 14 + 40 } else { 14 + 20 };
        let inner = udp + 8 + 8;
        let ours = FrameFilter::any().bytes_at(udp + 2, &VXLAN_PORT.to_be_bytes()).bytes_at(inner + 42, b"flow");
        let ports_of = |frames: &[Vec<u8>]| {
            self.guest.send_frames("eth0", frames).unwrap();
            let outer = wire.receive(&ours, frames.len(), LIMIT).unwrap();
            assert_eq!(outer.len(), frames.len());
            let port = |frame: &[u8]| u16::from_be_bytes([frame[udp], frame[udp + 1]]);
            outer.iter().map(|frame| port(&frame.bytes)).collect::<BTreeSet<_>>()
        };
        let flow = |number: u16| udp_frame([(mac(1), 1), (BEHIND_1, 101)], 3000 + number, b"flow");
        let one: Vec<_> = (0..16).map(|_| flow(0)).collect();
        assert_eq!(ports_of(&one).len(), 1, "one flow keeps its path");
        let many = ports_of(&(0..64).map(flow).collect::<Vec<_>>());
        // 64 flows over 16 Ki ports: all but a few get one of their own.
        assert!(many.len() > 48, "{many:?}");
        assert!(many.iter().all(|port| *port >= 49152), "RFC 7348, section 5: the dynamic range; {many:?}");
    }

    fn strangers_and_rubbish_are_counted_and_go_nowhere(&self) {
        let to_guest = |text: &str| text_frame(mac(1), BEHIND_1, text);
        let from_peer = self.underlay.peers[0];
        let without_flag = [&[0; 4][..], &(VNI << 8).to_be_bytes(), &to_guest("no I flag")].concat();
        // Too long for the network, and still one packet on the wire.
        let jumbo = [&to_guest("jumbo")[..], &[0; 1466]].concat();
        let cases: [(&str, Vec<u8>, &str); 6] = [
            (self.underlay.stranger, vxlan(VNI, &to_guest("stranger")), "networks/blue/unknown_vtep"),
            (from_peer, vxlan(VNI + 1, &to_guest("other VNI")), "underlays/fabric/unknown_vni"),
            (from_peer, b"anything but VXLAN".to_vec(), "underlays/fabric/bad_encapsulation"),
            (from_peer, without_flag, "underlays/fabric/bad_encapsulation"),
            (from_peer, vxlan(VNI, &to_guest("cut")[..13]), "networks/blue/too_short"),
            (from_peer, vxlan(VNI, &jumbo), "networks/blue/too_long"),
        ];
        let capture = self.guest.capture("eth0").unwrap();
        for (from, datagram, reason) in &cases {
            let before = drops(self.daemon);
            self.hosts.send_datagrams(self.underlay, from, std::slice::from_ref(datagram));
            wait_drops(self.daemon, &before, &[(reason, 1)]);
        }
        // What had come through would have come before this one.
        self.hosts.send_datagrams(self.underlay, from_peer, &[vxlan(VNI, &to_guest("honest"))]);
        let got = capture.frames(&FrameFilter::any().source(BEHIND_1), 1, LIMIT).unwrap();
        assert_same_frames(&got, &[to_guest("honest")]);
        // And the stranger has taught the daemon nothing.
        let fdb = self.daemon.cli(&["show", "fdb"]).unwrap();
        assert!(!fdb.contains(self.underlay.stranger), "{fdb}");
    }

    fn nothing_goes_from_tunnel_to_tunnel(&self) {
        let capture = self.guest.capture("eth0").unwrap();
        let before = drops(self.daemon);
        // The second peer makes itself known; the first one then tries it by name, by an unknown name, and all at once.
        self.peers[1].send(&text_frame(mac(1), BEHIND_2, "here")).unwrap();
        assert_eq!(capture.frames(&FrameFilter::any().source(BEHIND_2), 1, LIMIT).unwrap().len(), 1);
        let unknown = [2, 0, 0, 0, 2, 0x99];
        for destination in [BEHIND_2, unknown, BROADCAST, MULTICAST] {
            self.peers[0].send(&text_frame(destination, BEHIND_1, "tunnel to tunnel")).unwrap();
        }
        // The guest gets what is flooded; what is meant for the other tunnel alone is a counted drop.
        let flooded = capture.frames(&FrameFilter::any().source(BEHIND_1), 3, LIMIT).unwrap();
        let destinations: Vec<_> = flooded.iter().map(|frame| frame.bytes[..6].to_vec()).collect();
        assert_eq!(destinations, [unknown, BROADCAST, MULTICAST]);
        self.wait_only_split_horizon(&before, 1);
        // The guest's own broadcast reaches both; before it nothing of the first peer has come to the second.
        self.guest.send_frames("eth0", &[text_frame(BROADCAST, mac(1), "to all")]).unwrap();
        for peer in self.peers {
            let mut seen = Vec::new();
            while !seen.last().is_some_and(|frame: &Vec<u8>| frame[6..12] == mac(1) && frame[..6] == BROADCAST) {
                let got = peer.receive(&FrameFilter::any().ether_type(ETHER_TYPE), 1, LIMIT).unwrap();
                assert_eq!(got.len(), 1, "the broadcast did not arrive");
                seen.extend(got.into_iter().map(|frame| frame.bytes));
            }
            assert!(seen.iter().all(|frame| frame[6..12] != BEHIND_1 && frame[6..12] != BEHIND_2), "{seen:02x?}");
        }
    }

    fn wait_only_split_horizon(&self, before: &Drops, count: u64) {
        wait_drops(self.daemon, before, &[("networks/blue/split_horizon", count)]);
    }
}
