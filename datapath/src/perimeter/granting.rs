//! Frames that pass by leases: looked up, renewed, granted.

use dreamwire_policy::{Connection, Direction, Packet, Parsed, Touched};
use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::ring::BURST;

use super::flow_key::FlowKey;
use super::leases::{Lease, Look};
use super::{LEASE_NS, Perimeter, Perimeters, parse_frame};
use crate::burst::{Burst, NextHop, bits};
use crate::snapshot::{PortId, Snapshot};

/// How far frames have come by leases; a bit for each.
#[derive(Debug, Default)]
pub(crate) struct Recalled {
    /// Those that are past both perimeters.
    pub(crate) passed: u32,
    /// Those that are past their sender's, and the switch, alone.
    pub(crate) sent: u32,
    /// Those whose lease is to be renewed.
    pub(crate) due: u32,
}

const _: () = assert!(BURST <= u32::BITS as usize);

/// A flow whose lease is being looked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    key: FlowKey<1>,
    place: usize,
    /// A bit for each of its frames.
    frames: u32,
}

impl Asked {
    pub(super) const NONE: Self = Self { key: FlowKey::NONE, place: 0, frames: 0 };
}

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
    /// Sets the next hop of every frame of port `from` whose flow has a lease.
    #[inline]
    pub(crate) fn recall(&mut self, from: PortId, burst: &mut Burst, fdb_epoch: u64, snapshot: &Snapshot) -> Recalled {
        let mut recalled = Recalled::default();
        let Some(own) = self.slots[usize::from(from.0)].as_deref() else { return recalled };
        // First all places, so that memory is waited for once. Frames of a flow in a row share theirs.
        let mut last = 0;
        let mut others = false;
        for (index, (frame, next_hop)) in burst.frames[..burst.length].iter().zip(&burst.next_hops).enumerate() {
            if *next_hop != NextHop::Undecided {
                continue;
            }
            let Some(key) = FlowKey::ipv4(frame.headers(), frame.frame_bytes) else {
                others = true;
                continue;
            };
            if self.asked[last].key == key {
                self.asked[last].frames |= 1 << index;
            } else if let Some(place) = own.leases.place(&key) {
                last += 1;
                self.asked[last] = Asked { key, place, frames: 1 << index };
            }
        }
        // Where the last lease leads, and what it must have been made from: the same for most of a burst.
        let (mut hop, mut next_hop, mut epoch) = (u32::MAX, NextHop::Undecided, 0);
        let mut left = 0;
        for (slot, &Asked { ref key, place, frames }) in self.asked[1..=last].iter().enumerate() {
            let lease = match own.leases.look(place, key) {
                Look::Here if !key.is_tcp() => own.leases.held(place),
                Look::Nowhere => continue,
                look => {
                    if look == Look::Elsewhere {
                        own.leases.look_elsewhere(place);
                    }
                    left |= 1 << slot;
                    continue;
                }
            };
            if u32::from(lease.hop()) != hop {
                let Some(found) = self.hops.next_hop(lease.hop()) else { continue };
                (hop, next_hop) = (u32::from(lease.hop()), found);
                epoch = fdb_epoch + self.epoch_between(Some(from), next_hop);
            }
            if lease.epoch() != epoch {
                continue;
            }
            if self.now_ns < lease.until_ns() {
                recalled.passed |= frames;
                burst.decide(frames, next_hop);
            } else {
                recalled.due |= frames;
            }
        }
        if left != 0 {
            self.recall_left(from, burst, left, fdb_epoch, snapshot, &mut recalled);
        }
        if others {
            self.recall_ipv6(from, burst, fdb_epoch, snapshot, &mut recalled);
        }
        recalled
    }

    /// The same for the flows that `left` has a bit for: TCP, and those whose leases are not in their first places. Frame by frame:
    /// what a segment ends may be what others' leases were made from.
    #[inline(never)]
    fn recall_left(
        &mut self,
        from: PortId,
        burst: &mut Burst,
        left: u32,
        fdb_epoch: u64,
        snapshot: &Snapshot,
        recalled: &mut Recalled,
    ) {
        for slot in bits(left) {
            let Asked { key, frames, .. } = self.asked[1 + slot];
            for index in bits(frames) {
                let Some(own) = self.slots[usize::from(from.0)].as_deref() else { return };
                let Some(lease) = own.leases.find(&key) else { break };
                let (until_ns, connections) = (lease.until_ns(), lease.connections());
                let Some(next_hop) = self.hops.next_hop(lease.hop()) else { break };
                if lease.epoch() != fdb_epoch + self.epoch_between(Some(from), next_hop) {
                    break;
                }
                if self.now_ns >= until_ns {
                    recalled.due |= 1 << index;
                } else if key.is_tcp() {
                    self.pass(from, burst, index, next_hop, connections, snapshot, recalled);
                } else {
                    burst.next_hops[index] = next_hop;
                    recalled.passed |= 1 << index;
                }
            }
        }
    }

    /// The same for IPv6, frame by frame.
    fn recall_ipv6(
        &mut self,
        from: PortId,
        burst: &mut Burst,
        fdb_epoch: u64,
        snapshot: &Snapshot,
        recalled: &mut Recalled,
    ) {
        for index in 0..burst.length {
            let frame = &burst.frames[index];
            if burst.next_hops[index] != NextHop::Undecided || recalled.due & 1 << index != 0 {
                continue;
            }
            let Some(key) = FlowKey::ipv6(frame.headers(), frame.frame_bytes) else { continue };
            let Some(own) = self.slots[usize::from(from.0)].as_deref() else { return };
            let Some(lease) = own.leases6.find(&key) else { continue };
            let Some(next_hop) = self.hops.next_hop(lease.hop()) else { continue };
            if lease.epoch() != fdb_epoch + self.epoch_between(Some(from), next_hop) {
                continue;
            }
            if self.now_ns >= lease.until_ns() {
                recalled.due |= 1 << index;
            } else if key.is_tcp() {
                self.pass(from, burst, index, next_hop, lease.connections(), snapshot, recalled);
            } else {
                burst.next_hops[index] = next_hop;
                recalled.passed |= 1 << index;
            }
        }
    }

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
            own.leases.find(&key)
        } else {
            FlowKey::ipv6(header, bytes).and_then(|key| own.leases6.find(&key))
        };
        let Some(held) = held else { return };
        if self.hops.next_hop(held.hop()) != Some(next_hop)
            || held.epoch() != fdb_epoch + self.epoch_between(Some(from), next_hop)
        {
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
    fn pass(
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
            let lease = leases.find(&key);
            (key.is_tcp(), lease.filter(|lease| self.now_ns < lease.until_ns()))
        } else if let Some(key) = FlowKey::ipv6(header, frame.frame_bytes) {
            let (key, leases) = (key.inbound(identity), &leases.leases6);
            let lease = leases.find(&key);
            (key.is_tcp(), lease.filter(|lease| self.now_ns < lease.until_ns()))
        } else {
            return false;
        };
        let Some(lease) = lease.filter(|lease| lease.epoch() == fdb_epoch + self.epoch(to)) else { return false };
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
        let lease = Lease { hop, connections, epoch, until_ns };
        let keeper = match (from, next_hop) {
            (Some(port), _) | (None, NextHop::Port(port)) => port,
            _ => return,
        };
        let Some(perimeter) = self.get(keeper) else { return };
        let (header, bytes) = (frame.headers(), frame.frame_bytes);
        if let Some(key) = FlowKey::ipv4(header, bytes) {
            perimeter.leases.put(if from.is_some() { key } else { key.inbound(identity) }, lease);
        } else if let Some(key) = FlowKey::ipv6(header, bytes) {
            perimeter.leases6.put(if from.is_some() { key } else { key.inbound(identity) }, lease);
        }
    }
}
