//! What a hostile guest can put into a packed ring, one test for each, as `ring_hostile.rs` has it for split rings: the
//! exact fault, the ring stopped where it stood, the ring beside it untouched.

mod common;

use common::packed::*;
use common::pair::*;
use common::*;
use dreamwire_vhost::frame::FrameFault;
use dreamwire_vhost::ring::{
    BURST, BURST_DESCRIPTORS_MAX, CHAIN_DESCRIPTORS_MAX, CHAIN_SEGMENTS_MAX, FRAME_BYTES_MAX, MERGED_CHAINS_MAX, Ring,
    RingError, RingFault, RingSetup, SendError,
};

const START: u16 = <PackedGuestRing as Driver>::START;

type Bench = Pair<PackedGuestRing>;

// Availability.

#[test]
fn only_flags_of_this_lap_make_a_descriptor_available() {
    for flags in [0, AVAIL | USED, USED] {
        let mut bench = Bench::new(FEATURES);
        bench.ring.write(0, BUFFER, 60, 0, flags);
        assert_eq!(bench.device.receive(&mut frames()), Ok(0), "{flags:#x}");
        assert_eq!(send(&mut bench.device, b"frame"), Err(SendError::Full));
    }
}

#[test]
fn a_ring_with_every_flag_set_is_walked_once_a_lap_and_no_further() {
    // All 256 available, and their flags are not what the lap after needs.
    let mut bench = Bench::new(FEATURES);
    for id in 0..SIZE {
        bench.ring.post(id, &[(BUFFER, 60, 0)]);
    }
    let mut frames = frames();
    for _ in 0..usize::from(SIZE) / BURST {
        assert_eq!(bench.device.receive(&mut frames), Ok(BURST));
        bench.device.complete();
    }
    assert_eq!(bench.device.receive(&mut frames), Ok(0));
    assert_eq!(bench.device.next_avail(), 0, "the lap after, with wrap counter 0");
    for id in 0..SIZE {
        assert_eq!(bench.ring.reap(|_| 1), Some((id, 0)));
    }
}

/// The id is the driver's own business (VIRTIO 1.2 §2.8.6): it comes back as it was, whatever it is.
#[test]
fn an_id_beyond_the_ring_is_handed_back_and_means_nothing() {
    for id in [SIZE, 65535] {
        let mut bench = Bench::new(FEATURES);
        bench.ring.post(id, &[(BUFFER, 60, 0)]);
        assert_eq!(bench.device.receive(&mut frames()), Ok(1));
        bench.device.complete();
        assert_eq!(bench.ring.reap(|_| 1), Some((id, 0)));
    }
}

/// CVE-2020-10725: one bad address in a batch of four that was checked as a whole.
#[test]
fn one_bad_address_in_a_burst_is_a_fault_wherever_it_stands() {
    for bad in 0..8 {
        for receive in [true, false] {
            let mut bench = Bench::new(FEATURES);
            let flags = if receive { 0 } else { WRITE };
            for id in 0..8 {
                let address = if id == bad { 0x30_0000 } else { BUFFER };
                bench.ring.post(id, &[(address, 600, flags)]);
            }
            let fault = RingFault::BufferAddress { address: 0x30_0000, bytes: 600 };
            if receive {
                bench.assert_receive_fault(fault);
                continue;
            }
            for _ in 0..bad {
                assert_eq!(send(&mut bench.device, b"whole"), Ok(()));
            }
            assert_eq!(send(&mut bench.device, b"lost"), Err(SendError::Fault(fault)));
            bench.device.flush();
            for id in 0..bad {
                assert_eq!(bench.ring.reap(|_| 1), Some((id, 12 + 5)), "what was sent before stays sent");
            }
            assert_eq!(bench.ring.reap(|_| 1), None);
        }
    }
}

// Chains.

#[test]
fn a_chain_that_never_ends_is_a_loop() {
    for size in [1, 3, SIZE] {
        for (flags, receive) in [(0, true), (WRITE, false)] {
            for bytes in [0, 1] {
                let mut bench = Bench::with_size(FEATURES, size);
                for index in 0..size {
                    bench.ring.write(index, BUFFER, bytes, 7, AVAIL | NEXT | flags);
                }
                bench.ring.next = bench.ring.first;
                bench.assert_fault(receive, RingFault::Loop { head: 0 });
            }
        }
    }
}

