//! Guests behind perimeters: what passes, what ends where, and that leases never outlive what they were made from.

mod common;

use std::sync::Arc;

use common::*;
use dreamwire_datapath::drop_reason::DropReason;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::perimeter::{Perimeter, PerimeterLimits};
use dreamwire_datapath::snapshot::{NetworkId, PortId, PortPolicy};
use dreamwire_policy::tcp::TcpState;
use dreamwire_policy::{
    Action, Classifier, ConnectionRow, ConntrackLimits, Direction, Group, GroupId, IcmpKind, Identity, Key,
    MeterLimits, Policy, PortRange, Posture, Protocol, Remote, Rule, RuleId,
};

const WEB: GroupId = GroupId(1);
const OPEN: GroupId = GroupId(2);
const IDENTITY: u16 = 77;

fn rule(id: u32, group: GroupId, port: u16, action: Action, remote: Remote) -> Rule {
    Rule {
        id: RuleId(id),
        group,
        direction: Direction::Ingress,
        protocol: Protocol::Udp,
        ports: vec![PortRange { first: port, last: port }],
        icmp: Vec::<IcmpKind>::new(),
        remote,
        action,
        priority: 10,
        log: false,
    }
}

/// Station 0 and 2 are open, station 1 is in `WEB` of an enforced network, under these rules.
fn perimeter_lan(rules: Vec<Rule>) -> Lan {
    let mut lan = acquainted(3, 1);
    for id in 0..3 {
        assert!(lan.worker.guard(PortId(id), Some(Box::new(Perimeter::new(PerimeterLimits::default(), 7)))).is_none());
    }
    lan.snapshot.rules = (0..8).map(|_| Arc::default()).collect();
    set_rules(&mut lan, rules);
    lan
}

fn set_rules(lan: &mut Lan, rules: Vec<Rule>) {
    let groups = vec![Group { id: WEB, members: vec![] }, Group { id: OPEN, members: vec![] }];
    let policy =
        Policy::new(groups, rules, vec![Identity { tag: IDENTITY, groups: vec![OPEN] }]).expect("a sound policy");
    for (id, groups) in [(0, vec![OPEN]), (1, vec![WEB]), (2, vec![OPEN])] {
        let classifier = Arc::new(Classifier::compile(&policy, Posture::Enforced, &groups));
        lan.snapshot.ports[id].as_mut().expect("a port").policy =
            Some(PortPolicy { classifier, meters: Default::default() });
    }
    lan.snapshot.policy_generation += 1;
    lan.snapshot.has_policies = true;
    lan.publish();
}

fn allow(id: u32, port: u16) -> Rule {
    rule(id, WEB, port, Action::Allow, Remote::Any)
}

/// A UDP frame from station `from` to station `to`, both by number, of these ports.
fn datagram(to: u8, from: u8, source: u16, destination: u16) -> Vec<u8> {
    let mut frame = udp(mac(to + 1), mac(from + 1), source);
    frame[29] = from + 1;
    frame[33] = to + 1;
    frame[36..38].copy_from_slice(&destination.to_be_bytes());
    frame[38..40].copy_from_slice(&26u16.to_be_bytes());
    frame
}

fn connections(lan: &Lan, port: u16) -> Vec<ConnectionRow> {
    let mut rows = Vec::with_capacity(4096);
    assert!(!lan.worker.connection_rows(PortId(port), 0, &mut rows), "all in one go");
    rows
}

fn hits(lan: &Lan, rule: usize) -> u64 {
    lan.snapshot.rules[rule].hits.get()
}

