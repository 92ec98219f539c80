//! What happens to a packet at a port, in one direction: classifier and connection tracking together. Called on a miss of
//! the flow cache.
//!
//! The rules judge the first packet of a connection; everything else of it follows, for as long as the rules would still let
//! that first packet through. So after a change of policy the next packet of each connection judges it again: it stays with
//! its state, or ends. What either end of a TCP connection that has ended so goes on sending begins none.

use crate::classifier::{Classifier, Verdict};
use crate::conntrack::{ConnState, Connection, Conntrack, Grant, Refused, Sought};
use crate::model::{Direction, RuleId};
use crate::parse::{Fragment, Packet, Parsed};

/// Why a decision was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// The rule in [`Decision::rule`].
    Rule,
    /// No rule matched: the network's posture.
    Posture,
    /// ARP, neighbour discovery, multicast listener messages: IP does not work without. The source guard looks into them.
    Necessary,
    /// A later fragment, whose first was let through.
    FollowsFirst,
    /// A later fragment, whose first was not, or which would overlap it.
    FragmentWithoutFirst,
    /// Headers that could not be read to their end.
    Unreadable,
    /// It fits no connection and cannot begin one.
    InvalidState,
    /// The port's rate of new connections.
    NewFlowRate,
    /// The port's connection table.
    TableFull,
}

/// What to do with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// Whether it passes.
    pub allow: bool,
    /// Why.
    pub reason: Reason,
    /// The rule that decided about it or about its connection's first packet.
    pub rule: Option<RuleId>,
    /// Whether the rules were asked, not a connection that they have judged before.
    pub judged: bool,
    /// Whether that rule wants it logged: on a connection's first packet only, and on every denied one.
    pub log: bool,
    /// What it is to the connections known.
    pub state: ConnState,
    /// Its connection, for [`Conntrack::touch`].
    pub connection: Option<Connection>,
    /// Whether further packets with this key may pass without asking again, while the policy's generation lasts: with a
    /// connection, if [`Conntrack::touch`] says so; without one, in any case. Never of what is denied: a packet of the
    /// other direction may open the way.
    pub cache: bool,
}

/// Decides about a packet in one direction.
///
/// `identity` is the remote's, from a tunnel header that is trusted; `policy_generation` names the classifier: it must change
/// whenever the classifier does.
pub fn decide(
    classifier: &Classifier,
    conntrack: &mut Conntrack,
    parsed: &Parsed,
    direction: Direction,
    identity: Option<u16>,
    policy_generation: u32,
    now_ns: u64,
) -> Decision {
    decide_sought(classifier, conntrack, parsed, None, direction, identity, policy_generation, now_ns)
}

/// The same with what [`Conntrack::seek`] says of the packet in this direction, if it was asked already.
#[allow(clippy::too_many_arguments, reason = "a packet, where it is judged, and what is known of it")]
pub fn decide_sought(
    classifier: &Classifier,
    conntrack: &mut Conntrack,
    parsed: &Parsed,
    sought: Option<Sought>,
    direction: Direction,
    identity: Option<u16>,
    policy_generation: u32,
    now_ns: u64,
) -> Decision {
    if classifier.allows_all() {
        return Decision { cache: true, ..stateless(true, Reason::Posture, None, false) };
    }
    let packet = match parsed {
        Parsed::Unreadable => return stateless(false, Reason::Unreadable, None, false),
        Parsed::Arp => return Decision { cache: true, ..stateless(true, Reason::Necessary, None, false) },
        Parsed::Other(_) => {
            let verdict = classifier.lookup_other(direction, identity);
            return Decision { cache: verdict.allow, ..judged(verdict) };
        }
        Parsed::Ip(packet) => packet,
    };
    if let Fragment::Later { .. } = packet.fragment {
        return match conntrack.follows_first(packet, direction, policy_generation, now_ns) {
            true => stateless(true, Reason::FollowsFirst, None, false),
            false => stateless(false, Reason::FragmentWithoutFirst, None, false),
        };
    }
    if packet.key.is_neighbour_discovery() {
        return Decision {
            cache: packet.fragment == Fragment::Whole,
            ..stateless(true, Reason::Necessary, None, false)
        };
    }
    let sought = sought.or_else(|| conntrack.seek(&packet.key, direction));
    let decision = tracked(classifier, conntrack, packet, sought, direction, identity, policy_generation, now_ns);
    if decision.allow {
        conntrack.allow_fragments(packet, direction, policy_generation, now_ns);
    }
    decision
}

