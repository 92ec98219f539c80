//! The in-flight region through the rings: a device dies at every point of a burst, and the next one finds exactly what was
//! taken and not given back. A front-end may have written anything there meanwhile.

#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use common::packed::{At, NO_ID, PackedGuestRing};
use common::{F_INDIRECT, F_VERSION_1, Guest, GuestRing, NEXT, WRITE, frame_bytes, frames};
use dreamwire_vhost::frame::{Bare, NetHeader, RawFrame};
use dreamwire_vhost::inflight::{Inflight, InflightPart};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{Ring, RingSetup, Sent};

const SIZE: u16 = 16;
const FEATURES: u64 = F_VERSION_1 | F_INDIRECT;
const BUFFERS: u64 = 0x8000;
const BUFFER_BYTES: u64 = 256;
const NET: [u8; 12] = [0; 12];

/// A region for two rings, and the front-end's view of the part of ring 1: its file.
struct Region {
    region: Arc<Inflight>,
    file: std::fs::File,
    packed: bool,
}

impl Region {
    fn new(packed: bool) -> Self {
        let (region, file): (_, OwnedFd) = Inflight::create(packed, 2, SIZE).unwrap();
        Self { region: Arc::new(region), file: file.into(), packed }
    }

    fn part(&self) -> InflightPart {
        InflightPart::new(&self.region, 1, SIZE, self.packed).unwrap()
    }

    /// Where the part of ring 1 lies in the file.
    fn start(&self) -> u64 {
        let bytes = if self.packed { 32 + 32 * u64::from(SIZE) } else { 16 + 16 * u64::from(SIZE) };
        bytes.next_multiple_of(64)
    }

    fn entry(&self, index: u16) -> u64 {
        if self.packed { 32 + 32 * u64::from(index) } else { 16 + 16 * u64::from(index) }
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, self.start() + at).unwrap();
        bytes
    }

    fn read16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.read(at))
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, self.start() + at).unwrap();
    }

    fn write16(&self, at: u64, value: u16) {
        self.write(at, &value.to_le_bytes());
    }

    /// Heads in flight, in the order of their counters.
    fn inflight(&self) -> Vec<u16> {
        let counter = |index: u16| u64::from_le_bytes(self.read(self.entry(index) + 8));
        let mut heads: Vec<_> = (0..SIZE).filter(|&index| self.read::<1>(self.entry(index)) == [1]).collect();
        heads.sort_by_key(|&index| counter(index));
        heads
    }

    /// The file as it was, for a device that dies and one that comes after it.
    fn image(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.file.metadata().unwrap().len() as usize];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn restore(&self, image: &[u8]) {
        self.file.write_all_at(image, 0).unwrap();
    }
}

fn guest() -> Guest {
    Guest::new(&[(0, 1 << 16)])
}

/// The frame in buffer `number`.
fn frame(number: u16) -> Vec<u8> {
    vec![number as u8; 60]
}

fn buffer(number: u16) -> u64 {
    BUFFERS + BUFFER_BYTES * u64::from(number)
}

fn fill(guest: &Guest, number: u16) {
    guest.write(buffer(number), &[&NET[..], &frame(number)].concat());
}

fn frame_of(ring: &Ring, frame: &dreamwire_vhost::frame::RawFrame) -> u16 {
    let bytes = frame_bytes(ring, frame);
    assert!(bytes.len() == 60 && bytes.iter().all(|&byte| byte == bytes[0]), "{bytes:?}");
    u16::from(bytes[0])
}

/// Takes a burst of at most `most`; the numbers of the frames in it.
fn take(ring: &mut Ring, most: usize) -> Vec<u16> {
    let mut frames = frames();
    let count = ring.receive(&mut frames[..most]).unwrap();
    frames[..count].iter().map(|frame| frame_of(ring, frame)).collect()
}

fn split_setup(driver: &GuestRing, region: &Region) -> RingSetup {
    RingSetup { next_used: driver.used_index(), inflight: Some(region.part()), ..driver.setup(FEATURES) }
}