#[test]
fn what_is_allowed_passes_with_its_replies_and_the_rest_is_counted() {
    let mut lan = perimeter_lan(vec![allow(3, 53)]);
    for _ in 0..5 {
        lan.send(0, &datagram(1, 0, 4000, 53));
        lan.send(0, &datagram(1, 0, 4000, 54));
    }
    assert_eq!(lan.received(1), vec![datagram(1, 0, 4000, 53); 5]);
    assert_eq!(hits(&lan, 3), 1, "once for the connection");
    lan.assert_moved(&[
        ("p0 rx", 10),
        ("p0 rx_bytes", 600),
        ("p1 tx", 5),
        ("p1 tx_bytes", 300),
        ("p1 drop ingress_denied", 5),
    ]);
    lan.send(1, &datagram(0, 1, 53, 4000));
    lan.send(1, &datagram(0, 1, 55, 4000));
    assert_eq!(lan.received(0), [datagram(0, 1, 53, 4000)], "station 0 is enforced too: replies alone");
    let connections = connections(&lan, 1);
    let [answered] = *connections.iter().filter(|row| row.replied).collect::<Vec<_>>() else {
        panic!("{connections:?}")
    };
    // Found by the packets of either direction, without reading the table.
    for (direction, key) in [(Direction::Ingress, answered.key), (Direction::Egress, answer_to(answered.key))] {
        let found = lan.worker.connection(PortId(1), direction, &key).unwrap();
        assert_eq!((found.key, found.replied), (answered.key, true));
        assert!(found.carries(&key, direction) && !found.carries(&key, direction.opposite()));
    }
    assert_eq!(lan.worker.connection(PortId(1), Direction::Egress, &answered.key), None);
}

fn answer_to(key: Key) -> Key {
    let (source, destination) = (key.destination, key.source);
    Key { source, destination, source_port: key.destination_port, destination_port: key.source_port, ..key }
}

/// Station 0 sends a frame three times, the third of which passes by its flow's lease; how many come to station 1.
fn sent_thrice(lan: &mut Lan, frame: &[u8]) -> usize {
    (0..3).for_each(|_| lan.send(0, frame));
    lan.received(1).len()
}

#[test]
fn a_rule_that_goes_cuts_the_flow_at_the_next_frame_and_one_that_comes_opens_it() {
    let mut lan = perimeter_lan(vec![allow(3, 53)]);
    let frame = datagram(1, 0, 4000, 53);
    assert_eq!(sent_thrice(&mut lan, &frame), 3);
    set_rules(&mut lan, vec![allow(4, 99)]);
    assert_eq!(sent_thrice(&mut lan, &frame), 0);
    set_rules(&mut lan, vec![allow(5, 53)]);
    assert_eq!(sent_thrice(&mut lan, &frame), 3);
    assert_eq!((hits(&lan, 3), hits(&lan, 5)), (1, 1));
}

#[test]
fn a_lease_ends_with_its_time_its_station_and_its_perimeter() {
    let mut lan = perimeter_lan(vec![allow(3, 53)]);
    let frame = datagram(1, 0, 4000, 53);
    lan.send(0, &frame);
    // A flow that is kept alive longer than an unanswered connection may be silent: its leases tell the table.
    for _ in 0..250 {
        lan.now_ns += SECOND_NS * 2 / 5;
        lan.send(0, &frame);
    }
    // The rest found no buffer: nobody received meanwhile.
    let received = lan.received(1).len();
    assert_eq!((received, hits(&lan, 3)), (usize::from(RING_SIZE), 1), "one connection");
    lan.stations[1].fill();
    lan.now_ns += 31 * SECOND_NS;
    (0..2).for_each(|_| lan.send(0, &frame));
    assert_eq!(hits(&lan, 3), 2, "silent for too long: a connection anew");
    // Another perimeter: what the last one knew is over, whatever the sums.
    let fresh = Box::new(Perimeter::new(PerimeterLimits::default(), 9));
    assert_eq!(lan.worker.guard(PortId(1), Some(fresh)).map(|_| ()), Some(()));
    (0..2).for_each(|_| lan.send(0, &frame));
    assert_eq!(hits(&lan, 3), 3);
    // None: closed.
    lan.worker.guard(PortId(1), None);
    lan.received(1);
    lan.send(0, &frame);
    assert_eq!(lan.received(1).len(), 0);
    assert_eq!(lan.snapshot.ports[1].as_ref().unwrap().counters.drops.get(DropReason::NoPerimeter), 1);
    // Its station moves to another port.
    lan.network(0).static_macs.insert(mac(2), PortId(2));
    lan.publish();
    lan.send(0, &frame);
    assert_eq!(lan.received(2).len(), 0, "that one is enforced and has no rule");
}

