//! Two workers whose turns are run by hand: frames for the other's ports, learned addresses, a port that moves.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::sync::Arc;

use common::*;
use dreamwire_datapath::counters::{NetworkCounters, PortCounters, WorkerCounters};
use dreamwire_datapath::drop_reason::DropReason;
use dreamwire_datapath::fdb::Location;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::perimeter::{Perimeter, PerimeterLimits};
use dreamwire_datapath::snapshot::{PortId, PortPolicy, Snapshot, WorkerId};
use dreamwire_datapath::worker::{Links, Worker};
use dreamwire_policy::{Classifier, Policy, Posture};

const PORTS: [u16; 4] = [0, 1, 2, 3];

/// Four ports in one network: even ones at worker 0, odd ones at worker 1.
struct Pair {
    workers: Vec<Worker>,
    counters: Vec<Arc<WorkerCounters>>,
    ports: Vec<Vec<Arc<PortCounters>>>,
    networks: Vec<Arc<NetworkCounters>>,
    stations: Vec<Station>,
    owners: [u16; 4],
    /// Has a port whose network lets nothing in.
    closed: Option<u16>,
    generation: u64,
    now_ns: u64,
}

impl Pair {
    fn new() -> Self {
        let counters: Vec<Arc<WorkerCounters>> = vec![Arc::default(), Arc::default()];
        let mut pair = Self {
            workers: Vec::new(),
            counters,
            ports: PORTS.map(|_| vec![Arc::new(PortCounters::new(1)), Arc::new(PortCounters::new(1))]).into(),
            networks: vec![Arc::default(), Arc::default()],
            stations: PORTS.map(|id| Station::new(id, 1)).into(),
            owners: [0, 1, 0, 1],
            closed: None,
            generation: 1,
            now_ns: 0,
        };
        for (worker, links) in (0..).zip(Links::mesh(2).unwrap()) {
            let counters = Arc::clone(&pair.counters[usize::from(worker)]);
            pair.workers.push(Worker::linked(pair.snapshot(worker), counters, links));
        }
        for id in 0..4 {
            pair.attach(id);
            pair.stations[id].fill();
        }
        pair
    }

    fn snapshot(&self, worker: u16) -> Arc<Snapshot> {
        let mut blue = network("blue", &PORTS);
        blue.counters = Arc::clone(&self.networks[usize::from(worker)]);
        let ports = PORTS.map(|id| {
            let mut port = port(id, 0, 1);
            port.worker = WorkerId(self.owners[usize::from(id)]);
            port.counters = Arc::clone(&self.ports[usize::from(id)][usize::from(worker)]);
            port.policy = (self.closed == Some(id)).then(|| {
                let classifier = Classifier::compile(&Policy::default(), Posture::Enforced, &[]);
                PortPolicy { classifier: Arc::new(classifier), meters: Default::default() }
            });
            Some(port)
        });
        let mut snapshot = Snapshot {
            generation: self.generation,
            ports: ports.into(),
            networks: vec![Some(blue)],
            worker: WorkerId(worker),
            has_policies: self.closed.is_some(),
            ..Snapshot::default()
        };
        snapshot.divide();
        Arc::new(snapshot)
    }

    fn attach(&mut self, id: usize) {
        let worker = &mut self.workers[usize::from(self.owners[id])];
        for (number, queue) in (0..).zip(&self.stations[id].queues) {
            worker.attach(PortId(id as u16), number, queue.ring.open(F_VERSION_1 | F_MERGEABLE));
        }
    }

    /// Has these workers know how things are now.
    fn adopt<const N: usize>(&mut self, workers: [u16; N]) {
        self.generation += 1;
        for worker in workers {
            let snapshot = self.snapshot(worker);
            drop(self.workers[usize::from(worker)].adopt(snapshot));
        }
    }

    /// Turns of both until nothing moves.
    fn run(&mut self) {
        while self.workers.iter_mut().map(|worker| worker.turn(self.now_ns)).sum::<usize>() > 0 {}
    }

    fn send(&mut self, id: usize, frame: &[u8]) {
        self.stations[id].send(frame);
        self.run();
    }

    fn received(&mut self) -> [Vec<Vec<u8>>; 4] {
        [0, 1, 2, 3].map(|id| self.stations[id].received())
    }

    fn location(&self, worker: usize, of: Mac) -> Option<Location> {
        self.workers[worker].fdb_rows().iter().find(|row| row.mac == of).map(|row| row.location)
    }

    fn dropped(&self, reason: DropReason) -> u64 {
        let ports = self.ports.iter().flatten().map(|counters| counters.drops.get(reason)).sum::<u64>();
        ports + self.networks.iter().map(|counters| counters.drops.get(reason)).sum::<u64>()
    }

