//! Named situations, and the differences that we want.

use dreamwire_policy::Direction;

use super::firewall::Firewalls;
use super::packets::{ACK, FIN, HOST, ROUTER, RST, SYN, Tcp, VM, icmp, ipv4, udp};

const IN: Direction = Direction::Ingress;
const OUT: Direction = Direction::Egress;

/// Sequence numbers of the host start at 100, of the VM at 500.
fn tcp(direction: Direction, flags: u8, sequence: u32, acknowledgment: u32, payload_bytes: u16) -> Tcp {
    let ingress = direction == IN;
    Tcp { ingress, flags, sequence, acknowledgment, window: 1000, payload_bytes, options: None, sack: None }
}

fn handshake() -> Vec<(Tcp, bool)> {
    vec![(tcp(IN, SYN, 100, 0, 0), true), (tcp(OUT, SYN | ACK, 500, 101, 0), true), (tcp(IN, ACK, 101, 501, 0), true)]
}

fn after_handshake(rest: &[(Tcp, bool)]) -> Vec<(Tcp, bool)> {
    [&handshake(), rest].concat()
}

fn closed(rest: &[(Tcp, bool)]) -> Vec<(Tcp, bool)> {
    let close = [
        (tcp(IN, FIN | ACK, 101, 501, 0), true),
        (tcp(OUT, FIN | ACK, 501, 102, 0), true),
        (tcp(IN, ACK, 102, 502, 0), true),
    ];
    after_handshake(&[&close, rest].concat())
}

/// Runs everything; gives the number of verdicts that were compared.
pub(crate) fn run(firewalls: &mut Firewalls) -> usize {
    tcp_scenarios(firewalls) + stateless(firewalls) + errors(firewalls) + fragments(firewalls)
}

