//! Guests in plain memory around one worker whose turns are run by hand.
#![allow(dead_code, reason = "each test binary uses a part of it")]

#[path = "../../../vhost/tests/common/mod.rs"]
mod guest;
pub(crate) mod policy;
pub(crate) mod scene;
pub(crate) mod veth;

use std::collections::BTreeMap;
use std::sync::Arc;

use dreamwire_datapath::counters::{Drops, NetworkCounters, PortCounters, WorkerCounters};
use dreamwire_datapath::drop_reason::DropReason;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::snapshot::{Network, NetworkId, Port, PortId, Snapshot, WorkerId};
use dreamwire_datapath::worker::Worker;
use dreamwire_vhost::ring::{Ring, RingSetup};
#[allow(unused_imports, reason = "each test binary uses a part of it")]
pub(crate) use guest::{F_EVENT_IDX, F_MERGEABLE, F_VERSION_1, Guest, GuestRing, NEXT, WRITE};

pub(crate) const RING_SIZE: u16 = 64;
/// One buffer per descriptor.
const BUFFER_BYTES: u64 = 2048;
const BUFFERS: u64 = 0x8_0000;
pub(crate) const NET_HEADER: [u8; 12] = [0; 12];

/// The address of station `number`.
pub(crate) fn mac(number: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, number])
}

/// A frame of `bytes` bytes whose every byte depends on its place and `seed`.
pub(crate) fn frame(to: Mac, from: Mac, bytes: usize, seed: u8) -> Vec<u8> {
    let mut frame: Vec<u8> =
        (0..bytes).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed).collect();
    frame[..6].copy_from_slice(&to.0);
    frame[6..12].copy_from_slice(&from.0);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

/// An IPv4 UDP frame of flow `port`.
pub(crate) fn udp(to: Mac, from: Mac, port: u16) -> Vec<u8> {
    let mut udp = frame(to, from, 60, 0);
    udp[12..14].copy_from_slice(&[8, 0]);
    udp[14..34].copy_from_slice(&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    udp[34..36].copy_from_slice(&port.to_be_bytes());
    udp
}

/// One guest's queue: its ring and the driver's place in it.
#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) ring: GuestRing,
    buffers: u64,
    seen: u16,
}

impl Queue {
    fn new(guest: &Guest, queue: u16) -> Self {
        let ring = GuestRing::new(guest, 0x4000 * u64::from(queue), RING_SIZE, 0);
        let buffers = BUFFERS + u64::from(queue) * BUFFER_BYTES * u64::from(RING_SIZE);
        Self { ring, buffers, seen: 0 }
    }

    fn buffer(&self, head: u16) -> u64 {
        self.buffers + BUFFER_BYTES * u64::from(head)
    }

    /// Posts one buffer to be written to.
    pub(crate) fn post_buffer(&mut self, bytes: u32) {
        let head = self.ring.available_index % RING_SIZE;
        self.ring.descriptor(head, self.buffer(head), bytes, WRITE, 0);
        self.ring.post(head);
    }

    /// Posts a frame with its net header, in one buffer.
    pub(crate) fn post_frame(&mut self, net: &[u8; 12], frame: &[u8]) {
        let head = self.ring.available_index % RING_SIZE;
        self.ring.guest.write(self.buffer(head), net);
        self.ring.guest.write(self.buffer(head) + 12, frame);
        self.ring.descriptor(head, self.buffer(head), 12 + frame.len() as u32, 0, 0);
        self.ring.post(head);
    }

    /// The frames that have come, each from one buffer.
    fn frames(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while self.seen != self.ring.used_index() {
            let (head, bytes) = self.ring.used_entry(self.seen);
            let written = self.ring.guest.read(self.buffer(head as u16), bytes as usize);
            assert_eq!(written[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "no offloads, one buffer");
            frames.push(written[12..].to_vec());
            self.seen = self.seen.wrapping_add(1);
        }
        frames
    }
}

/// A guest with one card.
#[derive(Debug)]
pub(crate) struct Station {
    pub(crate) id: PortId,
    /// Even: receiveqs; odd: transmitqs.
    pub(crate) queues: Vec<Queue>,
}

impl Station {
    pub(crate) fn new(id: u16, queue_pairs: u16) -> Self {
        let guest = Guest::new(&[(0, 0x8_0000), (0x8_0000, 0x18_0000)]);
        Self { id: PortId(id), queues: (0..2 * queue_pairs).map(|queue| Queue::new(&guest, queue)).collect() }
    }

