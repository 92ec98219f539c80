//! A guest's transmitq: chains, indices, tables, virtio-net headers.

use std::time::Instant;

use super::attack::{PATIENCE, frame, small, submit_frame};
use super::{Attack, Case, Failure, Outcome};
use crate::front_end::header::{HEADER_BYTES_MAX, VirtioNetHeader, bits};
use crate::front_end::layout::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
use crate::front_end::{Options, RawDriver, feature};

const QUARANTINED_LOOP: Outcome = Outcome::Quarantined("loops");
const OUTSIDE_TABLE: Outcome = Outcome::Quarantined("outside the table");
const OUTSIDE_MEMORY: Outcome = Outcome::Quarantined("outside guest memory");
const DIRECTION: Outcome = Outcome::Quarantined("wrong direction");
const INDIRECT: Outcome = Outcome::Quarantined("indirect table that is not allowed");
const AHEAD: Outcome = Outcome::Quarantined("ahead of");

/// Guest memory that an attack may fill.
const SPARE_BYTES: usize = 256 << 10;

/// A session's transmitq, and `SPARE_BYTES` of guest memory.
struct Ground {
    raw: RawDriver,
    /// Offset of the spare memory, and its guest address.
    spare: usize,
    address: u64,
}

impl Ground {
    fn describe(&self, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        self.raw.write_descriptor(index, Descriptor { address, bytes, flags, next });
    }

    /// Entry `index` of a table at the start of the spare memory.
    fn describe_indirect(&self, index: usize, address: u64, bytes: u32, flags: u16, next: u16) {
        let descriptor = Descriptor { address, bytes, flags, next };
        self.raw.write_descriptor_at(self.spare + 16 * index, descriptor);
    }

    /// The end of the last region of guest memory.
    fn end(&self) -> u64 {
        let last = self.raw.memory().regions().last().expect("guest memory has a region");
        last.guest_address + last.bytes
    }
}

/// A case that spoils the transmitq of a running session; `deed` kicks where it does not submit.
fn spoil(name: &str, class: &'static str, outcome: Outcome, deed: fn(&mut Ground)) -> Case {
    spoil_with(name, class, outcome, small(), deed)
}

fn spoil_with(name: &str, class: &'static str, outcome: Outcome, options: Options, deed: fn(&mut Ground)) -> Case {
    Case::new(name, class, outcome, move |attack| {
        let mut front_end = attack.connect(options.clone())?;
        let spare = front_end.take_memory(SPARE_BYTES, 4096)?;
        let address = front_end.memory().guest_address(spare);
        deed(&mut Ground { raw: front_end.raw(1), spare, address });
        attack.hold(front_end);
        Ok(())
    })
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = chains();
    cases.extend(indices());
    cases.extend(addresses());
    cases.extend(indirect());
    cases.extend(split_headers());
    cases.extend(short_chains());
    cases.extend(offloads());
    cases
}

