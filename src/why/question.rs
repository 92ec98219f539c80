//! A flow as people write it: protocol, source, destination.

use std::net::{IpAddr, SocketAddr};

use dreamwire_datapath::mac::Mac;
use dreamwire_policy::{Family, IcmpKind, Key, Protocol};

use crate::config::notation::{has_ports, icmp_kind, protocol};

/// A source port where none is given: rules do not look at it.
const SOURCE_PORT: u16 = 49152;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The port whose guest sends or receives the flow.
    pub port: String,
    /// Its first packet.
    pub key: Key,
    /// The station that it is sent to, where that is not a port with addresses.
    pub station: Option<Mac>,
    /// What the tunnel header says that it comes by, if it comes by one.
    pub identity: Option<u16>,
}

/// The key of a flow's first packet. `icmp` is the type of an ICMP message, an echo request unless said.
///
/// # Errors
/// What is wrong with the words, and what to write.
pub fn key(protocol_text: &str, source: &str, destination: &str, icmp: Option<&str>) -> Result<Key, String> {
    let protocol = protocol(protocol_text)?;
    let Some(number) = protocol.number() else {
        return Err("a flow has one protocol: name it, as tcp, udp or icmp".to_owned());
    };
    let (source, source_port) = end(source)?;
    let (destination, destination_port) = end(destination)?;
    let family = Family::of(source);
    if family != Family::of(destination) {
        return Err(format!("{source} and {destination} are of two address families"));
    }
    let (is_icmp, name) = match family {
        Family::V4 => (protocol == Protocol::Icmp, "icmp"),
        Family::V6 => (protocol == Protocol::Icmpv6, "icmpv6"),
    };
    if !is_icmp && matches!(protocol, Protocol::Icmp | Protocol::Icmpv6) {
        return Err(format!("{protocol_text} is not of the addresses' family: name {name}"));
    }
    if icmp.is_some() && !is_icmp {
        return Err(format!("{protocol_text} has no ICMP type"));
    }
    if !has_ports(protocol) && (source_port.or(destination_port)).is_some() {
        return Err(format!("{protocol_text} has no ports: write addresses alone"));
    }
    let (source_port, destination_port) = if is_icmp {
        let IcmpKind { kind, code } = icmp_kind(protocol, icmp.unwrap_or("echo-request"))?;
        (0, u16::from_be_bytes([kind, code.unwrap_or(0)]))
    } else if has_ports(protocol) {
        let wrong =
            || format!("the destination has no port: write it as {destination}:443, an IPv6 address in brackets");
        (source_port.unwrap_or(SOURCE_PORT), destination_port.ok_or_else(wrong)?)
    } else {
        (0, 0)
    };
    Ok(Key::new(number, (source, source_port), (destination, destination_port)))
}

/// An address, perhaps with a port: `10.0.0.1:443`, `[fd00::1]:443`, `fd00::1`.
fn end(text: &str) -> Result<(IpAddr, Option<u16>), String> {
    if let Ok(socket) = text.parse::<SocketAddr>() {
        return Ok((socket.ip(), Some(socket.port())));
    }
    let address = text.trim_start_matches('[').trim_end_matches(']').parse();
    let address = address.map_err(|_| format!("{text:?} is not an address: expected 10.0.0.1:443, [fd00::1]:443"))?;
    Ok((address, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_read_as_people_write_them() {
        let flow = key("tcp", "10.0.0.1:40000", "10.0.0.2:443", None).unwrap();
        assert_eq!(flow, Key::new(6, ("10.0.0.1".parse().unwrap(), 40000), ("10.0.0.2".parse().unwrap(), 443)));
        let flow = key("udp", "fd00::1", "[fd00::2]:53", None).unwrap();
        assert_eq!((flow.source_port, flow.destination_port, flow.family), (SOURCE_PORT, 53, Family::V6));
        assert_eq!(key("icmp", "10.0.0.1", "10.0.0.2", None).unwrap().destination_port, 8 << 8);
        assert_eq!(key("icmp", "10.0.0.1", "10.0.0.2", Some("3/4")).unwrap().destination_port, 3 << 8 | 4);
        assert_eq!(key("icmpv6", "fd00::1", "fd00::2", None).unwrap().destination_port, 128 << 8);
        assert_eq!(key("47", "10.0.0.1", "10.0.0.2", None).unwrap().protocol, 47);
    }

    #[test]
    fn mistakes_say_what_to_write() {
        for (words, said) in [
            (("any", "10.0.0.1", "10.0.0.2"), "one protocol"),
            (("tcp", "10.0.0.1", "10.0.0.2"), "no port"),
            (("tcp", "10.0.0.1:1", "[fd00::2]:2"), "two address families"),
            (("icmp", "fd00::1", "fd00::2"), "name icmpv6"),
            (("icmp", "10.0.0.1:1", "10.0.0.2"), "has no ports"),
            (("tcp", "vm1", "10.0.0.2:1"), "not an address"),
        ] {
            let error = key(words.0, words.1, words.2, None).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        assert!(key("tcp", "10.0.0.1", "10.0.0.2:1", Some("8")).is_err());
    }
}
