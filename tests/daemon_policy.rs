//! A daemon that holds ports to rules: frames between two front-ends, and over a wire, with all that is shown of them.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use common::counters::{assert_conserved, drops, number, wait_connected};
use common::front_ends::{DISCARD, datagram, ends, front_end, guarded_port, next, outer, passes};
use common::*;
use dreamwire_bench::topology::{Daemon, DaemonSpec, wait_until};
use serde_json::{Value, json};

const RULES: &str = r#"
[[group]]
name = "clients"
id = 8
[[group]]
name = "web"
id = 7
"#;

/// Whom `web` takes it from.
const FROM: &str = "from = \"group:clients\"\n";

fn start(config: &str) -> Daemon {
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    Daemon::start(&DaemonSpec { name: "dreamwire", binary, netns: None, config }).unwrap()
}

/// An enforced network in which `vm1` is a client and `vm2` a server.
fn local() -> String {
    let ports = [guarded_port(1, "groups = [\"clients\"]"), guarded_port(2, "groups = [\"web\"]")].concat();
    format!("{DAEMON}{LOCAL_NETWORK}policy = \"enforced\"\n{RULES}{DISCARD}{FROM}{ports}")
}

fn json_of(daemon: &Daemon, arguments: &[&str]) -> Value {
    serde_json::from_str(&daemon.cli(arguments).unwrap()).unwrap()
}

fn wait_log(daemon: &Daemon, words: &str) -> String {
    let line = || daemon.log().lines().find(|line| line.contains(words)).map(str::to_owned);
    let waited = wait_until(LIMIT, words, || line().is_some());
    assert!(waited.is_ok(), "{words:?} is not in the log:\n{}", daemon.log());
    line().unwrap()
}

#[test]
fn rules_hold_at_once_and_everything_about_them_is_shown() {
    let daemon = start(&local());
    let (mut vm1, mut vm2) = (front_end(&daemon, "vm1"), front_end(&daemon, "vm2"));
    ends(&daemon, &mut vm2, &mut vm1, &datagram(2, 1, 9, 5000), "ports/vm1/ingress_denied");
    passes(&mut vm1, &mut vm2, &datagram(1, 2, 4000, 9));
    passes(&mut vm2, &mut vm1, &datagram(2, 1, 9, 4000));
    ends(&daemon, &mut vm1, &mut vm2, &datagram(1, 2, 4000, 10), "ports/vm2/ingress_denied");

    assert_eq!(json_of(&daemon, &["show", "rule", "discard", "--json"])["hits"], 1);
    assert!(daemon.metrics().unwrap().contains("dreamwire_rule_hits_total{rule=\"discard\",group=\"web\"} 1"));
    let connections = json_of(&daemon, &["show", "connections", "vm2", "--json"]);
    let answered = |row: &&Value| row["answered"] == true;
    let shown = connections.as_array().unwrap().iter().find(answered).unwrap();
    assert_eq!(
        (&shown["begun"], &shown["source"], &shown["destination"], &shown["rule"]),
        (&json!("ingress"), &json!("10.0.0.1:4000"), &json!("10.0.0.2:9"), &json!("discard")),
        "{connections}"
    );
    let carried = daemon.cli(&["why", "vm2", "udp", "10.0.0.2:9", "10.0.0.1:4000"]).unwrap();
    assert!(carried.contains("a connection carries it (answered)"), "{carried}");
    let denied = json_of(&daemon, &["why", "vm1", "udp", "10.0.0.1:4000", "10.0.0.2:10", "--json"]);
    assert_eq!(denied["path"]["steps"][3]["verdict"], "drop", "{denied}");

    // Seen within a moment, in words.
    let sample = wait_sample(&daemon, "10.0.0.2:10");
    assert!(sample.contains("vm2 ingress ingress_denied: udp 10.0.0.1:4000 → 10.0.0.2:10, 60 bytes"), "{sample}");
    let line = wait_log(&daemon, "a rule has decided");
    for words in ["rule=\"discard\"", "verdict=\"allow\"", "port=\"vm2\"", "source=\"10.0.0.1:4000\""] {
        assert!(line.contains(words), "{words} is not in {line}");
    }

    // The flow ends with its rule, and begins with it.
    daemon.cli(&["rule", "set", "discard", "ports=11"]).unwrap();
    ends(&daemon, &mut vm1, &mut vm2, &datagram(1, 2, 4000, 9), "ports/vm2/ingress_denied");
    daemon.cli(&["rule", "set", "discard", "ports=9"]).unwrap();
    passes(&mut vm1, &mut vm2, &datagram(1, 2, 4000, 9));
    // A member that leaves its group is none.
    daemon.cli(&["port", "set", "vm1", "groups="]).unwrap();
    ends(&daemon, &mut vm1, &mut vm2, &datagram(1, 2, 4000, 9), "ports/vm2/ingress_denied");
    // The last that a rule has denied is told with its name, however soon the rule goes.
    let refuse = ["refuse", "--group", "web", "--direction", "ingress", "--deny", "udp", "--ports", "13"];
    daemon.cli(&[&["rule", "add"][..], &refuse].concat()).unwrap();
    ends(&daemon, &mut vm1, &mut vm2, &datagram(1, 2, 4000, 13), "ports/vm2/ingress_denied");
    daemon.cli(&["rule", "del", "refuse"]).unwrap();
    let sample = wait_sample(&daemon, "10.0.0.2:13");
    assert!(sample.contains("refuse"), "{sample}");
    // An open network, no rules: nothing is looked at any more.
    daemon.cli(&["rule", "del", "discard"]).unwrap();
    daemon.cli(&["network", "set", "blue", "policy="]).unwrap();
    passes(&mut vm1, &mut vm2, &datagram(1, 2, 4000, 9));
    passes(&mut vm2, &mut vm1, &datagram(2, 1, 5, 6));
    assert_eq!(json_of(&daemon, &["show", "connections", "--json"]), json!([]));
    assert_conserved(&daemon);
}

