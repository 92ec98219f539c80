//! Frames that pass by leases: looked up, renewed, granted.

use dreamwire_policy::{Connection, Direction, Packet, Parsed, Touched};
use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::ring::BURST;

use super::flow_key::{FlowKey, IPV4_HEADERS, WORDS4, has_key4, same_key4};
use super::leases::{Lease, Look, NO_WAY, Opened};
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
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    place: u32,
    /// A bit for each of its frames.
    frames: u32,
}

impl Asked {
    /// Its key, from its first frame.
    #[inline]
    fn key(self, frames: &[RawFrame]) -> FlowKey<WORDS4> {
        FlowKey::of(ipv4_headers(&frames[self.frames.trailing_zeros() as usize]))
    }
}

/// The headers of a frame that has as many bytes, or of none.
#[inline]
fn ipv4_headers(frame: &RawFrame) -> &[u8; IPV4_HEADERS] {
    frame.header.first_chunk().expect("a header copy has room for more")
}

/// What [`seek`] has seen.
struct Sought {
    /// Flows: what is asked is in `asked` from its second place on.
    count: usize,
    /// A flow that has no lease.
    unknown: bool,
    /// Frames that are not IPv4, or have no key.
    others: bool,
}

/// Asks for the leases of all IPv4 flows among frames whose next hop is not decided, those in a row once. Where it does not check
/// first whether a flow can have a lease, it may touch a page that nobody has. Not inlined: it needs all registers that there are.
#[inline(never)]
fn seek<const CHECKS: bool>(
    leases: Opened<'_, WORDS4, 8>,
    frames: &[RawFrame],
    next_hops: &[NextHop; BURST],
    asked: &mut [Asked; BURST + 1],
) -> Sought {
    // None has the key of the header that is none.
    let (mut count, mut last) = (0, &[0; IPV4_HEADERS]);
    let (mut others, mut unknown, mut bit) = (false, false, 1);
    for (frame, next_hop) in frames.iter().zip(next_hops) {
        let header = ipv4_headers(frame);
        let is_undecided = *next_hop == NextHop::Undecided;
        if !is_undecided || !has_key4(header, frame.frame_bytes) {
            others |= is_undecided;
        } else if same_key4(header, last) {
            asked[count].frames |= bit;
        } else {
            let place = leases.first_place(&FlowKey::of(header));
            if CHECKS && !leases.was_taken(place) {
                unknown = true;
            } else {
                leases.prefetch(place);
                (count, last) = (count + 1, header);
                asked[count] = Asked { place, frames: bit };
            }
        }
        bit <<= 1;
    }
    Sought { count, unknown, others }
}

/// What is found out about the frames of flows with leases.
struct Settled {
    /// Where the last lease leads and what it must have been made from: the same for most of a burst.
    way: u64,
    next_hop: NextHop,
    /// Frames that go there.
    frames: u32,
    /// Flows that are left.
    left: u32,
    /// There is one that has no lease.
    unknown: bool,
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
        // First all places, so that memory is waited for once.
        let leases = own.leases.open();
        let (frames, next_hops) = (&burst.frames[..burst.length], &burst.next_hops);
        let seek = if own.all_known { seek::<false> } else { seek::<true> };
        let Sought { count, unknown, others } = seek(leases, frames, next_hops, &mut self.asked);
        let settled = self.settle(leases, from, burst, count, fdb_epoch, &mut recalled);
        let all_known = !unknown && !settled.unknown && (count != 0 || own.all_known);
        if settled.left != 0 {
            self.recall_left(from, burst, settled.left, fdb_epoch, snapshot, &mut recalled);
        }
        if others {
            self.recall_ipv6(from, burst, fdb_epoch, snapshot, &mut recalled);
        }
        if let Some(own) = self.get(from) {
            own.all_known = all_known;
        }
        recalled
    }

    /// Sets the next hop of the frames of `count` flows asked for, if their leases are where they are looked for first. Not
    /// inlined: it needs all registers that there are.
    #[inline(never)]
    fn settle(
        &self,
        leases: Opened<'_, WORDS4, 8>,
        from: PortId,
        burst: &mut Burst,
        count: usize,
        fdb_epoch: u64,
        recalled: &mut Recalled,
    ) -> Settled {
        let mut settled = Settled { way: NO_WAY, next_hop: NextHop::Undecided, frames: 0, left: 0, unknown: false };
        for (slot, asked) in self.asked[1..=count].iter().enumerate() {
            let look = leases.look(asked.place, &asked.key(&burst.frames));
            let lease = leases.held(asked.place);
            if look == Look::Here && lease.way() == settled.way && self.now_ns < lease.until_ns() {
                settled.frames |= asked.frames;
            } else {
                self.settle_other(leases, from, burst, slot, look, fdb_epoch, &mut settled, recalled);
            }
        }
        burst.decide(settled.frames, settled.next_hop);
        recalled.passed |= settled.frames;
        settled
    }

    /// The same for a flow that is not like the last one.
    #[allow(clippy::too_many_arguments, reason = "what `settle` knows")]
    #[inline(never)]
    fn settle_other(
        &self,
        leases: Opened<'_, WORDS4, 8>,
        from: PortId,
        burst: &mut Burst,
        slot: usize,
        look: Look,
        fdb_epoch: u64,
        settled: &mut Settled,
        recalled: &mut Recalled,
    ) {
        let asked = self.asked[1 + slot];
        let lease = leases.held(asked.place);
        match look {
            Look::Here if !lease.is_tcp() => {}
            Look::Nowhere => {
                settled.unknown = true;
                return;
            }
            _ => {
                if look == Look::Elsewhere {
                    leases.look_elsewhere(asked.place);
                }
                settled.left |= 1 << slot;
                return;
            }
        }
        if lease.way() != settled.way {
            let Some(next_hop) = self.hops.next_hop(lease.hop()) else { return };
            if lease.epoch() != fdb_epoch + self.epoch_between(Some(from), next_hop) {
                return;
            }
            burst.decide(settled.frames, settled.next_hop);
            recalled.passed |= settled.frames;
            (settled.way, settled.next_hop, settled.frames) = (lease.way(), next_hop, 0);
        }
        if self.now_ns < lease.until_ns() {
            settled.frames |= asked.frames;
        } else {
            recalled.due |= asked.frames;
        }
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
            let asked = self.asked[1 + slot];
            let key = asked.key(&burst.frames);
            for index in bits(asked.frames) {
                let Some(own) = self.slots[usize::from(from.0)].as_deref() else { return };
                let Some(lease) = own.leases.open().find(&key) else { break };
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
            let Some(lease) = own.leases6.open().find(&key) else { continue };
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
            own.leases.open().find(&key)
        } else {
            FlowKey::ipv6(header, bytes).and_then(|key| own.leases6.open().find(&key))
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
            let lease = leases.open().find(&key);
            (key.is_tcp(), lease.filter(|lease| self.now_ns < lease.until_ns()))
        } else if let Some(key) = FlowKey::ipv6(header, frame.frame_bytes) {
            let (key, leases) = (key.inbound(identity), &leases.leases6);
            let lease = leases.open().find(&key);
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
