//! How far a packed ring's chains are given back.

use super::BURST;
use super::packed_chain::{Chain, second_word};
use super::position::Position;

/// Second words of used descriptors that are not in the ring yet, from [`Staging::start`] on.
pub(super) type KeptBack = [u64; BURST];

/// Where the ring stands. A loop works on a copy, which it keeps in registers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Staging {
    /// Next descriptor to take, and to use.
    pub(super) next: Position,
    /// The first used descriptor that the driver does not see yet.
    pub(super) start: u16,
    /// Descriptors from that one up to `next`; 0: there is none.
    pub(super) slots: u32,
    /// Used descriptors in a row from `start` on that are kept back.
    pub(super) kept: u32,
}

impl Staging {
    pub(super) fn new(next: Position) -> Self {
        Self { next, start: next.index, slots: 0, kept: 0 }
    }

    /// Gives a chain back in a ring of `size`: what is to be written, and where, now. `None`: it is kept back, as the first always is,
    /// and those of one descriptor that follow it in a row.
    #[inline(always)]
    pub(super) fn give_back(
        &mut self,
        kept_back: &mut KeptBack,
        chain: Chain,
        bytes: u32,
        flags: u16,
        size: u16,
    ) -> Option<(u16, u64)> {
        let at = self.next;
        let word = second_word(bytes, chain.id, flags | at.used_flags());
        let is_kept = self.slots == 0 || (self.kept == self.slots && chain.slots == 1);
        if self.slots == 0 {
            self.start = at.index;
        }
        self.slots += u32::from(chain.slots);
        self.next = at.after(chain.slots, size);
        match kept_back.get_mut(self.kept as usize) {
            Some(place) if is_kept => {
                *place = word;
                self.kept += 1;
                None
            }
            _ => Some((at.index, word)),
        }
    }
}