#[test]
fn a_chain_of_the_whole_ring_is_a_frame_and_takes_all_of_it() {
    let mut bench = Bench::new(FEATURES);
    let bytes: Vec<u8> = (0..4 * SIZE).map(|n| n as u8).collect();
    bench.guest.write(BUFFER, &bytes);
    let pieces: Vec<Piece> = (0..SIZE).map(|index| (BUFFER + 4 * u64::from(index), 4, 0)).collect();
    bench.ring.post(9, &pieces);
    let mut frames = frames();
    assert_eq!(bench.device.receive(&mut frames), Ok(1));
    assert_eq!(frames[0].fault, None);
    assert_eq!(frame_bytes(&bench.device, &frames[0]), bytes[12..]);
    bench.device.complete();
    assert_eq!(bench.ring.reap(|_| SIZE), Some((9, 0)));
    assert_eq!(bench.device.next_avail(), 0);
}

/// A driver that makes descriptors of a chain that was not used the heads of others: together they are more than the ring.
#[test]
fn a_burst_of_more_descriptors_than_the_ring_has_is_given_back_one_by_one() {
    let mut bench = Bench::with_size(FEATURES | F_IN_ORDER, 4);
    // 2, 3, 0 in one lap, then 1, 2, 3, 0 in the next.
    let setup = RingSetup { next_avail: At { index: 2, wrap: true }.bits(), ..bench.ring.setup(FEATURES | F_IN_ORDER) };
    bench.device = Ring::new(setup).unwrap();
    for (index, flags) in [(1, USED | NEXT), (2, AVAIL | NEXT), (3, AVAIL | NEXT), (0, USED)] {
        bench.ring.write(index, BUFFER, 60, 7, flags);
    }
    assert_eq!(bench.device.receive(&mut frames()), Ok(2));
    bench.device.complete();
    assert_eq!(bench.device.next_avail(), At { index: 1, wrap: true }.bits());
    assert_eq!(bench.ring.read(2).1, 7, "the first, last");
}

#[test]
fn a_chain_longer_than_the_limit_is_a_fault_in_a_ring_of_any_size() {
    let mut bench = Bench::with_size(FEATURES, 4096);
    bench.ring.post(0, &vec![(0, 0, 0); usize::from(CHAIN_DESCRIPTORS_MAX) + 1]);
    bench.assert_receive_fault(RingFault::Loop { head: 0 });
    let mut bench = Bench::with_size(FEATURES, 4096);
    bench.ring.post(0, &vec![(0, 0, 0); usize::from(CHAIN_DESCRIPTORS_MAX)]);
    let mut frames = frames();
    assert_eq!(bench.device.receive(&mut frames), Ok(1));
    assert_eq!(frames[0].fault, Some(FrameFault::NoHeader));
}

#[test]
fn an_indirect_table_longer_than_the_limit_is_a_fault() {
    for (entries, fault) in [(CHAIN_DESCRIPTORS_MAX, None), (CHAIN_DESCRIPTORS_MAX + 1, Some(())), (65535, Some(()))] {
        let mut bench = Bench::new(FEATURES);
        let table = 0x10_0000;
        let most = (RIGHT_END - table) / 16;
        for index in 0..u64::from(entries).min(most) {
            bench.guest.descriptor(table, index as u16, 0, 0, 0, 0);
        }
        bench.ring.post(0, &[(table, u32::from(entries) * 16, INDIRECT)]);
        match fault {
            Some(()) => bench.assert_receive_fault(RingFault::Loop { head: 0 }),
            None => bench.assert_frame_fault(FrameFault::NoHeader),
        }
    }
}