/// A split ring with chains 0 to `count` posted in the order of `heads`.
fn split(heads: &[u16]) -> GuestRing {
    let guest = guest();
    let mut driver = GuestRing::new(&guest, 0, SIZE, 0);
    for &head in heads {
        fill(&guest, head);
        driver.descriptor(head, buffer(head), 72, 0, 0);
        driver.post(head);
    }
    driver
}

#[test]
fn a_split_rings_region_says_what_is_taken_and_nothing_once_it_is_given_back() {
    let (driver, region) = (split(&[5, 3, 9, 1]), Region::new(false));
    let mut ring = Ring::new(split_setup(&driver, &region)).unwrap();
    // version, desc_num
    assert_eq!((region.read16(8), region.read16(10)), (1, SIZE));
    assert_eq!(take(&mut ring, 3), [5, 3, 9]);
    assert_eq!(region.inflight(), [5, 3, 9]);
    ring.complete();
    assert_eq!((region.inflight(), region.read16(14)), (vec![], 3), "used_idx");
    // The list of the last batch: 9, 3, 5.
    assert_eq!(region.read16(12), 9);
    assert_eq!([9, 3].map(|head| region.read16(region.entry(head) + 6)), [3, 5]);
    assert_eq!(take(&mut ring, 3), [1]);
    assert_eq!(region.inflight(), [1]);
}

#[test]
fn a_split_ring_resumes_with_what_a_dead_device_had_taken() {
    let (driver, region) = (split(&[5, 3, 9, 1]), Region::new(false));
    let mut ring = Ring::new(split_setup(&driver, &region)).unwrap();
    take(&mut ring, 1);
    ring.complete();
    take(&mut ring, 2);
    drop(ring); // as if killed
    assert_eq!(region.inflight(), [3, 9]);
    let mut next = Ring::resume(split_setup(&driver, &region)).unwrap();
    assert_eq!(next.next_avail(), 1);
    assert_eq!(take(&mut next, 32), [3, 9, 1]);
    next.complete();
    assert_eq!(driver.used_index(), 4);
    assert_eq!([0, 1, 2, 3].map(|index| driver.used_entry(index).0), [5, 3, 9, 1]);
    assert!(region.inflight().is_empty());
}

/// A device that finishes out of order leaves chains in flight whose places in the available ring are others': here it has
/// taken 5, 3, 9 and given 3 back. Afterwards the driver has used that place anew.
#[test]
fn a_split_ring_resumes_what_a_device_out_of_order_left() {
    let (mut driver, region) = (split(&[5, 3, 9]), Region::new(false));
    drop(Ring::new(split_setup(&driver, &region)).unwrap());
    for (counter, head) in [(7u64, 9), (2, 5)] {
        region.write(region.entry(head), &[1]);
        region.write(region.entry(head) + 8, &counter.to_le_bytes());
    }
    driver.guest.write(driver.used + 4, &[3, 0, 0, 0, 0, 0, 0, 0]);
    driver.guest.write_u16(driver.used + 2, 1);
    region.write16(14, 1);
    fill(&driver.guest, 3);
    driver.post(3);
    let mut ring = Ring::resume(split_setup(&driver, &region)).unwrap();
    assert_eq!(take(&mut ring, 1), [5], "in the order of their counters");
    ring.complete();
    assert_eq!(region.inflight(), [9]);
    // Attached anew in between, as for a new call descriptor.
    let mut ring = Ring::new(ring.into_setup()).unwrap();
    assert_eq!(take(&mut ring, 32), [9, 3]);
    ring.complete();
    assert_eq!([0, 1, 2, 3].map(|index| driver.used_entry(index).0), [3, 5, 9, 3]);
    assert_eq!((driver.used_index(), region.inflight()), (4, vec![]));
    // Round the whole u16, the places are the available ring's again.
    for _ in 0..=u16::MAX {
        driver.post(3);
        assert_eq!(take(&mut ring, 32), [3]);
        ring.complete();
    }
}

