//! Two guests on two hosts with a VXLAN tunnel between them, and its underlay changed under the running guests.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use common::counters::{assert_conserved, assert_quiet_log, drops, number, wait_drops};
use common::*;
use dreamwire_bench::topology::{
    Daemon, FrameFilter, FramePattern, Guest, Needs, Netns, VethEnd, available, wait_until,
};

const VTEPS_V4: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
const VTEPS_V6: [&str; 2] = ["2001:db8::1", "2001:db8::2"];

#[test]
fn guests_on_two_hosts_share_a_wire_over_ipv4_and_ipv6() {
    if !available(Needs::Guests) {
        return;
    }
    let hosts = [Netns::new("host1").unwrap(), Netns::new("host2").unwrap()];
    let addresses = [["192.0.2.1/24", "2001:db8::1/64"], ["192.0.2.2/24", "2001:db8::2/64"]];
    let end = |index: usize| VethEnd { netns: &hosts[index], interface: "eth1", addresses: &addresses[index] };
    Netns::join([end(0), end(1)], 1600).unwrap();
    let config = |vteps: [&str; 2], index: usize| {
        tunnel_config(vteps[index], &[vteps[1 - index]], 1600) + &port(u8::try_from(index + 1).unwrap(), "")
    };
    let daemons =
        [0, 1].map(|index| start_daemon(&format!("host {}", index + 1), &hosts[index], &config(VTEPS_V4, index)));
    let guests = boot([guest(&daemons[0], 1), guest(&daemons[1], 2)]);
    guests_reach_each_other(&daemons, &guests, VTEPS_V4);

    // The same guests, now over IPv6: nothing but the path changes. For a moment the ends disagree; what is lost then is
    // counted where it ended, so drops are compared from here on.
    for (index, daemon) in daemons.iter().enumerate() {
        daemon.apply(&config(VTEPS_V6, index)).unwrap();
    }
    guests_reach_each_other(&daemons, &guests, VTEPS_V6);
    daemons.iter().for_each(assert_quiet_log);
}

fn guests_reach_each_other(daemons: &[Daemon; 2], guests: &[Guest; 2], vteps: [&str; 2]) {
    let [one, two] = guests;
    wait_until(LIMIT, "the first ping", || one.ping("10.0.0.2", 1).unwrap()).unwrap();
    // TCP finds its speed by loss: drops are compared only after it.
    a_file_arrives_whole(one, two);
    let before = daemons.each_ref().map(drops);
    let tunnel = |daemon: &Daemon, pointer: &str| number(daemon, "networks", "blue", pointer);
    let sent_before = tunnel(&daemons[0], "/tunnel_tx/frames");
    for (from, to) in [(one, 2), (two, 1)] {
        assert_ping(from, &format!("10.0.0.{to}"));
        assert_ping(from, &format!("fd00::{to}"));
        // As long as they get: what does not fit the underlay would be missed here.
        from.exec(&["ping", "-q", "-c", "2", "-i", "0.1", "-M", "do", "-s", "1472", &format!("10.0.0.{to}")]).unwrap();
    }

    let header = frame(mac(2), mac(1), &ETHER_TYPE.to_be_bytes());
    let mut pattern = FramePattern::new(&header, &[60, 61, 127, 128, 129, 1000, 1513, 1514]);
    pattern.repeat = 8;
    let capture = two.capture("eth0").unwrap();
    one.send_pattern("eth0", &pattern).unwrap();
    let got = capture.digests(&FrameFilter::any().ether_type(ETHER_TYPE), pattern.count(), LIMIT).unwrap();
    assert_same_digests(&got, &pattern.frames().collect::<Vec<_>>());

    let fdb = daemons[0].cli(&["show", "fdb"]).unwrap();
    let learned = fdb.lines().any(|line| line.contains(&mac_text(2)) && line.contains(vteps[1]));
    assert!(learned, "{} is not known behind {}:\n{fdb}", mac_text(2), vteps[1]);
    for (daemon, before) in daemons.iter().zip(&before) {
        wait_drops(daemon, before, &[]);
        assert_conserved(daemon);
    }
    // What one host put into the tunnel, the other took out.
    wait_until(LIMIT, "the tunnel's two ends to agree", || {
        tunnel(&daemons[0], "/tunnel_tx/frames") - sent_before >= pattern.count() as u64
            && tunnel(&daemons[1], "/tunnel_rx/frames") > 0
    })
    .unwrap();
}

fn a_file_arrives_whole(one: &Guest, two: &Guest) {
    two.sh(
        "mkdir -p /tmp/www && dd if=/dev/urandom of=/tmp/www/file bs=1M count=4 2>&1; httpd -p 80 -h /tmp/www || true",
    )
    .unwrap();
    one.exec(&["curl", "-sS", "--fail", "-o", "/tmp/file", "http://10.0.0.2/file"]).unwrap();
    let hash = |guest: &Guest, path: &str| guest.sh(&format!("sha256sum <{path}")).unwrap();
    assert_eq!(hash(one, "/tmp/file"), hash(two, "/tmp/www/file"));
}
