//! The dirty log says exactly what the device wrote: pages marked are pages that differ, after any traffic, in rings of
//! either layout.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use common::packed::{PackedGuestRing, Piece};
use common::*;
use dreamwire_vhost::dirty_log::{DirtyLog, LOG_PAGE_BYTES, RingLog};
use dreamwire_vhost::frame::{Bare, NetHeader, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{Ring, RingSetup, SendError, Sent};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proptest::prelude::*;

/// Neighbours, then a hole.
const REGIONS: [(u64, usize); 3] = [(0, 0x8000), (0x8000, 0x8000), (0x1_4000, 0x1_0000)];
const BUFFERS_END: u64 = 0x1_0000;
const MEMORY_END: u64 = 0x2_4000;
const SIZE: u16 = 32;
/// What the guest leaves where the device may write. The device writes none of it: frames are below 0x80.
const FILL: u8 = 0xaa;

fn log(bytes: u64) -> Arc<DirtyLog> {
    let file: OwnedFd = memfd_create("log", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&file, bytes as i64).unwrap();
    Arc::new(DirtyLog::map(&file, 0, bytes).unwrap())
}

fn marked(log: &DirtyLog) -> BTreeSet<u64> {
    (0..MEMORY_END / LOG_PAGE_BYTES).filter(|&page| log.is_set(page)).collect()
}

/// One ring's driver. The next free descriptor of a split ring comes with it.
enum Driver {
    Split(GuestRing, u16),
    Packed(PackedGuestRing),
}

impl Driver {
    /// A packed ring stands so many descriptors after its beginning; without, the ring is split.
    fn new(guest: &Guest, base: u64, packed_from: Option<u32>) -> Self {
        match packed_from {
            Some(start) => Self::Packed(PackedGuestRing::new(guest, base, SIZE, start)),
            None => {
                let ring = GuestRing::new(guest, base, SIZE, 0);
                guest.write(ring.available, &[0; 2]);
                Self::Split(ring, 0)
            }
        }
    }

    fn setup(&self, features: u64) -> RingSetup {
        match self {
            Self::Split(ring, _) => ring.setup(features),
            Self::Packed(ring) => ring.setup(features),
        }
    }

    fn open(&self, features: u64, log: Option<RingLog>) -> Ring {
        Ring::new(RingSetup { log, ..self.setup(features) }).unwrap()
    }

    /// Where the front-end says that the used ring is to be logged.
    fn used_address(&self) -> Option<u64> {
        Some(self.setup(0).used)
    }

    /// Spoils what the device may write, and does not read, but for the used index: whatever it writes there then differs.
    /// The flags of a packed ring's descriptors differ anyhow.
    fn spoil(&self) {
        match self {
            Self::Split(ring, _) => {
                ring.guest.write(ring.used, &[FILL; 2]);
                ring.guest.write(ring.used + 4, &vec![FILL; 8 * usize::from(SIZE) + 2]);
            }
            Self::Packed(ring) => ring.guest.write(ring.device_event, &[FILL; 4]),
        }
    }

    fn post(&mut self, pieces: &[Piece]) {
        match self {
            Self::Split(ring, free) => {
                let head = *free;
                for (number, &(address, bytes, flags)) in (1..).zip(pieces) {
                    let next = (*free + 1) % SIZE;
                    let more = if number < pieces.len() { NEXT } else { 0 };
                    ring.descriptor(*free, address, bytes, flags | more, next);
                    *free = next;
                }
                ring.post(head);
            }
            Self::Packed(ring) => ring.post(ring.next.index, pieces),
        }
    }
}

/// Both rings of a guest, and what its memory held when the device was last looked at.
struct Machine {
    guest: Guest,
    /// Receiveq and transmitq.
    drivers: [Driver; 2],
    rings: [Ring; 2],
    log: Arc<DirtyLog>,
    logging: bool,
    written: BTreeSet<u64>,
    posted: u16,
}

#[derive(Debug, Clone)]
enum Step {
    /// Pieces of a buffer to receive into: address, bytes.
    Post(Vec<(u64, u32)>),
    Deliver(usize),
    Transmit(u64, u32),
    Sleep,
    Wake,
    Log(bool),
}

impl Machine {
    fn new(bases: [u64; 2], features: u64, packed_from: Option<u32>) -> Self {
        let guest = Guest::new(&REGIONS);
        for (start, bytes) in REGIONS {
            guest.write(start, &vec![FILL; bytes]);
        }
        let log = log(MEMORY_END / LOG_PAGE_BYTES / 8 + 1);
        let drivers = bases.map(|base| Driver::new(&guest, base, packed_from));
        let rings = drivers.each_ref().map(|driver| {
            driver.open(features, Some(RingLog { log: Arc::clone(&log), used_address: driver.used_address() }))
        });
        Self { guest, drivers, rings, log, logging: true, written: BTreeSet::new(), posted: 0 }
    }

    fn image(&self) -> Vec<u8> {
        let mut image = vec![0; MEMORY_END as usize];
        for (start, bytes) in REGIONS {
            image[start as usize..start as usize + bytes].copy_from_slice(&self.guest.read(start, bytes));
        }
        image
    }

    /// Lets the device do something, and notes the pages that differ afterwards.
    fn device(&mut self, act: impl FnOnce(&mut [Ring; 2])) {
        self.drivers.iter().for_each(Driver::spoil);
        let before = self.image();
        act(&mut self.rings);
        let differs = before.iter().zip(self.image()).enumerate().filter(|(_, (old, new))| *old != new);
        if self.logging {
            self.written.extend(differs.map(|(at, _)| at as u64 / LOG_PAGE_BYTES));
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Post(pieces) => {
                let count = pieces.len() as u16;
                // Only descriptors that no posted chain has: the test's guest is honest.
                if self.posted + count > SIZE {
                    return;
                }
                for &(address, bytes) in &pieces {
                    self.guest.write(address, &vec![FILL; bytes as usize]);
                }
                let chain: Vec<Piece> = pieces.into_iter().map(|(address, bytes)| (address, bytes, WRITE)).collect();
                self.posted += count;
                self.drivers[0].post(&chain);
            }
            Step::Deliver(bytes) => {
                let frame: Vec<u8> = (0..bytes).map(|at| at as u8 & 0x7f).collect();
                let (header, rest) = frame.split_at(bytes.min(100));
                self.device(|[receiveq, _]| {
                    match receiveq.send(NetHeader::default(), header, Payload::private(rest)) {
                        Ok(()) | Err(SendError::Full | SendError::BufferTooSmall) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                    receiveq.flush();
                });
            }
            Step::Transmit(address, bytes) => {
                self.drivers[1].post(&[(address, bytes, 0)]);
                self.device(|[_, transmitq]| {
                    assert_eq!(transmitq.receive(&mut frames()), Ok(1));
                    transmitq.complete();
                });
            }
            Step::Sleep => self.device(|rings| {
                rings.iter_mut().for_each(|ring| {
                    ring.enable_kicks();
                });
            }),
            Step::Wake => self.device(|rings| rings.iter_mut().for_each(Ring::disable_kicks)),
            Step::Log(on) => {
                self.logging = on;
                let (log, drivers) = (&self.log, &self.drivers);
                let again = |ring: Ring, driver: &Driver| {
                    let log = on.then(|| RingLog { log: Arc::clone(log), used_address: driver.used_address() });
                    Ring::new(RingSetup { log, ..ring.into_setup() }).unwrap()
                };
                let fresh = drivers.each_ref().map(|driver| driver.open(0, None));
                let [receiveq, transmitq] = std::mem::replace(&mut self.rings, fresh);
                self.rings = [again(receiveq, &drivers[0]), again(transmitq, &drivers[1])];
            }
        }
    }
}

fn piece() -> impl Strategy<Value = (u64, u32)> {
    let bytes = prop_oneof![1 => Just(0u32), 4 => 1..300u32, 2 => 1000..6000u32];
    (0..BUFFERS_END, bytes).prop_map(|(address, bytes)| (address.min(BUFFERS_END - u64::from(bytes)), bytes))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => proptest::collection::vec(piece(), 1..4).prop_map(Step::Post),
        6 => (1..5000usize).prop_map(Step::Deliver),
        3 => (0..BUFFERS_END - 2000, 14..2000u32).prop_map(|(address, bytes)| Step::Transmit(address, bytes)),
        1 => Just(Step::Sleep),
        1 => Just(Step::Wake),
        1 => any::<bool>().prop_map(Step::Log),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 500, ..ProptestConfig::default() })]

    #[test]
    fn marked_pages_are_the_pages_that_differ(
        steps in proptest::collection::vec(step(), 1..40),
        bases in [0x1_4000..0x1_b000u64, 0x1_c000..0x2_3000u64],
        features in proptest::sample::subsequence(vec![F_VERSION_1, F_MERGEABLE, F_EVENT_IDX], 0..=3),
        packed_from in proptest::option::of(0..4 * u32::from(SIZE)),
    ) {
        let features = features.into_iter().sum();
        let mut machine = Machine::new(bases.map(|base| base & !15), features, packed_from);
        for step in steps {
            machine.step(step);
            prop_assert_eq!(&marked(&machine.log), &machine.written);
        }
        prop_assert_eq!(machine.log.pages_outside(), 0);
    }
}

