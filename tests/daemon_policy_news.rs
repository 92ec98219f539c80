//! What a daemon tells of single frames: `drops --follow`, and the log of rules that ask for one.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::counters::{drops, wait_drops};
use common::front_ends::{DISCARD, datagram, ends, front_end, guarded_port, passes};
use common::*;
use dreamwire_bench::front_end::FrontEnd;
use dreamwire_bench::topology::{Daemon, DaemonSpec, wait_until};
use serde_json::{Value, json};

const BINARY: &str = env!("CARGO_BIN_EXE_dreamwire");

const RULES: &str = r#"
[[group]]
name = "web"
[[rule]]
name = "refuse"
group = "web"
direction = "ingress"
deny = "udp"
ports = "13"
log = true
[[rule]]
name = "quiet"
group = "web"
direction = "ingress"
deny = "udp"
ports = "14"
"#;

/// An enforced network whose two ports are held to the rules; the log is JSON.
fn start() -> Daemon {
    let ports = [1, 2].map(|number| guarded_port(number, "groups = [\"web\"]")).concat();
    let config = format!("{DAEMON}{LOCAL_NETWORK}policy = \"enforced\"\n{DISCARD}{RULES}{ports}");
    let spec = DaemonSpec { name: "dreamwire", binary: Path::new(BINARY), netns: None, config: &config };
    Daemon::start_with(&spec, &["--log-format", "json"]).unwrap()
}

/// `dreamwire drops --follow`, killed when dropped.
struct Follower {
    child: Child,
    lines: Option<Receiver<String>>,
}

