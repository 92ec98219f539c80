//! A worker that has warmed up allocates nothing: not for frames to guests, to everybody, to a tunnel or from one, and
//! not for addresses that it learns.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::*;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::snapshot::{NetworkId, PortId, Snapshot, Tunnel, UnderlayId, WorkerId};
use dreamwire_datapath::underlay::af_xdp::{XdpUnderlay, XdpUnderlayConfig};
use dreamwire_datapath::underlay::{Ends, OuterHeader, RingUnderlay, RingUnderlayConfig, SocketUnderlay};
use dreamwire_datapath::vni::Vni;
use dreamwire_datapath::worker::{Links, Worker};

/// Counts what a thread asks for: other tests run at the same time.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // Giving back counts as well: it takes the same locks.
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations of the worker's turns alone.
fn turns(lan: &mut Lan) -> (usize, u64) {
    let before = ALLOCATIONS.get();
    let taken = lan.run();
    (taken, ALLOCATIONS.get() - before)
}

/// Runs `round` with numbers from 0; after the first few, its turns may not allocate.
fn assert_steady(lan: &mut Lan, mut round: impl FnMut(&mut Lan, u32)) {
    const WARM_UP: u32 = 4;
    for number in 0..200 {
        round(lan, number);
        let (taken, allocations) = turns(lan);
        assert!(taken > 0);
        assert!(number < WARM_UP || allocations == 0, "{allocations} allocations in round {number}");
        (0..lan.stations.len()).for_each(|station| drop(lan.received(station)));
    }
}

#[test]
fn the_counter_counts() {
    let before = ALLOCATIONS.get();
    drop(std::hint::black_box(Box::new(7)));
    assert_eq!(ALLOCATIONS.get() - before, 2);
}

#[test]
fn unicast_flooding_and_learning_allocate_nothing() {
    let mut lan = Lan::new(8, 2);
    assert_steady(&mut lan, |lan, number| {
        for station in 0..8u16 {
            let own = lan.stations[usize::from(station)].mac();
            for (to, from) in [
                (mac(((station + 1) % 8) as u8 + 1), own),
                (Mac::BROADCAST, own),
                (mac(200), Mac([2, 1, 0, station as u8, (number >> 8) as u8, number as u8])),
                (own, own),
            ] {
                lan.stations[usize::from(station)].send(&frame(to, from, 60 + 7 * number as usize, 1));
            }
        }
        lan.now_ns += SECOND_NS;
    });
}

#[test]
fn judging_new_flows_and_known_ones_allocates_nothing() {
    let mut lan = Lan::new(4, 1);
    common::policy::with_policy(&mut lan, 131_072);
    let queue = dreamwire_datapath::perimeter::events::queue();
    lan.worker.tell(Arc::clone(&queue));
    assert_steady(&mut lan, |lan, number| {
        for station in 0..4u16 {
            let (own, next) = (lan.stations[usize::from(station)].mac(), mac(((station + 1) % 4) as u8 + 1));
            let mut known = udp(next, own, 7);
            let mut new = udp(next, own, 1000 + number as u16);
            let mut everybody = udp(Mac::BROADCAST, own, 7);
            for frame in [&mut known, &mut new, &mut everybody] {
                frame[38..40].copy_from_slice(&26u16.to_be_bytes());
            }
            // A length that lies: unreadable, and told of.
            let mut bad = known.clone();
            bad[16] = 9;
            for frame in [known, new, everybody, bad] {
                lan.stations[usize::from(station)].send(&frame);
            }
        }
        lan.now_ns += SECOND_NS / 8;
    });
    assert!(std::iter::from_fn(|| queue.pop()).count() > 100);
}

/// Host number `here` of two, without an underlay yet.
fn host(here: usize, addresses: [IpAddr; 2]) -> Lan {
    let mut lan = Lan::new(2, 1);
    let vni = Vni::new(7).expect("24 bits");
    lan.network(0).tunnel = Some(Tunnel {
        vni,
        underlay: UnderlayId(0),
        remotes: vec![addresses[1 - here]],
        carries_group: false,
        trusted: vec![],
    });
    lan.snapshot.by_vni.insert((UnderlayId(0), vni), NetworkId(0));
    // The station with address 1 is on the first host, the one with address 2 on the second.
    lan.network(0).static_macs.insert(mac(here as u8 + 1), PortId(0));
    lan.publish();
    lan
}