#[test]
fn of_one_flow_frames_of_any_length_pass_and_what_ended_as_it_came_does_not() {
    let mut lan = perimeter_lan(vec![allow(3, 53)]);
    let frame = datagram(1, 0, 4000, 53);
    assert_eq!(sent_thrice(&mut lan, &frame), 3);
    lan.assert_moved(&[("p0 rx", 3), ("p0 rx_bytes", 180), ("p1 tx", 3), ("p1 tx_bytes", 180)]);
    let mut longer = [frame.clone(), vec![7; 40]].concat();
    (longer[17], longer[39]) = (86, 66);
    let padded = [frame.clone(), vec![0; 4]].concat();
    // It says that it is the longer one.
    let cut = longer[..60].to_vec();
    let mut bad = NET_HEADER;
    bad[1] = 3;
    let (good, queue) = (NET_HEADER, &mut lan.stations[0].queues[1]);
    [good, bad, good].iter().for_each(|net| queue.post_frame(net, &frame));
    assert_eq!(lan.run(), 3);
    assert_eq!(lan.received(1), [frame.clone(), frame.clone()]);
    lan.assert_moved(&[
        ("p0 rx", 3),
        ("p0 rx_bytes", 180),
        ("p0 drop bad_offload", 1),
        ("p1 tx", 2),
        ("p1 tx_bytes", 120),
    ]);
    [&frame, &padded, &cut, &longer].iter().for_each(|frame| lan.stations[0].send(frame));
    assert_eq!(lan.run(), 4);
    assert_eq!(lan.received(1), [frame, padded, longer]);
    lan.assert_moved(&[
        ("p0 rx", 4),
        ("p0 rx_bytes", 284),
        ("p0 drop unreadable", 1),
        ("p1 tx", 3),
        ("p1 tx_bytes", 224),
    ]);
}

#[test]
fn flooded_copies_are_judged_one_by_one() {
    let mut lan = perimeter_lan(vec![allow(3, 53)]);
    let mut frame = datagram(1, 0, 4000, 53);
    frame[..6].copy_from_slice(&Mac::BROADCAST.0);
    lan.send(0, &frame);
    assert_eq!((lan.received(1).len(), lan.received(2).len()), (1, 0));
    lan.assert_moved(&[
        ("p0 rx", 1),
        ("p0 rx_bytes", 60),
        ("blue copies", 1),
        ("p1 tx", 1),
        ("p1 tx_bytes", 60),
        ("p2 drop ingress_denied", 1),
    ]);
}

#[test]
fn identity_stands_for_the_address() {
    let mut lan = perimeter_lan(vec![rule(3, WEB, 53, Action::Allow, Remote::Group(OPEN))]);
    lan.send(0, &datagram(1, 0, 4000, 53));
    assert_eq!(lan.received(1).len(), 0, "nobody has said who station 0 is");
    lan.snapshot.ports[0].as_mut().unwrap().identity = Some(IDENTITY);
    lan.publish();
    lan.send(0, &datagram(1, 0, 4000, 53));
    assert_eq!(lan.received(1).len(), 1);
}

