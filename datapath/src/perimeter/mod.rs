//! The perimeter of a port: what its worker keeps to hold it to its policy.
//!
//! Theory of operation. A frame of a guest with a policy is first looked up among its port's *leases* (the recall stage): flows that were
//! judged lately. A hit says where it goes, and passes both perimeters on its way at once; of TCP each segment moves the
//! connection's state at both. Whatever else there is (a flow's first frame, fragments, ICMP, ARP, tags) is judged frame by frame:
//! egress by the police stage, then switched, then ingress by the admit stage at the receiver's port, which also
//! judges what comes from tunnels, other workers, and ports without policy. What both let through, and may be let through
//! again, gets a lease.
//!
//! A perimeter is allocated and freed by the control thread. A port that has a policy but no perimeter is closed.

pub mod ahead;
pub mod events;
pub(crate) mod flow_key;
mod granting;
pub(crate) mod hops;
mod leases;
mod recalling;

use std::net::IpAddr;
use std::sync::Arc;

use dreamwire_policy::{
    ConnState, Connection, ConnectionRow, Conntrack, ConntrackLimits, Decision, Direction, Key, Meter, MeterLimits,
    Parsed, Reason, Sought, decide_sought, parse,
};
use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::memory::{Wish, prefetch};
use dreamwire_vhost::ring::BURST;

use crate::burst::{Burst, NextHop, Origin};
use crate::drop_reason::DropReason;
use crate::huge_pages::{self, HUGE_BYTES, HugePages};
use crate::snapshot::{NetworkId, PORTS_MAX, Port, PortId, PortPolicy, Snapshot};
use ahead::Ahead;
use events::{Events, Story};
use hops::Hops;
use leases::{Leases4, Leases6, Way};
use recalling::Asked;
pub(crate) use recalling::Recalled;

/// How long a flow passes before tables are asked again. Timeouts of connections are 10 s and more.
const LEASE_NS: u64 = 1_000_000_000;

/// How often a part of one connection table is swept: all of 1024, one after the other, in a tenth of a second.
const SWEEP_NS: u64 = 100_000;
/// In how many of its turns a table is swept once: 10 s with the above. Where there are fewer ports, or the worker sleeps, a
/// connection is forgotten sooner or later than that; look-ups see to expiry by themselves.
const SWEEP_PARTS: u32 = 96;

/// What a port may keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PerimeterLimits {
    /// Its connections.
    pub conntrack: ConntrackLimits,
}

/// See the module's text.
#[derive(Debug)]
pub struct Perimeter {
    pub(crate) conntrack: Conntrack,
    leases: Leases4,
    leases6: Leases6,
    /// All IPv4 flows of the last burst had a lease, or might have had one.
    all_known: bool,
    /// That of the leases by which most frames of the last burst passed.
    way: Way,
    /// By [`Direction`], with what they were made from.
    meters: [Option<(MeterLimits, Meter)>; 2],
    /// So many connections are swept at once.
    swept_at_once: usize,
    ahead: Arc<Ahead>,
    /// How far the parts of the connections' memory may be used before [`Ahead`] is to be asked again.
    ready_ends: [usize; 3],
}

/// What one direction's perimeter said of a frame. One word, as [`Connection`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Stand(u64);

impl Stand {
    /// There is none on its way.
    pub(crate) const UNASKED: Self = Self(0);
    /// It passes by a lease.
    pub(crate) const LEASED: Self = Self(1);
    /// It passes, this once.
    pub(crate) const ONCE: Self = Self(2);
    /// It passes, and so may those that follow it, which have no connection. All above are those that have one.
    const KEPT: Self = Self(3);

    /// It passes, and so may those that follow it.
    #[inline]
    pub(crate) fn kept(connection: Option<Connection>) -> Self {
        let stand = connection.map_or(Self::KEPT, |connection| Self(connection.to_bits()));
        debug_assert!(stand.0 >= Self::KEPT.0);
        stand
    }

