//! The guest changes its card: address, MTU, features, link; and things change around it.

use std::time::Duration;

use serde_json::json;

use super::delivery::{Case, Way, deliver};
use super::internet::{ping, ping_from_peer};
use super::packet::ethernet;
use super::site::{GUEST_MAC, PEER_MAC};
use super::{Kind, Observations, Site, frames};
use crate::topology::{FrameFilter, TopologyError, wait_until};

const OTHER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0xaa];
const PING: &str = "-c 1 -W 3 10.0.0.2";
const PING6: &str = "-c 1 -W 3 fd00::2";
/// How long a change of the link may take to show.
const LINK_LIMIT: Duration = Duration::from_secs(5);

/// Features that are switched over and back, by the names that `ethtool -k` shows.
const FEATURES: &[&str] = &[
    "rx-checksumming",
    "tx-checksumming",
    "scatter-gather",
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-udp-segmentation",
    "generic-segmentation-offload",
    "generic-receive-offload",
    "large-receive-offload",
    "rx-gro-hw",
    "rx-gro-list",
    "rx-udp-gro-forwarding",
    "rx-vlan-offload",
    "tx-vlan-offload",
    "rx-vlan-filter",
    "receive-hashing",
    "ntuple-filters",
    "highdma",
    "tx-nocache-copy",
    "rx-all",
    "loopback",
];

pub(super) fn observe(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    // Nothing so far was meant to touch the link.
    rows.record("change.link_losses_since_boot", link_losses(site)?);
    address(site, rows)?;
    jumbo(site, rows)?;
    mtu(site, rows)?;
    for feature in FEATURES {
        rows.record(format!("change.feature.{feature}"), switch_over_and_back(site, feature)?);
    }
    peer_goes_and_comes(site, rows)?;
    link(site, rows)?;
    announcement(site, rows)
}

/// "off: ok, on: ok", with what the kernel then has.
fn switch_over_and_back(site: &Site, feature: &str) -> Result<String, TopologyError> {
    site.ask(&format!(
        "state() {{ ethtool -k eth0 | awk -v f='{feature}:' '$1 == f {{ print $2 }}'; }}; was=$(state); \
         if [ \"$was\" = on ]; then to=off; else to=on; fi; \
         ethtool -K eth0 '{feature}' $to 2>&1 | grep -v '^Actual' | head -n 1; echo \"$was, then $(state)\"; \
         ethtool -K eth0 '{feature}' $was >/dev/null 2>&1; echo \", back $(state)\""
    ))
}

fn address(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let name = "change.address";
    rows.record(format!("{name}.set"), site.outcome("ip link set eth0 address 52:54:00:00:00:aa")?);
    rows.record(format!("{name}.shown"), site.ask("cat /sys/class/net/eth0/address")?);
    rows.record(format!("{name}.assign_type"), site.ask("cat /sys/class/net/eth0/addr_assign_type")?);
    rows.record(format!("{name}.ping"), ping(site, PING)?);
    rows.record(format!("{name}.ping6"), ping(site, PING6)?);
    let known = site.peer.netns.sh("ip neighbour show 10.0.0.1 | cut -d' ' -f1-5")?;
    rows.record(format!("{name}.peer_knows"), known);
    rows.record(format!("{name}.ping_from_peer"), ping_from_peer(site, "-c 1 -W 3 10.0.0.1")?);
    let to = |name: &str, mac| {
        let frame = ethernet(mac, PEER_MAC, frames::EXPERIMENTAL, &[mac[5]; 46]);
        Case { name: name.to_owned(), frame }
    };
    let cases = [to("new", OTHER_MAC), to("old", GUEST_MAC)];
    deliver(site, Way::In, &format!("{name}.to"), &cases, rows)?;
    for (name_of, mac) in
        [("group", "01:00:5e:00:00:05"), ("zero", "00:00:00:00:00:00"), ("broadcast", "ff:ff:ff:ff:ff:ff")]
    {
        rows.record(format!("{name}.set_{name_of}"), site.outcome(&format!("ip link set eth0 address {mac}"))?);
    }
    rows.record(format!("{name}.restored"), site.outcome("ip link set eth0 address 52:54:00:00:00:01")?);
    rows.record(format!("{name}.ping_after"), ping(site, PING)?);
    rows.record(format!("{name}.ping6_after"), ping(site, PING6)?);
    Ok(())
}

