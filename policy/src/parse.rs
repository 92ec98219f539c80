//! Reads a flow key and what connection tracking needs from a private copy of a frame's first bytes.
//!
//! Ethernet II, up to two VLAN tags, IPv4 with options, IPv6 with up to [`EXTENSIONS_MAX`] extension headers, TCP, UDP,
//! SCTP and UDP-Lite ports, ICMP and ICMPv6 with the packet that an error speaks about, fragments. Unfragmented TCP and UDP
//! without IP options takes a straight line; everything else one general walk. Both give the same (there is a test).
//!
//! Whatever cannot be read to the end that matters, or contradicts itself, is [`Parsed::Unreadable`], which no rule allows.

use crate::key::{Family, ICMP, ICMPV6, IcmpRole, Key, TCP, UDP, icmp_role, protocol_has_ports};
use crate::tcp::Segment;

/// IPv6 extension headers that are looked behind. Real traffic has one or two.
pub const EXTENSIONS_MAX: usize = 8;
/// VLAN tags that are looked behind (QinQ).
pub const VLAN_TAGS_MAX: usize = 2;

const ETHERNET_BYTES: usize = 14;
const IPV4_BYTES: usize = 20;
const IPV6_BYTES: usize = 40;
const UDP_BYTES: usize = 8;
/// Fixed part of an ICMP message; also what an ICMP error must quote of a transport header (RFC 792).
const ICMP_BYTES: usize = 8;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_QINQ: u16 = 0x88a8;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// A frame, as far as policy is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// IPv4 or IPv6.
    Ip(Packet),
    /// ARP, which the source guard looks into.
    Arp,
    /// Another EtherType (or an LLC length).
    Other(u16),
    /// Headers that could not be read to their end. Nothing allows them.
    Unreadable,
}

/// An IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Who speaks to whom. A later fragment has no ports.
    pub key: Key,
    /// Its place in a fragmented datagram.
    pub fragment: Fragment,
    /// What is behind the ports.
    pub transport: Transport,
}

/// Place in a fragmented datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragment {
    /// Not fragmented, or an atomic fragment (RFC 6946).
    Whole,
    /// The first one: it has the ports.
    First {
        /// Identification.
        id: u32,
        /// Bytes of the datagram in it: where later ones may start.
        end_bytes: u16,
    },
    /// One behind the first.
    Later {
        /// Identification.
        id: u32,
        /// Where it starts in the datagram.
        offset_bytes: u16,
    },
}

/// What is behind the ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp(Segment),
    /// An ICMP error; the packet it quotes, if that can be read.
    IcmpError(Option<Quoted>),
    /// Nothing that is looked at.
    Other,
}

/// The packet that an ICMP error quotes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quoted {
    /// Its flow, in its own direction.
    pub key: Key,
    /// Its TCP sequence number.
    pub sequence: Option<u32>,
}

/// Parses. `header` holds the frame's first bytes, `frame_bytes` is the length of the whole frame.
#[inline]
#[must_use]
pub fn parse(header: &[u8], frame_bytes: usize) -> Parsed {
    let mut parsed = Parsed::Unreadable;
    parse_into(header, frame_bytes, &mut parsed);
    parsed
}

/// The same, written where it is to be: a copy of what was just written in parts would wait for it.
#[inline]
pub fn parse_into(header: &[u8], frame_bytes: usize, into: &mut Parsed) {
    if straight(header, frame_bytes, into).is_none() {
        *into = general(header, frame_bytes);
    }
}

