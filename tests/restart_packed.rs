//! The daemon is killed under traffic and started again: every ring goes on where it stood, and nothing arrives twice or
//! torn. The driver says what QEMU says: of a packed ring a base that is as old as the connection.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use dreamwire_bench::front_end::{ChainShape, FrontEnd, Options, feature};
use dreamwire_bench::topology::{
    BOOT_LIMIT, Daemon, DaemonSpec, ECHO_PORT, Guest, GuestSpec, Needs, Nic, Wire, available, wait_until,
};
use dreamwire_bench::traffic::frame::{self, Endpoint};

const A: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 1], address: Ipv4Addr::new(10, 0, 0, 1) };
const B: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 2], address: Ipv4Addr::new(10, 0, 0, 2) };
const LIMIT: Duration = Duration::from_secs(20);
const KILLS: u32 = 4;

/// Sends on pair `pair` until `wanted` more frames have arrived on any pair; returns whether they did in time.
fn carries(from: &mut FrontEnd, to: &mut FrontEnd, pair: usize, wanted: usize, sequence: &mut u64) -> bool {
    let deadline = Instant::now() + LIMIT;
    let mut arrived = 0;
    while arrived < wanted && Instant::now() < deadline {
        // Lengths of one to three buffers.
        let frames: Vec<_> =
            (0..16).map(|n| frame::frame(A, B, 60 + n * 90, pair as u16, *sequence + n as u64)).collect();
        let burst: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
        *sequence += from.pairs()[pair].transmit.send_burst(&burst).unwrap() as u64;
        for pair in to.pairs() {
            arrived += pair.receive.receive_burst(|frame, _| assert_eq!(frame[..6], B.mac, "a whole frame")).unwrap();
        }
    }
    arrived >= wanted
}

/// Sends without end for a while, and leaves rings full.
fn floods(from: &mut FrontEnd, to: &mut FrontEnd, round: u32, sequence: &mut u64) {
    let until = Instant::now() + Duration::from_millis(20 + 7 * u64::from(round));
    while Instant::now() < until {
        for pair in 0..from.pairs().len() {
            carries(from, to, pair, 1, sequence);
        }
    }
    for pair in from.pairs() {
        let frame = frame::frame(A, B, 500, 0, *sequence);
        pair.transmit.send_burst(&vec![&frame[..]; 40]).unwrap();
    }
}

fn recovers(features: u64, queue_pairs: u16, tx_chain: ChainShape) {
    let config = "[daemon]\nrun_dir = \"{run_dir}\"\n[[network]]\nname = \"n\"\n\
                  [[port]]\nname = \"a\"\nnetwork = \"n\"\nqueues = 2\n[[port]]\nname = \"b\"\nnetwork = \"n\"\nqueues = 2\n";
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    let mut daemon = Daemon::start(&DaemonSpec { name: "restart", binary, netns: None, config }).unwrap();
    let options = Options {
        queue_pairs,
        features: Options::default().features | features,
        features_required: feature::VERSION_1 | features,
        ring_size: 128,
        rx_buffer_bytes: 600,
        tx_chain,
        ..Options::default()
    };
    let [socket_a, socket_b] = ["a.sock", "b.sock"].map(|name| daemon.path(name));
    let mut from = FrontEnd::connect(&socket_a, options.clone()).unwrap();
    let mut to = FrontEnd::connect(&socket_b, options).unwrap();
    let mut sequence = 0;
    assert!(carries(&mut from, &mut to, 0, 300, &mut sequence), "before any kill");
    for kill in 0..KILLS {
        floods(&mut from, &mut to, kill, &mut sequence);
        daemon.kill().unwrap();
        daemon.start_again().unwrap();
        from.reconnect(&socket_a).unwrap();
        to.reconnect(&socket_b).unwrap();
        for pair in 0..usize::from(queue_pairs) {
            assert!(
                carries(&mut from, &mut to, pair, 1000, &mut sequence),
                "pair {pair} after kill {kill}: {}",
                daemon.log()
            );
        }
    }
    let stats = daemon.stats().unwrap();
    assert_eq!(stats["conservation"]["difference"], 0);
    assert!(!daemon.log().contains("quarantined"), "{}", daemon.log());
}

#[test]
fn packed_rings_go_on_after_the_daemon_was_killed() {
    recovers(feature::RING_PACKED, 1, ChainShape::default());
    recovers(feature::RING_PACKED, 2, ChainShape { descriptors: 3, indirect: false });
    recovers(feature::RING_PACKED | feature::IN_ORDER, 1, ChainShape::default());
    recovers(feature::RING_PACKED | feature::IN_ORDER, 2, ChainShape { descriptors: 3, indirect: false });
}

#[test]
fn split_rings_go_on_after_the_daemon_was_killed() {
    recovers(0, 1, ChainShape::default());
    recovers(0, 2, ChainShape { descriptors: 3, indirect: false });
}

/// Linux's own driver under QEMU with `packed=on`, which tells the daemon a base as old as the guest.
#[test]
fn a_linux_guest_with_packed_rings_is_back_after_the_daemon_was_killed() {
    if !available(Needs::Guests) {
        return;
    }
    let config = "[daemon]\nrun_dir = \"{run_dir}\"\n[[network]]\nname = \"n\"\n\
                  [[port]]\nname = \"a\"\nnetwork = \"n\"\nqueues = 2\n[[port]]\nname = \"b\"\nnetwork = \"n\"\n";
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    let mut daemon = Daemon::start(&DaemonSpec { name: "restart", binary, netns: None, config }).unwrap();
    let spec = |name: &str, number: u32, queues| {
        let wire = Wire::VhostUser(daemon.path(&format!("{name}.sock")));
        let nic = Nic::new(wire, &format!("52:54:00:00:00:0{number}")).queues(queues).properties("packed=on");
        GuestSpec::new(name).cpus(queues).nic(nic.address(&format!("10.0.0.{number}/24")))
    };
    let (mut one, mut two) = (Guest::start(&spec("a", 1, 2)).unwrap(), Guest::start(&spec("b", 2, 1)).unwrap());
    one.wait_ready(BOOT_LIMIT).unwrap();
    two.wait_ready(BOOT_LIMIT).unwrap();
    assert!(one.ping("10.0.0.2", 5).unwrap());
    let features = daemon.cli(&["show", "port", "a"]).unwrap();
    assert!(features.contains("RING_PACKED"), "{features}");
    let target = (std::net::IpAddr::from([10, 0, 0, 2]), ECHO_PORT).into();
    for kill in 0..3 {
        // Far enough that the rings are in another lap each time.
        one.sh("ping -q -c 300 -i 0.002 10.0.0.2").unwrap();
        let probe = one.probe(target, Duration::from_millis(10)).unwrap();
        daemon.kill().unwrap();
        daemon.start_again().unwrap();
        wait_until(Duration::from_secs(20), "a ping gets through again", || one.ping("10.0.0.2", 1).unwrap()).unwrap();
        assert!(two.ping("10.0.0.1", 3).unwrap());
        eprintln!("kill {kill}: longest gap {:.0} ms", probe.stop().unwrap().longest_gap_ms);
    }
    assert!(!daemon.log().contains("quarantined"), "{}", daemon.log());
}