/// Killed between the store of the used index and the clearing of the batch.
#[test]
fn a_batch_that_the_driver_has_seen_is_not_done_again() {
    let (driver, region) = (split(&[5, 3, 9]), Region::new(false));
    let mut ring = Ring::new(split_setup(&driver, &region)).unwrap();
    take(&mut ring, 2);
    ring.complete();
    drop(ring);
    region.write(region.entry(5), &[1]);
    region.write(region.entry(3), &[1]);
    region.write16(14, 0);
    let mut next = Ring::resume(split_setup(&driver, &region)).unwrap();
    assert_eq!(take(&mut next, 32), [9]);
}

/// DPDK 5a4fbe79e6 and the like: nothing there is used as an index, a length or a count unchecked.
#[test]
fn whatever_is_written_to_a_split_rings_region_stays_its_own_affair() {
    let (driver, region) = (split(&[5, 3, 9]), Region::new(false));
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for round in 0..3000 {
        let mut image = region.image();
        for byte in &mut image {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            // Half of them small, so that versions, flags and indices are often likely ones.
            *byte = if state >> 63 == 0 { (state >> 56) as u8 & 3 } else { (state >> 40) as u8 };
        }
        region.restore(&image);
        if round % 3 == 0 {
            region.write16(8, 1);
            region.write16(10, SIZE);
        }
        let mut ring = Ring::resume(split_setup(&driver, &region)).unwrap();
        let mut frames = frames();
        // What is not believed is served from the available ring, what is believed within the guest's own table.
        if ring.receive(&mut frames).is_ok() {
            region.restore(&image);
        }
        driver.guest.write_u16(driver.used + 2, 0);
    }
    for (at, value) in [(12, SIZE), (12, u16::MAX), (14, 1 << 15), (10, SIZE - 1), (10, u16::MAX), (8, 2)] {
        let region = Region::new(false);
        drop(Ring::new(split_setup(&driver, &region)).unwrap());
        region.write(region.entry(9), &[1]);
        region.write16(at, value);
        let mut ring = Ring::resume(split_setup(&driver, &region)).unwrap();
        let taken = take(&mut ring, 32);
        assert!(taken == [5, 3, 9] || at == 12 && taken == [9, 3, 9], "{at} {value}: {taken:?}");
    }
}

#[test]
fn buffers_for_the_guest_leave_nothing_in_flight() {
    let (guest, region) = (guest(), Region::new(false));
    let mut driver = GuestRing::new(&guest, 0, SIZE, 0);
    for head in 0..4 {
        driver.descriptor(head, buffer(head), 256, WRITE, 0);
        driver.post(head);
    }
    let mut ring = Ring::new(split_setup(&driver, &region)).unwrap();
    ring.send(NetHeader::default(), &frame(7), Payload::EMPTY).unwrap();
    assert!(region.inflight().is_empty());
    ring.flush();
    assert_eq!((region.inflight(), region.read16(14)), (vec![], 1));
    ring.send(NetHeader::default(), &frame(8), Payload::EMPTY).unwrap();
    drop(ring); // staged, never shown
    let mut next = Ring::resume(split_setup(&driver, &region)).unwrap();
    next.send(NetHeader::default(), &frame(9), Payload::EMPTY).unwrap();
    next.flush();
    assert_eq!(driver.used_entry(1).0, 1);
    assert_eq!(guest.read(buffer(1) + 12, 60), frame(9));
}

