//! The card under attack. What means the same to every card is a case of each, named after it.

use super::attack::small;
use super::{Attack, Case, Failure, Outcome};
use crate::front_end::{Options, feature};

/// How a card's rings lie in memory, and how many it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    is_packed: bool,
    pairs: u16,
}

impl Card {
    /// Split rings, one pair: what most front-ends have.
    pub(super) const SPLIT: Self = Self { is_packed: false, pairs: 1 };
    /// Packed rings, one pair.
    pub(super) const PACKED: Self = Self { is_packed: true, pairs: 1 };
    /// Either layout, one pair.
    pub(super) const LAYOUTS: [Self; 2] = [Self::SPLIT, Self::PACKED];
    /// Either layout, two pairs: the second is attacked, the first goes on.
    pub(super) const PAIRS: [Self; 2] = [Self { pairs: 2, ..Self::SPLIT }, Self { pairs: 2, ..Self::PACKED }];

    /// A case on this card: `packed_`, `pairs_` or both before its name, on the port that has so many pairs.
    pub(super) fn case(
        self,
        name: &str,
        class: &'static str,
        outcome: Outcome,
        attack: impl Fn(&mut Attack<'_>) -> Result<(), Failure> + Send + 'static,
    ) -> Case {
        let layout = if self.is_packed { "packed_" } else { "" };
        let (pairs, port) = if self.has_pairs() { ("pairs_", "pairs") } else { ("", "bad") };
        Case { port, ..Case::new(format!("{layout}{pairs}{name}"), class, outcome, attack) }
    }

    /// Small, and of this kind.
    pub(super) fn options(self) -> Options {
        let layout = if self.is_packed { feature::RING_PACKED } else { 0 };
        let small = small();
        Options {
            queue_pairs: self.pairs,
            features: small.features | layout,
            features_required: small.features_required | layout,
            ..small
        }
    }

    /// What the layouts do not have in common.
    pub(super) fn pick<T>(self, split: T, packed: T) -> T {
        if self.is_packed { packed } else { split }
    }

    /// Whether its rings are packed.
    pub(super) fn is_packed(self) -> bool {
        self.is_packed
    }

    /// Whether there is a pair beside the one under attack.
    pub(super) fn has_pairs(self) -> bool {
        self.pairs > 1
    }

    /// The receiveq under attack; the transmitq is the one after it.
    pub(super) fn receiveq(self) -> usize {
        2 * usize::from(self.pairs) - 2
    }

    /// The transmitq under attack.
    pub(super) fn transmitq(self) -> usize {
        self.receiveq() + 1
    }
}
