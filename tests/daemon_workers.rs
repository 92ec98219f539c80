//! A daemon with two workers: traffic between their ports, and a port that moves while its front-end goes on.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::counters::{assert_conserved, assert_quiet_log, drops, number, wait_connected};
use common::*;
use dreamwire_bench::front_end::{FrontEnd, Options};
use dreamwire_bench::topology::{Daemon, DaemonSpec, wait_until};

/// Moves of the port, there and back.
const MOVES: u32 = 40;
/// Frames of a stream on their way at most: of two streams in one direction all fit the hand-off, each in a parcel.
const WINDOW: u64 = 12;
/// Nothing came for so long: what is on its way is lost.
const PATIENCE: Duration = Duration::from_millis(100);
/// Before that, frames of all lengths.
const FRAMES: u64 = 2000;

fn start(ports: &[(u8, u16)], cpus: [usize; 2]) -> Daemon {
    let ports: String = ports.iter().map(|&(number, worker)| port(number, &format!("worker = {worker}"))).collect();
    let config = with_workers(&format!("{DAEMON}{LOCAL_NETWORK}{ports}"), cpus);
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    Daemon::start(&DaemonSpec { name: "dreamwire", binary, netns: None, config: &config }).unwrap()
}

/// Frame `number` of a stream: its length and every byte depend on it.
fn numbered(to: u8, from: u8, number: u64) -> Vec<u8> {
    let mut bytes = frame(mac(to), mac(from), &ETHER_TYPE.to_be_bytes());
    bytes.extend(number.to_be_bytes());
    let length = 60 + (number * 37 % 1455) as usize;
    bytes.extend((bytes.len()..length).map(|at| (at as u64 * 31 + number) as u8));
    bytes
}

/// Frames of one front-end for another.
#[derive(Debug, Default)]
struct Stream {
    sent: u64,
    got: u64,
    /// All before it have come, or will not.
    settled: u64,
    lost_at: Option<Instant>,
}

/// Two front-ends that send to each other.
struct Talk {
    numbers: [u8; 2],
    front_ends: [FrontEnd; 2],
    /// By sender.
    streams: [Stream; 2],
}

impl Talk {
    /// Connects the ports and has each hear of the other.
    fn begin(daemon: &Daemon, numbers: [u8; 2]) -> Self {
        let front_ends = numbers.map(|number| {
            let path = daemon.path(&format!("vm{number}.sock"));
            let front_end = FrontEnd::connect(&path, Options::default()).unwrap();
            wait_connected(daemon, &format!("vm{number}"), true);
            front_end
        });
        Self { numbers, front_ends, streams: Default::default() }
    }

    /// Sends as much as the windows allow, and takes what has come: whole, in order, once.
    fn go_on(&mut self, until: u64) {
        let Self { numbers, front_ends, streams } = self;
        for (here, there) in [(0, 1), (1, 0)] {
            let stream = &mut streams[here];
            while stream.sent < until && stream.sent < stream.settled + WINDOW {
                let frame = numbered(numbers[there], numbers[here], stream.sent);
                assert_eq!(front_ends[here].send_burst(&[&frame]).unwrap(), 1);
                stream.sent += 1;
            }
            let mut came = false;
            let take = |bytes: &[u8], _| {
                let number = u64::from_be_bytes(bytes[14..22].try_into().unwrap());
                assert_eq!(bytes, numbered(numbers[there], numbers[here], number));
                assert!((stream.settled..stream.sent).contains(&number), "{number} came late, or twice: {stream:?}");
                stream.settled = number + 1;
                stream.got += 1;
                came = true;
            };
            front_ends[there].receive_burst(take).unwrap();
            if came || stream.settled == stream.sent {
                stream.lost_at = None;
            } else if *stream.lost_at.get_or_insert_with(|| Instant::now() + PATIENCE) < Instant::now() {
                (stream.settled, stream.lost_at) = (stream.sent, None);
            }
        }
    }

    fn run(&mut self, frames: u64) {
        let until = self.streams[0].sent.max(self.streams[1].sent) + frames;
        while self.streams.iter().any(|stream| stream.sent < until || stream.settled < stream.sent) {
            self.go_on(until);
        }
    }
}