    /// Whether frames that follow it need not be judged here; if so, the connection that they belong to, if any.
    #[inline]
    pub(crate) fn keeps(self) -> Option<Option<Connection>> {
        match self {
            Self::UNASKED | Self::KEPT => Some(None),
            Self::LEASED | Self::ONCE => None,
            Self(bits) => Some(Connection::from_bits(bits)),
        }
    }
}

impl Perimeter {
    /// Allocates; what is not used takes no memory. `seed` is a random number that no guest knows.
    pub fn new(limits: PerimeterLimits, seed: u64) -> Self {
        let connections = limits.conntrack.connections;
        let conntrack = Conntrack::new(limits.conntrack, seed);
        // Flows are spread over a table's index from the first on, so a large one would soon be in memory whole.
        let index = conntrack.index_memory();
        if index.len() >= HUGE_BYTES {
            huge_pages::from_start(index);
        }
        let ahead = Ahead::new(conntrack.memory());
        Self {
            conntrack,
            leases: Leases4::new(connections),
            leases6: Leases6::new(connections),
            all_known: false,
            way: Way::NONE,
            meters: Default::default(),
            swept_at_once: connections.div_ceil(SWEEP_PARTS) as usize,
            ready_ends: ahead.begin(),
            ahead: Arc::new(ahead),
        }
    }

    /// Where its large tables could have huge pages.
    pub fn huge_pages(&self) -> HugePages {
        let connections = self.conntrack.memory().map(|memory| memory.all);
        let leases = [self.leases.memory(), self.leases6.memory()];
        HugePages::new([self.conntrack.index_memory()].into_iter().chain(connections).chain(leases))
    }

    /// What the control thread needs to have memory ready for new connections.
    pub fn ahead(&self) -> Arc<Ahead> {
        Arc::clone(&self.ahead)
    }

    /// Sees to it that the next connection's memory is ready.
    #[inline]
    fn have_ready(&mut self) {
        for (part, memory) in self.conntrack.memory().iter().enumerate() {
            if memory.used_end >= self.ready_ends[part] {
                self.ready_ends[part] = self.ahead.reach(part, memory.used_end);
            }
        }
    }

    /// Has the meters follow the policy. New limits start with a full bucket.
    fn follow(&mut self, policy: &PortPolicy) {
        for (meter, limits) in self.meters.iter_mut().zip(policy.meters) {
            let limited = limits != MeterLimits::default();
            if meter.as_ref().map(|(limits, _)| *limits) != limited.then_some(limits) {
                *meter = limited.then(|| (limits, Meter::new(limits)));
            }
        }
    }
}

/// All perimeters of a worker.
#[derive(Debug)]
pub(crate) struct Perimeters {
    slots: Box<[Option<Box<Perimeter>>]>,
    /// By port: what [`Conntrack::epoch`] of perimeters that are gone has risen to.
    epochs: Box<[u64]>,
    /// Whether any port is metered.
    pub(crate) has_meters: bool,
    hops: Hops,
    /// Flows whose leases are being looked for, behind one that is none.
    asked: [Asked; BURST + 1],
    pub(crate) events: Events,
    now_ns: u64,
    swept_ns: u64,
    sweep_at: usize,
}

impl Default for Perimeters {
    fn default() -> Self {
        Self {
            slots: (0..PORTS_MAX).map(|_| None).collect(),
            epochs: vec![0; PORTS_MAX].into_boxed_slice(),
            has_meters: false,
            hops: Hops::default(),
            asked: [Asked::default(); BURST + 1],
            events: Events::default(),
            now_ns: 0,
            swept_ns: 0,
            sweep_at: 0,
        }
    }
}

