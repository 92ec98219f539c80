//! Ports and networks come and go; the traffic of those that stay does not notice.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::net::SocketAddr;

use common::counters::{assert_conserved, assert_quiet_log, drops, number, wait_connected, wait_drops};
use common::process::{Held, assert_nothing_leaked};
use common::*;
use dreamwire_bench::front_end::{FrontEnd, Options};
use dreamwire_bench::topology::{Daemon, ECHO_PORT, Needs, Netns, available, wait_until};

const ROUNDS: u32 = 20;

#[test]
fn changes_to_other_ports_cost_no_probe() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let daemon = start_daemon("host", &host, &local_config(&[1, 2]));
    let [one, two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    assert_ping(&one, "10.0.0.2");
    let held = Held::by(&daemon);
    let echo = |number: u8| SocketAddr::new([10, 0, 0, number].into(), ECHO_PORT);
    let before = drops(&daemon);
    let probes = [one.probe(echo(2), PROBE_INTERVAL).unwrap(), two.probe(echo(1), PROBE_INTERVAL).unwrap()];

    for round in 0..ROUNDS {
        a_port_comes_and_goes_by_command(&daemon, round);
        ports_come_and_go_by_file(&daemon);
    }

    for probe in probes {
        let report = probe.stop().unwrap();
        eprintln!("{ROUNDS} rounds: {} probes sent, longest gap {:.0} ms", report.sent, report.longest_gap_ms);
        assert!(report.sent > u64::from(ROUNDS), "{report:?}");
        assert_eq!((report.received, report.refused, report.duplicates), (report.sent, 0, 0), "{report:?}");
    }
    wait_drops(&daemon, &before, &[]);
    for port in ["vm1", "vm2"] {
        assert_eq!(number(&daemon, "ports", port, "/session/connections"), 1, "{port} stayed connected");
    }
    assert_nothing_leaked(&daemon, held);
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

/// With a front-end that sends to all in the meantime; every other time the port goes while it is still attached.
fn a_port_comes_and_goes_by_command(daemon: &Daemon, round: u32) {
    let said = daemon.cli(&["port", "add", "vm3", "--network", "blue", "--mac", &mac_text(3)]).unwrap();
    assert!(said.starts_with("+ port vm3\n"), "{said}");
    let mut front_end = FrontEnd::connect(&daemon.path("vm3.sock"), Options::default()).unwrap();
    wait_connected(daemon, "vm3", true);
    let broadcast = text_frame([0xff; 6], mac(3), "a newcomer");
    let sent = front_end.send_burst(&[&broadcast[..]; 8]).unwrap() as u64;
    wait_until(LIMIT, "the newcomer's frames", || number(daemon, "ports", "vm3", "/rx/frames") == sent).unwrap();
    if round.is_multiple_of(2) {
        drop(front_end);
        wait_connected(daemon, "vm3", false);
    }
    daemon.cli(&["port", "del", "vm3"]).unwrap();
    assert!(!daemon.path("vm3.sock").exists());
}

/// Another network with two ports, and one more port in the network that is in use.
fn ports_come_and_go_by_file(daemon: &Daemon) {
    let plain = local_config(&[1, 2]);
    let in_other = |number: u8| port(number, "").replace("network = \"blue\"", "network = \"red\"");
    let more = format!("{plain}{}[[network]]\nname = \"red\"\n{}{}", port(3, ""), in_other(4), in_other(5));
    let said = daemon.apply(&more).unwrap();
    assert!(said.contains("+ network red") && said.contains("+ port vm5"), "{said}");
    let mut front_ends = [3, 4, 5]
        .map(|number| FrontEnd::connect(&daemon.path(&format!("vm{number}.sock")), Options::default()).unwrap());
    let before = number(daemon, "ports", "vm5", "/tx/frames");
    front_ends[1].send_burst(&[&text_frame([0xff; 6], mac(4), "in the other network")]).unwrap();
    wait_until(LIMIT, "a frame in the other network", || number(daemon, "ports", "vm5", "/tx/frames") > before)
        .unwrap();
    let said = daemon.apply(&plain).unwrap();
    assert!(said.contains("- network red") && said.contains("- port vm3"), "{said}");
}
