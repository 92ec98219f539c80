//! What a hostile guest can put into a ring, one test for each: the exact fault, the ring stopped where it stood, the
//! ring beside it untouched. The list is the field's history of CVEs (chains that loop or reach beyond a region, lengths
//! that overflow, descriptors that change while they are read).

mod common;

use common::pair::*;
use common::*;
use dreamwire_vhost::frame::FrameFault;
use dreamwire_vhost::ring::{
    BURST, BURST_DESCRIPTORS_MAX, CHAIN_DESCRIPTORS_MAX, CHAIN_SEGMENTS_MAX, FRAME_BYTES_MAX, MERGED_CHAINS_MAX, Ring,
    RingError, RingFault, RingSetup, SendError,
};

type Bench = Pair<GuestRing>;

// The available ring.

#[test]
fn an_available_index_of_65535_more_is_a_fault() {
    let bench = Bench::new(FEATURES);
    bench.ring.set_available_index(65535);
    bench.assert_receive_fault(RingFault::AvailableIndex { index: 65535, next: 0, size: SIZE });
}

#[test]
fn an_available_index_of_size_and_one_more_is_a_fault_both_ways() {
    for receive in [true, false] {
        let bench = Bench::new(FEATURES);
        bench.ring.set_available_index(SIZE + 1);
        let fault = RingFault::AvailableIndex { index: SIZE + 1, next: 0, size: SIZE };
        bench.assert_fault(receive, fault);
    }
}

#[test]
fn an_available_index_of_size_more_is_a_full_ring() {
    let mut bench = Bench::new(FEATURES);
    for head in 0..SIZE {
        bench.ring.descriptor(head, BUFFER, 60, 0, 0);
        bench.ring.post(head);
    }
    let mut frames = frames();
    for _ in 0..usize::from(SIZE) / BURST {
        assert_eq!(bench.device.receive(&mut frames), Ok(BURST));
        bench.device.complete();
    }
    assert_eq!(bench.device.receive(&mut frames), Ok(0));
    assert_eq!(bench.ring.used_index(), SIZE);
}

#[test]
fn an_available_index_that_goes_back_is_a_fault() {
    let mut bench = Bench::new(FEATURES);
    bench.ring.descriptor(0, BUFFER, 60, 0, 0);
    bench.ring.post(0);
    assert_eq!(bench.device.receive(&mut frames()), Ok(1));
    bench.device.complete();
    bench.ring.set_available_index(0);
    let fault = RingFault::AvailableIndex { index: 0, next: 1, size: SIZE };
    assert_eq!(bench.device.receive(&mut frames()), Err(fault));
    assert_eq!((bench.device.next_avail(), bench.device.next_used()), (1, 1));
}

#[test]
fn a_head_outside_the_table_is_a_fault_both_ways() {
    for (head, receive) in [(SIZE, true), (65535, true), (SIZE, false), (65535, false)] {
        let mut bench = Bench::new(FEATURES);
        bench.ring.post(head);
        let fault = RingFault::DescriptorIndex { index: head, size: SIZE };
        bench.assert_fault(receive, fault);
    }
}

#[test]
fn a_fault_behind_good_chains_gives_them_up_and_leaves_the_indices_alone() {
    let mut bench = Bench::new(FEATURES);
    bench.ring.descriptor(0, BUFFER, 600, 0, 0);
    bench.ring.descriptor(1, BUFFER, 600, NEXT, 65535);
    bench.ring.post(0);
    bench.ring.post(1);
    bench.assert_receive_fault(RingFault::DescriptorIndex { index: 65535, size: SIZE });
}

#[test]
fn a_fault_behind_staged_frames_leaves_those_sent() {
    let mut bench = Bench::new(FEATURES);
    bench.ring.descriptor(0, BUFFER, 600, WRITE, 0);
    bench.ring.post(0);
    bench.ring.post(SIZE);
    assert_eq!(send(&mut bench.device, b"whole"), Ok(()));
    let fault = RingFault::DescriptorIndex { index: SIZE, size: SIZE };
    assert_eq!(send(&mut bench.device, b"lost"), Err(SendError::Fault(fault)));
    bench.device.flush();
    assert_eq!((bench.ring.used_index(), bench.ring.used_entry(0)), (1, (0, 12 + 5)));
    assert_eq!((bench.device.next_avail(), bench.device.next_used()), (1, 1));
}

