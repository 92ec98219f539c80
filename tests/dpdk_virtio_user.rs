//! A driver that others wrote: DPDK's virtio-user, in testpmd, over split and packed rings, in order or not, mergeable or
//! not, of all sizes and with one to eight queue pairs.
//!
//! One testpmd has two ports on two ports of the daemon and forwards what arrives on one out of the other, so that a
//! first burst goes round for as long as the test likes. Nothing may be lost, and both sides count the same.
//!
//! A quarter of the combinations runs by default, with every shape and feature among them; `DREAMWIRE_MATRIX=full` runs all.
//!
//! Without dpdk-testpmd this says so and passes, unless CI=true: then it fails.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use dreamwire_bench::topology::{Daemon, DaemonSpec};
use dreamwire_bench::traffic::testpmd;
use serde_json::Value;

/// Frames that must have passed the daemon before a combination counts as working.
const FRAMES_MIN: u64 = 4_000;
/// Each: start, traffic and end. A loaded machine takes two seconds for the start alone.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longer than a loaded machine keeps testpmd from running.
const QUIET: Duration = Duration::from_millis(250);
/// Every combination of ring layout and negotiated features runs with each of these: ring size, queue pairs.
const SHAPES: [(u16, u16); 8] = [(64, 1), (64, 8), (128, 3), (256, 2), (512, 8), (1024, 4), (4096, 1), (32768, 1)];

#[derive(Debug, Clone, Copy)]
struct Case {
    packed: bool,
    in_order: bool,
    mergeable: bool,
    ring_size: u16,
    pairs: u16,
}

/// What a port of the daemon has carried.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Carried {
    from_guest: u64,
    to_guest: u64,
    dropped: u64,
}

fn carried(stats: &Value, port: usize) -> Carried {
    let port = &stats["ports"][port];
    let frames = |direction: &str| {
        let rings = port["rings"].as_array().unwrap().iter().filter(|ring| ring["direction"] == direction);
        rings.map(|ring| ring["frames"].as_u64().unwrap()).sum()
    };
    let drops = port["drops"].as_object().unwrap().values();
    Carried {
        from_guest: frames("rx"),
        to_guest: frames("tx"),
        dropped: drops.map(|count| count.as_u64().unwrap()).sum(),
    }
}

impl Carried {
    fn since(self, before: Carried) -> Carried {
        Carried {
            from_guest: self.from_guest - before.from_guest,
            to_guest: self.to_guest - before.to_guest,
            dropped: self.dropped - before.dropped,
        }
    }
}

fn both(daemon: &Daemon) -> [Carried; 2] {
    let stats = daemon.stats().unwrap();
    [0, 1].map(|port| carried(&stats, port))
}

/// All rings that the driver uses are served. It does not wait for that: what it sends before is discarded, as the
/// specification has it ("Ring states").
fn is_up(daemon: &Daemon, pairs: u16) -> bool {
    let stats = daemon.stats().unwrap();
    [0, 1].iter().all(|&port: &usize| {
        let rings = stats["ports"][port]["rings"].as_array().unwrap();
        rings[..2 * usize::from(pairs)].iter().all(|ring| ring["enabled"] == true)
    })
}

/// What was sent before the stop has arrived: a port that goes away at once takes with it what is on its way there.
fn wait_until_quiet(daemon: &Daemon) {
    let deadline = Instant::now() + PATIENCE;
    let (mut last, mut since) = (both(daemon), Instant::now());
    while since.elapsed() < QUIET && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
        let now = both(daemon);
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
}

fn arguments(daemon: &Daemon, case: Case, burst: u16, prefix: &str) -> Vec<String> {
    let Case { packed, in_order, mergeable, ring_size, pairs } = case;
    let device = |number: u32, socket: &str| {
        format!(
            "--vdev=net_virtio_user{number},path={},queues={pairs},queue_size={ring_size},packed_vq={},in_order={},\
             mrg_rxbuf={},cq={}",
            daemon.path(socket).display(),
            u8::from(packed),
            u8::from(in_order),
            u8::from(mergeable),
            u8::from(pairs > 1),
        )
    };
    [
        "--lcores=0@0,1@0".into(),
        "--main-lcore=0".into(),
        // Its memory is then a memfd of its own, which the daemon can map.
        "--no-huge".into(),
        "-m1024".into(),
        "--no-pci".into(),
        "--no-telemetry".into(),
        format!("--file-prefix={prefix}"),
        device(0, "a.sock"),
        device(1, "b.sock"),
        "--".into(),
        "-i".into(),
        "--forward-mode=io".into(),
        "--disable-link-check".into(),
        "--nb-cores=1".into(),
        format!("--burst={burst}"),
        format!("--rxq={pairs}"),
        format!("--txq={pairs}"),
        format!("--rxd={ring_size}"),
        format!("--txd={ring_size}"),
    ]
    .into()
}

