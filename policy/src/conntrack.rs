//! Connection tracking of one port, as a state machine that is told the time.
//!
//! Theory: a connection has one entry for both directions, keyed by its end in the VM and its far end. [`Conntrack::track`]
//! says what a packet is to the connections known; it moves the state of one that exists, but begins none: only
//! [`Conntrack::admit`] does, after the rules have let the first packet through. The entry remembers which policy judged it
//! and which rule let it pass, so a change of policy is noticed on the next packet. A [`Connection`] refers to an
//! entry without a lookup: a flow-cache hit calls [`Conntrack::touch`] with it.
//!
//! Owned by a port's worker. Fixed size, allocated by [`Conntrack::new`]; no operation allocates, and all are bounded.
//! What a guest or its peers can fill is this port's own.

use std::num::NonZeroU64;
use std::ops::Range;

use crate::bucket::TokenBucket;
use crate::conn_key::{Role, conn_key};
use crate::connection_row::ConnectionRow;
use crate::entry::{Entry, Tracked};
use crate::fragments::Fragments;
use crate::key::{Key, UDP, UDP_LITE};
use crate::model::{Direction, RuleId};
use crate::parse::{Fragment, Packet, Quoted, Transport};
use crate::slab::Memory;
use crate::table::Table;
use crate::tcp::{Context, Effect, STALLED_NS, TcpState, Tracker};

const SECOND_NS: u64 = 1_000_000_000;

/// Timeouts of nf_conntrack: UDP without an answer, UDP that has gone both ways for two seconds, ICMP, everything else.
const UDP_NS: u64 = 30 * SECOND_NS;
const UDP_STREAM_NS: u64 = 120 * SECOND_NS;
const UDP_STREAM_AFTER_MS: u32 = 2000;
const ICMP_NS: u64 = 30 * SECOND_NS;
const OTHER_NS: u64 = 600 * SECOND_NS;
/// How long a denied TCP connection is remembered: Linux sends a segment again after two minutes at the latest.
const REVOKED_NS: u64 = 300 * SECOND_NS;

/// An entry without TCP state is written to again only when its timeout has moved by this much.
const REFRESH_NS: u64 = SECOND_NS;

/// Size and strictness of a port's connection tracking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConntrackLimits {
    /// Connections at most: a million at most; once used, 64 bytes each, 64 more of TCP, 32 of IPv6, and 5 to 11 to find them.
    pub connections: u32,
    /// Fragmented datagrams at once.
    pub datagrams: u32,
    /// New connections per second and at once, for each direction of its own.
    pub new_flows: Option<(u64, u64)>,
    /// TCP windows do not decide (nf_conntrack_tcp_be_liberal).
    pub liberal: bool,
    /// A TCP connection may be picked up in its middle, if the rules allow its packet (nf_conntrack_tcp_loose).
    pub pick_up: bool,
}

impl Default for ConntrackLimits {
    /// 32,768 connections, 256 datagrams, no rate; strict windows and pick-up, as the kernel's defaults.
    fn default() -> Self {
        Self { connections: 32_768, datagrams: 256, new_flows: None, liberal: false, pick_up: true }
    }
}

/// What a packet is to the connections known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ConnState {
    /// It begins a connection, or repeats the beginning of one that nobody has answered.
    New,
    /// From the initiator of a connection that was answered.
    Established,
    /// From the responder.
    Reply,
    /// An ICMP error about a packet of a connection.
    Related,
    /// It fits no connection and cannot begin one.
    Invalid,
    /// ICMP that neither asks nor answers nor speaks of another packet: the rules judge each.
    Untracked,
}

/// Refers to an entry of one [`Conntrack`]. Goes stale when the entry does. One word: what is handed on through many hands is never
/// written in parts and read as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection(NonZeroU64);

impl Connection {
    /// Of the entry in a slot, which is taken: its generation is odd.
    #[inline]
    fn new(slot: u32, generation: u32) -> Option<Self> {
        Self::from_bits(u64::from(generation) << 32 | u64::from(slot))
    }

    /// In one word, never 0 and never less than 2^32.
    #[inline]
    #[must_use]
    pub const fn to_bits(self) -> u64 {
        self.0.get()
    }

    /// The inverse; `None` for 0.
    #[inline]
    #[must_use]
    pub const fn from_bits(bits: u64) -> Option<Self> {
        match NonZeroU64::new(bits) {
            Some(bits) => Some(Self(bits)),
            None => None,
        }
    }

    #[inline]
    const fn slot(self) -> u32 {
        self.0.get() as u32
    }