fn chains() -> Vec<Case> {
    const LOOPS: &str = "DPDK a436f53ebf, c687b0b635, 623bc47054";
    vec![
        spoil("chain_points_to_itself", LOOPS, QUARANTINED_LOOP, |ground| {
            ground.describe(0, ground.address, 64, DESC_NEXT, 0);
            ground.raw.submit(0);
        }),
        spoil("chain_goes_round_in_twos", LOOPS, QUARANTINED_LOOP, |ground| {
            ground.describe(0, ground.address, 1, DESC_NEXT, 1);
            ground.describe(1, ground.address, 1, DESC_NEXT, 0);
            ground.raw.submit(0);
        }),
        spoil("chain_goes_round_the_whole_ring", LOOPS, QUARANTINED_LOOP, |ground| {
            for index in 0..64 {
                ground.describe(index, ground.address, 1, DESC_NEXT, (index + 1) % 64);
            }
            ground.raw.submit(0);
        }),
        spoil("chain_of_empty_descriptors_goes_round", LOOPS, QUARANTINED_LOOP, |ground| {
            for index in 0..64 {
                ground.describe(index, 0, 0, DESC_NEXT, (index + 1) % 64);
            }
            ground.raw.submit(0);
        }),
        spoil("chain_as_long_as_the_ring", LOOPS, Outcome::Served, |ground| {
            for index in 0..64 {
                ground.describe(index, ground.address, 8, if index < 63 { DESC_NEXT } else { 0 }, index + 1);
            }
            ground.raw.submit(0);
        }),
        spoil("next_is_the_size_of_the_table", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| {
            ground.describe(0, ground.address, 64, DESC_NEXT, 64);
            ground.raw.submit(0);
        }),
        spoil("next_is_65535", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| {
            ground.describe(0, ground.address, 64, DESC_NEXT, 65535);
            ground.raw.submit(0);
        }),
        spoil("writable_descriptor_in_a_transmitq", "DPDK 06fc8545fd", DIRECTION, |ground| {
            ground.describe(0, ground.address, 64, DESC_WRITE, 0);
            ground.raw.submit(0);
        }),
        spoil("writable_before_readable", "DPDK 4e282bc6c5", DIRECTION, |ground| {
            ground.describe(0, ground.address, 64, DESC_WRITE | DESC_NEXT, 1);
            ground.describe(1, ground.address, 64, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("writable_after_readable", "DPDK 85936f0546", DIRECTION, |ground| {
            ground.describe(0, ground.address, 64, DESC_NEXT, 1);
            ground.describe(1, ground.address, 64, DESC_WRITE, 0);
            ground.raw.submit(0);
        }),
        spoil("all_flags_set", "DPDK 48cae0bfa6", INDIRECT, |ground| {
            ground.describe(0, ground.address, 64, 0xffff, 0xffff);
            ground.raw.submit(0);
        }),
        spoil("unknown_flags_set", "VIRTIO 1.2 2.7.5", Outcome::Served, |ground| {
            ground.describe(0, ground.address, 76, 0xfff8, 0xffff);
            ground.raw.submit(0);
        }),
        spoil("lengths_add_up_beyond_4_gib", "virtio-queue 0.8.0", Outcome::Served, |ground| {
            let region = ground.raw.memory().regions()[0];
            for index in 0..64 {
                let bytes = u32::try_from(region.bytes).unwrap_or(u32::MAX);
                ground.describe(index, region.guest_address, bytes, if index < 63 { DESC_NEXT } else { 0 }, index + 1);
            }
            ground.raw.submit(0);
        }),
        spoil("zero_length_chain", "not in any peer", Outcome::Served, |ground| {
            ground.describe(0, 0, 0, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("zero_length_descriptor_at_the_last_address", "CVE-2019-14835", Outcome::Served, |ground| {
            ground.describe(0, u64::MAX, 0, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("the_same_chain_many_times", "vm-virtio 196", Outcome::Served, |ground| {
            ground.describe(0, ground.address, 76, 0, 0);
            (0..64).for_each(|_| ground.raw.submit(0));
        }),
    ]
}

fn indices() -> Vec<Case> {
    const RING: &str = "CVE-2016-5403";
    vec![
        spoil("head_is_the_size_of_the_table", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| ground.raw.submit(64)),
        spoil("head_is_65535", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| ground.raw.submit(65535)),
        spoil("available_index_jumps_by_the_size_and_one", RING, AHEAD, |ground| {
            ground.raw.set_available_index(65);
            ground.raw.doorbell().kick();
        }),
        spoil("available_index_jumps_by_65535", RING, AHEAD, |ground| {
            ground.raw.set_available_index(65535);
            ground.raw.doorbell().kick();
        }),
        spoil("available_index_goes_back", "virtio-queue 0.6.1", AHEAD, |ground| {
            ground.describe(0, ground.address, 76, 0, 0);
            ground.raw.submit(0);
            let deadline = Instant::now() + PATIENCE;
            while ground.raw.used_index() == 0 && Instant::now() < deadline {
                std::thread::yield_now();
            }
            ground.raw.set_available_index(0);
            ground.raw.doorbell().kick();
        }),
        spoil("available_index_jumps_by_the_size", RING, Outcome::Served, |ground| {
            (0..64).for_each(|index| ground.raw.write_available_entry(index, 0));
            ground.describe(0, ground.address, 76, 0, 0);
            ground.raw.set_available_index(64);
            ground.raw.doorbell().kick();
        }),
        spoil("used_ring_is_scribbled_over", "DPDK 5a4fbe79e6", Outcome::Served, |ground| {
            let layout = ground.raw.layout();
            ground.raw.memory().write(layout.used_ring, &[0xa5; 4 + 8 * 64]);
            ground.describe(0, ground.address, 76, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("events_and_flags_are_garbage", "VIRTIO 1.2 2.7.7", Outcome::Served, |ground| {
            ground.raw.set_available_flags(0xffff);
            ground.raw.set_used_event(0x8001);
            ground.describe(0, ground.address, 76, 0, 0);
            (0..32).for_each(|_| ground.raw.submit(0));
        }),
    ]
}

fn addresses() -> Vec<Case> {
    const RANGE: &str = "CVE-2018-1059";
    let two_regions = || Options { regions: 2, ..small() };
    vec![
        spoil("buffer_at_address_zero", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.describe(0, 0, 64, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("buffer_crosses_the_end_of_memory", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.describe(0, ground.end() - 32, 64, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("buffer_ends_with_memory", RANGE, Outcome::Served, |ground| {
            ground.describe(0, ground.end() - 76, 76, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("buffer_starts_where_memory_ends", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.describe(0, ground.end(), 1, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("buffer_wraps_around", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.describe(0, u64::MAX - 31, 64, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("buffer_declares_4_gib", "vhost-user-wireguard; CVE-2020-14374", OUTSIDE_MEMORY, |ground| {
            ground.describe(0, ground.address, u32::MAX, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("tail_crosses_the_end_of_memory", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.describe(0, ground.address, 200, DESC_NEXT, 1);
            ground.describe(1, ground.end() - 32, 64, 0, 0);
            ground.raw.submit(0);
        }),
        spoil_with("buffer_crosses_a_hole_between_regions", RANGE, OUTSIDE_MEMORY, two_regions(), |ground| {
            let first = ground.raw.memory().regions()[0];
            ground.describe(0, first.guest_address + first.bytes - 32, 64, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("front_end_address_in_a_descriptor", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.describe(0, ground.raw.memory().front_end_address(ground.spare), 64, 0, 0);
            ground.raw.submit(0);
        }),
        spoil("buffer_is_the_ring_itself", "not in any peer", Outcome::Served, |ground| {
            let address = ground.raw.memory().guest_address(ground.raw.layout().descriptor_table);
            ground.describe(0, address, 512, 0, 0);
            ground.raw.submit(0);
        }),
    ]
}

fn indirect() -> Vec<Case> {
    const TABLE: &str = "DPDK 6727f5a739, 41333fba5b";
    let without = Options { features: small().features & !feature::INDIRECT_DESC, ..small() };
    vec![
        spoil("indirect_table_of_no_entries", TABLE, INDIRECT, |ground| {
            ground.describe(0, ground.address, 0, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil("indirect_table_of_17_bytes", TABLE, INDIRECT, |ground| {
            ground.describe(0, ground.address, 17, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil("indirect_table_with_next", "VIRTIO 1.2 2.7.5.3.1", INDIRECT, |ground| {
            ground.describe_indirect(0, ground.address, 76, 0, 0);
            ground.describe(0, ground.address, 16, DESC_INDIRECT | DESC_NEXT, 1);
            ground.raw.submit(0);
        }),
        spoil("indirect_table_in_an_indirect_table", TABLE, INDIRECT, |ground| {
            ground.describe_indirect(0, ground.address, 16, DESC_INDIRECT, 0);
            ground.describe(0, ground.address, 16, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil("indirect_table_crosses_the_end_of_memory", TABLE, OUTSIDE_MEMORY, |ground| {
            ground.describe(0, ground.end() - 16, 32, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil("indirect_table_of_4_gib", TABLE, OUTSIDE_MEMORY, |ground| {
            ground.describe(0, ground.address, 0xffff_fff0, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil("indirect_table_wraps_around", TABLE, OUTSIDE_MEMORY, |ground| {
            ground.describe(0, u64::MAX - 15, 32, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil("indirect_chain_goes_round", "DPDK c687b0b635", QUARANTINED_LOOP, |ground| {
            ground.describe_indirect(0, ground.address + 4096, 1, DESC_NEXT, 1);
            ground.describe_indirect(1, ground.address + 4096, 1, DESC_NEXT, 0);
            ground.describe(0, ground.address, 32, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil("indirect_next_is_outside_its_table", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| {
            ground.describe_indirect(0, ground.address + 4096, 64, DESC_NEXT, 2);
            ground.describe(0, ground.address, 32, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil("indirect_chain_of_thousands_of_bytes", "not in any peer", Outcome::Served, |ground| {
            for index in 0..4096 {
                ground.describe_indirect(index, ground.address + 0x2_0000, 1, DESC_NEXT, index as u16 + 1);
            }
            ground.describe(0, ground.address, 4096 * 16, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil("indirect_chain_of_thousands_without_bytes", "not in any peer", QUARANTINED_LOOP, |ground| {
            for index in 0..4096 {
                ground.describe_indirect(index, 0, 0, DESC_NEXT, index as u16 + 1);
            }
            ground.describe(0, ground.address, 4096 * 16, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        spoil_with("indirect_table_that_was_not_negotiated", TABLE, INDIRECT, without, |ground| {
            ground.describe_indirect(0, ground.address, 76, 0, 0);
            ground.describe(0, ground.address, 16, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
    ]
}

/// CVE-2022-2132: the header over several descriptors is still a header, with the right bytes behind it.
fn split_headers() -> Vec<Case> {
    let shapes: [(&str, &[u32]); 6] = [
        ("header_split_1_11", &[1, 11]),
        ("header_split_4_4_4", &[4, 4, 4]),
        ("header_split_into_bytes", &[1; 12]),
        ("header_split_with_empty_descriptors_between", &[0, 3, 0, 0, 9, 0]),
        ("header_and_first_byte_together", &[13]),
        ("header_split_10_2", &[10, 2]),
    ];
    let case = |(name, pieces): (&'static str, &'static [u32])| {
        Case::new(name, "CVE-2022-2132", Outcome::Served, move |attack| {
            let wanted = frame(300, pieces.len() as u64);
            let mut front_end = attack.connect(small())?;
            let at = front_end.take_memory(4096, 64)?;
            let mut raw = front_end.raw(1);
            raw.memory().write(at, &[0; HEADER_BYTES_MAX]);
            raw.memory().write(at + HEADER_BYTES_MAX, &wanted);
            let whole = (HEADER_BYTES_MAX + wanted.len()) as u32;
            let rest = whole - pieces.iter().sum::<u32>();
            let mut address = raw.memory().guest_address(at);
            for (index, bytes) in (0..).zip(pieces.iter().copied().chain([rest])) {
                let flags = if usize::from(index) < pieces.len() { DESC_NEXT } else { 0 };
                raw.write_descriptor(index, Descriptor { address, bytes, flags, next: index + 1 });
                address += u64::from(bytes);
            }
            raw.submit(0);
            attack.friend_receives(&wanted)?;
            attack.hold(front_end);
            Ok(())
        })
    };
    shapes.into_iter().map(case).collect()
}

fn short_chains() -> Vec<Case> {
    let case = |bytes: u32| {
        let name = format!("chain_of_{bytes}_bytes");
        Case::new(name, "CVE-2022-2132; DPDK 71bd0cc536, dc1516e260", Outcome::Served, move |attack| {
            let mut front_end = attack.connect(small())?;
            let at = front_end.take_memory(4096, 64)?;
            let mut raw = front_end.raw(1);
            let address = raw.memory().guest_address(at);
            raw.write_descriptor(0, Descriptor { address, bytes, flags: 0, next: 0 });
            raw.submit(0);
            // What follows is served as ever.
            let next = frame(60, u64::from(bytes));
            raw.memory().write(at, &[0; 2048]);
            raw.write_descriptor(1, Descriptor { address: address + 2048, bytes: 72, flags: 0, next: 0 });
            raw.memory().write(at + 2048, &[&[0; 12][..], &next].concat());
            raw.submit(1);
            attack.friend_receives(&next)?;
            attack.hold(front_end);
            Ok(())
        })
    };
    (0..=13).chain([25, 65535]).map(case).collect()
}

/// Headers that lie about checksum and segmentation: whatever is offered, the frame that follows is whole, and so is
/// everything that arrives.
fn offloads() -> Vec<Case> {
    const TCP4: u8 = bits::GSO_TCPV4;
    let header = VirtioNetHeader::default();
    let csum = |csum_start, csum_offset| VirtioNetHeader { flags: bits::NEEDS_CSUM, csum_start, csum_offset, ..header };
    let gso = |gso_type, gso_size, hdr_len| VirtioNetHeader { gso_type, gso_size, hdr_len, ..csum(34, 16) };
    let lies = [
        ("checksum_starts_behind_the_frame", "CVE-2024-11614", csum(300, 0)),
        ("checksum_starts_at_the_last_byte", "CVE-2024-11614", csum(299, 0)),
        ("checksum_wraps_around", "CVE-2024-11614", csum(65535, 65535)),
        ("checksum_start_and_offset_wrap_to_a_small_number", "CVE-2024-11614", csum(65534, 40)),
        ("checksum_field_overlaps_the_end", "CVE-2024-11614", csum(283, 16)),
        ("checksum_over_the_ethernet_header", "CVE-2024-11614", csum(0, 0)),
        ("segments_of_0_bytes", "DPDK 7023f3e532", gso(TCP4, 0, 54)),
        ("segments_of_1_byte", "DPDK 7023f3e532", gso(TCP4, 1, 54)),
        ("segments_of_65535_bytes", "DPDK 7023f3e532", gso(TCP4, 65535, 54)),
        ("header_length_beyond_the_frame", "DPDK 7023f3e532", gso(TCP4, 100, 65535)),
        ("header_length_of_0", "DPDK 7023f3e532", gso(TCP4, 100, 0)),
        ("type_is_tcp6_on_something_else", "DPDK 7023f3e532", gso(bits::GSO_TCPV6, 100, 74)),
        ("type_is_udp_fragmentation", "DPDK 7023f3e532", gso(bits::GSO_UDP, 100, 42)),
        ("type_is_udp_segmentation", "DPDK 7023f3e532", gso(bits::GSO_UDP_L4, 100, 42)),
        ("type_is_ecn_alone", "DPDK 7023f3e532", gso(bits::GSO_ECN, 100, 54)),
        ("type_is_unknown", "DPDK 7023f3e532", gso(0x7f, 100, 54)),
        ("segments_without_a_checksum", "VIRTIO 1.2 5.1.6.2", VirtioNetHeader { flags: 0, ..gso(TCP4, 100, 54) }),
        ("all_bits_of_the_header", "VIRTIO 1.2 5.1.6", VirtioNetHeader::from_bytes([0xff; 12])),
    ];
    let case = |(name, class, lie): (&'static str, &'static str, VirtioNetHeader)| {
        Case::new(name, class, Outcome::Served, move |attack| lie_about(attack, lie))
    };
    lies.into_iter().map(case).collect()
}

fn lie_about(attack: &mut Attack<'_>, lie: VirtioNetHeader) -> Result<(), Failure> {
    let mut front_end = attack.connect(small())?;
    let at = front_end.take_memory(4096, 64)?;
    let mut raw = front_end.raw(1);
    raw.memory().write(at, &lie.to_bytes());
    raw.memory().write(at + 12, &frame(300, 7));
    let address = raw.memory().guest_address(at);
    raw.write_descriptor(1, Descriptor { address, bytes: 312, flags: 0, next: 0 });
    raw.submit(1);
    let next = frame(60, u64::from(lie.csum_start) << 16 | u64::from(lie.gso_size));
    submit_frame(&mut raw, at + 2048, &next);
    attack.friend_receives(&next)?;
    attack.hold(front_end);
    Ok(())
}
