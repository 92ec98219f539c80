//! ARP and neighbour discovery, seen from both ends.

use std::net::Ipv6Addr;
use std::time::Duration;

use super::packet::{ARP, IPV6, checksum, ethernet, ipv6, pseudo_header};
use super::site::{GUEST_MAC, PEER_MAC};
use super::{Observations, Site};
use crate::topology::{Frame, FrameFilter, TopologyError};

const GUEST4: [u8; 4] = [10, 0, 0, 1];
const PEER4: [u8; 4] = [10, 0, 0, 2];
/// Nobody has it.
const ABSENT4: [u8; 4] = [10, 0, 0, 77];
const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
const PEER6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
const ABSENT6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x77);
const ICMPV6: u8 = 58;
/// How long an answer may take on a loaded machine.
const ANSWERS: Duration = Duration::from_secs(3);
/// How long a second one is waited for. The peer answers within a millisecond, an emulated guest within ten.
const AGAIN: Duration = Duration::from_millis(150);
const BROADCAST: [u8; 6] = [0xff; 6];

pub(super) fn observe(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    asked_by_the_guest(site, rows)?;
    asked_by_the_peer(site, rows)?;
    caches(site, rows)
}

/// Raw requests from the guest: who answers, how often, with which bytes.
fn asked_by_the_guest(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let questions = [
        ("arp.peer", arp_request(GUEST_MAC, GUEST4, PEER4, BROADCAST)),
        ("arp.peer_unicast", arp_request(GUEST_MAC, GUEST4, PEER4, PEER_MAC)),
        ("arp.peer_again", arp_request(GUEST_MAC, GUEST4, PEER4, BROADCAST)),
        ("arp.absent_host", arp_request(GUEST_MAC, GUEST4, ABSENT4, BROADCAST)),
        ("arp.probe_of_own", arp_request(GUEST_MAC, [0; 4], GUEST4, BROADCAST)),
        ("arp.probe_of_peers", arp_request(GUEST_MAC, [0; 4], PEER4, BROADCAST)),
        ("arp.gratuitous", arp_request(GUEST_MAC, GUEST4, GUEST4, BROADCAST)),
        ("nd.peer", solicitation(GUEST_MAC, GUEST6, PEER6)),
        ("nd.peer_again", solicitation(GUEST_MAC, GUEST6, PEER6)),
        ("nd.absent_host", solicitation(GUEST_MAC, GUEST6, ABSENT6)),
        ("nd.router", router_solicitation()),
    ];
    for (name, frame) in questions {
        let capture = site.guest.capture("eth0")?;
        let listening = site.peer.listen()?;
        site.guest.send_frames("eth0", std::slice::from_ref(&frame))?;
        // What the peer hears is exactly what was asked, though an ARP proxy would stop it.
        let question = FrameFilter::any().bytes_at(0, &frame);
        let heard = listening.receive(&question, 1, ANSWERS)?.len() + listening.receive(&question, 1, AGAIN)?.len();
        rows.record(format!("neighbour.{name}.heard"), heard);
        let answers = capture.frames(&answers_to(GUEST_MAC), 2, AGAIN)?;
        rows.record(format!("neighbour.{name}.answers"), describe(&answers));
    }
    Ok(())
}

fn asked_by_the_peer(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let questions = [
        ("arp", arp_request(PEER_MAC, PEER4, GUEST4, BROADCAST)),
        ("arp_unicast", arp_request(PEER_MAC, PEER4, GUEST4, GUEST_MAC)),
        ("nd", solicitation(PEER_MAC, PEER6, GUEST6)),
    ];
    for (name, frame) in questions {
        let answers = site.peer.ask(&frame, &answers_to(PEER_MAC), ANSWERS, AGAIN)?;
        rows.record(format!("neighbour.guest.{name}.answers"), describe(&answers));
    }
    Ok(())
}

