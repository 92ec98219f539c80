//! How prefixes, protocols, ports and ICMP types are written: the words of rules, read and shown.
//!
//! What is shown is read again as the same value.

use std::net::IpAddr;

use dreamwire_policy::key::protocol_has_ports;
use dreamwire_policy::{Direction, Family, IcmpKind, PortRange, Posture, Prefix, Protocol};

const PROTOCOLS: [(&str, Protocol); 6] = [
    ("any", Protocol::Any),
    ("tcp", Protocol::Tcp),
    ("udp", Protocol::Udp),
    ("icmp", Protocol::Icmp),
    ("icmpv6", Protocol::Icmpv6),
    ("sctp", Protocol::Number(132)),
];

/// RFC 792, RFC 1256, as `ip` and nftables call them.
const ICMP_KINDS: [(&str, u8); 11] = [
    ("echo-reply", 0),
    ("destination-unreachable", 3),
    ("source-quench", 4),
    ("redirect", 5),
    ("echo-request", 8),
    ("router-advertisement", 9),
    ("router-solicitation", 10),
    ("time-exceeded", 11),
    ("parameter-problem", 12),
    ("timestamp-request", 13),
    ("timestamp-reply", 14),
];

/// RFC 4443, RFC 4861. Neighbour discovery and multicast listener messages always pass, so most have no name here.
const ICMPV6_KINDS: [(&str, u8); 7] = [
    ("destination-unreachable", 1),
    ("packet-too-big", 2),
    ("time-exceeded", 3),
    ("parameter-problem", 4),
    ("echo-request", 128),
    ("echo-reply", 129),
    ("redirect", 137),
];

pub(super) const DIRECTIONS: [(&str, Direction); 2] = [("ingress", Direction::Ingress), ("egress", Direction::Egress)];
pub(super) const POSTURES: [(&str, Posture); 2] = [("open", Posture::Open), ("enforced", Posture::Enforced)];

/// The word for a direction.
pub const fn direction_word(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// The word for a posture.
pub const fn posture_word(posture: Posture) -> &'static str {
    match posture {
        Posture::Open => "open",
        Posture::Enforced => "enforced",
    }
}

/// A prefix, or an address as the prefix of itself.
pub(super) fn prefix(text: &str) -> Result<Prefix, String> {
    let wrong = || format!("{text:?} is not a prefix: expected one like 10.1.0.0/16 or fd00::/8");
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length.parse::<u8>().map_err(|_| wrong())?)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let length = length.unwrap_or(Family::of(address).bits());
    let prefix = Prefix::new(address, length).map_err(|error| error.to_string())?;
    match prefix.address() == address {
        true => Ok(prefix),
        false => Err(format!("{text} has bits set behind its length: write {}", prefix_text(prefix))),
    }
}

pub(super) fn prefix_text(prefix: Prefix) -> String {
    format!("{}/{}", prefix.address(), prefix.length())
}

/// A protocol's name or number.
pub(crate) fn protocol(text: &str) -> Result<Protocol, String> {
    if let Some((_, protocol)) = PROTOCOLS.iter().find(|(word, _)| *word == text) {
        return Ok(*protocol);
    }
    let number: u8 = text.parse().map_err(|_| {
        let words = PROTOCOLS.map(|(word, _)| word).join(", ");
        format!("{text:?} is not a protocol; there are {words} and numbers, 0 to 255")
    })?;
    // TCP and UDP by number are the same rules. ICMP by number is not: that is meant for both families.
    Ok(match number {
        6 => Protocol::Tcp,
        17 => Protocol::Udp,
        number => Protocol::Number(number),
    })
}

pub(super) fn protocol_text(protocol: Protocol) -> String {
    match PROTOCOLS.iter().find(|(_, known)| *known == protocol) {
        Some((word, _)) => (*word).to_owned(),
        None => protocol.number().map_or_else(String::new, |number| number.to_string()),
    }
}

/// A protocol number as people call it.
pub fn protocol_name(number: u8, family: Family) -> String {
    match (number, family) {
        (1, Family::V4) => "icmp".to_owned(),
        (58, Family::V6) => "icmpv6".to_owned(),
        (6, _) => "tcp".to_owned(),
        (17, _) => "udp".to_owned(),
        _ => protocol_text(Protocol::Number(number)),
    }
}

pub(crate) fn has_ports(protocol: Protocol) -> bool {
    protocol.number().is_some_and(protocol_has_ports)
}

