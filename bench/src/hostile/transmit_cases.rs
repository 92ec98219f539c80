//! A guest's transmitq: chains, addresses, indirect tables, a header in pieces. The same of either layout.

use super::attack::{frame, submit_frame};
use super::{Card, Case, Outcome};
use crate::front_end::header::HEADER_BYTES_MAX;
use crate::front_end::layout::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
use crate::front_end::raw::Piece;
use crate::front_end::{Options, RawDriver, feature};

pub(super) const LOOPS: Outcome = Outcome::Quarantined("loops");
pub(super) const OUTSIDE_MEMORY: Outcome = Outcome::Quarantined("outside guest memory");
pub(super) const DIRECTION: Outcome = Outcome::Quarantined("wrong direction");
pub(super) const INDIRECT: Outcome = Outcome::Quarantined("indirect table that is not allowed");

/// Guest memory that an attack may fill.
const SPARE_BYTES: usize = 256 << 10;
/// Numbers the frame of the pair beside the one under attack.
const BESIDE: u64 = 0xbe_51de;

/// A session's transmitq, and `SPARE_BYTES` of guest memory.
pub(super) struct Ground {
    pub(super) raw: RawDriver,
    /// Offset of the spare memory, and its guest address.
    pub(super) spare: usize,
    pub(super) address: u64,
}

impl Ground {
    /// Writes `entries` to a table at the start of the spare memory.
    pub(super) fn table(&self, entries: &[Piece]) {
        for (index, &(address, bytes, flags)) in entries.iter().enumerate() {
            let descriptor = if self.raw.is_packed() {
                // Id and flags are where a split ring has flags and next.
                Descriptor { address, bytes, flags: 0, next: flags }
            } else {
                let next = if index + 1 < entries.len() { DESC_NEXT } else { 0 };
                Descriptor { address, bytes, flags: flags | next, next: index as u16 + 1 }
            };
            self.raw.write_descriptor_at(self.spare + 16 * index, descriptor);
        }
    }

    /// The end of the last region of guest memory.
    pub(super) fn end(&self) -> u64 {
        let last = self.raw.memory().regions().last().expect("guest memory has a region");
        last.guest_address + last.bytes
    }

    /// A sound frame behind whatever was done.
    pub(super) fn submit_frame(&mut self, frame: &[u8]) {
        submit_frame(&mut self.raw, self.spare + SPARE_BYTES / 2, frame);
    }
}

/// A case that spoils the transmitq of a running session; `deed` kicks where it does not submit. A pair beside it goes on.
pub(super) fn spoil(card: Card, name: &str, class: &'static str, outcome: Outcome, deed: fn(&mut Ground)) -> Case {
    spoil_with(card, card.options(), name, class, outcome, deed)
}

pub(super) fn spoil_with(
    card: Card,
    options: Options,
    name: &str,
    class: &'static str,
    outcome: Outcome,
    deed: fn(&mut Ground),
) -> Case {
    card.case(name, class, outcome, move |attack| {
        let mut front_end = attack.connect(options.clone())?;
        let spare = front_end.take_memory(SPARE_BYTES, 4096)?;
        let address = front_end.memory().guest_address(spare);
        deed(&mut Ground { raw: front_end.raw(card.transmitq()), spare, address });
        if card.has_pairs() {
            front_end.send_burst(&[&frame(60, BESIDE)])?;
            attack.friend_receives(&frame(60, BESIDE))?;
        }
        attack.hold(front_end);
        Ok(())
    })
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for card in Card::LAYOUTS.into_iter().chain(Card::PAIRS) {
        cases.extend(chains(card));
        cases.extend(addresses(card));
        cases.extend(indirect(card));
        cases.extend(split_headers(card));
    }
    // A chain too short for a header does nothing to its ring, let alone to another.
    cases.extend(Card::LAYOUTS.into_iter().flat_map(short_chains));
    cases
}

