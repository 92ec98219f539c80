//! Frames for a driver as far away as memory are those of one that is near, in either layout.
#![allow(clippy::unwrap_used)]

mod common;

use common::packed::PackedGuestRing;
use common::*;
use dreamwire_vhost::frame::{Bare, Before, HEADER_COPY_BYTES, NetHeader, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{BURST, Ring, SendError};
use proptest::collection::vec;
use proptest::prelude::*;

const TRANSMIT: u64 = 0;
const RECEIVE: u64 = 0x1_0000;
/// Where frames are sent from.
const FRAMES: u64 = 0x2_0000;
const FRAME_ROOM: u64 = 0x1_0000;
/// Where they go to: rooms for buffers, of which none touches another's cache lines but for the one behind it.
const BUFFERS: u64 = 0x30_0000;
const BUFFER_ROOM: u64 = 0x1000;
const MEMORY_END: u64 = 0x40_0000;
const SIZE: u16 = 128;
const LINE: u64 = 64;
/// What the receiver's memory is full of.
const FILL: u8 = 0xa5;

/// 50 bytes, of which two words are the frame's own.
struct Outer;

impl Before<50, 2> for Outer {
    fn same(&self) -> &[u8; 50] {
        &[0xe0; 50]
    }

    fn words(&mut self, frame: &RawFrame) -> Option<[(usize, [u8; 2]); 2]> {
        let length = frame.frame_bytes as u16;
        Some([(16, length.to_be_bytes()), (48, [1, length as u8])])
    }
}

#[derive(Debug, Clone)]
struct Scenario {
    is_packed: bool,
    is_wrapped: bool,
    features: u64,
    /// The pieces that each frame is sent in.
    frames: Vec<Vec<u32>>,
    /// Where each buffer begins in its room, and its bytes.
    buffers: Vec<(u64, u32)>,
}

fn scenario() -> impl Strategy<Value = Scenario> {
    let piece = || prop_oneof![3 => 1..130u32, 2 => 130..500u32, 1 => 500..2000u32];
    let frame = prop_oneof![3 => piece().prop_map(|bytes| vec![bytes]), 1 => vec(piece(), 2..5)];
    let start = prop_oneof![2 => Just(0u64), 1 => Just(52u64), 2 => 0..128u64];
    let buffer = (start, prop_oneof![1 => 12..300u32, 3 => 300..3800u32]);
    let features = proptest::sample::subsequence(vec![F_VERSION_1, F_MERGEABLE], 0..=2);
    (any::<bool>(), any::<bool>(), features, vec(frame, 1..=BURST), vec(buffer, 1..2 * BURST)).prop_map(
        |(is_packed, is_wrapped, features, frames, buffers)| Scenario {
            is_packed,
            is_wrapped,
            features: features.iter().sum(),
            frames,
            buffers,
        },
    )
}

/// A receiver's ring.
enum Receiver {
    Split(GuestRing),
    Packed(PackedGuestRing),
}

impl Receiver {
    fn open(guest: &Guest, scenario: &Scenario) -> (Self, Ring) {
        if scenario.is_packed {
            let ring = PackedGuestRing::new(guest, RECEIVE, SIZE, 0);
            let device = ring.open(scenario.features);
            (Self::Packed(ring), device)
        } else {
            let ring = GuestRing::new(guest, RECEIVE, SIZE, 0);
            let device = ring.open(scenario.features);
            (Self::Split(ring), device)
        }
    }

    fn post(&mut self, id: u16, address: u64, bytes: u32) {
        match self {
            Self::Split(ring) => {
                ring.descriptor(id, address, bytes, WRITE, 0);
                ring.post(id);
            }
            Self::Packed(ring) => ring.post(id, &[(address, bytes, WRITE)]),
        }
    }

    /// Buffers in use: number and bytes.
    fn used(&mut self) -> Vec<(u16, u32)> {
        match self {
            Self::Split(ring) => (0..ring.used_index())
                .map(|index| {
                    let (head, bytes) = ring.used_entry(index);
                    (head as u16, bytes)
                })
                .collect(),
            Self::Packed(ring) => std::iter::from_fn(|| ring.reap(|_| 1)).collect(),
        }
    }
}

/// What a receiver finds: which buffers hold how many bytes, and all of its memory.
fn received<const FAR: bool>(scenario: &Scenario) -> (Vec<(u16, u32)>, Vec<u8>) {
    let guest = Guest::new(&[(0, MEMORY_END as usize)]);
    guest.write(BUFFERS, &vec![FILL; (MEMORY_END - BUFFERS) as usize]);
    let mut sender = GuestRing::new(&guest, TRANSMIT, 1024, 0);
    let mut descriptor = 0;
    for (number, pieces) in (0..).zip(&scenario.frames) {
        let head = descriptor;
        let mut address = FRAMES + FRAME_ROOM * number;
        let bytes: u32 = pieces.iter().sum();
        let frame: Vec<u8> = (0..bytes).map(|at| (at as u8).wrapping_mul(29) ^ (number as u8)).collect();
        guest.write(address, &[0; 12]);
        guest.write(address + 12, &frame);
        let header = net_header_bytes(scenario.features);
        // A header of ten bytes and twelve of zeros have the same frame behind them if it begins two bytes later.
        address += 12 - u64::from(header);
        for (at, &piece) in pieces.iter().enumerate() {
            let bytes = piece + if at == 0 { header } else { 0 };
            let flags = if at + 1 < pieces.len() { NEXT } else { 0 };
            sender.descriptor(descriptor, address, bytes, flags, descriptor + 1);
            address += u64::from(bytes);
            descriptor += 1;
        }
        sender.post(head);
    }
    let mut transmit = sender.open(scenario.features);
    let (mut receiver, mut device) = Receiver::open(&guest, scenario);
    for (number, &(start, bytes)) in (0..).zip(&scenario.buffers) {
        receiver.post(number, BUFFERS + BUFFER_ROOM * u64::from(number) + start, bytes);
    }

    let mut frames = frames();
    let count = transmit.receive(&mut frames).unwrap();
    let net = |number: usize| NetHeader { hdr_len: number as u16, gso_size: 7, ..NetHeader::default() };
    let mut at = 0;
    while at < count {
        let (net_of, payload) = (|ahead| Some(net(at + ahead)), |ahead: usize| transmit.payload(&frames[at + ahead]));
        let run = &frames[at..count];
        let sent = match scenario.is_wrapped {
            true => device.send_run::<FAR, _, _>(run, Outer, net_of, payload),
            false => device.send_run::<FAR, _, _>(run, Bare, net_of, payload),
        };
        at += match sent {
            Ok(sent) => sent.frames as usize,
            Err(error) => {
                assert_eq!(error, SendError::Full);
                break;
            }
        };
        if at < count {
            let frame = &frames[at];
            // One that has no room is lost.
            let _ = device.send(net(at), frame.headers(), transmit.payload(frame));
            at += 1;
        }
    }
    device.flush();
    (receiver.used(), guest.read(BUFFERS, (MEMORY_END - BUFFERS) as usize))
}

/// Bytes of the virtio-net header.
fn net_header_bytes(features: u64) -> u32 {
    if features & (F_VERSION_1 | F_MERGEABLE) != 0 { 12 } else { 10 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn frames_for_a_far_driver_are_those_for_a_near_one(scenario in scenario()) {
        let (used, near) = received::<false>(&scenario);
        let (far_used, far) = received::<true>(&scenario);
        prop_assert_eq!(&far_used, &used);
        let mut expected = near;
        for (number, bytes) in used {
            let (start, room) = scenario.buffers[usize::from(number)];
            let start = BUFFER_ROOM * u64::from(number) + start;
            let (end, room_end) = (start + u64::from(bytes), start + u64::from(room));
            // To the end of its last line, if that is the buffer's as well, there may be zeros.
            let line_end = end.next_multiple_of(LINE);
            if line_end <= room_end {
                let rest = end as usize..line_end as usize;
                if far[rest.clone()].iter().all(|byte| *byte == 0) {
                    expected[rest].fill(0);
                }
            }
        }
        let differs = expected.iter().zip(&far).position(|(expected, far)| expected != far);
        prop_assert_eq!(differs, None);
    }
}

#[test]
fn nothing_is_written_outside_of_a_buffer_that_ends_with_its_frame() {
    for is_packed in [false, true] {
        for start in 0..64 {
            let buffers = vec![(start, 12 + 60)];
            let scenario =
                Scenario { is_packed, is_wrapped: false, features: F_VERSION_1, frames: vec![vec![60]], buffers };
            let (used, memory) = received::<true>(&scenario);
            assert_eq!(used, [(0, 72)]);
            let (before, rest) = memory.split_at(start as usize);
            assert!(before.iter().chain(&rest[72..]).all(|byte| *byte == FILL), "start {start}");
        }
    }
}

#[test]
fn a_frame_that_has_lost_its_tail_is_not_sent_and_nothing_is_written() {
    for is_packed in [false, true] {
        let guest = Guest::new(&[(0, MEMORY_END as usize)]);
        guest.write(BUFFERS, &[FILL; 8192]);
        let scenario =
            Scenario { is_packed, is_wrapped: false, features: F_VERSION_1, frames: Vec::new(), buffers: Vec::new() };
        let (mut receiver, mut device) = Receiver::open(&guest, &scenario);
        (0..2).for_each(|id| receiver.post(id, BUFFERS + BUFFER_ROOM * u64::from(id), 2048));
        let header_bytes = HEADER_COPY_BYTES as u16;
        for tail_bytes in [1, 100, 192, 193, 1000] {
            let frame = RawFrame { header_bytes, frame_bytes: u32::from(header_bytes) + tail_bytes, ..RawFrame::EMPTY };
            let tail = vec![7; tail_bytes as usize + 1];
            for length in [tail_bytes as usize - 1, tail_bytes as usize + 1] {
                let sent = device.send_run::<true, _, _>(
                    std::slice::from_ref(&frame),
                    Bare,
                    |_| None,
                    |_| Payload::private(&tail[..length]),
                );
                assert_eq!(sent.map(|sent| sent.frames), Ok(0), "{length} of {tail_bytes}");
            }
        }
        device.flush();
        assert_eq!(receiver.used(), []);
        assert!(guest.read(BUFFERS, 8192).iter().all(|byte| *byte == FILL));
    }
}

/// A driver that posts a buffer whenever one was filled.
#[cfg(target_arch = "x86_64")]
struct Pace {
    guest: Guest,
    receiver: Receiver,
    device: Ring,
    /// Buffers posted.
    posted: u32,
}

#[cfg(target_arch = "x86_64")]
impl Pace {
    const ROOM: u32 = 128;

    fn address(number: u32) -> u64 {
        BUFFERS + u64::from(number % u32::from(SIZE) * Self::ROOM)
    }

    fn post(&mut self) {
        self.receiver.post((self.posted % u32::from(SIZE)) as u16, Self::address(self.posted), Self::ROOM);
        self.posted += 1;
    }

    /// Has the next frame sent; whether its ring takes the driver to be far then. `is_slow`: to look for buffers takes long.
    fn turn(&mut self, is_slow: bool) -> bool {
        self.post();
        if is_slow {
            self.guest.unmap_page(RECEIVE);
        }
        self.device.send(NetHeader::default(), &[1; 60], Payload::EMPTY).unwrap();
        self.device.flush();
        self.device.is_far()
    }
}

/// A driver whose lines take as long to come as those of one do that is far away, or longer; then one whose lines are near.
#[test]
#[cfg(target_arch = "x86_64")]
fn a_ring_finds_out_how_far_its_driver_is() {
    for is_packed in [false, true] {
        let guest = Guest::new(&[(0, MEMORY_END as usize)]);
        let features = F_VERSION_1 | F_MERGEABLE;
        let scenario = Scenario { is_packed, is_wrapped: false, features, frames: Vec::new(), buffers: Vec::new() };
        let (receiver, device) = Receiver::open(&guest, &scenario);
        let mut pace = Pace { guest, receiver, device, posted: 0 };
        // Of a packed ring so many that there is one half a ring away; of a split ring none that is known of.
        let ahead = if is_packed { 100 } else { 0 };
        (0..ahead).for_each(|_| pace.post());
        // A packed ring looks once for 32 buffers; one look in 61 is measured, and twelve have to agree.
        let turns = 4 * 61 * 12 * if is_packed { 32 } else { 1 };
        assert!(!pace.turn(false));
        assert!((0..turns).any(|_| pace.turn(true)), "near for ever, is_packed {is_packed}");

        // A frame in three buffers.
        let first = pace.posted - ahead;
        (0..3).for_each(|_| pace.post());
        let frame: Vec<u8> = (0..300).map(|at| at as u8).collect();
        pace.device.send(NetHeader::default(), &frame[..128], Payload::private(&frame[128..])).unwrap();
        pace.device.flush();
        let buffer = |number| pace.guest.read(Pace::address(number), Pace::ROOM as usize);
        let written: Vec<u8> = (first..first + 3).flat_map(buffer).collect();
        assert_eq!(written[10..12], [3, 0], "buffers");
        assert_eq!(written[12..312], frame, "is_packed {is_packed}");

        assert!((0..turns).any(|_| !pace.turn(false)), "far for ever, is_packed {is_packed}");
    }
}