/// Waits for a line of `drops` with these words.
fn wait_sample(daemon: &Daemon, words: &str) -> String {
    let mut found = None;
    wait_until(LIMIT, "a sample of a drop", || {
        let said = daemon.cli(&["drops"]).unwrap();
        found = said.lines().find(|line| line.contains(words)).map(str::to_owned);
        found.is_some()
    })
    .unwrap();
    found.unwrap()
}

#[test]
fn limits_hold_and_can_be_changed_under_traffic() {
    let open = format!("{DAEMON}{LOCAL_NETWORK}{}{}", guarded_port(1, ""), guarded_port(2, ""));
    let daemon = start(&open);
    let (mut vm1, mut vm2) = (front_end(&daemon, "vm1"), front_end(&daemon, "vm2"));
    passes(&mut vm1, &mut vm2, &datagram(1, 2, 4000, 9));
    // Two frames at once and then one a second, in an open network without rules.
    daemon.cli(&["port", "set", "vm1", "egress={ pps = 1, pps_burst = 2 }"]).unwrap();
    let frame = datagram(1, 2, 4000, 9);
    let before = drops(&daemon);
    assert_eq!(vm1.send_burst(&[&frame[..]; 8]).unwrap(), 8);
    let mut came = 0;
    let dropped = || drops(&daemon).get("ports/vm1/rate_limit").copied().unwrap_or(0);
    wait_until(LIMIT, "eight frames' ends", || {
        came += vm2.receive_burst(|bytes, _| assert_eq!(bytes, frame)).unwrap();
        came as u64 + dropped() - before.get("ports/vm1/rate_limit").copied().unwrap_or(0) == 8
    })
    .unwrap();
    // One more may have been earned if the machine was slow.
    assert!((2..=4).contains(&came), "{came} frames came");
    daemon.cli(&["port", "set", "vm1", "egress="]).unwrap();
    passes(&mut vm1, &mut vm2, &frame);

    // So many new flows; a limit that changes takes the connections along.
    daemon.cli(&["network", "set", "blue", "policy=enforced"]).unwrap();
    daemon.cli(&["group", "add", "any"]).unwrap();
    daemon.cli(&["rule", "add", "all", "--group", "any", "--direction", "ingress", "--allow", "any"]).unwrap();
    daemon.cli(&["port", "set", "vm2", "groups=any", "new_flows={ rate = 1, burst = 2 }"]).unwrap();
    for port in [1, 2] {
        passes(&mut vm1, &mut vm2, &datagram(1, 2, port, 9));
    }
    ends(&daemon, &mut vm1, &mut vm2, &datagram(1, 2, 3, 9), "ports/vm2/new_flow_rate");
    daemon.cli(&["port", "set", "vm2", "new_flows="]).unwrap();
    assert_eq!(json_of(&daemon, &["show", "connections", "vm2", "--json"]), json!([]));
    passes(&mut vm1, &mut vm2, &datagram(1, 2, 3, 9));
    // A table of so few connections: one that nobody has answered goes for the next.
    daemon.cli(&["port", "set", "vm2", "connections=8"]).unwrap();
    for port in 10..22 {
        passes(&mut vm1, &mut vm2, &datagram(1, 2, port, 9));
    }
    let shown = json_of(&daemon, &["show", "connections", "vm2", "--json"]);
    assert_eq!(shown.as_array().unwrap().len(), 8, "{shown}");
    assert!(shown.as_array().unwrap().iter().any(|row| row["source"] == "10.0.0.1:21"), "{shown}");

    // A port that is gone, and another in its place, knows nothing of its connections.
    let answer = datagram(2, 1, 9, 21);
    passes(&mut vm2, &mut vm1, &answer);
    daemon.cli(&["port", "del", "vm1"]).unwrap();
    drop(vm1);
    let again = ["vm1", "--network", "blue", "--mac", &mac_text(1), "--address", "10.0.0.1"];
    daemon.cli(&[&["port", "add"][..], &again].concat()).unwrap();
    let mut vm1 = front_end(&daemon, "vm1");
    wait_connected(&daemon, "vm1", true);
    assert_eq!(json_of(&daemon, &["show", "connections", "vm1", "--json"]), json!([]));
    ends(&daemon, &mut vm2, &mut vm1, &answer, "ports/vm1/ingress_denied");
    assert_conserved(&daemon);
}