/// Both addresses are learned, so that nothing is flooded any more.
fn introduce(daemon: &Daemon, talks: &mut [Talk]) {
    let mut expected = 0;
    for talk in &mut *talks {
        for (number, front_end) in talk.numbers.iter().zip(&mut talk.front_ends) {
            let hello = text_frame([1, 0, 0x5e, 0, 0, 1], mac(*number), "hello");
            front_end.send_burst(&[&hello]).unwrap();
            expected += 1;
        }
    }
    let others = expected - 1;
    for talk in &mut *talks {
        for front_end in &mut talk.front_ends {
            let mut heard = 0;
            wait_until(LIMIT, "hellos", || {
                heard += front_end.receive_burst(|_, _| ()).unwrap();
                heard == others
            })
            .unwrap();
        }
    }
    assert_eq!(drops(daemon).len(), 0);
}

#[test]
fn frames_cross_between_workers_both_ways_byte_for_byte() {
    let Some(cpus) = two_cpus() else { return };
    let daemon = start(&[(1, 0), (2, 1)], cpus);
    let mut talks = [Talk::begin(&daemon, [1, 2])];
    introduce(&daemon, &mut talks);
    talks[0].run(FRAMES);
    assert_eq!(talks[0].streams.each_ref().map(|stream| stream.got), [FRAMES; 2]);
    let total = FRAMES + 1;
    for (port, worker) in [("vm1", "0"), ("vm2", "1")] {
        assert_eq!(number(&daemon, "ports", port, "/rx/frames"), total);
        assert_eq!(number(&daemon, "ports", port, "/tx/frames"), total);
        assert_eq!(number(&daemon, "workers", worker, "/handoff/tx"), total);
        assert_eq!(number(&daemon, "workers", worker, "/handoff/rx"), total);
        assert!(number(&daemon, "workers", worker, "/busy_turns") > 0);
    }
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

#[test]
fn a_port_moves_under_traffic_and_every_frame_comes_in_order_or_is_counted() {
    let Some(cpus) = two_cpus() else { return };
    let daemon = start(&[(1, 0), (2, 1), (3, 0), (4, 1)], cpus);
    let mut talks = [Talk::begin(&daemon, [1, 2]), Talk::begin(&daemon, [3, 4])];
    introduce(&daemon, &mut talks);
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                talks.iter_mut().for_each(|talk| talk.go_on(u64::MAX));
            }
            talks.iter_mut().for_each(|talk| talk.run(1));
            talks
        });
        for turn in 1..=MOVES {
            if traffic.is_finished() {
                break;
            }
            let before = number(&daemon, "ports", "vm1", "/rx/frames");
            let worker = turn % 2;
            let said = daemon.cli(&["port", "set", "vm1", &format!("worker={worker}")]).unwrap();
            assert!(said.starts_with(&format!("~ port vm1 worker: {} → {worker}", 1 - worker)), "{said}");
            assert_eq!(number(&daemon, "ports", "vm1", "/worker"), u64::from(worker));
            wait_until(LIMIT, "the guest's frames", || number(&daemon, "ports", "vm1", "/rx/frames") > before).unwrap();
        }
        ends.store(true, Ordering::Relaxed);
        let [moved, others] = traffic.join().unwrap();
        for stream in others.streams.iter().chain([&moved.streams[0]]) {
            assert_eq!(
                stream.got, stream.sent,
                "nothing that a guest sends is lost by the move of its port, or another's"
            );
        }
        let (to, lost) = (&moved.streams[1], moved.streams[1].sent - moved.streams[1].got);
        eprintln!(
            "{MOVES} moves: {} frames from the port, {} to it, of which {lost} were dropped",
            moved.streams[0].sent, to.sent
        );
        let counted: Vec<_> = drops(&daemon).into_iter().collect();
        match lost {
            0 => assert_eq!(counted, []),
            _ => assert_eq!(counted, [("ports/vm1/port_down".to_owned(), lost)]),
        }
        let expected = [
            (1, moved.streams[0].sent + 1, to.got + 3),
            (2, to.sent + 1, moved.streams[0].got + 3),
            (3, others.streams[0].sent + 1, others.streams[1].got + 3),
            (4, others.streams[1].sent + 1, others.streams[0].got + 3),
        ];
        let metrics = daemon.metrics().unwrap();
        for (port, rx, tx) in expected {
            let name = format!("vm{port}");
            assert_eq!(number(&daemon, "ports", &name, "/rx/frames"), rx, "{name}");
            assert_eq!(number(&daemon, "ports", &name, "/tx/frames"), tx, "{name}");
            for (direction, frames) in [("rx", rx), ("tx", tx)] {
                let row = format!(
                    "dreamwire_port_frames_total{{port=\"{name}\",network=\"blue\",direction=\"{direction}\"}} {frames}\n"
                );
                assert!(metrics.contains(&row), "{row} in {metrics}");
            }
        }
        let sum = |family: &str, rest: &str| -> u64 {
            let value = |worker| {
                let row = format!("dreamwire_worker_{family}_total{{worker=\"{worker}\"{rest}}} ");
                let (_, value) = metrics.split_once(&row).unwrap_or_else(|| panic!("{row} in {metrics}"));
                value.lines().next().unwrap().parse::<u64>().unwrap()
            };
            value(0) + value(1)
        };
        let handed_over = sum("handoff_frames", ",direction=\"tx\"");
        assert!(handed_over >= others.streams[0].sent + others.streams[1].sent);
        assert_eq!(handed_over, sum("handoff_frames", ",direction=\"rx\""));
        assert_eq!(sum("handoff_removed", ""), 0);
        assert!(sum("turns", ",outcome=\"busy\"") > 0);
    });
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