/// A device that kept buffers of a guest receiveq, which ours never does.
#[test]
fn buffers_that_another_device_kept_are_filled_first() {
    let (guest, region) = (guest(), Region::new(false));
    let mut driver = GuestRing::new(&guest, 0, SIZE, 0);
    for head in 0..4 {
        driver.descriptor(head, buffer(head), 256, WRITE, 0);
        driver.post(head);
    }
    drop(Ring::new(split_setup(&driver, &region)).unwrap());
    region.write(region.entry(2), &[1]);
    let mut ring = Ring::resume(split_setup(&driver, &region)).unwrap();
    // They go the general way, each by itself.
    let raw = RawFrame { header_bytes: 60, frame_bytes: 60, ..RawFrame::EMPTY };
    assert_eq!(ring.send_run::<false, _, _>(&[raw], Bare, |_| None, |_| Payload::EMPTY), Ok(Sent::default()));
    (0..2).for_each(|number| ring.send(NetHeader::default(), &frame(number), Payload::EMPTY).unwrap());
    ring.flush();
    assert_eq!([0, 1].map(|index| driver.used_entry(index).0), [2, 1]);
    assert!(region.inflight().is_empty());
}

#[test]
fn a_ring_that_was_stopped_in_order_leaves_a_region_that_says_nothing() {
    let (driver, region) = (split(&[5]), Region::new(false));
    let mut ring = Ring::new(split_setup(&driver, &region)).unwrap();
    take(&mut ring, 1);
    region.part().settle();
    assert_eq!((region.read16(8), region.inflight()), (1, vec![5]), "something is in flight");
    ring.complete();
    drop(ring);
    region.part().settle();
    assert_eq!(region.read16(8), 0);
}

fn packed_setup(driver: &PackedGuestRing, region: &Region) -> RingSetup {
    RingSetup { inflight: Some(region.part()), ..driver.setup(FEATURES) }
}

/// A packed ring with a frame each in chains of `slots` descriptors; ids and frames count from 1.
fn packed(slots: &[u16], start: u32) -> PackedGuestRing {
    let mut driver = PackedGuestRing::new(&guest(), 0, SIZE, start);
    for (number, &slots) in (1..).zip(slots) {
        post_packed(&mut driver, number, slots);
    }
    driver
}

fn post_packed(driver: &mut PackedGuestRing, number: u16, slots: u16) {
    fill(&driver.guest, number);
    let mut pieces = vec![(buffer(number), 12, 0)];
    if slots == 1 {
        pieces[0].1 = 72;
    } else {
        let each = 60 / u32::from(slots - 1);
        for piece in 0..u32::from(slots - 1) {
            pieces.push((buffer(number) + 12 + u64::from(piece * each), each, 0));
        }
    }
    driver.post(number, &pieces);
}

#[test]
fn a_packed_rings_region_has_copies_of_what_is_taken() {
    let (driver, region) = (packed(&[1, 3, 2], 0), Region::new(true));
    let mut ring = Ring::new(packed_setup(&driver, &region)).unwrap();
    assert_eq!((region.read16(8), region.read16(10)), (1, SIZE));
    assert_eq!(take(&mut ring, 32), [1, 2, 3]);
    // Entries in the order of the list: 0; 1, 2, 3; 4, 5.
    assert_eq!(region.inflight(), [0, 1, 4]);
    let head = |index: u16| [2, 4, 6, 16].map(|field| region.read16(region.entry(index) + field));
    assert_eq!(head(1), [2, 3, 3, NO_ID], "next, last, num, id");
    assert_eq!(head(3)[3], 2, "the chain's id");
    let address = |index| u64::from_le_bytes(region.read(region.entry(index) + 24));
    let bytes = |index| u32::from_le_bytes(region.read(region.entry(index) + 20));
    assert_eq!([1, 2, 3].map(address), [buffer(2), buffer(2) + 12, buffer(2) + 42]);
    assert_eq!([1, 2, 3].map(bytes), [12, 30, 30]);
    // free_head, old_free_head, used_idx, old_used_idx
    assert_eq!([12, 14, 16, 18].map(|at| region.read16(at)), [6, 6, 0, 0]);
    ring.complete();
    assert!(region.inflight().is_empty());
    assert_eq!([12, 14, 16, 18].map(|at| region.read16(at)), [4, 4, 6, 6]);
    assert_eq!(region.read::<2>(20), [1, 1], "wrap counters");
    assert_eq!([5, 3, 0].map(|last| region.read16(region.entry(last) + 2)), [1, 0, 6], "the free list goes on");
}

