//! What a 64-byte frame costs a ring of either layout, the guest in the same thread: no other core, so nothing but instructions
//! and warm caches.
//!
//! ```text
//! DREAMWIRE_TURN_ROUNDS=20000 cargo test --release -p dreamwire-vhost --test ring_cost -- --nocapture
//! ```
//! Only the device's calls are timed. The quickest of many slices is shown: what disturbs a machine only adds.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Instant;

use common::packed::{EVENT_DISABLE, PackedGuestRing};
use common::*;
use dreamwire_vhost::frame::{Bare, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{BURST, Ring};

const SIZE: u16 = 256;
const BUFFERS: u64 = 0x1_0000;
const FRAME_BYTES: u32 = 64;
/// Bursts over which one slice is averaged.
const SLICE: u32 = 64;

/// A driver that posts a buffer for each of its ring's places in turn, and takes back what was used.
trait Driver {
    fn post(&mut self, number: u16, bytes: u32, flags: u16);
    /// How many were used since the last call.
    fn used(&mut self) -> usize;
}

fn buffer(number: u16) -> u64 {
    BUFFERS + (2048 + 64) * u64::from(number % SIZE)
}

struct Split(GuestRing, u16);

impl Driver for Split {
    fn post(&mut self, number: u16, bytes: u32, flags: u16) {
        self.0.descriptor(number % SIZE, buffer(number), bytes, flags, 0);
        self.0.post(number % SIZE);
    }

    fn used(&mut self) -> usize {
        let used = self.0.used_index();
        usize::from(used.wrapping_sub(std::mem::replace(&mut self.1, used)))
    }
}

struct Packed(PackedGuestRing, bool);

impl Driver for Packed {
    fn post(&mut self, number: u16, bytes: u32, flags: u16) {
        self.0.post(number % SIZE, &[(buffer(number), bytes, flags)]);
    }

    fn used(&mut self) -> usize {
        // In order, a burst that was sent has one used descriptor, which stands for all of it.
        let (in_order, mut used) = (self.1, 0);
        while let Some((id, _)) = self.0.reap(|_| if in_order { BURST as u16 } else { 1 }) {
            used += if in_order { BURST } else { 1 };
            assert!(id < SIZE);
        }
        used
    }
}

/// The quickest slice of bursts, in ns a frame.
fn cost(driver: &mut impl Driver, bytes: u32, flags: u16, mut serve: impl FnMut()) -> f64 {
    let rounds = std::env::var("DREAMWIRE_TURN_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(2 * SLICE);
    let (mut best, mut number) = (f64::MAX, 0u16);
    for _ in 0..rounds / SLICE {
        let mut spent = 0;
        for _ in 0..SLICE {
            for _ in 0..BURST {
                driver.post(number, bytes, flags);
                number = (number + 1) % SIZE;
            }
            let start = Instant::now();
            serve();
            spent += start.elapsed().as_nanos();
            assert_eq!(driver.used(), BURST);
        }
        best = best.min(spent as f64 / f64::from(SLICE * BURST as u32));
    }
    best
}

fn receive(ring: &mut Ring, frames: &mut [RawFrame]) {
    assert_eq!(ring.receive(frames), Ok(BURST));
    ring.complete();
}

fn send(ring: &mut Ring, frames: &[RawFrame]) {
    let sent = ring.send_run::<false, _, _>(frames, Bare, |_| None, |_| Payload::EMPTY);
    assert_eq!(sent.map(|sent| sent.frames), Ok(BURST as u64));
    ring.flush();
}

#[test]
fn a_frame_out_of_and_into_a_ring_of_either_layout() {
    let frame = RawFrame { header_bytes: FRAME_BYTES as u16, frame_bytes: FRAME_BYTES, ..RawFrame::EMPTY };
    let sent = vec![frame; BURST];
    for in_order in [false, true] {
        let features = F_VERSION_1 | F_EVENT_IDX | if in_order { F_IN_ORDER } else { 0 };
        let guest = || Guest::new(&[(0, 0x10_0000)]);
        let mut costs = Vec::new();
        for flags in [0, WRITE] {
            let bytes = if flags == WRITE { 2048 } else { 12 + FRAME_BYTES };
            let mut split = Split(GuestRing::new(&guest(), 0, SIZE, 0), 0);
            // A burst that was sent is given back as one only where it is in order.
            let mut packed = Packed(PackedGuestRing::new(&guest(), 0, SIZE, 0), in_order && flags == 0);
            // A guest that polls. Of a split ring with EVENT_IDX it says so by itself, mostly.
            packed.0.set_driver_event(packed.0.first, EVENT_DISABLE);
            for mut ring in [split.0.open(features), packed.0.open(features)] {
                let mut received = frames();
                let serve = || if flags == WRITE { send(&mut ring, &sent) } else { receive(&mut ring, &mut received) };
                costs.push(match costs.len() % 2 {
                    0 => cost(&mut split, bytes, flags, serve),
                    _ => cost(&mut packed, bytes, flags, serve),
                });
            }
        }
        let order = if in_order { "in order" } else { "any order" };
        println!(
            "{order}: out of split {:.1}, packed {:.1} ns a frame; into split {:.1}, packed {:.1}",
            costs[0], costs[1], costs[2], costs[3]
        );
    }
}
