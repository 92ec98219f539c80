//! How far a packed ring's chains are given back.

use super::packed_chain::{Chain, second_word};
use super::position::Position;

/// Where the ring stands. A loop works on a copy, which it keeps in registers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Staging {
    /// Next descriptor to take, and to use.
    pub(super) next: Position,
    /// The first used descriptor that the driver does not see yet: where, and its second word.
    pub(super) first: Option<(u16, u64)>,
    /// Descriptors from that one up to `next`.
    pub(super) slots: u32,
}

impl Staging {
    /// Gives a chain back in a ring of `size`: where its used descriptor goes, and that one's second word. `None`: it is the first,
    /// which is written last.
    #[inline(always)]
    pub(super) fn give_back(&mut self, chain: Chain, bytes: u32, flags: u16, size: u16) -> Option<(u16, u64)> {
        let used = (self.next.index, second_word(bytes, chain.id, flags | self.next.used_flags()));
        self.slots += u32::from(chain.slots);
        self.next = self.next.after(chain.slots, size);
        if self.first.is_some() {
            return Some(used);
        }
        self.first = Some(used);
        None
    }
}
