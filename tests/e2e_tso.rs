//! TCP between two guests whose cards leave segmentation and checksums to the wire: on tap and bridge, and on dreamwire.
//!
//! Both guests have the same five cards, alike but for what is behind them, so that every comparison is within one run of
//! one pair of machines: eth0 on tap and bridge, the others on dreamwire. Segments are read in the receiver's capture with
//! its own GRO off, as its card delivered them. Speed is printed and not judged: the guests are emulated.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use common::counters::{assert_conserved, assert_quiet_log, number};
use common::*;
use dreamwire_bench::eth0::Segment;
use dreamwire_bench::report::{Paired, Series, Summary};
use dreamwire_bench::topology::{
    Daemon, FrameFilter, Guest, GuestSpec, Needs, Netns, Nic, VethEnd, Wire, available, wait_until,
};
use serde_json::Value;

/// Sent per connection: dozens of frames as long as they get, and little for the serial port that a capture comes through.
const BYTES: usize = 512 << 10;
/// Connections until one is free of retransmissions, which a loaded machine may cause.
const ATTEMPTS: usize = 4;
/// Seconds of iperf3 per round, and rounds.
const ROUND_SECONDS: u32 = 2;
const ROUNDS: usize = 5;
const PORT: u16 = 9000;
/// RFC 9293 §3.1.
const FIN: u8 = 1;
/// An Ethernet frame of MTU 1500.
const WIRE_FRAME_BYTES: usize = 1514;
/// TCP's payload in it beside timestamps (RFC 7323).
const SEGMENT_BYTES_V4: usize = 1500 - 20 - 20 - 12;
const SEGMENT_BYTES_V6: usize = 1500 - 40 - 20 - 12;

/// How a sender's large frames arrive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arrival {
    /// As they were sent, the checksum still to be made.
    Uncut,
    /// Cut to the wire's MTU, each with its own checksum; a short frame, which nobody cut, leaves it to the receiver still.
    Cut,
    /// As a wire has them: no frame too long, no checksum left.
    Finished,
}

/// What is behind ethN of both guests.
#[derive(Debug, Clone, Copy)]
struct Card {
    index: u8,
    name: &'static str,
    /// Keys of the receiver's port.
    keys: &'static str,
    arrival: Arrival,
}

const TAP: Card = Card { index: 0, name: "tap", keys: "", arrival: Arrival::Uncut };
const FULL: Card = Card { index: 1, name: "dreamwire", keys: "", arrival: Arrival::Uncut };
const NO_TSO: Card = Card { index: 2, name: "tso-off", keys: "features = { tso = false }", arrival: Arrival::Cut };
const NO_CSUM: Card =
    Card { index: 3, name: "csum-off", keys: "features = { csum = false }", arrival: Arrival::Finished };
/// The receiver is on another host.
const WIDE: Card = Card { index: 4, name: "two-hosts", keys: "", arrival: Arrival::Finished };
const CARDS: [Card; 5] = [TAP, FULL, NO_TSO, NO_CSUM, WIDE];

impl Card {
    fn interface(self) -> String {
        format!("eth{}", self.index)
    }

    fn address(self, is_ipv6: bool, guest: u8) -> String {
        if is_ipv6 { format!("fd00:{}::{guest}", self.index) } else { format!("10.0.{}.{guest}", self.index) }
    }

    /// Guest `guest`'s card on `wire`.
    fn nic(self, wire: Wire, guest: u8) -> Nic {
        Nic::new(wire, &format!("52:54:00:00:{:02x}:{guest:02x}", self.index))
            .address(&format!("{}/24", self.address(false, guest)))
            .address(&format!("{}/64", self.address(true, guest)))
    }

    /// Its network with these ports on one host.
    fn network(self, keys: &str, guests: &[u8]) -> String {
        let name = self.name;
        let port = |guest: &u8| {
            let own = if *guest == 2 { self.keys } else { "" };
            format!("[[port]]\nname = \"{name}-{guest}\"\nnetwork = \"{name}\"\n{own}\n")
        };
        let ports: String = guests.iter().map(port).collect();
        format!("[[network]]\nname = \"{name}\"\n{keys}\n{ports}")
    }
}

