//! Reads from a frame's header copy what it claims about its sender, for the source guard.
//!
//! Whatever cannot be read to the end that matters is [`Claim::Unreadable`]: headers that reach beyond the copy, too many
//! VLAN tags or extension headers, neighbour discovery in fragments (RFC 6980).

use dreamwire_policy::Claim;
use smoltcp::wire::{ArpHardware, ArpPacket, ArpRepr};

use crate::stage::parse::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_VLAN, network_layer,
};

/// IPv6 extension headers that are looked behind. Real traffic has one or two.
const EXTENSIONS_MAX: usize = 4;

const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// What the frame with this header copy claims. `frame_bytes` is its whole length.
#[inline]
pub(crate) fn claim(header: &[u8], frame_bytes: u32) -> Claim {
    let Some((ethertype, packet)) = network_layer(header) else { return Claim::Unreadable };
    let whole = header.len() == frame_bytes as usize;
    let claim = match ethertype {
        ETHERTYPE_IPV4 => ipv4(packet),
        ETHERTYPE_ARP => arp(packet),
        ETHERTYPE_IPV6 => ipv6(packet, whole),
        // A third tag: what is behind it was not looked at.
        ETHERTYPE_VLAN | ETHERTYPE_QINQ => None,
        _ => Some(Claim::None),
    };
    claim.unwrap_or(Claim::Unreadable)
}

/// RFC 826, over Ethernet and IPv4 (anything else is unreadable).
fn arp(packet: &[u8]) -> Option<Claim> {
    let packet = ArpPacket::new_checked(packet).ok()?;
    if packet.hardware_type() != ArpHardware::Ethernet {
        return None;
    }
    let ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, .. } = ArpRepr::parse(&packet).ok()? else {
        return None;
    };
    Some(Claim::Arp { mac: source_hardware_addr.0, address: source_protocol_addr })
}

/// RFC 791 §3.1.
fn ipv4(packet: &[u8]) -> Option<Claim> {
    let [version_length, ..] = *packet else { return None };
    let header_bytes = usize::from(version_length & 0x0f) * 4;
    if version_length >> 4 != 4 || header_bytes < 20 || packet.len() < header_bytes {
        return None;
    }
    let source = <[u8; 4]>::try_from(&packet[12..16]).ok()?.into();
    let follows_another = u16::from_be_bytes([packet[6], packet[7]]) & 0x1fff != 0;
    if packet[9] != UDP || follows_another {
        return Some(Claim::Ipv4 { source });
    }
    Some(match udp_ports(&packet[header_bytes..])? {
        (67, _) => Claim::Authority,
        (68, 67) => Claim::DhcpClient { source },
        _ => Claim::Ipv4 { source },
    })
}

/// RFC 8200 §3 and §4. `whole` says that nothing is behind the copy.
fn ipv6(packet: &[u8], whole: bool) -> Option<Claim> {
    let (header, mut rest) = packet.split_at_checked(40)?;
    if header[0] >> 4 != 6 {
        return None;
    }
    let source = <[u8; 16]>::try_from(&header[8..24]).ok()?.into();
    let mut next = header[6];
    let mut fragment = false;
    for _ in 0..=EXTENSIONS_MAX {
        match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                // Length in units of 8 bytes, not counting the first.
                let [following, length, ..] = *rest else { return None };
                rest = rest.get((usize::from(length) + 1) * 8..)?;
                next = following;
            }
            FRAGMENT => {
                let [following, _, high, low, _, _, _, _, ..] = *rest else { return None };
                if u16::from_be_bytes([high, low]) & 0xfff8 != 0 {
                    // Not the first: its header chain went with the first (RFC 7112).
                    return Some(Claim::Ipv6 { source });
                }
                fragment = true;
                rest = &rest[8..];
                next = following;
            }
            UDP => {
                let authority = udp_ports(rest)?.0 == 547;
                return Some(if authority { Claim::Authority } else { Claim::Ipv6 { source } });
            }
            ICMPV6 => return icmpv6(source, rest, fragment, whole),
            _ => return Some(Claim::Ipv6 { source }),
        }
    }
    None
}

