use super::*;
use crate::conntrack::{ConntrackLimits, Touched};
use crate::key::Key;
use crate::model::{Action, Group, GroupId, Policy, PortRange, Posture, Protocol, Remote, Rule};
use crate::parse::Transport;
use crate::tcp::Segment;

const VM: [u8; 4] = [10, 0, 0, 1];
const PEER: [u8; 4] = [10, 0, 0, 2];
const IN: Direction = Direction::Ingress;
const OUT: Direction = Direction::Egress;

fn allow(id: u32, protocol: Protocol, port: u16) -> Rule {
    Rule {
        id: RuleId(id),
        group: GroupId(0),
        direction: IN,
        protocol,
        ports: vec![PortRange { first: port, last: port }],
        icmp: vec![],
        remote: Remote::Any,
        action: Action::Allow,
        priority: 0,
        log: false,
    }
}

fn classifier(posture: Posture, rules: Vec<Rule>) -> Classifier {
    let policy = Policy::new(vec![Group { id: GroupId(0), members: vec![] }], rules, vec![]).unwrap();
    Classifier::compile(&policy, posture, &[GroupId(0)])
}

struct Port {
    classifier: Classifier,
    conntrack: Conntrack,
    generation: u32,
}

impl Port {
    fn new(rules: Vec<Rule>) -> Self {
        let conntrack = Conntrack::new(ConntrackLimits { connections: 1024, ..ConntrackLimits::default() }, 1);
        Self { classifier: classifier(Posture::Enforced, rules), conntrack, generation: 1 }
    }

    fn change(&mut self, rules: Vec<Rule>) {
        self.classifier = classifier(Posture::Enforced, rules);
        self.generation += 1;
    }

    fn ask(&mut self, packet: Packet, direction: Direction) -> Decision {
        decide(&self.classifier, &mut self.conntrack, &Parsed::Ip(packet), direction, None, self.generation, 0)
    }
}

/// A TCP segment between port 443 of the VM and port 40000 of its peer.
fn tcp(direction: Direction, flags: u8, sequence: u32, acknowledgment: u32) -> Packet {
    let (vm, peer) = ((VM.into(), 443), (PEER.into(), 40000));
    let key = if direction == IN { Key::new(6, peer, vm) } else { Key::new(6, vm, peer) };
    let segment =
        Segment { sequence, acknowledgment, selective: acknowledgment, window: 1000, flags, ..Segment::default() };
    Packet { key, fragment: Fragment::Whole, transport: Transport::Tcp(segment) }
}

fn udp(destination_port: u16, fragment: Fragment) -> Packet {
    let key = match fragment {
        Fragment::Later { .. } => Key::new(17, (PEER.into(), 0), (VM.into(), 0)),
        _ => Key::new(17, (PEER.into(), 40000), (VM.into(), destination_port)),
    };
    Packet { key, fragment, transport: Transport::Other }
}

fn handshake(port: &mut Port) -> Connection {
    let syn = port.ask(tcp(IN, 2, 100, 0), IN);
    assert_eq!((syn.allow, syn.reason, syn.rule, syn.cache), (true, Reason::Rule, Some(RuleId(1)), true));
    assert!(port.ask(tcp(OUT, 0x12, 500, 101), OUT).allow);
    assert!(port.ask(tcp(IN, 0x10, 101, 501), IN).allow);
    syn.connection.unwrap()
}

#[test]
fn a_removed_rule_cuts_at_once_and_an_added_one_opens() {
    let mut port = Port::new(vec![allow(1, Protocol::Tcp, 443)]);
    let connection = handshake(&mut port);
    port.change(vec![allow(2, Protocol::Tcp, 80)]);
    let ack = tcp(OUT, 0x10, 501, 101);
    assert_eq!(port.conntrack.touch(connection, &ack, OUT, port.generation, 0), Touched::Stale);
    let cut = port.ask(ack, OUT);
    assert_eq!(
        (cut.allow, cut.reason, cut.cache),
        (false, Reason::Posture, false),
        "the answer of a denied connection"
    );
    assert_eq!(
        port.conntrack.touch(connection, &ack, OUT, port.generation, 0),
        Touched::Stale,
        "it is judged each time"
    );
    assert!(!port.ask(ack, OUT).allow, "what an end repeats begins no connection of its own");
    assert!(!port.ask(tcp(IN, 0x10, 101, 501), IN).allow);
    assert!(!port.ask(tcp(IN, 2, 100, 0), IN).allow);
    assert_eq!(port.conntrack.rows(0).count(), 0, "nothing that may pass is left");
    port.change(vec![allow(3, Protocol::Tcp, 443)]);
    assert_eq!(port.ask(tcp(IN, 2, 100, 0), IN).rule, Some(RuleId(3)));
    assert_eq!(port.ask(ack, OUT).connection, Some(connection), "the same one goes on");
}

