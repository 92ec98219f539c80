//! What is attached comes back: guests that reboot, QEMU that is killed, a daemon that ends or dies under its guests.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::array;
use std::net::SocketAddr;
use std::time::Instant;

use common::counters::{assert_conserved, assert_quiet_log, drops, number, wait_connected};
use common::process::{Held, assert_nothing_leaked};
use common::*;
use dreamwire_bench::topology::{
    BOOT_LIMIT, Daemon, ECHO_PORT, Guest, GuestSpec, Needs, Netns, Nic, ProbeReport, Wire, available, wait_until,
};

#[test]
fn a_guest_that_comes_back_finds_its_network() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let daemon = start_daemon("host", &host, &local_config(&[1, 2]));
    let [one, mut two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    assert_ping(&one, "10.0.0.2");
    let held = Held::by(&daemon);
    let probe = || one.probe(echo_of(2), PROBE_INTERVAL).unwrap();

    let (start, running) = (Instant::now(), probe());
    two.reboot().unwrap();
    traffic_is_back(&one, &two);
    report("reset by QEMU", start, &running.stop().unwrap());
    assert_nothing_leaked(&daemon, held);

    let (start, running) = (Instant::now(), probe());
    two.reboot_from_inside().unwrap();
    traffic_is_back(&one, &two);
    report("reboot by the guest", start, &running.stop().unwrap());
    assert_nothing_leaked(&daemon, held);
    assert_eq!(number(&daemon, "ports", "vm2", "/session/connections"), 1, "QEMU was connected all the time");

    let (start, running) = (Instant::now(), probe());
    two.kill().unwrap();
    wait_connected(&daemon, "vm2", false);
    // What is sent to nobody is counted there.
    let down = |daemon: &Daemon| drops(daemon).get("ports/vm2/port_down").copied().unwrap_or(0);
    let before = down(&daemon);
    wait_until(LIMIT, "drops at the port that is down", || down(&daemon) > before).unwrap();
    let [two] = boot([guest(&daemon, 2)]);
    traffic_is_back(&one, &two);
    report("QEMU killed and started again", start, &running.stop().unwrap());
    assert_nothing_leaked(&daemon, held);
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

/// Rings of one kind: a card in both guests, each with a port and a network of its own.
struct Card {
    name: &'static str,
    properties: &'static str,
    queue_pairs: u16,
}

/// ethN of both guests: all of them meet the same end of the daemon in one go.
const CARDS: [Card; 4] = [
    Card { name: "split-1", properties: "", queue_pairs: 1 },
    Card { name: "split-2", properties: "", queue_pairs: 2 },
    Card { name: "packed-1", properties: "packed=on", queue_pairs: 1 },
    Card { name: "packed-2", properties: "packed=on", queue_pairs: 2 },
];
/// Sends random bytes, and keeps a copy of them, until it is told that it is enough: on its way for as long as it takes.
const SENDER: &str = "#!/bin/sh
while [ ! -e /tmp/enough ]; do head -c 16384 /dev/urandom | tee -a /tmp/sent-$SOCAT_SOCKADDR; sleep 0.1; done
";

/// Between two probes of a flow. What waits in a queue during the gap may be overtaken by what follows it in one that is enabled
/// later, and nothing else may.
const PROBE_MS: f64 = 10.0;

impl Card {
    fn port(&self, guest: u8) -> String {
        format!("{}-{guest}", self.name)
    }

    fn config(&self) -> String {
        let Self { name, queue_pairs, .. } = self;
        let port = |guest: u8| {
            format!("[[port]]\nname = \"{}\"\nnetwork = \"{name}\"\nqueues = {queue_pairs}\n", self.port(guest))
        };
        format!("[[network]]\nname = \"{name}\"\n{}{}", port(1), port(2))
    }
}

#[test]
fn guests_with_rings_of_every_kind_recover_when_the_daemon_ends_or_is_killed() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let config = DAEMON.to_owned() + &CARDS.each_ref().map(Card::config).concat();
    let mut daemon = start_daemon("host", &host, &config);
    let [one, two] = boot([1_u8, 2].map(|guest| {
        // One processor each: with two emulated ones and many cards QEMU 10.0 aborts now and then as it boots (iotlb_to_section).
        CARDS.iter().enumerate().fold(GuestSpec::new(&format!("vm{guest}")), |spec, (index, card)| {
            let wire = Wire::VhostUser(daemon.path(&format!("{}.sock", card.port(guest))));
            let mac = mac_of(index, guest).map(|byte| format!("{byte:02x}")).join(":");
            let nic = Nic::new(wire, &mac);
            let nic = nic.queues(card.queue_pairs).properties(card.properties);
            spec.nic(nic.address(&format!("10.0.{index}.{guest}/24")))
        })
    }));
    two.sh(&format!("cat >/tmp/sender <<'END'\n{SENDER}END\nchmod +x /tmp/sender")).unwrap();
    two.sh("socat TCP-LISTEN:80,reuseaddr,fork EXEC:/tmp/sender >/tmp/socat 2>&1 &").unwrap();
    for (index, card) in CARDS.iter().enumerate().filter(|(_, card)| card.queue_pairs > 1) {
        // By itself the driver uses no more pairs than there are processors.
        for guest in [&one, &two] {
            guest.exec(&["ethtool", "-L", &format!("eth{index}"), "combined", &card.queue_pairs.to_string()]).unwrap();
        }
    }
    every_ring_carries(&daemon, &one, &two);
    let held = Held::by(&daemon);
    // Twice, for rings in another lap.
    for signal in ["SIGTERM", "SIGKILL", "SIGTERM", "SIGKILL"] {
        let link_events_before = [&one, &two].map(link_events);
        two.sh("rm -f /tmp/enough /tmp/sent-*").unwrap();
        for index in 0..CARDS.len() {
            one.sh(&format!(
                "rm -f /tmp/file{index} /tmp/ended{index}; \
                 (socat -u TCP:10.0.{index}.2:80 CREATE:/tmp/file{index} >/tmp/socat{index} 2>&1; touch /tmp/ended{index}) &"
            ))
            .unwrap();
        }
        let bytes_come = |what, than: [usize; CARDS.len()]| {
            for (index, than) in than.into_iter().enumerate() {
                wait_until(BOOT_LIMIT, what, || bytes_of(&one, index) > than).unwrap();
            }
        };
        bytes_come("a transfer's beginning", [0; CARDS.len()]);
        let start = Instant::now();
        let probes = [0, 1, 2, 3].map(|index| {
            let target = SocketAddr::new([10, 0, index, 2].into(), ECHO_PORT);
            one.probe(target, PROBE_INTERVAL).unwrap()
        });
        match signal {
            "SIGTERM" => daemon.terminate().unwrap(),
            _ => daemon.kill().unwrap(),
        }
        let before = array::from_fn(|index| bytes_of(&one, index));
        daemon.start_again().unwrap();
        every_ring_carries(&daemon, &one, &two);
        let probes = probes.map(|probe| probe.stop().unwrap());
        let events = [&one, &two].map(link_events);
        for (index, (card, probe)) in CARDS.iter().zip(&probes).enumerate() {
            // While a guest comes back, its second queue is enabled after the first, and flows move there.
            let waiting = probe.longest_gap_ms / PROBE_MS;
            let overtaken_max = if card.queue_pairs > 1 { waiting as u64 } else { 0 };
            report_moves(&format!("{} rings, {signal}", card.name), start, probe, overtaken_max);
            let [first, second] = [0, 1].map(|guest| events[guest][index] - link_events_before[guest][index]);
            eprintln!("    link events seen by the guests: {first} and {second}");
        }
        bytes_come("what a transfer sends after the daemon's end", before);
        two.sh("touch /tmp/enough").unwrap();
        the_transfers_are_whole(&one, &two);
        assert_conserved(&daemon);
        // The new process holds what the first one held.
        assert_nothing_leaked(&daemon, held);
    }
    assert_quiet_log(&daemon);
}

