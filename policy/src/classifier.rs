//! The compiled classifier of a port: rules in, verdicts out, at a cost that hardly grows with their number.
//!
//! A lookup is a longest prefix match of the remote address (`lpm.rs`) and, for each of the few prefixes around it,
//! one search of a port among intervals (`rows.rs`, `intervals.rs`). Compiled for a set of groups: ports that are
//! in the same groups share one. Immutable; a change of rules is a new one. Hashes are seeded.

use std::collections::HashSet;

use crate::intervals::NONE;
use crate::key::Key;
use crate::model::{Action, Direction, GroupId, Policy, Posture, Rule, RuleId};
use crate::rows::{Question, Rows, Slots};

/// What the rules say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it may pass.
    pub allow: bool,
    /// The rule that decided; `None`: the posture.
    pub rule: Option<RuleId>,
    /// Whether the rule wants it logged.
    pub log: bool,
}

/// The rules of a port, compiled.
#[derive(Debug)]
pub struct Classifier {
    posture: Posture,
    /// By rank: the first that matches decides.
    rules: Vec<Rule>,
    slots: Slots,
    ingress: Rows,
    egress: Rows,
}

impl Classifier {
    /// Compiles the rules that apply to a port in these groups of a network with this posture.
    #[must_use]
    pub fn compile(policy: &Policy, posture: Posture, groups: &[GroupId]) -> Self {
        let groups: HashSet<GroupId> = groups.iter().copied().collect();
        let mut rules: Vec<Rule> = policy.rules().iter().filter(|rule| groups.contains(&rule.group)).cloned().collect();
        // Stable: definition order is the last criterion.
        rules.sort_by_key(|rule| (std::cmp::Reverse(rule.priority), rule.action == Action::Allow));
        let slots = Slots::new(rules.iter());
        let side = |direction| {
            let ranked = (0..).zip(&rules).filter(|(_, rule)| rule.direction == direction);
            Rows::compile(policy, &slots, &ranked.collect::<Vec<_>>())
        };
        let (ingress, egress) = (side(Direction::Ingress), side(Direction::Egress));
        Self { posture, rules, slots, ingress, egress }
    }

    /// The verdict on the first packet of a flow. The remote is the source of ingress and the destination of egress; with an
    /// `identity` (from a tunnel header), its groups are those of the identity, and not those that list its address.
    #[inline]
    #[must_use]
    pub fn lookup(&self, direction: Direction, key: &Key, identity: Option<u16>) -> Verdict {
        let remote = match direction {
            Direction::Ingress => key.source,
            Direction::Egress => key.destination,
        };
        let question = Question {
            slot: self.slots.of(key.family, key.protocol),
            port: key.destination_port,
            remote: Some((key.family, remote)),
            identity,
        };
        self.verdict(direction, self.rows(direction).lookup(question))
    }

    /// The verdict on a frame that is neither IP nor ARP: rules for every protocol and remote `any` (or a group of the
    /// identity's) apply.
    #[must_use]
    pub fn lookup_other(&self, direction: Direction, identity: Option<u16>) -> Verdict {
        let question = Question { slot: 0, port: 0, remote: None, identity };
        self.verdict(direction, self.rows(direction).lookup(question))
    }

    /// No rules and an open network: nothing needs to be looked up or tracked.
    #[inline]
    #[must_use]
    pub fn allows_all(&self) -> bool {
        self.rules.is_empty() && self.posture == Posture::Open
    }

    /// The rules, the first that matches first.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// What holds where no rule matches.
    #[must_use]
    pub fn posture(&self) -> Posture {
        self.posture
    }

    /// Bytes that the compiled form takes on the heap, give or take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.ingress.bytes() + self.egress.bytes() + self.rules.len() * size_of::<Rule>()
    }

    #[inline]
    fn rows(&self, direction: Direction) -> &Rows {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }

    #[inline]
    fn verdict(&self, direction: Direction, rank: u32) -> Verdict {
        match rank {
            NONE => Verdict { allow: self.posture.allows(direction), rule: None, log: false },
            rank => {
                let rule = &self.rules[rank as usize];
                Verdict { allow: rule.action == Action::Allow, rule: Some(rule.id), log: rule.log }
            }
        }
    }
}

impl std::fmt::Display for Classifier {
    /// Sizes, for people.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} rules; ingress: {}; egress: {}", self.rules.len(), self.ingress, self.egress)
    }
}

#[cfg(test)]
#[path = "classifier_tests.rs"]
mod tests;
