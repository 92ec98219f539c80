use super::*;
use crate::key::{ICMP, TCP};
use crate::tcp::Segment;

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;
const GRANT: Grant = Grant { policy_generation: 1, rule: Some(RuleId(7)), log: false, identity: None };
const VM: [u8; 4] = [10, 0, 0, 1];
const PEER: [u8; 4] = [10, 0, 0, 2];

fn limits(connections: u32) -> ConntrackLimits {
    ConntrackLimits { connections, ..ConntrackLimits::default() }
}

/// A packet between the VM and its peer.
fn packet(protocol: u8, direction: Direction, local_port: u16, remote_port: u16, transport: Transport) -> Packet {
    let (vm, peer) = ((VM.into(), local_port), (PEER.into(), remote_port));
    let key = match direction {
        Direction::Egress => Key::new(protocol, vm, peer),
        Direction::Ingress => Key::new(protocol, peer, vm),
    };
    Packet { key, fragment: Fragment::Whole, transport }
}

fn udp(direction: Direction, local_port: u16, remote_port: u16) -> Packet {
    packet(UDP, direction, local_port, remote_port, Transport::Other)
}

fn tcp(direction: Direction, local_port: u16, flags: u8, sequence: u32, acknowledgment: u32) -> Packet {
    let segment =
        Segment { sequence, acknowledgment, selective: acknowledgment, window: 1000, flags, ..Segment::default() };
    packet(TCP, direction, local_port, 443, Transport::Tcp(segment))
}

/// Without data only the acknowledgment is judged.
fn with_payload(transport: Transport) -> Transport {
    let Transport::Tcp(segment) = transport else { panic!("not TCP") };
    Transport::Tcp(Segment { payload_bytes: 100, ..segment })
}

fn echo(direction: Direction, kind: u8, id: u16) -> Packet {
    let mut packet = packet(ICMP, direction, 0, 0, Transport::Other);
    packet.key.source_port = id;
    packet.key.destination_port = u16::from(kind) << 8;
    packet
}

/// Begins and answers a TCP connection from the VM.
fn establish(conntrack: &mut Conntrack, local_port: u16, now_ns: u64) -> Connection {
    let syn = tcp(Direction::Egress, local_port, SYN, 100, 0);
    let connection = conntrack.admit(&syn, Direction::Egress, GRANT, now_ns).unwrap();
    let answer = tcp(Direction::Ingress, local_port, SYN | ACK, 500, 101);
    assert_eq!(conntrack.touch(connection, &answer, Direction::Ingress, 1, now_ns), Touched::Pass);
    let ack = tcp(Direction::Egress, local_port, ACK, 101, 501);
    assert_eq!(conntrack.touch(connection, &ack, Direction::Egress, 1, now_ns), Touched::Pass);
    connection
}

#[test]
fn a_connection_is_one_entry_for_both_directions() {
    let mut conntrack = Conntrack::new(limits(64), 1);
    let ask = udp(Direction::Egress, 5000, 53);
    let answer = udp(Direction::Ingress, 5000, 53);
    assert_eq!(conntrack.track(&answer, Direction::Ingress, 0), Track { state: ConnState::New, connection: None });
    assert_eq!(conntrack.track(&ask, Direction::Egress, 0), Track { state: ConnState::New, connection: None });
    let connection = Some(conntrack.admit(&ask, Direction::Egress, GRANT, 0).unwrap());
    assert_eq!(conntrack.track(&ask, Direction::Egress, 0), Track { state: ConnState::New, connection });
    assert_eq!(conntrack.track(&answer, Direction::Ingress, 0), Track { state: ConnState::Reply, connection });
    assert_eq!(conntrack.track(&ask, Direction::Egress, 0), Track { state: ConnState::Established, connection });
    assert_eq!(conntrack.len(), 1);
    let row = conntrack.peek(&answer.key, Direction::Ingress, 0).unwrap();
    assert_eq!((row.key, row.initiator, row.rule, row.replied), (ask.key, Direction::Egress, Some(RuleId(7)), true));
}