#[test]
fn empty_descriptors_bound_a_burst() {
    let mut bench = Bench::new(FEATURES);
    let long = CHAIN_DESCRIPTORS_MAX;
    bench.guest.write(TABLE, &vec![0; usize::from(long) * 16]);
    for id in 0..BURST as u16 {
        bench.ring.post(id, &[(TABLE, u32::from(long) * 16, INDIRECT)]);
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
    let mut bench = Bench::new(FEATURES | F_MERGEABLE);
    let long = CHAIN_DESCRIPTORS_MAX;
    for index in 0..long {
        bench.guest.descriptor(TABLE, index, 0, 0, 0, WRITE);
    }
    bench.ring.post(0, &[(BUFFER, 12, WRITE)]);
    for id in 1..MERGED_CHAINS_MAX as u16 {
        bench.ring.post(id, &[(TABLE, u32::from(long) * 16, INDIRECT)]);
    }
    assert_eq!(send(&mut bench.device, b"frame"), Err(SendError::BufferTooSmall));
    assert_eq!(bench.device.fault(), None);
    assert_eq!(bench.device.next_avail(), START, "nothing was staged");
}

#[test]
fn a_buffer_of_the_wrong_direction_is_a_fault_both_ways() {
    let mut bench = Bench::new(FEATURES);
    bench.ring.post(0, &[(BUFFER, 100, 0), (BUFFER, 100, WRITE)]);
    bench.assert_receive_fault(RingFault::Direction { index: 1 });
    let mut bench = Bench::new(FEATURES);
    bench.ring.post(0, &[(BUFFER, 100, WRITE), (BUFFER, 100, 0)]);
    bench.assert_send_fault(RingFault::Direction { index: 1 });
}

// Indirect tables.

fn indirect(features: u64, address: u64, bytes: u32) -> Bench {
    let mut bench = Bench::new(features);
    bench.guest.descriptor(TABLE, 0, BUFFER, 100, 0, 0);
    bench.ring.post(2, &[(address, bytes, INDIRECT)]);
    bench
}

#[test]
fn an_indirect_table_in_an_indirect_table_is_no_table() {
    // §2.8.7: flags other than WRITE are ignored there. It is a buffer like any other, and nothing is followed.
    let mut bench = indirect(FEATURES, TABLE, 16);
    bench.guest.write(BUFFER, &[5; 72]);
    bench.guest.descriptor(TABLE, 0, BUFFER, 72, 0xffff, INDIRECT | NEXT);
    let mut frames = frames();
    assert_eq!(bench.device.receive(&mut frames), Ok(1));
    assert_eq!(frame_bytes(&bench.device, &frames[0]), [5; 60]);
}

#[test]
fn an_indirect_table_that_is_chained_is_a_fault() {
    for receive in [true, false] {
        let flags = if receive { 0 } else { WRITE };
        let mut bench = Bench::new(FEATURES);
        bench.ring.post(2, &[(TABLE, 16, INDIRECT), (BUFFER, 100, flags)]);
        bench.assert_fault(receive, RingFault::Indirect { index: 0 });
        let mut bench = Bench::new(FEATURES);
        bench.ring.post(2, &[(BUFFER, 100, flags), (TABLE, 16, INDIRECT)]);
        bench.assert_fault(receive, RingFault::Indirect { index: 1 });
    }
}

#[test]
fn an_indirect_table_of_a_broken_length_is_a_fault() {
    for bytes in [0, 1, 15, 17, 0xffff_ffff] {
        indirect(FEATURES, TABLE, bytes).assert_receive_fault(RingFault::Indirect { index: 0 });
    }
}

#[test]
fn an_indirect_table_that_was_not_negotiated_is_a_fault() {
    indirect(F_VERSION_1, TABLE, 16).assert_receive_fault(RingFault::Indirect { index: 0 });
}

#[test]
fn an_indirect_table_outside_one_region_is_a_fault() {
    let across = LEFT_END - 16;
    for (address, bytes) in
        [(0x30_0000, 16), (across, 32), (RIGHT_END - 16, 32), (u64::MAX - 15, 16), (u64::MAX, 16), (TABLE, 0xffff_fff0)]
    {
        indirect(FEATURES, address, bytes).assert_receive_fault(RingFault::BufferAddress { address, bytes });
    }
}

#[test]
fn an_unaligned_indirect_table_is_read_as_it_lies() {
    for odd in 1..16 {
        let mut bench = indirect(FEATURES, TABLE + odd, 16);
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
            let flags = if receive { 0 } else { WRITE };
            let fault = RingFault::BufferAddress { address, bytes };
            let mut bench = Bench::new(FEATURES);
            bench.ring.post(0, &[(address, bytes, flags)]);
            bench.assert_fault(receive, fault);
            let mut bench = Bench::new(FEATURES);
            bench.guest.descriptor(TABLE, 0, address, bytes, 0, flags);
            bench.ring.post(0, &[(TABLE, 16, INDIRECT)]);
            bench.assert_fault(receive, fault);
        }
    }
}