/// The common case: an untagged, unfragmented TCP or UDP packet without IP options or extension headers.
#[inline(always)]
fn straight(header: &[u8], frame_bytes: usize, into: &mut Parsed) -> Option<()> {
    let ethernet: &[u8; ETHERNET_BYTES] = header.first_chunk()?;
    match [ethernet[12], ethernet[13]] {
        [8, 0] => {
            let ip: &[u8; IPV4_BYTES] = header[ETHERNET_BYTES..].first_chunk()?;
            let fragmented = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff != 0;
            let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
            if ip[0] != 0x45 || fragmented || total < IPV4_BYTES || total > frame_bytes.checked_sub(ETHERNET_BYTES)? {
                return None;
            }
            let rest = &header[ETHERNET_BYTES + IPV4_BYTES..];
            with_ports(ip[9], rest, total - IPV4_BYTES, into, |ports| with(ipv4_key(ip), ports))
        }
        [0x86, 0xdd] => {
            let ip: &[u8; IPV6_BYTES] = header[ETHERNET_BYTES..].first_chunk()?;
            let payload_bytes = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
            if ip[0] >> 4 != 6 || payload_bytes > frame_bytes.checked_sub(ETHERNET_BYTES + IPV6_BYTES)? {
                return None;
            }
            let rest = &header[ETHERNET_BYTES + IPV6_BYTES..];
            with_ports(ip[6], rest, payload_bytes, into, |ports| with(ipv6_key(ip), ports))
        }
        _ => None,
    }
}

/// A whole TCP or UDP packet, whose key is `key` of its ports.
#[inline(always)]
fn with_ports(
    protocol: u8,
    rest: &[u8],
    payload_bytes: usize,
    into: &mut Parsed,
    key: impl Fn([u16; 2]) -> Key,
) -> Option<()> {
    let fragment = Fragment::Whole;
    match protocol {
        TCP => {
            let transport = Transport::Tcp(Segment::parse(rest, payload_bytes)?);
            *into = Parsed::Ip(Packet { key: key(ports(rest)?), fragment, transport });
        }
        UDP => {
            let udp: &[u8; UDP_BYTES] = rest.first_chunk()?;
            let length = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
            if length < UDP_BYTES || length > payload_bytes {
                return None;
            }
            *into = Parsed::Ip(Packet { key: key(ports(rest)?), fragment, transport: Transport::Other });
        }
        _ => return None,
    }
    Some(())
}

/// Source and destination.
#[inline(always)]
fn ports(rest: &[u8]) -> Option<[u16; 2]> {
    let &[a, b, c, d] = rest.first_chunk()?;
    Some([u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])])
}

#[inline(always)]
fn with(key: Key, [source_port, destination_port]: [u16; 2]) -> Key {
    Key { source_port, destination_port, ..key }
}

#[inline(always)]
fn ipv4_key(ip: &[u8; IPV4_BYTES]) -> Key {
    Key {
        source: u32::from_be_bytes([ip[12], ip[13], ip[14], ip[15]]).into(),
        destination: u32::from_be_bytes([ip[16], ip[17], ip[18], ip[19]]).into(),
        source_port: 0,
        destination_port: 0,
        protocol: ip[9],
        family: Family::V4,
    }
}

#[inline(always)]
fn ipv6_key(ip: &[u8; IPV6_BYTES]) -> Key {
    let address = |at: usize| u128::from_be_bytes(*ip[at..].first_chunk().expect("16 of 40 bytes"));
    Key {
        source: address(8),
        destination: address(24),
        source_port: 0,
        destination_port: 0,
        protocol: ip[6],
        family: Family::V6,
    }
}

/// Every other frame.
fn general(header: &[u8], frame_bytes: usize) -> Parsed {
    let mut at = ETHERNET_BYTES;
    let Some(mut ethertype) = be16(header, at - 2) else { return Parsed::Unreadable };
    for _ in 0..VLAN_TAGS_MAX {
        if !matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_QINQ) {
            break;
        }
        at += 4;
        let Some(behind) = be16(header, at - 2) else { return Parsed::Unreadable };
        ethertype = behind;
    }
    let Some(packet_bytes) = frame_bytes.checked_sub(at) else { return Parsed::Unreadable };
    let Some(packet) = header.get(at..) else { return Parsed::Unreadable };
    let packet = &packet[..packet.len().min(packet_bytes)];
    let parsed = match ethertype {
        ETHERTYPE_IPV4 => ipv4(packet, packet_bytes),
        ETHERTYPE_IPV6 => ipv6(packet, packet_bytes),
        ETHERTYPE_ARP => return Parsed::Arp,
        // A third tag: what is behind it was not looked at.
        ETHERTYPE_VLAN | ETHERTYPE_QINQ => None,
        other => return Parsed::Other(other),
    };
    parsed.map_or(Parsed::Unreadable, Parsed::Ip)
}

