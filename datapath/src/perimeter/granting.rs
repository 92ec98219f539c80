//! Leases given and renewed, and the connections that frames with a lease belong to.

use dreamwire_policy::{Connection, Direction, Packet, Parsed, Touched};
use dreamwire_vhost::frame::RawFrame;

use super::flow_key::FlowKey;
use super::leases::Lease;
use super::recalling::Recalled;
use super::{LEASE_NS, Perimeter, Perimeters, parse_frame};
use crate::burst::{Burst, NextHop};
use crate::snapshot::{PortId, Snapshot};

/// When and by whom a connection is touched.
#[derive(Debug, Clone, Copy)]
struct Touch {
    direction: Direction,
    policy_generation: u32,
    now_ns: u64,
}

impl Perimeter {
    #[inline]
    fn touch(&mut self, connection: Option<Connection>, packet: &Packet, touch: Touch) -> bool {
        let Touch { direction, policy_generation, now_ns } = touch;
        connection.is_none_or(|connection| {
            self.conntrack.touch(connection, packet, direction, policy_generation, now_ns) == Touched::Pass
        })
    }
}

impl Perimeters {
    /// Renews the lease of frame `index`, whose time is over, if the switch still sends it to `next_hop` as before (until
    /// `until_ns`) and both connections take it.
    #[allow(clippy::too_many_arguments, reason = "two ends, each with its own")]
    pub(crate) fn renew(
        &mut self,
        from: PortId,
        burst: &mut Burst,
        index: usize,
        next_hop: NextHop,
        until_ns: u64,
        fdb_epoch: u64,
        snapshot: &Snapshot,
        recalled: &mut Recalled,
    ) {
        let (header, bytes) = (burst.frames[index].headers(), burst.frames[index].frame_bytes);
        let Some(own) = self.slots[usize::from(from.0)].as_deref() else { return };
        let held = if let Some(key) = FlowKey::ipv4(header, bytes) {
            own.leases.open().find(&key)
        } else {
            FlowKey::ipv6(header, bytes).and_then(|key| own.leases6.open().find(&key))
        };
        let Some(held) = held else { return };
        if self.next_hop(from, held.way(), fdb_epoch) != Some(next_hop) {
            return;
        }
        let connections = held.connections();
        if self.pass(from, burst, index, next_hop, connections, snapshot, recalled) {
            let lease_ns = until_ns.saturating_sub(self.now_ns);
            self.grant(Some(from), None, &burst.frames[index], next_hop, connections, fdb_epoch, lease_ns);
        }
    }

    /// Has the connections of a frame with a lease, at both ends, take it; whether it is past both perimeters. If the
    /// receiver's does not, that end has still to judge it; if the sender's does not, both have, and the switch.
    #[allow(clippy::too_many_arguments, reason = "two ends, each with its own")]
    pub(super) fn pass(
        &mut self,
        from: PortId,
        burst: &mut Burst,
        index: usize,
        next_hop: NextHop,
        connections: [Option<Connection>; 2],
        snapshot: &Snapshot,
        recalled: &mut Recalled,
    ) -> bool {
        let frame = &burst.frames[index];
        let Parsed::Ip(packet) = parse_frame(frame) else { return false };
        let (now_ns, policy_generation) = (self.now_ns, snapshot.policy_generation);
        let touch = |direction| Touch { direction, policy_generation, now_ns };
        let [egress, ingress] = connections;
        let sent = self.get(from).is_some_and(|own| own.touch(egress, &packet, touch(Direction::Egress)));
        if !sent {
            return false;
        }
        let received = match (next_hop, ingress) {
            (NextHop::Port(to), Some(_)) => {
                self.get(to).is_some_and(|perimeter| perimeter.touch(ingress, &packet, touch(Direction::Ingress)))
            }
            _ => true,
        };
        if !received {
            self.end(from, frame);
        }
        burst.next_hops[index] = next_hop;
        *if received { &mut recalled.passed } else { &mut recalled.sent } |= 1 << index;
        received
    }

    fn end(&mut self, from: PortId, frame: &RawFrame) {
        let (header, bytes) = (frame.headers(), frame.frame_bytes);
        let Some(perimeter) = self.get(from) else { return };
        if let Some(key) = FlowKey::ipv4(header, bytes) {
            perimeter.leases.end(&key);
        } else if let Some(key) = FlowKey::ipv6(header, bytes) {
            perimeter.leases6.end(&key);
        }
    }

    /// Whether a frame that comes to port `to` passes by a lease of that port.
    #[inline]
    pub(crate) fn recall_inbound(
        &mut self,
        to: PortId,
        frame: &RawFrame,
        identity: Option<u16>,
        fdb_epoch: u64,
        snapshot: &Snapshot,
    ) -> bool {
        let header = frame.headers();
        let Some(leases) = self.slots[usize::from(to.0)].as_deref() else { return false };
        let (is_tcp, lease) = if let Some(key) = FlowKey::ipv4(header, frame.frame_bytes) {
            let (key, leases) = (key.inbound(identity), &leases.leases);
            let lease = leases.open().find(&key);
            (key.is_tcp(), lease.filter(|lease| self.now_ns < lease.until_ns()))
        } else if let Some(key) = FlowKey::ipv6(header, frame.frame_bytes) {
            let (key, leases) = (key.inbound(identity), &leases.leases6);
            let lease = leases.open().find(&key);
            (key.is_tcp(), lease.filter(|lease| self.now_ns < lease.until_ns()))
        } else {
            return false;
        };
        let Some(lease) = lease.filter(|lease| lease.way().epoch() == fdb_epoch + self.epoch(to)) else { return false };
        let [_, connection] = lease.connections();
        if !is_tcp {
            return true;
        }
        let Parsed::Ip(packet) = parse_frame(frame) else { return false };
        let touch =
            Touch { direction: Direction::Ingress, policy_generation: snapshot.policy_generation, now_ns: self.now_ns };
        self.get(to).is_some_and(|perimeter| perimeter.touch(connection, &packet, touch))
    }

    /// Gives the flow of a frame that has passed a lease. `from` is the sender's port if it has a policy; else the lease
    /// is the receiver's, for senders of this identity.
    #[allow(clippy::too_many_arguments, reason = "two ends, each with its own")]
    pub(crate) fn grant(
        &mut self,
        from: Option<PortId>,
        identity: Option<u16>,
        frame: &RawFrame,
        next_hop: NextHop,
        connections: [Option<Connection>; 2],
        fdb_epoch: u64,
        lease_ns: u64,
    ) {
        let epoch = fdb_epoch + self.epoch_between(from, next_hop);
        let until_ns = self.now_ns + lease_ns.min(LEASE_NS);
        let Some(hop) = self.hops.number(next_hop) else { return };
        let lease = |is_tcp| Lease { hop, is_tcp, connections, epoch, until_ns };
        let keeper = match (from, next_hop) {
            (Some(port), _) | (None, NextHop::Port(port)) => port,
            _ => return,
        };
        let Some(perimeter) = self.get(keeper) else { return };
        let (header, bytes) = (frame.headers(), frame.frame_bytes);
        if let Some(key) = FlowKey::ipv4(header, bytes) {
            perimeter.leases.put(if from.is_some() { key } else { key.inbound(identity) }, lease(key.is_tcp()));
        } else if let Some(key) = FlowKey::ipv6(header, bytes) {
            perimeter.leases6.put(if from.is_some() { key } else { key.inbound(identity) }, lease(key.is_tcp()));
        }
    }
}
