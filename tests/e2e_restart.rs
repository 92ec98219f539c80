//! What is attached comes back: guests that reboot, QEMU that is killed, a daemon that ends or dies under its guests.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::net::SocketAddr;
use std::time::Instant;

use common::counters::{assert_conserved, assert_quiet_log, drops, number, wait_connected};
use common::process::{Held, assert_nothing_leaked};
use common::*;
use dreamwire_bench::topology::{
    BOOT_LIMIT, Daemon, ECHO_PORT, Guest, Needs, Netns, ProbeReport, available, wait_until,
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

#[test]
fn guests_reconnect_to_a_daemon_that_was_restarted() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let mut daemon = start_daemon("host", &host, &local_config(&[1, 2]));
    let guests = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    assert_ping(&guests[0], "10.0.0.2");
    let held = Held::by(&daemon);

    for signal in ["SIGTERM", "SIGKILL"] {
        let [one, two] = &guests;
        let (start, running) = (Instant::now(), one.probe(echo_of(2), PROBE_INTERVAL).unwrap());
        match signal {
            "SIGTERM" => daemon.terminate().unwrap(),
            _ => daemon.kill().unwrap(),
        }
        daemon.start_again().unwrap();
        for port in ["vm1", "vm2"] {
            wait_connected(&daemon, port, true);
        }
        traffic_is_back(one, two);
        report(&format!("daemon ended by {signal} and started again"), start, &running.stop().unwrap());
        // The new process holds what the first one held.
        assert_nothing_leaked(&daemon, held);
        assert_conserved(&daemon);
    }
    assert_quiet_log(&daemon);
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
    let (gap_ms, seconds) = (probe.longest_gap_ms, start.elapsed().as_secs_f64());
    eprintln!(
        "{what}: longest gap {gap_ms:.0} ms in {seconds:.1} s; {} of {} probes answered",
        probe.received, probe.sent
    );
    assert!(probe.received > 0, "{probe:?}");
    assert_eq!((probe.duplicates, probe.reordered), (0, 0), "{probe:?}");
}