/// Two hosts with their daemons, and the guests. Dropped in this order: guests do not see their wires go.
struct Scene {
    guests: [Guest; 2],
    daemons: [Daemon; 2],
    _hosts: [Netns; 2],
}

impl Scene {
    fn start() -> Self {
        let hosts = [Netns::new("left").unwrap(), Netns::new("right").unwrap()];
        let end = |index: usize, addresses| VethEnd { netns: &hosts[index], interface: "eth1", addresses };
        Netns::join([end(0, &["192.0.2.1/24"]), end(1, &["192.0.2.2/24"])], 1600).unwrap();
        for tap in ["tap1", "tap2"] {
            hosts[0].add_tap(tap, 1).unwrap();
        }
        hosts[0].add_bridge("br0", &["tap1", "tap2"]).unwrap();
        let wide = |own: u8| {
            let keys = format!("vni = 100\nunderlay = \"fabric\"\nremotes = [\"192.0.2.{}\"]", 3 - own);
            format!("{DAEMON}[[underlay]]\nname = \"fabric\"\naddress = \"192.0.2.{own}\"\nmtu = 1600\n")
                + &WIDE.network(&keys, &[own])
        };
        let local: String = [FULL, NO_TSO, NO_CSUM].map(|card| card.network("", &[1, 2])).concat();
        let daemons =
            [start_daemon("left", &hosts[0], &(wide(1) + &local)), start_daemon("right", &hosts[1], &wide(2))];
        let guests = boot([1_u8, 2].map(|guest| {
            CARDS.iter().fold(GuestSpec::new(&format!("vm{guest}")).inside(&hosts[0]), |spec, card| {
                let daemon = &daemons[usize::from(card.index == WIDE.index && guest == 2)];
                let wire = match card.index {
                    0 => Wire::Tap(format!("tap{guest}")),
                    _ => Wire::VhostUser(daemon.path(&format!("{}-{guest}.sock", card.name))),
                };
                spec.nic(card.nic(wire, guest))
            })
        }));
        for card in CARDS {
            guests[1].sh(&format!("ethtool -K {} gro off", card.interface())).unwrap();
            for is_ipv6 in [false, true] {
                let target = card.address(is_ipv6, 2);
                wait_until(LIMIT, "the first ping", || guests[0].ping(&target, 1).unwrap()).unwrap();
            }
        }
        Self { guests, daemons, _hosts: hosts }
    }

    /// Frames that a daemon made beside those it got: by flooding, which has one destination here, and so by cutting.
    fn copied(&self) -> [u64; 2] {
        self.daemons.each_ref().map(|daemon| {
            assert_conserved(daemon);
            daemon.stats().unwrap()["conservation"]["copied"].as_u64().unwrap()
        })
    }

    /// Bytes through one connection from the first guest to the second, and the frames that they came in.
    fn transfer(&self, card: Card, is_ipv6: bool, sent: &[u8]) -> Vec<Segment> {
        let [one, two] = &self.guests;
        let capture = two.capture(&card.interface()).unwrap();
        let limit = Duration::from_secs(20);
        let target = card.address(is_ipv6, 2);
        // An input that never ends: nc shuts its half of the connection with it, and then the other one gives up.
        let receive = format!("nc -l -p {PORT} <>/tmp/silence >/tmp/received");
        // Until somebody listens.
        let send = format!("until nc -w 10 {target} {PORT} </tmp/sent; do sleep 0.1; done");
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| two.run(&["sh", "-c", &receive], limit).unwrap());
            assert!(one.run(&["sh", "-c", &send], limit).unwrap().success());
            assert!(receiver.join().unwrap().success());
        });
        let hash = |guest: &Guest, path: &str| guest.sh(&format!("sha256sum <{path}")).unwrap();
        assert_eq!(hash(two, "/tmp/received"), hash(one, "/tmp/sent"), "{}: the bytes differ", card.name);
        let port_at = 14 + if is_ipv6 { 40 } else { 20 } + 2;
        let filter = FrameFilter::any().bytes_at(port_at, &PORT.to_be_bytes());
        let frames = capture.frames(&filter, usize::MAX, Duration::from_millis(300)).unwrap();
        let segments = frames.iter().filter_map(Segment::read).filter(|segment| !segment.payload.is_empty());
        let segments: Vec<_> = segments.collect();
        let bytes: usize = segments.iter().map(|segment| segment.payload.len()).sum();
        assert!(bytes >= sent.len(), "the capture has {bytes} of {} bytes", sent.len());
        segments
    }
}