#[test]
fn udp_gets_its_long_timeout_after_two_seconds_both_ways() {
    let mut conntrack = Conntrack::new(limits(64), 1);
    let (ask, answer) = (udp(Direction::Egress, 5000, 53), udp(Direction::Ingress, 5000, 53));
    conntrack.admit(&ask, Direction::Egress, GRANT, 0).unwrap();
    conntrack.track(&answer, Direction::Ingress, SECOND_NS);
    assert_eq!(conntrack.track(&ask, Direction::Egress, 32 * SECOND_NS).connection, None, "30 s without a stream");
    let connection = Some(conntrack.admit(&ask, Direction::Egress, GRANT, 40 * SECOND_NS).unwrap());
    conntrack.track(&answer, Direction::Ingress, 41 * SECOND_NS);
    conntrack.track(&ask, Direction::Egress, 43 * SECOND_NS);
    assert_eq!(
        conntrack.track(&answer, Direction::Ingress, 162 * SECOND_NS).connection,
        connection,
        "120 s of a stream"
    );
}

#[test]
fn pings_of_each_other_with_one_identifier_are_two() {
    let mut conntrack = Conntrack::new(limits(64), 1);
    let ours = conntrack.admit(&echo(Direction::Egress, 8, 5), Direction::Egress, GRANT, 0).unwrap();
    let theirs = echo(Direction::Ingress, 8, 5);
    assert_eq!(conntrack.track(&theirs, Direction::Ingress, 0).connection, None);
    let theirs = conntrack.admit(&theirs, Direction::Ingress, GRANT, 0).unwrap();
    let answered = conntrack.track(&echo(Direction::Ingress, 0, 5), Direction::Ingress, 0);
    assert_eq!(answered, Track { state: ConnState::Reply, connection: Some(ours) });
    let answered = conntrack.track(&echo(Direction::Egress, 0, 5), Direction::Egress, 0);
    assert_eq!(answered, Track { state: ConnState::Reply, connection: Some(theirs) });
    assert_eq!(conntrack.track(&echo(Direction::Ingress, 0, 6), Direction::Ingress, 0).state, ConnState::Invalid);
    assert_eq!(
        conntrack.peek(&echo(Direction::Egress, 0, 5).key, Direction::Egress, 0).unwrap().key.destination_port,
        0x0800
    );
}

#[test]
fn an_icmp_error_is_related_only_with_a_quote_that_was_sent() {
    let mut conntrack = Conntrack::new(limits(64), 1);
    establish(&mut conntrack, 5000, 0);
    let router = [10, 0, 9, 9];
    let error = |to: [u8; 4], quoted: Key, sequence: u32| Packet {
        key: Key::new(ICMP, (router.into(), 0), (to.into(), 0x0304)),
        fragment: Fragment::Whole,
        transport: Transport::IcmpError(Some(Quoted { key: quoted, sequence: Some(sequence) })),
    };
    let sent = tcp(Direction::Egress, 5000, ACK, 101, 501).key;
    let state = |conntrack: &mut Conntrack, packet: &Packet| conntrack.track(packet, Direction::Ingress, 0).state;
    assert_eq!(state(&mut conntrack, &error(VM, sent, 100)), ConnState::Related);
    // Forged: to somebody else, about a packet that was never sent, about another connection, in the wrong direction.
    assert_eq!(state(&mut conntrack, &error([10, 0, 0, 3], sent, 100)), ConnState::Invalid);
    for sequence in [102, 0x8000_0000, 101u32.wrapping_sub(66_002)] {
        assert_eq!(state(&mut conntrack, &error(VM, sent, sequence)), ConnState::Invalid, "{sequence}");
    }
    assert_eq!(state(&mut conntrack, &error(VM, Key { source_port: 5001, ..sent }, 100)), ConnState::Invalid);
    let received = tcp(Direction::Ingress, 5000, ACK, 501, 101).key;
    assert_eq!(state(&mut conntrack, &error(PEER, received, 500)), ConnState::Invalid);
    // None of it has moved the connection.
    let row = conntrack.peek(&sent, Direction::Egress, 0).unwrap();
    assert_eq!((row.tcp, row.assured), (Some(TcpState::Established), true));
}

