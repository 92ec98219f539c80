//! The key of a connection: one for both directions of its packets.

use std::hash::{Hash, Hasher};

use crate::key::{Family, IcmpRole, Key, TCP, UDP, icmp_role};
use crate::model::Direction;

/// A connection, whichever way its packets go: by its end in the VM and its far end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ConnKey {
    /// Addresses as two words each: a u128 would be aligned to 16 and cost 8 bytes.
    pub(crate) local: [u64; 2],
    pub(crate) remote: [u64; 2],
    pub(crate) local_port: u16,
    /// Of ICMP: the query's type << 8 | code.
    pub(crate) remote_port: u16,
    pub(crate) protocol: u8,
    pub(crate) family: Family,
    /// Of ICMP: who asks, so that two pings of each other with one identifier are two. Else egress.
    pub(crate) asker: Direction,
}

impl ConnKey {
    /// The connection of a packet with this key that goes this way.
    #[inline]
    pub(crate) fn new(key: &Key, direction: Direction) -> Self {
        let (local, remote, local_port, remote_port) = match direction {
            Direction::Egress => (key.source, key.destination, key.source_port, key.destination_port),
            Direction::Ingress => (key.destination, key.source, key.destination_port, key.source_port),
        };
        Self {
            local: split(local),
            remote: split(remote),
            local_port,
            remote_port,
            protocol: key.protocol,
            family: key.family,
            asker: Direction::Egress,
        }
    }

    /// The key of a packet of the connection that goes this way.
    pub(crate) fn key(&self, direction: Direction, icmp: bool) -> Key {
        let (local, remote) = (join(self.local), join(self.remote));
        let flip = direction == Direction::Ingress;
        let (source_port, destination_port) = match flip && !icmp {
            true => (self.remote_port, self.local_port),
            false => (self.local_port, self.remote_port),
        };
        Key {
            source: if flip { remote } else { local },
            destination: if flip { local } else { remote },
            source_port,
            destination_port,
            protocol: self.protocol,
            family: self.family,
        }
    }
}

#[inline]
const fn split(number: u128) -> [u64; 2] {
    [(number >> 64) as u64, number as u64]
}

#[inline]
const fn join([high, low]: [u64; 2]) -> u128 {
    (high as u128) << 64 | low as u128
}

impl Hash for ConnKey {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u128(join(self.local));
        state.write_u128(join(self.remote));
        let tail = u64::from(self.local_port) << 48
            | u64::from(self.remote_port) << 32
            | u64::from(self.protocol) << 16
            | (self.family as u64) << 8
            | self.asker as u64;
        state.write_u64(tail);
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
    let connection = ConnKey {
        local_port: key.source_port,
        remote_port: u16::from(query) << 8 | (key.destination_port & 0xff),
        asker,
        ..ConnKey::new(key, direction)
    };
    Some((connection, role))
}