#[test]
fn large_frames_arrive_as_the_receiver_can_take_them() {
    if !available(Needs::Guests) {
        return;
    }
    let scene = Scene::start();
    segments_are_right(&scene);
    throughput_beside_tap(&scene);
    for daemon in &scene.daemons {
        assert_conserved(daemon);
        assert_quiet_log(daemon);
    }
}

fn segments_are_right(scene: &Scene) {
    let sent = noise(BYTES);
    scene.guests[0].put_file("/tmp/sent", &sent).unwrap();
    scene.guests[1].exec(&["mkfifo", "/tmp/silence"]).unwrap();
    for card in CARDS {
        for is_ipv6 in [false, true] {
            let (segments, copied) = clean_transfer(scene, card, is_ipv6, &sent);
            check_segments(card, is_ipv6, &segments, &sent);
            // Cut where the receiver is not able to, or where the tunnel begins, and nowhere a second time.
            match card.arrival {
                Arrival::Uncut => assert_eq!(copied, [0, 0], "{}", card.name),
                Arrival::Cut | Arrival::Finished => {
                    assert!(copied[0] > 0, "{}: the sender sent no large frame", card.name);
                    assert_eq!(copied[1], 0, "{}: cut again", card.name);
                }
            }
        }
    }
    let frames = |daemon: &Daemon, pointer: &str| number(daemon, "networks", WIDE.name, pointer);
    let [left, right] = &scene.daemons;
    assert_eq!(frames(left, "/tunnel_tx/frames"), frames(right, "/tunnel_rx/frames"), "what went in came out");
}

/// Until a connection had no retransmission; with it what both daemons copied meanwhile.
fn clean_transfer(scene: &Scene, card: Card, is_ipv6: bool, sent: &[u8]) -> (Vec<Segment>, [u64; 2]) {
    for _ in 0..ATTEMPTS {
        let before = scene.copied();
        let segments = scene.transfer(card, is_ipv6, sent);
        let after = scene.copied();
        if segments.iter().map(|segment| segment.payload.len()).sum::<usize>() == sent.len() {
            return (segments, [after[0] - before[0], after[1] - before[1]]);
        }
        eprintln!("{}: a connection with retransmissions", card.name);
    }
    panic!("{}: {ATTEMPTS} connections, each with retransmissions", card.name);
}

fn check_segments(card: Card, is_ipv6: bool, segments: &[Segment], sent: &[u8]) {
    let name = card.name;
    let segment_bytes = if is_ipv6 { SEGMENT_BYTES_V6 } else { SEGMENT_BYTES_V4 };
    for pair in segments.windows(2) {
        let [this, next] = pair else { unreachable!("windows of two") };
        let bytes = this.payload.len();
        assert_eq!(next.sequence, this.sequence.wrapping_add(bytes as u32), "{name}: a gap in the sequence");
        // Linux: a large frame has taken as many numbers as its segments will need.
        if let (Some(this), Some(next)) = (this.id, next.id) {
            assert_eq!(usize::from(next.wrapping_sub(this)), bytes.div_ceil(segment_bytes), "{name}: IP IDs");
        }
    }
    let received: Vec<u8> = segments.iter().flat_map(|segment| segment.payload.iter().copied()).collect();
    assert!(received == sent, "{name}: the segments hold other bytes");
    assert!(segments.iter().all(|segment| segment.header_checksum_good), "{name}: an IP header's checksum");
    let checksums: BTreeSet<_> = segments.iter().map(|segment| segment.checksum).collect();
    let longest = segments.iter().map(|segment| segment.frame_bytes).max().unwrap();
    let (is_long, expected): (bool, &[&str]) = match card.arrival {
        Arrival::Uncut => (true, &["pending"]),
        Arrival::Cut => (false, &["good", "pending"]),
        Arrival::Finished => (false, &["good"]),
    };
    assert!(if is_long { longest > WIRE_FRAME_BYTES } else { longest == WIRE_FRAME_BYTES }, "{name}: {longest} bytes");
    assert!(checksums.contains(expected[0]), "{name}: {checksums:?}");
    assert!(checksums.iter().all(|found| expected.contains(found)), "{name}: {checksums:?}");
    // Of a cut frame the last segment alone has it.
    assert!(segments.iter().rev().skip(1).all(|segment| segment.flags & FIN == 0), "{name}: FIN before the end");
    let family = if is_ipv6 { "IPv6" } else { "IPv4" };
    eprintln!(
        "{name}, {family}: {BYTES} bytes in {} frames, longest {longest}, checksums {}",
        segments.len(),
        checksums.into_iter().collect::<Vec<_>>().join(", ")
    );
}