    #[inline]
    const fn generation(self) -> u32 {
        (self.0.get() >> 32) as u32
    }
}

/// Answer of [`Conntrack::track`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Track {
    /// What the packet is.
    pub state: ConnState,
    /// The connection, if it is known.
    pub connection: Option<Connection>,
}

/// Where the connection of a packet that goes one way is looked for, by one [`Conntrack`] that said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sought(u64);

/// What the rules said about a connection's first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Generation of the policy that judged it.
    pub policy_generation: u32,
    /// The rule that let it pass; `None`: the posture.
    pub rule: Option<RuleId>,
    /// Whether that rule logs.
    pub log: bool,
    /// The far end's identity, from a tunnel header.
    pub identity: Option<u16>,
}

/// Why a connection could not begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refused {
    /// Too many new ones a second.
    Rate,
    /// The table is full of more useful ones.
    Full,
    /// No connection begins with this packet.
    Invalid,
}

/// Answer of [`Conntrack::touch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Touched {
    /// It belongs to the connection, which may pass.
    Pass,
    /// It does not fit the connection's state: drop it.
    Invalid,
    /// The connection is gone, begins anew, or was judged by another policy: ask [`crate::decide()`].
    Stale,
}

/// Connections of one port. See the module's text.
#[derive(Debug)]
pub struct Conntrack {
    table: Table,
    fragments: Fragments,
    new_flows: Option<[TokenBucket; 2]>,
    limits: ConntrackLimits,
    /// Of the policy that the datagrams were judged by.
    fragments_generation: u32,
}

impl Conntrack {
    /// Allocates. `seed` is the table's secret: a random number that no guest knows.
    #[must_use]
    pub fn new(limits: ConntrackLimits, seed: u64) -> Self {
        Self {
            table: Table::new(limits.connections, seed),
            fragments: Fragments::new(limits.datagrams, seed),
            new_flows: limits.new_flows.map(|(rate, burst)| [TokenBucket::new(rate, burst); 2]),
            limits,
            fragments_generation: 0,
        }
    }

    /// Where such a packet's connection is looked for, so that it can be asked for early and need not be found out twice. `None`:
    /// ICMP that belongs to none.
    #[inline]
    #[must_use]
    pub fn seek(&self, key: &Key, direction: Direction) -> Option<Sought> {
        conn_key(key, direction).map(|(key, _)| Sought(self.table.hash(&key)))
    }

    /// The memory that is read first for what is sought: a cache line for the caller to ask for early.
    #[inline]
    #[must_use]
    pub fn bucket(&self, sought: Sought) -> &[u32; 16] {
        self.table.bucket(sought.0)
    }

    /// What a packet is. Moves the state of a connection that it belongs to; begins none.
    ///
    /// A later fragment is [`ConnState::Invalid`] here: [`crate::decide()`] judges it by its first.
    pub fn track(&mut self, packet: &Packet, direction: Direction, now_ns: u64) -> Track {
        self.track_sought(packet, direction, self.seek(&packet.key, direction), now_ns)
    }

    /// The same with what [`Self::seek`] says of the packet.
    pub(crate) fn track_sought(
        &mut self,
        packet: &Packet,
        direction: Direction,
        sought: Option<Sought>,
        now_ns: u64,
    ) -> Track {
        if matches!(packet.fragment, Fragment::Later { .. }) {
            return Track { state: ConnState::Invalid, connection: None };
        }
        if let Transport::IcmpError(quoted) = &packet.transport {
            return self.related(&packet.key, quoted.as_ref(), direction, now_ns);
        }
        let (Some((key, role)), Some(Sought(hash))) = (conn_key(&packet.key, direction), sought) else {
            return Track { state: ConnState::Untracked, connection: None };
        };
        debug_assert_eq!(hash, self.table.hash(&key), "sought for another packet");
        if let Some(slot) = self.table.find(&key, hash, now_ns) {
            match self.advance(slot, packet, direction, now_ns) {
                Advanced::Belongs(state) => return self.known(state, slot),
                Advanced::Invalid => return Track { state: ConnState::Invalid, connection: None },
                Advanced::Reopen => {}
            }
        }
        let begins = match &packet.transport {
            Transport::Tcp(segment) => Tracker::begin(segment, self.limits.pick_up).is_some(),
            _ => role != Role::Answers,
        };
        Track { state: if begins { ConnState::New } else { ConnState::Invalid }, connection: None }
    }