// Chains.

#[test]
fn a_descriptor_that_names_itself_is_a_loop() {
    for (flags, receive) in [(NEXT, true), (NEXT | WRITE, false)] {
        for bytes in [0, 1] {
            let mut bench = Bench::new(FEATURES);
            bench.ring.descriptor(7, BUFFER, bytes, flags, 7);
            bench.ring.post(7);
            let fault = RingFault::Loop { head: 7 };
            bench.assert_fault(receive, fault);
        }
    }
}

#[test]
fn two_descriptors_that_name_each_other_are_a_loop() {
    let mut bench = Bench::new(FEATURES);
    bench.ring.descriptor(3, BUFFER, 100, NEXT, 4);
    bench.ring.descriptor(4, BUFFER, 100, NEXT, 3);
    bench.ring.post(3);
    bench.assert_receive_fault(RingFault::Loop { head: 3 });
}

#[test]
fn a_loop_through_the_whole_table_is_a_loop() {
    let mut bench = Bench::new(FEATURES);
    for index in 0..SIZE {
        bench.ring.descriptor(index, BUFFER, 1, NEXT, (index + 1) % SIZE);
    }
    bench.ring.post(0);
    bench.assert_receive_fault(RingFault::Loop { head: 0 });
}

#[test]
fn a_loop_in_an_indirect_table_is_a_loop() {
    let mut bench = Bench::new(FEATURES);
    bench.guest.descriptor(TABLE, 0, BUFFER, 100, NEXT, 1);
    bench.guest.descriptor(TABLE, 1, BUFFER, 100, NEXT, 0);
    bench.ring.descriptor(0, TABLE, 32, INDIRECT, 0);
    bench.ring.post(0);
    bench.assert_receive_fault(RingFault::Loop { head: 0 });
}

#[test]
fn a_next_of_65535_is_a_fault() {
    for (flags, receive) in [(NEXT, true), (NEXT | WRITE, false)] {
        let mut bench = Bench::new(FEATURES);
        bench.ring.descriptor(0, BUFFER, 4, flags, 65535);
        bench.ring.post(0);
        let fault = RingFault::DescriptorIndex { index: 65535, size: SIZE };
        bench.assert_fault(receive, fault);
    }
}

#[test]
fn a_chain_of_the_whole_table_is_a_frame() {
    let mut bench = Bench::new(FEATURES);
    let bytes: Vec<u8> = (0..4 * SIZE).map(|n| n as u8).collect();
    bench.guest.write(BUFFER, &bytes);
    for index in 0..SIZE {
        let flags = if index + 1 < SIZE { NEXT } else { 0 };
        bench.ring.descriptor(index, BUFFER + 4 * u64::from(index), 4, flags, index + 1);
    }
    bench.ring.post(0);
    let mut frames = frames();
    assert_eq!(bench.device.receive(&mut frames), Ok(1));
    assert_eq!(frames[0].fault, None);
    assert_eq!(frame_bytes(&bench.device, &frames[0]), bytes[12..]);
}

#[test]
fn a_chain_longer_than_the_limit_is_a_fault_in_a_ring_of_any_size() {
    let mut bench = Bench::with_size(FEATURES, 4096);
    for index in 0..=CHAIN_DESCRIPTORS_MAX {
        bench.ring.descriptor(index, 0, 0, NEXT, index + 1);
    }
    bench.ring.post(0);
    bench.assert_receive_fault(RingFault::Loop { head: 0 });
}