/// Of ethN of a guest.
fn mac_of(index: usize, guest: u8) -> [u8; 6] {
    [0x52, 0x54, 0, 0, index as u8, guest]
}

/// All ports are connected with the rings they should have, and frames get through every one of them, both ways.
#[track_caller]
fn every_ring_carries(daemon: &Daemon, one: &Guest, two: &Guest) {
    for (index, card) in CARDS.iter().enumerate() {
        for guest in [1, 2] {
            wait_connected(daemon, &card.port(guest), true);
        }
        for guest in [one, two] {
            guest.wait_link(&format!("eth{index}"), BOOT_LIMIT).unwrap();
        }
        let there = format!("10.0.{index}.2");
        wait_until(BOOT_LIMIT, "traffic", || one.ping(&there, 3).unwrap()).unwrap();
        wait_until(BOOT_LIMIT, "traffic back", || two.ping(&format!("10.0.{index}.1"), 3).unwrap()).unwrap();
        // Linux chooses the transmitq by the flow, dreamwire the receiveq.
        let ends = [(mac_of(index, 1), 1), (mac_of(index, 2), 2)];
        let flows: Vec<_> = (0..64).map(|flow| udp_frame(ends, 2000 + flow, b"spread")).collect();
        one.send_frames(&format!("eth{index}"), &flows).unwrap();
        for (guest, first) in [(1, 1), (2, 0)] {
            for queue in (first..2 * card.queue_pairs).step_by(2) {
                let frames = || number(daemon, "ports", &card.port(guest), &format!("/rings/{queue}/frames"));
                let waited = wait_until(LIMIT, "frames", || frames() > 0);
                assert!(waited.is_ok(), "{}: ring {queue} of guest {guest} carried nothing", card.name);
            }
        }
        let negotiated = daemon.cli(&["show", "port", &card.port(1)]).unwrap();
        assert_eq!(negotiated.contains("RING_PACKED"), !card.properties.is_empty(), "{negotiated}");
    }
}