/// RFC 791 §3.1.
fn ipv4(packet: &[u8], packet_bytes: usize) -> Option<Packet> {
    let ip: &[u8; IPV4_BYTES] = packet.first_chunk()?;
    let header_bytes = usize::from(ip[0] & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    if ip[0] >> 4 != 4 || header_bytes < IPV4_BYTES || total < header_bytes || total > packet_bytes {
        return None;
    }
    let payload_bytes = total - header_bytes;
    let field = u16::from_be_bytes([ip[6], ip[7]]);
    let id = u16::from_be_bytes([ip[4], ip[5]]).into();
    let fragment = fragment(id, (field & 0x1fff) << 3, field & 0x2000 != 0, payload_bytes)?;
    behind_ip(ipv4_key(ip), fragment, packet.get(header_bytes..)?, payload_bytes)
}

/// RFC 8200 §3 and §4.
fn ipv6(packet: &[u8], packet_bytes: usize) -> Option<Packet> {
    let ip: &[u8; IPV6_BYTES] = packet.first_chunk()?;
    let mut payload_bytes = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
    if ip[0] >> 4 != 6 || payload_bytes > packet_bytes - IPV6_BYTES {
        return None;
    }
    let mut key = ipv6_key(ip);
    let mut rest = &packet[IPV6_BYTES..];
    let mut fragmented = Fragment::Whole;
    for _ in 0..=EXTENSIONS_MAX {
        let Some(extension_bytes) = extension_bytes(key.protocol, rest) else {
            return behind_ip(key, fragmented, rest, payload_bytes);
        };
        let extension = rest.get(..extension_bytes?)?;
        payload_bytes = payload_bytes.checked_sub(extension.len())?;
        rest = &rest[extension.len()..];
        if key.protocol == FRAGMENT {
            // Two fragment headers: what they would be reassembled to was not looked at.
            if fragmented != Fragment::Whole {
                return None;
            }
            let field = u16::from_be_bytes([extension[2], extension[3]]);
            let id = u32::from_be_bytes([extension[4], extension[5], extension[6], extension[7]]);
            fragmented = fragment(id, field & 0xfff8, field & 1 != 0, payload_bytes)?;
        }
        key.protocol = extension[0];
        if let Fragment::Later { .. } = fragmented {
            return Some(Packet { key, fragment: fragmented, transport: Transport::Other });
        }
    }
    None
}

/// Length of the extension header at `rest`: `None` if the protocol is none, `Some(None)` if it is cut off.
fn extension_bytes(protocol: u8, rest: &[u8]) -> Option<Option<usize>> {
    let length = rest.get(1).copied().map(usize::from);
    match protocol {
        HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => Some(length.map(|length| (length + 1) * 8)),
        FRAGMENT => Some(Some(8)),
        // RFC 4302 §2.2: in units of 4 bytes, minus 2.
        AUTHENTICATION => Some(length.map(|length| (length + 2) * 4)),
        _ => None,
    }
}

fn fragment(id: u32, offset_bytes: u16, more: bool, payload_bytes: usize) -> Option<Fragment> {
    let end_bytes = u16::try_from(usize::from(offset_bytes) + payload_bytes).ok();
    // RFC 791: all but the last carry a multiple of 8 bytes; nothing may end beyond 65,535 (the "ping of death").
    if (more && !payload_bytes.is_multiple_of(8)) || (offset_bytes != 0 && end_bytes.is_none()) {
        return None;
    }
    Some(match (offset_bytes, more) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First { id, end_bytes: end_bytes? },
        _ => Fragment::Later { id, offset_bytes },
    })
}

