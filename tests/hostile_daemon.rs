//! Hostile front-ends and the daemon as a program: what an operator sees of them, its log, its end under load.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use dreamwire_bench::front_end::{FrontEnd, Options};
use dreamwire_bench::hostile::attack;
use dreamwire_bench::topology::{Daemon, DaemonSpec, wait_until};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(10);

fn daemon() -> Daemon {
    let config = "[daemon]\nrun_dir = \"{run_dir}\"\n[[network]]\nname = \"blue\"\n\
        [[port]]\nname = \"vm1\"\nnetwork = \"blue\"\n[[port]]\nname = \"vm2\"\nnetwork = \"blue\"\n";
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    Daemon::start(&DaemonSpec { name: "dreamwire", binary, netns: None, config }).unwrap()
}

/// A ring of vm1, as `dreamwire show` prints it.
fn ring(daemon: &Daemon, queue: usize) -> Value {
    let mut shown: Value = serde_json::from_str(&daemon.cli(&["show", "port", "vm1", "--json"]).unwrap()).unwrap();
    shown["rings"][queue].take()
}

/// Why vm1's transmitq is quarantined.
fn shown(daemon: &Daemon) -> Option<String> {
    ring(daemon, 1)["quarantined"].as_str().map(str::to_owned)
}

#[test]
fn an_operator_sees_why_a_ring_is_quarantined_and_that_its_reset_ends_it() {
    let daemon = daemon();
    let mut front_end = FrontEnd::connect(&daemon.path("vm1.sock"), attack::small()).unwrap();
    front_end.raw(1).submit(9999);
    wait_until(PATIENCE, "quarantine", || shown(&daemon).is_some()).unwrap();
    assert_eq!(shown(&daemon).unwrap(), "descriptor index 9999 is outside the table of 64");
    assert_eq!([0, 1].map(|queue| ring(&daemon, queue)["far"].take()), [Value::Bool(false), Value::Null]);
    let metrics = daemon.metrics().unwrap();
    assert!(metrics.contains("dreamwire_ring_quarantined{port=\"vm1\",ring=\"1\"} 1"));
    assert!(metrics.contains("dreamwire_ring_far{port=\"vm1\",ring=\"0\"} 0"), "nothing was sent to it yet");
    assert!(
        !metrics.contains("dreamwire_ring_far{port=\"vm1\",ring=\"1\"}"),
        "nothing is written to a transmitq's driver"
    );
    wait_until(PATIENCE, "the log", || daemon.log().contains("ring quarantined until its driver resets")).unwrap();
    assert!(front_end.raw(1).doorbell().broken(), "the error descriptor was signalled");
    attack::reset_ring(&mut front_end, 1).unwrap();
    wait_until(PATIENCE, "the ring's return", || shown(&daemon).is_none()).unwrap();
}

#[test]
fn a_truncated_memory_file_is_named_and_costs_one_line() {
    let daemon = daemon();
    let options = Options { seal: false, ..attack::small() };
    let front_end = FrontEnd::connect(&daemon.path("vm1.sock"), options).unwrap();
    front_end.memory().file().unwrap().set_len(0).unwrap();
    front_end.raw(1).doorbell().kick();
    wait_until(PATIENCE, "quarantine", || shown(&daemon).is_some()).unwrap();
    assert_eq!(shown(&daemon).unwrap(), "its memory file was truncated");
    let lines = || daemon.log().matches("its memory file was truncated").count();
    wait_until(PATIENCE, "the log", || lines() > 0).unwrap();
    assert_eq!(lines(), 1, "{}", daemon.log());
}

#[test]
fn a_front_end_cannot_flood_the_log() {
    let daemon = daemon();
    let before = daemon.log().lines().count();
    let start = std::time::Instant::now();
    for _ in 0..200 {
        // Again where another test is starting a process: until that has called exec it holds a copy of the last socket, and
        // then this one is a second front-end.
        let mut connected = None;
        wait_until(PATIENCE, "a session", || {
            connected = FrontEnd::connect(&daemon.path("vm1.sock"), attack::small()).ok();
            connected.is_some()
        })
        .unwrap();
        let mut front_end = connected.expect("waited for");
        front_end.raw(1).submit(9999);
        for _ in 0..10 {
            assert_eq!(attack::ask(&mut front_end, 8, &attack::ring_number(1, 3), &[]), Some(1));
        }
    }
    let lines = daemon.log().lines().count() - before;
    // Two shares of 30 and 10, and three kinds of a line a second.
    let allowed = 50 + 4 * start.elapsed().as_secs() as usize;
    assert!(lines <= allowed, "{lines} lines, {allowed} allowed:\n{}", daemon.log());
}

/// DPDK 73ea44370d, 21d9fb6bad: the end comes while rings are served, messages judged and connections made.
#[test]
fn sigterm_under_load_ends_in_order() {
    for round in 0..8 {
        let mut daemon = daemon();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let quick = || Options { timeout: Duration::from_millis(500), ..attack::small() };
            let mut sender = FrontEnd::connect(&daemon.path("vm1.sock"), quick()).unwrap();
            let (talker, other) = (daemon.path("vm2.sock"), daemon.path("vm1.sock"));
            let stop = &stop;
            scope.spawn(move || {
                let frame = attack::frame(200, 1);
                while !stop.load(Ordering::Relaxed) {
                    let _ = sender.send_burst(&[&frame[..]; 32]);
                    std::thread::yield_now();
                }
            });
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(mut front_end) =
                        FrontEnd::connect(&talker, Options { timeout: Duration::from_millis(50), ..quick() })
                    else {
                        continue;
                    };
                    while !stop.load(Ordering::Relaxed) && front_end.stop().and_then(|_| front_end.start()).is_ok() {}
                }
            });
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    drop(std::os::unix::net::UnixStream::connect(&other));
                }
            });
            wait_until(PATIENCE, "traffic", || {
                daemon.stats().is_ok_and(|stats| stats["ports"][0]["rx"]["frames"].as_u64() > Some(1000))
            })
            .unwrap();
            std::thread::sleep(Duration::from_millis(7 * round));
            let ended = daemon.terminate();
            stop.store(true, Ordering::Relaxed);
            ended.unwrap();
        });
        for socket in ["vm1.sock", "vm2.sock", "api.sock", "stats.sock"] {
            assert!(!daemon.path(socket).exists(), "{socket} is left behind");
        }
    }
}
