//! A packed ring against a split one: the same chains posted to both, everything that the guest sees compared. And where
//! a packed ring goes on after its device was lost.

mod common;

use std::collections::{HashMap, VecDeque};

use common::packed::*;
use common::*;
use dreamwire_vhost::frame::{Bare, HEADER_COPY_BYTES, NetHeader, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{BURST, Ring, RingSetup, SendError};
use proptest::collection::vec;
use proptest::prelude::*;

/// The first region holds rings and tables; buffers lie in both and across their border.
const BORDER: u64 = 0x16_0000;
const MEMORY_END: u64 = 0x19_0000;
const TABLES: u64 = 0x10_0000;
const TABLE_ROOM: u64 = 512;
const BUFFERS: u64 = 0x14_0000;

#[derive(Debug, Clone)]
struct Chain {
    pieces: Vec<u32>,
    indirect: bool,
    seed: u64,
}

/// One turn: the driver posts chains, then the device serves.
#[derive(Debug, Clone)]
struct Round {
    chains: Vec<Chain>,
    /// Frames sent to the guest, by length.
    frames: Vec<usize>,
    /// Serve with a device that was set up anew.
    resume: bool,
    /// The driver's event suppression structure: descriptors from where it looks next, flags.
    wish: (u16, u16),
}

#[derive(Debug, Clone)]
struct Scenario {
    size: u16,
    start: u32,
    features: u64,
    rounds: Vec<Round>,
}

fn chain() -> impl Strategy<Value = Chain> {
    let header =
        prop_oneof![4 => Just(vec![]), 1 => Just(vec![12]), 1 => Just(vec![1, 11]), 1 => Just(vec![0, 5, 0, 7])];
    let piece = prop_oneof![2 => Just(0u32), 6 => 1..200u32, 6 => 200..2100u32, 1 => 30_000..66_000u32];
    (header, vec(piece, 0..6), any::<bool>(), any::<u64>()).prop_map(|(header, rest, indirect, seed)| {
        let mut pieces = [header, rest].concat();
        if pieces.is_empty() {
            pieces.push(64);
        }
        Chain { pieces, indirect, seed }
    })
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let frame = prop_oneof![4 => 0..200usize, 4 => 200..1600usize, 1 => 1600..66_000usize];
    let wish = (prop_oneof![4 => 0..40u16, 1 => any::<u16>()], 0..4u16);
    let round = (vec(chain(), 0..40), vec(frame, 0..40), any::<bool>(), wish)
        .prop_map(|(chains, frames, resume, wish)| Round { chains, frames, resume, wish });
    let size = prop_oneof![Just(1u16), Just(2), Just(3), Just(7), Just(16), Just(64), Just(255), Just(256), Just(1000)];
    let features = vec![F_VERSION_1, F_MERGEABLE, F_INDIRECT, F_EVENT_IDX, F_IN_ORDER];
    let features = proptest::sample::subsequence(features, 0..=5);
    (size, any::<u32>(), features, vec(round, 1..6)).prop_map(|(size, start, features, rounds)| Scenario {
        size,
        start,
        features: features.iter().sum(),
        rounds,
    })
}

/// A driver that plays the same to a split ring and to a packed one, each in a memory of its own.
struct Driver {
    split: GuestRing,
    packed: PackedGuestRing,
    features: u64,
    /// Descriptors of the packed ring that are free.
    room: u16,
    free_ids: Vec<u16>,
    /// Id or head of those outstanding: descriptors.
    slots: HashMap<u16, u16>,
    /// Ids outstanding, as they were posted.
    order: VecDeque<u16>,
    used_seen: u16,
    /// What it said last about calls.
    wish: (At, u16),
}

impl Driver {
    fn new(scenario: &Scenario) -> Self {
        let guest = || {
            let guest = Guest::new(&[(0, BORDER as usize), (BORDER, (MEMORY_END - BORDER) as usize)]);
            let bytes: Vec<u8> = (0..MEMORY_END - BUFFERS).map(|n| (n % 253) as u8).collect();
            guest.write(BUFFERS, &bytes);
            guest
        };
        let (one, other) = (guest(), guest());
        // Each id owns 32 descriptors of the split ring's table: it never runs out first.
        Self {
            split: GuestRing::new(&one, 0, 32768, scenario.start as u16),
            packed: PackedGuestRing::new(&other, 0x1_0000, scenario.size, scenario.start % (1 << 20)),
            features: scenario.features,
            room: scenario.size,
            free_ids: (0..scenario.size.min(500)).rev().collect(),
            slots: HashMap::new(),
            order: VecDeque::new(),
            used_seen: scenario.start as u16,
            wish: (At { index: 0, wrap: false }, EVENT_ENABLE),
        }
    }

    fn wish(&mut self, (ahead, flags): (u16, u16)) {
        self.wish = (self.packed.reaped.after(ahead % (2 * self.packed.size), self.packed.size), flags);
        self.packed.set_driver_event(self.wish.0, flags);
    }

    fn post(&mut self, chain: &Chain, direction: u16) {
        let indirect = chain.indirect && self.features & F_INDIRECT != 0;
        let slots = if indirect { 1 } else { chain.pieces.len() as u16 };
        if slots > self.room {
            return;
        }
        let Some(id) = self.free_ids.pop() else { return };
        let mut dice = chain.seed | 1;
        let mut roll = |below: u64| {
            dice = dice.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (dice >> 33) % below
        };
        let pieces: Vec<Piece> = chain
            .pieces
            .iter()
            .map(|&bytes| (BUFFERS + roll(MEMORY_END - BUFFERS - u64::from(bytes)), bytes, direction))
            .collect();
        let table = TABLES + TABLE_ROOM * u64::from(id) + roll(16);
        if indirect {
            for (index, &(address, bytes, flags)) in (0..).zip(&pieces) {
                self.packed.guest.descriptor(table, index, address, bytes, 0, flags);
            }
            self.packed.post(id, &[(table, 16 * pieces.len() as u32, INDIRECT)]);
        } else {
            self.packed.post(id, &pieces);
        }
        let head = 32 * id;
        for (index, &(address, bytes, flags)) in (head..).zip(&pieces) {
            let next = if usize::from(index - head) + 1 < pieces.len() { NEXT } else { 0 };
            self.split.descriptor(index, address, bytes, flags | next, index + 1);
        }
        self.split.post(head);
        self.room -= slots;
        self.slots.insert(id, slots);
        self.order.push_back(id);
    }

    /// Takes back what was used since the last time, of which the device has or has not `notified`; both rings must say
    /// the same, and a call come when VIRTIO 1.2 §2.8.10 wants one.
    fn compare(&mut self, notified: bool) -> Result<(), TestCaseError> {
        let mut used = Vec::new();
        let mut batch = VecDeque::new();
        while self.used_seen != self.split.used_index() {
            let (head, bytes) = self.split.used_entry(self.used_seen);
            let id = head as u16 / 32;
            let at = self.packed.reaped;
            if batch.is_empty() {
                let seen = self.packed.reap(|_| 0);
                let last = seen.map(|(id, _)| id).filter(|id| self.order.contains(id));
                prop_assert!(last.is_some(), "{:?} for {} of {:?}", seen, id, self.order);
                while batch.back().copied() != last {
                    batch.extend(self.order.pop_front());
                }
                prop_assert!(batch.len() == 1 || self.features & F_IN_ORDER != 0, "{:?}", batch);
                // Of several the lengths are not said.
                prop_assert_eq!(seen.map(|(_, bytes)| bytes), Some(bytes));
            }
            prop_assert_eq!(batch.pop_front(), Some(id));
            used.extend((0..self.slots[&id]).map(|slot| at.after(slot, self.packed.size)));
            let slots = self.slots.remove(&id).expect("a chain that was posted");
            self.packed.reaped = at.after(slots, self.packed.size);
            self.room += slots;
            self.free_ids.push(id);
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        prop_assert!(batch.is_empty(), "{:?} are used and were not taken", batch);
        prop_assert_eq!(self.packed.reap(|_| 1), None);
        let due = match self.wish {
            (_, EVENT_DISABLE) => false,
            (at, EVENT_DESC) if self.features & F_EVENT_IDX != 0 => used.contains(&at),
            // Of a reserved value, and of one that was not negotiated: better a call too many.
            _ => !used.is_empty(),
        };
        prop_assert_eq!(notified, due, "{:?} of {:?}", self.wish, used);
        let all = (MEMORY_END - BUFFERS) as usize;
        prop_assert!(self.split.guest.read(BUFFERS, all) == self.packed.guest.read(BUFFERS, all), "the buffers differ");
        Ok(())
    }
}

/// A device that knows no more than the front-end's old word, in place of the one before.
fn resumed(ring: Ring, driver: &Driver) -> Result<Ring, TestCaseError> {
    let position = ring.next_avail();
    let stale = RingSetup { next_avail: driver.packed.first.bits(), ..ring.into_setup() };
    let table = || {
        driver.packed.guest.read(driver.packed.descriptors, DESCRIPTOR_BYTES as usize * usize::from(driver.packed.size))
    };
    let before = table();
    let ring = Ring::resume(stale).expect("a sound ring");
    prop_assert_eq!(ring.next_avail(), position);
    prop_assert!(table() == before, "descriptors are written that are the driver's");
    Ok(ring)
}

fn both_deliver_the_same_frames_from_the_guest(scenario: &Scenario) -> Result<(), TestCaseError> {
    let mut driver = Driver::new(scenario);
    let (mut split, mut packed) = (driver.split.open(scenario.features), driver.packed.open(scenario.features));
    let (mut theirs, mut ours) = (frames(), frames());
    for round in &scenario.rounds {
        round.chains.iter().for_each(|chain| driver.post(chain, 0));
        driver.wish(round.wish);
        if round.resume {
            packed = resumed(packed, &driver)?;
        }
        loop {
            let count = split.receive(&mut theirs).expect("a sound ring");
            prop_assert_eq!(packed.receive(&mut ours), Ok(count));
            for (theirs, ours) in theirs.iter().zip(&ours).take(count) {
                prop_assert_eq!(
                    (theirs.fault, theirs.net, theirs.frame_bytes),
                    (ours.fault, ours.net, ours.frame_bytes)
                );
                prop_assert!(frame_bytes(&split, theirs) == frame_bytes(&packed, ours), "the bytes differ");
            }
            split.complete();
            driver.compare(packed.complete())?;
            if count == 0 {
                break;
            }
        }
        prop_assert!(!packed.enable_kicks());
        let (at, flags) = driver.packed.device_event();
        prop_assert_eq!(at, driver.packed.reaped.bits());
        prop_assert_eq!(flags, if scenario.features & F_EVENT_IDX != 0 { EVENT_DESC } else { EVENT_ENABLE });
        packed.disable_kicks();
        prop_assert_eq!(driver.packed.device_event().1, EVENT_DISABLE);
    }
    Ok(())
}

/// Sends a burst in runs, and each frame that a run stops at by itself, to the packed ring; one by one to the split ring.
fn send_in_runs(split: &mut Ring, packed: &mut Ring, burst: &[usize]) -> Result<(), TestCaseError> {
    let net = |number: usize| NetHeader { hdr_len: number as u16, ..NetHeader::default() };
    let bytes = |(number, &length)| (0..length).map(|at| (at * 7 + number) as u8).collect();
    let whole: Vec<Vec<u8>> = burst.iter().enumerate().map(bytes).collect();
    let parts: Vec<_> = whole.iter().map(|frame| frame.split_at(frame.len().min(HEADER_COPY_BYTES))).collect();
    let raw = |&(header, tail): &(&[u8], &[u8])| {
        let frame_bytes = (header.len() + tail.len()) as u32;
        let mut frame = RawFrame { header_bytes: header.len() as u16, frame_bytes, ..RawFrame::EMPTY };
        frame.header[..header.len()].copy_from_slice(header);
        frame
    };
    let frames: Vec<_> = parts.iter().map(raw).collect();
    let mut one = |number: usize| split.send(net(number), parts[number].0, Payload::private(parts[number].1));
    let mut at = 0;
    while at < burst.len() {
        let (net_of, payload) = (|ahead| Some(net(at + ahead)), |ahead: usize| Payload::private(parts[at + ahead].1));
        let end = match packed.send_run::<false, _, _>(&frames[at..], Bare, net_of, payload) {
            Ok(sent) => at + sent.frames as usize,
            Err(error) => {
                prop_assert_eq!(one(at), Err(error), "there is room for none");
                return Ok(());
            }
        };
        for number in at..end {
            prop_assert_eq!(one(number), Ok(()), "frame {}", number);
        }
        if end < burst.len() {
            let sent = packed.send(net(end), parts[end].0, Payload::private(parts[end].1));
            prop_assert_eq!(sent, one(end), "frame {} by itself", end);
        }
        at = end + 1;
    }
    Ok(())
}

fn both_deliver_the_same_frames_to_the_guest(scenario: &Scenario, in_runs: bool) -> Result<(), TestCaseError> {
    let mut driver = Driver::new(scenario);
    let (mut split, mut packed) = (driver.split.open(scenario.features), driver.packed.open(scenario.features));
    let net = NetHeader { flags: 1, gso_type: 3, hdr_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16 };
    for round in &scenario.rounds {
        round.chains.iter().for_each(|chain| driver.post(chain, WRITE));
        driver.wish(round.wish);
        if round.resume {
            packed = resumed(packed, &driver)?;
        }
        for burst in round.frames.chunks(BURST) {
            if in_runs {
                send_in_runs(&mut split, &mut packed, burst)?;
            }
            for (number, &length) in burst.iter().enumerate().filter(|_| !in_runs) {
                let frame: Vec<u8> = (0..length).map(|at| (at * 7 + number) as u8).collect();
                let (header, tail) = frame.split_at(length.min(HEADER_COPY_BYTES));
                let sent = split.send(net, header, Payload::private(tail));
                prop_assert_eq!(
                    packed.send(net, header, Payload::private(tail)),
                    sent,
                    "frame {} of {}",
                    number,
                    length
                );
            }
            split.flush();
            driver.compare(packed.flush())?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn frames_from_the_guest_are_those_of_a_split_ring(scenario in scenario()) {
        both_deliver_the_same_frames_from_the_guest(&scenario)?;
    }

    #[test]
    fn frames_to_the_guest_are_those_of_a_split_ring(scenario in scenario()) {
        both_deliver_the_same_frames_to_the_guest(&scenario, false)?;
    }

    #[test]
    fn runs_of_frames_to_the_guest_are_those_of_a_split_ring(scenario in scenario()) {
        both_deliver_the_same_frames_to_the_guest(&scenario, true)?;
    }
}

// Notifications.

/// VIRTIO 1.2 §2.8.10: notified when the descriptor that the driver names is used, in its lap, and only then.
#[test]
fn a_call_is_due_when_its_descriptor_is_used_and_only_then() {
    for size in [3, 4, 64] {
        let guest = Guest::new(&[(0, 0x10_0000)]);
        let mut ring = PackedGuestRing::new(&guest, 0, size, 0);
        let mut device = ring.open(F_VERSION_1 | F_EVENT_IDX);
        let mut frames = frames();
        for turn in 0..40 * u32::from(size) {
            let count = (turn % 3 + 1) as u16;
            let before = ring.reaped;
            for id in 0..count {
                ring.post(id, &[(0x8_0000, 60, 0)]);
            }
            let wished = before.after((turn / 3 % 5) as u16 % size, size);
            ring.set_driver_event(wished, EVENT_DESC);
            let mut due = false;
            for ahead in 0..count {
                due |= before.after(ahead, size) == wished;
            }
            assert_eq!(device.receive(&mut frames), Ok(usize::from(count)));
            assert_eq!(device.complete(), due, "size {size}, {before:?} + {count}, wished {wished:?}");
            for _ in 0..count {
                ring.reap(|_| 1).unwrap();
            }
        }
        for (flags, due) in [(EVENT_ENABLE, true), (EVENT_DISABLE, false), (3, true)] {
            ring.post(0, &[(0x8_0000, 60, 0)]);
            ring.set_driver_event(ring.next, flags);
            assert_eq!(device.receive(&mut frames), Ok(1));
            assert_eq!(device.complete(), due, "flags {flags}");
        }
    }
}

#[test]
fn enabling_kicks_reports_what_is_there_already() {
    let guest = Guest::new(&[(0, 0x10_0000)]);
    let mut ring = PackedGuestRing::new(&guest, 0, 16, 0);
    let mut device = ring.open(F_VERSION_1);
    assert!(device.never_used());
    assert!(!device.enable_kicks());
    ring.post(0, &[(0x8_0000, 60, 0)]);
    assert!(!device.never_used());
    assert!(device.enable_kicks());
}

#[test]
fn the_largest_ring_is_walked_more_than_two_laps() {
    let guest = Guest::new(&[(0, 0x20_0000)]);
    let mut ring = PackedGuestRing::new(&guest, 0, 32768, 0);
    let mut device = ring.open(F_VERSION_1);
    let mut frames = frames();
    for _ in 0..70_000 / 32 {
        for id in 0..32 {
            ring.post(id, &[(0x10_0000, 60, 0)]);
        }
        assert_eq!(device.receive(&mut frames), Ok(32));
        device.complete();
        for id in 0..32 {
            assert_eq!(ring.reap(|_| 1), Some((id, 0)));
        }
    }
    assert_eq!(device.next_avail(), ring.next.bits());
}

// After a device was lost.

/// A receiveq of which a frame in three buffers was staged, and not published, when the device was killed.
#[test]
fn a_burst_that_was_cut_off_is_given_back_as_frames_of_no_bytes() {
    for start in 0..8 {
        let guest = Guest::new(&[(0, 0x10_0000)]);
        let mut ring = PackedGuestRing::new(&guest, 0, 8, start);
        let mut device = ring.open(F_VERSION_1 | F_MERGEABLE);
        // One of them a chain of two.
        ring.post(0, &[(0x8_0000, 100, WRITE)]);
        ring.post(1, &[(0x8_1000, 50, WRITE), (0x8_2000, 50, WRITE)]);
        ring.post(2, &[(0x8_3000, 100, WRITE)]);
        ring.post(3, &[(0x8_4000, 100, WRITE)]);
        assert_eq!(device.send(NetHeader::default(), &[7; 250], Payload::EMPTY), Ok(()));
        drop(device);
        assert_eq!(ring.reap(|_| 1), None, "nothing was published");
        let mut device = Ring::resume(ring.setup(F_VERSION_1 | F_MERGEABLE)).unwrap();
        assert_eq!(ring.reap(|_| 1), Some((0, 0)));
        assert_eq!(ring.reap(|_| 2), Some((1, 0)));
        assert_eq!(ring.reap(|_| 1), Some((2, 0)));
        assert_eq!(ring.reap(|_| 1), None);
        assert_eq!(device.send(NetHeader::default(), &[7; 60], Payload::EMPTY), Ok(()));
        device.flush();
        assert_eq!(ring.reap(|_| 1), Some((3, 72)));
    }
}

/// A transmitq of which a batch was staged, and not published, when the device was killed: before, batches were.
#[test]
fn a_batch_that_was_cut_off_is_given_back_whole() {
    let features = F_VERSION_1 | F_IN_ORDER;
    for (start, before, count) in (0..96).map(|n| (n % 8, [0, 1, 2, 5][n as usize / 8 % 4], [1, 3, 8][n as usize / 32]))
    {
        let guest = Guest::new(&[(0, 0x10_0000)]);
        let mut ring = PackedGuestRing::new(&guest, 0, 8, start);
        let mut device = ring.open(features);
        let mut frames = frames();
        (0..before).for_each(|id| ring.post(id, &[(0x8_0000, 60, 0)]));
        assert_eq!(device.receive(&mut frames), Ok(usize::from(before)));
        device.complete();
        ring.reaped = ring.reaped.after(before, 8);
        let head = ring.next;
        (0..count).for_each(|id| ring.post(id, &[(0x8_0000, 60, 0)]));
        let (bytes, id, flags) = ring.read(head.index);
        assert_eq!(device.receive(&mut frames), Ok(usize::from(count)));
        device.complete();
        ring.write(head.index, 0x8_0000, bytes, id, flags);
        drop(device);
        let device = Ring::resume(ring.setup(features)).unwrap();
        // Of one chain nothing is written but its used descriptor: it is served again.
        let given_back = if count == 1 { 0 } else { count };
        assert_eq!(device.next_avail(), head.after(given_back, 8).bits(), "{start} {before} {count}");
        (0..given_back).for_each(|id| assert_eq!(ring.reap(|_| 1), Some((id, 0)), "{start} {before} {count}"));
        assert_eq!(ring.reap(|_| 1), None);
    }
}

#[test]
fn a_ring_that_contradicts_itself_starts_where_the_front_end_says() {
    let guest = Guest::new(&[(0, 0x10_0000)]);
    let ring = PackedGuestRing::new(&guest, 0, 8, 0);
    for index in [1, 3, 6] {
        ring.write(index, 0, 0, 0, AVAIL);
    }
    let setup = RingSetup { next_avail: 5, ..ring.setup(F_VERSION_1) };
    let mut device = Ring::resume(setup).unwrap();
    assert_eq!(device.next_avail(), 5);
    assert_eq!(device.receive(&mut frames()), Ok(0));
    assert_eq!(device.send(NetHeader::default(), b"frame", Payload::EMPTY), Err(SendError::Full));
}