/// Rounds on tap, on dreamwire and across two hosts, in turns.
fn throughput_beside_tap(scene: &Scene) {
    let [one, two] = &scene.guests;
    for card in CARDS {
        // As a guest has it.
        two.sh(&format!("ethtool -K {} gro on", card.interface())).unwrap();
    }
    two.sh("iperf3 -s -D").unwrap();
    wait_until(LIMIT, "iperf3", || two.sh("netstat -tln").is_ok_and(|list| list.contains(":5201"))).unwrap();
    let (mut beside, mut wide) = (Paired::default(), Vec::new());
    let mut frame_bytes = [0.0; CARDS.len()];
    let started = Instant::now();
    for round in 0..ROUNDS {
        let mut measure = |card: Card| {
            let before = received(two, card);
            let mbit = iperf(one, card);
            let after = received(two, card);
            frame_bytes[usize::from(card.index)] = (after.0 - before.0) as f64 / (after.1 - before.1) as f64;
            mbit
        };
        // Who goes first takes turns too.
        let (tap, dreamwire) = if round % 2 == 0 {
            let tap = measure(TAP);
            (tap, measure(FULL))
        } else {
            let dreamwire = measure(FULL);
            (measure(TAP), dreamwire)
        };
        beside.push(dreamwire, tap);
        wide.push(measure(WIDE));
    }
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    eprintln!(
        "TCP with TSO, {ROUNDS} rounds of {ROUND_SECONDS} s each ({build} build, {:.0} s):",
        started.elapsed().as_secs_f64()
    );
    let show = |what: &str, of: Summary, card: Card| {
        eprintln!(
            "  {what}: median {:.0} Mbit/s ({:.0} to {:.0}), {:.0} bytes a frame in the last round",
            of.median,
            of.min,
            of.max,
            frame_bytes[usize::from(card.index)]
        );
    };
    show("tap and bridge", beside.baseline().summary().unwrap(), TAP);
    show("dreamwire", beside.subject().summary().unwrap(), FULL);
    show("dreamwire across two hosts", Series::new(wide).summary().unwrap(), WIDE);
    let ratio = beside.ratio().unwrap();
    eprintln!("  dreamwire / tap: {:.2} ({:.2} to {:.2})", ratio.median, ratio.min, ratio.max);
    for card in [TAP, FULL] {
        let mean = frame_bytes[usize::from(card.index)];
        assert!(mean > WIRE_FRAME_BYTES as f64, "{}: {mean} bytes a frame", card.name);
    }
}

/// One connection of the first guest to the second, in Mbit/s of what arrived.
fn iperf(one: &Guest, card: Card) -> f64 {
    let seconds = ROUND_SECONDS.to_string();
    let argv = ["iperf3", "-c", &card.address(false, 2), "-t", &seconds, "--json"];
    let report: Value = serde_json::from_str(&one.exec(&argv).unwrap()).unwrap();
    report["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e6
}

/// Bytes and frames that a card of a guest has received.
fn received(guest: &Guest, card: Card) -> (u64, u64) {
    let directory = format!("/sys/class/net/{}/statistics", card.interface());
    let text = guest.sh(&format!("cat {directory}/rx_bytes {directory}/rx_packets")).unwrap();
    let numbers: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    (numbers[0], numbers[1])
}

/// Bytes without a pattern that a mistake could hit (xorshift64, Marsaglia 2003).
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..bytes)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
