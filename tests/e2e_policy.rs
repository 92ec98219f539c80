//! Two guests under rules: what is denied does not arrive and is counted, answers pass, a change holds for flows that run.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::net::SocketAddr;

use common::counters::{assert_conserved, drops, number};
use common::*;
use dreamwire_bench::topology::{Daemon, ECHO_PORT, Guest, Needs, Netns, available, wait_until};

fn config() -> String {
    let ports: String = [(1, "clients"), (2, "servers")]
        .map(|(number, group)| {
            let mac = mac_text(number);
            let addresses = format!("addresses = [\"10.0.0.{number}\", \"fd00::{number}\"]");
            port(number, &format!("mac = \"{mac}\"\n{addresses}\ngroups = [\"{group}\"]"))
        })
        .concat();
    let rule = |name: &str, what: &str| {
        let applies = "group = \"servers\"\ndirection = \"ingress\"\nfrom = \"group:clients\"";
        format!("[[rule]]\nname = \"{name}\"\n{applies}\n{what}\n")
    };
    let rules = [
        rule("ping", "allow = \"icmp\"\nicmp = \"echo-request\""),
        rule("echo", &format!("allow = \"udp\"\nports = {ECHO_PORT}")),
    ];
    let groups = "[[group]]\nname = \"clients\"\n[[group]]\nname = \"servers\"\n";
    format!("{DAEMON}{LOCAL_NETWORK}policy = \"enforced\"\n{groups}{}{ports}", rules.concat())
}

fn dropped(daemon: &Daemon, place: &str) -> u64 {
    drops(daemon).get(place).copied().unwrap_or(0)
}

/// A ping that no answer comes to, and that ends at `place` alone.
#[track_caller]
fn assert_ends(daemon: &Daemon, from: &Guest, ping: &str, place: &str) {
    let (before, sent) = (drops(daemon), 3);
    let line = format!("ping -c {sent} -i 0.2 -W 1 {ping}");
    assert!(from.sh(&line).is_err(), "{line} was answered");
    let moved = |name: &String, count: &u64| count - before.get(name).copied().unwrap_or(0);
    let moved: Vec<_> = drops(daemon).iter().map(|(name, count)| (name.clone(), moved(name, count))).collect();
    let moved: Vec<_> = moved.iter().filter(|(_, count)| *count > 0).collect();
    assert!(matches!(moved[..], [(name, count)] if name == place && *count >= sent), "{line}: {moved:?}");
}

#[test]
fn rules_hold_for_real_guests_and_at_once() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let daemon = start_daemon("host", &host, &config());
    let [one, two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    assert_ping(&one, "10.0.0.2");
    assert_ends(&daemon, &two, "10.0.0.1", "ports/vm1/ingress_denied");
    // Neighbour discovery passes; pings over IPv6 have no rule.
    assert_ends(&daemon, &one, "fd00::2", "ports/vm2/ingress_denied");
    one.sh("ip address add 10.0.0.77/24 dev eth0").unwrap();
    assert_ends(&daemon, &one, "-I 10.0.0.77 10.0.0.2", "ports/vm1/source_guard");

    let probe = one.probe(SocketAddr::new([10, 0, 0, 2].into(), ECHO_PORT), PROBE_INTERVAL).unwrap();
    let answered = || number(&daemon, "ports", "vm1", "/tx/frames");
    let goes_on =
        |from: u64, now: &dyn Fn() -> u64| wait_until(LIMIT, "some frames more", || now() > from + 20).unwrap();
    goes_on(answered(), &answered);
    let ask = ["why", "vm1", "udp", "10.0.0.1:9999", &format!("10.0.0.2:{ECHO_PORT}")];
    assert!(daemon.cli(&ask).unwrap().contains("pass  rule echo of group servers allows it"));
    daemon.cli(&["rule", "set", "echo", "ports=1"]).unwrap();
    let (denied, before) =
        (|| dropped(&daemon, "ports/vm2/ingress_denied"), number(&daemon, "ports", "vm2", "/tx/frames"));
    goes_on(denied(), &denied);
    let passed = number(&daemon, "ports", "vm2", "/tx/frames") - before;
    assert!(passed <= 2, "{passed} frames after the rule was gone: ARP at most");
    assert!(daemon.cli(&ask).unwrap().contains("vm2  drop"));
    daemon.cli(&["rule", "set", "echo", &format!("ports={ECHO_PORT}")]).unwrap();
    goes_on(answered(), &answered);
    let report = probe.stop().unwrap();
    let hits: serde_json::Value =
        serde_json::from_str(&daemon.cli(&["show", "rule", "echo", "--json"]).unwrap()).unwrap();
    eprintln!("{report:?}; {} dropped at vm2; hits {}", denied(), hits["hits"]);
    assert_eq!((report.refused, report.duplicates), (0, 0), "{report:?}");
    assert_eq!(hits["hits"], 2, "one flow, begun again when the rule was back");
    assert_conserved(&daemon);
}
