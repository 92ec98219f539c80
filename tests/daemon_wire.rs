//! A daemon whose underlay is a vhost-user socket: one front-end is a guest, another is the wire with a host on it.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::path::Path;

use common::counters::{assert_conserved, assert_quiet_log, number, wait_connected};
use common::front_ends::{OURS, THEIRS, next, outer};
use common::*;
use dreamwire_bench::front_end::{FrontEnd, Options};
use dreamwire_bench::hostile::attack;
use dreamwire_bench::topology::{Daemon, DaemonSpec, wait_until};

/// The configuration with a wire; `keys` are further ones of the underlay.
fn config(keys: &str) -> String {
    format!(
        "{DAEMON}[[underlay]]\nname = \"fabric\"\ndriver = \"vhost-user\"\nmac = \"02:00:00:00:00:01\"\n\
         address = \"192.0.2.1\"\nmtu = 1600\n{keys}\n\
         [[network]]\nname = \"blue\"\nvni = 100\nunderlay = \"fabric\"\nremotes = [\"192.0.2.2\"]\n{}",
        port(1, "")
    )
}

const NEIGHBOUR: &str = "neighbours = [{ address = \"192.0.2.2\", mac = \"02:00:00:00:00:02\" }]";

fn start(config: &str) -> Daemon {
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    Daemon::start(&DaemonSpec { name: "dreamwire", binary, netns: None, config }).unwrap()
}

/// A frame each way between a guest and the host on the wire.
fn frames_pass(guest: &mut FrontEnd, wire: &mut FrontEnd, text: &str) {
    let sent = text_frame([0xff; 6], [2, 0, 0, 0, 0, 0x11], text);
    assert_eq!(guest.send_burst(&[&sent]).unwrap(), 1);
    let packet = next(wire);
    assert_eq!(&packet[..12], [THEIRS, OURS].concat());
    assert_eq!(packet[50..], sent);
    let back = text_frame([2, 0, 0, 0, 0, 0x11], [2, 0, 0, 0, 0, 0x22], text);
    assert_eq!(wire.send_burst(&[&outer(0, &back)]).unwrap(), 1);
    assert_eq!(next(guest), back);
}

#[test]
fn frames_pass_in_both_modes_and_after_the_wire_was_away() {
    for keys in [NEIGHBOUR.to_owned(), format!("{NEIGHBOUR}\nmode = \"client\"")] {
        let daemon = start(&config(&keys));
        let mut guest = FrontEnd::connect(&daemon.path("vm1.sock"), attack::small()).unwrap();
        let fabric = daemon.path("fabric.sock");
        let plug_in = || match keys.contains("client") {
            true => FrontEnd::listen(&fabric, attack::small()).unwrap(),
            false => FrontEnd::connect(&fabric, attack::small()).unwrap(),
        };
        let mut wire = plug_in();
        let connected = |expected: bool| {
            wait_until(LIMIT, "the session", || {
                let shown = daemon.cli(&["show", "underlay", "fabric", "--json"]).unwrap();
                let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
                shown["session"]["connected"] == expected
            })
            .unwrap();
        };
        connected(true);
        frames_pass(&mut guest, &mut wire, "first");
        drop(wire);
        connected(false);
        guest.send_burst(&[&text_frame([0xff; 6], [2, 0, 0, 0, 0, 0x11], "into the void")]).unwrap();
        wait_until(LIMIT, "the drop", || daemon.stats().unwrap()["networks"][0]["drops"]["port_down"] == 1).unwrap();
        let mut wire = plug_in();
        frames_pass(&mut guest, &mut wire, "second");
        assert_conserved(&daemon);
        assert_quiet_log(&daemon);
    }
}