#[test]
fn an_indirect_table_longer_than_the_limit_is_a_fault_only_if_its_chain_is() {
    for (chain, fault) in [(CHAIN_DESCRIPTORS_MAX, None), (32768 - 1, Some(RingFault::Loop { head: 0 }))] {
        let mut bench = Bench::new(FEATURES);
        let table = 0x10_0000;
        for index in 0..chain {
            let flags = if index + 1 < chain { NEXT } else { 0 };
            bench.guest.descriptor(table, index, 0, 0, flags, index + 1);
        }
        bench.ring.descriptor(0, table, 65536 * 16, INDIRECT, 0);
        bench.ring.post(0);
        match fault {
            Some(fault) => bench.assert_receive_fault(fault),
            None => bench.assert_frame_fault(FrameFault::NoHeader),
        }
    }
}

#[test]
fn empty_descriptors_bound_a_burst() {
    let mut bench = Bench::new(FEATURES);
    let long = CHAIN_DESCRIPTORS_MAX;
    for index in 0..long {
        bench.guest.descriptor(TABLE, index, 0, 0, if index + 1 < long { NEXT } else { 0 }, index + 1);
    }
    for head in 0..BURST as u16 {
        bench.ring.descriptor(head, TABLE, u32::from(long) * 16, INDIRECT, 0);
        bench.ring.post(head);
    }
    let mut taken = 0;
    while taken < BURST {
        let count = bench.device.receive(&mut frames()).unwrap();
        assert!(count > 0, "it goes on");
        assert!(count * usize::from(long) < 2 * BURST_DESCRIPTORS_MAX, "{count} chains of {long} descriptors at once");
        bench.device.complete();
        taken += count;
    }
}

#[test]
fn empty_descriptors_bound_a_merged_frame() {
    // One chain with a header's room, then chains without any: as many as may be merged, each as long as may be.
    let mut bench = Bench::new(FEATURES | F_MERGEABLE);
    let long = CHAIN_DESCRIPTORS_MAX;
    for index in 0..long {
        bench.guest.descriptor(TABLE, index, 0, 0, WRITE | if index + 1 < long { NEXT } else { 0 }, index + 1);
    }
    bench.ring.descriptor(0, BUFFER, 12, WRITE, 0);
    bench.ring.post(0);
    for head in 1..MERGED_CHAINS_MAX as u16 {
        bench.ring.descriptor(head, TABLE, u32::from(long) * 16, INDIRECT, 0);
        bench.ring.post(head);
    }
    // A chain far behind is broken. It is not reached: the frame is given up after the first long chain.
    bench.ring.descriptor(9, 0, 0, 0, 0);
    assert_eq!(send(&mut bench.device, b"frame"), Err(SendError::BufferTooSmall));
    assert_eq!(bench.device.fault(), None);
    assert_eq!(bench.device.next_avail(), 0, "nothing was staged");
}

#[test]
fn a_buffer_for_the_device_to_write_is_a_fault_in_a_transmitq() {
    let mut bench = Bench::new(FEATURES);
    bench.ring.descriptor(0, BUFFER, 100, NEXT, 5);
    bench.ring.descriptor(5, BUFFER, 100, WRITE, 0);
    bench.ring.post(0);
    bench.assert_receive_fault(RingFault::Direction { index: 5 });
}

#[test]
fn a_buffer_for_the_device_to_read_is_a_fault_in_a_receiveq() {
    let mut bench = Bench::new(FEATURES);
    bench.ring.descriptor(0, BUFFER, 100, WRITE | NEXT, 5);
    bench.ring.descriptor(5, BUFFER, 100, 0, 0);
    bench.ring.post(0);
    bench.assert_send_fault(RingFault::Direction { index: 5 });
}

// Indirect tables.

fn indirect(features: u64, address: u64, bytes: u32, flags: u16) -> Bench {
    let mut bench = Bench::new(features);
    bench.guest.descriptor(TABLE, 0, BUFFER, 100, 0, 0);
    bench.ring.descriptor(2, address, bytes, INDIRECT | flags, 3);
    bench.ring.descriptor(3, BUFFER, 100, 0, 0);
    bench.ring.post(2);
    bench
}

#[test]
fn an_indirect_table_in_an_indirect_table_is_a_fault() {
    let bench = indirect(FEATURES, TABLE, 16, 0);
    bench.guest.descriptor(TABLE, 0, TABLE, 16, INDIRECT, 0);
    bench.assert_receive_fault(RingFault::Indirect { index: 0 });
}