    /// received + originated + copied = sent + dropped, over both.
    #[track_caller]
    fn assert_conserved(&self) {
        let mut balance = 0;
        for counters in self.ports.iter().flatten() {
            balance += counters.rx().0 as i64 + counters.originated.get() as i64;
            balance -= counters.tx().0 as i64 + counters.drops.total() as i64;
        }
        for counters in &self.networks {
            balance += counters.flood_copies.get() as i64 - counters.drops.total() as i64;
        }
        for counters in &self.counters {
            balance -= counters.handoff_removed.get() as i64;
        }
        assert_eq!(balance, 0);
        let sum = |of: fn(&WorkerCounters) -> u64| self.counters.iter().map(|counters| of(counters)).sum::<u64>();
        assert_eq!(sum(|counters| counters.handoff_tx.get()), sum(|counters| counters.handoff_rx.get()));
    }
}

#[test]
fn a_flood_reaches_everybody_once_and_an_answer_its_station_alone() {
    let mut pair = Pair::new();
    let question = frame(Mac::BROADCAST, mac(1), 300, 1);
    pair.send(0, &question);
    assert_eq!(pair.received(), [vec![], vec![question.clone()], vec![question.clone()], vec![question]]);
    // One copy to port 2, one to the other worker, which makes one more of it.
    assert_eq!(pair.networks.iter().map(|counters| counters.flood_copies.get()).collect::<Vec<_>>(), [1, 1]);
    let answer = frame(mac(1), mac(2), 100, 2);
    pair.send(1, &answer);
    assert_eq!(pair.received(), [vec![answer], vec![], vec![], vec![]]);
    assert_eq!(pair.counters.iter().map(|counters| counters.handoff_tx.get()).collect::<Vec<_>>(), [1, 1]);
    // Each knows what the other has learned.
    for worker in 0..2 {
        assert_eq!(pair.location(worker, mac(1)), Some(Location::Port(PortId(0))));
        assert_eq!(pair.location(worker, mac(2)), Some(Location::Port(PortId(1))));
    }
    pair.assert_conserved();
}

#[test]
fn frames_of_every_length_cross_whole_and_in_order() {
    let mut pair = Pair::new();
    pair.send(1, &frame(Mac::BROADCAST, mac(2), 60, 0));
    pair.received();
    for lengths in (60..=1514).collect::<Vec<_>>().chunks(usize::from(RING_SIZE)) {
        let sent: Vec<_> = lengths.iter().map(|&length| frame(mac(2), mac(1), length, length as u8)).collect();
        sent.iter().for_each(|frame| pair.stations[0].send(frame));
        pair.run();
        assert_eq!(pair.received(), [vec![], sent, vec![], vec![]]);
    }
    pair.assert_conserved();
}

#[test]
fn a_link_that_is_not_emptied_drops_and_counts_and_goes_on() {
    let mut pair = Pair::new();
    pair.send(1, &frame(Mac::BROADCAST, mac(2), 60, 0));
    pair.received();
    // The other worker does not turn: 32 parcels are under way, one each turn.
    let sent: Vec<_> = (0..40).map(|number| frame(mac(2), mac(1), 100, number)).collect();
    for frame in &sent {
        pair.stations[0].send(frame);
        assert_eq!(pair.workers[0].turn(0), 1);
    }
    assert_eq!(pair.dropped(DropReason::HandoffFull), 8);
    assert_eq!(pair.networks[0].drops.get(DropReason::HandoffFull), 8);
    pair.run();
    assert_eq!(pair.received()[1], sent[..32]);
    pair.assert_conserved();
    let later = frame(mac(2), mac(1), 100, 99);
    pair.send(0, &later);
    assert_eq!(pair.received()[1], [later]);
    pair.assert_conserved();
}

#[test]
fn a_station_that_moves_between_workers_is_at_its_newest_place_everywhere() {
    let mut pair = Pair::new();
    let roamer = mac(77);
    for (at, port) in [0, 1, 3, 2, 1].into_iter().enumerate() {
        pair.now_ns += 1000;
        pair.send(port, &frame(Mac::BROADCAST, roamer, 60, at as u8));
        for worker in 0..2 {
            assert_eq!(pair.location(worker, roamer), Some(Location::Port(PortId(port as u16))), "{port}");
        }
    }
    // Both at once: whichever they settle on, it is the same.
    pair.stations[0].send(&frame(Mac::BROADCAST, roamer, 60, 90));
    pair.stations[1].send(&frame(Mac::BROADCAST, roamer, 60, 91));
    pair.run();
    assert_eq!(pair.location(0, roamer), pair.location(1, roamer));
    pair.received();
    pair.assert_conserved();
}