/// As many connections as are shown at once.
const SHOWN_MAX: usize = 65_536;

#[test]
fn a_list_of_connections_that_is_cut_says_so_and_why_knows_all() {
    let ports = [guarded_port(1, "connections = 131072"), guarded_port(2, "")].concat();
    let daemon = start(&format!("{DAEMON}{LOCAL_NETWORK}policy = \"enforced\"\n{ports}"));
    let mut vm1 = front_end(&daemon, "vm1");
    let (mut sent, all) = (0, SHOWN_MAX + 1000);
    let connection = |number: usize| (1 + (number % 60_000) as u16, 1 + (number / 60_000) as u16);
    let begun = Instant::now();
    // Without a pause: a connection of UDP is forgotten after 30 s.
    while sent < all {
        assert!(begun.elapsed() < LIMIT, "{sent} of {all} frames sent");
        let next = (sent..all).take(32).map(connection);
        let frames: Vec<_> = next.map(|(source, destination)| datagram(1, 2, source, destination)).collect();
        sent += vm1.send_burst(&frames.iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    }
    wait_until(LIMIT, "all frames' ends", || number(&daemon, "ports", "vm1", "/rx/frames") == all as u64).unwrap();
    let whole = |text: &str| text.contains(&format!("dreamwire-cut-after: {SHOWN_MAX}"));
    assert!(whole(&head_of(&daemon, "/v1/connections/vm1")));
    assert!(!whole(&head_of(&daemon, "/v1/connections/vm2")));
    for number in [0, SHOWN_MAX / 2, all - 1] {
        let (source, destination) = connection(number);
        let ends = [format!("10.0.0.1:{source}"), format!("10.0.0.2:{destination}")];
        let why = json_of(&daemon, &["why", "vm1", "udp", &ends[0], &ends[1], "--json"]);
        assert_eq!(why["path"]["steps"][1]["connection"], true, "{why}");
    }
    let other = json_of(&daemon, &["why", "vm1", "udp", "10.0.0.1:60001", "10.0.0.2:1", "--json"]);
    assert_eq!(other["path"]["steps"][1]["connection"], false, "{other}");
}

/// The head of the API's answer.
fn head_of(daemon: &Daemon, path: &str) -> String {
    let mut stream = UnixStream::connect(daemon.path("api.sock")).unwrap();
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.contains(" 200 OK\r\n"), "{path}");
    answer.split_once("\r\n\r\n").unwrap().0.to_owned()
}