    /// Begins a connection with a packet that the rules have let through and that [`Self::track`] has called new.
    ///
    /// # Errors
    /// When there are too many, too fast, or the packet begins none.
    pub fn admit(
        &mut self,
        packet: &Packet,
        direction: Direction,
        grant: Grant,
        now_ns: u64,
    ) -> Result<Connection, Refused> {
        self.admit_sought(packet, direction, self.seek(&packet.key, direction), grant, now_ns)
    }

    /// The same with what [`Self::seek`] says of the packet.
    pub(crate) fn admit_sought(
        &mut self,
        packet: &Packet,
        direction: Direction,
        sought: Option<Sought>,
        grant: Grant,
        now_ns: u64,
    ) -> Result<Connection, Refused> {
        let (key, _) = conn_key(&packet.key, direction).ok_or(Refused::Invalid)?;
        let Sought(hash) = sought.ok_or(Refused::Invalid)?;
        debug_assert_eq!(hash, self.table.hash(&key), "sought for another packet");
        let tracker = match &packet.transport {
            Transport::Tcp(segment) => Some(Tracker::begin(segment, self.limits.pick_up).ok_or(Refused::Invalid)?),
            _ => None,
        };
        let (tracked, timeout_ns) = match packet.key.protocol {
            UDP | UDP_LITE => {
                (Tracked::Udp { stream_ms: milliseconds(now_ns).wrapping_add(UDP_STREAM_AFTER_MS) }, UDP_NS)
            }
            _ if packet.key.is_icmp() => (Tracked::Icmp, ICMP_NS),
            _ => (Tracked::Other, tracker.as_ref().map_or(OTHER_NS, |tracker| tracker.timeout_ns(false))),
        };
        if let Some(buckets) = &mut self.new_flows
            && !buckets[direction as usize].take(1, now_ns)
        {
            return Err(Refused::Rate);
        }
        let slot = self.table.insert(key, hash, now_ns).ok_or(Refused::Full)?;
        let entry = self.table.entry_mut(slot);
        entry.initiator = direction;
        entry.tracked = tracked;
        entry.expires_ns = now_ns.saturating_add(timeout_ns);
        apply(entry, grant);
        let connection = reference(slot, entry);
        if let Some(tracker) = tracker {
            self.table.track_tcp(slot, tracker);
        }
        Ok(connection)
    }

    /// A further packet of a flow whose connection is known: what a flow-cache hit costs. Fragments and ICMP errors are
    /// stale by definition: each is judged.
    #[inline]
    pub fn touch(
        &mut self,
        connection: Connection,
        packet: &Packet,
        direction: Direction,
        policy_generation: u32,
        now_ns: u64,
    ) -> Touched {
        let Some(slot) = self.table.resolve(connection.slot(), connection.generation()) else { return Touched::Stale };
        let entry = self.table.entry(slot);
        if entry.expires_ns <= now_ns
            || entry.policy_generation != policy_generation
            || packet.fragment != Fragment::Whole
            || matches!(packet.transport, Transport::IcmpError(_))
        {
            return Touched::Stale;
        }
        match self.advance(slot, packet, direction, now_ns) {
            Advanced::Belongs(_) => Touched::Pass,
            Advanced::Invalid => Touched::Invalid,
            Advanced::Reopen => Touched::Stale,
        }
    }

    /// The rules' last word on a connection, and its first packet with its direction.
    pub(crate) fn grant(&self, connection: Connection) -> Option<(Grant, Key, Direction)> {
        let entry = self.table.entry(self.table.resolve(connection.slot(), connection.generation())?);
        let rule = (entry.rule != u32::MAX).then_some(RuleId(entry.rule));
        let identity = entry.has(Entry::IDENTITY).then_some(entry.identity);
        let log = entry.has(Entry::LOG);
        let grant = Grant { policy_generation: entry.policy_generation, rule, log, identity };
        Some((grant, self.table.key(entry).key(entry.initiator), entry.initiator))
    }

    /// The rules have judged a connection again, and let it stay.
    pub(crate) fn regrant(&mut self, connection: Connection, grant: Grant) {
        if let Some(slot) = self.table.resolve(connection.slot(), connection.generation()) {
            apply(self.table.entry_mut(slot), grant);
        }
    }

    /// The rules no longer let a connection pass: it ends. One of TCP stays, to be judged at each packet, as long as either
    /// end repeats itself, and must make room for any other: else the segment that an end sends next would begin one in its
    /// middle, which other rules may let through, and open the way again. Others have no middle: what an end sends next begins
    /// one like any packet, and is judged so.
    pub(crate) fn revoke(&mut self, connection: Connection, refusal: Grant, now_ns: u64) {
        let Some(slot) = self.table.resolve(connection.slot(), connection.generation()) else { return };
        let entry = self.table.entry_mut(slot);
        if !matches!(entry.tracked, Tracked::Tcp { .. }) {
            self.table.free(slot);
            return;
        }
        // As if judged by the policy before this one: no cached flow passes, and any word of the rules is asked for anew.
        apply(entry, Grant { policy_generation: refusal.policy_generation.wrapping_sub(1), ..refusal });
        entry.flags |= Entry::REVOKED;
        entry.expires_ns = entry.expires_ns.min(now_ns.saturating_add(REVOKED_NS));
    }

