//! Guests that write to their rings while the device reads them, in either layout: what was judged is what is delivered.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::packed::*;
use common::pair::{BUFFER, FEATURES, LEFT_END};
use common::*;
use dreamwire_vhost::frame::{NetHeader, RawFrame};
use dreamwire_vhost::ring::{FRAME_BYTES_MAX, Ring};

/// The guest writes while the device reads: descriptors flip between a sound buffer and every kind of broken one, and
/// the frame's first bytes are rewritten all the time. Whatever the device saw, it saw once: the header copy is what is
/// delivered, whatever the guest's memory says by then.
#[test]
fn a_guest_that_writes_to_a_split_ring_meanwhile_changes_nothing_that_was_judged() {
    let guest = Guest::new(&[(0, LEFT_END as usize), (LEFT_END, 0x10_0000)]);
    let receiver_guest = Guest::new(&[(0, 0x10_0000)]);
    let stop = Arc::new(AtomicBool::new(false));
    let mut ring = GuestRing::new(&guest, 0, 64, 0);
    let mut seen = [0u32; 2];
    std::thread::scope(|scope| {
        let writer = (guest.clone(), ring.clone(), Arc::clone(&stop));
        scope.spawn(move || {
            let (guest, ring, stop) = writer;
            let mut round = 0u64;
            while !stop.load(Ordering::Relaxed) {
                round = round.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let dice = (round >> 33) as u32;
                let index = (dice % 64) as u16;
                match dice >> 8 & 63 {
                    0 => ring.descriptor(index, u64::MAX, dice, NEXT, dice as u16),
                    1 => ring.descriptor(index, BUFFER, 1000, WRITE | INDIRECT, index),
                    2..8 => ring.descriptor(index, BUFFER, dice & 0xffff, 0, 0),
                    _ => ring.descriptor(index, BUFFER, 12 + 600, 0, 0),
                }
                guest.write(BUFFER, &[dice as u8; 12 + 600]);
            }
        });
        let deadline = Instant::now() + Duration::from_millis(300);
        let mut frames = frames();
        let mut device = ring.open(FEATURES);
        while Instant::now() < deadline {
            while ring.available_index.wrapping_sub(device.next_avail()) < 32 {
                let head = ring.available_index % 64;
                ring.post(head);
            }
            let Ok(count) = device.receive(&mut frames) else {
                // The driver resets its device.
                seen[1] += 1;
                ring = GuestRing::new(&guest, 0, 64, 0);
                device = ring.open(FEATURES);
                continue;
            };
            deliver(&device, &frames[..count], &receiver_guest);
            seen[0] += count as u32;
            device.complete();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(seen[0] > 0 && seen[1] > 0, "frames {}, faults {}", seen[0], seen[1]);
}

/// Sends each frame into a ring of another guest and compares what arrives with the header copy.
fn deliver(device: &Ring, frames: &[RawFrame], guest: &Guest) {
    let mut ring = GuestRing::new(guest, 0, 64, 0);
    let mut receiver = ring.open(FEATURES);
    for (index, frame) in frames.iter().enumerate() {
        let judged = frame.headers().to_vec();
        assert!(frame.frame_bytes <= FRAME_BYTES_MAX);
        assert_eq!(device.payload(frame).bytes(), frame.tail_bytes());
        let head = index as u16;
        let into = 0x1_0000;
        ring.descriptor(head, into, 0x1_1000, WRITE, 0);
        ring.post(head);
        assert_eq!(receiver.send(NetHeader::default(), frame.headers(), device.payload(frame)), Ok(()));
        receiver.flush();
        assert_eq!(ring.used_entry(head), (u32::from(head), 12 + frame.frame_bytes));
        assert_eq!(guest.read(into + 12, judged.len()), judged, "what was judged is what was sent");
    }
}

/// The guest writes while the device reads and gives back: whatever it writes, the device stays inside its memory, takes
/// bursts of bounded length, and what it judged is what it delivers.
#[test]
fn a_guest_that_writes_to_a_packed_ring_meanwhile_changes_nothing_that_was_judged() {
    let guest = Guest::new(&[(0, LEFT_END as usize), (LEFT_END, 0x10_0000)]);
    let receiver_guest = Guest::new(&[(0, 0x10_0000)]);
    let stop = Arc::new(AtomicBool::new(false));
    let mut seen = [0u32; 2];
    std::thread::scope(|scope| {
        let (writer, stopped) = (PackedGuestRing::new(&guest, 0, 64, 0), Arc::clone(&stop));
        let ring = writer.clone();
        scope.spawn(move || {
            let mut round = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                round = round.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let dice = (round >> 33) as u32;
                let index = (dice % 64) as u16;
                let lap = if dice >> 16 & 1 == 0 { AVAIL } else { USED };
                match dice >> 8 & 63 {
                    0 => writer.write(index, u64::MAX, dice, index, NEXT | lap),
                    1 => writer.write(index, BUFFER, 1000, index, WRITE | INDIRECT | lap),
                    2 => writer.write(index, BUFFER, 100, index, NEXT | lap),
                    3..8 => writer.write(index, BUFFER, dice & 0xffff, index, lap),
                    _ => writer.write(index, BUFFER, 12 + 600, index, lap),
                }
                writer.guest.write(BUFFER, &[dice as u8; 12 + 600]);
            }
        });
        // Until both were seen, and a while longer: how far the writer comes is up to the machine.
        let (least, most) = (Duration::from_millis(300), Duration::from_secs(20));
        let start = Instant::now();
        let mut frames = frames();
        let mut device = ring.open(FEATURES);
        while start.elapsed() < least || (seen.contains(&0) && start.elapsed() < most) {
            let Ok(count) = device.receive(&mut frames) else {
                seen[1] += 1;
                device = ring.open(FEATURES);
                continue;
            };
            let mut to = PackedGuestRing::new(&receiver_guest, 0, 64, 0);
            let mut receiver = to.open(FEATURES);
            for frame in &frames[..count] {
                let judged = frame.headers().to_vec();
                to.post(3, &[(0x1_0000, 0x1_1000, WRITE)]);
                assert_eq!(receiver.send(NetHeader::default(), frame.headers(), device.payload(frame)), Ok(()));
                receiver.flush();
                assert_eq!(to.reap(|_| 1), Some((3, 12 + frame.frame_bytes)));
                assert_eq!(receiver_guest.read(0x1_000c, judged.len()), judged, "what was judged is what was sent");
            }
            seen[0] += count as u32;
            device.complete();
            assert!(device.next_avail() & 0x7fff < 64);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(seen[0] > 0 && seen[1] > 0, "frames {}, faults {}", seen[0], seen[1]);
}