/// Two hosts on the loopback device: one worker each, both run by this thread. Needs CAP_NET_RAW, as the daemon does.
fn hosts() -> [Lan; 2] {
    let addresses = ["127.0.0.1", "127.0.0.2"].map(|text| text.parse::<IpAddr>().expect("an address"));
    [0, 1].map(|here| {
        let mut lan = host(here, addresses);
        let driver = SocketUnderlay::bind(addresses[here], 24789, None, Arc::default()).expect("needs CAP_NET_RAW");
        lan.worker.add_underlay(UnderlayId(0), driver);
        lan
    })
}

#[test]
fn tunnels_allocate_nothing_both_ways() {
    tunnels_are_steady(hosts());
}

/// Two hosts on a veth pair, past the kernel. Needs root, as the daemon does.
#[test]
fn tunnels_past_the_kernel_allocate_nothing_both_ways() {
    let addresses = veth::addresses();
    let drivers = veth::hosts(|here| {
        let (device, address) = (veth::DEVICE.to_owned(), addresses[here]);
        let config = XdpUnderlayConfig { device, queues: 1, address, udp_port: 4789, mtu: 1600 };
        XdpUnderlay::open(&config, Arc::default()).expect("needs CAP_NET_ADMIN and CAP_BPF")
    });
    let mut hosts = [0, 1].map(|here| host(here, addresses));
    for (here, driver) in drivers.into_iter().enumerate() {
        let worker = &mut hosts[here].worker;
        worker.add_underlay(UnderlayId(0), driver);
        worker.set_next_hops(UnderlayId(0), &[(addresses[1 - here], veth::MACS[1 - here])]);
    }
    tunnels_are_steady(hosts);
}

fn tunnels_are_steady([mut here, mut there]: [Lan; 2]) {
    let mut arrived = 0;
    for number in 0..100u32 {
        let length = 60 + 13 * number as usize;
        let sent = frame(mac(2), mac(1), length, 1);
        for _ in 0..8 {
            here.stations[0].send(&sent);
        }
        here.stations[0].send(&frame(Mac::BROADCAST, Mac([2, 1, 0, 0, 0, number as u8]), length, 2));
        here.stations[0].send(&frame(mac(200), mac(1), length, 3));
        let (taken, allocations) = turns(&mut here);
        assert_eq!(taken, 10);
        assert!(number < 4 || allocations == 0, "{allocations} allocations sending in round {number}");
        // Eight to its station, and two flooded copies to both stations there: the broadcast and the unknown address.
        let (mut moved, deadline) = (0, Instant::now() + Duration::from_secs(5));
        while moved < 10 {
            assert!(Instant::now() < deadline, "{moved} of 10 came out of the tunnel");
            let (taken, allocations) = turns(&mut there);
            assert!(number < 4 || allocations == 0, "{allocations} allocations receiving in round {number}");
            moved += taken;
        }
        let frames = there.received(0);
        assert_eq!(frames.iter().filter(|frame| **frame == sent).count(), 8);
        assert_eq!((frames.len(), there.received(1).len()), (10, 2));
        assert_eq!(here.received(1).len(), if number == 0 { 10 } else { 2 }, "flooded until the other host has spoken");
        arrived += 10;
        if number == 0 {
            there.stations[0].send(&frame(mac(1), mac(2), 60, 4));
            there.run();
            let deadline = Instant::now() + Duration::from_secs(5);
            while here.received(0).is_empty() {
                assert!(Instant::now() < deadline, "no answer");
                here.run();
            }
        }
    }
    assert_eq!(arrived, 1000);
    let sent: u64 = (0..100).map(|number| 10 * (60 + 13 * number)).sum();
    here.assert_moved(&[
        ("p0 rx", 1000),
        ("p0 rx_bytes", sent),
        ("p0 tx", 1),
        ("p0 tx_bytes", 60),
        ("p1 tx", 208),
        ("p1 tx_bytes", 8 * 60 + sent / 5),
        ("blue copies", 208),
        ("blue tunnel_tx", 1000),
        ("blue tunnel_rx", 1),
    ]);
}