fn chains(card: Card) -> Vec<Case> {
    let case = |name, class, outcome, deed| spoil(card, name, class, outcome, deed);
    vec![
        case("chain_as_long_as_the_ring", "DPDK a436f53ebf", Outcome::Served, |ground| {
            ground.raw.submit_chain(&[(ground.address, 8, 0); 64]);
        }),
        case("writable_descriptor_in_a_transmitq", "DPDK 06fc8545fd", DIRECTION, |ground| {
            ground.raw.submit_chain(&[(ground.address, 64, DESC_WRITE)]);
        }),
        case("writable_before_readable", "DPDK 4e282bc6c5", DIRECTION, |ground| {
            ground.raw.submit_chain(&[(ground.address, 64, DESC_WRITE), (ground.address, 64, 0)]);
        }),
        case("writable_after_readable", "DPDK 85936f0546", DIRECTION, |ground| {
            ground.raw.submit_chain(&[(ground.address, 64, 0), (ground.address, 64, DESC_WRITE)]);
        }),
        case("unknown_flags_set", "VIRTIO 1.2 2.7.5, 2.8.1", Outcome::Served, |ground| {
            // Of a packed ring all but AVAIL and USED, which are known.
            let unknown = if ground.raw.is_packed() { 0x7f78 } else { 0xfff8 };
            ground.raw.submit_chain(&[(ground.address, 76, unknown)]);
        }),
        case("lengths_add_up_beyond_4_gib", "virtio-queue 0.8.0", Outcome::Served, |ground| {
            let region = ground.raw.memory().regions()[0];
            let bytes = u32::try_from(region.bytes).unwrap_or(u32::MAX);
            ground.raw.submit_chain(&[(region.guest_address, bytes, 0); 64]);
        }),
        case("zero_length_chain", "not in any peer", Outcome::Served, |ground| ground.raw.submit_chain(&[(0, 0, 0)])),
        case("zero_length_descriptor_at_the_last_address", "CVE-2019-14835", Outcome::Served, |ground| {
            ground.raw.submit_chain(&[(u64::MAX, 0, 0)]);
        }),
        case("the_same_chain_many_times", "vm-virtio 196", Outcome::Served, |ground| {
            if ground.raw.is_packed() {
                (0..64).for_each(|_| ground.raw.submit_chain_as(0, &[(ground.address, 76, 0)]));
            } else {
                ground.raw.submit_chain(&[(ground.address, 76, 0)]);
                (0..63).for_each(|_| ground.raw.submit(0));
            }
        }),
    ]
}

fn addresses(card: Card) -> Vec<Case> {
    const RANGE: &str = "CVE-2018-1059";
    let case = |name, class, outcome, deed| spoil(card, name, class, outcome, deed);
    let two_regions = Options { regions: 2, ..card.options() };
    vec![
        case("buffer_at_address_zero", RANGE, OUTSIDE_MEMORY, |ground| ground.raw.submit_chain(&[(0, 64, 0)])),
        case("buffer_crosses_the_end_of_memory", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.raw.submit_chain(&[(ground.end() - 32, 64, 0)]);
        }),
        case("buffer_ends_with_memory", RANGE, Outcome::Served, |ground| {
            ground.raw.submit_chain(&[(ground.end() - 76, 76, 0)]);
        }),
        case("buffer_starts_where_memory_ends", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.raw.submit_chain(&[(ground.end(), 1, 0)]);
        }),
        case("buffer_wraps_around", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.raw.submit_chain(&[(u64::MAX - 31, 64, 0)]);
        }),
        case("buffer_declares_4_gib", "vhost-user-wireguard; CVE-2020-14374", OUTSIDE_MEMORY, |ground| {
            ground.raw.submit_chain(&[(ground.address, u32::MAX, 0)]);
        }),
        case("tail_crosses_the_end_of_memory", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.raw.submit_chain(&[(ground.address, 200, 0), (ground.end() - 32, 64, 0)]);
        }),
        spoil_with(card, two_regions, "buffer_crosses_a_hole_between_regions", RANGE, OUTSIDE_MEMORY, |ground| {
            let first = ground.raw.memory().regions()[0];
            ground.raw.submit_chain(&[(first.guest_address + first.bytes - 32, 64, 0)]);
        }),
        case("front_end_address_in_a_descriptor", RANGE, OUTSIDE_MEMORY, |ground| {
            ground.raw.submit_chain(&[(ground.raw.memory().front_end_address(ground.spare), 64, 0)]);
        }),
        case("buffer_is_the_ring_itself", "not in any peer", Outcome::Served, |ground| {
            let address = ground.raw.memory().guest_address(ground.raw.layout().descriptor_table);
            ground.raw.submit_chain(&[(address, 512, 0)]);
        }),
    ]
}

