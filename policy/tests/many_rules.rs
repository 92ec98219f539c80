//! As many rules and groups as a large tenant has: nothing breaks, and the answers are still the list's.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::net::{IpAddr, Ipv4Addr};

use dreamwire_policy::oracle::{Subject, verdict};
use dreamwire_policy::{
    Action, Classifier, Direction, Group, GroupId, Key, Policy, PortRange, Posture, Prefix, Protocol, Remote, Rule,
    RuleId,
};

const RULES: u32 = 10_000;
const GROUPS: u32 = 1000;
const TCP: u8 = 6;
/// Ten for each group.
const HOSTS: u32 = 10 * GROUPS;

fn host(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + n % HOSTS)
}

/// Each group has ten hosts, and ten rules on other groups, prefixes around them or anybody, on ports of their own.
fn policy() -> Policy {
    let members = |group| (0..10).map(|n| Prefix::new(host(group * 10 + n).into(), 32).unwrap()).collect();
    let groups = (0..GROUPS).map(|group| Group { id: GroupId(group), members: members(group) }).collect();
    let rule = |n: u32| Rule {
        id: RuleId(n),
        group: GroupId(n % GROUPS),
        direction: if n.is_multiple_of(7) { Direction::Egress } else { Direction::Ingress },
        protocol: Protocol::Tcp,
        ports: vec![PortRange { first: (n % 1000) as u16, last: (n % 1000 + n % 13 * 10) as u16 }],
        icmp: vec![],
        remote: match n % 3 {
            0 => Remote::Group(GroupId(n * 31 % GROUPS)),
            1 => Remote::Prefix(Prefix::new(host(n * 17).into(), 20 + (n % 13) as u8).unwrap()),
            _ if n % 50 == 2 => Remote::Any,
            _ => Remote::Group(GroupId(n / 10)),
        },
        action: if n.is_multiple_of(5) { Action::Deny } else { Action::Allow },
        priority: (n % 4) as u16,
        log: false,
    };
    Policy::new(groups, (0..RULES).map(rule).collect(), vec![]).unwrap()
}

/// A rule of a group below this.
fn matching(n: u32, groups: u32) -> u32 {
    n * 7 % 10 * GROUPS + n * 37 % groups
}

fn of(remote: Remote, n: u32) -> IpAddr {
    match remote {
        Remote::Any => host(n).into(),
        Remote::Prefix(prefix) => prefix.address(),
        Remote::Group(group) => host(group.0 * 10 + n % 10).into(),
    }
}

#[test]
fn ten_thousand_rules_of_a_thousand_groups_answer_as_the_list_does() {
    let policy = policy();
    let mut by_rule = 0;
    // A port in one group, in some, and in all.
    for (port_groups, lookups) in [(1, 60), (30, 60), (GROUPS, 12)] {
        let groups: Vec<GroupId> = (0..port_groups).map(GroupId).collect();
        let classifier = Classifier::compile(&policy, Posture::Enforced, &groups);
        for n in 0..lookups {
            let (direction, remote, port) =
                match policy.rules().iter().find(|rule| rule.id.0 == matching(n, port_groups)) {
                    // What a rule is for, and anything.
                    Some(rule) if n.is_multiple_of(2) => (rule.direction, of(rule.remote, n), rule.ports[0].last),
                    _ => (Direction::Ingress, host(n * 97).into(), (n * 13 % 1100) as u16),
                };
            let (vm, remote) = ((host(n * 389).into(), port), (remote, port));
            let key =
                if direction == Direction::Ingress { Key::new(TCP, remote, vm) } else { Key::new(TCP, vm, remote) };
            let expected = verdict(&policy, Posture::Enforced, &groups, direction, Subject::Flow(&key), None);
            assert_eq!(
                classifier.lookup(direction, &key, None),
                expected,
                "{port_groups} groups, {direction:?} {key:?}"
            );
            by_rule += u32::from(expected.rule.is_some());
        }
        println!("a port in {port_groups} of {GROUPS} groups: {classifier}");
        assert!(classifier.bytes() < 64 << 20);
    }
    assert!(by_rule > 60, "rules decide: {by_rule}");
}