fn tcp_scenarios(firewalls: &mut Firewalls) -> usize {
    let scenarios: Vec<(&str, Vec<(Tcp, bool)>)> = vec![
        ("handshake, data, close, late acknowledgment", closed(&[(tcp(IN, ACK, 102, 502, 0), true)])),
        (
            "port used again in TIME_WAIT",
            closed(&[
                (tcp(IN, SYN, 90_000, 0, 0), true),
                (tcp(OUT, SYN | ACK, 7000, 90_001, 0), true),
                (tcp(IN, ACK, 90_001, 7001, 0), true),
                (tcp(OUT, ACK, 7001, 90_001, 100), true),
            ]),
        ),
        ("port used again from the other side in TIME_WAIT", closed(&[(tcp(OUT, SYN, 90_000, 0, 0), true)])),
        (
            "port used again after a reset",
            after_handshake(&[
                (tcp(OUT, RST | ACK, 501, 101, 0), true),
                (tcp(IN, SYN, 90_000, 0, 0), true),
                (tcp(OUT, SYN | ACK, 7000, 90_001, 0), true),
                (tcp(IN, ACK, 90_001, 7001, 0), true),
            ]),
        ),
        ("reset on close", closed(&[(tcp(IN, RST, 102, 0, 0), true)])),
        (
            "reset behind what was acknowledged",
            after_handshake(&[(tcp(OUT, RST, 400, 0, 0), false), (tcp(IN, ACK, 101, 501, 10), true)]),
        ),
        (
            "reset in the window but not exact keeps the connection",
            after_handshake(&[
                (tcp(OUT, RST, 600, 0, 0), true),
                (tcp(IN, ACK, 101, 501, 10), true),
                (tcp(OUT, ACK, 501, 111, 10), true),
            ]),
        ),
        (
            "refused connection",
            vec![
                (tcp(IN, SYN, 100, 0, 0), true),
                (tcp(OUT, RST | ACK, 0, 101, 0), true),
                (tcp(OUT, RST | ACK, 0, 101, 0), false),
            ],
        ),
        (
            "simultaneous open",
            vec![
                (tcp(IN, SYN, 100, 0, 0), true),
                (tcp(OUT, SYN, 500, 0, 0), true),
                (tcp(IN, SYN | ACK, 100, 501, 0), true),
                (tcp(OUT, SYN | ACK, 500, 101, 0), true),
                (tcp(IN, ACK, 101, 501, 10), true),
            ],
        ),
        (
            "a second SYN without options keeps the window scale of the first",
            vec![
                (Tcp { options: Some(7), ..tcp(IN, SYN, 100, 0, 0) }, true),
                (tcp(IN, SYN, 200, 0, 0), true),
                (Tcp { options: Some(0), ..tcp(OUT, SYN | ACK, 500, 201, 0) }, true),
                (tcp(IN, ACK, 201, 501, 0), true),
                (tcp(OUT, ACK, 50_501, 201, 100), true),
            ],
        ),
        ("segment far beyond the window", after_handshake(&[(tcp(IN, ACK, 60_000, 501, 10), false)])),
        ("acknowledgment of what was never sent", after_handshake(&[(tcp(IN, ACK, 101, 5000, 0), false)])),
        (
            "retransmission of what was acknowledged",
            after_handshake(&[
                (tcp(IN, ACK, 101, 501, 100), true),
                (tcp(OUT, ACK, 501, 201, 0), true),
                (tcp(IN, ACK, 101, 501, 100), true),
            ]),
        ),
        (
            "SYN in an established connection, answered",
            after_handshake(&[
                (tcp(IN, SYN, 70_000, 0, 0), true),
                (tcp(OUT, SYN | ACK, 9000, 70_001, 0), true),
                (tcp(IN, ACK, 70_001, 9001, 0), true),
            ]),
        ),
        (
            "SYN in an established connection, reset",
            after_handshake(&[
                (tcp(IN, SYN, 70_000, 0, 0), true),
                (tcp(OUT, RST | ACK, 0, 70_001, 0), true),
                (tcp(IN, SYN, 80_000, 0, 0), true),
            ]),
        ),
        ("SYN/ACK out of nowhere", vec![(tcp(IN, SYN | ACK, 1, 1, 0), false), (tcp(OUT, SYN | ACK, 1, 1, 0), false)]),
        (
            "picked up in the middle",
            vec![
                (tcp(OUT, ACK, 1, 1, 10), true),
                (tcp(IN, ACK, 50_000, 11, 10), true),
                (tcp(OUT, ACK, 11, 50_010, 1000), true),
            ],
        ),
        (
            "flags that no TCP sends",
            after_handshake(&[
                (tcp(IN, 0, 101, 501, 0), false),
                (tcp(IN, SYN | FIN, 101, 501, 0), false),
                (tcp(IN, ACK, 101, 501, 0), true),
            ]),
        ),
        (
            "half-closed and still speaking",
            after_handshake(&[
                (tcp(IN, FIN | ACK, 101, 501, 0), true),
                (tcp(OUT, ACK, 501, 102, 500), true),
                (tcp(IN, ACK, 102, 1001, 0), true),
                (tcp(OUT, FIN | ACK, 1001, 102, 0), true),
            ]),
        ),
    ];
    let mut compared = 0;
    for ((name, trace), port) in scenarios.iter().zip(65_100..) {
        for (at, (segment, expected)) in trace.iter().enumerate() {
            let direction = if segment.ingress { IN } else { OUT };
            let packet = segment.packet(at as u16 + 1, port);
            let (linux, ours) =
                (firewalls.linux(direction, std::slice::from_ref(&packet)), firewalls.ours(direction, &packet));
            assert_eq!(linux, *expected, "{name}, packet {}: Linux", at + 1);
            assert_eq!(ours.allow, *expected, "{name}, packet {}: ours {ours:?}", at + 1);
            compared += 1;
        }
    }
    compared
}

fn check(firewalls: &mut Firewalls, name: &str, direction: Direction, packet: &[u8], expected: bool) -> usize {
    assert_eq!(firewalls.linux(direction, &[packet.to_vec()]), expected, "{name}: Linux");
    let ours = firewalls.ours(direction, packet);
    assert_eq!(ours.allow, expected, "{name}: ours {ours:?}");
    1
}