impl Perimeters {
    /// Gives a port its perimeter, or none; returns the last one, for the control thread to free.
    pub(crate) fn guard(
        &mut self,
        snapshot: &Snapshot,
        id: PortId,
        perimeter: Option<Box<Perimeter>>,
    ) -> Option<Box<Perimeter>> {
        let slot = usize::from(id.0);
        let last = std::mem::replace(&mut self.slots[slot], perimeter);
        // Leases that were made with it, at any port, are over.
        self.epochs[slot] += 1 + last.as_ref().map_or(0, |last| last.conntrack.epoch());
        self.follow(snapshot);
        last
    }

    /// Follows a new snapshot. All leases are over by the FDB's epoch.
    pub(crate) fn adopt(&mut self, snapshot: &Snapshot) {
        self.hops.clear();
        self.follow(snapshot);
    }

    fn follow(&mut self, snapshot: &Snapshot) {
        self.has_meters = false;
        for (slot, port) in self.slots.iter_mut().zip(&snapshot.ports) {
            if let (Some(perimeter), Some(Port { policy: Some(policy), .. })) = (slot, port) {
                perimeter.follow(policy);
                self.has_meters |= perimeter.meters.iter().any(Option::is_some);
            }
        }
    }

    /// The time, at the start of a turn. Now and then forgets connections that have expired.
    #[inline]
    pub(crate) fn set_now(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        if now_ns.saturating_sub(self.swept_ns) >= SWEEP_NS {
            self.swept_ns = now_ns;
            self.sweep();
        }
    }

    fn sweep(&mut self) {
        self.sweep_at = (self.sweep_at + 1) % self.slots.len();
        if let Some(perimeter) = &mut self.slots[self.sweep_at] {
            perimeter.conntrack.sweep(perimeter.swept_at_once, self.now_ns);
        }
    }

    #[inline]
    fn get(&mut self, id: PortId) -> Option<&mut Perimeter> {
        self.slots.get_mut(usize::from(id.0))?.as_deref_mut()
    }

    /// Whether a frame keeps within a port's packets and bits per second, if the port is here.
    #[inline]
    pub(crate) fn meter(&mut self, id: PortId, direction: Direction, frame_bytes: u32) -> bool {
        let now_ns = self.now_ns;
        self.get(id).is_none_or(|perimeter| {
            let meter = perimeter.meters[direction as usize].as_mut();
            meter.is_none_or(|(_, meter)| meter.pass(frame_bytes, now_ns))
        })
    }

    /// Rises with all that ends at a port's perimeter.
    #[inline]
    fn epoch(&self, id: PortId) -> u64 {
        let slot = usize::from(id.0);
        self.epochs[slot] + self.slots[slot].as_ref().map_or(0, |perimeter| perimeter.conntrack.epoch())
    }

    /// What a lease from `from` to `hop` was made from.
    #[inline]
    fn epoch_between(&self, from: Option<PortId>, hop: NextHop) -> u64 {
        let receiver = match hop {
            NextHop::Port(port) => self.epoch(port),
            _ => 0,
        };
        receiver + from.map_or(0, |port| self.epoch(port))
    }

    /// Where a frame's connection is sought at a port; asks for the memory that [`Self::judge`] will read first.
    #[inline]
    pub(crate) fn look_ahead(&self, id: PortId, direction: Direction, parsed: &Parsed) -> Option<Sought> {
        let (Some(perimeter), Parsed::Ip(packet)) = (&self.slots[usize::from(id.0)], parsed) else { return None };
        let sought = perimeter.conntrack.seek(&packet.key, direction)?;
        prefetch(perimeter.conntrack.bucket(sought).as_ptr() as usize, Wish::Write);
        Some(sought)
    }

