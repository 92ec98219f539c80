//! Comparisons with tiny windows, so that the harness that people quote never rots: every frame compared to its last byte.
//!
//! Without testpmd, or OVS with DPDK, these tests say so and pass, unless CI=true: then they fail. OVS needs root as well.
#![allow(clippy::unwrap_used)] // also in the helpers, which clippy does not take for tests

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dreamwire_bench::compare::{self, Comparison, Lane, Outcome, Schedule, Site};
use dreamwire_bench::topology::{self, Needs};

/// Peers busy-poll a whole core: one comparison at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn compare(lanes: &[&str]) -> Option<(Comparison, MutexGuard<'static, ()>)> {
    let lanes: Vec<Lane> = lanes.iter().map(|lane| lane.parse().unwrap()).collect();
    if let Some(lane) = lanes.iter().find(|lane| !compare::is_installed(lane)) {
        let message = format!("SKIPPED: {} is not installed (scripts/setup bench); nothing was tested\n", lane.device);
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{message}");
        // Past the test harness, which swallows what a passing test prints.
        std::io::stderr().write_all(message.as_bytes()).unwrap();
        return None;
    }
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let cpus = std::thread::available_parallelism().unwrap().get();
    let site = Site { cpu: 0, peer_cpu: cpus - 1, binaries: Vec::new() };
    let schedule = Schedule {
        rounds: 2,
        window: Duration::from_millis(30),
        settle: Duration::from_millis(10),
        sample: 1,
        new_flows: 4096,
    };
    Some((compare::run("smoke", &lanes, &schedule, &site).unwrap(), guard))
}

/// Every lane was measured in every round. (Altered and reordered frames are errors of the run.)
fn is_whole(comparison: &Comparison) {
    for report in &comparison.lanes {
        if let Outcome::Unavailable { reason } = &report.outcome {
            panic!("{}: {reason}", report.lane.label);
        }
        assert_eq!(report.rounds().len(), 2, "{}", report.lane.label);
        assert!(report.rounds().iter().all(|round| round.received > 0), "{comparison}");
    }
    assert_eq!(comparison.ratio(0).unwrap().median, 1.0);
}

#[test]
fn testpmd_takes_turns_with_itself() {
    let lanes = ["io", "io,packed,size=1518,flows=100", "io,new-flows"];
    let Some((comparison, _guard)) = compare(&lanes) else { return };
    is_whole(&comparison);
}

#[test]
fn a_lane_that_its_device_cannot_do_leaves_the_others_measured() {
    let Some((comparison, _guard)) = compare(&["io", "io,encap"]) else { return };
    assert_eq!(comparison.lanes[0].rounds().len(), 2);
    assert!(matches!(comparison.lanes[1].outcome, Outcome::Unavailable { .. }));
}

#[test]
fn kernel_bridges_and_tunnels() {
    if !topology::available(Needs::Netns) {
        return;
    }
    let lanes = ["kernel", "kernel,encap,size=1518", "kernel,decap,flows=3", "kernel,size=65214"];
    let Some((comparison, _guard)) = compare(&lanes) else { return };
    is_whole(&comparison);
}

#[test]
fn latency_is_measured_under_load_and_idle() {
    let Some((comparison, _guard)) = compare(&["io,latency", "io,wake-up"]) else { return };
    for report in &comparison.lanes {
        let latency = report.latency().unwrap_or_else(|| panic!("{comparison}"));
        assert!(latency.frames >= 100, "{latency:?}");
        assert!(0.0 < latency.p50_us && latency.p50_us <= latency.p99_us && latency.p99_us <= latency.max_us);
    }
    assert_eq!(comparison.lanes[0].rounds().len(), 2);
    assert!(comparison.lanes[1].rounds().is_empty());
}

#[test]
fn ovs_tunnels_and_polices() {
    // Its bridges are made in a network namespace.
    if !topology::available(Needs::Netns) {
        return;
    }
    let lanes = ["ovs,encap", "ovs,decap", "ovs,stateful,flows=10"];
    let Some((comparison, _guard)) = compare(&lanes) else { return };
    is_whole(&comparison);
}
