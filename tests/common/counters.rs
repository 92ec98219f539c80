//! What a daemon counted, and what became of it between two moments.

use std::collections::BTreeMap;

use dreamwire_bench::topology::{Daemon, wait_until};
use serde_json::Value;

use super::LIMIT;

/// Drops by `kind/name/reason`, such as `ports/vm1/source_guard`.
pub(crate) type Drops = BTreeMap<String, u64>;

/// All drops so far.
pub(crate) fn drops(daemon: &Daemon) -> Drops {
    drops_in(&daemon.stats().unwrap())
}

fn drops_in(stats: &Value) -> Drops {
    let mut found = Drops::new();
    for kind in ["ports", "networks", "underlays"] {
        for object in stats[kind].as_array().unwrap() {
            let name = object["name"].as_str().unwrap();
            for (reason, count) in object["drops"].as_object().unwrap() {
                found.insert(format!("{kind}/{name}/{reason}"), count.as_u64().unwrap());
            }
        }
    }
    found
}

/// Waits until exactly these drops were added since `before`, and no other.
#[track_caller]
pub(crate) fn wait_drops(daemon: &Daemon, before: &Drops, expected: &[(&str, u64)]) {
    let expected: Drops = expected.iter().map(|&(name, count)| (name.to_owned(), count)).collect();
    let mut moved = Drops::new();
    let waited = wait_until(LIMIT, "the drops", || {
        moved = drops(daemon)
            .into_iter()
            .map(|(name, count)| (name.clone(), count - before.get(&name).copied().unwrap_or(0)))
            .filter(|(_, count)| *count > 0)
            .collect();
        moved == expected || moved.iter().any(|(name, count)| *count > expected.get(name).copied().unwrap_or(0))
    });
    assert_eq!(moved, expected, "drops since; {waited:?}");
}

/// One number of the statistics, such as `number(&daemon, "ports", "vm1", "/rx/frames")`.
pub(crate) fn number(daemon: &Daemon, kind: &str, name: &str, pointer: &str) -> u64 {
    let stats = daemon.stats().unwrap();
    let objects = stats[kind].as_array().unwrap();
    let object = objects.iter().find(|object| object["name"] == name).unwrap_or_else(|| panic!("{kind}/{name}"));
    object.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer} of {object}"))
}

/// Every frame was sent or dropped for a reason. Readers see counters while they move: looks until they stand still.
#[track_caller]
pub(crate) fn assert_conserved(daemon: &Daemon) {
    let mut sum = Value::Null;
    let waited = wait_until(LIMIT, "balanced counters", || {
        sum = daemon.stats().unwrap()["conservation"].take();
        sum["balanced"] == true && sum["received"].as_u64() > Some(0)
    });
    assert!(waited.is_ok(), "{sum}");
}

/// Waits until a port's front-end is connected, or not.
#[track_caller]
pub(crate) fn wait_connected(daemon: &Daemon, port: &str, connected: bool) {
    let what = format!("{port} connected: {connected}");
    wait_until(LIMIT, &what, || {
        let stats = daemon.stats().unwrap();
        let ports = stats["ports"].as_array().unwrap();
        ports.iter().any(|object| object["name"] == port && object["session"]["connected"] == connected)
    })
    .unwrap();
}

/// Where all is well, nothing is logged that asks for attention.
#[track_caller]
pub(crate) fn assert_quiet_log(daemon: &Daemon) {
    let log = daemon.log();
    let loud: Vec<_> = log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect();
    assert!(loud.is_empty(), "{loud:#?}");
}