#[test]
fn groups_travel_in_the_tunnel_header_and_are_believed_from_those_trusted() {
    let config = format!(
        "{DAEMON}[[underlay]]\nname = \"fabric\"\ndriver = \"vhost-user\"\nmac = \"02:00:00:00:00:01\"\n\
         address = \"192.0.2.1\"\nmtu = 1600\nneighbours = [{{ address = \"192.0.2.2\", mac = \"02:00:00:00:00:02\" }}]\n\
         {LOCAL_NETWORK}vni = 100\nunderlay = \"fabric\"\nremotes = [\"192.0.2.2\"]\ntrusted_remotes = [\"192.0.2.2\"]\n\
         group_policy = true\npolicy = \"enforced\"\n{RULES}{DISCARD}{FROM}{}",
        guarded_port(2, "groups = [\"web\"]")
    );
    let daemon = start(&config);
    let (mut vm2, mut wire) = (front_end(&daemon, "vm2"), front_end(&daemon, "fabric"));
    let frame = datagram(1, 2, 4000, 9);
    let arrives = |group| outer(group, &frame);
    ends(&daemon, &mut wire, &mut vm2, &arrives(0), "ports/vm2/ingress_denied");
    ends(&daemon, &mut wire, &mut vm2, &arrives(9), "ports/vm2/ingress_denied");
    assert_eq!(wire.send_burst(&[&arrives(8)]).unwrap(), 1);
    assert_eq!(next(&mut vm2), frame);
    let reply = datagram(2, 1, 9, 4000);
    assert_eq!(vm2.send_burst(&[&reply]).unwrap(), 1);
    let packet = next(&mut wire);
    // draft-smith-vxlan-group-policy §2.1: the G bit, and the group in bytes 2 and 3.
    assert_eq!((packet[42] & 0x88, &packet[44..46], &packet[50..]), (0x88, &[0, 7][..], &reply[..]));
    let told = daemon.cli(&["why", "vm2", "udp", "10.0.0.2:9", "10.0.0.1:4000", "--mac", &mac_text(1)]).unwrap();
    assert!(
        told.contains("to host 192.0.2.2, where the station was learned, in VXLAN 100 over fabric, from group 7"),
        "{told}"
    );
    // Nobody is trusted any more: the group is not believed.
    daemon.cli(&["network", "set", "blue", "trusted_remotes="]).unwrap();
    ends(&daemon, &mut wire, &mut vm2, &outer(8, &datagram(1, 2, 4001, 9)), "ports/vm2/ingress_denied");
    assert_conserved(&daemon);
}

#[test]
fn a_port_takes_its_connections_along_to_another_worker() {
    let Some(cpus) = two_cpus() else { return };
    let daemon = start(&with_workers(&local(), cpus));
    let (mut vm1, mut vm2) = (front_end(&daemon, "vm1"), front_end(&daemon, "vm2"));
    let (asks, answers) = (datagram(1, 2, 4000, 9), datagram(2, 1, 9, 4000));
    passes(&mut vm1, &mut vm2, &asks);
    for worker in [0, 1, 1, 0] {
        daemon.cli(&["port", "set", "vm1", &format!("worker={worker}")]).unwrap();
        // vm1 lets nothing in but answers.
        passes(&mut vm2, &mut vm1, &answers);
        ends(&daemon, &mut vm2, &mut vm1, &datagram(2, 1, 5000 + worker, 4000), "ports/vm1/ingress_denied");
        passes(&mut vm1, &mut vm2, &asks);
        daemon.cli(&["port", "set", "vm2", &format!("worker={}", 1 - worker)]).unwrap();
        passes(&mut vm1, &mut vm2, &asks);
    }
    assert_eq!(json_of(&daemon, &["show", "rule", "discard", "--json"])["hits"], 1, "one connection in all that");
    // Other limits and another worker at once.
    daemon.cli(&["port", "set", "vm1", "worker=1", "connections=64"]).unwrap();
    ends(&daemon, &mut vm2, &mut vm1, &answers, "ports/vm1/ingress_denied");
    passes(&mut vm1, &mut vm2, &asks);
    passes(&mut vm2, &mut vm1, &answers);
    assert_conserved(&daemon);
}