/// Closed by both ends, who send these numbers next: TIME_WAIT.
fn close(port: &mut Port, peer: u32, vm: u32) {
    for (direction, flags, sequence, acknowledgment) in
        [(IN, 0x11, peer, vm), (OUT, 0x11, vm, peer + 1), (IN, 0x10, peer + 1, vm + 1)]
    {
        assert!(port.ask(tcp(direction, flags, sequence, acknowledgment), direction).allow);
    }
}

#[test]
fn a_port_used_again_is_judged_anew_and_its_connection_completes() {
    let reopened = |port: &mut Port, sequence| {
        let syn = port.ask(tcp(IN, 2, sequence, 0), IN);
        assert_eq!((syn.allow, syn.state, syn.rule), (true, ConnState::New, Some(RuleId(1))));
        assert!(port.ask(tcp(OUT, 0x12, 7000, sequence + 1), OUT).allow);
        assert!(port.ask(tcp(IN, 0x10, sequence + 1, 7001), IN).allow);
        assert_eq!(port.conntrack.len(), 1);
    };
    // In TIME_WAIT, with a higher number and with a lower one, and after a reset.
    for sequence in [90_000, 10] {
        let mut port = Port::new(vec![allow(1, Protocol::Tcp, 443)]);
        handshake(&mut port);
        close(&mut port, 101, 501);
        reopened(&mut port, sequence);
    }
    let mut port = Port::new(vec![allow(1, Protocol::Tcp, 443)]);
    handshake(&mut port);
    assert!(port.ask(tcp(IN, 4, 101, 0), IN).allow);
    reopened(&mut port, 90_000);
    // From the other end it is that end's rules that decide, and a rule that has gone lets nothing begin.
    close(&mut port, 90_001, 7001);
    let syn = port.ask(tcp(OUT, 2, 400, 0), OUT);
    assert_eq!((syn.allow, syn.reason), (true, Reason::Posture));
    let mut port = Port::new(vec![allow(1, Protocol::Tcp, 443)]);
    handshake(&mut port);
    close(&mut port, 101, 501);
    port.change(vec![]);
    assert_eq!(port.ask(tcp(IN, 2, 90_000, 0), IN).reason, Reason::Posture);
    assert!(port.conntrack.is_empty());
}

#[test]
fn a_change_that_still_allows_keeps_the_connection_and_its_state() {
    let mut port = Port::new(vec![allow(1, Protocol::Tcp, 443)]);
    let connection = handshake(&mut port);
    port.change(vec![allow(9, Protocol::Tcp, 443)]);
    let decision = port.ask(tcp(OUT, 0x10, 501, 101), OUT);
    assert_eq!((decision.allow, decision.connection, decision.rule), (true, Some(connection), Some(RuleId(9))));
    // Its windows too: what is outside is still outside.
    let mut far = tcp(IN, 0x10, 101 + 70_000, 501);
    let Transport::Tcp(segment) = &mut far.transport else { panic!("TCP") };
    segment.payload_bytes = 100;
    let far = port.ask(far, IN);
    assert_eq!((far.allow, far.reason), (false, Reason::InvalidState));
}

#[test]
fn replies_pass_and_strangers_do_not() {
    let mut port = Port::new(vec![]);
    let answer = tcp(IN, 0x12, 500, 101);
    assert_eq!(port.ask(answer, IN).reason, Reason::InvalidState);
    assert!(port.ask(tcp(OUT, 2, 100, 0), OUT).allow);
    let reply = port.ask(answer, IN);
    assert_eq!((reply.allow, reply.state), (true, ConnState::Reply));
    assert_eq!(
        port.ask(tcp(IN, 0x10, 100, 0), OUT).state,
        ConnState::New,
        "the same packet the other way is another flow"
    );
}

