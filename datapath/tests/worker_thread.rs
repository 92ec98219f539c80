//! A worker on its own thread while rings come and go, snapshots change and people look: what ThreadSanitizer watches
//! (`scripts/fuzz --tsan`).
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{F_MERGEABLE, F_VERSION_1, Station, frame, mac, network, port};
use dreamwire_datapath::counters::PortCounters;
use dreamwire_datapath::snapshot::{PortId, Snapshot, WorkerId};
use dreamwire_datapath::worker::{Polling, WorkerConfig, WorkerHandle};

const ROUNDS: u64 = 60;
const PORTS: [u16; 3] = [0, 1, 2];

fn snapshot(generation: u64) -> Arc<Snapshot> {
    Arc::new(Snapshot {
        generation,
        ports: PORTS.iter().map(|&id| Some(port(id, 0, 1))).collect(),
        networks: vec![Some(network("blue", &PORTS))],
        ..Snapshot::default()
    })
}

#[test]
fn rings_come_and_go_while_snapshots_change() {
    for polling in [Polling::Poll, Polling::Adaptive, Polling::Interrupt] {
        let worker = WorkerHandle::spawn(WorkerConfig { index: 0, cpu: None, polling }, snapshot(1)).unwrap();
        std::thread::scope(|scope| {
            for id in PORTS {
                let worker = &worker;
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        // Memory of its own each time: the worker must be through with it when it is freed.
                        let station = Station::new(id, 1);
                        for (queue, of) in (0..).zip(&station.queues) {
                            worker.attach(PortId(id), queue, of.ring.open(F_VERSION_1));
                        }
                        for queue in [1, 0] {
                            assert!(worker.detach(PortId(id), queue).is_some(), "it comes back once");
                            assert!(worker.detach(PortId(id), queue).is_none());
                        }
                    }
                });
            }
            scope.spawn(|| (2..ROUNDS).for_each(|generation| worker.publish(snapshot(generation))));
            scope.spawn(|| (0..ROUNDS).for_each(|_| drop((worker.rings(), worker.fdb()))));
        });
        assert!(worker.rings().is_empty());
    }
}

/// Two workers, two ports, frames both ways: all arrive, in order, however often both fall asleep.
#[test]
fn frames_cross_between_workers_in_order_and_wake_them() {
    const FRAMES: u32 = 20_000;
    const WINDOW: u32 = 24;
    for polling in [Polling::Poll, Polling::Adaptive, Polling::Interrupt] {
        let counters: Vec<_> = (0..2).map(|_| [0, 1].map(|_| Arc::new(PortCounters::new(1)))).collect();
        let of_worker = |worker: u16| {
            let ports = [0, 1].map(|id| {
                let mut port = port(id, 0, 1);
                port.worker = WorkerId(id);
                port.counters = Arc::clone(&counters[usize::from(worker)][usize::from(id)]);
                Some(port)
            });
            let mut snapshot = Snapshot {
                generation: 1,
                ports: ports.into(),
                networks: vec![Some(network("blue", &[0, 1]))],
                worker: WorkerId(worker),
                ..Snapshot::default()
            };
            snapshot.divide();
            (WorkerConfig { index: worker, cpu: None, polling }, Arc::new(snapshot))
        };
        let workers = WorkerHandle::spawn_all(vec![of_worker(0), of_worker(1)]).unwrap();
        let mut stations = [Station::new(0, 1), Station::new(1, 1)];
        let mut kicks = Vec::new();
        for (worker, station) in workers.iter().zip(&mut stations) {
            for (queue, of) in (0..).zip(&station.queues) {
                let ring = of.ring.open(F_VERSION_1 | F_MERGEABLE);
                if queue == 1 {
                    kicks.push(ring.kick().unwrap().try_clone().unwrap());
                }
                worker.attach(station.id, queue, ring);
            }
            station.fill();
        }
        // Answered after what was attached: a frame that came before would find no ring.
        workers.iter().for_each(|worker| assert_eq!(worker.rings().len(), 2));
        let deadline = Instant::now() + Duration::from_secs(60);
        let numbered = |to: u8, from: u8, number: u32| {
            let mut frame = frame(mac(to), mac(from), 64, 0);
            frame[14..18].copy_from_slice(&number.to_be_bytes());
            frame
        };
        let (mut sent, mut got) = ([0_u32; 2], [0_u32; 2]);
        while got != [FRAMES; 2] {
            assert!(Instant::now() < deadline, "{polling:?}: {sent:?} sent, {got:?} came");
            for here in 0..2 {
                let there = 1 - here;
                while sent[here] < FRAMES && sent[here] < got[there] + WINDOW {
                    stations[here].send(&numbered(there as u8 + 1, here as u8 + 1, sent[here]));
                    sent[here] += 1;
                }
                kicks[here].signal().unwrap();
                for frame in stations[here].received() {
                    assert_eq!(frame, numbered(here as u8 + 1, there as u8 + 1, got[here]), "{polling:?}");
                    got[here] += 1;
                }
            }
        }
        let total = |of: fn(&PortCounters) -> u64| counters.iter().flatten().map(|port| of(port)).sum::<u64>();
        assert_eq!(total(|port| port.rx().0), 2 * u64::from(FRAMES));
        assert_eq!(total(|port| port.drops.total()), 0);
        for (worker, station) in workers.iter().zip(&stations) {
            assert!([0, 1].iter().all(|&queue| worker.detach(station.id, queue).is_some()));
            assert!(worker.counters().handoff_tx.get() >= u64::from(FRAMES) - 1);
        }
    }
}

/// Asleep it wants to be kicked; awake it does not.
#[test]
fn a_worker_that_was_woken_asks_for_no_more_kicks() {
    let config = WorkerConfig { index: 0, cpu: None, polling: Polling::Adaptive };
    let worker = WorkerHandle::spawn(config, snapshot(1)).unwrap();
    let mut stations = [Station::new(0, 1), Station::new(1, 1)];
    let mut kicks = Vec::new();
    for station in &mut stations {
        for (queue, of) in (0..).zip(&station.queues) {
            let ring = of.ring.open(F_VERSION_1 | F_MERGEABLE);
            kicks.push(ring.kick().unwrap().try_clone().unwrap());
            worker.attach(station.id, queue, ring);
        }
        station.fill();
    }
    let wants_kicks = |station: &Station| {
        let ring = &station.queues[1].ring;
        ring.guest.read_u16(ring.used) == 0
    };
    for _ in 0..3 {
        until("it sleeps, and wants to be kicked", || wants_kicks(&stations[0]));
        until("it is awake, and does not", || {
            stations[0].send(&frame(mac(2), mac(1), 64, 0));
            kicks[1].signal().unwrap();
            until("a frame comes", || stations[1].received().len() == 1);
            !wants_kicks(&stations[0])
        });
    }
}

#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
    }
}