/// What the real stacks keep.
fn caches(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    for (family, target, absent) in [("-4", "10.0.0.2", "10.0.0.77"), ("-6", "fd00::2", "fd00::77")] {
        let name = format!("neighbour.cache{family}");
        let found = site.ask(&format!(
            "ip neighbour flush dev eth0; ping -q -c 1 -W 3 {target} >/dev/null; ip {family} neighbour show {target} | cut -d' ' -f1-5"
        ))?;
        rows.record(format!("{name}.peer"), found);
        // Confirmed again after it went stale: a unicast question that something has to answer.
        let again = site.ask(&format!(
            "ip {family} neighbour change {target} dev eth0 lladdr 52:54:00:00:00:02 nud probe; \
             for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do ip {family} neighbour show {target} | grep -q REACHABLE && break; sleep 0.2; done; \
             ip {family} neighbour show {target}"
        ))?;
        rows.record(format!("{name}.confirmed"), again);
        let lost = site.outcome(&format!("ping -q -c 1 -W 1 {absent} >/dev/null"))?;
        rows.record(format!("{name}.absent_host"), lost);
    }
    // The peer announces another address; a neighbour that knows it takes the news (RFC 5944 §4.6).
    site.guest.sh("ip neighbour replace 10.0.0.2 dev eth0 lladdr 52:54:00:00:00:99 nud stale")?;
    let listening = site.guest.capture("eth0")?;
    site.peer.send(&[arp_request(PEER_MAC, PEER4, PEER4, BROADCAST)])?;
    listening.frames(&FrameFilter::any().ether_type(ARP), 1, ANSWERS)?;
    let address = site.ask("sleep 0.1; ip neighbour show 10.0.0.2 | cut -d' ' -f1-5")?;
    rows.record("neighbour.gratuitous_from_peer.taken", address);
    Ok(())
}

fn answers_to(mac: [u8; 6]) -> FrameFilter {
    FrameFilter::any().destination(mac)
}

/// Sources and kinds of the answers, in order.
fn describe(answers: &[Frame]) -> String {
    let kinds = answers.iter().filter_map(|frame| {
        let bytes = &frame.bytes;
        let kind = match (u16::from_be_bytes([bytes[12], bytes[13]]), bytes.get(20).copied(), bytes.get(54).copied()) {
            (ARP, _, _) => format!("ARP {} from {}", bytes.get(21)?, crate::topology::hex::encode(bytes.get(22..32)?)),
            (IPV6, Some(ICMPV6), Some(kind @ 133..=137)) => {
                format!("ICMPv6 {kind} from {}", crate::topology::hex::encode(&bytes[6..12]))
            }
            _ => return None,
        };
        Some(format!("{kind}, {} bytes", bytes.len()))
    });
    let kinds: Vec<_> = kinds.collect();
    if kinds.is_empty() { "none".to_owned() } else { kinds.join("; ") }
}

/// RFC 826. Padded to the shortest frame, as a card does it.
fn arp_request(mac: [u8; 6], from: [u8; 4], target: [u8; 4], to: [u8; 6]) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4, 0, 1];
    body.extend(mac);
    body.extend(from);
    body.extend([0; 6]);
    body.extend(target);
    body.resize(46, 0);
    ethernet(to, mac, ARP, &body)
}

/// RFC 4861 §4.3, to the target's solicited-node group, with the source's link-layer address.
fn solicitation(mac: [u8; 6], from: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let last = target.octets();
    let group =
        Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(last[13]), u16::from_be_bytes([last[14], last[15]]));
    let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    message.extend([1, 1]);
    message.extend(mac);
    icmpv6([0x33, 0x33, 0xff, last[13], last[14], last[15]], mac, [from, group], message)
}

/// RFC 4861 §4.1. There is no router.
fn router_solicitation() -> Vec<u8> {
    let ends = [GUEST6, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2)];
    icmpv6([0x33, 0x33, 0, 0, 0, 2], GUEST_MAC, ends, vec![133, 0, 0, 0, 0, 0, 0, 0])
}

fn icmpv6(to: [u8; 6], mac: [u8; 6], ends: [Ipv6Addr; 2], mut message: Vec<u8>) -> Vec<u8> {
    let octets = ends.map(|end| end.octets());
    let sum = checksum(&message, pseudo_header([&octets[0], &octets[1]], ICMPV6, message.len()));
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut packet = ipv6(0, ICMPV6, ends, &message);
    // RFC 4861 §7.1: what was forwarded is no neighbour's.
    packet[7] = 255;
    ethernet(to, mac, IPV6, &packet)
}