#[test]
fn a_refused_connection_is_forgotten_at_once() {
    let mut conntrack = Conntrack::new(limits(64), 1);
    let syn = tcp(Direction::Egress, 5000, SYN, 100, 0);
    conntrack.admit(&syn, Direction::Egress, GRANT, 0).unwrap();
    let reset = tcp(Direction::Ingress, 5000, RST | ACK, 0, 101);
    assert_eq!(conntrack.track(&reset, Direction::Ingress, 0).state, ConnState::Reply);
    assert_eq!(conntrack.track(&reset, Direction::Ingress, 0).state, ConnState::Invalid);
    assert_eq!(conntrack.track(&syn, Direction::Egress, 0).state, ConnState::New);
}

#[test]
fn a_reset_on_close_passes_and_ends_the_connection() {
    let mut conntrack = Conntrack::new(limits(64), 1);
    let connection = establish(&mut conntrack, 5000, 0);
    let reset = tcp(Direction::Ingress, 5000, RST | ACK, 501, 101);
    assert_eq!(conntrack.touch(connection, &reset, Direction::Ingress, 1, 0), Touched::Pass);
    assert_eq!(conntrack.peek(&reset.key, Direction::Ingress, 0).unwrap().tcp, Some(TcpState::Close));
    assert_eq!(conntrack.peek(&reset.key, Direction::Ingress, 10 * SECOND_NS), None);
}

#[test]
fn a_port_used_again_in_time_wait_is_a_new_connection() {
    let mut conntrack = Conntrack::new(limits(64), 1);
    let old = establish(&mut conntrack, 5000, 0);
    for (direction, flags, sequence, acknowledgment) in
        [(Direction::Egress, 0x11, 101, 501), (Direction::Ingress, 0x11, 501, 102), (Direction::Egress, ACK, 102, 502)]
    {
        let packet = tcp(direction, 5000, flags, sequence, acknowledgment);
        assert_eq!(conntrack.touch(old, &packet, direction, 1, 0), Touched::Pass);
    }
    let syn = tcp(Direction::Egress, 5000, SYN, 90_000, 0);
    assert_eq!(conntrack.peek(&syn.key, Direction::Egress, 0).unwrap().tcp, Some(TcpState::TimeWait));
    assert_eq!(conntrack.touch(old, &syn, Direction::Egress, 1, 0), Touched::Stale);
    assert_eq!(conntrack.track(&syn, Direction::Egress, 0), Track { state: ConnState::New, connection: None });
    let new = conntrack.admit(&syn, Direction::Egress, GRANT, 0).unwrap();
    assert_ne!(old, new);
    let answer = tcp(Direction::Ingress, 5000, SYN | ACK, 7000, 90_001);
    assert_eq!(
        conntrack.touch(old, &answer, Direction::Ingress, 1, 0),
        Touched::Stale,
        "the old reference is worth nothing"
    );
    assert_eq!(conntrack.touch(new, &answer, Direction::Ingress, 1, 0), Touched::Pass);
}