/// How often each card's link went up or down so far.
fn link_events(guest: &Guest) -> Vec<u64> {
    (0..CARDS.len())
        .map(|index| {
            let path = format!("/sys/class/net/eth{index}/carrier_changes");
            guest.exec(&["cat", &path]).unwrap().trim().parse().unwrap()
        })
        .collect()
}

fn bytes_of(guest: &Guest, index: usize) -> usize {
    guest.sh(&format!("wc -c </tmp/file{index} 2>/dev/null || echo 0")).unwrap().trim().parse().unwrap()
}

/// The connections were there before the daemon's end, and have carried everything since. They end when their senders have.
fn the_transfers_are_whole(one: &Guest, two: &Guest) {
    let hash = |guest: &Guest, file: &str| guest.sh(&format!("sha256sum <{file}")).unwrap();
    for (index, card) in CARDS.iter().enumerate() {
        let [sent, received] = [format!("/tmp/sent-10.0.{index}.2"), format!("/tmp/file{index}")];
        let ended = || one.sh(&format!("test -e /tmp/ended{index} && echo yes || true")).unwrap().contains("yes");
        let waited = wait_until(BOOT_LIMIT, "the end of a transfer", ended);
        let said = one.sh(&format!("cat /tmp/socat{index}; wc -c {received}"));
        assert!(waited.is_ok() && hash(two, &sent) == hash(one, &received), "{}: {said:?}", card.name);
    }
}

fn echo_of(number: u8) -> SocketAddr {
    SocketAddr::new([10, 0, 0, number].into(), ECHO_PORT)
}

fn traffic_is_back(one: &Guest, two: &Guest) {
    two.wait_link("eth0", BOOT_LIMIT).unwrap();
    // The probe runs on: a guest that was just booted may lose some of what waited for it.
    wait_until(BOOT_LIMIT, "traffic", || one.ping("10.0.0.2", 3).unwrap()).unwrap();
    wait_until(BOOT_LIMIT, "traffic back", || two.ping("10.0.0.1", 3).unwrap()).unwrap();
}

fn report(what: &str, start: Instant, probe: &ProbeReport) {
    report_moves(what, start, probe, 0);
}

/// As [`report`]; where the flow may have moved to another queue, frames that waited in the old one may be overtaken.
fn report_moves(what: &str, start: Instant, probe: &ProbeReport, overtaken_max: u64) {
    let (gap_ms, seconds) = (probe.longest_gap_ms, start.elapsed().as_secs_f64());
    eprintln!(
        "{what}: longest gap {gap_ms:.0} ms in {seconds:.1} s; {} of {} probes answered, {} of them overtaken",
        probe.received, probe.sent, probe.reordered
    );
    assert!(probe.received > 0, "{probe:?}");
    assert_eq!(probe.duplicates, 0, "{probe:?}");
    assert!(probe.reordered <= overtaken_max, "{probe:?}");
}
