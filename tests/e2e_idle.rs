//! A daemon with guests that do nothing uses next to no processor time, and is awake when something comes.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::time::{Duration, Instant};

use common::counters::{assert_conserved, assert_quiet_log, number};
use common::process::processor_time;
use common::*;
use dreamwire_bench::topology::{Needs, Netns, available};

/// Long against a scheduler tick of 10 ms, in which the kernel counts.
const WINDOW: Duration = Duration::from_secs(6);
/// Of one core.
const IDLE_SHARE_MAX: f64 = 0.01;

#[test]
fn a_daemon_with_two_idle_guests_uses_under_one_percent_of_a_core() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let addresses = [["192.0.2.1/24"], ["192.0.2.2/24"]];
    let peer = Netns::new("peer").unwrap();
    let end = |netns, index: usize| dreamwire_bench::topology::VethEnd {
        netns,
        interface: "eth1",
        addresses: &addresses[index],
    };
    Netns::join([end(&host, 0), end(&peer, 1)], 1600).unwrap();
    // With a tunnel, so that the underlay's idleness counts too.
    let config = tunnel_config("192.0.2.1", &["192.0.2.2"], 1600) + &port(1, "") + &port(2, "");
    let daemon = start_daemon("host", &host, &config);
    let [one, _two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    assert_ping(&one, "10.0.0.2");

    let sleeps = || number(&daemon, "workers", "0", "/sleeps");
    let slept_before = sleeps();
    let (start, used_before) = (Instant::now(), processor_time(&daemon));
    // The one wait for time among these tests: a share is measured over a time.
    std::thread::sleep(WINDOW);
    let (used, window) = (processor_time(&daemon) - used_before, start.elapsed());
    let share = used.as_secs_f64() / window.as_secs_f64();
    eprintln!("two idle guests: {used:.0?} of {window:.1?}, {:.2} % of a core", share * 100.0);
    assert!(share < IDLE_SHARE_MAX, "{used:?} of {window:?}");
    assert!(used_before > Duration::ZERO, "starting took some: it is counted at all");
    assert!(sleeps() > slept_before, "the worker slept and woke");

    assert_ping(&one, "10.0.0.2");
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}
