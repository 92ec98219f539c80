//! Where a checksum that a guest left undone may be written: nowhere that guard, rules or switch have looked at.
//!
//! The sender chooses the place, and with one word of the payload the value. So that what is sent is what was judged, it is the
//! checksum field of the packet's own transport header, or lies behind everything that is ever read (the inner headers of a guest's
//! own tunnels).

use crate::offload::{TCP, UDP};
use crate::stage::parse::{ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, network_layer};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const UDP_LITE: u8 = 136;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION_OPTIONS: u8 = 60;
/// IPv6 extension headers that are looked behind: as many as policy does.
const EXTENSIONS_MAX: usize = 8;

/// Whether two bytes may be written at byte `at` of a frame with this header copy.
pub(crate) fn is_allowed(header: &[u8], at: usize) -> bool {
    let Some((ethertype, packet)) = network_layer(header) else { return false };
    let network_at = header.len() - packet.len();
    match ethertype {
        ETHERTYPE_ARP => false,
        ETHERTYPE_IPV4 => ipv4(packet, network_at, at).unwrap_or(false),
        ETHERTYPE_IPV6 => ipv6(packet, network_at, at).unwrap_or(false),
        // Nothing behind the EtherType is looked at.
        _ => at >= network_at,
    }
}

/// RFC 791 §3.1. A fragment's checksum is never left undone.
fn ipv4(packet: &[u8], network_at: usize, at: usize) -> Option<bool> {
    let header_bytes = usize::from(packet.first()? & 0x0f) * 4;
    let is_fragment = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff != 0;
    if header_bytes < 20 || is_fragment {
        return None;
    }
    transport(*packet.get(9)?, packet.get(header_bytes..)?, network_at + header_bytes, at)
}

/// RFC 8200 §4.
fn ipv6(packet: &[u8], network_at: usize, at: usize) -> Option<bool> {
    let mut protocol = *packet.get(6)?;
    let mut transport_at = 40;
    for _ in 0..=EXTENSIONS_MAX {
        let rest = packet.get(transport_at..)?;
        if !matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS) {
            // Fragment and authentication headers among the others: see there.
            return transport(protocol, rest, network_at + transport_at, at);
        }
        protocol = *rest.first()?;
        transport_at += (usize::from(*rest.get(1)?) + 1) * 8;
    }
    None
}

fn transport(protocol: u8, header: &[u8], start: usize, at: usize) -> Option<bool> {
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    let (field, bytes) = match protocol {
        TCP => (Some(16), usize::from(header.get(12)? >> 4) * 4),
        UDP | UDP_LITE => (Some(6), 8),
        SCTP => (None, 12),
        // All of it may be looked at: quoted packets, neighbours.
        ICMP | ICMPV6 => (Some(2), usize::MAX),
        FRAGMENT | AUTHENTICATION => return None,
        _ => (None, 0),
    };
    let behind = at.checked_sub(start)?;
    Some(Some(behind) == field || behind >= bytes.max(if protocol == TCP { 20 } else { 0 }))
}

#[cfg(test)]
mod tests {
    use dreamwire_policy::parse;
    use proptest::prelude::*;

    use super::*;
    use crate::claim::claim;

    fn frame(ethertype: u16, packet: &[u8]) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        frame.extend(ethertype.to_be_bytes());
        frame.extend(packet);
        frame.resize(100, 0x5a);
        frame
    }

    fn ipv4_frame(protocol: u8) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 86, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0x10, 0, 0, 53, 0, 66, 0, 0, 0, 0, 0, 0, 0x60, 0x10, 1, 0, 0, 0, 0, 0, 3, 3, 7, 0]);
        frame(ETHERTYPE_IPV4, &packet)
    }

    fn ipv6_frame(protocol: u8) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 46, protocol, 64];
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        packet.extend([0x10, 0, 0, 53, 0, 46, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
        frame(ETHERTYPE_IPV6, &packet)
    }

    fn places(frame: &[u8]) -> Vec<usize> {
        (0..frame.len() - 1).filter(|&at| is_allowed(frame, at)).collect()
    }

    #[test]
    fn the_field_itself_and_what_is_behind_all_headers() {
        let behind = |at: usize, from: usize| -> Vec<usize> { [at].into_iter().chain(from..99).collect() };
        assert_eq!(places(&ipv4_frame(UDP)), behind(40, 42));
        assert_eq!(places(&ipv4_frame(TCP)), behind(50, 58), "behind its options");
        assert_eq!(places(&ipv6_frame(UDP)), behind(60, 62));
        assert_eq!(places(&ipv6_frame(TCP)), behind(70, 74));
        assert_eq!(places(&ipv4_frame(ICMP)), [36]);
        assert_eq!(places(&ipv6_frame(ICMPV6)), [56]);
        assert_eq!(places(&ipv4_frame(47)), (34..99).collect::<Vec<_>>(), "a tunnel of the guest's own");
        assert!(places(&frame(ETHERTYPE_ARP, &[0, 1, 8, 0, 6, 4, 0, 1])).is_empty());
        assert_eq!(places(&frame(0x88b5, &[])), (14..99).collect::<Vec<_>>());
        let mut fragment = ipv4_frame(UDP);
        fragment[20] = 0x20;
        assert!(places(&fragment).is_empty());
    }

    proptest! {
        #[test]
        fn what_was_judged_stays(bytes in proptest::collection::vec(any::<u8>(), 100), kind in 0..8usize, at in 0..98usize, value: u16) {
            let mut frame = match kind {
                0 => ipv4_frame(UDP),
                1 => ipv4_frame(TCP),
                2 => ipv6_frame(UDP),
                3 => ipv6_frame(TCP),
                4 => ipv4_frame(ICMP),
                5 => ipv6_frame(ICMPV6),
                6 => frame(ETHERTYPE_ARP, &bytes[..28]),
                _ => { let mut any = ipv4_frame(UDP); any[14..60].copy_from_slice(&bytes[14..60]); any }
            };
            let judged = |frame: &[u8]| (parse(frame, frame.len()), claim(frame, frame.len() as u32));
            let before = judged(&frame);
            if is_allowed(&frame, at) {
                frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
                prop_assert_eq!(judged(&frame), before);
            }
        }
    }
}
