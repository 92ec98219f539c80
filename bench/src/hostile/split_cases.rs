//! What only a split ring can be told: `next` fields, heads, available and used indices.

use std::time::Instant;

use super::attack::PATIENCE;
use super::transmit_cases::{Ground, INDIRECT, LOOPS, spoil};
use super::{Card, Case, Outcome};
use crate::front_end::layout::{DESC_INDIRECT, DESC_NEXT, Descriptor};

const OUTSIDE_TABLE: Outcome = Outcome::Quarantined("outside the table");
const AHEAD: Outcome = Outcome::Quarantined("ahead of");

impl Ground {
    fn describe(&self, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        self.raw.write_descriptor(index, Descriptor { address, bytes, flags, next });
    }

    /// Entry `index` of a table at the start of the spare memory.
    fn describe_indirect(&self, index: usize, address: u64, bytes: u32, flags: u16, next: u16) {
        let descriptor = Descriptor { address, bytes, flags, next };
        self.raw.write_descriptor_at(self.spare + 16 * index, descriptor);
    }
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = chains();
    cases.extend(indices());
    cases
}

/// A case that spoils a split transmitq; `deed` kicks where it does not submit.
fn split(name: &str, class: &'static str, outcome: Outcome, deed: fn(&mut Ground)) -> Case {
    spoil(Card::SPLIT, name, class, outcome, deed)
}

fn chains() -> Vec<Case> {
    const CLASS: &str = "DPDK a436f53ebf, c687b0b635, 623bc47054";
    vec![
        split("chain_points_to_itself", CLASS, LOOPS, |ground| {
            ground.describe(0, ground.address, 64, DESC_NEXT, 0);
            ground.raw.submit(0);
        }),
        split("chain_goes_round_in_twos", CLASS, LOOPS, |ground| {
            ground.describe(0, ground.address, 1, DESC_NEXT, 1);
            ground.describe(1, ground.address, 1, DESC_NEXT, 0);
            ground.raw.submit(0);
        }),
        split("chain_goes_round_the_whole_ring", CLASS, LOOPS, |ground| {
            for index in 0..64 {
                ground.describe(index, ground.address, 1, DESC_NEXT, (index + 1) % 64);
            }
            ground.raw.submit(0);
        }),
        split("chain_of_empty_descriptors_goes_round", CLASS, LOOPS, |ground| {
            for index in 0..64 {
                ground.describe(index, 0, 0, DESC_NEXT, (index + 1) % 64);
            }
            ground.raw.submit(0);
        }),
        split("next_is_the_size_of_the_table", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| {
            ground.describe(0, ground.address, 64, DESC_NEXT, 64);
            ground.raw.submit(0);
        }),
        split("next_is_65535", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| {
            ground.describe(0, ground.address, 64, DESC_NEXT, 65535);
            ground.raw.submit(0);
        }),
        split("all_flags_set", "DPDK 48cae0bfa6", INDIRECT, |ground| {
            ground.describe(0, ground.address, 64, 0xffff, 0xffff);
            ground.raw.submit(0);
        }),
        split("indirect_chain_goes_round", "DPDK c687b0b635", LOOPS, |ground| {
            ground.describe_indirect(0, ground.address + 4096, 1, DESC_NEXT, 1);
            ground.describe_indirect(1, ground.address + 4096, 1, DESC_NEXT, 0);
            ground.describe(0, ground.address, 32, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
        split("indirect_next_is_outside_its_table", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| {
            ground.describe_indirect(0, ground.address + 4096, 64, DESC_NEXT, 2);
            ground.describe(0, ground.address, 32, DESC_INDIRECT, 0);
            ground.raw.submit(0);
        }),
    ]
}

fn indices() -> Vec<Case> {
    const RING: &str = "CVE-2016-5403";
    vec![
        split("head_is_the_size_of_the_table", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| ground.raw.submit(64)),
        split("head_is_65535", "DPDK 450539b47e", OUTSIDE_TABLE, |ground| ground.raw.submit(65535)),
        split("available_index_jumps_by_the_size_and_one", RING, AHEAD, |ground| {
            ground.raw.set_available_index(65);
            ground.raw.doorbell().kick();
        }),
        split("available_index_jumps_by_65535", RING, AHEAD, |ground| {
            ground.raw.set_available_index(65535);
            ground.raw.doorbell().kick();
        }),
        split("available_index_goes_back", "virtio-queue 0.6.1", AHEAD, |ground| {
            ground.describe(0, ground.address, 76, 0, 0);
            ground.raw.submit(0);
            let deadline = Instant::now() + PATIENCE;
            while ground.raw.used_index() == 0 && Instant::now() < deadline {
                std::thread::yield_now();
            }
            ground.raw.set_available_index(0);
            ground.raw.doorbell().kick();
        }),
        split("available_index_jumps_by_the_size", RING, Outcome::Served, |ground| {
            (0..64).for_each(|index| ground.raw.write_available_entry(index, 0));
            ground.describe(0, ground.address, 76, 0, 0);
            ground.raw.set_available_index(64);
            ground.raw.doorbell().kick();
        }),
        split("used_ring_is_scribbled_over", "DPDK 5a4fbe79e6", Outcome::Served, |ground| {
            let layout = ground.raw.layout();
            ground.raw.memory().write(layout.used_ring, &[0xa5; 4 + 8 * 64]);
            ground.describe(0, ground.address, 76, 0, 0);
            ground.raw.submit(0);
        }),
        split("events_and_flags_are_garbage", "VIRTIO 1.2 2.7.7", Outcome::Served, |ground| {
            ground.raw.set_available_flags(0xffff);
            ground.raw.set_used_event(0x8001);
            ground.describe(0, ground.address, 76, 0, 0);
            (0..32).for_each(|_| ground.raw.submit(0));
        }),
    ]
}
