//! The flow key: what rules and connections are looked up by.
//!
//! Plain values of 40 bytes, made by [`crate::parse()`] from a private header copy. One shape serves every protocol: ICMP
//! has its identifier in place of the source port and type and code in place of the destination port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;
pub(crate) const SCTP: u8 = 132;
pub(crate) const UDP_LITE: u8 = 136;

/// IP version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Bits of an address.
    #[must_use]
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// An address of this family from its number.
    #[must_use]
    pub fn address(self, number: u128) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::from(number as u32).into(),
            Self::V6 => Ipv6Addr::from(number).into(),
        }
    }

    /// Number of an address with its first bit at the top, whatever the family: what prefixes are masked in.
    #[inline]
    pub(crate) fn align(self, number: u128) -> u128 {
        number << (128 - u32::from(self.bits()))
    }

    #[inline]
    pub(crate) fn unaligned(self, bits: u128) -> u128 {
        bits >> (128 - u32::from(self.bits()))
    }

    pub(crate) fn aligned(self, address: IpAddr) -> u128 {
        self.align(number(address))
    }
}

/// An address as a number: IPv4 in the low 32 bits.
#[must_use]
pub fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(address).into(),
        IpAddr::V6(address) => address.into(),
    }
}

/// An IP flow in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Source address as a number.
    pub source: u128,
    /// Destination address as a number.
    pub destination: u128,
    /// Source port; identifier of an ICMP query; else 0.
    pub source_port: u16,
    /// Destination port; type << 8 | code of ICMP; else 0.
    pub destination_port: u16,
    /// IP protocol, behind IPv6 extension headers.
    pub protocol: u8,
    /// IP version.
    pub family: Family,
}

impl Key {
    /// A key from addresses of one family.
    ///
    /// # Panics
    /// When the families differ.
    #[must_use]
    pub fn new(protocol: u8, source: (IpAddr, u16), destination: (IpAddr, u16)) -> Self {
        let family = Family::of(source.0);
        assert_eq!(family, Family::of(destination.0), "a packet has one family");
        Self {
            source: number(source.0),
            destination: number(destination.0),
            source_port: source.1,
            destination_port: destination.1,
            protocol,
            family,
        }
    }

    /// Source address.
    #[must_use]
    pub fn source_address(&self) -> IpAddr {
        self.family.address(self.source)
    }

    /// Destination address.
    #[must_use]
    pub fn destination_address(&self) -> IpAddr {
        self.family.address(self.destination)
    }

    /// Whether it is ICMP of its own family.
    #[inline]
    #[must_use]
    pub const fn is_icmp(&self) -> bool {
        matches!((self.family, self.protocol), (Family::V4, ICMP) | (Family::V6, ICMPV6))
    }

    /// Type of an ICMP message.
    #[inline]
    pub(crate) const fn icmp_kind(&self) -> u8 {
        (self.destination_port >> 8) as u8
    }

    /// What it is as an ICMP message, if it is one.
    #[must_use]
    pub const fn icmp_role(&self) -> Option<IcmpRole> {
        if self.is_icmp() { Some(icmp_role(self.family, self.icmp_kind())) } else { None }
    }

    /// Whether it is a message without which IPv6 does not work on a link: router and neighbour solicitation and
    /// advertisement (RFC 4861), multicast listener messages (RFC 2710, RFC 3810).
    #[inline]
    #[must_use]
    pub const fn is_neighbour_discovery(&self) -> bool {
        matches!(self.family, Family::V6) && self.protocol == ICMPV6 && matches!(self.icmp_kind(), 130..=136 | 143)
    }
}

/// Whether a port pair is the first thing in this protocol's header.
#[inline]
#[must_use]
pub const fn protocol_has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP | UDP_LITE)
}

/// What an ICMP message is to a connection tracker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IcmpRole {
    /// Asks, and the answer has the type given.
    Query {
        /// That type.
        answer: u8,
    },
    /// Answers a query of the type given.
    Answer {
        /// That type.
        query: u8,
    },
    /// Speaks about another packet.
    Error,
    /// Anything else.
    Other,
}

/// RFC 792, RFC 950, RFC 4443, RFC 4620.
#[inline]
pub(crate) const fn icmp_role(family: Family, kind: u8) -> IcmpRole {
    match (family, kind) {
        (Family::V4, 8) => IcmpRole::Query { answer: 0 },
        (Family::V4, 13 | 15 | 17) => IcmpRole::Query { answer: kind + 1 },
        (Family::V4, 0) => IcmpRole::Answer { query: 8 },
        (Family::V4, 14 | 16 | 18) => IcmpRole::Answer { query: kind - 1 },
        (Family::V4, 3 | 4 | 5 | 11 | 12) => IcmpRole::Error,
        (Family::V6, 128 | 139) => IcmpRole::Query { answer: kind + 1 },
        (Family::V6, 129 | 140) => IcmpRole::Answer { query: kind - 1 },
        (Family::V6, 0..=127) => IcmpRole::Error,
        _ => IcmpRole::Other,
    }
}