#[test]
fn a_touch_is_stale_after_a_change_of_policy_and_of_time() {
    let mut conntrack = Conntrack::new(limits(64), 1);
    let connection = establish(&mut conntrack, 5000, 0);
    let ack = tcp(Direction::Egress, 5000, ACK, 101, 501);
    assert_eq!(conntrack.touch(connection, &ack, Direction::Egress, 1, 0), Touched::Pass);
    assert_eq!(conntrack.touch(connection, &ack, Direction::Egress, 2, 0), Touched::Stale);
    let first = Packet { fragment: Fragment::First { id: 1, end_bytes: 24 }, ..ack };
    assert_eq!(conntrack.touch(connection, &first, Direction::Egress, 1, 0), Touched::Stale);
    let mut far = tcp(Direction::Egress, 5000, ACK, 101 + 70_000, 501);
    far.transport = with_payload(far.transport);
    assert_eq!(conntrack.touch(connection, &far, Direction::Egress, 1, 0), Touched::Invalid);
    let late = 6 * 24 * 3600 * SECOND_NS;
    assert_eq!(conntrack.touch(connection, &ack, Direction::Egress, 1, late), Touched::Stale);
    conntrack.table.free(connection.slot());
    assert_eq!(conntrack.touch(connection, &ack, Direction::Egress, 1, 0), Touched::Stale);
}

#[test]
fn a_revoked_connection_goes_before_one_that_begins_or_has_closed() {
    let mut conntrack = Conntrack::new(limits(16), 1);
    let [revoked, closed] = [1000, 1001].map(|port| establish(&mut conntrack, port, 0));
    let syn = tcp(Direction::Egress, 2000, SYN, 1, 0);
    let half_open = conntrack.admit(&syn, Direction::Egress, GRANT, 0).unwrap();
    conntrack.track(&tcp(Direction::Egress, 1001, RST, 101, 501), Direction::Egress, 0);
    conntrack.revoke(revoked, GRANT, 0);
    // It expires in 300 s, they in 120 s and 10 s.
    let worth = |connection: Connection| conntrack.table.entry(connection.slot()).worth(0);
    assert!(worth(revoked) < worth(closed) && worth(closed) < worth(half_open));
}

#[test]
fn a_revoked_connection_makes_room_and_is_forgotten_after_silence() {
    let mut conntrack = Conntrack::new(limits(16), 1);
    let kept: Vec<_> = (0..16).map(|port| establish(&mut conntrack, 1000 + port, 0)).collect();
    let syn = tcp(Direction::Egress, 2000, SYN, 1, 0);
    assert_eq!(conntrack.admit(&syn, Direction::Egress, GRANT, 0), Err(Refused::Full));
    conntrack.revoke(kept[3], GRANT, 0);
    assert_eq!(conntrack.rows(0).count(), 15);
    assert!(conntrack.admit(&syn, Direction::Egress, GRANT, 0).is_ok());
    assert_eq!(conntrack.grant(kept[3]), None, "that one has gone, and no other");
    assert_eq!(conntrack.rows(0).count(), 16);

    let ack = tcp(Direction::Egress, 1004, ACK, 101, 501);
    conntrack.revoke(kept[4], GRANT, 0);
    assert_eq!(conntrack.touch(kept[4], &ack, Direction::Egress, 1, 0), Touched::Stale);
    assert_eq!(conntrack.track(&ack, Direction::Egress, REVOKED_NS).connection, None);
}

#[test]
fn a_flood_drops_no_established_connection_whatever_the_seed() {
    for seed in [0, 1, u64::MAX, 0x1234_5678_9abc_def0] {
        let mut conntrack = Conntrack::new(limits(4096), seed);
        let kept: Vec<Connection> = (0..1000).map(|port| establish(&mut conntrack, 1000 + port, 0)).collect();
        // A SYN flood from outside and a port scan from inside, two hundred thousand strong together.
        for n in 0..100_000u32 {
            let mut syn = tcp(Direction::Ingress, (n >> 16) as u16, SYN, n, 0);
            syn.key.source = (u128::from(n) * 2_654_435_761) & 0xffff_ffff;
            let _ = conntrack.admit(&syn, Direction::Ingress, GRANT, u64::from(n));
            let mut scan = udp(Direction::Egress, 9, n as u16);
            scan.key.destination ^= u128::from(n >> 16) << 8;
            let _ = conntrack.admit(&scan, Direction::Egress, GRANT, u64::from(n));
        }
        assert!(conntrack.len() <= 4096);
        assert!(conntrack.dropped_early() > 190_000, "{}", conntrack.dropped_early());
        for (port, &connection) in (1000..).zip(&kept) {
            let ack = tcp(Direction::Egress, port, ACK, 101, 501);
            assert_eq!(
                conntrack.touch(connection, &ack, Direction::Egress, 1, SECOND_NS),
                Touched::Pass,
                "seed {seed}"
            );
        }
        // And a new one still gets in.
        establish(&mut conntrack, 60_000, SECOND_NS);
    }
}