/// The transport header. `payload_bytes` counts from `rest` to the end of the packet, which may be beyond the copy.
fn behind_ip(mut key: Key, fragment: Fragment, rest: &[u8], payload_bytes: usize) -> Option<Packet> {
    if let Fragment::Later { .. } = fragment {
        return Some(Packet { key, fragment, transport: Transport::Other });
    }
    let rest = &rest[..rest.len().min(payload_bytes)];
    let mut transport = Transport::Other;
    if fragment == Fragment::Whole && matches!(key.protocol, TCP | UDP) {
        let mut parsed = Parsed::Unreadable;
        with_ports(key.protocol, rest, payload_bytes, &mut parsed, |ports| with(key, ports))?;
        return if let Parsed::Ip(packet) = parsed { Some(packet) } else { None };
    }
    if key.protocol == TCP {
        transport = Transport::Tcp(Segment { fragmented: true, ..Segment::parse(rest, payload_bytes)? });
    }
    if protocol_has_ports(key.protocol) {
        rest.first_chunk::<UDP_BYTES>()?;
        key = with(key, ports(rest)?);
    } else if key.is_icmp() {
        transport = icmp(&mut key, rest)?;
    }
    Some(Packet { key, fragment, transport })
}

fn icmp(key: &mut Key, rest: &[u8]) -> Option<Transport> {
    let message: &[u8; ICMP_BYTES] = rest.first_chunk()?;
    key.destination_port = u16::from_be_bytes([message[0], message[1]]);
    Some(match icmp_role(key.family, message[0]) {
        IcmpRole::Query { .. } | IcmpRole::Answer { .. } => {
            key.source_port = u16::from_be_bytes([message[4], message[5]]);
            Transport::Other
        }
        IcmpRole::Error => Transport::IcmpError(quoted(key.family, &rest[ICMP_BYTES..])),
        IcmpRole::Other => Transport::Other,
    })
}

/// The head of the packet that an ICMP error quotes (RFC 792, RFC 4443 §2.4). Its lengths are those of the original packet.
fn quoted(family: Family, packet: &[u8]) -> Option<Quoted> {
    let (mut key, rest) = match family {
        Family::V4 => {
            let ip: &[u8; IPV4_BYTES] = packet.first_chunk()?;
            let header_bytes = usize::from(ip[0] & 0x0f) * 4;
            let later = u16::from_be_bytes([ip[6], ip[7]]) & 0x1fff != 0;
            if ip[0] >> 4 != 4 || header_bytes < IPV4_BYTES || later {
                return None;
            }
            (ipv4_key(ip), packet.get(header_bytes..)?)
        }
        Family::V6 => {
            let ip: &[u8; IPV6_BYTES] = packet.first_chunk()?;
            if ip[0] >> 4 != 6 {
                return None;
            }
            let mut key = ipv6_key(ip);
            let mut rest = &packet[IPV6_BYTES..];
            for _ in 0..EXTENSIONS_MAX {
                let Some(bytes) = extension_bytes(key.protocol, rest) else { break };
                let (extension, behind) = rest.split_at_checked(bytes?)?;
                if key.protocol == FRAGMENT && u16::from_be_bytes([extension[2], extension[3]]) & 0xfff8 != 0 {
                    return None;
                }
                key.protocol = extension[0];
                rest = behind;
            }
            if extension_bytes(key.protocol, rest).is_some() {
                return None;
            }
            (key, rest)
        }
    };
    if protocol_has_ports(key.protocol) {
        key = with(key, ports(rest)?);
    } else if matches!((family, key.protocol), (Family::V4, ICMP) | (Family::V6, ICMPV6)) {
        // An error about an error is never sent (RFC 1122 §3.2.2).
        if let Transport::IcmpError(_) = icmp_head(&mut key, rest)? {
            return None;
        }
    }
    let sequence = match key.protocol {
        TCP => Some(u32::from_be_bytes(*rest.get(4..)?.first_chunk()?)),
        _ => None,
    };
    Some(Quoted { key, sequence })
}

/// As [`icmp`], but looks into no further packet.
fn icmp_head(key: &mut Key, rest: &[u8]) -> Option<Transport> {
    icmp(key, rest.get(..ICMP_BYTES)?)
}

#[inline]
fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|pair| u16::from_be_bytes(*pair))
}

#[cfg(test)]
#[path = "parse_tests.rs"]
mod tests;
