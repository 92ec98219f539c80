//! Why a flow would pass or not: for `dreamwire why`, without a packet.
//!
//! The verdict comes from the compiled classifier, the same that decides about packets; the list of rules that would have
//! matched beside it from the oracle. Not for the datapath: it allocates and walks every rule.

use crate::classifier::{Classifier, Verdict};
use crate::key::Key;
use crate::model::{Action, Direction, GroupId, Policy, RuleId};
use crate::oracle::{Subject, matches};

/// A rule that matches, but comes after the one that decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shadowed {
    /// The rule.
    pub rule: RuleId,
    /// The group that it belongs to.
    pub group: GroupId,
    /// What it would have done.
    pub action: Action,
    /// Its priority.
    pub priority: u16,
}

/// Who decides about a flow at a port, in one direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// The decision about the flow's first packet.
    pub verdict: Verdict,
    /// The group of the rule that decides; `None`: the posture decides.
    pub group: Option<GroupId>,
    /// Rules that match too, in the order in which they would have decided.
    pub shadowed: Vec<Shadowed>,
}

/// Explains. `policy` is what `classifier` was compiled from.
#[must_use]
pub fn explain(
    policy: &Policy,
    classifier: &Classifier,
    direction: Direction,
    key: &Key,
    identity: Option<u16>,
) -> Explanation {
    let verdict = classifier.lookup(direction, key, identity);
    let matching =
        classifier.rules().iter().filter(|rule| matches(policy, rule, direction, Subject::Flow(key), identity));
    let mut group = None;
    let mut shadowed = Vec::new();
    for rule in matching {
        match Some(rule.id) == verdict.rule {
            true => group = Some(rule.group),
            false => {
                let &crate::model::Rule { id, group, action, priority, .. } = rule;
                shadowed.push(Shadowed { rule: id, group, action, priority });
            }
        }
    }
    Explanation { verdict, group, shadowed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Group, PortRange, Posture, Protocol, Remote, Rule};

    fn rule(id: u32, action: Action, priority: u16, ports: Vec<PortRange>) -> Rule {
        Rule {
            id: RuleId(id),
            group: GroupId(id % 2),
            direction: Direction::Ingress,
            protocol: Protocol::Tcp,
            ports,
            icmp: vec![],
            remote: Remote::Any,
            action,
            priority,
            log: false,
        }
    }

    #[test]
    fn the_deciding_rule_and_those_it_shadows_are_named() {
        let https = vec![PortRange { first: 443, last: 443 }];
        let rules = vec![
            rule(1, Action::Allow, 10, vec![]),
            rule(2, Action::Deny, 10, https),
            rule(3, Action::Allow, 20, vec![PortRange { first: 80, last: 80 }]),
            rule(4, Action::Deny, 5, vec![]),
        ];
        let groups = [GroupId(0), GroupId(1)];
        let named = groups.map(|id| Group { id, members: vec![] });
        let policy = Policy::new(named.to_vec(), rules, vec![]).unwrap();
        let classifier = Classifier::compile(&policy, Posture::Enforced, &groups);
        let why = |port| {
            let key = Key::new(6, ("10.0.0.2".parse().unwrap(), 40000), ("10.0.0.1".parse().unwrap(), port));
            explain(&policy, &classifier, Direction::Ingress, &key, None)
        };
        let https = why(443);
        assert_eq!(https.verdict, Verdict { allow: false, rule: Some(RuleId(2)), log: false });
        assert_eq!(https.group, Some(GroupId(0)));
        assert_eq!(https.shadowed.iter().map(|shadowed| shadowed.rule.0).collect::<Vec<_>>(), [1, 4]);
        assert_eq!(why(80).verdict.rule, Some(RuleId(3)));
        let key = Key::new(17, ("10.0.0.2".parse().unwrap(), 40000), ("10.0.0.1".parse().unwrap(), 80));
        let nobody = explain(&policy, &classifier, Direction::Ingress, &key, None);
        assert_eq!(
            nobody,
            Explanation { verdict: Verdict { allow: false, rule: None, log: false }, group: None, shadowed: vec![] }
        );
    }
}