#[test]
fn rings_are_taken_back_from_the_worker_that_has_the_port_now() {
    let Some(cpus) = two_cpus() else { return };
    let daemon = start(&[(1, 0), (2, 1)], cpus);
    let mut talk = Talk::begin(&daemon, [1, 2]);
    let rings = || daemon.cli(&["show", "port", "vm1", "--json"]).unwrap().matches("\"attached\": true").count();
    for worker in [1, 0, 1] {
        daemon.cli(&["port", "set", "vm1", &format!("worker={worker}")]).unwrap();
        // GET_VRING_BASE takes the rings back from where they are.
        talk.front_ends[0].stop().unwrap();
        wait_until(LIMIT, "rings taken back", || rings() == 0).unwrap();
        talk.front_ends[0].start().unwrap();
        wait_until(LIMIT, "rings attached", || rings() == 2).unwrap();
        talk.run(10);
        assert_eq!(talk.streams.each_ref().map(|stream| stream.got), talk.streams.each_ref().map(|stream| stream.sent));
    }
    drop(talk);
    wait_until(LIMIT, "rings of the session that has ended", || rings() == 0).unwrap();
    assert_conserved(&daemon);
}

#[test]
fn a_worker_that_does_not_exist_is_refused_and_nothing_changes() {
    let Some(cpus) = two_cpus() else { return };
    let daemon = start(&[(1, 0), (2, 1)], cpus);
    for value in ["2", "-1", "first"] {
        let refusal = daemon.cli(&["port", "set", "vm1", &format!("worker={value}")]).unwrap_err().to_string();
        assert!(refusal.contains("port.vm1.worker"), "{refusal}");
    }
    let added = daemon.cli(&["port", "add", "vm3", "--network", "blue", "--worker", "1"]).unwrap();
    assert!(added.starts_with("+ port vm3"), "{added}");
    let table = daemon.cli(&["show", "ports"]).unwrap();
    let column = |name: &str| {
        let place = table.lines().next().unwrap().find("WORKER").unwrap();
        table.lines().find(|line| line.starts_with(name)).unwrap()[place..]
            .split_whitespace()
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(["vm1", "vm2", "vm3"].map(column), ["0", "1", "1"]);
    // Without the key it stays.
    daemon.cli(&["port", "set", "vm3", "worker="]).unwrap();
    assert_eq!(number(&daemon, "ports", "vm3", "/worker"), 1);
}