#[test]
fn meters_hold_each_direction() {
    let mut lan = perimeter_lan(vec![allow(3, 53)]);
    let queue = dreamwire_datapath::perimeter::events::queue();
    lan.worker.tell(Arc::clone(&queue));
    let limits = MeterLimits { packets: Some((10, 10)), bits: None };
    lan.snapshot.ports[0].as_mut().unwrap().policy.as_mut().unwrap().meters[Direction::Egress as usize] = limits;
    lan.publish();
    (0..20).for_each(|_| lan.send(0, &datagram(1, 0, 4000, 53)));
    assert_eq!(lan.received(1).len(), 10);
    lan.now_ns += SECOND_NS;
    lan.snapshot.ports[0].as_mut().unwrap().policy.as_mut().unwrap().meters = Default::default();
    lan.snapshot.ports[1].as_mut().unwrap().policy.as_mut().unwrap().meters[Direction::Ingress as usize] = limits;
    lan.publish();
    (0..20).for_each(|_| lan.send(0, &datagram(1, 0, 4000, 53)));
    assert_eq!(lan.received(1).len(), 10);
    let drops = |id: usize| lan.snapshot.ports[id].as_ref().unwrap().counters.drops.get(DropReason::RateLimit);
    assert_eq!((drops(0), drops(1)), (10, 10));
    let told: Vec<_> = std::iter::from_fn(|| queue.pop()).map(|event| (event.port, event.dropped)).collect();
    let of = |id| told.iter().filter(|told| **told == (Some(PortId(id)), Some(DropReason::RateLimit))).count();
    assert_eq!((of(0), of(1), told.len()), (10, 10, 20), "whoever watches hears of both ends");
}

const SYN: u8 = 2;
const ACK: u8 = 16;
const RST: u8 = 4;

/// A TCP segment from station 0 to station 1 (or back), of these flags and sequence numbers.
fn segment(reply: bool, flags: u8, sequence: u32, acknowledged: u32) -> Vec<u8> {
    let (to, from, ports) = if reply { (0, 1, [80u16, 5000]) } else { (1, 0, [5000, 80]) };
    let mut frame = datagram(to, from, ports[0], ports[1]);
    frame[23] = 6;
    frame[16..18].copy_from_slice(&40u16.to_be_bytes());
    frame[38..42].copy_from_slice(&sequence.to_be_bytes());
    frame[42..46].copy_from_slice(&acknowledged.to_be_bytes());
    (frame[46], frame[47]) = (0x50, flags);
    frame[48..50].copy_from_slice(&1000u16.to_be_bytes());
    frame[50..].fill(0);
    frame
}

#[test]
fn tcp_goes_through_its_states_at_both_ends_and_a_reset_ends_it() {
    let http = Rule { protocol: Protocol::Tcp, ..allow(3, 80) };
    let mut lan = perimeter_lan(vec![http]);
    lan.send(0, &segment(false, SYN, 100, 0));
    lan.send(1, &segment(true, SYN | ACK, 900, 101));
    lan.send(0, &segment(false, ACK, 101, 901));
    for _ in 0..3 {
        lan.send(0, &segment(false, ACK, 101, 901));
        lan.send(1, &segment(true, ACK, 901, 101));
    }
    assert_eq!((lan.received(0).len(), lan.received(1).len()), (4, 5));
    lan.send(0, &segment(false, ACK, 2_000_000, 901));
    assert_eq!(lan.received(1).len(), 0, "outside of the window, also of a flow with a lease");
    lan.send(0, &segment(false, RST, 101, 0));
    assert_eq!(lan.received(1).len(), 1);
    // The port is used again at once.
    lan.send(0, &segment(false, SYN, 5_000_000, 0));
    lan.send(1, &segment(true, SYN | ACK, 7_000_000, 5_000_001));
    assert_eq!((lan.received(1).len(), lan.received(0).len()), (1, 1));
    assert_eq!(hits(&lan, 3), 2);
}

#[test]
fn a_later_fragment_follows_its_first_alone() {
    let mut lan = perimeter_lan(vec![allow(3, 53)]);
    let mut first = datagram(1, 0, 4000, 53);
    (first[18], first[20]) = (9, 0x20);
    first[38..40].copy_from_slice(&2000u16.to_be_bytes());
    // 26 bytes of payload are no multiple of 8: 24.
    first[16..18].copy_from_slice(&44u16.to_be_bytes());
    let mut later = first.clone();
    later[20..22].copy_from_slice(&3u16.to_be_bytes());
    let mut other = later.clone();
    other[18] = 10;
    lan.send(0, &other);
    assert_eq!(lan.received(1).len(), 0);
    lan.send(0, &first);
    lan.send(0, &later);
    assert_eq!(lan.received(1), [first, later]);
}

