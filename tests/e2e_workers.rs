//! Two guests on two workers: their connections go on while one's port moves from worker to worker.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::counters::{assert_conserved, assert_quiet_log, drops, number};
use common::*;
use dreamwire_bench::topology::{ECHO_PORT, Guest, Needs, Netns, available, wait_until};

const MOVES: u32 = 20;
const PORT: u16 = 99;
/// Written piece by piece with a pause after each, so that it is on its way all the time.
const PIECES: u64 = 256;
const FILE_BYTES: u64 = PIECES << 16;
/// Between two moves, from each guest at least.
const FRAMES_BETWEEN: u64 = 50;
const FILE_LIMIT: Duration = Duration::from_secs(90);

/// Each guest begins to send the other a file over TCP; returns the files' hashes.
fn send_to_each_other([one, two]: [&Guest; 2]) -> [String; 2] {
    for guest in [one, two] {
        let pieces = format!(
            "for at in $(seq 0 {}); do dd if=/tmp/sent bs=64k skip=$at count=1 2>/dev/null; sleep 0.1; done",
            PIECES - 1
        );
        guest.sh(&format!("head -c {FILE_BYTES} /dev/urandom >/tmp/sent; mkfifo /tmp/silence")).unwrap();
        guest.sh(&format!("({pieces}) | nc -l -p {PORT} >/dev/null 2>&1 &")).unwrap();
    }
    for (guest, from) in [(one, 2), (two, 1)] {
        // An input that never ends: with its end, nc would end the connection.
        let receive = format!("until nc 10.0.0.{from} {PORT} <>/tmp/silence >/tmp/file; do sleep 0.1; done");
        guest.sh(&format!("({receive}) 2>/tmp/nc.log &")).unwrap();
        wait_until(LIMIT, "the file's beginning", || loaded(guest) > 0).unwrap();
    }
    [two, one].map(|guest| guest.sh("sha256sum </tmp/sent").unwrap())
}

fn loaded(guest: &Guest) -> u64 {
    guest.sh("stat -c %s /tmp/file").map_or(0, |bytes| bytes.trim().parse().unwrap())
}

#[test]
fn connections_go_on_while_a_port_moves_from_worker_to_worker() {
    if !available(Needs::Guests) {
        return;
    }
    let Some(cpus) = two_cpus() else { return };
    let host = Netns::new("host").unwrap();
    let ports = port(1, "worker = 0") + &port(2, "worker = 1");
    let daemon = start_daemon("host", &host, &with_workers(&format!("{DAEMON}{LOCAL_NETWORK}{ports}"), cpus));
    let [one, two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    assert_ping(&one, "10.0.0.2");
    let hashes = send_to_each_other([&one, &two]);
    let before = drops(&daemon);
    let probe = one.probe(SocketAddr::new([10, 0, 0, 2].into(), ECHO_PORT), PROBE_INTERVAL).unwrap();

    let started = Instant::now();
    for turn in 1..=MOVES {
        let worker = turn % 2;
        daemon.cli(&["port", "set", "vm1", &format!("worker={worker}")]).unwrap();
        let frames = || ["vm1", "vm2"].map(|port| number(&daemon, "ports", port, "/rx/frames"));
        let before = frames();
        wait_until(LIMIT, "frames both ways", || {
            frames().iter().zip(before).all(|(now, before)| *now > before + FRAMES_BETWEEN)
        })
        .unwrap();
    }
    let report = probe.stop().unwrap();
    let moved = started.elapsed();
    assert!([&one, &two].into_iter().all(|guest| loaded(guest) < FILE_BYTES), "both files are still on their way");

    for (guest, hash) in [&one, &two].into_iter().zip(hashes) {
        wait_until(FILE_LIMIT, "the whole file", || loaded(guest) == FILE_BYTES).unwrap();
        assert_eq!(
            guest.sh("sha256sum </tmp/file").unwrap(),
            hash,
            "{}: {}",
            guest.name(),
            guest.sh("cat /tmp/nc.log").unwrap()
        );
    }
    let mut drops = drops(&daemon);
    drops.retain(|name, count| before.get(name) != Some(count));
    eprintln!(
        "{MOVES} moves in {:.1} s: {} of {} probes answered, longest gap {:.0} ms; dropped: {drops:?}",
        moved.as_secs_f64(),
        report.received,
        report.sent,
        report.longest_gap_ms
    );
    // What misses a ring during a move; beside that, TCP may find a full ring, or a full link to a worker that is not running.
    let expected = |name: &str| {
        name == "ports/vm1/port_down" || ["/ring_full", "/handoff_full"].iter().any(|end| name.ends_with(end))
    };
    assert!(drops.keys().all(|name| expected(name)), "{drops:?}");
    let lost = report.sent - report.received;
    assert!(lost <= drops.values().sum(), "{report:?}, {drops:?}");
    assert_eq!((report.refused, report.duplicates), (0, 0), "{report:?}");
    for port in ["vm1", "vm2"] {
        assert_eq!(number(&daemon, "ports", port, "/session/connections"), 1, "{port} stayed connected");
    }
    let handed_over = ["0", "1"].map(|worker| number(&daemon, "workers", worker, "/handoff/tx"));
    assert!(handed_over.iter().all(|frames| *frames > 0), "{handed_over:?}");
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}
