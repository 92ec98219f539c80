//! What a host says for itself on a wire that no kernel serves: ARP (RFC 826), neighbour discovery (RFC 4861 §7.2) and
//! echo replies (RFC 792, RFC 4443 §4.2).
//!
//! Not done: duplicate address detection, router discovery (a gateway is configured), multicast listener reports (a
//! switch that snoops MLD must flood solicited-node groups).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dreamwire_vhost::frame::HEADER_COPY_BYTES;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv6Packet,
    Icmpv6Repr, IpProtocol, Ipv6Packet, Ipv6Repr, NdiscNeighborFlags, NdiscRepr,
};

use super::neighbours::{Ask, Neighbours};
use super::open::{PROTOCOL_ICMP, Station};
use super::outer::{HOP_LIMIT, IPV4_BYTES, IPV6_BYTES};
use crate::checksum::Sum;
use crate::drop_reason::DropReason;
use crate::mac::Mac;
use crate::stage::parse::{ETHERNET_BYTES, ETHERTYPE_ARP, ETHERTYPE_IPV4};

const ARP_BYTES: usize = 28;
/// RFC 4861 §7.1: what crossed a router has less.
const ND_HOP_LIMIT: u8 = 255;
const ICMPV4_ECHO_REQUEST: u8 = 8;
const ICMPV4_ECHO_REPLY: u8 = 0;
const ICMPV6_ECHO_REQUEST: u8 = 128;
const ICMPV6_ECHO_REPLY: u8 = 129;
const ECHO_HEADER_BYTES: usize = 8;

/// A frame of our own, or the changed start of one that is sent back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Message {
    bytes: [u8; HEADER_COPY_BYTES],
    length: usize,
}