#[allow(clippy::too_many_arguments, reason = "as above")]
fn tracked(
    classifier: &Classifier,
    conntrack: &mut Conntrack,
    packet: &Packet,
    sought: Option<Sought>,
    direction: Direction,
    identity: Option<u16>,
    policy_generation: u32,
    now_ns: u64,
) -> Decision {
    let track = conntrack.track_sought(packet, direction, sought, now_ns);
    if let Some(connection) = track.connection {
        // An error comes from anybody on the way.
        let shown = (track.state != ConnState::Related).then_some((direction, identity));
        let mut decision = of_connection(classifier, conntrack, connection, shown, policy_generation, now_ns);
        decision.state = track.state;
        decision.cache = decision.allow && track.state != ConnState::Related && packet.fragment == Fragment::Whole;
        return decision;
    }
    let state = track.state;
    if state == ConnState::Invalid {
        return Decision { state, ..stateless(false, Reason::InvalidState, None, false) };
    }
    let verdict = classifier.lookup(direction, &packet.key, identity);
    let judged = Decision { state, ..judged(verdict) };
    if !verdict.allow {
        return judged;
    }
    let whole = packet.fragment == Fragment::Whole;
    if state == ConnState::Untracked {
        return Decision { cache: whole, ..judged };
    }
    let grant = Grant { policy_generation, rule: verdict.rule, log: verdict.log, identity };
    match conntrack.admit_sought(packet, direction, sought, grant, now_ns) {
        Ok(connection) => Decision { connection: Some(connection), cache: whole, ..judged },
        Err(refused) => {
            let reason = match refused {
                Refused::Rate => Reason::NewFlowRate,
                Refused::Full => Reason::TableFull,
                Refused::Invalid => Reason::InvalidState,
            };
            Decision { allow: false, reason, ..judged }
        }
    }
}

/// Judges a connection again if another policy has judged it last, or its initiator shows another identity than then, or none.
/// `shown` is which way the packet goes and the identity in it. Under the same policy another identity costs the packet alone:
/// whoever forges one ends nobody's connection.
fn of_connection(
    classifier: &Classifier,
    conntrack: &mut Conntrack,
    connection: Connection,
    shown: Option<(Direction, Option<u16>)>,
    policy_generation: u32,
    now_ns: u64,
) -> Decision {
    let Some((grant, key, initiator)) = conntrack.grant(connection) else {
        return stateless(false, Reason::InvalidState, None, false);
    };
    let identity = match (initiator, shown) {
        (Direction::Ingress, Some((Direction::Ingress, identity))) => identity,
        _ => grant.identity,
    };
    let is_same_policy = grant.policy_generation == policy_generation;
    if is_same_policy && grant.identity == identity {
        let decision = stateless(true, because(grant.rule), grant.rule, false);
        return Decision { connection: Some(connection), ..decision };
    }
    let verdict = classifier.lookup(initiator, &key, identity);
    let grant = Grant { policy_generation, rule: verdict.rule, log: verdict.log, identity };
    if !verdict.allow {
        if !is_same_policy {
            conntrack.revoke(connection, grant, now_ns);
        }
        return judged(verdict);
    }
    conntrack.regrant(connection, grant);
    Decision { connection: Some(connection), log: false, ..judged(verdict) }
}

fn because(rule: Option<RuleId>) -> Reason {
    if rule.is_some() { Reason::Rule } else { Reason::Posture }
}

/// What the rules say now.
fn judged(verdict: Verdict) -> Decision {
    Decision { judged: true, ..stateless(verdict.allow, because(verdict.rule), verdict.rule, verdict.log) }
}

fn stateless(allow: bool, reason: Reason, rule: Option<RuleId>, log: bool) -> Decision {
    Decision { allow, reason, rule, judged: false, log, state: ConnState::Untracked, connection: None, cache: false }
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