#[test]
fn a_wire_that_is_a_ring_allocates_nothing_both_ways() {
    let [here, there] = ["192.0.2.1", "192.0.2.2"].map(|text| text.parse::<IpAddr>().expect("an address"));
    let (ours, theirs) = (mac(101), mac(102));
    let (wire, vni) = (UnderlayId(0), Vni::new(7).expect("24 bits"));
    let mut lan = Lan::new(2, 1);
    lan.network(0).tunnel =
        Some(Tunnel { vni, underlay: wire, remotes: vec![there], carries_group: false, trusted: vec![] });
    lan.snapshot.by_vni.insert((wire, vni), NetworkId(0));
    lan.publish();
    let config = RingUnderlayConfig {
        mac: ours,
        address: here,
        udp_port: 4789,
        mtu: 1600,
        gateway: None,
        neighbours: vec![(there, theirs)],
    };
    lan.worker.add_underlay(wire, RingUnderlay::new(config, Arc::default()));
    let mut front_end = Station::new(99, 1);
    for (number, queue) in front_end.queues.iter().enumerate() {
        assert!(lan.worker.attach_wire(wire, number as u16, queue.ring.open(F_VERSION_1 | F_MERGEABLE)).is_none());
    }
    front_end.fill();
    let ends = Ends { source: (theirs, there), destination: (ours, here), udp_port: 4789 };
    let mut outer = OuterHeader::new(&ends, vni.into()).expect("one family");
    assert_steady(&mut lan, |lan, number| {
        let length = 60 + 7 * number as usize;
        lan.stations[0].send(&frame(mac(2), mac(1), length, 1));
        lan.stations[0].send(&frame(Mac::BROADCAST, mac(1), length, 2));
        let inner = frame(mac(1), Mac([2, 1, 0, 0, 0, number as u8]), length, 3);
        front_end.send(&[outer.finish(length, number), &inner].concat());
        // To everybody behind another host: the address is not known here.
        lan.stations[1].send(&frame(mac(200), mac(2), length, 4));
        front_end.received();
        lan.now_ns += SECOND_NS;
    });
}

#[test]
fn frames_and_addresses_for_another_worker_allocate_nothing() {
    let links = Links::mesh(2).expect("two eventfds");
    let mut workers: Vec<Worker> = (0..)
        .zip(links)
        .map(|(worker, links)| {
            let ports = [0, 1].map(|id| {
                let mut port = port(id, 0, 1);
                port.worker = WorkerId(id);
                Some(port)
            });
            let networks = vec![Some(network("blue", &[0, 1]))];
            let worker = WorkerId(worker);
            let mut snapshot = Snapshot { generation: 1, ports: ports.into(), networks, worker, ..Snapshot::default() };
            snapshot.divide();
            Worker::linked(Arc::new(snapshot), Arc::default(), links)
        })
        .collect();
    let mut stations = [0, 1].map(|id| Station::new(id, 1));
    for (worker, station) in workers.iter_mut().zip(&mut stations) {
        for (queue, of) in (0..).zip(&station.queues) {
            worker.attach(station.id, queue, of.ring.open(F_VERSION_1 | F_MERGEABLE));
        }
        station.fill();
    }
    for number in 0..200u32 {
        for (here, there) in [(0, 1), (1, 0)] {
            let (to, from) = (mac(there + 1), mac(here + 1));
            let roamer = Mac([2, 1, 0, here, 0, number as u8]);
            let station = &mut stations[usize::from(here)];
            station.send(&frame(to, from, 60 + 7 * number as usize, 1));
            station.send(&frame(Mac::BROADCAST, roamer, 60, 2));
        }
        let before = ALLOCATIONS.get();
        let now_ns = u64::from(number) * SECOND_NS;
        let mut taken = 0;
        for _ in 0..3 {
            taken += workers.iter_mut().map(|worker| worker.turn(now_ns)).sum::<usize>();
        }
        let allocations = ALLOCATIONS.get() - before;
        assert_eq!(taken, 8, "four from guests, four from the other worker");
        assert!(number < 4 || allocations == 0, "{allocations} allocations in round {number}");
        for station in &mut stations {
            assert_eq!(station.received().len(), 2);
        }
    }
}