    /// Judges a frame at a port that has a policy. `identity` is its sender's, `parsed` what [`parse`] says of it, `sought`
    /// what [`Self::look_ahead`] does.
    #[allow(clippy::too_many_arguments, reason = "a frame, where it is judged, and what is known of it")]
    pub(crate) fn judge(
        &mut self,
        snapshot: &Snapshot,
        id: PortId,
        direction: Direction,
        identity: Option<u16>,
        frame: &RawFrame,
        parsed: &Parsed,
        sought: Option<Sought>,
    ) -> Result<Stand, DropReason> {
        let Some(port) = snapshot.port(id) else { return Ok(Stand::UNASKED) };
        let Some(policy) = &port.policy else { return Ok(Stand::UNASKED) };
        let now_ns = self.now_ns;
        let Some(perimeter) = self.slots[usize::from(id.0)].as_deref_mut() else {
            return Err(DropReason::NoPerimeter);
        };
        let (classifier, generation) = (&policy.classifier, snapshot.policy_generation);
        let conntrack = &mut perimeter.conntrack;
        let decision = decide_sought(classifier, conntrack, parsed, sought, direction, identity, generation, now_ns);
        let is_first = decision.judged && decision.state == ConnState::New;
        if is_first {
            perimeter.have_ready();
        }
        self.note(snapshot, port.network, id, direction, &decision, frame);
        match decision {
            Decision { allow: false, reason, .. } => Err(drop_reason(reason, direction)),
            // A flow that has no other frame needs no lease.
            _ if is_first => Ok(Stand::ONCE),
            Decision { cache: true, connection, .. } => Ok(Stand::kept(connection)),
            _ => Ok(Stand::ONCE),
        }
    }

    /// Counts a decision at its rule, and tells of it where it is to be told.
    #[inline]
    fn note(
        &mut self,
        snapshot: &Snapshot,
        network: NetworkId,
        id: PortId,
        direction: Direction,
        decision: &Decision,
        frame: &RawFrame,
    ) {
        if let Some(rule) = decision.rule
            && decision.judged
            && let Some(counters) = snapshot.rules.get(rule.0 as usize)
        {
            counters.hits.add(1);
        }
        if decision.log {
            let dropped = (!decision.allow).then(|| drop_reason(decision.reason, direction));
            let story = Story { port: Some(id), network, direction, dropped, rule: decision.rule, log: true };
            self.events.tell(story, frame, self.now_ns);
        }
        if !decision.allow {
            let dropped = Some(drop_reason(decision.reason, direction));
            let story = Story { port: Some(id), network, direction, dropped, rule: decision.rule, log: false };
            self.events.tell(story, frame, self.now_ns);
        }
    }

    /// The time of this turn, ns.
    #[inline]
    pub(crate) fn now_ns(&self) -> u64 {
        self.now_ns
    }

    /// Tells of a frame that was dropped where it came from, unless its judge has told.
    pub(crate) fn sample(&mut self, burst: &Burst, index: usize, reason: DropReason) {
        let told = matches!(burst.origins[index], Origin::Port(_)) && reason.is_judgement();
        if told {
            return;
        }
        let (port, direction) = match burst.origins[index] {
            Origin::Port(port) => (Some(port), Direction::Egress),
            Origin::Vtep(_) => (None, Direction::Ingress),
        };
        let network = burst.networks[index];
        let story = Story { port, network, direction, dropped: Some(reason), rule: None, log: false };
        self.events.tell(story, &burst.frames[index], self.now_ns);
    }

    /// Tells of a frame that was dropped at its receiver, unless its judge has told.
    pub(crate) fn sample_received(&mut self, burst: &Burst, index: usize, to: PortId, reason: DropReason) {
        if !reason.is_judgement() {
            let (network, direction) = (burst.networks[index], Direction::Ingress);
            let story = Story { port: Some(to), network, direction, dropped: Some(reason), rule: None, log: false };
            self.events.tell(story, &burst.frames[index], self.now_ns);
        }
    }

    /// The connection of a port that carries such a packet.
    pub(crate) fn connection(&self, id: PortId, direction: Direction, key: &Key) -> Option<ConnectionRow> {
        let perimeter = self.slots.get(usize::from(id.0))?.as_ref()?;
        perimeter.conntrack.peek(key, direction, self.now_ns)
    }

