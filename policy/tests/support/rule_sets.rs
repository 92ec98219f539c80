//! Random rule sets over a small world, so that rules are hit, nested, shadowed and missed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dreamwire_policy::{
    Action, Direction, Group, GroupId, IcmpKind, Identity, Key, Policy, PortRange, Prefix, Protocol, Remote, Rule,
    RuleId,
};

use super::random::Random;

pub(crate) const GROUPS: u32 = 6;
pub(crate) const IDENTITIES: u16 = 4;
const PORTS: [u16; 10] = [0, 22, 53, 80, 443, 1000, 1001, 2000, 40_000, 65_535];

pub(crate) fn address(random: &mut Random, v6: bool) -> IpAddr {
    let [a, b] = [random.below(4) as u8, random.below(8) as u8];
    if v6 {
        Ipv6Addr::from([0xfd, 0, 0, 0, 0, 0, 0, a, 0, 0, 0, 0, 0, 0, 0, b]).into()
    } else {
        Ipv4Addr::new(10, 0, a, b).into()
    }
}

fn prefix(random: &mut Random) -> Prefix {
    let v6 = random.one_in(2);
    let address = address(random, v6);
    let lengths: &[u8] =
        if v6 { &[0, 8, 56, 62, 64, 64, 125, 126, 128, 128] } else { &[0, 8, 16, 23, 24, 24, 29, 30, 32, 32] };
    Prefix::new(address, random.of(lengths)).unwrap()
}

fn rule(random: &mut Random, id: u32) -> Rule {
    let protocol = match random.below(10) {
        0 | 1 => Protocol::Any,
        2..=4 => Protocol::Tcp,
        5 => Protocol::Udp,
        6 => Protocol::Icmp,
        7 => Protocol::Icmpv6,
        8 => Protocol::Number(random.of(&[1, 6, 17, 58, 132])),
        _ => Protocol::Number(random.of(&[47, 50, 89])),
    };
    let ported = matches!(protocol, Protocol::Tcp | Protocol::Udp | Protocol::Number(6 | 17 | 132));
    let icmp = matches!(protocol, Protocol::Icmp | Protocol::Icmpv6);
    let some = |random: &mut Random| if random.one_in(3) { 0 } else { 1 + random.below(3) };
    let ports = (0..if ported { some(random) } else { 0 }).map(|_| {
        let first = random.of(&PORTS);
        let last = if random.one_in(2) { first } else { first.saturating_add(random.below(2000) as u16) };
        PortRange { first, last }
    });
    let ports = ports.collect();
    let icmp = (0..if icmp { some(random) } else { 0 })
        .map(|_| IcmpKind { kind: random.of(&[3, 8, 128, 13]), code: random.one_in(2).then(|| random.below(2) as u8) });
    let icmp = icmp.collect();
    Rule {
        id: RuleId(id),
        group: GroupId(random.below(GROUPS.into()) as u32),
        direction: if random.one_in(2) { Direction::Ingress } else { Direction::Egress },
        protocol,
        ports,
        icmp,
        remote: match random.below(4) {
            0 => Remote::Any,
            1 | 2 => Remote::Prefix(prefix(random)),
            _ => Remote::Group(GroupId(random.below(GROUPS.into()) as u32)),
        },
        action: if random.below(5) < 3 { Action::Allow } else { Action::Deny },
        priority: random.below(4) as u16,
        log: random.one_in(4),
    }
}

pub(crate) fn policy(random: &mut Random) -> Policy {
    let groups = (0..GROUPS).map(|id| {
        let members = (0..random.below(6)).map(|_| prefix(random)).collect();
        Group { id: GroupId(id), members }
    });
    let groups = groups.collect();
    // Now and then enough that layers are no longer merged and port tables get a bitmap.
    let count = match random.below(20) {
        0 => 0,
        1 => 400,
        _ => 1 + random.below(40),
    };
    let rules = (0..count).map(|id| rule(random, id as u32)).collect();
    let identities = (0..IDENTITIES).map(|tag| {
        let groups = (0..random.below(3)).map(|_| GroupId(random.below(GROUPS.into()) as u32)).collect();
        Identity { tag, groups }
    });
    let identities = identities.collect();
    Policy::new(groups, rules, identities).unwrap()
}

pub(crate) fn port_groups(random: &mut Random) -> Vec<GroupId> {
    (0..GROUPS).filter(|_| random.one_in(2)).map(GroupId).collect()
}

pub(crate) fn key(random: &mut Random) -> Key {
    let v6 = random.one_in(2);
    let protocol = random.of(&[6, 6, 6, 17, 17, 1, 58, 132, 47, 50, 4]);
    let port = |random: &mut Random| if random.one_in(4) { random.next() as u16 } else { random.of(&PORTS) };
    let (source_port, destination_port) = match protocol {
        6 | 17 | 132 => (port(random), port(random)),
        1 | 58 => {
            (random.below(3) as u16, u16::from_be_bytes([random.of(&[0, 3, 8, 128, 129, 13]), random.below(2) as u8]))
        }
        _ => (0, 0),
    };
    Key::new(protocol, (address(random, v6), source_port), (address(random, v6), destination_port))
}
