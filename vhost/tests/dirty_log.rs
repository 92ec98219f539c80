//! The dirty log says exactly what the device wrote: pages marked are pages that differ, after any traffic.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use common::*;
use dreamwire_vhost::dirty_log::{DirtyLog, LOG_PAGE_BYTES, RingLog};
use dreamwire_vhost::frame::NetHeader;
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{Ring, SendError};
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

/// Both rings of a guest, and what its memory held when the device was last looked at.
struct Machine {
    guest: Guest,
    /// Receiveq and transmitq.
    drivers: [GuestRing; 2],
    rings: [Ring; 2],
    log: Arc<DirtyLog>,
    logging: bool,
    written: BTreeSet<u64>,
    next_head: u16,
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
    fn new(bases: [u64; 2], features: u64) -> Self {
        let guest = Guest::new(&REGIONS);
        for (start, bytes) in REGIONS {
            guest.write(start, &vec![FILL; bytes]);
        }
        let log = log(MEMORY_END / LOG_PAGE_BYTES / 8 + 1);
        let drivers = bases.map(|base| {
            let ring = GuestRing::new(&guest, base, SIZE, 0);
            guest.write(ring.available, &[0; 2]);
            ring
        });
        let rings = [0, 1].map(|queue| {
            let mut setup = drivers[queue].setup(features);
            setup.log = Some(RingLog { log: Arc::clone(&log), used_address: Some(drivers[queue].used) });
            Ring::new(setup).unwrap()
        });
        Self { guest, drivers, rings, log, logging: true, written: BTreeSet::new(), next_head: 0, posted: 0 }
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
        for driver in &self.drivers {
            // Everything in the used ring that the device may write, but for the index.
            self.guest.write(driver.used, &[FILL; 2]);
            self.guest.write(driver.used + 4, &vec![FILL; 8 * usize::from(SIZE) + 2]);
        }
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
                let head = self.next_head;
                for (index, &(address, bytes)) in pieces.iter().enumerate() {
                    let slot = (head + index as u16) % SIZE;
                    let more = index + 1 < pieces.len();
                    self.guest.write(address, &vec![FILL; bytes as usize]);
                    let flags = if more { WRITE | NEXT } else { WRITE };
                    self.drivers[0].descriptor(slot, address, bytes, flags, (slot + 1) % SIZE);
                }
                self.next_head = (head + count) % SIZE;
                self.posted += count;
                self.drivers[0].post(head);
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
                self.drivers[1].descriptor(self.drivers[1].available_index % SIZE, address, bytes, 0, 0);
                let head = self.drivers[1].available_index % SIZE;
                self.drivers[1].post(head);
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
                let again = |ring: Ring, driver: &GuestRing| {
                    let mut setup = ring.into_setup();
                    setup.log = on.then(|| RingLog { log: Arc::clone(log), used_address: Some(driver.used) });
                    Ring::new(setup).unwrap()
                };
                let fresh = drivers.each_ref().map(|driver| driver.open(0));
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
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 500, ..ProptestConfig::default() })]

    #[test]
    fn marked_pages_are_the_pages_that_differ(
        steps in proptest::collection::vec(step(), 1..40),
        bases in [0x1_4000..0x1_b000u64, 0x1_c000..0x2_3000u64],
        features in proptest::sample::subsequence(vec![F_VERSION_1, F_MERGEABLE, F_EVENT_IDX], 0..=3),
    ) {
        let features = features.into_iter().sum();
        let mut machine = Machine::new(bases.map(|base| base & !15), features);
        for step in steps {
            machine.step(step);
            prop_assert_eq!(&marked(&machine.log), &machine.written);
        }
        prop_assert_eq!(machine.log.pages_outside(), 0);
    }
}

/// A receiveq whose one frame lands in page 3, its used ring in page 0x14.
fn one_frame(log: RingLog) {
    let guest = Guest::new(&REGIONS);
    let mut driver = GuestRing::new(&guest, 0x1_4000, SIZE, 0);
    let mut setup = driver.setup(F_VERSION_1);
    setup.log = Some(log);
    let mut ring = Ring::new(setup).unwrap();
    driver.descriptor(0, 0x3000, 2048, WRITE, 0);
    driver.post(0);
    ring.send(NetHeader::default(), &[1; 60], Payload::EMPTY).unwrap();
    ring.flush();
}

#[test]
fn writes_to_the_used_ring_are_logged_where_the_front_end_says_if_at_all() {
    for (used_address, expected) in [(None, vec![3]), (Some(0x1_4000), vec![3, 0x14]), (Some(0x7ffd), vec![3, 7, 8])] {
        let log = log(8);
        one_frame(RingLog { log: Arc::clone(&log), used_address });
        assert_eq!(marked(&log), expected.into_iter().collect(), "{used_address:x?}");
        assert_eq!(log.pages_outside(), 0);
    }
}

/// CVE-2020-10722: a log smaller than the memory, and log addresses from anywhere.
#[test]
fn a_log_too_short_and_absurd_log_addresses_lose_bits_and_nothing_else() {
    let short = log(1);
    one_frame(RingLog { log: Arc::clone(&short), used_address: Some(0x1_4000) });
    assert_eq!(marked(&short), [3].into());
    assert!(short.pages_outside() >= 1);
    for address in [u64::MAX, u64::MAX - 3, 1 << 63, 0x4_0000] {
        let log = log(8);
        one_frame(RingLog { log: Arc::clone(&log), used_address: Some(address) });
        assert_eq!(marked(&log), [3].into(), "{address:#x}");
        assert!(log.pages_outside() >= 1);
    }
}

/// CVE-2019-14835 ("V-gHost"): zero-length descriptors while the log is on.
#[test]
fn zero_length_descriptors_are_not_logged() {
    let guest = Guest::new(&REGIONS);
    let mut driver = GuestRing::new(&guest, 0x1_4000, SIZE, 0);
    let log = log(8);
    let mut setup = driver.setup(F_VERSION_1 | F_INDIRECT);
    setup.log = Some(RingLog { log: Arc::clone(&log), used_address: None });
    let mut ring = Ring::new(setup).unwrap();
    // In an indirect table: nothing at all at an address outside of memory, then the buffer, then nothing again.
    for (index, (address, bytes, flags)) in
        [(u64::MAX, 0, NEXT), (0x5000, 0, NEXT), (0x6fff, 200, NEXT), (0xf_0000, 0, 0)].into_iter().enumerate()
    {
        guest.descriptor(0x2000, index as u16, address, bytes, WRITE | flags, index as u16 + 1);
    }
    driver.descriptor(0, 0x2000, 64, INDIRECT, 0);
    driver.post(0);
    ring.send(NetHeader::default(), &[1; 60], Payload::EMPTY).unwrap();
    ring.flush();
    assert_eq!(marked(&log), [6, 7].into());
    assert_eq!(log.pages_outside(), 0);
}