fn stateless(firewalls: &mut Firewalls) -> usize {
    let udp_in = |from, to| ipv4(1, 17, HOST, VM, 0, &udp(from, to, 10));
    let udp_out = |from, to| ipv4(1, 17, VM, HOST, 0, &udp(from, to, 10));
    let echo = |from, to, kind, id: u8| ipv4(1, 1, from, to, 0, &icmp(kind, 0, [0, id, 0, 1], &[]));
    let mut compared = 0;
    for (name, direction, packet, expected) in [
        ("UDP to an open port", IN, udp_in(5000, 53), true),
        ("its answer", OUT, udp_out(53, 5000), true),
        ("UDP to a closed port", IN, udp_in(5000, 54), false),
        ("UDP from the VM", OUT, udp_out(6000, 123), true),
        ("its answer", IN, udp_in(123, 6000), true),
        ("an answer from another port", IN, udp_in(124, 6000), false),
        ("a ping", IN, echo(HOST, VM, 8, 1), true),
        ("its answer", OUT, echo(VM, HOST, 0, 1), true),
        ("an answer nobody asked for", IN, echo(HOST, VM, 0, 2), false),
        ("a ping from the VM with the same identifier", OUT, echo(VM, HOST, 8, 1), true),
        ("its answer", IN, echo(HOST, VM, 0, 1), true),
        ("another protocol from outside", IN, ipv4(1, 47, HOST, VM, 0, &[0; 8]), false),
        ("another protocol from the VM", OUT, ipv4(1, 47, VM, HOST, 0, &[0; 8]), true),
        ("its answer", IN, ipv4(1, 47, HOST, VM, 0, &[0; 8]), true),
    ] {
        compared += check(firewalls, name, direction, &packet, expected);
    }
    compared
}

/// ICMP errors from a router, about a UDP flow and a TCP connection of the VM.
fn errors(firewalls: &mut Firewalls) -> usize {
    let unreachable = |to, quoted: &[u8]| ipv4(2, 1, ROUTER, to, 0, &icmp(3, 1, [0; 4], &quoted[..28]));
    let sent = ipv4(1, 17, VM, HOST, 0, &udp(7000, 99, 10));
    let never_sent = ipv4(1, 17, VM, HOST, 0, &udp(7001, 99, 10));
    let mut compared = check(firewalls, "UDP from the VM", OUT, &sent, true);
    for (name, packet, expected) in [
        ("an error about it", unreachable(VM, &sent), true),
        ("an error about nothing", unreachable(VM, &never_sent), false),
        ("an error about it to somebody else", unreachable([10, 2, 0, 2], &sent), false),
        ("an error with half a quote", ipv4(2, 1, ROUTER, VM, 0, &icmp(3, 1, [0; 4], &sent[..22])), false),
    ] {
        compared += check(firewalls, name, IN, &packet, expected);
    }
    let syn = Tcp { ingress: false, ..tcp(OUT, SYN, 500, 0, 0) };
    let opened = syn.packet(1, 65_200);
    compared += check(firewalls, "SYN from the VM", OUT, &opened, true);
    compared += check(firewalls, "an error about it", IN, &unreachable(VM, &opened), true);
    let forged = Tcp { sequence: 0x4000_0000, ..syn }.packet(1, 65_200);
    let error = unreachable(VM, &forged);
    let (linux, ours) = (firewalls.linux(IN, std::slice::from_ref(&error)), firewalls.ours(IN, &error).allow);
    assert!(linux && !ours, "Linux {linux}, ours {ours}");
    println!(
        "difference: an ICMP error that quotes a TCP sequence number outside of the window. Linux passes it and leaves the check to the receiver; we drop it (RFC 5927 §4.1): the VM's stack may not check."
    );
    compared
}

/// Datagrams in two pieces.
fn fragments(firewalls: &mut Firewalls) -> usize {
    let pieces = |id, port| {
        let datagram = udp(5000, port, 40);
        [ipv4(id, 17, HOST, VM, 0x2000, &datagram[..24]), ipv4(id, 17, HOST, VM, 3, &datagram[24..])]
    };
    let mut compared = 0;
    for (name, id, port, expected) in [("to an open port", 0x100, 53, true), ("to a closed port", 0x101, 54, false)] {
        let both = pieces(id, port);
        let linux = firewalls.linux(IN, &both);
        let ours = both.iter().all(|piece| firewalls.ours(IN, piece).allow);
        assert_eq!((linux, ours), (expected, expected), "a fragmented datagram {name}");
        compared += 1;
    }
    let [first, later] = pieces(0x102, 53);
    let linux = firewalls.linux(IN, &[later.clone(), first.clone()]);
    let ours = firewalls.ours(IN, &later).allow && firewalls.ours(IN, &first).allow;
    assert!(linux && !ours, "Linux {linux}, ours {ours}");
    println!(
        "difference: a later fragment that comes before its first. Linux reassembles, so it waits; we hold nothing back and drop it (the sender's retransmission is in order)."
    );
    compared
}
