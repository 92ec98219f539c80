use super::*;
use crate::model::{Group, Identity, PortRange, Prefix, Protocol, Remote};

fn rule(id: u32, group: u32, direction: Direction, remote: Remote, action: Action) -> Rule {
    Rule {
        id: RuleId(id),
        group: GroupId(group),
        direction,
        protocol: Protocol::Tcp,
        ports: vec![PortRange { first: 443, last: 443 }],
        icmp: vec![],
        remote,
        action,
        priority: 100,
        log: false,
    }
}

fn prefix(address: &str, length: u8) -> Prefix {
    Prefix::new(address.parse().unwrap(), length).unwrap()
}

fn from(address: &str) -> Key {
    Key::new(6, (address.parse().unwrap(), 40000), ("10.0.0.1".parse().unwrap(), 443))
}

#[test]
fn a_rule_applies_to_ports_in_its_group_only() {
    let groups = vec![Group { id: GroupId(1), members: vec![] }, Group { id: GroupId(2), members: vec![] }];
    let rules = vec![rule(1, 1, Direction::Ingress, Remote::Any, Action::Allow)];
    let policy = Policy::new(groups, rules, vec![]).unwrap();
    for (group, posture, allow) in
        [(1, Posture::Enforced, true), (2, Posture::Enforced, false), (2, Posture::Open, true)]
    {
        let classifier = Classifier::compile(&policy, posture, &[GroupId(group)]);
        assert_eq!(classifier.lookup(Direction::Ingress, &from("10.0.0.2"), None).allow, allow, "{group} {posture:?}");
        assert_eq!(classifier.allows_all(), (group, posture) == (2, Posture::Open));
        assert!(classifier.lookup(Direction::Egress, &from("10.0.0.2"), None).allow);
    }
}

#[test]
fn an_identity_stands_for_its_groups_and_an_address_for_those_that_list_it() {
    let groups = vec![
        Group { id: GroupId(1), members: vec![] },
        Group { id: GroupId(2), members: vec![prefix("10.0.0.2", 32)] },
    ];
    let rules = vec![
        rule(1, 1, Direction::Ingress, Remote::Group(GroupId(2)), Action::Allow),
        rule(2, 1, Direction::Ingress, Remote::Prefix(prefix("10.0.7.0", 24)), Action::Allow),
    ];
    let identities = vec![Identity { tag: 7, groups: vec![GroupId(2)] }, Identity { tag: 8, groups: vec![GroupId(1)] }];
    let policy = Policy::new(groups, rules, identities).unwrap();
    let classifier = Classifier::compile(&policy, Posture::Enforced, &[GroupId(1)]);
    let rule =
        |address, identity| classifier.lookup(Direction::Ingress, &from(address), identity).rule.map(|rule| rule.0);
    assert_eq!(rule("10.0.0.2", None), Some(1));
    assert_eq!(rule("10.0.0.3", None), None);
    assert_eq!(rule("10.9.9.9", Some(7)), Some(1), "the VM has moved, its group with it");
    assert_eq!(rule("10.0.0.2", Some(8)), None, "an address is not taken for a group that the sender is not in");
    assert_eq!(rule("10.0.0.2", Some(99)), None, "nobody knows this identity");
    assert_eq!(rule("10.0.7.1", Some(99)), Some(2), "prefixes are about addresses");
}

#[test]
fn many_nested_prefixes_and_ports_stay_small() {
    let groups = vec![Group { id: GroupId(1), members: vec![] }];
    let rules: Vec<Rule> = (0..10_000u32)
        .map(|n| {
            let address = std::net::Ipv4Addr::from(0x0a00_0000 | n.wrapping_mul(2_654_435_761) & 0x00ff_ffff).into();
            let remote = Remote::Prefix(Prefix::new(address, 8 + (n % 25) as u8).unwrap());
            let ports = vec![PortRange { first: n as u16, last: n as u16 + 5 }];
            Rule { ports, ..rule(n, 1, Direction::Ingress, remote, Action::Allow) }
        })
        .collect();
    let policy = Policy::new(groups, rules, vec![]).unwrap();
    let classifier = Classifier::compile(&policy, Posture::Enforced, &[GroupId(1)]);
    assert!(classifier.bytes() < 32 << 20, "{} bytes: {classifier}", classifier.bytes());
}
