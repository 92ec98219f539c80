//! Groups and rules through the daemon's command line. No guests.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::path::Path;

use dreamwire_bench::topology::{Daemon, DaemonSpec};
use serde_json::{Value, json};

const CONFIG: &str = "[daemon]\nrun_dir = \"{run_dir}\"\n[[network]]\nname = \"default\"\n";

fn start() -> Daemon {
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    Daemon::start(&DaemonSpec { name: "dreamwire", binary, netns: None, config: CONFIG }).unwrap()
}

fn json_of(daemon: &Daemon, arguments: &[&str]) -> Value {
    serde_json::from_str(&daemon.cli(arguments).unwrap()).unwrap()
}

fn refused(daemon: &Daemon, arguments: &[&str]) -> String {
    daemon.cli(arguments).expect_err("it should have been refused").to_string()
}

#[test]
fn groups_come_and_go_by_command() {
    let daemon = start();
    daemon.cli(&["group", "add", "web", "--prefix", "10.1.0.0/16", "--prefix", "fd00::/8", "--id", "7"]).unwrap();
    daemon
        .cli(&["port", "add", "vm1", "--mac", "52:54:00:00:00:01", "--address", "10.0.0.1", "--group", "web"])
        .unwrap();
    assert_eq!(
        json_of(&daemon, &["show", "groups", "--json"]),
        json!([{"name": "web", "prefixes": ["10.1.0.0/16", "fd00::/8"], "id": 7, "ports": ["vm1"]}])
    );
    daemon.cli(&["group", "set", "web", "prefixes=10.2.0.0/16,10.3.0.0/16", "id="]).unwrap();
    assert_eq!(
        json_of(&daemon, &["show", "group", "web", "--json"]),
        json!({"name": "web", "prefixes": ["10.2.0.0/16", "10.3.0.0/16"], "ports": ["vm1"]})
    );
    assert!(refused(&daemon, &["group", "del", "web"]).contains("port.vm1.groups: no group is called \"web\""));
    daemon.cli(&["port", "set", "vm1", "groups="]).unwrap();
    daemon.cli(&["group", "del", "web"]).unwrap();
    assert_eq!(json_of(&daemon, &["show", "groups", "--json"]), json!([]));
}

#[test]
fn rules_come_and_go_by_command() {
    let daemon = start();
    daemon.cli(&["group", "add", "web"]).unwrap();
    let add = ["rule", "add", "--group", "web", "--direction", "ingress", "--allow", "tcp", "--ports", "443,8000-8080"];
    assert!(daemon.cli(&add).unwrap().starts_with("+ rule web-ingress-1\napplied"));
    daemon
        .cli(&[
            "rule",
            "add",
            "no-mail",
            "--group",
            "web",
            "--direction",
            "egress",
            "--deny",
            "tcp",
            "--ports",
            "25",
            "--log",
        ])
        .unwrap();
    let said =
        refused(&daemon, &["rule", "add", "no-mail", "--group", "web", "--direction", "egress", "--deny", "udp"]);
    assert!(said.contains("there is a rule \"no-mail\" already"), "{said}");
    assert_eq!(
        json_of(&daemon, &["show", "rules", "--json"]),
        json!([
            {"name": "web-ingress-1", "group": "web", "direction": "ingress", "allow": "tcp",
             "ports": ["443", "8000-8080"], "from": "any", "priority": 100, "hits": 0},
            {"name": "no-mail", "group": "web", "direction": "egress", "deny": "tcp", "ports": ["25"], "to": "any",
             "priority": 100, "log": true, "hits": 0},
        ])
    );
    daemon
        .cli(&["rule", "set", "no-mail", "deny=", "allow=any", "ports=", "log=", "priority=7", "to=group:web"])
        .unwrap();
    assert_eq!(
        json_of(&daemon, &["show", "rule", "no-mail", "--json"]),
        json!({"name": "no-mail", "group": "web", "direction": "egress", "allow": "any", "to": "group:web",
               "priority": 7, "hits": 0})
    );
    assert!(refused(&daemon, &["rule", "set", "no-mail", "to=group:db"]).contains("no group is called \"db\""));
    assert!(refused(&daemon, &["group", "del", "web"]).contains("no group is called \"web\""));
    // One that was given a name keeps it when those before it go.
    daemon.cli(&add).unwrap();
    daemon.cli(&["rule", "del", "web-ingress-1"]).unwrap();
    let left = json_of(&daemon, &["show", "rules", "--json"]);
    let names: Vec<_> = left.as_array().unwrap().iter().map(|rule| rule["name"].clone()).collect();
    assert_eq!(names, ["no-mail", "web-ingress-2"]);
    assert!(daemon.cli(&["show", "rules"]).unwrap().contains("no-mail        web    egress"));
}