fn indirect(card: Card) -> Vec<Case> {
    const TABLE: &str = "DPDK 6727f5a739, 41333fba5b";
    let case = |name, class, outcome, deed| spoil(card, name, class, outcome, deed);
    let small = card.options();
    let without = Options { features: small.features & !feature::INDIRECT_DESC, ..small };
    vec![
        case("indirect_table_of_no_entries", TABLE, INDIRECT, |ground| {
            ground.raw.submit_chain(&[(ground.address, 0, DESC_INDIRECT)]);
        }),
        case("indirect_table_of_17_bytes", TABLE, INDIRECT, |ground| {
            ground.raw.submit_chain(&[(ground.address, 17, DESC_INDIRECT)]);
        }),
        case("indirect_table_with_next", "VIRTIO 1.2 2.7.5.3.1, 2.8.7.1", INDIRECT, |ground| {
            ground.table(&[(ground.address, 76, 0)]);
            ground.raw.submit_chain(&[(ground.address, 16, DESC_INDIRECT | DESC_NEXT)]);
        }),
        // In a packed ring's table flags other than WRITE mean nothing (VIRTIO 1.2 §2.8.7).
        case("indirect_table_in_an_indirect_table", TABLE, card.pick(INDIRECT, Outcome::Served), |ground| {
            ground.table(&[(ground.address, 16, DESC_INDIRECT)]);
            ground.raw.submit_chain(&[(ground.address, 16, DESC_INDIRECT)]);
        }),
        case("indirect_table_crosses_the_end_of_memory", TABLE, OUTSIDE_MEMORY, |ground| {
            ground.raw.submit_chain(&[(ground.end() - 16, 32, DESC_INDIRECT)]);
        }),
        case("indirect_table_of_4_gib", TABLE, OUTSIDE_MEMORY, |ground| {
            ground.raw.submit_chain(&[(ground.address, 0xffff_fff0, DESC_INDIRECT)]);
        }),
        case("indirect_table_wraps_around", TABLE, OUTSIDE_MEMORY, |ground| {
            ground.raw.submit_chain(&[(u64::MAX - 15, 32, DESC_INDIRECT)]);
        }),
        case("indirect_table_with_a_writable_buffer", "DPDK 06fc8545fd", DIRECTION, |ground| {
            ground.table(&[(ground.address + 4096, 60, 0), (ground.address + 4096, 60, DESC_WRITE)]);
            ground.raw.submit_chain(&[(ground.address, 32, DESC_INDIRECT)]);
        }),
        case("indirect_table_with_a_bad_address", "CVE-2018-1059", OUTSIDE_MEMORY, |ground| {
            ground.table(&[(ground.address + 4096, 60, 0), (ground.end() - 1, 2, 0)]);
            ground.raw.submit_chain(&[(ground.address, 32, DESC_INDIRECT)]);
        }),
        // A packed ring's table has no end mark: all of it is the chain, and too long.
        case("indirect_chain_of_thousands_of_bytes", "not in any peer", card.pick(Outcome::Served, LOOPS), |ground| {
            ground.table(&vec![(ground.address + 0x2_0000, 1, 0); 4096]);
            ground.raw.submit_chain(&[(ground.address, 4096 * 16, DESC_INDIRECT)]);
        }),
        case("indirect_chain_of_thousands_without_bytes", "not in any peer", LOOPS, |ground| {
            ground.table(&vec![(0, 0, 0); 4096]);
            ground.raw.submit_chain(&[(ground.address, 4096 * 16, DESC_INDIRECT)]);
        }),
        spoil_with(card, without, "indirect_table_that_was_not_negotiated", TABLE, INDIRECT, |ground| {
            ground.table(&[(ground.address, 76, 0)]);
            ground.raw.submit_chain(&[(ground.address, 16, DESC_INDIRECT)]);
        }),
    ]
}

/// CVE-2022-2132: the header over several descriptors is still a header, with the right bytes behind it.
fn split_headers(card: Card) -> Vec<Case> {
    let shapes: [(&str, &[u32]); 6] = [
        ("header_split_1_11", &[1, 11]),
        ("header_split_4_4_4", &[4, 4, 4]),
        ("header_split_into_bytes", &[1; 12]),
        ("header_split_with_empty_descriptors_between", &[0, 3, 0, 0, 9, 0]),
        ("header_and_first_byte_together", &[13]),
        ("header_split_10_2", &[10, 2]),
    ];
    let case = |(name, pieces): (&'static str, &'static [u32])| {
        card.case(name, "CVE-2022-2132", Outcome::Served, move |attack| {
            let wanted = frame(300, pieces.len() as u64);
            let mut front_end = attack.connect(card.options())?;
            let at = front_end.take_memory(4096, 64)?;
            let mut raw = front_end.raw(card.transmitq());
            raw.memory().write(at, &[0; HEADER_BYTES_MAX]);
            raw.memory().write(at + HEADER_BYTES_MAX, &wanted);
            let whole = (HEADER_BYTES_MAX + wanted.len()) as u32;
            let rest = whole - pieces.iter().sum::<u32>();
            let mut address = raw.memory().guest_address(at);
            let chain: Vec<Piece> = pieces
                .iter()
                .copied()
                .chain([rest])
                .map(|bytes| {
                    address += u64::from(bytes);
                    (address - u64::from(bytes), bytes, 0)
                })
                .collect();
            raw.submit_chain(&chain);
            attack.friend_receives(&wanted)?;
            attack.hold(front_end);
            Ok(())
        })
    };
    shapes.into_iter().map(case).collect()
}

fn short_chains(card: Card) -> Vec<Case> {
    let case = |bytes: u32| {
        let name = format!("chain_of_{bytes}_bytes");
        card.case(&name, "CVE-2022-2132; DPDK 71bd0cc536, dc1516e260", Outcome::Served, move |attack| {
            let mut front_end = attack.connect(card.options())?;
            let at = front_end.take_memory(4096, 64)?;
            let mut raw = front_end.raw(card.transmitq());
            let address = raw.memory().guest_address(at);
            raw.memory().write(at, &[0; 2048]);
            raw.submit_chain(&[(address, bytes, 0)]);
            // What follows is served as ever.
            let next = frame(60, u64::from(bytes));
            submit_frame(&mut raw, at + 2048, &next);
            attack.friend_receives(&next)?;
            attack.hold(front_end);
            Ok(())
        })
    };
    (0..=13).chain([25, 65535]).map(case).collect()
}
