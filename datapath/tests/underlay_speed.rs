//! What a frame costs over a veth pair, by driver: one thread serves both hosts, and only its workers' turns are timed.
//!
//! A smoke run in the tests. For figures (CPU 1 free of anything else):
//! `DREAMWIRE_BURSTS=4000 taskset -c 1 cargo test --release -p dreamwire-datapath --test underlay_speed -- --nocapture`
#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use dreamwire_datapath::snapshot::{NetworkId, PortId, Tunnel, UnderlayId};
use dreamwire_datapath::underlay::af_xdp::{XdpUnderlay, XdpUnderlayConfig};
use dreamwire_datapath::underlay::{SocketUnderlay, Underlay};
use dreamwire_datapath::vni::Vni;

const BURST: usize = 32;
const UDP_PORT: u16 = 4789;
const ROUNDS: usize = 5;

fn open(driver: &str, here: usize) -> Underlay {
    let (address, counters) = (veth::addresses()[here], Arc::default());
    if driver == "socket" {
        return SocketUnderlay::bind(address, UDP_PORT, None, counters).unwrap().into();
    }
    let config =
        XdpUnderlayConfig { device: veth::DEVICE.to_owned(), queues: 1, address, udp_port: UDP_PORT, mtu: 1600 };
    XdpUnderlay::open(&config, counters).unwrap().into()
}

fn hosts(driver: &str) -> [Lan; 2] {
    let (wire, vni, addresses) = (UnderlayId(0), Vni::new(7).unwrap(), veth::addresses());
    let mut drivers = veth::hosts(|here| open(driver, here)).into_iter();
    [0, 1].map(|here| {
        let mut lan = Lan::new(1, 1);
        lan.network(0).tunnel = Some(Tunnel {
            vni,
            underlay: wire,
            remotes: vec![addresses[1 - here]],
            carries_group: false,
            trusted: vec![],
        });
        lan.network(0).static_macs.insert(mac(here as u8 + 1), PortId(0));
        lan.snapshot.by_vni.insert((wire, vni), NetworkId(0));
        lan.publish();
        lan.worker.add_underlay(wire, drivers.next().unwrap());
        lan.worker.set_next_hops(wire, &[(addresses[1 - here], veth::MACS[1 - here])]);
        lan
    })
}

/// Carries bursts of frames from one host's station to the other's; returns the time of sending and of receiving.
fn carry([here, there]: &mut [Lan; 2], frame: &[u8], bursts: usize) -> [Duration; 2] {
    let mut spent = [Duration::ZERO; 2];
    for _ in 0..bursts {
        (0..BURST).for_each(|_| here.stations[0].send(frame));
        let start = Instant::now();
        assert_eq!(here.run(), BURST);
        spent[0] += start.elapsed();
        let (mut arrived, deadline) = (0, Instant::now() + Duration::from_secs(5));
        while arrived < BURST {
            assert!(Instant::now() < deadline, "{arrived} of {BURST} arrived");
            let start = Instant::now();
            arrived += there.run();
            spent[1] += start.elapsed();
        }
        let got = there.received(0);
        assert!(got.len() == BURST && got.iter().all(|got| got == frame), "every frame, unchanged");
    }
    spent
}

/// The kernel has to find its neighbours, and a flow its place in the FDB.
fn warm_up(hosts: &mut [Lan; 2], frame: &[u8]) {
    let deadline = Instant::now() + Duration::from_secs(5);
    hosts[0].stations[0].send(frame);
    hosts[0].run();
    while hosts[1].received(0).is_empty() {
        assert!(Instant::now() < deadline, "nothing arrives");
        hosts[1].run();
    }
    // So that frames to it are not flooded.
    let back = common::frame(mac(1), mac(2), 60, 9);
    hosts[1].stations[0].send(&back);
    hosts[1].run();
    while hosts[0].received(0).is_empty() {
        assert!(Instant::now() < deadline, "nothing comes back");
        hosts[0].run();
    }
}

#[test]
fn frames_over_a_veth_pair_by_driver() {
    let bursts: usize = std::env::var("DREAMWIRE_BURSTS").map_or(2, |bursts| bursts.parse().unwrap());
    let mut drivers = ["socket", "af_xdp"].map(|driver| (driver, hosts(driver)));
    for bytes in [64, 1500] {
        let frame = frame(mac(2), mac(1), bytes, 1);
        let mut frames_per_second = [const { Vec::new() }; 2];
        for round in 0..=ROUNDS {
            for (index, (driver, hosts)) in drivers.iter_mut().enumerate() {
                if round == 0 {
                    warm_up(hosts, &frame);
                    carry(hosts, &frame, bursts / 10);
                    continue;
                }
                let [sending, receiving] = carry(hosts, &frame, bursts);
                let frames = (bursts * BURST) as f64;
                let each = [sending, receiving].map(|spent| spent.as_nanos() as f64 / frames);
                println!("{bytes} bytes, {driver}: sending {:.0} ns, receiving {:.0} ns", each[0], each[1]);
                frames_per_second[index].push(1e9 / (each[0] + each[1]));
            }
        }
        let [socket, af_xdp] = frames_per_second.map(|mut all| {
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        });
        println!(
            "{bytes} bytes, frames a second, median of {ROUNDS}: socket {socket:.0}, af_xdp {af_xdp:.0}, {:.2} x",
            af_xdp / socket
        );
    }
}