#[test]
fn a_wire_serves_ports_of_another_worker_and_is_moved() {
    let Some(cpus) = two_cpus() else { return };
    let config = |wire: u16, port: u16| {
        let keys = format!("{NEIGHBOUR}\nworker = {wire}");
        with_workers(&format!("{}worker = {port}\n", config(&keys)), cpus)
    };
    let daemon = start(&config(1, 0));
    let mut guest = FrontEnd::connect(&daemon.path("vm1.sock"), attack::small()).unwrap();
    let mut wire = FrontEnd::connect(&daemon.path("fabric.sock"), attack::small()).unwrap();
    wait_connected(&daemon, "vm1", true);
    let handed_over = |worker| number(&daemon, "workers", worker, "/handoff/tx");
    frames_pass(&mut guest, &mut wire, "apart");
    assert_eq!([handed_over("0"), handed_over("1")], [1, 1]);
    daemon.cli(&["port", "set", "vm1", "worker=1"]).unwrap();
    frames_pass(&mut guest, &mut wire, "together");
    assert_eq!([handed_over("0"), handed_over("1")], [1, 1]);
    daemon.apply(&config(0, 1)).unwrap();
    drop(wire);
    let mut wire = FrontEnd::connect(&daemon.path("fabric.sock"), attack::small()).unwrap();
    frames_pass(&mut guest, &mut wire, "apart again");
    assert_eq!([handed_over("0"), handed_over("1")], [2, 2]);
    for counter in ["/tunnel_rx/frames", "/tunnel_tx/frames"] {
        assert_eq!(number(&daemon, "networks", "blue", counter), 3, "{counter}");
    }
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

#[test]
fn a_wire_offers_nothing_that_would_leave_packets_unfinished() {
    let daemon = start(&config(NEIGHBOUR));
    let wire = FrontEnd::connect(&daemon.path("fabric.sock"), Options { features: !0, ..attack::small() }).unwrap();
    // VIRTIO 1.2 §5.1.3: checksums, segmentation offloads and their guest sides are bits 0 to 2, 6 to 14, and 54 to 56.
    assert_eq!(wire.negotiated().features & (0x7fc7 | 7 << 54), 0);
}

#[test]
fn a_wire_is_changed_and_a_change_that_fails_leaves_it_as_it_was() {
    let daemon = start(&config(NEIGHBOUR));
    let mut guest = FrontEnd::connect(&daemon.path("vm1.sock"), attack::small()).unwrap();
    let mut wire = FrontEnd::connect(&daemon.path("fabric.sock"), attack::small()).unwrap();
    frames_pass(&mut guest, &mut wire, "before");
    let apply = |text: String| {
        let file = tempfile::Builder::new().suffix(".toml").tempfile().unwrap();
        let run_dir = daemon.path("");
        let run_dir = run_dir.to_str().unwrap().trim_end_matches('/');
        std::fs::write(file.path(), text.replace("{run_dir}", run_dir)).unwrap();
        daemon.cli(&["apply", file.path().to_str().unwrap()])
    };
    // A port of no such socket directory comes up after the underlay, and fails.
    let broken = config(&format!("{NEIGHBOUR}\nport = 4790"))
        + "[[port]]\nname = \"vm2\"\nnetwork = \"blue\"\nsocket = \"/nowhere/vm2.sock\"\n";
    let refusal = apply(broken).unwrap_err().to_string();
    assert!(refusal.contains("/nowhere/vm2.sock"), "{refusal}");
    drop(wire);
    let mut wire = FrontEnd::connect(&daemon.path("fabric.sock"), attack::small()).unwrap();
    frames_pass(&mut guest, &mut wire, "as it was");

    let moved = format!("{NEIGHBOUR}\nsocket = \"{{run_dir}}/other.sock\"");
    apply(config(&moved)).unwrap();
    assert!(!daemon.path("fabric.sock").exists());
    let mut wire = FrontEnd::connect(&daemon.path("other.sock"), attack::small()).unwrap();
    frames_pass(&mut guest, &mut wire, "elsewhere");
    assert_eq!(number(&daemon, "networks", "blue", "/tunnel_rx/frames"), 3);
    assert_conserved(&daemon);
}
