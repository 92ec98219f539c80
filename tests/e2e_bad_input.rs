//! What an operator or a front-end gets wrong: a clear message that names the thing, and nobody else notices.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::{UnixListener, UnixStream};

use common::counters::{assert_conserved, number, wait_connected};
use common::process::{Held, IdleQemu, assert_nothing_leaked};
use common::*;
use dreamwire_bench::topology::{
    BOOT_LIMIT, Daemon, ECHO_PORT, Guest, Needs, Netns, RunningProbe, available, wait_until,
};

/// Two guests in network blue that talk all the time, and what must hold at the end.
struct Bystanders<'a> {
    probe: RunningProbe<'a>,
    daemon: &'a Daemon,
}

impl<'a> Bystanders<'a> {
    fn start(daemon: &'a Daemon, one: &'a Guest) -> Self {
        assert_ping(one, "10.0.0.2");
        let echo = SocketAddr::new([10, 0, 0, 2].into(), ECHO_PORT);
        Self { probe: one.probe(echo, PROBE_INTERVAL).unwrap(), daemon }
    }

    fn noticed_nothing(self) {
        let report = self.probe.stop().unwrap();
        eprintln!("meanwhile {} probes, longest gap {:.0} ms", report.sent, report.longest_gap_ms);
        assert_eq!((report.received, report.refused, report.duplicates), (report.sent, 0, 0), "{report:?}");
        for port in ["vm1", "vm2"] {
            assert_eq!(number(self.daemon, "ports", port, "/session/connections"), 1, "{port} stayed connected");
        }
        assert_conserved(self.daemon);
    }
}

#[test]
fn mistakes_are_refused_by_name_and_disturb_nobody() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let config = local_config(&[1, 2]) + &port(3, "queues = 2") + &port(4, "");
    let mut daemon = start_daemon("host", &host, &config);
    let [one, _two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    let held = Held::by(&daemon);
    let bystanders = Bystanders::start(&daemon, &one);

    a_socket_path_in_use_is_refused(&daemon);
    an_underlay_that_this_host_cannot_have_is_refused(&daemon, &config);
    a_second_qemu_on_one_port_is_turned_away(&daemon);
    rubbish_ends_its_own_connection_only(&daemon);
    queue_numbers_that_differ_are_named(&daemon);

    bystanders.noticed_nothing();
    assert_nothing_leaked(&daemon, held);
    daemon.check_running().unwrap();
}

#[test]
fn memory_that_is_not_shared_is_named_and_disturbs_nobody() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let daemon = start_daemon("host", &host, &local_config(&[1, 2, 3, 4]));
    let [one, _two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    let bystanders = Bystanders::start(&daemon, &one);

    let mut unshared = [(3, "memory-backend-ram"), (4, "memory-backend-memfd,share=off")]
        .map(|(number, memory)| Guest::start(&guest(&daemon, number).memory_backend(memory)).unwrap());
    for guest in &mut unshared {
        guest.wait_ready(BOOT_LIMIT).unwrap();
    }
    // No file: QEMU has nothing to send, and its own log is of no help to whoever looks at the switch.
    wait_log(&daemon, "port=\"vm3\"", "share=on");
    let shown = daemon.cli(&["show", "port", "vm3"]).unwrap();
    assert!(shown.contains("share=on"), "{shown}");
    // A file, but the guest's pages are copies of it: it kicks, and nothing is ever there.
    let [_, private] = &unshared;
    let _ = private.ping("10.0.0.1", 3).unwrap();
    wait_until(LIMIT, "vm4's rings to be found empty", || {
        daemon.cli(&["show", "port", "vm4"]).unwrap().contains("kicked_but_empty yes")
    })
    .unwrap();
    wait_log(&daemon, "port=vm4", "share=on");

    for line in daemon.log().lines().filter(|line| line.contains("share=on")) {
        assert!(line.contains("vm3") || line.contains("vm4"), "the others' memory is shared: {line}");
    }
    drop(unshared);
    for port in ["vm3", "vm4"] {
        wait_connected(&daemon, port, false);
    }
    bystanders.noticed_nothing();
}

fn a_socket_path_in_use_is_refused(daemon: &Daemon) {
    let path = daemon.path("taken.sock");
    let taken = UnixListener::bind(&path).unwrap();
    let path_text = path.display().to_string();
    let said =
        daemon.cli(&["port", "add", "vm9", "--network", "blue", "--socket", &path_text]).unwrap_err().to_string();
    assert!(said.contains("port.vm9.socket") && said.contains(&path_text) && said.contains("in use"), "{said}");
    drop(taken);
    std::fs::remove_file(path).unwrap();
}