#[test]
fn an_empty_buffer_may_be_anywhere() {
    let mut bench = Bench::new(FEATURES);
    bench.guest.write(BUFFER, &[7; 72]);
    bench.ring.post(0, &[(u64::MAX, 0, 0), (BUFFER, 72, 0)]);
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
        bench.ring.post(0, &[(address, 1512, 0)]);
        let mut frames = frames();
        assert_eq!(bench.device.receive(&mut frames), Ok(1));
        assert_eq!(frame_bytes(&bench.device, &frames[0]), bytes);
        bench.guest.write(address, &[0; 1512]);
        bench.other.post(0, &[(address, 1512, WRITE)]);
        assert_eq!(send(&mut bench.other_device, &bytes), Ok(()));
        assert_eq!(bench.guest.read(address + 12, 1500), bytes);
    }
}

#[test]
fn a_chain_too_short_for_a_header_is_no_frame() {
    for bytes in 0..12 {
        let mut bench = Bench::new(FEATURES);
        bench.ring.post(0, &[(BUFFER, bytes, 0)]);
        bench.assert_frame_fault(FrameFault::NoHeader);
    }
}

#[test]
fn a_receive_chain_too_short_for_a_header_takes_no_frame_and_stays() {
    for bytes in 0..12 {
        let mut bench = Bench::new(FEATURES | F_MERGEABLE);
        bench.ring.post(0, &[(BUFFER, bytes, WRITE)]);
        bench.ring.post(1, &[(BUFFER, bytes, WRITE)]);
        assert_eq!(send(&mut bench.device, b"frame"), Err(SendError::BufferTooSmall));
        assert!(!bench.device.flush());
        assert_eq!((bench.device.next_avail(), bench.ring.reap(|_| 1)), (START, None));
        assert_eq!(bench.guest.read(BUFFER, 16), [0; 16], "nothing was written");
    }
}