impl Message {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// What is to be answered.
#[derive(Debug, Clone, Copy)]
pub(super) enum Heard {
    /// Nothing.
    Noted,
    /// This frame.
    Answer(Message),
    /// This start of a frame, with what lay behind the private copy.
    Echo(Message),
}

/// The question for a neighbour.
pub(super) fn question(station: &Station, ask: Ask) -> Option<Message> {
    match (station.address, ask.address) {
        (IpAddr::V4(ours), IpAddr::V4(theirs)) => {
            let to = ask.last_known.unwrap_or(Mac::BROADCAST);
            Some(arp(station.mac, ArpOperation::Request, ours, (to, Mac([0; 6]), theirs)))
        }
        (IpAddr::V6(ours), IpAddr::V6(theirs)) => {
            let solicit =
                NdiscRepr::NeighborSolicit { target_addr: theirs, lladdr: Some(ethernet(station.mac).into()) };
            let group = solicited_node(theirs);
            let to = ask.last_known.map_or((group_mac(group), group), |mac| (mac, theirs));
            Some(nd(station.mac, ours, to, solicit))
        }
        _ => None,
    }
}

/// Takes what [`super::open::open`] found to be for the host. `Err`: it was not.
pub(super) fn hear(
    station: &Station,
    neighbours: &mut Neighbours,
    headers: &[u8],
    now_ns: u64,
) -> Result<Heard, DropReason> {
    let heard = match (u16::from_be_bytes([headers[12], headers[13]]), station.address) {
        (ETHERTYPE_ARP, IpAddr::V4(ours)) => {
            hear_arp(station.mac, ours, neighbours, &headers[ETHERNET_BYTES..], now_ns)
        }
        (ETHERTYPE_IPV4, IpAddr::V4(_)) => echo_ipv4(station.mac, headers),
        (_, IpAddr::V6(ours)) => hear_icmpv6(station.mac, ours, neighbours, headers, now_ns),
        _ => None,
    };
    heard.ok_or(DropReason::NotForHost)
}

fn hear_arp(mac: Mac, ours: Ipv4Addr, neighbours: &mut Neighbours, packet: &[u8], now_ns: u64) -> Option<Heard> {
    let ArpRepr::EthernetIpv4 { operation, source_hardware_addr, source_protocol_addr, target_protocol_addr, .. } =
        ArpRepr::parse(&ArpPacket::new_checked(packet).ok()?).ok()?
    else {
        return None;
    };
    let sender = Mac(source_hardware_addr.0);
    // RFC 826: whoever is known is brought up to date, whatever the packet is.
    neighbours.hear(source_protocol_addr.into(), sender, now_ns);
    if operation != ArpOperation::Request || target_protocol_addr != ours || !sender.is_station() {
        return Some(Heard::Noted);
    }
    Some(Heard::Answer(arp(mac, ArpOperation::Reply, ours, (sender, sender, source_protocol_addr))))
}

/// A packet's checksum after one of its words has lost `from` and won `to` (RFC 1624 §3).
fn update(checksum: [u8; 2], from: u16, to: u16) -> [u8; 2] {
    Sum::default().word(!u16::from_be_bytes(checksum)).word(!from).word(to).checksum()
}

/// The reply differs from the request in addresses, type and checksums. A request whose own checksum is wrong gets a
/// reply whose checksum is.
fn echo_ipv4(mac: Mac, headers: &[u8]) -> Option<Heard> {
    let (ip, echo) = headers[ETHERNET_BYTES..].split_at_checked(IPV4_BYTES)?;
    // With options (routes recorded, given) nothing is echoed.
    let is_request = ip[0] == 0x45
        && ip[9] == PROTOCOL_ICMP
        && echo.len() >= ECHO_HEADER_BYTES
        && echo[..2] == [ICMPV4_ECHO_REQUEST, 0];
    let mut message = sent_back(mac, headers).filter(|_| is_request)?;
    let (ip, echo) = message.bytes[ETHERNET_BYTES..].split_at_mut(IPV4_BYTES);
    let (before, addresses) = ip.split_at_mut(12);
    addresses[..4].copy_from_slice(&headers[ETHERNET_BYTES + 16..ETHERNET_BYTES + 20]);
    addresses[4..8].copy_from_slice(&headers[ETHERNET_BYTES + 12..ETHERNET_BYTES + 16]);
    before[8] = HOP_LIMIT;
    before[10..12].copy_from_slice(&[0, 0]);
    let sum = Sum::default().bytes(ip).checksum();
    ip[10..12].copy_from_slice(&sum);
    echo[0] = ICMPV4_ECHO_REPLY;
    let sum = update([echo[2], echo[3]], u16::from(ICMPV4_ECHO_REQUEST) << 8, u16::from(ICMPV4_ECHO_REPLY) << 8);
    echo[2..4].copy_from_slice(&sum);
    Some(Heard::Echo(message))
}

fn hear_icmpv6(mac: Mac, ours: Ipv6Addr, neighbours: &mut Neighbours, headers: &[u8], now_ns: u64) -> Option<Heard> {
    let (ip_header, icmp) = headers[ETHERNET_BYTES..].split_at_checked(IPV6_BYTES)?;
    if *icmp.first()? == ICMPV6_ECHO_REQUEST {
        return echo_ipv6(mac, ours, headers);
    }
    // Neighbour discovery fits the private copy; what does not is none.
    let ip = Ipv6Packet::new_unchecked(ip_header);
    let message = icmp.get(..usize::from(ip.payload_len()))?;
    let (source, destination) = (ip.src_addr(), ip.dst_addr());
    if ip.hop_limit() != ND_HOP_LIMIT {
        return None;
    }
    let packet = Icmpv6Packet::new_checked(message).ok()?;
    let parsed = Icmpv6Repr::parse(&source, &destination, &packet, &ChecksumCapabilities::default()).ok()?;
    let sender = Mac([headers[6], headers[7], headers[8], headers[9], headers[10], headers[11]]);
    let card = |option: Option<smoltcp::wire::RawHardwareAddress>| {
        Some(option?.as_bytes()).and_then(|bytes| Some(Mac(bytes.try_into().ok()?)))
    };
    match parsed {
        Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, lladdr }) => {
            let stated = card(lladdr);
            if let Some(stated) = stated.filter(|_| !source.is_unspecified()) {
                neighbours.hear(source.into(), stated, now_ns);
            }
            if target_addr != ours {
                return Some(Heard::Noted);
            }
            // RFC 4861 §7.2.4: to whom has no address yet, by way of everybody.
            let (to, flags) = if source.is_unspecified() {
                let everybody = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
                ((group_mac(everybody), everybody), NdiscNeighborFlags::OVERRIDE)
            } else {
                ((stated.unwrap_or(sender), source), NdiscNeighborFlags::SOLICITED | NdiscNeighborFlags::OVERRIDE)
            };
            let advert = NdiscRepr::NeighborAdvert { flags, target_addr: ours, lladdr: Some(ethernet(mac).into()) };
            Some(Heard::Answer(nd(mac, ours, to, advert)))
        }
        Icmpv6Repr::Ndisc(NdiscRepr::NeighborAdvert { target_addr, lladdr, .. }) => {
            // Asked directly, a neighbour may leave its card out (RFC 4861 §4.4).
            let stated = card(lladdr).or_else(|| (source == target_addr).then_some(sender));
            if let Some(stated) = stated {
                neighbours.hear(target_addr.into(), stated, now_ns);
            }
            Some(Heard::Noted)
        }
        _ => None,
    }
}