#[test]
fn limits_and_postures_are_set_by_command() {
    let daemon = start();
    daemon.cli(&["port", "add", "vm1", "--mac", "52:54:00:00:00:01", "--address", "10.0.0.1"]).unwrap();
    daemon.cli(&["network", "set", "default", "policy=enforced"]).unwrap();
    daemon
        .cli(&["port", "set", "vm1", "egress={ pps = 1000 }", "new_flows={ rate = 5, burst = 9 }", "connections=64"])
        .unwrap();
    let port = json_of(&daemon, &["show", "port", "vm1", "--json"]);
    assert_eq!(port["egress"], json!({"pps": 1000, "pps_burst": 100}));
    assert_eq!((&port["new_flows"], &port["connections"]), (&json!({"rate": 5, "burst": 9}), &json!(64)));
    for value in [true, false] {
        let keys = ["config_space", "unknown_unicast"].map(|key| format!("{key}={value}"));
        daemon.cli(&["port", "set", "vm1", &keys[0], &keys[1]]).unwrap();
        let port = json_of(&daemon, &["show", "port", "vm1", "--json"]);
        assert_eq!((port["config_space"] == true, &port["unknown_unicast"]), (value, &json!(value)), "{port}");
    }
    let keys = ["learning=false", "group_policy=false"];
    daemon.cli(&[&["network", "set", "default"][..], &keys].concat()).unwrap();
    assert_eq!(json_of(&daemon, &["show", "network", "default", "--json"])["learning"], false);
    assert!(refused(&daemon, &["port", "set", "vm1", "egress={ pps = }"]).contains("expected a table"));
    daemon.cli(&["port", "set", "vm1", "egress=", "new_flows=", "connections="]).unwrap();
    assert_eq!(json_of(&daemon, &["show", "port", "vm1", "--json"]).get("egress"), None);
}

#[test]
fn why_answers_by_command_and_api() {
    let daemon = start();
    for (name, number) in [("vm1", "1"), ("vm2", "2")] {
        let (mac, address) = (format!("52:54:00:00:00:0{number}"), format!("10.0.0.{number}"));
        daemon.cli(&["port", "add", name, "--mac", &mac, "--address", &address]).unwrap();
    }
    let ask = ["why", "vm1", "tcp", "10.0.0.1:40000", "10.0.0.2:443"];
    assert!(daemon.cli(&ask).unwrap().contains("pass: every port on its way lets it pass"));
    daemon.cli(&["network", "set", "default", "policy=enforced"]).unwrap();
    let said = daemon.cli(&ask).unwrap();
    assert!(said.contains("ingress       vm2  drop  no rule matches"), "{said}");
    let answer = json_of(&daemon, &[&ask[..], &["--json"]].concat());
    assert_eq!((&answer["path"]["verdict"], &answer["network"]), (&json!("drop"), &json!("default")));
    assert!(refused(&daemon, &["why", "vm1", "tcp", "10.0.0.1", "10.0.0.2"]).contains("the destination has no port"));
    assert!(refused(&daemon, &["why", "vm9", "tcp", "10.0.0.1:1", "10.0.0.2:2"]).contains("no port \"vm9\""));
    assert_eq!(json_of(&daemon, &["show", "connections", "vm1", "--json"]), json!([]));
    assert!(refused(&daemon, &["show", "connections", "vm9"]).contains("no port \"vm9\""));
    assert_eq!(daemon.cli(&["drops"]).unwrap(), "");
}

/// 10,000 rules on 1,000 groups, applied to a daemon that runs.
#[test]
fn many_rules_are_applied_at_once() {
    use std::fmt::Write;
    let daemon = start();
    let mut text = CONFIG.replace("\"default\"", "\"default\"\npolicy = \"enforced\"");
    for group in 0..1_000 {
        writeln!(text, "[[group]]\nname = 'g{group}'\nprefixes = ['10.{}.{}.0/24']", group / 256, group % 256).unwrap();
    }
    for rule in 0..10_000 {
        let (group, from, port) = (rule % 1_000, (rule * 7) % 1_000, 1_000 + rule);
        writeln!(text, "[[rule]]\ngroup = 'g{group}'\ndirection = 'ingress'\nallow = 'tcp'").unwrap();
        writeln!(text, "ports = '{port}'\nfrom = 'group:g{from}'").unwrap();
    }
    let all: Vec<_> = (0..1_000).map(|group| format!("'g{group}'")).collect();
    let mac = "mac = '52:54:00:00:00:01'\naddresses = ['10.9.9.9']";
    writeln!(text, "[[port]]\nname = 'vm1'\n{mac}\ngroups = [{}]", all.join(",")).unwrap();
    let start = std::time::Instant::now();
    let said = daemon.apply(&text).unwrap();
    let took = start.elapsed();
    assert_eq!(said.lines().filter(|line| line.starts_with("+ rule")).count(), 10_000);
    let start = std::time::Instant::now();
    daemon.cli(&["rule", "set", "g5-ingress-3", "ports=7"]).unwrap();
    println!("10,000 rules applied in {took:?}; one changed in {:?}", start.elapsed());
    // The third rule of g5 is from g35.
    for (source, verdict) in [("10.0.35.1:9", "pass"), ("10.0.36.1:9", "drop")] {
        let answer = json_of(&daemon, &["why", "vm1", "tcp", source, "10.9.9.9:7", "--json"]);
        assert_eq!(answer["path"]["verdict"], verdict, "{source}");
    }
}
