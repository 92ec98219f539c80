//! Groups in the tunnel header, as the kernel's vxlan device has them (`gbp`): a mark that nftables sets there is enforced
//! here, and our group arrives there as a mark.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use common::counters::{Drops, assert_conserved, assert_quiet_log, drops, wait_drops};
use common::vxlan_peers::{Hosts, IPV4, IPV6, Underlay, VNI, ip};
use common::*;
use dreamwire_bench::topology::{ECHO_PORT, KernelVxlan, KernelVxlanSpec, Needs, Netns, available};

/// Identities: what may speak to the guest, something that may not, and the guest itself.
const CLIENTS: u32 = 8;
const OTHERS: u32 = 9;
const WEB: u32 = 7;

const RULES: &str = r#"
[[group]]
name = "clients"
id = 8
[[group]]
name = "others"
id = 9
[[group]]
name = "web"
id = 7
[[rule]]
name = "echo"
group = "web"
direction = "ingress"
allow = "udp"
ports = "7"
from = "group:clients"
"#;

#[test]
fn groups_and_marks_are_the_same_thing_over_ipv4() {
    groups_and_marks_are_the_same_thing(IPV4);
}

#[test]
fn groups_and_marks_are_the_same_thing_over_ipv6() {
    groups_and_marks_are_the_same_thing(IPV6);
}

fn groups_and_marks_are_the_same_thing(underlay: Underlay) {
    if !available(Needs::Guests) {
        return;
    }
    let hosts = Hosts::join(underlay);
    let peers = [0, 1].map(|index| {
        let addresses = [["10.0.0.101/24", "fd00::101/64"], ["10.0.0.102/24", "fd00::102/64"]][index];
        let (local, remote) = (ip(underlay.peers[index]), ip(underlay.daemon));
        let spec = KernelVxlanSpec {
            addresses: &addresses,
            options: &["gbp"],
            ..KernelVxlanSpec::new(VNI, local, Some(remote))
        };
        let peer = KernelVxlan::new(&hosts.peers[index], &spec).unwrap();
        marks_are_counted(peer.netns());
        peer
    });
    let [trusted, untrusted] = [&peers[0], &peers[1]].map(KernelVxlan::netns);
    let network = tunnel_config(underlay.daemon, &underlay.peers, 1600);
    let policy = format!("policy = \"enforced\"\ngroup_policy = true\ntrusted_remotes = [\"{}\"]\n", underlay.peers[0]);
    let keys = format!("mac = \"{}\"\naddresses = [\"10.0.0.1\", \"fd00::1\"]\ngroups = [\"web\"]", mac_text(1));
    let daemon = start_daemon("host", &hosts.daemon, &format!("{network}{policy}{RULES}{}", port(1, &keys)));
    let [guest] = boot([guest(&daemon, 1)]);

    // What the guest begins is answered whatever the mark; it arrives with the guest's own.
    for (peer, address) in [(trusted, ["10.0.0.101", "fd00::101"]), (untrusted, ["10.0.0.102", "fd00::102"])] {
        for address in address {
            assert_ping(&guest, address);
        }
        assert_eq!(packets(peer, "web"), 6, "marked with the guest's group");
        assert_eq!(packets(peer, "other"), 0, "marked with another group, or not at all");
    }

    let denied = |what: &str, netns: &Netns, from: &str| {
        let before = drops(&daemon);
        assert!(!asks(netns, from), "{what}: {from} was answered");
        wait_drops(&daemon, &before, &[("ports/vm1/ingress_denied", 1)]);
    };
    let answered = |what: &str, netns: &Netns, from: &str| {
        let before: Drops = drops(&daemon);
        assert!(asks(netns, from), "{what}: {from} was not answered");
        wait_drops(&daemon, &before, &[]);
    };
    for from in ["10.0.0.101", "fd00::101"] {
        denied("no mark", trusted, from);
        mark(trusted, OTHERS);
        denied("another group's mark", trusted, from);
        mark(trusted, CLIENTS);
        answered("the mark of a group that is allowed", trusted, from);
        mark(trusted, 0);
    }
    assert_eq!(packets(trusted, "web"), 8, "two answers more");
    for from in ["10.0.0.102", "fd00::102"] {
        mark(untrusted, CLIENTS);
        denied("the mark of a host that is not trusted", untrusted, from);
    }

    // The group goes with the station, not with its address: another address, another host.
    trusted.add_addresses(peers[0].interface(), &["10.0.0.111/24"]).unwrap();
    mark(trusted, CLIENTS);
    answered("the same group, another address", trusted, "10.0.0.111");
    let both = format!("trusted_remotes={}", underlay.peers.join(","));
    daemon.cli(&["network", "set", "blue", &both]).unwrap();
    answered("the same group, another host", untrusted, "10.0.0.102");
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

/// Counts packets from the guest by their mark. Neighbour discovery is no packet of anybody's; its number varies.
fn marks_are_counted(netns: &Netns) {
    let rules = format!(
        "table inet gbp {{
            counter web {{ }}
            counter other {{ }}
            chain input {{
                type filter hook input priority 0;
                iifname != \"vxlan{VNI}\" accept
                icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report }} accept
                meta mark {WEB} counter name web accept
                counter name other
            }}
            chain output {{ type route hook output priority 0; }}
        }}"
    );
    netns.run("nft", [&rules]).unwrap();
}

/// What is sent to the guest from now on has this mark.
fn mark(netns: &Netns, mark: u32) {
    let rule = format!("flush chain inet gbp output; add rule inet gbp output oifname vxlan{VNI} meta mark set {mark}");
    netns.run("nft", [&rule]).unwrap();
}

/// How many packets came with that mark.
fn packets(netns: &Netns, counter: &str) -> u64 {
    let said = netns.sh(&format!("nft list counter inet gbp {counter}")).unwrap();
    let mut words = said.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).unwrap().parse().unwrap()
}

/// Whether the guest's echo port answers one datagram, from a port of its own each time: a connection of its own.
fn asks(netns: &Netns, from: &str) -> bool {
    let guest = if from.contains(':') { "fd00::1" } else { "10.0.0.1" };
    let socket = netns.enter(|| UdpSocket::bind((ip(from), 0)).unwrap()).unwrap();
    // What is answered takes milliseconds, what is not must be waited for.
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket.send_to(b"hello", SocketAddr::new(ip(guest), ECHO_PORT)).unwrap();
    let mut answer = [0; 16];
    socket.recv_from(&mut answer).is_ok_and(|(bytes, _)| &answer[..bytes] == b"hello")
}