    /// Adds the connections of a port in the next `rows.capacity()` places from `first` on; whether there are more places.
    pub(crate) fn rows(&self, id: PortId, first: usize, rows: &mut Vec<ConnectionRow>) -> bool {
        let perimeter = self.slots.get(usize::from(id.0)).and_then(Option::as_ref);
        let Some(Perimeter { conntrack, .. }) = perimeter.map(Box::as_ref) else { return false };
        let count = rows.capacity();
        rows.extend(conntrack.rows_among(first, count, self.now_ns));
        first + count < conntrack.places()
    }
}

/// What policy sees of a frame.
#[inline]
pub(crate) fn parse_frame(frame: &RawFrame) -> Parsed {
    parse(frame.headers(), frame.frame_bytes as usize)
}

/// Who a frame from a tunnel says to be from, if that remote is trusted for it.
#[inline]
pub(crate) fn identity_of(trusted: &[IpAddr], vtep: IpAddr, group: u16) -> Option<u16> {
    (group != 0 && trusted.contains(&vtep)).then_some(group)
}

fn drop_reason(reason: Reason, direction: Direction) -> DropReason {
    match (reason, direction) {
        (Reason::FragmentWithoutFirst, _) => DropReason::FragmentWithoutFirst,
        (Reason::Unreadable, _) => DropReason::Unreadable,
        (Reason::InvalidState, _) => DropReason::InvalidState,
        (Reason::NewFlowRate, _) => DropReason::NewFlowRate,
        (Reason::TableFull, _) => DropReason::ConnectionsFull,
        (Reason::Rule | Reason::Posture | Reason::Necessary | Reason::FollowsFirst, Direction::Egress) => {
            DropReason::EgressDenied
        }
        (Reason::Rule | Reason::Posture | Reason::Necessary | Reason::FollowsFirst, Direction::Ingress) => {
            DropReason::IngressDenied
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use dreamwire_policy::tcp::Segment;
    use dreamwire_policy::{Fragment, Grant, Memory, Packet, Transport};

    use super::*;
    use crate::huge_pages::resident;

    #[test]
    fn memory_is_ready_before_connections_take_it_and_no_sooner() {
        const CONNECTIONS: u32 = 3000;
        let conntrack = ConntrackLimits { connections: CONNECTIONS, ..ConntrackLimits::default() };
        let mut perimeter = Perimeter::new(PerimeterLimits { conntrack }, 7);
        // What is denied begins no connection.
        perimeter.have_ready();
        assert_eq!(perimeter.ready_ends, perimeter.ahead.begin());
        let grant = Grant { policy_generation: 1, rule: None, log: false, identity: None };
        let mut times = [0; 3];
        for port in 0..CONNECTIONS as u16 {
            let before = perimeter.ready_ends;
            // TCP over IPv6 takes memory of each part.
            let key = Key::new(6, (Ipv6Addr::LOCALHOST.into(), port), (Ipv6Addr::LOCALHOST.into(), 53));
            let transport = Transport::Tcp(Segment { flags: 2, ..Segment::default() });
            let packet = Packet { key, fragment: Fragment::Whole, transport };
            perimeter.conntrack.admit(&packet, Direction::Egress, grant, 0).unwrap();
            perimeter.have_ready();
            for (part, Memory { all, used_end }) in perimeter.conntrack.memory().into_iter().enumerate() {
                let ready_end = perimeter.ready_ends[part];
                times[part] += u32::from(ready_end != before[part]);
                let next = (used_end + (used_end - all.start).min(ahead::STEP_BYTES)).min(all.end);
                assert!(ready_end > used_end && resident(used_end.min(all.end - 1)), "connection {port}");
                assert!(ready_end == usize::MAX || ready_end <= next, "connection {port}");
            }
        }
        // By doubling up to a step, and then a step at a time.
        assert!(times.iter().all(|times| (10..=14).contains(times)), "{times:?}");
        assert_eq!(perimeter.ready_ends, [usize::MAX; 3]);
    }
}