#[test]
fn a_table_full_of_established_connections_refuses_and_then_recovers() {
    let mut conntrack = Conntrack::new(limits(512), 3);
    let mut refused = 0;
    for port in 1000..2000 {
        let syn = tcp(Direction::Egress, port, SYN, 100, 0);
        match conntrack.admit(&syn, Direction::Egress, GRANT, 0) {
            Ok(connection) => {
                for packet in
                    [tcp(Direction::Ingress, port, SYN | ACK, 500, 101), tcp(Direction::Egress, port, ACK, 101, 501)]
                {
                    let direction = if packet.key.source_port == 443 { Direction::Ingress } else { Direction::Egress };
                    assert_eq!(conntrack.touch(connection, &packet, direction, 1, 0), Touched::Pass);
                }
            }
            Err(why) => {
                assert_eq!(why, Refused::Full);
                refused += 1;
            }
        }
    }
    assert_eq!((conntrack.len(), refused), (512, 1000 - 512), "the whole quota can be used, and no more");
    let late = 6 * 24 * 3600 * SECOND_NS;
    conntrack.sweep(usize::MAX, late);
    assert!(conntrack.is_empty());
    establish(&mut conntrack, 1, late);
}

#[test]
fn new_flows_are_limited_for_each_direction_of_its_own() {
    let mut conntrack = Conntrack::new(ConntrackLimits { new_flows: Some((10, 5)), ..limits(64) }, 1);
    let mut admit = |direction, port, now_ns| conntrack.admit(&udp(direction, port, 53), direction, GRANT, now_ns);
    for port in 0..5 {
        assert!(admit(Direction::Ingress, port, 0).is_ok());
    }
    assert_eq!(admit(Direction::Ingress, 5, 0), Err(Refused::Rate));
    assert!(admit(Direction::Egress, 100, 0).is_ok(), "strangers do not stop the VM from speaking");
    assert!(admit(Direction::Ingress, 6, SECOND_NS).is_ok());
}

#[test]
fn icmp_that_neither_asks_nor_answers_is_not_tracked() {
    let mut conntrack = Conntrack::new(limits(64), 1);
    assert_eq!(conntrack.track(&echo(Direction::Egress, 9, 0), Direction::Egress, 0).state, ConnState::Untracked);
    assert_eq!(conntrack.admit(&echo(Direction::Egress, 9, 0), Direction::Egress, GRANT, 0), Err(Refused::Invalid));
}

#[test]
fn an_entry_has_its_trackers_state_also_after_what_moves_no_timeout() {
    let mut conntrack = Conntrack::new(limits(16), 1);
    let syn = tcp(Direction::Egress, 2000, SYN, 1, 0);
    let connection = conntrack.admit(&syn, Direction::Egress, GRANT, 0).unwrap();
    conntrack.track(&tcp(Direction::Ingress, 2000, SYN, 500, 0), Direction::Ingress, 0);
    let entry = conntrack.table.entry(connection.slot());
    assert_eq!(entry.tcp, TcpState::SynSent2);
    assert_eq!(conntrack.table.tracker(entry).map(Tracker::state), Some(entry.tcp));
}
