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
fn rules_are_refused_while_nothing_enforces_them() {
    let daemon = start();
    daemon.cli(&["group", "add", "web"]).unwrap();
    let rule = ["rule", "add", "--group", "web", "--direction", "egress", "--deny", "tcp"];
    assert!(refused(&daemon, &rule).contains("not enforced yet"));
    assert!(refused(&daemon, &["network", "set", "default", "policy=enforced"]).contains("not enforced yet"));
    assert_eq!(json_of(&daemon, &["show", "rules", "--json"]), json!([]));
    let file = daemon.path("with-rule.toml");
    let rule = "[[group]]\nname='web'\n[[rule]]\ngroup='web'\ndirection='egress'\ndeny='tcp'\n";
    std::fs::write(&file, format!("{}{rule}", daemon.config().unwrap())).unwrap();
    assert!(daemon.cli(&["diff", file.to_str().unwrap()]).unwrap_err().to_string().contains("+ rule web-egress-1"));
}
