//! The burst path against virtio-queue's `Queue` in the hands of a device as simple as can be: the same memory given to
//! both, the same chains posted, everything compared, down to every byte of guest memory.

mod common;

use std::collections::HashMap;

use common::*;
use dreamwire_vhost::frame::{Bare, Before, FrameFault, HEADER_COPY_BYTES, NetHeader, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{BURST, CHAIN_SEGMENTS_MAX, FRAME_BYTES_MAX, MERGED_CHAINS_MAX, Ring, SendError};
use proptest::collection::vec;
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

/// The first region holds ring and tables; buffers lie in both and across their border.
const BORDER: u64 = 0x6_0000;
const MEMORY_END: u64 = 0x9_0000;
const TABLES: u64 = 0x2_0000;
const TABLE_ROOM: u64 = 512;
const BUFFERS: u64 = 0x4_0000;

/// One chain that the driver posts.
#[derive(Debug, Clone)]
struct Chain {
    pieces: Vec<u32>,
    /// How many pieces stand before the indirect table; `None`: there is no table.
    indirect_from: Option<usize>,
    seed: u64,
}

/// One turn: the driver posts chains, then the device serves.
#[derive(Debug, Clone)]
struct Round {
    chains: Vec<Chain>,
    /// Frames sent to the guest, by length.
    frames: Vec<usize>,
    /// Where `used_event` stands, from the used index.
    used_event: i16,
    no_interrupt: bool,
}

#[derive(Debug, Clone)]
struct Scenario {
    size: u16,
    first_index: u16,
    features: u64,
    rounds: Vec<Round>,
}

fn chain() -> impl Strategy<Value = Chain> {
    let header_split = prop_oneof![
        4 => Just(vec![]),
        1 => Just(vec![12]),
        1 => Just(vec![10]),
        1 => Just(vec![1, 11]),
        1 => Just(vec![4, 4, 4]),
        1 => Just(vec![1; 12]),
        1 => Just(vec![0, 5, 0, 7]),
    ];
    let piece = prop_oneof![2 => Just(0u32), 6 => 1..200u32, 6 => 200..2100u32, 1 => 30_000..66_000u32];
    let pieces = (header_split, vec(piece, 0..6)).prop_map(|(header, rest)| [header, rest].concat());
    (pieces, proptest::option::of(0..8usize), any::<u64>()).prop_map(|(mut pieces, indirect_from, seed)| {
        if pieces.is_empty() {
            pieces.push(64);
        }
        Chain { indirect_from: indirect_from.map(|from| from.min(pieces.len() - 1)), pieces, seed }
    })
}

fn round() -> impl Strategy<Value = Round> {
    let frame = prop_oneof![4 => 0..200usize, 4 => 200..1600usize, 1 => 1600..66_000usize];
    (vec(chain(), 0..40), vec(frame, 0..40), -40..40i16, any::<bool>())
        .prop_map(|(chains, frames, used_event, no_interrupt)| Round { chains, frames, used_event, no_interrupt })
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let size = prop_oneof![Just(1u16), Just(2), Just(4), Just(16), Just(64), Just(256)];
    let first = prop_oneof![Just(0u16), 65500..=65535u16, any::<u16>()];
    let features = proptest::sample::subsequence(vec![F_VERSION_1, F_MERGEABLE, F_INDIRECT, F_EVENT_IDX], 0..=4);
    (size, first, features, vec(round(), 1..6)).prop_map(|(size, first_index, features, rounds)| Scenario {
        size,
        first_index,
        features: features.iter().sum(),
        rounds,
    })
}

/// The guest's driver. It plays the same to two memories: ours and the oracle's.
struct Driver {
    rings: [GuestRing; 2],
    features: u64,
    free: Vec<u16>,
    taken: HashMap<u32, Vec<u16>>,
    used_seen: u16,
}

impl Driver {
    fn new(scenario: &Scenario) -> Self {
        let ring = || {
            let guest = Guest::new(&[(0, BORDER as usize), (BORDER, (MEMORY_END - BORDER) as usize)]);
            let bytes: Vec<u8> = (0..MEMORY_END - BUFFERS).map(|n| (n % 253) as u8).collect();
            guest.write(BUFFERS, &bytes);
            GuestRing::new(&guest, 0x1_0000, scenario.size, scenario.first_index)
        };
        Self {
            rings: [ring(), ring()],
            features: scenario.features,
            free: (0..scenario.size).collect(),
            taken: HashMap::new(),
            used_seen: scenario.first_index,
        }
    }

    /// Posts a chain, if there are descriptors for it.
    fn post(&mut self, chain: &Chain, direction: u16) {
        let indirect = chain.indirect_from.filter(|_| self.features & F_INDIRECT != 0);
        let direct = indirect.map_or(chain.pieces.len(), |from| from + 1);
        if direct > self.free.len() {
            return;
        }
        let mut dice = chain.seed | 1;
        let mut roll = |below: u64| {
            dice = dice.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (dice >> 33) % below
        };
        let places: Vec<u16> =
            (0..direct).map(|_| self.free.swap_remove(roll(self.free.len() as u64) as usize)).collect();
        let head = places[0];
        let table = TABLES + TABLE_ROOM * u64::from(head) + roll(16);
        let buffers: Vec<u64> =
            chain.pieces.iter().map(|&b| BUFFERS + roll(MEMORY_END - BUFFERS - u64::from(b))).collect();
        let split = indirect.unwrap_or(chain.pieces.len());
        for ring in &mut self.rings {
            for (at, (&bytes, &address)) in chain.pieces.iter().zip(&buffers).enumerate() {
                if at < split {
                    let next = places.get(at + 1).copied();
                    let flags = direction | if next.is_some() { NEXT } else { 0 };
                    ring.descriptor(places[at], address, bytes, flags, next.unwrap_or(0));
                } else {
                    let index = (at - split) as u16;
                    let flags = direction | if at + 1 < chain.pieces.len() { NEXT } else { 0 };
                    ring.guest.descriptor(table, index, address, bytes, flags, index + 1);
                }
            }
            if indirect.is_some() {
                let bytes = 16 * (chain.pieces.len() - split) as u32;
                ring.descriptor(places[split], table, bytes, INDIRECT, 0);
            }
            ring.post(head);
        }
        self.taken.insert(u32::from(head), places);
    }

    fn wish(&mut self, round: &Round) {
        for ring in &self.rings {
            ring.set_available_flags(u16::from(round.no_interrupt));
            ring.set_used_event(self.used_seen.wrapping_add_signed(round.used_event));
        }
    }

    /// Compares both memories, byte for byte, and takes the used chains back.
    fn compare(&mut self) -> Result<(), TestCaseError> {
        let [ours, oracles] = &self.rings;
        prop_assert_eq!(ours.used_index(), oracles.used_index());
        prop_assert_eq!(ours.used_bytes(), oracles.used_bytes());
        let all = MEMORY_END as usize;
        prop_assert!(ours.guest.read(0, all) == oracles.guest.read(0, all), "the memories differ");
        while self.used_seen != ours.used_index() {
            let (head, _) = ours.used_entry(self.used_seen);
            self.free.extend(self.taken.remove(&head).expect("a chain that was posted"));
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        Ok(())
    }
}

/// The oracle: virtio-queue, one chain at a time.
struct Oracle {
    queue: Queue,
    guest: Guest,
    net_header_bytes: usize,
    mergeable: bool,
}

impl Oracle {
    fn new(ring: &GuestRing, features: u64) -> Self {
        let mut queue = Queue::new(ring.size).expect("a size");
        queue.set_size(ring.size);
        queue.try_set_desc_table_address(GuestAddress(ring.descriptors)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(ring.available)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(ring.used)).expect("aligned");
        queue.set_next_avail(ring.first_index);
        queue.set_next_used(ring.first_index);
        queue.set_event_idx(features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        assert!(queue.is_valid(ring.guest.mapped()));
        Self {
            queue,
            guest: ring.guest.clone(),
            net_header_bytes: if features & (F_VERSION_1 | F_MERGEABLE) != 0 { 12 } else { 10 },
            mergeable: features & F_MERGEABLE != 0,
        }
    }

    fn pop(&mut self) -> Option<(u16, Vec<Descriptor>)> {
        let chain = self.queue.iter(self.guest.mapped()).expect("a sound ring").next()?;
        let head = chain.head_index();
        Some((head, chain.collect()))
    }

    /// All bytes of the next chain.
    fn receive(&mut self) -> Option<(u16, Vec<u8>)> {
        let (head, descriptors) = self.pop()?;
        let mut bytes = Vec::new();
        for descriptor in descriptors {
            bytes.extend(self.guest.read(descriptor.addr().raw_value(), descriptor.len() as usize));
        }
        Some((head, bytes))
    }

    fn add_used(&mut self, head: u16, bytes: u32) {
        self.queue.add_used(self.guest.mapped(), head, bytes).expect("a sound ring");
    }

    fn send(&mut self, net: NetHeader, frame: &[u8]) -> Result<(), SendError> {
        let start = self.queue.next_avail();
        let result = self.try_send(net, frame);
        if result.is_err() {
            self.queue.set_next_avail(start);
        }
        result
    }

    fn try_send(&mut self, net: NetHeader, frame: &[u8]) -> Result<(), SendError> {
        let need = self.net_header_bytes + frame.len();
        let (mut chains, mut room) = (Vec::new(), 0);
        while room < need {
            if !chains.is_empty() && (!self.mergeable || chains.len() == MERGED_CHAINS_MAX) {
                return Err(SendError::BufferTooSmall);
            }
            let (head, descriptors) = self.pop().ok_or(SendError::Full)?;
            let pieces: Vec<_> =
                descriptors.into_iter().map(|descriptor| (descriptor.addr(), descriptor.len() as usize)).collect();
            let bytes: usize = pieces.iter().map(|piece| piece.1).sum();
            if chains.is_empty() && bytes < self.net_header_bytes {
                return Err(SendError::BufferTooSmall);
            }
            room += bytes;
            chains.push((head, pieces));
        }
        let mut all = net.to_bytes(chains.len() as u16)[..self.net_header_bytes].to_vec();
        all.extend(frame);
        let mut left = &all[..];
        for (head, pieces) in chains {
            let before = left.len();
            for (address, bytes) in pieces {
                let (now, later) = left.split_at(bytes.min(left.len()));
                self.guest.mapped().write_slice(now, address).expect("an address in the guest");
                left = later;
            }
            self.add_used(head, (before - left.len()) as u32);
        }
        Ok(())
    }

    fn needs_notification(&mut self) -> bool {
        self.queue.needs_notification(self.guest.mapped()).expect("a sound ring")
    }

    fn enable_kicks(&mut self) -> bool {
        self.queue.enable_notification(self.guest.mapped()).expect("a sound ring")
    }
}

/// What both decided about a notification. virtio-queue knows only EVENT_IDX; without it the flag decides.
fn compare_notification(
    notified: bool,
    oracle: &mut Oracle,
    used: bool,
    scenario: &Scenario,
    round: &Round,
) -> Result<(), TestCaseError> {
    let expected = oracle.needs_notification();
    if scenario.features & F_EVENT_IDX != 0 {
        prop_assert_eq!(notified, expected);
    } else {
        prop_assert_eq!(notified, used && !round.no_interrupt);
    }
    Ok(())
}

fn frames_from_the_guest_are_the_same(scenario: &Scenario) -> Result<(), TestCaseError> {
    let mut driver = Driver::new(scenario);
    let mut ring = driver.rings[0].open(scenario.features);
    let mut oracle = Oracle::new(&driver.rings[1], scenario.features);
    let mut frames = frames();
    for round in &scenario.rounds {
        for chain in &round.chains {
            driver.post(chain, 0);
        }
        driver.wish(round);
        loop {
            let count = ring.receive(&mut frames).expect("a sound ring");
            if !round.no_interrupt {
                ring.expect_frames();
            }
            for frame in &frames[..count] {
                let (head, bytes) = oracle.receive().expect("the oracle has as many");
                oracle.add_used(head, 0);
                compare_frame(&ring, frame, &bytes, oracle.net_header_bytes)?;
            }
            let waiting = driver.rings[0].available_index.wrapping_sub(driver.rings[0].used_index());
            prop_assert!(count <= usize::from(waiting));
            prop_assert_eq!(ring.next_avail(), driver.rings[0].used_index(), "taken chains are still the guest's");
            compare_notification(ring.complete(), &mut oracle, count > 0, scenario, round)?;
            prop_assert_eq!(ring.next_avail(), oracle.queue.next_avail());
            prop_assert_eq!(ring.next_used(), oracle.queue.next_used());
            if count == 0 {
                break;
            }
        }
        prop_assert!(oracle.receive().is_none(), "the oracle has no more");
        prop_assert_eq!(ring.enable_kicks(), oracle.enable_kicks());
        driver.compare()?;
    }
    Ok(())
}

fn compare_frame(ring: &Ring, frame: &RawFrame, bytes: &[u8], net_header_bytes: usize) -> Result<(), TestCaseError> {
    let Some((net, bytes)) = bytes.split_at_checked(net_header_bytes) else {
        prop_assert_eq!(frame.fault, Some(FrameFault::NoHeader));
        return Ok(());
    };
    if bytes.len() as u64 > u64::from(FRAME_BYTES_MAX) {
        prop_assert_eq!(frame.fault, Some(FrameFault::TooLarge));
        return Ok(());
    }
    let mut whole = [0; 12];
    whole[..net.len()].copy_from_slice(net);
    prop_assert_eq!(frame.fault, None);
    prop_assert_eq!(frame.net, NetHeader::from_bytes(&whole));
    prop_assert_eq!(frame.frame_bytes as usize, bytes.len());
    prop_assert_eq!(usize::from(frame.header_bytes), bytes.len().min(HEADER_COPY_BYTES));
    prop_assert!(frame_bytes(ring, frame) == bytes, "the bytes differ");
    Ok(())
}

/// How frames are put into a ring.
#[derive(Debug, Clone, Copy)]
enum Way {
    OneByOne,
    /// In runs, as far as they go.
    Runs,
    /// In runs, each behind an outer header.
    Wrapped,
}

/// 50 bytes, of which two words are the frame's own.
struct Outer;

impl Outer {
    const SAME: [u8; 50] = [0xe0; 50];

    fn of(length: usize) -> [u8; 50] {
        let mut bytes = Self::SAME;
        bytes[16..18].copy_from_slice(&(length as u16).to_be_bytes());
        bytes[48..50].copy_from_slice(&[1, length as u8]);
        bytes
    }
}

impl Before<50, 2> for Outer {
    fn same(&self) -> &[u8; 50] {
        &Self::SAME
    }

    fn words(&mut self, frame: &RawFrame) -> Option<[(usize, [u8; 2]); 2]> {
        // One kind of frame is not to be sent.
        let length = frame.frame_bytes;
        (length % 13 != 5).then_some([(16, (length as u16).to_be_bytes()), (48, [1, length as u8])])
    }
}

/// The frame of this length that is number `number` of its burst, as a burst has it, and its tail.
fn raw(number: usize, length: usize) -> (RawFrame, Vec<u8>) {
    let bytes: Vec<u8> = (0..length).map(|at| (at * 7 + number) as u8).collect();
    let (header, tail) = bytes.split_at(length.min(HEADER_COPY_BYTES));
    let mut frame = RawFrame { header_bytes: header.len() as u16, frame_bytes: length as u32, ..RawFrame::EMPTY };
    frame.header[..header.len()].copy_from_slice(header);
    (frame, tail.to_vec())
}

/// Sends a burst in runs, and each frame that a run stops at by itself, as the datapath does. The oracle sends them one by one.
fn send_in_runs(ring: &mut Ring, oracle: &mut Oracle, burst: &[usize], is_wrapped: bool) -> Result<(), TestCaseError> {
    let net = |number: usize| NetHeader { hdr_len: number as u16, gso_size: 7, ..NetHeader::default() };
    // None of every third: its header is empty.
    let run_net = |number: usize| (!number.is_multiple_of(3)).then(|| net(number));
    let (frames, tails): (Vec<_>, Vec<_>) = (0..).zip(burst).map(|(number, &length)| raw(number, length)).unzip();
    let expected = |number: usize| {
        let outer = if is_wrapped { Outer::of(burst[number]).to_vec() } else { Vec::new() };
        [outer, frames[number].headers().to_vec(), tails[number].clone()].concat()
    };
    let mut at = 0;
    while at < burst.len() {
        let (net_of, payload) = (|ahead| run_net(at + ahead), |ahead: usize| Payload::private(&tails[at + ahead]));
        let sent = match is_wrapped {
            true => ring.send_run::<false, _, _>(&frames[at..], Outer, net_of, payload),
            false => ring.send_run::<false, _, _>(&frames[at..], Bare, net_of, payload),
        };
        let sent = match sent {
            Ok(sent) => sent,
            Err(error) => {
                let net = run_net(at).unwrap_or_default();
                prop_assert_eq!(oracle.send(net, &expected(at)), Err(error), "there is room for none");
                return Ok(());
            }
        };
        let end = at + sent.frames as usize;
        prop_assert_eq!(sent.bytes, burst[at..end].iter().map(|&length| length as u64).sum::<u64>());
        for (number, length) in burst.iter().enumerate().take(end).skip(at) {
            prop_assert!(!is_wrapped || length % 13 != 5, "not to be sent");
            let sent = oracle.send(run_net(number).unwrap_or_default(), &expected(number));
            prop_assert_eq!(sent, Ok(()), "frame {}", number);
        }
        if end < burst.len() {
            let whole = expected(end);
            let sent = ring.send(net(end), &whole, Payload::EMPTY);
            prop_assert_eq!(sent, oracle.send(net(end), &whole), "frame {} by itself", end);
        }
        at = end + 1;
    }
    Ok(())
}

fn frames_to_the_guest_are_the_same(scenario: &Scenario, way: Way) -> Result<(), TestCaseError> {
    let mut driver = Driver::new(scenario);
    let mut ring = driver.rings[0].open(scenario.features);
    let mut oracle = Oracle::new(&driver.rings[1], scenario.features);
    let net = NetHeader { flags: 1, gso_type: 3, hdr_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16 };
    for round in &scenario.rounds {
        for chain in &round.chains {
            driver.post(chain, WRITE);
        }
        driver.wish(round);
        for burst in round.frames.chunks(BURST) {
            let before = ring.next_used();
            match way {
                Way::OneByOne => {
                    for (number, &length) in burst.iter().enumerate() {
                        let (frame, tail) = raw(number, length);
                        let sent = ring.send(net, frame.headers(), Payload::private(&tail));
                        let whole = [frame.headers(), &tail].concat();
                        prop_assert_eq!(sent, oracle.send(net, &whole), "frame {} of {} bytes", number, length);
                    }
                }
                Way::Runs => send_in_runs(&mut ring, &mut oracle, burst, false)?,
                Way::Wrapped => send_in_runs(&mut ring, &mut oracle, burst, true)?,
            }
            let used = ring.next_used() != before;
            compare_notification(ring.flush(), &mut oracle, used, scenario, round)?;
            prop_assert_eq!(ring.next_avail(), oracle.queue.next_avail());
            prop_assert_eq!(ring.next_used(), oracle.queue.next_used());
        }
        prop_assert_eq!(ring.enable_kicks(), oracle.enable_kicks());
        driver.compare()?;
    }
    Ok(())
}

/// Pieces of one chain at most here; beyond the maximum the two differ on purpose (tests of hostile rings).
const _: () = assert!(12 + 6 < CHAIN_SEGMENTS_MAX && 16 * (12 + 6) + 16 <= TABLE_ROOM as usize);

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn frames_from_the_guest_are_those_that_virtio_queue_reads(scenario in scenario()) {
        frames_from_the_guest_are_the_same(&scenario)?;
    }

    #[test]
    fn frames_to_the_guest_land_where_virtio_queue_writes_them(scenario in scenario()) {
        frames_to_the_guest_are_the_same(&scenario, Way::OneByOne)?;
    }

    #[test]
    fn runs_of_frames_land_where_single_ones_do(scenario in scenario(), is_wrapped: bool) {
        frames_to_the_guest_are_the_same(&scenario, if is_wrapped { Way::Wrapped } else { Way::Runs })?;
    }
}

#[test]
fn every_index_is_passed_without_a_stumble() {
    // More than 65536 chains through a small ring: each index value is a start, an end and a notification point once.
    let round = |used_event| Round {
        chains: vec![Chain { pieces: vec![12, 60], indirect_from: None, seed: 5 }; 3],
        frames: vec![40],
        used_event,
        no_interrupt: false,
    };
    let scenario = Scenario { size: 8, first_index: 65530, features: F_VERSION_1 | F_EVENT_IDX, rounds: vec![] };
    let mut driver = Driver::new(&scenario);
    let mut ring = driver.rings[0].open(scenario.features);
    let mut oracle = Oracle::new(&driver.rings[1], scenario.features);
    let mut frames = frames();
    for turn in 0..22_000i32 {
        let round = round((turn % 7) as i16 - 3);
        round.chains.iter().for_each(|chain| driver.post(chain, 0));
        driver.wish(&round);
        assert_eq!(ring.receive(&mut frames), Ok(3));
        for _ in 0..3 {
            let (head, _) = oracle.receive().unwrap();
            oracle.add_used(head, 0);
        }
        assert_eq!(ring.complete(), oracle.needs_notification());
        assert_eq!(driver.rings[0].used_index(), driver.rings[1].used_index());
        while driver.used_seen != driver.rings[0].used_index() {
            let (head, _) = driver.rings[0].used_entry(driver.used_seen);
            let places = driver.taken.remove(&head).unwrap();
            driver.free.extend(places);
            driver.used_seen = driver.used_seen.wrapping_add(1);
        }
    }
}