/// A receiveq whose one frame lands in page 3, its used ring (packed: all of it) in page 0x14.
fn one_frame(log: RingLog, packed_from: Option<u32>) {
    let guest = Guest::new(&REGIONS);
    let mut driver = Driver::new(&guest, 0x1_4000, packed_from);
    let mut ring = driver.open(F_VERSION_1, Some(log));
    driver.post(&[(0x3000, 2048, WRITE)]);
    ring.send(NetHeader::default(), &[1; 60], Payload::EMPTY).unwrap();
    ring.flush();
}

/// Of a run nothing is written: each frame goes by itself, and is logged.
#[test]
fn a_ring_that_is_logged_takes_no_runs() {
    for packed_from in [None, Some(0)] {
        let guest = Guest::new(&REGIONS);
        let mut driver = Driver::new(&guest, 0x1_4000, packed_from);
        let log = log(8);
        let mut ring = driver.open(F_VERSION_1, Some(RingLog { log: Arc::clone(&log), used_address: None }));
        driver.post(&[(0x3000, 2048, WRITE)]);
        let frame = RawFrame { header_bytes: 60, frame_bytes: 60, ..RawFrame::EMPTY };
        assert_eq!(ring.send_run::<false, _, _>(&[frame], Bare, |_| None, |_| Payload::EMPTY), Ok(Sent::default()));
        assert_eq!(marked(&log), [].into());
    }
}