    pub(crate) fn mac(&self) -> Mac {
        mac(self.id.0 as u8 + 1)
    }

    pub(crate) fn send(&mut self, frame: &[u8]) {
        self.queues[1].post_frame(&NET_HEADER, frame);
    }

    /// What has come since the last call, queue by queue; its buffers are posted again.
    pub(crate) fn received(&mut self) -> Vec<Vec<u8>> {
        self.received_by_queue().concat()
    }

    pub(crate) fn received_by_queue(&mut self) -> Vec<Vec<Vec<u8>>> {
        let receiveqs = self.queues.iter_mut().step_by(2);
        receiveqs
            .map(|queue| {
                let frames = queue.frames();
                frames.iter().for_each(|_| queue.post_buffer(BUFFER_BYTES as u32));
                frames
            })
            .collect()
    }

    /// Posts all buffers.
    pub(crate) fn fill(&mut self) {
        for queue in self.queues.iter_mut().step_by(2) {
            (0..RING_SIZE).for_each(|_| queue.post_buffer(BUFFER_BYTES as u32));
        }
    }
}

/// Ports in network 0, one worker.
pub(crate) struct Lan {
    pub(crate) worker: Worker,
    pub(crate) counters: Arc<WorkerCounters>,
    pub(crate) snapshot: Snapshot,
    pub(crate) stations: Vec<Station>,
    pub(crate) now_ns: u64,
    /// By how much benchmarks have it go on in each round.
    pub(crate) step_ns: u64,
    before: BTreeMap<String, u64>,
}

pub(crate) const SECOND_NS: u64 = 1_000_000_000;
pub(crate) const AGE_NS: u64 = 300 * SECOND_NS;
pub(crate) const MTU: u16 = 1500;

pub(crate) fn network(name: &str, ports: &[u16]) -> Network {
    Network {
        name: name.into(),
        mtu: MTU,
        ports: ports.iter().map(|&id| PortId(id)).collect(),
        hear_unknown: ports.iter().map(|&id| PortId(id)).collect(),
        beyond: Default::default(),
        static_macs: Default::default(),
        learning: true,
        age_ns: AGE_NS,
        tunnel: None,
        counters: Arc::<NetworkCounters>::default(),
    }
}

pub(crate) fn port(id: u16, network: u16, queue_pairs: u16) -> Port {
    Port {
        name: format!("p{id}").into(),
        network: NetworkId(network),
        mac: None,
        guard: None,
        policy: None,
        group: 0,
        identity: None,
        queue_pairs,
        worker: WorkerId(0),
        counters: Arc::new(PortCounters::new(queue_pairs)),
    }
}

impl Lan {
    /// `ports` ports with `queue_pairs` queue pairs each, attached, their guests ready.
    pub(crate) fn new(ports: u16, queue_pairs: u16) -> Self {
        let ids: Vec<u16> = (0..ports).collect();
        let snapshot = Snapshot {
            generation: 1,
            ports: ids.iter().map(|&id| Some(port(id, 0, queue_pairs))).collect(),
            networks: vec![Some(network("blue", &ids))],
            ..Snapshot::default()
        };
        let mut lan = Self::without_rings(snapshot);
        for id in ids {
            lan.stations.push(Station::new(id, queue_pairs));
            lan.attach(usize::from(id), F_VERSION_1 | F_MERGEABLE);
        }
        lan
    }

    pub(crate) fn without_rings(snapshot: Snapshot) -> Self {
        let counters = Arc::<WorkerCounters>::default();
        let worker = Worker::new(Arc::new(copy(&snapshot)), Arc::clone(&counters));
        let mut lan =
            Self { worker, counters, snapshot, stations: vec![], now_ns: 0, step_ns: 0, before: BTreeMap::new() };
        lan.before = lan.totals();
        lan
    }

    /// Attaches all rings of a station and posts its buffers.
    pub(crate) fn attach(&mut self, station: usize, features: u64) {
        let station = &mut self.stations[station];
        for (number, queue) in station.queues.iter().enumerate() {
            self.worker.attach(station.id, number as u16, queue.ring.open(features));
        }
        station.fill();
    }

    /// Takes a ring from the worker, lets `change` change it and gives it back.
    pub(crate) fn change_ring(&mut self, station: usize, queue: u16, change: impl FnOnce(&mut RingSetup)) {
        let id = self.stations[station].id;
        let mut setup = self.worker.detach(id, queue).expect("an attached ring").into_setup();
        change(&mut setup);
        self.worker.attach(id, queue, Ring::new(setup).expect("a sound ring"));
    }

