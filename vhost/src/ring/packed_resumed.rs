//! Chains of a packed ring that the device before us took and did not give back.

use std::collections::VecDeque;

use super::inflight_packed::{Chained, Found};
use super::packed_chain::{FLAG_NEXT, Table, second_word};
use super::position::Position;

/// What takes the place of the descriptors from the ring's position on, of which some may be overwritten.
#[derive(Debug)]
pub(super) struct Resumed {
    /// The descriptors of all chains, private.
    pub(super) words: Box<[[u64; 2]]>,
    /// First descriptor, their number, and where the in-flight region has them.
    pub(super) chains: VecDeque<(u16, u16, Chained)>,
}

impl Resumed {
    pub(super) fn new(found: Found) -> (Position, Self) {
        let mut words = Vec::new();
        let mut chains = VecDeque::new();
        for (chained, copies) in found.chains {
            // All chains together have at most as many descriptors as the ring: the tracker has checked it.
            let (first, slots) = (words.len() as u16, copies.len() as u16);
            for (index, copy) in copies.iter().enumerate() {
                // The copy says how long the chain is, not its flags.
                let next = if index + 1 < copies.len() { FLAG_NEXT } else { 0 };
                let flags = copy.flags & !FLAG_NEXT | next;
                words.push([copy.address.to_le(), second_word(copy.bytes, copy.id, flags)]);
            }
            chains.push_back((first, slots, chained));
        }
        (found.position, Self { words: words.into(), chains })
    }

    pub(super) fn table(&self) -> Table {
        Table { host: self.words.as_ptr() as usize, size: self.words.len() as u16 }
    }
}
