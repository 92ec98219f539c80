//! The oracle: the rules, interpreted slowly and obviously. The compiled classifier is tested against it, and explanations
//! list with it what else would have matched. Shares nothing with the classifier but the model.

use std::net::IpAddr;

use crate::classifier::Verdict;
use crate::key::{Family, Key};
use crate::model::{Action, Direction, GroupId, Policy, Posture, Protocol, Remote, Rule};

/// A frame to be judged: an IP flow, or neither IP nor ARP.
#[derive(Debug, Clone, Copy)]
pub enum Subject<'a> {
    /// IP.
    Flow(&'a Key),
    /// Anything else.
    Other,
}

/// First match in a list.
#[must_use]
pub fn verdict(
    policy: &Policy,
    posture: Posture,
    groups: &[GroupId],
    direction: Direction,
    subject: Subject<'_>,
    identity: Option<u16>,
) -> Verdict {
    let mut winner: Option<&Rule> = None;
    for rule in policy.rules() {
        if groups.contains(&rule.group) && matches(policy, rule, direction, subject, identity) {
            let wins = winner.is_none_or(|best| {
                rule.priority > best.priority
                    || (rule.priority == best.priority && rule.action == Action::Deny && best.action == Action::Allow)
            });
            if wins {
                winner = Some(rule);
            }
        }
    }
    match winner {
        Some(rule) => Verdict { allow: rule.action == Action::Allow, rule: Some(rule.id), log: rule.log },
        None => Verdict {
            allow: match posture {
                Posture::Open => true,
                Posture::Enforced => direction == Direction::Egress,
            },
            rule: None,
            log: false,
        },
    }
}

/// Whether a rule matches, whatever port it applies to.
#[must_use]
pub fn matches(
    policy: &Policy,
    rule: &Rule,
    direction: Direction,
    subject: Subject<'_>,
    identity: Option<u16>,
) -> bool {
    let remote = match (subject, direction) {
        (Subject::Other, _) => None,
        (Subject::Flow(key), Direction::Ingress) => Some(key.source_address()),
        (Subject::Flow(key), Direction::Egress) => Some(key.destination_address()),
    };
    rule.direction == direction
        && matches_protocol(rule, subject)
        && matches_remote(policy, rule.remote, remote, identity)
}

fn matches_protocol(rule: &Rule, subject: Subject<'_>) -> bool {
    let key = match (rule.protocol, subject) {
        (Protocol::Any, _) => return true,
        (_, Subject::Other) => return false,
        (_, Subject::Flow(key)) => key,
    };
    let protocol = match rule.protocol {
        Protocol::Any => true,
        Protocol::Tcp => key.protocol == 6,
        Protocol::Udp => key.protocol == 17,
        Protocol::Icmp => key.protocol == 1 && key.family == Family::V4,
        Protocol::Icmpv6 => key.protocol == 58 && key.family == Family::V6,
        Protocol::Number(number) => key.protocol == number,
    };
    let ports = rule.ports.is_empty()
        || rule.ports.iter().any(|range| range.first <= key.destination_port && key.destination_port <= range.last);
    let [kind, code] = key.destination_port.to_be_bytes();
    let icmp = rule.icmp.is_empty()
        || rule.icmp.iter().any(|wanted| wanted.kind == kind && wanted.code.is_none_or(|wanted| wanted == code));
    protocol && ports && icmp
}

fn matches_remote(policy: &Policy, remote: Remote, address: Option<IpAddr>, identity: Option<u16>) -> bool {
    match remote {
        Remote::Any => true,
        Remote::Prefix(prefix) => address.is_some_and(|address| prefix.contains(address)),
        Remote::Group(group) => match identity {
            Some(tag) => policy.identities().iter().any(|known| known.tag == tag && known.groups.contains(&group)),
            None => {
                let members = policy.groups().iter().filter(|known| known.id == group).flat_map(|known| &known.members);
                address.is_some_and(|address| members.copied().any(|prefix| prefix.contains(address)))
            }
        },
    }
}
