//! What one frame costs a worker, with guests in the same thread: no other core, so nothing but instructions and warm caches.
//!
//! ```text
//! DREAMWIRE_TURN_ROUNDS=200000 cargo test --release -p dreamwire-datapath --test turn_cost -- --nocapture
//! ```
//! Only the turns are timed, not the guests. The quickest of many slices is shown: what disturbs a machine only adds.

mod common;

use std::time::Instant;

use common::policy::with_policy;
use common::scene::{Scene, THEIRS};
use common::*;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::snapshot::PortId;

/// Rounds over which one slice is averaged.
const SLICE: u32 = 64;

fn rounds() -> u32 {
    std::env::var("DREAMWIRE_TURN_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2 * SLICE)
}

/// Two guests whose drivers poll: with EVENT_IDX, so that they are not notified of each burst.
fn polling_guests(queue_pairs: u16) -> Lan {
    let mut lan = Lan::new(2, queue_pairs);
    for station in 0..2 {
        (0..2 * queue_pairs).for_each(|queue| lan.change_ring(station, queue, |setup| setup.features |= F_EVENT_IDX));
    }
    lan
}

/// The quickest slice of turns, in ns per frame. `frames` are sent by station 0 in turns, a ring full in every round but for the
/// last of each lap.
fn cost(lan: &mut Lan, frames: &[Vec<u8>]) -> f64 {
    lan.send(1, &frame(Mac::BROADCAST, lan.stations[1].mac(), 60, 0));
    lan.received(0);
    let mut best = f64::MAX;
    let mut rounds_of_frames = frames.chunks(usize::from(RING_SIZE)).cycle();
    for _ in 0..rounds() / SLICE {
        let (mut spent, mut sent) = (0, 0);
        for _ in 0..SLICE {
            let frames = rounds_of_frames.next().expect("endless");
            frames.iter().for_each(|frame| lan.stations[0].send(frame));
            lan.now_ns += lan.step_ns;
            let start = Instant::now();
            let taken = lan.run();
            spent += start.elapsed().as_nanos();
            sent += frames.len();
            assert_eq!(taken, frames.len());
            assert_eq!(lan.received(1).len(), frames.len());
        }
        best = best.min(spent as f64 / sent as f64);
    }
    best
}

#[test]
fn a_frame_from_guest_to_guest() {
    for bytes in [64, 512, 1514] {
        let mut lan = polling_guests(1);
        let (to, from) = (lan.stations[1].mac(), lan.stations[0].mac());
        let mut udp = udp(to, from, 7);
        udp.resize(bytes, 0);
        let frames = vec![udp; usize::from(RING_SIZE)];
        println!("guest to guest, {bytes} B: {:.1} ns a frame", cost(&mut lan, &frames));
    }
}

/// Which queue a frame goes into is found out for each; those in a row for one queue go there together.
#[test]
fn a_frame_to_a_guest_with_two_queue_pairs() {
    for flows in [1, 2, 1000] {
        let mut lan = polling_guests(2);
        let (to, from) = (lan.stations[1].mac(), lan.stations[0].mac());
        let count = flows.max(usize::from(RING_SIZE));
        let frames: Vec<_> = (0..count).map(|n| udp(to, from, (n % flows) as u16)).collect();
        println!("{flows} flows to a guest with two queue pairs, 60 B: {:.1} ns a frame", cost(&mut lan, &frames));
    }
}

#[test]
fn two_guests_among_many() {
    let mut lan = Lan::new(128, 1);
    let (to, from) = (lan.stations[1].mac(), lan.stations[0].mac());
    let frames = vec![udp(to, from, 7); usize::from(RING_SIZE)];
    println!("guest to guest among 128, 60 B: {:.1} ns a frame", cost(&mut lan, &frames));
}

#[test]
fn flows_with_and_without_policy() {
    for policed in [false, true] {
        for flows in [1, 1000, 100_000] {
            let mut lan = polling_guests(1);
            if policed {
                with_policy(&mut lan, 131_072);
            }
            let (to, from) = (lan.stations[1].mac(), lan.stations[0].mac());
            let count = flows.max(usize::from(RING_SIZE));
            let frames: Vec<_> = (0..count)
                .map(|n| {
                    let mut frame = udp(to, from, (n % flows) as u16);
                    frame[36..40].copy_from_slice(&[0, ((n % flows) >> 16) as u8, 0, 26]);
                    frame
                })
                .collect();
            let lane = if policed { "with" } else { "without" };
            println!("{flows} flows, {lane} policy: {:.1} ns a frame", cost(&mut lan, &frames));
            // One flow would find its lease to be renewed in one frame of a whole round.
            if policed && flows > 1 {
                // Every frame does: all leases are over now, and a lap takes as long as a lease (1 s). No connection (30 s) ends.
                lan.now_ns += SECOND_NS;
                lan.step_ns = SECOND_NS.div_ceil(count.div_ceil(usize::from(RING_SIZE)) as u64);
                println!("{flows} flows, each lease renewed: {:.1} ns a frame", cost(&mut lan, &frames));
                let mut rows = Vec::with_capacity(1 << 20);
                assert!(!lan.worker.connection_rows(PortId(0), 0, &mut rows), "all in one go");
                let soonest = rows.iter().map(|row| row.expires_in_ns).min();
                assert!(
                    soonest > Some(26 * SECOND_NS),
                    "a connection was not kept alive by its flow's leases: {soonest:?}"
                );
            }
        }
    }
}

/// Every frame begins a connection at both ports. In the first lap at memory that nobody has touched, in later ones where
/// connections have been, and are over.
#[test]
fn frames_that_each_begin_a_flow() {
    const LAPS: u32 = 4;
    let flows = (rounds() * 4).min(1 << 18);
    let mut lan = polling_guests(1);
    with_policy(&mut lan, 1 << 20);
    let (to, from) = (lan.stations[1].mac(), lan.stations[0].mac());
    for lap in 0..LAPS {
        lan.send(1, &frame(Mac::BROADCAST, to, 60, 0));
        lan.received(0);
        let mut slices = vec![];
        for slice in (0..flows).step_by((SLICE * u32::from(RING_SIZE)) as usize) {
            let mut spent = 0;
            for n in (slice..slice + SLICE * u32::from(RING_SIZE)).step_by(usize::from(RING_SIZE)) {
                for n in n..n + u32::from(RING_SIZE) {
                    let mut frame = udp(to, from, n as u16);
                    frame[36..40].copy_from_slice(&[1, (lap << 2 | n >> 16) as u8, 0, 26]);
                    lan.stations[0].send(&frame);
                }
                lan.now_ns += 1000;
                let start = Instant::now();
                assert_eq!(lan.run(), usize::from(RING_SIZE));
                spent += start.elapsed().as_nanos();
                assert_eq!(lan.received(1).len(), usize::from(RING_SIZE));
            }
            slices.push(spent as f64 / f64::from(SLICE * u32::from(RING_SIZE)));
        }
        slices.sort_by(f64::total_cmp);
        println!("new flows, lap {lap}: {:.0} ns a frame (median), {:.0} at best", slices[slices.len() / 2], slices[0]);
        // Connections of UDP last 30 s. Later laps find the places of the first.
        for _ in 0..100_000 {
            lan.now_ns += SECOND_NS / 1000;
            lan.run();
        }
    }
}

/// A guest's frames to a guest of another host, and back.
#[test]
fn a_frame_into_and_out_of_a_tunnel() {
    for bytes in [64, 1514] {
        let there = "192.0.2.2".parse().expect("an address");
        let mut scene = Scene::with("192.0.2.1", "192.0.2.2", |config| config.neighbours = vec![(there, THEIRS)]);
        (0..2).for_each(|queue| scene.lan.change_ring(0, queue, |setup| setup.features |= F_EVENT_IDX));
        let (near, far) = (scene.lan.stations[0].mac(), mac(200));
        let of = |to, from| {
            let mut frame = udp(to, from, 7);
            frame.resize(bytes, 0);
            vec![frame; usize::from(RING_SIZE)]
        };
        let inbound: Vec<_> = of(near, far).iter().map(|inner| scene.outer(inner)).collect();
        let outbound = of(far, near);
        scene.lan.send(0, &frame(Mac::BROADCAST, near, 60, 0));
        scene.wire.received();
        let mut best = [f64::MAX; 2];
        for _ in 0..rounds() / SLICE {
            let mut spent = [0; 2];
            for _ in 0..SLICE {
                inbound.iter().for_each(|packet| scene.wire.send(packet));
                let start = Instant::now();
                assert_eq!(scene.lan.run(), inbound.len());
                spent[0] += start.elapsed().as_nanos();
                assert_eq!(scene.lan.received(0).len(), inbound.len());
                outbound.iter().for_each(|frame| scene.lan.stations[0].send(frame));
                let start = Instant::now();
                assert_eq!(scene.lan.run(), outbound.len());
                spent[1] += start.elapsed().as_nanos();
                assert_eq!(scene.wire.received().len(), outbound.len());
            }
            let frames = f64::from(SLICE * u32::from(RING_SIZE));
            best.iter_mut().zip(spent).for_each(|(best, spent)| *best = best.min(spent as f64 / frames));
        }
        println!("tunnel, {bytes} B inside: out of it {:.1} ns a frame, into it {:.1} ns", best[0], best[1]);
    }
}