/// Frames longer than the MTU of the wire.
fn jumbo(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let lengths = [1515, 1518, 1519, 1522, 1523, 1550, 1600, 2000, 4000, 9014];
    let cases = |way: Way| -> Vec<Case> {
        let (destination, source) = way.ends();
        let frame = |bytes: usize, ether_type, rest: &[u8]| {
            let mut frame = ethernet(destination, source, ether_type, rest);
            frame.resize(bytes, (bytes % 251) as u8);
            frame
        };
        let plain =
            lengths.map(|bytes| Case { name: format!("{bytes:04}"), frame: frame(bytes, frames::EXPERIMENTAL, &[]) });
        // 1500 bytes behind two tags: as long as an MTU of 1500 allows.
        let stacked = frame(1522, 0x88a8, &[0, 100, 0x81, 0, 0, 5, 0x88, 0xb5]);
        plain.into_iter().chain([Case { name: "1522_qinq".to_owned(), frame: stacked }]).collect()
    };
    site.guest.sh("ip link set eth0 mtu 9000")?;
    deliver(site, Way::Out, "change.jumbo.out", &cases(Way::Out), rows)?;
    rows.record("change.jumbo.ping", ping(site, "-c 1 -W 1 -s 3000 -M do 10.0.0.2")?);
    rows.record("change.jumbo.path_mtu", site.ask("ip -4 route get 10.0.0.2 | grep -o 'mtu [0-9]*'; true")?);
    site.guest.sh("ip link set eth0 mtu 1500")?;
    set_wire_mtu(site, 9000)?;
    deliver(site, Way::In, "change.jumbo.in", &cases(Way::In), rows)?;
    set_wire_mtu(site, 1500)
}

/// Of the peer's card and, at the tap, of the bridge's end of its cable: what is left to drop frames is what is tested.
fn set_wire_mtu(site: &Site, mtu: u32) -> Result<(), TopologyError> {
    site.peer.netns.sh(&format!("ip link set peer0 mtu {mtu}"))?;
    if site.kind() == Kind::Tap {
        site.host.sh(&format!("ip link set cable mtu {mtu}"))?;
    }
    Ok(())
}

fn mtu(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    for mtu in [0, 67, 68, 576, 1280, 1499, 1500, 1501, 9000, 65_535, 65_536] {
        let name = format!("change.mtu.{mtu:05}");
        rows.record(&name, site.outcome(&format!("ip link set eth0 mtu {mtu}"))?);
        rows.record(format!("{name}.ping"), ping(site, PING)?);
    }
    site.guest.sh("ip link set eth0 mtu 1280")?;
    rows.record("change.mtu.01280.whole_1472", ping(site, "-c 1 -W 2 -s 1472 -M do 10.0.0.2")?);
    rows.record("change.mtu.01280.whole_1472_in", ping_from_peer(site, "-c 1 -W 2 -s 1472 -M do 10.0.0.1")?);
    site.guest.sh("ip link set eth0 mtu 1500")?;
    // An MTU below IPv6's least has taken the addresses away (RFC 8200 §5).
    restore_ipv6(site)?;
    rows.record("change.mtu.restored.ping6", ping(site, PING6)?);
    Ok(())
}