#[test]
fn a_packed_ring_resumes_with_what_a_dead_device_had_taken() {
    for start in [0, 11, 16, 29] {
        let (mut driver, region) = (packed(&[1, 3, 2, 1], start), Region::new(true));
        let mut ring = Ring::new(packed_setup(&driver, &region)).unwrap();
        take(&mut ring, 1);
        ring.complete();
        take(&mut ring, 2);
        drop(ring);
        assert_eq!(region.inflight().len(), 2, "{start}");
        // The front-end's word is old, as QEMU's is.
        let mut next = Ring::resume(packed_setup(&driver, &region)).unwrap();
        assert_eq!(take(&mut next, 32), [2, 3, 4], "{start}");
        next.complete();
        let slots = |id| [1, 3, 2, 1][usize::from(id) - 1];
        let reaped: Vec<_> = std::iter::from_fn(|| driver.reap(slots)).collect();
        assert_eq!(reaped, [(1, 0), (2, 0), (3, 0), (4, 0)]);
        assert_eq!((region.inflight(), driver.reaped), (vec![], driver.next));
        // And goes on.
        post_packed(&mut driver, 5, 4);
        assert_eq!(take(&mut next, 32), [5]);
        next.complete();
        assert_eq!(driver.reap(|_| 4), Some((5, 0)));
    }
}

/// Killed after used descriptors were staged and before the first of them was written: the ring has lost the chains behind
/// it, the region has them. Without it, their frames would be given back unsent.
#[test]
fn a_packed_ring_serves_chains_again_whose_descriptors_are_overwritten() {
    let (mut driver, region) = (packed(&[2, 1, 2], 13), Region::new(true));
    let mut ring = Ring::new(packed_setup(&driver, &region)).unwrap();
    assert_eq!(take(&mut ring, 32), [1, 2, 3]);
    let (image, first) = (region.image(), driver.guest.read(13 * 16, 16));
    ring.complete();
    drop(ring);
    // Back to the moment before: the first descriptor of the burst, and the region.
    driver.guest.write(13 * 16, &first);
    region.restore(&image);
    assert_eq!(driver.reap(|_| 1), None, "the driver has seen nothing");
    let mut next = Ring::resume(packed_setup(&driver, &region)).unwrap();
    assert_eq!(take(&mut next, 2), [1, 2]);
    next.complete();
    let mut next = Ring::new(next.into_setup()).unwrap();
    assert_eq!(take(&mut next, 32), [3]);
    next.complete();
    let reaped: Vec<_> = std::iter::from_fn(|| driver.reap(|id| [2, 1, 2][usize::from(id) - 1])).collect();
    assert_eq!(reaped, [(1, 0), (2, 0), (3, 0)]);
    assert_eq!((region.inflight(), driver.reaped), (vec![], driver.next));
}

/// Killed between the store that shows the burst and the clearing of its entries; and before the list was committed.
#[test]
fn a_packed_batch_that_the_driver_has_seen_is_not_done_again_and_one_that_it_has_not_is() {
    for shown in [false, true] {
        let (mut driver, region) = (packed(&[2, 1, 1], 15), Region::new(true));
        let mut ring = Ring::new(packed_setup(&driver, &region)).unwrap();
        assert_eq!(take(&mut ring, 2), [1, 2]);
        let (heads, first) = (region.inflight(), driver.guest.read(15 * 16, 16));
        let before = region.image();
        ring.complete();
        drop(ring);
        // free_head and used_idx as they are now, the old ones and the flags as they were.
        let now = [region.read16(12), region.read16(16)];
        let wrap = region.read::<1>(20);
        let links = region.image();
        region.restore(&before);
        for index in 0..SIZE {
            let at = region.start() as usize + region.entry(index) as usize + 2;
            region.write(region.entry(index) + 2, &links[at..at + 2]);
        }
        region.write16(12, now[0]);
        region.write16(16, now[1]);
        region.write(20, &wrap);
        assert_eq!(region.inflight(), heads);
        if !shown {
            driver.guest.write(15 * 16, &first);
        }
        let mut next = Ring::resume(packed_setup(&driver, &region)).unwrap();
        let expected: &[u16] = if shown { &[3] } else { &[1, 2, 3] };
        assert_eq!(take(&mut next, 32), expected);
        next.complete();
        let reaped: Vec<_> = std::iter::from_fn(|| driver.reap(|id| [2, 1, 1][usize::from(id) - 1])).collect();
        assert_eq!(reaped, [(1, 0), (2, 0), (3, 0)], "{shown}");
    }
}

