//! Control without sockets of its own: numbers, counters and endpoints over changes.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::sync::Arc;

use common::two_cpus;
use dreamwire::config::{Context, Daemon, from_toml};
use dreamwire::control::inventory::{Inventory, PortEntry};
use dreamwire::control::{Applied, Control};
use dreamwire_datapath::drop_reason::DropReason;
use dreamwire_datapath::snapshot::WorkerId;

struct Bench {
    control: Control,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::with_workers(vec![])
    }

    fn with_workers(workers: Vec<usize>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon { run_dir: dir.path().to_owned(), workers, ..Daemon::default() };
        Self { control: Control::new(daemon).unwrap(), _dir: dir }
    }

    fn apply(&mut self, text: &str) -> Applied {
        let daemon = self.control.document().daemon.clone();
        let accepted = from_toml(text, Context { run_dir: None, running: Some(&daemon) }).unwrap();
        self.control.apply(accepted, false).unwrap()
    }

    fn inventory(&self) -> Arc<Inventory> {
        Arc::clone(&self.control.watch().borrow())
    }

    fn port(&self) -> PortEntry {
        self.inventory().ports[0].clone()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.control.shut_down();
    }
}

const NETWORKS: &str = "[[network]]\nname='default'\n[[network]]\nname='other'\n";

#[test]
fn counters_of_removed_objects_stay_in_the_totals() {
    let mut bench = Bench::new();
    bench.apply(&format!("{NETWORKS}[[port]]\nname='vm1'\n"));
    let counters = bench.port().counters.of(WorkerId(0));
    counters.rings[1].traffic.add(5, 300);
    counters.rings[0].traffic.add(2, 120);
    counters.drops.add(DropReason::NoDestination, 3);
    let before = bench.inventory().totals();
    assert_eq!((before.received, before.sent, before.dropped, before.difference()), (5, 2, 3, 0));
    bench.apply(NETWORKS);
    assert_eq!(bench.inventory().ports.len(), 0);
    assert_eq!(bench.inventory().totals(), before);
}

#[test]
fn a_port_keeps_its_number_and_counters_while_they_mean_the_same() {
    let mut bench = Bench::new();
    bench.apply(&format!("{NETWORKS}[[port]]\nname='vm1'\n"));
    let first = bench.port();
    let same = |bench: &Bench| {
        let now = bench.port();
        (now.id == first.id, Arc::ptr_eq(&now.counters.of(WorkerId(0)), &first.counters.of(WorkerId(0))))
    };
    bench.apply(&format!("{NETWORKS}[[port]]\nname='vm1'\nmac='52:54:00:00:00:01'\n"));
    assert_eq!(same(&bench), (true, true), "an address changes live");
    bench.apply(&format!("{}[[port]]\nname='vm1'\n", NETWORKS.replace("'default'", "'default'\nmtu=1400")));
    assert_eq!(same(&bench), (true, true), "a new endpoint, the same port");
    bench.apply(&format!("{NETWORKS}[[port]]\nname='vm1'\nnetwork='other'\n"));
    assert_eq!(same(&bench), (false, false), "what was learned in one network must not lead into another");
    let moved = bench.port().id;
    bench.apply(&format!("{NETWORKS}[[port]]\nname='vm1'\nnetwork='other'\nqueues=2\n"));
    assert_ne!(bench.port().id, moved);
    assert_eq!(bench.port().counters.sum().rings.len(), 4);
}

#[test]
fn an_identical_document_is_no_change() {
    let mut bench = Bench::new();
    assert_eq!(bench.apply(NETWORKS).generation, 1);
    let again = bench.apply(NETWORKS);
    assert_eq!((again.generation, again.changes.len()), (1, 0));
}

#[test]
fn a_network_that_moves_on_the_wire_gets_a_new_number() {
    let mut bench = Bench::new();
    let text = |vni: u32, remote: &str| {
        format!(
            "[[underlay]]\nname='u'\naddress='127.0.0.1'\nport=24789\nmtu=1600\n[[network]]\nname='n'\nvni={vni}\n\
             underlay='u'\nremotes=['{remote}']\n"
        )
    };
    bench.apply(&text(7, "127.0.0.2"));
    let first = bench.inventory().networks[0].id;
    bench.apply(&text(7, "127.0.0.3"));
    assert_eq!(bench.inventory().networks[0].id, first, "remotes change live");
    bench.apply(&text(8, "127.0.0.3"));
    assert_ne!(bench.inventory().networks[0].id, first);
}

#[test]
fn a_new_port_goes_where_the_fewest_are_and_an_old_one_stays_unless_told() {
    let Some(cpus) = two_cpus() else { return };
    let mut bench = Bench::with_workers(cpus.into());
    let mut places = |ports: &[(&str, &str)]| {
        let ports: String = ports.iter().map(|(name, keys)| format!("[[port]]\nname='{name}'\n{keys}\n")).collect();
        bench.apply(&format!("{NETWORKS}{ports}"));
        bench.inventory().ports.iter().map(|entry| entry.worker.0).collect::<Vec<_>>()
    };
    assert_eq!(places(&[("a", ""), ("b", ""), ("c", "worker=1")]), [0, 0, 1], "what is named counts first");
    assert_eq!(places(&[("a", ""), ("b", ""), ("c", ""), ("d", ""), ("e", "")]), [0, 0, 1, 1, 0]);
    assert_eq!(places(&[("a", "worker=1"), ("c", ""), ("d", ""), ("e", "queues=2")]), [1, 1, 1, 0]);
    assert_eq!(places(&[("a", ""), ("f", ""), ("e", "network='other'")]), [1, 0, 0], "a new number, the same place");
}
