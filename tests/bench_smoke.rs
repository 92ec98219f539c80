//! The harness's commands that need this daemon, with tiny inputs: they are quoted, so they must not rot.
#![allow(clippy::unwrap_used)] // also in the helpers, which clippy does not take for tests

use std::path::Path;
use std::time::Duration;

use dreamwire_bench::compare::{self, Lane, Load, Outcome, Schedule, Site};
use dreamwire_bench::traffic::idle::{self, IdlePlan};

const DAEMON: &str = env!("CARGO_BIN_EXE_dreamwire");

fn last_cpu() -> usize {
    std::thread::available_parallelism().unwrap().get() - 1
}

#[test]
fn idle_tells_cpu_memory_and_wake_up() {
    let plan = IdlePlan {
        ports: 3,
        duration: Duration::from_millis(300),
        wake_ups: 50,
        cpu: 0,
        peer_cpu: last_cpu(),
        resume_latency_us: None,
    };
    let idle = idle::measure(Path::new(DAEMON), &plan).unwrap();
    assert!(idle.ticks <= 15, "half of the time: {idle:?}");
    assert!(idle.resident.anonymous_kib > 100 && idle.resident.file_kib > 100, "{idle:?}");
    assert!(idle.resident.guest_kib > 0, "the daemon reads the guests' rings: {idle:?}");
    assert_eq!((idle.wake_up.frames, idle.bare_wake_up.frames), (50, 50));
}

#[test]
fn the_daemon_is_compared_by_ports_flows_rules_and_latency() {
    let lanes = [
        "daemon",
        "daemon,ports=5",
        "daemon,flows=1000",
        "daemon,latency",
        "daemon,wake-up",
        "daemon,rules=20",
        "daemon,guard",
        "daemon,stateful,flows=10",
        "daemon,stateful,encap",
        "daemon,stateful,decap",
        "daemon,stateful,new-flows",
        "daemon,latency,stateful",
    ];
    let lanes = lanes.map(|lane| lane.parse::<Lane>().unwrap());
    let site = Site { cpu: 0, peer_cpu: last_cpu(), binaries: vec![("daemon".into(), DAEMON.into())] };
    let (window, settle) = (Duration::from_millis(30), Duration::from_millis(10));
    let schedule = Schedule { rounds: 2, window, settle, sample: 1, new_flows: 1024 };
    let comparison = compare::run("smoke", &lanes, &schedule, &site).unwrap();
    for report in &comparison.lanes {
        match &report.outcome {
            Outcome::Measured { rounds, latency } => {
                assert!(rounds.iter().all(|round| round.received > 0), "{comparison}");
                assert_eq!(latency.is_some(), report.lane.case.latency.is_some(), "{comparison}");
                let windows = if report.lane.case.latency == Some(Load::Idle) { 0 } else { 2 };
                assert_eq!(rounds.len(), windows, "{comparison}");
            }
            Outcome::Unavailable { reason } => panic!("{}: {reason}", report.lane.label),
        }
    }
}