#[test]
fn a_port_moves_and_what_is_under_way_is_counted() {
    let mut pair = Pair::new();
    pair.send(1, &frame(Mac::BROADCAST, mac(2), 60, 0));
    pair.received();
    // Two frames are under way to port 1 when its rings are taken from worker 1.
    for number in 0..2 {
        pair.stations[0].send(&frame(mac(2), mac(1), 60, number));
    }
    pair.workers[0].turn(0);
    let rings = [0, 1].map(|queue| pair.workers[1].detach(PortId(1), queue).unwrap());
    pair.owners[1] = 0;
    pair.adopt([0, 1]);
    assert_eq!(pair.ports[1][1].drops.get(DropReason::PortDown), 2);
    for (queue, ring) in (0..).zip(rings) {
        assert!(pair.workers[0].attach(PortId(1), queue, ring).is_none());
    }
    // To it and from it, in its old and new neighbourhood.
    let (near, far) = (frame(mac(2), mac(1), 60, 5), frame(mac(2), mac(4), 60, 6));
    pair.send(0, &near);
    pair.send(3, &far);
    let everybody = frame(Mac::BROADCAST, mac(2), 60, 7);
    pair.send(1, &everybody);
    assert_eq!(pair.received(), [vec![everybody.clone()], vec![near, far], vec![everybody.clone()], vec![everybody]]);
    assert_eq!(pair.ports[1].iter().map(|counters| counters.rx().0).collect::<Vec<_>>(), [1, 1]);
    pair.assert_conserved();
}

/// While a port moves, its rings are at one worker and its policy's judge is another.
#[test]
fn what_no_worker_has_judged_reaches_no_port_that_moves() {
    let mut pair = Pair::new();
    pair.send(1, &frame(Mac::BROADCAST, mac(2), 60, 0));
    pair.received();
    pair.closed = Some(1);
    pair.adopt([0, 1]);
    pair.owners[1] = 0;
    pair.adopt([1]);
    // Worker 0 does not know yet; worker 1 does, and has the rings still.
    pair.send(0, &frame(mac(2), mac(1), 60, 1));
    assert_eq!((pair.dropped(DropReason::Removed), pair.dropped(DropReason::NoPerimeter)), (1, 0));
    pair.adopt([0]);
    for id in [0, 2, 3] {
        pair.send(id, &frame(mac(2), mac(id as u8 + 1), 60, 2));
        pair.send(id, &frame(Mac::BROADCAST, mac(id as u8 + 1), 60, 3));
    }
    assert_eq!(pair.received()[1], Vec::<Vec<u8>>::new());
    // Worker 0 has nothing to hold the port to its policy with: it is closed.
    assert_eq!(pair.ports[1][0].drops.get(DropReason::NoPerimeter), 6);
    pair.assert_conserved();
}

/// Leases go with a port to a worker whose epochs are others: whatever these are, a station that has moved meanwhile is found.
#[test]
fn a_lease_of_one_worker_does_not_hold_at_another() {
    let datagram = |to: u8, from: u8| {
        let mut datagram = udp(mac(to), mac(from), 4000);
        datagram[26..34].copy_from_slice(&[10, 0, 0, from, 10, 0, 0, to]);
        datagram[36..40].copy_from_slice(&[0, 53, 0, 26]);
        datagram
    };
    for ahead in 0..32 {
        let mut pair = Pair::new();
        pair.closed = Some(1);
        (0..16).for_each(|_| pair.adopt([1]));
        let perimeter = Perimeter::new(PerimeterLimits::default(), 7);
        assert!(pair.workers[1].guard(PortId(1), Some(Box::new(perimeter))).is_none());
        pair.send(3, &frame(Mac::BROADCAST, mac(9), 60, 0));
        pair.received();
        (0..2).for_each(|_| pair.send(1, &datagram(9, 2)));
        assert_eq!(pair.received()[3].len(), 2);
        let rings = [0, 1].map(|queue| pair.workers[1].detach(PortId(1), queue).unwrap());
        let perimeter = pair.workers[1].guard(PortId(1), None);
        pair.owners[1] = 0;
        pair.adopt([0, 1]);
        pair.workers[0].guard(PortId(1), perimeter);
        for (queue, ring) in (0..).zip(rings) {
            pair.workers[0].attach(PortId(1), queue, ring);
        }
        pair.now_ns += 1000;
        pair.send(0, &frame(Mac::BROADCAST, mac(9), 60, 1));
        (0..ahead).for_each(|_| pair.adopt([0]));
        pair.received();
        pair.send(1, &datagram(9, 2));
        assert_eq!(pair.received().map(|frames| frames.len()), [1, 0, 0, 0], "{ahead}");
    }
}