#[test]
fn fragments_pass_only_behind_a_first_that_did() {
    let first = |id| Fragment::First { id, end_bytes: 1480 };
    let later = |id, offset_bytes| udp(0, Fragment::Later { id, offset_bytes });
    let mut port = Port::new(vec![allow(1, Protocol::Udp, 53)]);
    assert_eq!(port.ask(later(1, 1480), IN).reason, Reason::FragmentWithoutFirst);
    assert!(!port.ask(udp(54, first(1)), IN).allow);
    assert!(!port.ask(later(1, 1480), IN).allow, "the first was denied");
    let allowed = port.ask(udp(53, first(2)), IN);
    assert_eq!((allowed.allow, allowed.cache), (true, false));
    assert_eq!(port.ask(later(2, 1480), IN).reason, Reason::FollowsFirst);
    assert!(!port.ask(later(2, 8), IN).allow, "it would replace ports that were judged");
    assert!(!port.ask(later(3, 1480), IN).allow);
    assert!(!port.ask(later(2, 1480), OUT).allow, "the other direction has its own");
    port.change(vec![allow(2, Protocol::Udp, 53)]);
    assert!(!port.ask(later(2, 1480), IN).allow, "judged by another policy");
}

#[test]
fn what_ip_needs_passes_and_what_cannot_be_read_does_not() {
    let mut port = Port::new(vec![]);
    let mut of =
        |parsed: Parsed, direction| decide(&port.classifier, &mut port.conntrack, &parsed, direction, None, 1, 0);
    assert_eq!(of(Parsed::Arp, IN).reason, Reason::Necessary);
    assert_eq!((of(Parsed::Unreadable, OUT).allow, of(Parsed::Unreadable, OUT).reason), (false, Reason::Unreadable));
    assert!(!of(Parsed::Other(0x88b5), IN).allow);
    assert!(of(Parsed::Other(0x88b5), OUT).allow);
    let icmpv6 = |kind: u8| {
        let key = Key::new(58, ("fe80::2".parse().unwrap(), 0), ("fe80::1".parse().unwrap(), u16::from(kind) << 8));
        Parsed::Ip(Packet { key, fragment: Fragment::Whole, transport: Transport::Other })
    };
    for kind in [133, 134, 135, 136, 130, 143] {
        assert_eq!(of(icmpv6(kind), IN).reason, Reason::Necessary, "{kind}");
    }
    assert!(!of(icmpv6(137), IN).allow, "a redirect is not necessary");
    let any = Rule { protocol: Protocol::Any, ports: vec![], ..allow(1, Protocol::Any, 0) };
    port.change(vec![any]);
    let other = decide(&port.classifier, &mut port.conntrack, &Parsed::Other(0x88b5), IN, None, 2, 0);
    assert_eq!((other.allow, other.rule, other.cache), (true, Some(RuleId(1)), true));
}

#[test]
fn an_open_network_without_rules_tracks_nothing() {
    let mut port = Port::new(vec![]);
    port.classifier = classifier(Posture::Open, vec![]);
    for packet in [tcp(IN, 0x3f, 1, 1), udp(9, Fragment::Later { id: 1, offset_bytes: 8 })] {
        let decision = port.ask(packet, IN);
        assert_eq!((decision.allow, decision.cache, decision.connection), (true, true, None));
    }
    assert!(port.conntrack.is_empty());
}

#[test]
fn an_initiator_that_shows_another_identity_is_judged_again() {
    use crate::model::Identity;
    let groups = (0..2).map(|id| Group { id: GroupId(id), members: vec![] }).collect();
    let rules = vec![Rule { remote: Remote::Group(GroupId(1)), ..allow(1, Protocol::Tcp, 443) }];
    let identities = vec![Identity { tag: 5, groups: vec![GroupId(1)] }];
    let policy = Policy::new(groups, rules, identities).unwrap();
    let classifier = Classifier::compile(&policy, Posture::Enforced, &[GroupId(0)]);
    let mut conntrack = Conntrack::new(ConntrackLimits { connections: 64, ..ConntrackLimits::default() }, 1);
    let mut ask = |packet, direction, identity, generation| {
        decide(&classifier, &mut conntrack, &Parsed::Ip(packet), direction, identity, generation, 0).allow
    };
    assert!(!ask(tcp(IN, 2, 100, 0), IN, None, 1));
    assert!(ask(tcp(IN, 2, 100, 0), IN, Some(5), 1));
    assert!(ask(tcp(OUT, 0x12, 500, 101), OUT, None, 2), "judged again with the identity that began it");
    assert!(ask(tcp(IN, 0x10, 101, 501), IN, Some(5), 2));
    assert!(!ask(tcp(IN, 0x10, 101, 501), IN, Some(6), 2));
    assert!(!ask(tcp(IN, 0x10, 101, 501), IN, None, 2), "one that is not shown any more does not count");
    assert!(ask(tcp(IN, 0x10, 101, 501), IN, Some(5), 2), "others' packets end nothing");
    assert!(ask(tcp(OUT, 0x10, 501, 101), OUT, None, 2));
}
