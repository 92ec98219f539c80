//! A frame out of a frame: the part's bytes are all there, wherever pieces of memory begin and end.
#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use dreamwire_vhost::frame::HEADER_COPY_BYTES;
use proptest::collection::vec;
use proptest::prelude::*;

const SIZE: u16 = 64;
const BUFFERS: u64 = 0x1_0000;

/// Posts a chain of a net header and a frame in pieces of these lengths; returns the frame.
fn post(ring: &mut GuestRing, head: u16, at: u64, pieces: &[u32]) -> Vec<u8> {
    let bytes: u32 = pieces.iter().sum();
    let frame: Vec<u8> = (0..bytes).map(|n| (n as u8).wrapping_mul(29) ^ head as u8).collect();
    ring.guest.write(at, &frame);
    ring.descriptor(head, 0x8000, 12, NEXT, head + 1);
    let mut address = at;
    for (number, &piece) in pieces.iter().enumerate() {
        let index = head + 1 + number as u16;
        let flags = if number + 1 < pieces.len() { NEXT } else { 0 };
        ring.descriptor(index, address, piece, flags, index + 1);
        address += u64::from(piece);
    }
    ring.post(head);
    frame
}

proptest! {
    #[test]
    fn the_part_is_whole_and_its_neighbour_untouched(
        pieces in vec(prop_oneof![1..20u32, 1..200u32, 200..2000u32], 1..8),
        start in 0..=HEADER_COPY_BYTES,
        part in 0..=10_000usize,
    ) {
        let guest = Guest::new(&[(0, 0x4_0000)]);
        let mut driver = GuestRing::new(&guest, 0, SIZE, 0);
        let first = post(&mut driver, 0, BUFFERS, &pieces);
        let second = post(&mut driver, 32, 2 * BUFFERS, &[100, 300]);
        let mut ring = driver.open(F_VERSION_1);
        let mut frames = frames();
        prop_assert_eq!(ring.receive(&mut frames).unwrap(), 2);
        let start = start.min(first.len());
        let part = part.min(first.len() - start);
        ring.narrow(&mut frames[0], start as u16, part as u32);
        prop_assert_eq!(frames[0].frame_bytes as usize, part);
        prop_assert_eq!(usize::from(frames[0].header_bytes), part.min(HEADER_COPY_BYTES));
        prop_assert_eq!(ring.payload(&frames[0]).bytes() as usize, part.saturating_sub(HEADER_COPY_BYTES));
        prop_assert_eq!(&frame_bytes(&ring, &frames[0])[..], &first[start..start + part]);
        prop_assert_eq!(&frame_bytes(&ring, &frames[1]), &second);
        // And out of that once more.
        let again = part / 2;
        let inner = again.min(usize::from(frames[0].header_bytes));
        ring.narrow(&mut frames[0], inner as u16, (part - inner) as u32);
        prop_assert_eq!(&frame_bytes(&ring, &frames[0])[..], &first[start + inner..start + part]);
        ring.complete();
        prop_assert_eq!(driver.used_index(), 2);
    }
}

#[test]
#[should_panic(expected = "not within the frame")]
fn a_part_that_is_longer_than_the_frame_is_our_own_mistake() {
    let guest = Guest::new(&[(0, 0x4_0000)]);
    let mut driver = GuestRing::new(&guest, 0, SIZE, 0);
    post(&mut driver, 0, BUFFERS, &[60]);
    let mut ring = driver.open(F_VERSION_1);
    let mut frames = frames();
    ring.receive(&mut frames).unwrap();
    ring.narrow(&mut frames[0], 1, 60);
}