    /// Makes the snapshot as it stands here the worker's.
    pub(crate) fn publish(&mut self) {
        self.snapshot.generation += 1;
        drop(self.worker.adopt(Arc::new(copy(&self.snapshot))));
    }

    pub(crate) fn network(&mut self, id: usize) -> &mut Network {
        self.snapshot.networks[id].as_mut().expect("a network")
    }

    /// Turns until nothing moves; returns the number of frames taken.
    pub(crate) fn run(&mut self) -> usize {
        let mut taken = 0;
        loop {
            match self.worker.turn(self.now_ns) {
                0 => return taken,
                moved => taken += moved,
            }
        }
    }

    pub(crate) fn send(&mut self, station: usize, frame: &[u8]) {
        self.stations[station].send(frame);
        assert_eq!(self.run(), 1);
    }

    pub(crate) fn received(&mut self, station: usize) -> Vec<Vec<u8>> {
        self.stations[station].received()
    }

    /// All counters of frames and bytes that are not zero, by name.
    fn totals(&self) -> BTreeMap<String, u64> {
        let mut totals = BTreeMap::new();
        for (id, port) in self.snapshot.ports.iter().enumerate().filter_map(|(id, port)| Some((id, port.as_ref()?))) {
            let (rx, tx) = (port.counters.rx(), port.counters.tx());
            for (name, value) in [("rx", rx.0), ("rx_bytes", rx.1), ("tx", tx.0), ("tx_bytes", tx.1)] {
                totals.insert(format!("p{id} {name}"), value);
            }
            totals.insert(format!("p{id} originated"), port.counters.originated.get());
            add_drops(&mut totals, &format!("p{id}"), &port.counters.drops);
        }
        for network in self.snapshot.networks.iter().flatten() {
            let (name, counters) = (&network.name, &network.counters);
            totals.insert(format!("{name} copies"), counters.flood_copies.get());
            totals.insert(format!("{name} tunnel_rx"), counters.tunnel_rx.frames.get());
            totals.insert(format!("{name} tunnel_tx"), counters.tunnel_tx.frames.get());
            totals.insert(format!("{name} learn_refused"), counters.learn_refused.get());
            add_drops(&mut totals, name, &counters.drops);
        }
        totals
    }

    /// Asserts that exactly these counters moved since the last call, by so much, and that no frame was lost.
    #[track_caller]
    pub(crate) fn assert_moved(&mut self, expected: &[(&str, u64)]) {
        let now = self.totals();
        let before = |name: &str| self.before.get(name).copied().unwrap_or(0);
        let moved: BTreeMap<_, _> = now
            .iter()
            .map(|(name, value)| (name.as_str(), value - before(name)))
            .filter(|(_, moved)| *moved > 0)
            .collect();
        assert_eq!(moved, expected.iter().copied().collect());
        let sum = |ends: &[&str]| -> u64 {
            now.iter().filter(|(name, _)| ends.iter().any(|end| name.ends_with(end))).map(|(_, value)| value).sum()
        };
        let dropped: u64 = now.iter().filter(|(name, _)| name.contains(" drop ")).map(|(_, value)| value).sum();
        assert_eq!(
            sum(&[" rx", " tunnel_rx", " originated", " copies"]),
            sum(&[" tx", " tunnel_tx"]) + dropped,
            "{now:?}"
        );
        self.before = now;
    }
}

fn add_drops(totals: &mut BTreeMap<String, u64>, name: &str, drops: &Drops) {
    for reason in DropReason::ALL {
        totals.insert(format!("{name} drop {}", reason.name()), drops.get(reason));
    }
}

/// The same configuration and the same counters, as the control thread builds it anew.
fn copy(snapshot: &Snapshot) -> Snapshot {
    Snapshot {
        generation: snapshot.generation,
        ports: snapshot.ports.clone(),
        networks: snapshot.networks.clone(),
        by_vni: snapshot.by_vni.clone(),
        policy_generation: snapshot.policy_generation,
        has_policies: snapshot.has_policies,
        rules: snapshot.rules.clone(),
        worker: snapshot.worker,
        uplinks: snapshot.uplinks.clone(),
    }
}

/// Ports that know each other: unicast from the first frame on.
pub(crate) fn acquainted(ports: u16, queue_pairs: u16) -> Lan {
    let mut lan = Lan::new(ports, queue_pairs);
    for id in 0..ports {
        lan.network(0).static_macs.insert(mac(id as u8 + 1), PortId(id));
    }
    lan.publish();
    lan
}