impl Follower {
    fn start(daemon: &Daemon, arguments: &[&str]) -> Self {
        let mut command = Command::new(BINARY);
        command.arg("--run-dir").arg(daemon.run_dir()).args(["drops", "--follow"]).args(arguments);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // The pipe closes with this thread: when nobody takes lines any more.
            for line in output.lines() {
                if sender.send(line.unwrap()).is_err() {
                    return;
                }
            }
        });
        Self { child, lines: Some(lines) }
    }

    /// The next line, as soon as it comes.
    #[track_caller]
    fn next_line(&self) -> String {
        self.lines.as_ref().unwrap().recv_timeout(LIMIT).unwrap()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn drops_are_followed_as_they_happen_each_in_one_line() {
    let daemon = start();
    let (mut vm1, mut vm2) = (front_end(&daemon, "vm1"), front_end(&daemon, "vm2"));
    let (words, objects) = (Follower::start(&daemon, &[]), Follower::start(&daemon, &["--json"]));
    // The next is sent when the last was told: a follower that stops, or repeats itself, is found out.
    for (source, destination, rule) in [(4000, 13, Some("refuse")), (4001, 14, Some("quiet")), (4002, 10, None)] {
        let before_ms = now_ms();
        ends(&daemon, &mut vm1, &mut vm2, &datagram(1, 2, source, destination), "ports/vm2/ingress_denied");
        let line = words.next_line();
        let (_time, told) = line.split_once(' ').unwrap();
        let by = rule.map(|rule| format!(" by rule {rule}")).unwrap_or_default();
        let flow = format!("udp 10.0.0.1:{source} → 10.0.0.2:{destination}");
        assert_eq!(told, format!("vm2 ingress ingress_denied{by}: {flow}, 60 bytes"));

        let line = objects.next_line();
        let sample: Value = serde_json::from_str(&line).unwrap();
        let expected = json!({
            "port": "vm2", "network": "blue", "direction": "ingress", "reason": "ingress_denied", "rule": rule,
            "protocol": "udp", "source": format!("10.0.0.1:{source}"), "destination": format!("10.0.0.2:{destination}"),
            "source_mac": mac_text(1), "destination_mac": mac_text(2), "ethertype": 0x800, "bytes": 60, "left_out": 0,
            "sequence": sample["sequence"], "time_ms": sample["time_ms"],
        });
        assert_eq!(sample, expected);
        assert!((before_ms..=now_ms()).contains(&sample["time_ms"].as_u64().unwrap()), "{sample}");
    }
}

#[test]
fn a_follower_that_nobody_reads_any_more_ends() {
    let daemon = start();
    let mut vm1 = front_end(&daemon, "vm1");
    let mut follower = Follower::start(&daemon, &[]);
    let frame = datagram(1, 2, 4000, 14);
    assert_eq!(vm1.send_burst(&[&frame]).unwrap(), 1);
    follower.next_line();
    // As `head -1` does.
    follower.lines = None;
    let mut status = None;
    wait_until(LIMIT, "the follower's end", || {
        vm1.send_burst(&[&frame]).unwrap();
        status = follower.child.try_wait().unwrap();
        status.is_some()
    })
    .unwrap();
    assert!(status.unwrap().success(), "{status:?}");
}

#[test]
fn a_rule_logs_each_connection_once_and_each_frame_that_it_denies() {
    let daemon = start();
    let (mut vm1, mut vm2) = (front_end(&daemon, "vm1"), front_end(&daemon, "vm2"));
    for source in [4000, 4001] {
        for _ in 0..3 {
            passes(&mut vm1, &mut vm2, &datagram(1, 2, source, 9));
            passes(&mut vm2, &mut vm1, &datagram(2, 1, 9, source));
        }
    }
    // Under other rules a connection is judged again, and is no new one.
    daemon.cli(&["rule", "set", "quiet", "ports=14,15"]).unwrap();
    passes(&mut vm1, &mut vm2, &datagram(1, 2, 4000, 9));
    // By a rule that is not to be logged, by none, and last by one that is.
    for destination in [14, 10, 13, 13] {
        ends(&daemon, &mut vm1, &mut vm2, &datagram(1, 2, 4000, destination), "ports/vm2/ingress_denied");
    }
    // The rule allows both, the port's rate of new connections one.
    daemon.cli(&["port", "set", "vm2", "new_flows={ rate = 1, burst = 1 }"]).unwrap();
    let [first, second] = [4100, 4101].map(|source| datagram(1, 2, source, 9));
    let before = drops(&daemon);
    assert_eq!(vm1.send_burst(&[&first, &second]).unwrap(), 2);
    wait_drops(&daemon, &before, &[("ports/vm2/new_flow_rate", 1)]);

    let expected = [
        ("discard", None, 4000, 9),
        ("discard", None, 4001, 9),
        ("refuse", Some("ingress_denied"), 4000, 13),
        ("refuse", Some("ingress_denied"), 4000, 13),
        ("discard", None, 4100, 9),
        ("discard", Some("new_flow_rate"), 4101, 9),
    ];
    let expected: Vec<_> = expected
        .into_iter()
        .map(|(rule, reason, source, destination)| {
            let verdict = if reason.is_some() { "deny" } else { "allow" };
            json!({
                "rule": rule, "verdict": verdict, "reason": reason, "port": "vm2", "direction": "ingress", "protocol": "udp",
                "source": format!("10.0.0.1:{source}"), "destination": format!("10.0.0.2:{destination}"),
            })
        })
        .collect();
    let _ = wait_until(LIMIT, "the rules' lines", || rule_log(&daemon).len() >= expected.len());
    let documented = ["rule", "verdict", "reason", "port", "direction", "protocol", "source", "destination"];
    let of = |line: &Value| documented.iter().map(|&key| (key.to_owned(), line[key].clone())).collect::<Value>();
    assert_eq!(rule_log(&daemon).iter().map(of).collect::<Vec<_>>(), expected);
}

/// So many lines of a rule, or samples, of one port: at once, and then a second.
const LOG_LINES: (u64, u64) = (200, 100);
const SAMPLES: (u64, u64) = (40, 20);
/// Several looks at the workers, of which there are five a second: in one alone the daemon's limit would hide the port's.
const FLOOD: Duration = Duration::from_secs(1);

#[test]
fn a_flood_is_told_in_few_lines_and_what_was_left_out_is_said() {
    let daemon = start();
    let mut vm1 = front_end(&daemon, "vm1");
    let frame = datagram(1, 2, 4000, 13);
    let (before, begun) = (drops(&daemon), Instant::now());
    let denied = |sent| wait_drops(&daemon, &before, &[("ports/vm2/ingress_denied", sent)]);
    let log = || [rule_log(&daemon), unlogged(&daemon)].concat();
    let samples = || daemon.cli(&["drops", "--json"]).unwrap().lines().map(parsed).collect::<Vec<_>>();

    // What may be logged at once is.
    let mut sent = LOG_LINES.0;
    send(&mut vm1, &frame, sent);
    denied(sent);
    assert_eq!(wait_all_told(sent, log).len() as u64, sent, "a line for each");
    assert_rate(&samples(), SAMPLES, begun);

    while begun.elapsed() < FLOOD {
        sent += vm1.send_burst(&[&frame[..]; 32]).unwrap() as u64;
    }
    denied(sent);
    // The next one says what was left out, if it may be told: 20 a second may. Time is all there is to wait for.
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(vm1.send_burst(&[&frame]).unwrap(), 1);
    sent += 1;
    denied(sent);
    wait_all_told(sent, log);
    assert_rate(&rule_log(&daemon), LOG_LINES, begun);
    assert_rate(&wait_all_told(sent, samples), SAMPLES, begun);
}

#[test]
fn what_the_daemons_own_limit_leaves_out_is_said() {
    let daemon = start();
    let (mut vm1, mut vm2) = (front_end(&daemon, "vm1"), front_end(&daemon, "vm2"));
    let before = drops(&daemon);
    // Each port may log so many at once; the daemon as many as one of them. Its rate has a test beside it.
    send(&mut vm1, &datagram(1, 2, 4000, 13), LOG_LINES.0);
    send(&mut vm2, &datagram(2, 1, 4000, 13), LOG_LINES.0);
    let denied = ["ports/vm1/ingress_denied", "ports/vm2/ingress_denied"].map(|place| (place, LOG_LINES.0));
    wait_drops(&daemon, &before, &denied);
    wait_all_told(2 * LOG_LINES.0, || [rule_log(&daemon), unlogged(&daemon)].concat());
}

/// Sends a frame so often, as fast as it goes.
#[track_caller]
fn send(from: &mut FrontEnd, frame: &[u8], times: u64) {
    let (mut sent, begun) = (0, Instant::now());
    while sent < times {
        assert!(begun.elapsed() < LIMIT, "{sent} of {times} frames sent");
        let burst = [frame; 32];
        sent += from.send_burst(&burst[..32.min((times - sent) as usize)]).unwrap() as u64;
    }
}

/// Waits until as many frames are told of as were sent, or said to be left out; returns the lines.
#[track_caller]
fn wait_all_told(sent: u64, lines: impl Fn() -> Vec<Value>) -> Vec<Value> {
    let frames = |line: &Value| match &line["unlogged"] {
        Value::Null => 1 + line["left_out"].as_u64().unwrap(),
        unlogged => unlogged.as_u64().unwrap(),
    };
    let (mut found, mut told) = (Vec::new(), 0);
    let _ = wait_until(LIMIT, "what was left out", || {
        found = lines();
        told = found.iter().map(frames).sum();
        told == sent
    });
    assert_eq!(told, sent, "frames told of, in {} lines", found.len());
    found
}

#[track_caller]
fn assert_rate(lines: &[Value], (at_once, per_second): (u64, u64), begun: Instant) {
    let elapsed = begun.elapsed();
    let most = at_once + (per_second as f64 * elapsed.as_secs_f64()).ceil() as u64;
    let told = lines.len() as u64;
    assert!((at_once..=most).contains(&told), "{told} lines in {elapsed:?}; expected {at_once} to {most}");
}

/// The log's lines about rules' decisions.
fn rule_log(daemon: &Daemon) -> Vec<Value> {
    log_where(daemon, |line| line["target"] == "rule" && line["unlogged"].is_null())
}

/// The log's lines about lines that are not in it.
fn unlogged(daemon: &Daemon) -> Vec<Value> {
    log_where(daemon, |line| !line["unlogged"].is_null())
}

/// Every line of the log must be one JSON object; returns those that are asked for.
fn log_where(daemon: &Daemon, wanted: impl Fn(&Value) -> bool) -> Vec<Value> {
    let log = daemon.log();
    // The last line may not be whole yet.
    let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let lines = whole.lines().map(parsed).inspect(|line| assert!(line.is_object(), "{line}"));
    lines.filter(|line| wanted(line)).collect()
}

fn parsed(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in {line:?}"))
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}