fn an_underlay_that_this_host_cannot_have_is_refused(daemon: &Daemon, config: &str) {
    let underlay = |keys: &str| format!("{config}[[underlay]]\nname = \"fabric\"\n{keys}\n");
    let written = daemon.config().unwrap();
    let refused = |keys: &str, words: &[&str]| {
        let said = daemon.apply(&underlay(keys)).unwrap_err().to_string();
        for word in words {
            assert!(said.contains(word), "{word:?} is not in: {said}");
        }
    };
    refused(
        "address = \"127.0.0.1\"\ndevice = \"nosuch0\"",
        &["underlay.fabric", "nosuch0", "no such device", "ip link"],
    );
    refused("address = \"192.0.2.77\"", &["underlay.fabric", "192.0.2.77", "give the address to an interface"]);
    refused("address = \"127.0.0.1\"\ncolour = \"red\"", &["config.toml:", "unknown key \"colour\"", "allowed here"]);
    // A restart must not find what was refused.
    let run_dir = daemon.run_dir().display().to_string();
    daemon.apply(&written.replace(&run_dir, "{run_dir}")).unwrap();
}

fn a_second_qemu_on_one_port_is_turned_away(daemon: &Daemon) {
    let second = IdleQemu::connect(&daemon.path("vm1.sock"), 1);
    wait_log(daemon, "port=\"vm1\"", "a second front-end");
    let line = log_line(daemon, "a second front-end").unwrap();
    assert!(line.contains(&format!("pid {}", second.pid())) && line.contains("in use by pid"), "{line}");
    let shown = daemon.cli(&["show", "port", "vm1"]).unwrap();
    assert!(shown.contains("a second front-end"), "{shown}");
}

fn rubbish_ends_its_own_connection_only(daemon: &Daemon) {
    let random: Vec<u8> = (0_u32..4096).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for (round, rubbish) in [&b"GET / HTTP/1.1\r\nHost: vm4\r\n\r\n"[..], &random].into_iter().enumerate() {
        let mut stream = UnixStream::connect(daemon.path("vm4.sock")).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let _ = stream.write_all(rubbish);
        // End of file, or a reset where bytes were left unread.
        assert!(matches!(stream.read(&mut [0; 16]), Ok(0) | Err(_)), "no answer to rubbish");
        wait_until(LIMIT, "the rubbish's end", || {
            number(daemon, "ports", "vm4", "/session/connections") == round as u64 + 1
        })
        .unwrap();
        wait_connected(daemon, "vm4", false);
    }
    wait_log(daemon, "port=\"vm4\"", "not a vhost-user message");
    let shown = daemon.cli(&["show", "port", "vm4"]).unwrap();
    assert!(shown.contains("not a vhost-user message"), "{shown}");
}

fn queue_numbers_that_differ_are_named(daemon: &Daemon) {
    // Port vm3 has two pairs, vm4 one.
    for (port, pairs, asked) in [("vm3", 2, 4), ("vm4", 1, 2)] {
        let qemu = IdleQemu::connect(&daemon.path(&format!("{port}.sock")), asked);
        qemu.wait_says(&format!("you are asking more queues than supported: {pairs}"));
        // QEMU tries again without end; the daemon says once what to do, and is not flooded.
        let hint = format!("its queues= must be the port's: {pairs}");
        wait_until(LIMIT, &hint, || daemon.cli(&["show", "port", port]).unwrap().contains(&hint)).unwrap();
        let lines = |daemon: &Daemon| daemon.log().lines().count();
        let connections = || number(daemon, "ports", port, "/session/connections");
        let before = connections();
        wait_until(LIMIT, "another ten attempts", || connections() > before + 10).unwrap();
        assert!(lines(daemon) < 200, "{} lines of log", lines(daemon));
        drop(qemu);
        wait_connected(daemon, port, false);
    }
}

fn log_line(daemon: &Daemon, words: &str) -> Option<String> {
    daemon.log().lines().find(|line| line.contains(words)).map(str::to_owned)
}

/// Waits until a line of the log has both.
#[track_caller]
fn wait_log(daemon: &Daemon, port: &str, words: &str) {
    let there = |line: &str| line.contains(port) && line.contains(words);
    let waited = wait_until(LIMIT, words, || daemon.log().lines().any(there));
    assert!(waited.is_ok(), "{port} with {words:?} is not in the log:\n{}", daemon.log());
}