/// A device that finishes out of order: it has taken 1 (two descriptors), 2 and 3, and given 2 back at the place of 1.
#[test]
fn a_packed_ring_resumes_what_a_device_out_of_order_left() {
    let (mut driver, region) = (packed(&[2, 1, 1], 0), Region::new(true));
    let mut ring = Ring::new(packed_setup(&driver, &region)).unwrap();
    take(&mut ring, 3);
    drop(ring);
    // Entries: 0, 1; 2; 3. The list: 2, then 4.
    let at = At { index: 0, wrap: true };
    driver.write(0, 0, 0, 2, at.used());
    region.write(region.entry(2), &[0]);
    region.write16(region.entry(2) + 2, 4);
    for (field, value) in [(12, 2), (14, 2), (16, 1), (18, 1)] {
        region.write16(field, value);
    }
    assert_eq!(driver.reap(|_| 1), Some((2, 0)));
    let mut next = Ring::resume(packed_setup(&driver, &region)).unwrap();
    assert_eq!(take(&mut next, 32), [1, 3]);
    next.complete();
    assert_eq!(driver.reap(|_| 2), Some((1, 0)));
    assert_eq!(driver.reap(|_| 1), Some((3, 0)));
    assert_eq!((driver.reaped, region.inflight()), (driver.next, vec![]));
}

#[test]
fn whatever_is_written_to_a_packed_rings_region_stays_its_own_affair() {
    let region = Region::new(true);
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..3000 {
        let driver = packed(&[2, 1, 3], 9);
        let mut ring = Ring::new(packed_setup(&driver, &region)).unwrap();
        if round % 2 == 0 {
            ring.receive(&mut frames()).unwrap();
        }
        drop(ring);
        let image = region.image();
        // A few bytes each, so that the rest is often believed.
        for _ in 0..1 + round % 8 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let at = (state >> 33) % (image.len() as u64 - region.start());
            region.write(at, &[(state >> 56) as u8 & if state & 1 << 50 == 0 { 15 } else { 255 }]);
        }
        if let Ok(mut ring) = Ring::resume(packed_setup(&driver, &region)) {
            // Anything but a wild access: addresses and lengths from there are judged like the guest's own.
            let _ = ring.receive(&mut frames());
        }
        region.part().settle();
        region.restore(&vec![0; image.len()]);
    }
}

/// A region that cannot be right is put aside, and the ring tells its position itself (`ring/recover.rs`).
#[test]
fn a_packed_ring_whose_region_lies_resumes_where_it_stands() {
    for (at, value) in [(8, 2), (10, SIZE - 1), (14, 0), (18, SIZE), (18, u16::MAX), (32 + 32 * 2 + 6, SIZE)] {
        let (driver, region) = (packed(&[1, 1, 1, 1], 5), Region::new(true));
        let mut ring = Ring::new(packed_setup(&driver, &region)).unwrap();
        take(&mut ring, 2);
        ring.complete();
        assert_eq!(take(&mut ring, 1), [3]);
        drop(ring);
        // Entry 1 heads the chain in flight; another one that is none joins it.
        region.write(region.entry(2), &[u8::from(at > 32)]);
        region.write16(at, value);
        let mut next = Ring::resume(packed_setup(&driver, &region)).unwrap();
        assert_eq!(take(&mut next, 32), [3, 4], "{at} {value}");
        next.complete();
        assert!(region.inflight().is_empty());
    }
}