/// A port, or a range of ports.
pub(super) fn port_range(text: &str) -> Result<PortRange, String> {
    let wrong = || format!("{text:?} is not a port: expected one like 443, or a range like 8000-8080");
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let first = first.trim().parse().map_err(|_| wrong())?;
    let last = last.trim().parse().map_err(|_| wrong())?;
    match first <= last {
        true => Ok(PortRange { first, last }),
        false => Err(format!("{text:?} is upside down: write {last}-{first}")),
    }
}

pub(super) fn port_range_text(range: PortRange) -> String {
    match range.first == range.last {
        true => range.first.to_string(),
        false => format!("{}-{}", range.first, range.last),
    }
}

fn icmp_kinds(protocol: Protocol) -> &'static [(&'static str, u8)] {
    if protocol == Protocol::Icmpv6 { &ICMPV6_KINDS } else { &ICMP_KINDS }
}

/// A type of ICMP message by name or number, perhaps with a code: `echo-request`, `3/4`.
pub(crate) fn icmp_kind(protocol: Protocol, text: &str) -> Result<IcmpKind, String> {
    let known = icmp_kinds(protocol);
    let wrong = || {
        let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        format!("{text:?} is not an ICMP type: expected a number, or one of {}; with a code: 3/4", names.join(", "))
    };
    let (kind, code) = match text.split_once('/') {
        Some((kind, code)) => (kind, Some(code.parse().map_err(|_| wrong())?)),
        None => (text, None),
    };
    let named = known.iter().find(|(name, _)| *name == kind).map(|(_, number)| *number);
    let kind = named.map_or_else(|| kind.parse(), Ok).map_err(|_| wrong())?;
    Ok(IcmpKind { kind, code })
}

pub(super) fn icmp_kind_text(protocol: Protocol, kind: IcmpKind) -> String {
    let named = icmp_kinds(protocol).iter().find(|(_, number)| *number == kind.kind);
    let name = named.map_or_else(|| kind.kind.to_string(), |(name, _)| (*name).to_owned());
    match kind.code {
        Some(code) => format!("{name}/{code}"),
        None => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_read_again() {
        for text in ["any", "tcp", "udp", "icmp", "icmpv6", "sctp", "47", "1", "58"] {
            assert_eq!(protocol_text(protocol(text).unwrap()), text);
        }
        assert_eq!(protocol("6"), Ok(Protocol::Tcp));
        for text in ["443", "8000-8080", "0-65535"] {
            assert_eq!(port_range_text(port_range(text).unwrap()), text);
        }
        for text in ["10.0.0.0/8", "0.0.0.0/0", "fd00::/8", "192.0.2.1/32"] {
            assert_eq!(prefix_text(prefix(text).unwrap()), text);
        }
        assert_eq!(prefix_text(prefix("fd00::1").unwrap()), "fd00::1/128");
        for (protocol, kinds) in [(Protocol::Icmp, ICMP_KINDS.as_slice()), (Protocol::Icmpv6, &ICMPV6_KINDS)] {
            for (name, number) in kinds {
                assert_eq!(icmp_kind(protocol, &number.to_string()), icmp_kind(protocol, name));
                assert_eq!(icmp_kind_text(protocol, icmp_kind(protocol, name).unwrap()), *name);
            }
            assert_eq!(icmp_kind_text(protocol, icmp_kind(protocol, "200/7").unwrap()), "200/7");
        }
        assert_eq!(icmp_kind(Protocol::Icmp, "3/4"), Ok(IcmpKind { kind: 3, code: Some(4) }));
    }

    #[test]
    fn mistakes_say_what_to_write() {
        assert!(prefix("10.1.2.3/16").unwrap_err().contains("write 10.1.0.0/16"));
        for text in ["10.0.0.0/33", "10.0.0/8", "/8", "fd00::/129", "10.0.0.0/-1"] {
            assert!(prefix(text).is_err(), "{text}");
        }
        assert!(port_range("80-79").unwrap_err().contains("write 79-80"));
        for text in ["", "-", "65536", "1-", "a"] {
            assert!(port_range(text).is_err(), "{text}");
        }
        assert!(protocol("256").is_err() && protocol("tpc").is_err());
        assert!(icmp_kind(Protocol::Icmp, "packet-too-big").is_err() && icmp_kind(Protocol::Icmp, "3/256").is_err());
    }
}