/// A table of `count` descriptors of `bytes` bytes each, all of the same memory.
fn repeated(count: u16, bytes: u32, flags: u16) -> Bench {
    let mut bench = Bench::new(FEATURES);
    for index in 0..count {
        bench.guest.descriptor(TABLE, index, LEFT_END, bytes, 0, flags);
    }
    bench.ring.post(0, &[(TABLE, u32::from(count) * 16, INDIRECT)]);
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
fn a_chain_of_too_many_pieces_is_no_frame_and_is_given_back_whole() {
    let most = 140 + CHAIN_SEGMENTS_MAX as u16;
    let mut bench = repeated(most, 1, 0);
    let mut frames = frames();
    assert_eq!(bench.device.receive(&mut frames), Ok(1));
    assert_eq!((frames[0].fault, frames[0].frame_bytes), (None, u32::from(most) - 12));
    repeated(most + 1, 1, 0).assert_frame_fault(FrameFault::TooLarge);
    // Without a table: what is not looked at any more still belongs to the chain.
    let mut bench = Bench::with_size(FEATURES, 512);
    bench.ring.post(0, &vec![(BUFFER, 1, 0); usize::from(most) + 1]);
    bench.ring.post(1, &[(BUFFER, 72, 0)]);
    assert_eq!(bench.device.receive(&mut frames), Ok(2));
    assert_eq!((frames[0].fault, frames[1].frame_bytes), (Some(FrameFault::TooLarge), 60));
    bench.device.complete();
    assert_eq!(bench.ring.reap(|_| most + 1), Some((0, 0)));
    assert_eq!(bench.ring.reap(|_| 1), Some((1, 0)));
}

#[test]
fn a_receive_chain_of_too_many_pieces_is_used_as_far_as_it_was_noted() {
    let mut bench = repeated(CHAIN_SEGMENTS_MAX as u16 + 1, 1, WRITE);
    let most = CHAIN_SEGMENTS_MAX - 12;
    assert_eq!(send(&mut bench.device, &vec![1; most + 1]), Err(SendError::BufferTooSmall));
    assert_eq!(send(&mut bench.device, &vec![1; most]), Ok(()));
    bench.device.flush();
    assert_eq!(bench.ring.reap(|_| 1), Some((0, CHAIN_SEGMENTS_MAX as u32)));
}

#[test]
fn a_chain_that_declares_4_gib_and_has_it_is_too_large() {
    let guest = Guest::new(&[(0, 0x10_0000), (0x1_0000_0000, 0x1_0000_0000)]);
    let mut ring = PackedGuestRing::new(&guest, 0, 16, 0);
    let mut device = ring.open(FEATURES);
    ring.post(0, &[(0x1_0000_0000, 0xffff_ffff, 0), (0x1_0000_0000, 12 + 61, 0)]);
    let mut frames = frames();
    assert_eq!(device.receive(&mut frames), Ok(1));
    assert_eq!(frames[0].fault, Some(FrameFault::TooLarge), "2^32 + 72 bytes are not 72");
    device.complete();
    assert_eq!(ring.reap(|_| 2), Some((0, 0)));
    ring.post(1, &[(0x1_0000_0000, 0xffff_ffff, WRITE), (0x1_0000_0000, 0xffff_ffff, WRITE)]);
    assert_eq!(send(&mut device, &[5; 60]), Ok(()));
    device.flush();
    assert_eq!(ring.reap(|_| 2), Some((1, 72)));
}

#[test]
fn a_frame_that_does_not_fit_leaves_no_trace() {
    let mut bench = Bench::new(FEATURES | F_MERGEABLE);
    let buffer = |id: u16| [(BUFFER + 0x1000 * u64::from(id), 40, WRITE)];
    bench.ring.post(0, &buffer(0));
    bench.ring.post(1, &buffer(1));
    for _ in 0..1_000 {
        assert_eq!(send(&mut bench.device, &[9; 100]), Err(SendError::Full));
    }
    assert!(!bench.device.flush());
    assert_eq!((bench.device.next_avail(), bench.ring.reap(|_| 1)), (START, None));
    assert_eq!(bench.guest.read(BUFFER, 0x2000), vec![0; 0x2000]);
    bench.ring.post(2, &buffer(2));
    assert_eq!(send(&mut bench.device, &[9; 100]), Ok(()));
    assert_eq!(bench.ring.reap(|_| 1), None, "not before it is flushed");
    bench.device.flush();
    assert_eq!([0; 3].map(|_| bench.ring.reap(|_| 1).unwrap()), [(0, 40), (1, 40), (2, 32)]);
    assert_eq!(bench.guest.read_u16(BUFFER + 10), 3, "num_buffers");
}

#[test]
fn a_ring_that_cannot_be_served_is_refused_at_the_start() {
    let guest = Guest::new(&[(0, LEFT_END as usize), (LEFT_END, 0x10_0000)]);
    let ring = PackedGuestRing::new(&guest, 0, 256, 0);
    for size in [0, 32769, 65535] {
        let setup = RingSetup { size, ..ring.setup(FEATURES) };
        assert_eq!(Ring::new(setup).unwrap_err(), RingError::PackedSize(size));
        assert!(Ring::resume(RingSetup { size, ..ring.setup(FEATURES) }).is_err());
    }
    for index in [256, 32767] {
        let setup = RingSetup { next_avail: index | START, ..ring.setup(FEATURES) };
        assert_eq!(Ring::new(setup).unwrap_err(), RingError::Position { index, size: 256 });
    }
    for address in [1, 8, LEFT_END - 16, RIGHT_END, !15] {
        let error = RingError::Address { part: "descriptor ring", address, bytes: 4096 };
        for start in [Ring::new, Ring::resume] {
            let setup = RingSetup { descriptors: address, ..ring.setup(FEATURES) };
            assert_eq!(start(setup).unwrap_err(), error);
        }
    }
    for address in [2, LEFT_END - 2, RIGHT_END] {
        let error = RingError::Address { part: "driver event suppression", address, bytes: 4 };
        assert_eq!(Ring::new(RingSetup { available: address, ..ring.setup(FEATURES) }).unwrap_err(), error);
        let error = RingError::Address { part: "device event suppression", address, bytes: 4 };
        assert_eq!(Ring::new(RingSetup { used: address, ..ring.setup(FEATURES) }).unwrap_err(), error);
    }
}