/// RX-total and TX-total over both ports, and what testpmd dropped itself.
fn totals(output: &str) -> Option<(u64, u64, u64)> {
    let (_, all) = output.rsplit_once("Accumulated forward statistics")?;
    let number = |name: &str| all.split_once(name)?.1.split_whitespace().next()?.parse().ok();
    Some((number("RX-total:")?, number("TX-total:")?, number("TX-dropped:")?))
}

fn run(daemon: &Daemon, case: Case, number: usize) {
    // All frames of a port may be on their way to one queue of the other.
    let burst = (case.ring_size / case.pairs / 2).clamp(1, 32);
    let before = both(daemon);
    let mut child = Command::new("dpdk-testpmd")
        .args(arguments(daemon, case, burst, &format!("dreamwire-vu-{}-{number}", std::process::id())))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !is_up(daemon, case.pairs) && Instant::now() < deadline && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = stdin.write_all(b"start tx_first\n");
    let passed = loop {
        let passed: u64 = both(daemon).iter().zip(before).map(|(now, before)| now.since(before).to_guest).sum();
        if passed >= FRAMES_MIN || Instant::now() > deadline || child.try_wait().unwrap().is_some() {
            break passed;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    // An end of its own accord counts its frames; a broken pipe means that it had one already.
    let _ = stdin.write_all(b"stop\n");
    wait_until_quiet(daemon);
    let _ = stdin.write_all(b"quit\n");
    drop(stdin);
    let mut output = String::new();
    child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    let status = child.wait().unwrap();
    let explain =
        || format!("{case:?}:\n{output}\n{}", daemon.log().lines().rev().take(9).collect::<Vec<_>>().join("\n"));
    assert!(passed >= FRAMES_MIN, "only {passed} frames passed: {}", explain());
    assert!(status.success(), "{status}: {}", explain());

    let (received, sent, dropped) = totals(&output).unwrap_or_else(|| panic!("no statistics: {}", explain()));
    let now = both(daemon);
    let [a, b] = [0, 1].map(|port| now[port].since(before[port]));
    let first = u64::from(burst) * u64::from(case.pairs) * 2;
    assert_eq!((a.dropped, b.dropped, dropped), (0, 0, 0), "{}", explain());
    assert_eq!(a.from_guest + b.from_guest, sent, "every frame that it sent was taken: {}", explain());
    assert_eq!((b.to_guest, a.to_guest), (a.from_guest, b.from_guest), "and carried across: {}", explain());
    assert_eq!(sent, received + first, "and came back, but for those under way at the end: {}", explain());
    for word in ["quarantined", "is not served"] {
        assert!(!daemon.log().contains(word), "{}", explain());
    }
}

fn matrix(packed: bool) {
    if !testpmd::is_installed() {
        let message = "SKIPPED: dpdk-testpmd is not installed (apt-get install dpdk-dev); nothing was tested\n";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{message}");
        // Past the test harness, which swallows what a passing test prints.
        std::io::stderr().write_all(message.as_bytes()).unwrap();
        return;
    }
    let config = "[daemon]\nrun_dir = \"{run_dir}\"\n[[network]]\nname = \"n\"\n\
                  [[port]]\nname = \"a\"\nnetwork = \"n\"\nqueues = 8\n[[port]]\nname = \"b\"\nnetwork = \"n\"\nqueues = 8\n";
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    let daemon = Daemon::start(&DaemonSpec { name: "virtio-user", binary, netns: None, config }).unwrap();
    // Every shape and every combination of features once; all of both takes four minutes.
    let all = std::env::var("DREAMWIRE_MATRIX").as_deref() == Ok("full");
    // Names testpmd's run-time files, of which the other test needs others.
    let mut number = if packed { SHAPES.len() * 4 } else { 0 };
    for (index, (in_order, mergeable)) in
        [(false, false), (false, true), (true, false), (true, true)].into_iter().enumerate()
    {
        let shapes = if all { &SHAPES[..] } else { &SHAPES[2 * index..2 * index + 2] };
        for &(ring_size, pairs) in shapes {
            run(&daemon, Case { packed, in_order, mergeable, ring_size, pairs }, number);
            number += 1;
        }
    }
    let passed = if all { SHAPES.len() * 4 } else { SHAPES.len() };
    eprintln!("{passed} combinations of ring shape and features passed, packed: {packed}");
}

#[test]
fn dpdk_virtio_user_is_served_over_split_rings() {
    matrix(false);
}

#[test]
fn dpdk_virtio_user_is_served_over_packed_rings() {
    matrix(true);
}