fn echo_ipv6(mac: Mac, ours: Ipv6Addr, headers: &[u8]) -> Option<Heard> {
    let (ip, echo) = headers[ETHERNET_BYTES..].split_at(IPV6_BYTES);
    if echo.len() < ECHO_HEADER_BYTES || echo[1] != 0 || ip[24..40] != ours.octets() {
        return None;
    }
    let mut message = sent_back(mac, headers)?;
    let (packet, echo) = message.bytes[ETHERNET_BYTES..].split_at_mut(IPV6_BYTES);
    packet[7] = HOP_LIMIT;
    packet[8..24].copy_from_slice(&ip[24..40]);
    packet[24..40].copy_from_slice(&ip[8..24]);
    echo[0] = ICMPV6_ECHO_REPLY;
    let sum = update([echo[2], echo[3]], u16::from(ICMPV6_ECHO_REQUEST) << 8, u16::from(ICMPV6_ECHO_REPLY) << 8);
    echo[2..4].copy_from_slice(&sum);
    Some(Heard::Echo(message))
}

/// A copy of a frame's start, addressed to whoever sent it.
fn sent_back(mac: Mac, headers: &[u8]) -> Option<Message> {
    let sender = Mac([headers[6], headers[7], headers[8], headers[9], headers[10], headers[11]]);
    if !sender.is_station() {
        return None;
    }
    let mut message = Message { bytes: [0; HEADER_COPY_BYTES], length: headers.len() };
    message.bytes[..headers.len()].copy_from_slice(headers);
    message.bytes[..6].copy_from_slice(&sender.0);
    message.bytes[6..12].copy_from_slice(&mac.0);
    Some(message)
}

fn ethernet(mac: Mac) -> EthernetAddress {
    EthernetAddress(mac.0)
}

/// RFC 4291 §2.7.1.
fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from(b) << 8 | u16::from(c))
}

/// RFC 2464 §7.
fn group_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    Mac([0x33, 0x33, a, b, c, d])
}

fn frame(from: Mac, to: Mac, ethertype: EthernetProtocol, payload_bytes: usize) -> Message {
    let mut message = Message { bytes: [0; HEADER_COPY_BYTES], length: ETHERNET_BYTES + payload_bytes };
    let header = EthernetRepr { src_addr: ethernet(from), dst_addr: ethernet(to), ethertype };
    header.emit(&mut EthernetFrame::new_unchecked(&mut message.bytes[..]));
    message
}

/// `to`: the frame's destination, the target's card as it is known, and the target.
fn arp(mac: Mac, operation: ArpOperation, ours: Ipv4Addr, to: (Mac, Mac, Ipv4Addr)) -> Message {
    let mut message = frame(mac, to.0, EthernetProtocol::Arp, ARP_BYTES);
    let packet = ArpRepr::EthernetIpv4 {
        operation,
        source_hardware_addr: ethernet(mac),
        source_protocol_addr: ours,
        target_hardware_addr: ethernet(to.1),
        target_protocol_addr: to.2,
    };
    packet.emit(&mut ArpPacket::new_unchecked(&mut message.bytes[ETHERNET_BYTES..]));
    message
}