#[test]
fn one_ports_flood_of_connections_takes_nothing_from_anothers() {
    let http = Rule { protocol: Protocol::Tcp, ..allow(4, 80) };
    let mut lan = perimeter_lan(vec![allow(3, 53), http]);
    let small = ConntrackLimits { connections: 64, ..ConntrackLimits::default() };
    // The flooder's table, and that of the station that it floods.
    for id in [1, 2] {
        lan.worker.guard(PortId(id), Some(Box::new(Perimeter::new(PerimeterLimits { conntrack: small }, 3))));
    }
    lan.send(0, &segment(false, SYN, 100, 0));
    lan.send(1, &segment(true, SYN | ACK, 900, 101));
    lan.send(0, &segment(false, ACK, 101, 901));
    lan.received(0);
    for port in 0..1000 {
        lan.send(2, &datagram(1, 2, port, 53));
        if port % 50 == 0 {
            lan.received(1);
        }
    }
    for port in [1, 2] {
        let known = connections(&lan, port).len();
        assert!((32..=64).contains(&known), "port {port} knows {known}");
    }
    lan.received(1);
    let assured = connections(&lan, 1).into_iter().filter(|row| row.assured).collect::<Vec<_>>();
    assert!(matches!(assured[..], [ConnectionRow { tcp: Some(TcpState::Established), .. }]), "{assured:?}");
    assert_eq!(connections(&lan, 0).len(), 1, "station 0 has what it began");
    lan.send(0, &segment(false, ACK, 101, 901));
    lan.send(1, &segment(true, ACK, 901, 101));
    assert_eq!((lan.received(1).len(), lan.received(0).len()), (1, 1));
    assert_eq!(
        (hits(&lan, 3), hits(&lan, 4)),
        (1000, 1),
        "every one of the flood was let in, and the connection is the same"
    );
}

#[test]
fn drops_are_told_within_a_rate() {
    let mut lan = perimeter_lan(vec![rule(3, WEB, 53, Action::Deny, Remote::Any)]);
    let queue = dreamwire_datapath::perimeter::events::queue();
    lan.worker.tell(Arc::clone(&queue));
    (0..1000).for_each(|_| lan.send(0, &datagram(1, 0, 4000, 53)));
    let events: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
    assert_eq!(events.len(), 40);
    let event = events[0];
    assert_eq!(
        (event.port, event.dropped, event.rule),
        (Some(PortId(1)), Some(DropReason::IngressDenied), Some(RuleId(3)))
    );
    assert_eq!(event.key.map(|key| (key.source_port, key.destination_port)), Some((4000, 53)));
    lan.now_ns += SECOND_NS;
    lan.send(0, &datagram(1, 0, 4000, 53));
    assert_eq!(queue.pop().map(|event| event.left_out), Some(960));
    assert_eq!(hits(&lan, 3), 1001);
}

#[test]
fn a_network_that_gets_another_number_leaves_no_lease() {
    let mut lan = perimeter_lan(vec![allow(3, 53)]);
    let frame = datagram(1, 0, 4000, 53);
    // Epochs of network 0 rise beyond those of network 1.
    for station in 10..40 {
        lan.send(0, &common::frame(mac(2), mac(station), 60, 0));
    }
    // The second of them gets a lease.
    (0..2).for_each(|_| lan.send(0, &frame));
    assert_eq!(lan.received(1).last(), Some(&frame));
    // The same ports in network 1, and no rule any more.
    let mut moved = network("blue", &[0, 1, 2]);
    moved.static_macs = lan.network(0).static_macs.clone();
    lan.snapshot.networks.push(Some(moved));
    lan.snapshot.ports.iter_mut().flatten().for_each(|port| port.network = NetworkId(1));
    set_rules(&mut lan, vec![]);
    // Whatever the new network's epoch is, the flow is judged anew.
    for station in 10..60 {
        lan.send(0, &frame);
        lan.send(0, &common::frame(Mac([9, 9, 9, 9, 9, 9]), mac(station), 60, 0));
        assert!(!lan.received(1).contains(&frame));
        lan.received(2);
    }
}