#[test]
fn writes_to_the_used_ring_are_logged_where_the_front_end_says_if_at_all() {
    for (used_address, expected) in [(None, vec![3]), (Some(0x1_4000), vec![3, 0x14]), (Some(0x7ffd), vec![3, 7, 8])] {
        let log = log(8);
        one_frame(RingLog { log: Arc::clone(&log), used_address }, None);
        assert_eq!(marked(&log), expected.into_iter().collect(), "{used_address:x?}");
        assert_eq!(log.pages_outside(), 0);
    }
}

/// A packed ring has no used ring: its descriptors are logged, where they are, if the front-end wants anything logged.
#[test]
fn descriptors_of_a_packed_ring_are_logged_where_they_are_if_at_all() {
    for (used_address, expected) in [(None, vec![3]), (Some(0x1_4000), vec![3, 0x14]), (Some(0x7ffd), vec![3, 0x14])] {
        let log = log(8);
        one_frame(RingLog { log: Arc::clone(&log), used_address }, Some(0));
        assert_eq!(marked(&log), expected.into_iter().collect(), "{used_address:x?}");
        assert_eq!(log.pages_outside(), 0);
    }
}

/// A frame in the last and the first descriptor of a packed ring, which lie in two pages: both are marked.
#[test]
fn descriptors_on_both_sides_of_the_end_of_a_packed_ring_are_logged() {
    let guest = Guest::new(&REGIONS);
    let mut driver = Driver::new(&guest, 0x1_4f00, Some(u32::from(SIZE) - 1));
    let log = log(8);
    let ring_log = RingLog { log: Arc::clone(&log), used_address: driver.used_address() };
    let mut ring = driver.open(F_VERSION_1 | F_MERGEABLE, Some(ring_log));
    driver.post(&[(0x3000, 100, WRITE)]);
    driver.post(&[(0x3100, 100, WRITE)]);
    ring.send(NetHeader::default(), &[1; 150], Payload::EMPTY).unwrap();
    ring.flush();
    assert_eq!(marked(&log), [3, 0x14, 0x15].into());
}

/// CVE-2020-10722: a log smaller than the memory, and log addresses from anywhere.
#[test]
fn a_log_too_short_and_absurd_log_addresses_lose_bits_and_nothing_else() {
    let short = log(1);
    one_frame(RingLog { log: Arc::clone(&short), used_address: Some(0x1_4000) }, None);
    one_frame(RingLog { log: Arc::clone(&short), used_address: Some(0x1_4000) }, Some(0));
    assert_eq!(marked(&short), [3].into());
    assert!(short.pages_outside() >= 2);
    for address in [u64::MAX, u64::MAX - 3, 1 << 63, 0x4_0000] {
        let log = log(8);
        one_frame(RingLog { log: Arc::clone(&log), used_address: Some(address) }, None);
        assert_eq!(marked(&log), [3].into(), "{address:#x}");
        assert!(log.pages_outside() >= 1);
    }
}

/// CVE-2019-14835 ("V-gHost"): zero-length descriptors while the log is on.
#[test]
fn zero_length_descriptors_are_not_logged() {
    for packed_from in [None, Some(0)] {
        let guest = Guest::new(&REGIONS);
        let mut driver = Driver::new(&guest, 0x1_4000, packed_from);
        let log = log(8);
        let ring_log = RingLog { log: Arc::clone(&log), used_address: None };
        let mut ring = driver.open(F_VERSION_1 | F_INDIRECT, Some(ring_log));
        // In an indirect table: nothing at all at an address outside of memory, then the buffer, then nothing again.
        let pieces = [(u64::MAX, 0), (0x5000, 0), (0x6fff, 200), (0xf_0000, 0)];
        for (index, (address, bytes)) in (0..).zip(pieces) {
            let next = if usize::from(index) + 1 < pieces.len() { NEXT } else { 0 };
            match packed_from {
                None => guest.descriptor(0x2000, index, address, bytes, WRITE | next, index + 1),
                // Id and flags stand where a split ring has flags and next.
                Some(_) => guest.descriptor(0x2000, index, address, bytes, 0, WRITE),
            }
        }
        driver.post(&[(0x2000, 64, INDIRECT)]);
        ring.send(NetHeader::default(), &[1; 60], Payload::EMPTY).unwrap();
        ring.flush();
        assert_eq!(marked(&log), [6, 7].into(), "packed: {}", packed_from.is_some());
        assert_eq!(log.pages_outside(), 0);
    }
}