/// RFC 4861 §4, RFC 2710, RFC 3810.
fn icmpv6(source: std::net::Ipv6Addr, message: &[u8], fragment: bool, whole: bool) -> Option<Claim> {
    const LISTENER_REPORT: u8 = 131;
    const LISTENER_DONE: u8 = 132;
    const ROUTER_SOLICITATION: u8 = 133;
    const ROUTER_ADVERTISEMENT: u8 = 134;
    const NEIGHBOUR_SOLICITATION: u8 = 135;
    const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
    const REDIRECT: u8 = 137;
    const LISTENER_REPORT_2: u8 = 143;
    let kind = *message.first()?;
    // The fixed part, and whether bytes 8 to 24 are an address that the sender says to own.
    let (fixed_bytes, advertises) = match kind {
        ROUTER_ADVERTISEMENT | REDIRECT => return Some(Claim::Authority),
        LISTENER_REPORT | LISTENER_DONE | LISTENER_REPORT_2 => {
            return Some(Claim::Neighbour { source, advertised: None, mac: None });
        }
        ROUTER_SOLICITATION => (8, false),
        NEIGHBOUR_SOLICITATION => (24, false),
        NEIGHBOUR_ADVERTISEMENT => (24, true),
        _ => return Some(Claim::Ipv6 { source }),
    };
    if fragment || !whole {
        return None;
    }
    let (fixed, options) = message.split_at_checked(fixed_bytes)?;
    let advertised = match advertises {
        true => Some(<[u8; 16]>::try_from(&fixed[8..24]).ok()?.into()),
        false => None,
    };
    Some(Claim::Neighbour { source, advertised, mac: link_layer_option(options)? })
}

/// The address in a source (1) or target (2) link-layer address option, RFC 4861 §4.6.1; `None` inside if there is none.
/// Two that differ are unreadable.
fn link_layer_option(mut options: &[u8]) -> Option<Option<[u8; 6]>> {
    let mut found = None;
    while let [kind, length, ..] = *options {
        // Length in units of 8 bytes; zero is invalid, and longer than the message too.
        let (option, rest) = options.split_at_checked(usize::from(length) * 8).filter(|_| length > 0)?;
        if matches!(kind, 1 | 2) {
            let mac = <[u8; 6]>::try_from(&option[2..8]).ok()?;
            if found.is_some_and(|other| other != mac) {
                return None;
            }
            found = Some(mac);
        }
        options = rest;
    }
    // Ethernet pads short frames: a single byte behind the options is not one.
    Some(found)
}