#[test]
fn an_indirect_table_that_is_chained_is_a_fault() {
    indirect(FEATURES, TABLE, 16, NEXT).assert_receive_fault(RingFault::Indirect { index: 2 });
}

#[test]
fn an_indirect_table_of_a_broken_length_is_a_fault() {
    for bytes in [0, 1, 15, 17, 0xffff_ffff] {
        indirect(FEATURES, TABLE, bytes, 0).assert_receive_fault(RingFault::Indirect { index: 2 });
    }
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_a_fault() {
    indirect(F_VERSION_1, TABLE, 16, 0).assert_receive_fault(RingFault::Indirect { index: 2 });
}

#[test]
fn an_indirect_table_outside_one_region_is_a_fault() {
    let across = LEFT_END - 16;
    for (address, bytes) in
        [(0x30_0000, 16), (across, 32), (RIGHT_END - 16, 32), (u64::MAX - 15, 16), (u64::MAX, 16), (TABLE, 0xffff_fff0)]
    {
        let fault = RingFault::BufferAddress { address, bytes };
        indirect(FEATURES, address, bytes, 0).assert_receive_fault(fault);
    }
}

#[test]
fn an_index_outside_an_indirect_table_is_a_fault() {
    let bench = indirect(FEATURES, TABLE, 32, 0);
    bench.guest.descriptor(TABLE, 0, BUFFER, 100, NEXT, 2);
    bench.assert_receive_fault(RingFault::DescriptorIndex { index: 2, size: 2 });
}

#[test]
fn an_unaligned_indirect_table_is_read_as_it_lies() {
    for odd in 1..16 {
        let mut bench = indirect(FEATURES, TABLE + odd, 16, WRITE);
        bench.guest.descriptor(TABLE + odd, 0, BUFFER, 12 + 60, 0, 0);
        assert_eq!(bench.device.receive(&mut frames()), Ok(1), "{odd}");
    }
}

// Buffers.

#[test]
fn a_buffer_outside_memory_is_a_fault_both_ways() {
    for (address, bytes) in [
        (0x30_0000, 1),
        (RIGHT_END - 1, 2),
        (RIGHT_END, 1),
        (LEFT_END - 1, 0x10_0002),
        (u64::MAX, 1),
        (u64::MAX, 2),
        (u64::MAX - 99, 100),
        (u64::MAX - 99, 0xffff_ffff),
        (BUFFER, 0xffff_ffff),
    ] {
        for receive in [true, false] {
            let mut bench = Bench::new(FEATURES);
            bench.ring.descriptor(0, address, bytes, if receive { 0 } else { WRITE }, 0);
            bench.ring.post(0);
            let fault = RingFault::BufferAddress { address, bytes };
            bench.assert_fault(receive, fault);
        }
    }
}

#[test]
fn an_empty_buffer_may_be_anywhere() {
    let mut bench = Bench::new(FEATURES);
    bench.guest.write(BUFFER, &[7; 72]);
    bench.ring.descriptor(0, u64::MAX, 0, NEXT, 1);
    bench.ring.descriptor(1, BUFFER, 72, 0, 0);
    bench.ring.post(0);
    let mut frames = frames();
    assert_eq!(bench.device.receive(&mut frames), Ok(1));
    assert_eq!(frame_bytes(&bench.device, &frames[0]), [7; 60]);
}

#[test]
fn a_buffer_across_neighbouring_regions_is_read_and_written_whole() {
    let bytes: Vec<u8> = (0..1500).map(|n| (n % 251) as u8).collect();
    for split in [1, 5, 12, 100, 140, 141, 1511] {
        let address = LEFT_END - split;
        let mut bench = Bench::new(FEATURES);
        bench.guest.write(address + 12, &bytes);
        bench.ring.descriptor(0, address, 1512, 0, 0);
        bench.ring.post(0);
        let mut frames = frames();
        assert_eq!(bench.device.receive(&mut frames), Ok(1));
        assert_eq!(frame_bytes(&bench.device, &frames[0]), bytes);
        bench.guest.write(address, &[0; 1512]);
        bench.other.descriptor(0, address, 1512, WRITE, 0);
        bench.other.post(0);
        assert_eq!(send(&mut bench.other_device, &bytes), Ok(()));
        assert_eq!(bench.guest.read(address + 12, 1500), bytes);
    }
}

#[test]
fn a_chain_too_short_for_a_header_is_no_frame() {
    for bytes in 0..12 {
        let mut bench = Bench::new(FEATURES);
        bench.ring.descriptor(0, BUFFER, bytes, 0, 0);
        bench.ring.post(0);
        bench.assert_frame_fault(FrameFault::NoHeader);
    }
}

#[test]
fn a_chain_of_a_header_alone_is_a_frame_of_no_bytes() {
    for (features, bytes) in [(FEATURES, 12), (F_MERGEABLE, 12), (0, 10)] {
        let mut bench = Bench::new(features);
        bench.ring.descriptor(0, BUFFER, bytes, 0, 0);
        bench.ring.post(0);
        let mut frames = frames();
        assert_eq!(bench.device.receive(&mut frames), Ok(1));
        assert_eq!((frames[0].fault, frames[0].frame_bytes), (None, 0));
    }
}

#[test]
fn a_receive_chain_too_short_for_a_header_takes_no_frame_and_stays() {
    for bytes in 0..12 {
        let mut bench = Bench::new(FEATURES | F_MERGEABLE);
        bench.ring.descriptor(0, BUFFER, bytes, WRITE, 0);
        bench.ring.post(0);
        bench.ring.post(0);
        assert_eq!(send(&mut bench.device, b"frame"), Err(SendError::BufferTooSmall));
        assert!(!bench.device.flush());
        assert_eq!((bench.device.next_avail(), bench.ring.used_index()), (0, 0));
        assert_eq!(bench.guest.read(BUFFER, 16), [0; 16], "nothing was written");
    }
}

/// A chain of `count` descriptors of `bytes` bytes each, all of the same memory.
fn repeated(count: u16, bytes: u32, flags: u16) -> Bench {
    let mut bench = Bench::new(FEATURES);
    for index in 0..count {
        let next = if index + 1 < count { NEXT } else { 0 };
        bench.guest.descriptor(TABLE, index, LEFT_END, bytes, flags | next, index + 1);
    }
    bench.ring.descriptor(0, TABLE, u32::from(count) * 16, INDIRECT, 0);
    bench.ring.post(0);
    bench
}

#[test]
fn a_chain_of_many_megabytes_is_too_large() {
    repeated(256, 0x10_0000, 0).assert_frame_fault(FrameFault::TooLarge);
}

#[test]
fn a_frame_at_the_limit_is_taken_and_one_byte_more_is_not() {
    let mut bench = repeated(1, 12 + FRAME_BYTES_MAX, 0);
    let mut frames = frames();
    assert_eq!(bench.device.receive(&mut frames), Ok(1));
    assert_eq!((frames[0].fault, frames[0].frame_bytes), (None, FRAME_BYTES_MAX));
    repeated(1, 13 + FRAME_BYTES_MAX, 0).assert_frame_fault(FrameFault::TooLarge);
}

#[test]
fn a_chain_of_too_many_pieces_is_no_frame() {
    // The header and its copy take 140 one-byte pieces, the tail may have the maximum.
    let most = 140 + CHAIN_SEGMENTS_MAX as u16;
    let mut bench = repeated(most, 1, 0);
    let mut frames = frames();
    assert_eq!(bench.device.receive(&mut frames), Ok(1));
    assert_eq!((frames[0].fault, frames[0].frame_bytes), (None, u32::from(most) - 12));
    repeated(most + 1, 1, 0).assert_frame_fault(FrameFault::TooLarge);
}

#[test]
fn a_receive_chain_of_too_many_pieces_is_used_as_far_as_it_was_noted() {
    let mut bench = repeated(CHAIN_SEGMENTS_MAX as u16 + 1, 1, WRITE);
    let most = CHAIN_SEGMENTS_MAX - 12;
    assert_eq!(send(&mut bench.device, &vec![1; most + 1]), Err(SendError::BufferTooSmall));
    assert_eq!(send(&mut bench.device, &vec![1; most]), Ok(()));
    bench.device.flush();
    assert_eq!(bench.ring.used_entry(0), (0, CHAIN_SEGMENTS_MAX as u32));
}

#[test]
fn a_chain_that_declares_4_gib_and_has_it_is_too_large() {
    // Memory that is reserved, not touched.
    let guest = Guest::new(&[(0, 0x10_0000), (0x1_0000_0000, 0x1_0000_0000)]);
    let mut ring = GuestRing::new(&guest, 0, 16, 0);
    let mut device = ring.open(FEATURES);
    ring.descriptor(0, 0x1_0000_0000, 0xffff_ffff, NEXT, 1);
    ring.descriptor(1, 0x1_0000_0000, 12 + 61, 0, 0);
    ring.post(0);
    let mut frames = frames();
    assert_eq!(device.receive(&mut frames), Ok(1));
    assert_eq!(frames[0].fault, Some(FrameFault::TooLarge), "2^32 + 72 bytes are not 72");
    device.complete();
    ring.descriptor(0, 0x1_0000_0000, 0xffff_ffff, WRITE | NEXT, 1);
    ring.descriptor(1, 0x1_0000_0000, 0xffff_ffff, WRITE, 0);
    ring.post(0);
    assert_eq!(send(&mut device, &[5; 60]), Ok(()));
    device.flush();
    assert_eq!(ring.used_entry(1), (0, 72));
}

#[test]
fn a_frame_that_does_not_fit_leaves_no_trace() {
    // Mergeable: two chains are looked at, the third is missing. Then it comes.
    let mut bench = Bench::new(FEATURES | F_MERGEABLE);
    for head in 0..3 {
        bench.ring.descriptor(head, BUFFER + 0x1000 * u64::from(head), 40, WRITE, 0);
    }
    bench.ring.post(0);
    bench.ring.post(1);
    for _ in 0..1_000 {
        assert_eq!(send(&mut bench.device, &[9; 100]), Err(SendError::Full));
    }
    assert!(!bench.device.flush());
    assert_eq!((bench.device.next_avail(), bench.device.next_used(), bench.ring.used_index()), (0, 0, 0));
    assert_eq!(bench.guest.read(BUFFER, 0x2000), vec![0; 0x2000]);
    bench.ring.post(2);
    assert_eq!(send(&mut bench.device, &[9; 100]), Ok(()));
    bench.device.flush();
    assert_eq!([0, 1, 2].map(|index| bench.ring.used_entry(index)), [(0, 40), (1, 40), (2, 32)]);
    assert_eq!(bench.guest.read_u16(BUFFER + 10), 3, "num_buffers");
}

#[test]
fn a_ring_that_cannot_be_served_is_refused_at_the_start() {
    let guest = Guest::new(&[(0, LEFT_END as usize), (LEFT_END, 0x10_0000)]);
    let ring = GuestRing::new(&guest, 0, 256, 0);
    for size in [0, 3, 32769, 65535] {
        let setup = RingSetup { size, ..ring.setup(FEATURES) };
        assert_eq!(Ring::new(setup).unwrap_err(), RingError::Size(size));
    }
    for address in [1, 8, LEFT_END - 16, RIGHT_END, !15] {
        let setup = RingSetup { descriptors: address, ..ring.setup(FEATURES) };
        let error = RingError::Address { part: "descriptor table", address, bytes: 4096 };
        assert_eq!(Ring::new(setup).unwrap_err(), error);
    }
    for (address, features, bytes) in [(1, FEATURES, 516), (RIGHT_END - 516, FEATURES | F_EVENT_IDX, 518)] {
        let setup = RingSetup { available: address, ..ring.setup(features) };
        assert_eq!(Ring::new(setup).unwrap_err(), RingError::Address { part: "available ring", address, bytes });
    }
    for address in [2, LEFT_END - 4] {
        let setup = RingSetup { used: address, ..ring.setup(FEATURES) };
        assert_eq!(Ring::new(setup).unwrap_err(), RingError::Address { part: "used ring", address, bytes: 2052 });
    }
}