/// The neighbour's card goes down and up: nothing of the guest's business.
fn peer_goes_and_comes(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let before = link_losses(site)?;
    site.peer.netns.sh("ip link set peer0 down")?;
    rows.record("change.peer.down.ping", ping(site, "-c 1 -W 1 10.0.0.2")?);
    rows.record("change.peer.down.carrier", site.ask("cat /sys/class/net/eth0/carrier")?);
    site.peer.netns.sh("ip link set peer0 up && ip address replace fd00::2/64 dev peer0 nodad")?;
    let back = wait_until(LINK_LIMIT, "the peer", || ping(site, "-c 1 -W 1 10.0.0.2").is_ok_and(|said| said != "lost"));
    rows.record("change.peer.up_again.ping", if back.is_ok() { "answered" } else { "lost" });
    let losses = link_losses(site)?;
    rows.record("change.peer.link_losses", if before == losses { "none" } else { "some" });
    Ok(())
}

/// Down and up, by the guest and by QEMU.
fn link(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    rows.record("change.link.down", site.outcome("ip link set eth0 down")?);
    rows.record("change.link.down.operstate", site.ask("cat /sys/class/net/eth0/operstate")?);
    let cases =
        [Case { name: "frame".to_owned(), frame: ethernet([0xff; 6], PEER_MAC, frames::EXPERIMENTAL, &[3; 46]) }];
    site.peer.send(&[cases[0].frame.clone()])?;
    rows.record("change.link.up", site.outcome("ip link set eth0 up")?);
    restore_ipv6(site)?;
    rows.record("change.link.up.ping", ping(site, PING)?);
    rows.record("change.link.up.ping6", ping(site, PING6)?);
    for (name, up, carrier) in [("off", false, "0"), ("on", true, "1")] {
        let said = site.guest.qmp("set_link", json!({ "name": "nic0", "up": up }));
        rows.record(format!("change.link.qemu_{name}"), if said.is_ok() { "ok" } else { "refused" });
        let seen = wait_until(LINK_LIMIT, "the link", || {
            site.ask("cat /sys/class/net/eth0/carrier").is_ok_and(|text| text.trim() == carrier)
        });
        rows.record(format!("change.link.qemu_{name}.seen"), if seen.is_ok() { "yes" } else { "no" });
    }
    site.guest.wait_link("eth0", LINK_LIMIT)?;
    rows.record("change.link.qemu_on.ping", ping(site, PING)?);
    deliver(site, Way::In, "change.link.qemu_on.broadcast", &cases, rows)
}

/// What the neighbours hear when QEMU announces the card, as it does after a migration.
fn announcement(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let listening = site.peer.listen()?;
    let timing = json!({ "initial": 50, "max": 100, "rounds": 3, "step": 50 });
    let said = site.guest.qmp("announce-self", timing);
    rows.record("change.announce.qemu", if said.is_ok() { "ok" } else { "refused" });
    let heard = listening.receive(&FrameFilter::any().source(GUEST_MAC), usize::MAX, Duration::from_millis(1500))?;
    for (name, ether_type) in
        [("rarp", [0x80, 0x35]), ("gratuitous_arp", [0x08, 0x06]), ("neighbour_advertisement", [0x86, 0xdd])]
    {
        let is =
            |bytes: &[u8]| bytes[12..14] == ether_type && (ether_type != [0x86, 0xdd] || bytes.get(54) == Some(&136));
        let some = heard.iter().any(|frame| is(&frame.bytes));
        rows.record(format!("change.announce.heard.{name}"), if some { "yes" } else { "no" });
    }
    Ok(())
}

/// Addresses that the kernel drops with an interface that goes down.
pub(super) fn restore_ipv6(site: &Site) -> Result<(), TopologyError> {
    site.guest.sh("ip address replace fd00::1/64 dev eth0 nodad").map(drop)
}

/// How often the carrier was lost.
fn link_losses(site: &Site) -> Result<String, TopologyError> {
    Ok(site.ask("cat /sys/class/net/eth0/carrier_down_count")?.trim().to_owned())
}
