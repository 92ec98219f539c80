//! The topology against itself, without our datapath: kernel to kernel, guest to guest over a bridge. What fails here is
//! not the daemon's fault.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::*;

const A: [u8; 6] = [2, 0, 0, 0, 0, 0xa];
const B: [u8; 6] = [2, 0, 0, 0, 0, 0xb];
const LIMIT: Duration = Duration::from_secs(5);

fn header(destination: [u8; 6], source: [u8; 6], rest: &[u8]) -> Vec<u8> {
    [&destination[..], &source[..], rest].concat()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn vxlan_carries_frames_both_ways(ends: [&str; 2], addresses: [&str; 2]) {
    if !available(Needs::Netns) {
        return;
    }
    let (left, right) = (Netns::new("left").unwrap(), Netns::new("right").unwrap());
    let end =
        |netns, index: usize| VethEnd { netns, interface: "eth1", addresses: std::slice::from_ref(&addresses[index]) };
    Netns::join([end(&left, 0), end(&right, 1)], 1600).unwrap();
    let spec = |index: usize| KernelVxlanSpec::new(7, ip(ends[index]), Some(ip(ends[1 - index])));
    let a = KernelVxlan::new(&left, &spec(0)).unwrap();
    let b = KernelVxlan::new(&right, &spec(1)).unwrap();

    // Experimental ethertype, plain and behind an 802.1Q tag, shortest to longest.
    let plain = FramePattern::new(&header(B, A, &[0x88, 0xb5]), &[60, 61, 1514]);
    let tagged = FramePattern::new(&header(B, A, &[0x81, 0, 0x20, 5, 0x88, 0xb5]), &[64, 1518]);
    let frames: Vec<_> = plain.frames().chain(tagged.frames()).collect();
    for frame in &frames {
        a.send(frame).unwrap();
    }
    let filter = FrameFilter::any().source(A);
    let got = b.receive(&filter, frames.len(), LIMIT).unwrap();
    assert_eq!(got.iter().map(|frame| &frame.bytes).collect::<Vec<_>>(), frames.iter().collect::<Vec<_>>());

    let back = header(A, B, &[0x88, 0xb5, 1, 2, 3]);
    b.send(&back).unwrap();
    let got = a.receive(&FrameFilter::any().source(B), 1, LIMIT).unwrap();
    assert_eq!(got.len(), 1);
    assert!(a.fdb().unwrap().contains("02:00:00:00:00:0b"), "learned");
}

#[test]
fn kernel_vxlan_over_ipv4_carries_frames_both_ways() {
    vxlan_carries_frames_both_ways(["192.0.2.1", "192.0.2.2"], ["192.0.2.1/24", "192.0.2.2/24"]);
}

#[test]
fn kernel_vxlan_over_ipv6_carries_frames_both_ways() {
    vxlan_carries_frames_both_ways(["fd00:1::1", "fd00:1::2"], ["fd00:1::1/64", "fd00:1::2/64"]);
}

#[test]
fn a_namespace_is_gone_when_it_is_dropped() {
    if !available(Needs::Netns) {
        return;
    }
    let netns = Netns::new("short").unwrap();
    let path = format!("/run/netns/{}", netns.name());
    assert!(std::fs::exists(&path).unwrap());
    drop(netns);
    assert!(!std::fs::exists(&path).unwrap());
}

#[test]
fn guests_on_a_bridge_do_everything_a_test_asks() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("bridge").unwrap();
    for tap in ["tap1", "tap2"] {
        host.add_tap(tap, 1).unwrap();
    }
    host.add_bridge("br0", &["tap1", "tap2"]).unwrap();
    let spec = |number: u32| {
        let wire = Wire::Tap(format!("tap{number}"));
        GuestSpec::new(&format!("vm{number}")).inside(&host).nic(
            Nic::new(wire, &format!("52:54:00:00:00:0{number}"))
                .address(&format!("10.0.0.{number}/24"))
                .address(&format!("fd00::{number}/64")),
        )
    };
    let start = Instant::now();
    let (mut one, mut two) = (Guest::start(&spec(1)).unwrap(), Guest::start(&spec(2)).unwrap());
    one.wait_ready(BOOT_LIMIT).unwrap();
    two.wait_ready(BOOT_LIMIT).unwrap();
    eprintln!("two guests are ready after {:.1} s", start.elapsed().as_secs_f64());

    assert!(one.ping("10.0.0.2", 3).unwrap());
    assert!(two.ping("fd00::1", 3).unwrap());
    assert!(!one.ping("10.0.0.9", 1).unwrap(), "nobody is there");

    let failed = one.run(&["sh", "-c", "echo no >&2; exit 4"], LIMIT).unwrap();
    assert_eq!((failed.code, failed.stderr.as_str()), (Some(4), "no\n"));
    assert!(one.run(&["sleep", "60"], Duration::from_millis(300)).unwrap().timed_out);

    let bytes: Vec<u8> = (0..700_000_u32).map(|index| (index % 251) as u8).collect();
    one.put_file("/tmp/file", &bytes).unwrap();
    assert_eq!(one.get_file("/tmp/file").unwrap(), bytes);

    let pattern = FramePattern::new(&header(B, A, &[0x81, 0, 0, 9, 0x88, 0xb5]), &[60, 700, 1518]);
    let capture = two.capture("eth0").unwrap();
    two.sh("ip link set eth0 promisc on").unwrap();
    let started = Instant::now();
    one.send_pattern("eth0", &pattern).unwrap();
    let digests = capture.digests(&FrameFilter::any().source(A), 3, LIMIT).unwrap();
    assert_eq!(digests, pattern.frames().map(|frame| FrameDigest::of(&frame)).collect::<Vec<_>>());
    one.send_frames("eth0", &[header(B, A, &[0x88, 0xb6, 1])]).unwrap();
    let frames = capture.frames(&FrameFilter::any().ether_type(0x88b6), 1, LIMIT).unwrap();
    assert_eq!(frames.len(), 1);
    eprintln!("frames took {:.1} s", started.elapsed().as_secs_f64());
    drop(capture);

    let target = (ip("10.0.0.2"), ECHO_PORT).into();
    let probe = one.probe(target, Duration::from_millis(10)).unwrap();
    host.sh("sleep 0.5; ip link set tap2 nomaster; sleep 0.5; ip link set tap2 master br0; sleep 1").unwrap();
    let report = probe.stop().unwrap();
    assert!((400.0..1500.0).contains(&report.longest_gap_ms), "{report:?}");

    let started = Instant::now();
    two.reboot().unwrap();
    eprintln!("reboot took {:.1} s", started.elapsed().as_secs_f64());
    assert!(one.ping("10.0.0.2", 3).unwrap());
    let events = two.take_qmp_events().unwrap();
    assert!(events.iter().any(|event| event["event"] == "RESET"), "{events:?}");

    let started = Instant::now();
    one.shutdown().unwrap();
    two.kill().unwrap();
    eprintln!("shutdown took {:.1} s", started.elapsed().as_secs_f64());
}