/// Between `send` and `flush` used descriptors lie behind one that the driver waits at, if there is a chain of several; nothing
/// is in flight. `flushed`: that chain is the first of its burst.
#[test]
fn a_packed_receiveq_that_died_half_done_is_finished_by_the_ring_alone() {
    for flushed in [true, false] {
        let (guest, region) = (guest(), Region::new(true));
        let mut driver = PackedGuestRing::new(&guest, 0, SIZE, 0);
        driver.post(1, &[(buffer(1), 256, WRITE)]);
        driver.post(2, &[(buffer(2), 12, WRITE), (buffer(2) + 12, 44, WRITE), (buffer(2) + 56, 200, WRITE)]);
        (3..=4).for_each(|id| driver.post(id, &[(buffer(id), 256, WRITE)]));
        let mut ring = Ring::new(packed_setup(&driver, &region)).unwrap();
        ring.send(NetHeader::default(), &frame(7), Payload::EMPTY).unwrap();
        if flushed {
            ring.flush();
            assert_eq!((region.inflight(), region.read16(16), region.read16(18)), (vec![], 1, 1));
        }
        (0..2).for_each(|number| ring.send(NetHeader::default(), &frame(number), Payload::EMPTY).unwrap());
        drop(ring);
        let mut next = Ring::resume(packed_setup(&driver, &region)).unwrap();
        next.send(NetHeader::default(), &frame(9), Payload::EMPTY).unwrap();
        next.flush();
        let reaped: Vec<_> = std::iter::from_fn(|| driver.reap(|id| if id == 2 { 3 } else { 1 })).collect();
        let first = if flushed { 72 } else { 0 };
        assert_eq!(reaped, [(1, first), (2, 0), (3, 0), (4, 72)]);
        assert_eq!(guest.read(buffer(4) + 12, 60), frame(9));
    }
}

/// Of chains of one descriptor nothing is in the ring before `flush`.
#[test]
fn a_packed_receiveq_that_died_half_done_uses_its_buffers_anew() {
    let (guest, region) = (guest(), Region::new(true));
    let mut driver = PackedGuestRing::new(&guest, 0, SIZE, 0);
    (1..=3).for_each(|id| driver.post(id, &[(buffer(id), 256, WRITE)]));
    let mut ring = Ring::new(packed_setup(&driver, &region)).unwrap();
    (0..2).for_each(|number| ring.send(NetHeader::default(), &frame(number), Payload::EMPTY).unwrap());
    drop(ring);
    let mut next = Ring::resume(packed_setup(&driver, &region)).unwrap();
    next.send(NetHeader::default(), &frame(9), Payload::EMPTY).unwrap();
    next.flush();
    assert_eq!(driver.reap(|_| 1), Some((1, 72)));
    assert_eq!(driver.reap(|_| 1), None);
    assert_eq!(guest.read(buffer(1) + 12, 60), frame(9));
}

/// The chain's other descriptors of a split ring are found through the table, as ever.
#[test]
fn a_split_chain_of_several_descriptors_is_in_flight_by_its_head() {
    let (guest, region) = (guest(), Region::new(false));
    let mut driver = GuestRing::new(&guest, 0, SIZE, 0);
    fill(&guest, 4);
    driver.descriptor(4, buffer(4), 12, NEXT, 7);
    driver.descriptor(7, buffer(4) + 12, 60, 0, 0);
    driver.post(4);
    let mut ring = Ring::new(split_setup(&driver, &region)).unwrap();
    assert_eq!(take(&mut ring, 1), [4]);
    assert_eq!(region.inflight(), [4]);
    drop(ring);
    let mut next = Ring::resume(split_setup(&driver, &region)).unwrap();
    assert_eq!(take(&mut next, 1), [4]);
}
