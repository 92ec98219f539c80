//! The key of a connection: one for both directions of its packets.

use std::hash::{Hash, Hasher};

use crate::key::{Family, ICMP, ICMPV6, IcmpRole, Key, TCP, UDP, icmp_role};
use crate::model::Direction;

/// A connection, whichever way its packets go: by its end in the VM and its far end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ConnKey {
    /// The VM's, and the far end's: of IPv4 both in the first word, of IPv6 two words each.
    addresses: [u64; 4],
    /// All else: the VM's port, the far end's (of ICMP: the query's type << 8 | code), the protocol, and two bits.
    rest: u64,
}

/// The bits of [`ConnKey::rest`] below the protocol.
const IS_IPV6: u64 = 2;
/// Of ICMP: the far end asks, so that two pings of each other with one identifier are two connections.
const FAR_END_ASKS: u64 = 1;

impl ConnKey {
    /// The connection of a packet with this key that goes this way.
    #[inline]
    pub(crate) fn new(key: &Key, direction: Direction) -> Self {
        let [local, remote] = ends(key, direction);
        Self::between(local, remote, key.protocol, key.family)
    }

    #[inline]
    fn between(local: (u128, u16), remote: (u128, u16), protocol: u8, family: Family) -> Self {
        let rest = u64::from(local.1) << 48 | u64::from(remote.1) << 32 | u64::from(protocol) << 8;
        match family {
            Family::V4 => Self { addresses: [(local.0 as u64) << 32 | remote.0 as u64, 0, 0, 0], rest },
            Family::V6 => {
                let word = |number: u128, shift: u32| (number >> shift) as u64;
                let addresses = [word(local.0, 64), word(local.0, 0), word(remote.0, 64), word(remote.0, 0)];
                Self { addresses, rest: rest | IS_IPV6 }
            }
        }
    }

    /// The inverse of [`Self::addresses`] and [`Self::rest`].
    pub(crate) const fn from_parts(addresses: [u64; 4], rest: u64) -> Self {
        Self { addresses, rest }
    }

    /// Whether the addresses take more than the first word.
    #[inline]
    pub(crate) const fn is_ipv6(rest: u64) -> bool {
        rest & IS_IPV6 != 0
    }

    #[inline]
    pub(crate) const fn addresses(&self) -> &[u64; 4] {
        &self.addresses
    }

    #[inline]
    pub(crate) const fn rest(&self) -> u64 {
        self.rest
    }

    const fn family(&self) -> Family {
        if Self::is_ipv6(self.rest) { Family::V6 } else { Family::V4 }
    }

    const fn protocol(&self) -> u8 {
        (self.rest >> 8) as u8
    }

    fn ends(&self) -> [(u128, u16); 2] {
        let [a, b, c, d] = self.addresses.map(u128::from);
        let [local, remote] = match self.family() {
            Family::V4 => [a >> 32, a & u128::from(u32::MAX)],
            Family::V6 => [a << 64 | b, c << 64 | d],
        };
        [(local, (self.rest >> 48) as u16), (remote, (self.rest >> 32) as u16)]
    }

    /// The key of a packet of the connection that goes this way.
    pub(crate) fn key(&self, direction: Direction) -> Key {
        let [local, remote] = self.ends();
        let (source, destination) = match direction {
            Direction::Egress => (local, remote),
            Direction::Ingress => (remote, local),
        };
        let (protocol, family) = (self.protocol(), self.family());
        // Those of ICMP are the same both ways.
        let is_icmp = matches!((family, protocol), (Family::V4, ICMP) | (Family::V6, ICMPV6));
        let ports = if is_icmp { (local.1, remote.1) } else { (source.1, destination.1) };
        Key {
            source: source.0,
            destination: destination.0,
            source_port: ports.0,
            destination_port: ports.1,
            protocol,
            family,
        }
    }
}

/// Address and port of the end in the VM, and of the far end, of a packet that goes this way.
#[inline]
fn ends(key: &Key, direction: Direction) -> [(u128, u16); 2] {
    let ends = [(key.source, key.source_port), (key.destination, key.destination_port)];
    match direction {
        Direction::Egress => ends,
        Direction::Ingress => [ends[1], ends[0]],
    }
}

impl Hash for ConnKey {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        let used = if Self::is_ipv6(self.rest) { 4 } else { 1 };
        self.addresses[..used].iter().for_each(|&word| state.write_u64(word));
        state.write_u64(self.rest);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Any,
    Answers,
}

/// The connection of a packet, and whether it can only be an answer. `None` for ICMP that belongs to none.
#[inline]
pub(crate) fn conn_key(key: &Key, direction: Direction) -> Option<(ConnKey, Role)> {
    if !matches!(key.protocol, TCP | UDP) && key.is_icmp() {
        return icmp_conn_key(key, direction);
    }
    Some((ConnKey::new(key, direction), Role::Any))
}

fn icmp_conn_key(key: &Key, direction: Direction) -> Option<(ConnKey, Role)> {
    let (query, asker, role) = match icmp_role(key.family, key.icmp_kind()) {
        IcmpRole::Query { .. } => (key.icmp_kind(), direction, Role::Any),
        IcmpRole::Answer { query } => (query, direction.opposite(), Role::Answers),
        IcmpRole::Error | IcmpRole::Other => return None,
    };
    let [(local, _), (remote, _)] = ends(key, direction);
    let kind = u16::from(query) << 8 | (key.destination_port & 0xff);
    let mut connection = ConnKey::between((local, key.source_port), (remote, kind), key.protocol, key.family);
    if asker == Direction::Ingress {
        connection.rest |= FAR_END_ASKS;
    }
    Some((connection, role))
}
