//! Two guests on one host: an ordinary network card, and every frame arrives as it was sent.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use common::counters::{assert_conserved, assert_quiet_log, drops, number, wait_drops};
use common::*;
use dreamwire_bench::topology::{Daemon, FrameFilter, FramePattern, Guest, Needs, Netns, available};

const FILE_MEGABYTES: u32 = 4;

#[test]
fn guests_on_one_host_share_a_wire() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let daemon = start_daemon("host", &host, &local_config(&[1, 2]));
    let [one, two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    card_is_an_ordinary_one(&one);
    a_file_arrives_whole(&one, &two);
    let before = drops(&daemon);
    for (from, to) in [(&one, 2), (&two, 1)] {
        assert_ping(from, &format!("10.0.0.{to}"));
        assert_ping(from, &format!("fd00::{to}"));
    }
    every_length_arrives_byte_for_byte(&daemon, &one, 1, &two, 2);
    every_length_arrives_byte_for_byte(&daemon, &two, 2, &one, 1);
    wait_drops(&daemon, &before, &[]);
    assert_conserved(&daemon);
    a_guarded_port_sends_in_its_own_name_only(&daemon, &one, &two);
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

#[test]
fn several_queue_pairs_all_carry_traffic() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let config = format!("{DAEMON}{LOCAL_NETWORK}{}{}", port(1, "queues = 2"), port(2, "queues = 2"));
    let daemon = start_daemon("host", &host, &config);
    let [one, two] = boot([1, 2].map(|number| {
        let mut spec = guest(&daemon, number).cpus(2);
        spec.nics[0].queues = 2;
        spec
    }));
    card_is_an_ordinary_one(&one);
    a_file_arrives_whole(&one, &two);
    let before = drops(&daemon);
    for guest in [&one, &two] {
        let channels = guest.exec(&["ethtool", "-l", "eth0"]).unwrap();
        assert_eq!(channels.lines().filter(|line| *line == "Combined:\t2").count(), 2, "{channels}");
    }
    assert_ping(&one, "10.0.0.2");
    assert_ping(&two, "fd00::1");

    // The driver has a transmitq for each processor; the switch spreads flows over the receiveqs.
    let ring = |port: &str, queue: u16| number(&daemon, "ports", port, &format!("/rings/{queue}/frames"));
    for cpu in ["0", "1"] {
        one.exec(&["taskset", "-c", cpu, "ping", "-q", "-c", "3", "-i", "0.1", "10.0.0.2"]).unwrap();
    }
    let flows: Vec<_> = (0..64).map(|flow| udp_frame([(mac(1), 1), (mac(2), 2)], 2000 + flow, b"spread")).collect();
    let capture = two.capture("eth0").unwrap();
    one.send_frames("eth0", &flows).unwrap();
    let filter = FrameFilter::any().source(mac(1)).bytes_at(42, b"spread");
    assert_eq!(capture.frames(&filter, flows.len(), LIMIT).unwrap().len(), flows.len());
    for (port, queues) in [("vm1", [1, 3]), ("vm2", [0, 2])] {
        for queue in queues {
            assert!(ring(port, queue) > 0, "ring {queue} of {port} carried nothing");
        }
    }

    // One queue less, and back: what the driver has switched off gets nothing.
    two.exec(&["ethtool", "-L", "eth0", "combined", "1"]).unwrap();
    let unused = ring("vm2", 2);
    one.send_frames("eth0", &flows).unwrap();
    assert_eq!(capture.frames(&filter, flows.len(), LIMIT).unwrap().len(), flows.len());
    assert_eq!(ring("vm2", 2), unused);
    two.exec(&["ethtool", "-L", "eth0", "combined", "2"]).unwrap();
    assert_ping(&one, "10.0.0.2");
    wait_drops(&daemon, &before, &[]);
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

fn card_is_an_ordinary_one(guest: &Guest) {
    let driver = guest.exec(&["ethtool", "-i", "eth0"]).unwrap();
    assert!(driver.starts_with("driver: virtio_net\n"), "{driver}");
    assert_eq!(guest.exec(&["cat", "/sys/class/net/eth0/mtu"]).unwrap(), "1500\n");
    assert_eq!(guest.exec(&["cat", "/sys/class/net/eth0/carrier"]).unwrap(), "1\n");
}

/// TCP finds its speed by loss: what a full ring drops here is no fault, so drops are compared only after it.
fn a_file_arrives_whole(one: &Guest, two: &Guest) {
    two.sh(&format!(
        "mkdir -p /tmp/www && dd if=/dev/urandom of=/tmp/www/file bs=1M count={FILE_MEGABYTES} 2>&1 \
         && httpd -p 80 -h /tmp/www"
    ))
    .unwrap();
    one.exec(&["curl", "-sS", "--fail", "-o", "/tmp/file", "http://10.0.0.2/file"]).unwrap();
    let hash = |guest: &Guest, path: &str| guest.sh(&format!("sha256sum <{path}")).unwrap();
    assert_eq!(hash(one, "/tmp/file"), hash(two, "/tmp/www/file"));
}

fn every_length_arrives_byte_for_byte(daemon: &Daemon, from: &Guest, source: u8, to: &Guest, destination: u8) {
    let header = frame(mac(destination), mac(source), &ETHER_TYPE.to_be_bytes());
    let lengths: Vec<usize> = (60..=1514).collect();
    let ports = [format!("vm{source}"), format!("vm{destination}")];
    let counted =
        || [number(daemon, "ports", &ports[0], "/rx/frames"), number(daemon, "ports", &ports[1], "/tx/frames")];
    let before = counted();
    let capture = to.capture("eth0").unwrap();
    let filter = FrameFilter::any().source(mac(source)).ether_type(ETHER_TYPE);
    for lengths in lengths.chunks(CHUNK_FRAMES) {
        let pattern = FramePattern::new(&header, lengths);
        from.send_pattern("eth0", &pattern).unwrap();
        let got = capture.digests(&filter, lengths.len(), LIMIT).unwrap();
        assert_same_digests(&got, &pattern.frames().collect::<Vec<_>>());
    }
    for (before, after) in before.into_iter().zip(counted()) {
        assert!(after - before >= lengths.len() as u64, "{before} to {after}");
    }
}

/// The port gets its addresses while the guest runs; the guest then tries every name that is not its own.
fn a_guarded_port_sends_in_its_own_name_only(daemon: &Daemon, one: &Guest, two: &Guest) {
    let keys = format!("mac = \"{}\"\naddresses = [\"10.0.0.1\", \"fd00::1\"]", mac_text(1));
    daemon.apply(&format!("{DAEMON}{LOCAL_NETWORK}{}{}", port(1, &keys), port(2, ""))).unwrap();
    assert_ping(one, "10.0.0.2");
    assert_ping(one, "fd00::2");
    // ARP from nothing, as after a boot.
    one.sh("ip neigh flush dev eth0").unwrap();
    assert_ping(one, "10.0.0.2");

    let stolen = mac(9);
    let arp = |sender_mac: [u8; 6], sender_ip: u8| {
        let mut rest = vec![8, 6, 0, 1, 8, 0, 6, 4, 0, 2];
        rest.extend(sender_mac);
        rest.extend([10, 0, 0, sender_ip]);
        rest.extend(mac(2));
        rest.extend([10, 0, 0, 2]);
        frame(mac(2), mac(1), &rest)
    };
    let tagged = |inner: Vec<u8>| [&inner[..12], &[0x81, 0, 0, 5], &inner[12..]].concat();
    let spoofed = [
        text_frame(mac(2), stolen, "another's MAC address"),
        udp_frame([(mac(1), 9), (mac(2), 2)], 1000, b"another's IP address"),
        arp(mac(1), 9),
        arp(stolen, 1),
        tagged(udp_frame([(mac(1), 9), (mac(2), 2)], 1000, b"behind a tag")),
    ];
    let honest = text_frame(mac(2), mac(1), "honest");
    let (before, capture) = (drops(daemon), two.capture("eth0").unwrap());
    one.send_frames("eth0", &spoofed).unwrap();
    wait_drops(daemon, &before, &[("ports/vm1/source_guard", spoofed.len() as u64)]);
    // Whatever came through would have come before this one.
    one.send_frames("eth0", std::slice::from_ref(&honest)).unwrap();
    let mut seen = Vec::new();
    while seen.last() != Some(&honest) {
        let frames = capture.frames(&FrameFilter::any(), 1, LIMIT).unwrap();
        assert!(!frames.is_empty(), "the honest frame did not arrive");
        seen.extend(frames.into_iter().map(|frame| frame.bytes));
    }
    for spoof in &spoofed {
        assert!(!seen.contains(spoof), "{spoof:02x?} arrived");
    }
    assert_ping(two, "10.0.0.1");
}
