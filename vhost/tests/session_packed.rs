//! Packed rings over a real socket: their bases have two halves, their sizes need not be powers of two, and where they
//! stand is what their memory says.

#![allow(clippy::unwrap_used)] // also in the helpers, which clippy does not take for tests

mod support;

use dreamwire_vhost::keeper::SocketMode;
use dreamwire_vhost::ring::RingSetup;
use support::*;
use vm_memory::{Bytes, GuestAddress};

const PACKED: u64 = 1 << 34;
/// The start of a ring, for available and used: index 0, wrap counter 1.
const START: u32 = 0x8000_8000;

fn session(features: u64) -> (Port, FrontEnd) {
    let port = Port::start_offering(SocketMode::Server, 1, VERSION_1 | PACKED);
    let mut front_end = FrontEnd::connect(&port.socket);
    front_end.negotiate_features(VERSION_1 | PACKED, features);
    front_end.set_memory();
    (port, front_end)
}

/// The messages that start ring 0; returns the answers to the size and the base.
fn start(front_end: &mut FrontEnd, size: u32, base: u32) -> [u64; 2] {
    let kick = raw(&front_end.kicks[0]);
    let size = front_end.ask(SET_VRING_NUM, &ring_number(0, size), &[]);
    let base = front_end.ask(SET_VRING_BASE, &ring_number(0, base), &[]);
    assert_eq!(front_end.ask(SET_VRING_ADDR, &ring_addresses(0), &[]), 0);
    assert_eq!(front_end.ask(SET_VRING_KICK, &0u64.to_ne_bytes(), &[kick]), 0);
    [size, base]
}

/// Flags of the ring's descriptors.
fn write_flags(ring: &RingSetup, flags: &[u16]) {
    for (index, flags) in (0..).zip(flags) {
        ring.memory.mapped().write_obj(*flags, GuestAddress(ring.descriptors + 16 * index + 14)).unwrap();
    }
}

#[test]
fn the_base_of_a_packed_ring_goes_both_ways_whole() {
    let (port, mut front_end) = session(VERSION_1 | PACKED);
    assert_eq!(start(&mut front_end, 3, START), [0, 0]);
    let first = port.owner.attached().pop().unwrap();
    assert_eq!((first.size, first.next_avail, first.next_used), (3, 0x8000, 0x8000));
    // The second lap, two of three used.
    port.owner.serve(0, |ring| {
        write_flags(ring, &[0, 0, 0x8080]);
        ring.next_avail = 2;
    });
    assert_eq!(front_end.stop_ring(0), 0x0002_0002);
    assert_eq!(start(&mut front_end, 3, 0x0002_0002), [0, 0]);
    assert_eq!(port.owner.attached().pop().unwrap().next_avail, 2);
    // DPDK's back-end leaves the upper half out.
    assert_eq!(front_end.stop_ring(0), 0x0002_0002);
    assert_eq!(start(&mut front_end, 3, 2), [0, 0]);
    assert_eq!(port.owner.attached().pop().unwrap().next_avail, 2);
}

#[test]
fn the_ring_knows_better_than_a_front_end_whose_back_end_was_lost() {
    let (port, mut front_end) = session(VERSION_1 | PACKED);
    start(&mut front_end, 4, START);
    port.owner.serve(0, |ring| write_flags(ring, &[0x8080, 0x80, 0x80, 0]));
    assert_eq!(front_end.stop_ring(0), START);
    // What QEMU says: the base of the last start.
    start(&mut front_end, 4, START);
    assert_eq!(port.owner.attached().pop().unwrap().next_avail, 0x8001);
}

#[test]
fn a_change_of_an_attached_ring_does_not_ask_it_again() {
    let (port, mut front_end) = session(VERSION_1 | PACKED);
    start(&mut front_end, 4, START);
    port.owner.serve(0, |ring| ring.next_avail = 0x8003);
    assert_eq!(front_end.ask(SET_VRING_ENABLE, &ring_number(0, 0), &[]), 0);
    assert_eq!(port.owner.attached().pop().unwrap().next_avail, 0x8003);
    // The addresses again, as QEMU sends them when it begins to log: the engine reads a used index that is none.
    assert_eq!(front_end.ask(SET_VRING_ADDR, &ring_addresses(0), &[]), 0);
    let last = port.owner.attached().pop().unwrap();
    assert_eq!((last.next_avail, last.next_used), (0x8003, 0x8003));
}

#[test]
fn split_rings_stay_as_they_were() {
    let (port, mut front_end) = session(VERSION_1);
    assert_eq!(front_end.ask(SET_VRING_NUM, &ring_number(0, 3), &[]), 1);
    assert_eq!(front_end.ask(SET_VRING_BASE, &ring_number(0, 0x1_0000), &[]), 1);
    assert_eq!(start(&mut front_end, 4, 0x8000), [0, 0]);
    assert_eq!(port.owner.attached().pop().unwrap().next_avail, 0x8000);
    assert_eq!(front_end.stop_ring(0), 0x8000);
}

#[test]
fn a_packed_ring_that_would_start_outside_of_itself_is_not_served() {
    let (port, mut front_end) = session(VERSION_1 | PACKED);
    start(&mut front_end, 4, START);
    // Contradicts itself, so that the front-end's word counts.
    port.owner.serve(0, |ring| write_flags(ring, &[0x80, 0, 0x80, 0]));
    front_end.stop_ring(0);
    start(&mut front_end, 4, 0x8004_8004);
    assert!(port.owner.holds().is_empty());
    eventually("a warning", || port.owner.warned_of("ring 0 is not served"));
}
