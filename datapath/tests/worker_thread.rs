//! A worker on its own thread while rings come and go, snapshots change and people look: what ThreadSanitizer watches
//! (`scripts/fuzz --tsan`).
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::Arc;

use common::{F_VERSION_1, Station, network, port};
use dreamwire_datapath::snapshot::{PortId, Snapshot};
use dreamwire_datapath::worker::{Polling, WorkerConfig, WorkerHandle};

const ROUNDS: u64 = 60;
const PORTS: [u16; 3] = [0, 1, 2];

fn snapshot(generation: u64) -> Arc<Snapshot> {
    Arc::new(Snapshot {
        generation,
        ports: PORTS.iter().map(|&id| Some(port(id, 0, 1))).collect(),
        networks: vec![Some(network("blue", &PORTS))],
        ..Default::default()
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