fn nd(mac: Mac, ours: Ipv6Addr, to: (Mac, Ipv6Addr), message: NdiscRepr<'_>) -> Message {
    let icmp = Icmpv6Repr::Ndisc(message);
    let mut made = frame(mac, to.0, EthernetProtocol::Ipv6, IPV6_BYTES + icmp.buffer_len());
    let (ip, rest) = made.bytes[ETHERNET_BYTES..].split_at_mut(IPV6_BYTES);
    let header = Ipv6Repr {
        src_addr: ours,
        dst_addr: to.1,
        next_header: IpProtocol::Icmpv6,
        payload_len: icmp.buffer_len(),
        hop_limit: ND_HOP_LIMIT,
    };
    header.emit(&mut Ipv6Packet::new_unchecked(ip));
    let mut packet = Icmpv6Packet::new_unchecked(&mut rest[..icmp.buffer_len()]);
    icmp.emit(&ours, &to.1, &mut packet, &ChecksumCapabilities::default());
    made
}

#[cfg(test)]
mod tests {
    use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Ipv4Packet, Ipv4Repr};

    use super::*;

    const OURS: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const THEIRS: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn station(address: &str) -> Station {
        Station { mac: OURS, address: address.parse().unwrap(), udp_port: 4789 }
    }

    /// Two hosts that ask and answer: what one asks, the other answers, and then it is known.
    fn resolves(here: &str, there: &str) {
        let (a, b) = (station(here), Station { mac: THEIRS, ..station(there) });
        let mut table = Neighbours::new(&[], true);
        let mut silent = Neighbours::new(&[], true);
        let row = table.row(b.address, 0).unwrap();
        let (None, Some(ask)) = table.resolve(row, b.address, 0) else { panic!("known already?") };
        let asked = question(&a, ask).unwrap();
        assert_eq!(&asked.bytes()[6..12], OURS.0);
        assert_eq!(asked.bytes()[0] & 1, 1, "to a group");
        let Ok(Heard::Answer(answer)) = hear(&b, &mut silent, asked.bytes(), 0) else { panic!("no answer") };
        assert_eq!(&answer.bytes()[..12], [OURS.0, THEIRS.0].concat());
        assert!(matches!(hear(&a, &mut table, answer.bytes(), 5), Ok(Heard::Noted)));
        assert_eq!(table.resolve(row, b.address, 5), (Some(THEIRS), None));
        // Confirmed by asking it alone.
        let again = question(&a, Ask { address: b.address, last_known: Some(THEIRS) }).unwrap();
        assert_eq!(&again.bytes()[..6], THEIRS.0);
        assert!(matches!(hear(&b, &mut silent, again.bytes(), 0), Ok(Heard::Answer(_))));
        // Somebody else's address is none of ours.
        let other =
            Station { address: if here.contains(':') { "2001:db8::9" } else { "192.0.2.9" }.parse().unwrap(), ..b };
        assert!(matches!(hear(&other, &mut silent, asked.bytes(), 0), Ok(Heard::Noted)));
    }

    #[test]
    fn two_hosts_resolve_each_other_with_arp() {
        resolves("192.0.2.1", "192.0.2.2");
    }

    #[test]
    fn two_hosts_resolve_each_other_with_neighbour_discovery() {
        resolves("2001:db8::1", "2001:db8::1:2");
    }

    #[test]
    fn who_has_no_address_yet_is_answered_by_way_of_everybody() {
        let solicit = NdiscRepr::NeighborSolicit { target_addr: "2001:db8::1".parse().unwrap(), lladdr: None };
        let group = solicited_node("2001:db8::1".parse().unwrap());
        let asked = nd(THEIRS, Ipv6Addr::UNSPECIFIED, (group_mac(group), group), solicit);
        let heard = hear(&station("2001:db8::1"), &mut Neighbours::new(&[], true), asked.bytes(), 0);
        let Ok(Heard::Answer(answer)) = heard else { panic!("no answer") };
        assert_eq!(answer.bytes()[..6], [0x33, 0x33, 0, 0, 0, 1]);
        assert_eq!(answer.bytes()[38..54], Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets());
    }

    #[test]
    fn neighbour_discovery_from_behind_a_router_or_with_a_wrong_checksum_is_not_believed() {
        let solicit = NdiscRepr::NeighborSolicit { target_addr: "2001:db8::1".parse().unwrap(), lladdr: None };
        let asked = nd(THEIRS, "2001:db8::2".parse().unwrap(), (OURS, "2001:db8::1".parse().unwrap()), solicit);
        for (at, value) in [(21, 64), (56, 1)] {
            let mut bytes = asked.bytes().to_vec();
            bytes[at] = value;
            let heard = hear(&station("2001:db8::1"), &mut Neighbours::new(&[], true), &bytes, 0);
            assert!(matches!(heard, Err(DropReason::NotForHost)));
        }
    }

    #[test]
    fn an_ipv4_echo_request_is_answered() {
        let request = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 9, data: b"abcdefgh" };
        let ip = Ipv4Repr {
            src_addr: "192.0.2.2".parse().unwrap(),
            dst_addr: "192.0.2.1".parse().unwrap(),
            next_header: IpProtocol::Icmp,
            payload_len: request.buffer_len(),
            hop_limit: 3,
        };
        let caps = ChecksumCapabilities::default();
        let mut asked = frame(THEIRS, OURS, EthernetProtocol::Ipv4, IPV4_BYTES + request.buffer_len());
        ip.emit(&mut Ipv4Packet::new_unchecked(&mut asked.bytes[14..]), &caps);
        request.emit(&mut Icmpv4Packet::new_unchecked(&mut asked.bytes[34..50]), &caps);
        let heard = hear(&station("192.0.2.1"), &mut Neighbours::new(&[], true), asked.bytes(), 0);
        let Ok(Heard::Echo(answer)) = heard else { panic!("no answer") };
        assert_eq!(&answer.bytes()[..12], [THEIRS.0, OURS.0].concat());
        let ip = Ipv4Packet::new_checked(&answer.bytes()[14..]).unwrap();
        assert!(ip.verify_checksum());
        assert_eq!((ip.src_addr().octets(), ip.dst_addr().octets()), ([192, 0, 2, 1], [192, 0, 2, 2]));
        let reply = Icmpv4Repr::parse(&Icmpv4Packet::new_checked(ip.payload()).unwrap(), &caps).unwrap();
        assert_eq!(reply, Icmpv4Repr::EchoReply { ident: 7, seq_no: 9, data: b"abcdefgh" });
    }

    #[test]
    fn an_ipv6_echo_request_is_answered() {
        let caps = ChecksumCapabilities::default();
        let (theirs, ours): (Ipv6Addr, Ipv6Addr) = ("2001:db8::2".parse().unwrap(), "2001:db8::1".parse().unwrap());
        let request = Icmpv6Repr::EchoRequest { ident: 7, seq_no: 9, data: b"abcdefgh" };
        let mut asked = frame(THEIRS, OURS, EthernetProtocol::Ipv6, IPV6_BYTES + request.buffer_len());
        let ip = Ipv6Repr {
            src_addr: theirs,
            dst_addr: ours,
            next_header: IpProtocol::Icmpv6,
            payload_len: request.buffer_len(),
            hop_limit: 3,
        };
        ip.emit(&mut Ipv6Packet::new_unchecked(&mut asked.bytes[14..54]));
        request.emit(&theirs, &ours, &mut Icmpv6Packet::new_unchecked(&mut asked.bytes[54..70]), &caps);
        let heard = hear(&station("2001:db8::1"), &mut Neighbours::new(&[], true), asked.bytes(), 0);
        let Ok(Heard::Echo(answer)) = heard else { panic!("no answer") };
        let ip = Ipv6Packet::new_checked(&answer.bytes()[14..]).unwrap();
        assert_eq!((ip.src_addr(), ip.dst_addr(), ip.hop_limit()), (ours, theirs, 64));
        let packet = Icmpv6Packet::new_checked(ip.payload()).unwrap();
        let reply = Icmpv6Repr::parse(&ours, &theirs, &packet, &caps).unwrap();
        assert_eq!(reply, Icmpv6Repr::EchoReply { ident: 7, seq_no: 9, data: b"abcdefgh" });
    }
}