    /// What [`Self::track`] would say of a packet's connection, changing nothing: for `why`.
    #[must_use]
    pub fn peek(&self, key: &Key, direction: Direction, now_ns: u64) -> Option<ConnectionRow> {
        let (key, _) = conn_key(key, direction)?;
        let entry = self.table.entry(self.table.peek(&key, self.table.hash(&key))?);
        (entry.expires_ns > now_ns && !entry.has(Entry::REVOKED))
            .then(|| ConnectionRow::new(&self.table, entry, now_ns))
    }

    /// Forgets what has expired among the next `count` entries of the table. Called now and then, so that [`Self::len`] is right and
    /// the quota is not taken by the dead; lookups see to expiry by themselves.
    pub fn sweep(&mut self, count: usize, now_ns: u64) {
        self.table.sweep(count, now_ns);
    }

    /// Connections, among them some that have expired since the last sweep.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.table.count()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Connections dropped for more useful ones before their time.
    #[must_use]
    pub fn dropped_early(&self) -> u64 {
        self.table.dropped_early
    }

    /// Rises with every connection that ends, however: at the same epoch, what was known still is.
    #[inline]
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.table.ended
    }

    /// Everything that is known, may pass and has not expired.
    pub fn rows(&self, now_ns: u64) -> impl Iterator<Item = ConnectionRow> {
        self.rows_among(0, usize::MAX, now_ns)
    }

    /// That of it which is in `count` places of the table from `first` on. There are [`Conntrack::places`] places.
    pub fn rows_among(&self, first: usize, count: usize, now_ns: u64) -> impl Iterator<Item = ConnectionRow> {
        let shown = move |entry: &&Entry| entry.expires_ns > now_ns && !entry.has(Entry::REVOKED);
        self.table
            .entries_among(first, count)
            .filter(shown)
            .map(move |entry| ConnectionRow::new(&self.table, entry, now_ns))
    }

    /// Addresses of the table's index. They, and those below, are the same until it is dropped: for who looks after its pages.
    #[must_use]
    pub fn index_memory(&self) -> Range<usize> {
        self.table.index_memory()
    }

    /// What is kept of connections, of TCP and of IPv6.
    #[inline]
    #[must_use]
    pub fn memory(&self) -> [Memory; 3] {
        self.table.memory()
    }

    /// Places that the table has used so far.
    #[must_use]
    pub fn places(&self) -> usize {
        self.table.places_used()
    }

    /// The first fragment of a datagram was let through by a policy of this generation.
    pub(crate) fn allow_fragments(
        &mut self,
        packet: &Packet,
        direction: Direction,
        policy_generation: u32,
        now_ns: u64,
    ) {
        if let Fragment::First { id, end_bytes } = packet.fragment {
            self.renew_fragments(policy_generation);
            self.fragments.allow(&packet.key, id, end_bytes, direction, now_ns);
        }
    }

    /// Whether a later fragment follows one that was let through by a policy of this generation.
    pub(crate) fn follows_first(
        &mut self,
        packet: &Packet,
        direction: Direction,
        policy_generation: u32,
        now_ns: u64,
    ) -> bool {
        self.renew_fragments(policy_generation);
        match packet.fragment {
            Fragment::Later { id, offset_bytes } => {
                self.fragments.follows(&packet.key, id, offset_bytes, direction, now_ns)
            }
            _ => false,
        }
    }

    fn renew_fragments(&mut self, policy_generation: u32) {
        if self.fragments_generation != policy_generation {
            self.fragments.clear();
            self.fragments_generation = policy_generation;
        }
    }

    fn known(&self, state: ConnState, slot: u32) -> Track {
        Track { state, connection: Some(reference(slot, self.table.entry(slot))) }
    }

    /// An ICMP error belongs to a connection if it goes to whoever sent the packet that it quotes, that packet is of the
    /// connection, and its sequence number could have been sent.
    fn related(&mut self, outer: &Key, quoted: Option<&Quoted>, direction: Direction, now_ns: u64) -> Track {
        let invalid = Track { state: ConnState::Invalid, connection: None };
        let Some(quoted) = quoted.filter(|quoted| quoted.key.source == outer.destination) else { return invalid };
        let sent = direction.opposite();
        let Some((key, _)) = conn_key(&quoted.key, sent) else { return invalid };
        let hash = self.table.hash(&key);
        let Some(slot) = self.table.find(&key, hash, now_ns) else { return invalid };
        let entry = self.table.entry(slot);
        let plausible = match (self.table.tracker(entry), quoted.sequence) {
            (Some(tracker), Some(sequence)) => {
                self.limits.liberal || tracker.may_have_sent(sequence, sent != entry.initiator)
            }
            _ => true,
        };
        if plausible { self.known(ConnState::Related, slot) } else { invalid }
    }

    #[inline]
    fn advance(&mut self, slot: u32, packet: &Packet, direction: Direction, now_ns: u64) -> Advanced {
        let liberal = self.limits.liberal;
        let (entry, tracker) = self.table.tracked_mut(slot);
        let reply = direction != entry.initiator;
        let replied = entry.has(Entry::REPLIED);
        let context = Context { replied, assured: entry.has(Entry::ASSURED), liberal };
        let timeout_ns = match (entry.tracked, tracker, &packet.transport) {
            (_, Some(tracker), Transport::Tcp(segment)) => {
                let before = tracker.state();
                let effect = tracker.advance(segment, reply, context);
                let after = tracker.state();
                entry.tcp = after;
                match effect {
                    Effect::Moved { timeout_ns } => {
                        // The only answer to a beginning is a reset: there is no connection.
                        let refused = !replied && after == TcpState::Close;
                        let answered = replied
                            && matches!(before, TcpState::SynRecv | TcpState::Established)
                            && after == TcpState::Established;
                        if answered {
                            entry.flags |= Entry::ASSURED;
                        }
                        entry.expires_ns = if refused { now_ns } else { now_ns.saturating_add(timeout_ns) };
                        None
                    }
                    Effect::Ignored => None,
                    Effect::Invalid => return Advanced::Invalid,
                    Effect::InvalidEnd => {
                        entry.expires_ns = entry.expires_ns.min(now_ns.saturating_add(STALLED_NS));
                        return Advanced::Invalid;
                    }
                    Effect::Reopen => {
                        self.table.free(slot);
                        return Advanced::Reopen;
                    }
                }
            }
            // A first fragment that hides a TCP header would have been unreadable.
            (Tracked::Tcp { .. }, ..) => return Advanced::Invalid,
            (Tracked::Udp { stream_ms }, ..) => {
                let stream = replied && (milliseconds(now_ns).wrapping_sub(stream_ms) as i32) > 0;
                if stream {
                    entry.flags |= Entry::ASSURED;
                }
                Some(if stream { UDP_STREAM_NS } else { UDP_NS })
            }
            (Tracked::Icmp, ..) => Some(ICMP_NS),
            (Tracked::Other, ..) => {
                if replied || reply {
                    entry.flags |= Entry::ASSURED;
                }
                Some(OTHER_NS)
            }
        };
        if let Some(timeout_ns) = timeout_ns {
            let expires_ns = now_ns.saturating_add(timeout_ns);
            if entry.expires_ns.abs_diff(expires_ns) >= REFRESH_NS {
                entry.expires_ns = expires_ns;
            }
        }
        if reply && !replied {
            entry.flags |= Entry::REPLIED;
        }
        Advanced::Belongs(match (reply, replied) {
            (true, _) => ConnState::Reply,
            (false, true) => ConnState::Established,
            (false, false) => ConnState::New,
        })
    }
}

enum Advanced {
    Belongs(ConnState),
    Invalid,
    Reopen,
}

fn reference(slot: u32, entry: &Entry) -> Connection {
    Connection::new(slot, entry.generation).expect("taken entries have odd generations")
}

fn apply(entry: &mut Entry, grant: Grant) {
    entry.policy_generation = grant.policy_generation;
    entry.rule = grant.rule.map_or(u32::MAX, |rule| rule.0);
    entry.identity = grant.identity.unwrap_or(0);
    entry.flags &= !(Entry::LOG | Entry::IDENTITY | Entry::REVOKED);
    if grant.log {
        entry.flags |= Entry::LOG;
    }
    if grant.identity.is_some() {
        entry.flags |= Entry::IDENTITY;
    }
}

/// Wraps after 49 days; only differences of seconds are taken.
const fn milliseconds(now_ns: u64) -> u32 {
    (now_ns / 1_000_000) as u32
}

#[cfg(test)]
#[path = "conntrack_tests.rs"]
mod tests;