fn udp_ports(datagram: &[u8]) -> Option<(u16, u16)> {
    let [a, b, c, d, ..] = *datagram else { return None };
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(ethertype: u16, packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![0xff; 6];
        frame.extend([0x52, 0x54, 0, 0, 0, 1]);
        frame.extend(ethertype.to_be_bytes());
        frame.extend(packet);
        frame
    }

    fn of(frame: &[u8]) -> Claim {
        claim(&frame[..frame.len().min(128)], frame.len() as u32)
    }

    fn udp4(source: u16, destination: u16, fragment: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0];
        packet.extend(fragment.to_be_bytes());
        packet.extend([64, UDP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        packet.extend(source.to_be_bytes());
        packet.extend(destination.to_be_bytes());
        packet.extend([0, 8, 0, 0]);
        frame(ETHERTYPE_IPV4, &packet)
    }

    fn packet6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 255];
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        packet.extend([0xff; 16]);
        packet.extend(payload);
        frame(ETHERTYPE_IPV6, &packet)
    }

    fn fd00(last: u16) -> std::net::Ipv6Addr {
        std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, last)
    }

    #[test]
    fn dhcp_is_told_apart_from_other_udp() {
        let source = [10, 0, 0, 1].into();
        assert_eq!(of(&udp4(68, 67, 0)), Claim::DhcpClient { source });
        assert_eq!(of(&udp4(67, 68, 0)), Claim::Authority);
        assert_eq!(of(&udp4(4000, 53, 0)), Claim::Ipv4 { source });
        assert_eq!(of(&udp4(67, 68, 0x00b9)), Claim::Ipv4 { source }, "a later fragment has no ports");
    }

    #[test]
    fn arp_is_its_sender_fields() {
        let packet = [0, 1, 8, 0, 6, 4, 0, 2, 0x52, 0x54, 0, 0, 0, 9, 10, 0, 0, 7, 0, 0, 0, 0, 0, 0, 10, 0, 0, 1];
        let claim = Claim::Arp { mac: [0x52, 0x54, 0, 0, 0, 9], address: [10, 0, 0, 7].into() };
        assert_eq!(of(&frame(ETHERTYPE_ARP, &packet)), claim);
        assert_eq!(of(&frame(ETHERTYPE_ARP, &packet[..27])), Claim::Unreadable);
    }

    #[test]
    fn an_advertisement_claims_its_target_and_its_option() {
        let mut message = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
        message.extend(fd00(2).octets());
        message.extend([2, 1, 0x52, 0x54, 0, 0, 0, 9]);
        let mac = Some([0x52, 0x54, 0, 0, 0, 9]);
        let claim = Claim::Neighbour { source: fd00(1), advertised: Some(fd00(2)), mac };
        assert_eq!(of(&packet6(ICMPV6, &message)), claim);
        let mut twice = message.clone();
        twice.extend([2, 1, 0x52, 0x54, 0, 0, 0, 8]);
        assert_eq!(of(&packet6(ICMPV6, &twice)), Claim::Unreadable);
        let mut endless = message.clone();
        endless.extend([3, 0]);
        assert_eq!(of(&packet6(ICMPV6, &endless)), Claim::Unreadable);
        // Behind an atomic fragment header (RFC 6980), and with options beyond the copy.
        let mut fragment = vec![ICMPV6, 0, 0, 1, 0, 0, 0, 1];
        fragment.extend(&message);
        assert_eq!(of(&packet6(FRAGMENT, &fragment)), Claim::Unreadable);
        message.extend([14, 9].into_iter().chain([0; 70]));
        assert_eq!(of(&packet6(ICMPV6, &message)), Claim::Unreadable);
    }

    #[test]
    fn a_router_advertisement_is_found_behind_extension_headers() {
        let mut message = vec![DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0];
        message.extend([ICMPV6, 0, 1, 4, 0, 0, 0, 0]);
        message.extend([134, 0, 0, 0]);
        assert_eq!(of(&packet6(HOP_BY_HOP, &message)), Claim::Authority);
        let mut far = Vec::new();
        for _ in 0..6 {
            far.extend([DESTINATION_OPTIONS, 0, 1, 4, 0, 0, 0, 0]);
        }
        assert_eq!(of(&packet6(DESTINATION_OPTIONS, &far)), Claim::Unreadable);
    }

    #[test]
    fn tags_are_looked_behind_and_a_third_is_unreadable() {
        let mut tagged = udp4(4000, 53, 0);
        tagged.splice(12..12, [0x81, 0, 0, 7]);
        assert_eq!(of(&tagged), Claim::Ipv4 { source: [10, 0, 0, 1].into() });
        tagged.splice(12..12, [0x81, 0, 0, 7, 0x81, 0, 0, 7]);
        assert_eq!(of(&tagged), Claim::Unreadable);
        assert_eq!(of(&frame(0x88b5, &[1, 2, 3])), Claim::None);
    }

    proptest! {
        #[test]
        fn any_bytes_give_a_claim_without_panic(bytes in proptest::collection::vec(any::<u8>(), 14..200), kind in 0..4usize) {
            let mut bytes = bytes;
            let ethertype = [ETHERTYPE_IPV4, ETHERTYPE_ARP, ETHERTYPE_IPV6, 0x8100][kind];
            bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
            of(&bytes);
        }
    }
}
