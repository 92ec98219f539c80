//! Chains of a split ring that the device before us took and did not give back.

/// What takes the place of the available ring's entries from `first` on: a device that finishes out of order leaves other
/// chains to be done than those that stand there.
#[derive(Debug)]
pub(super) struct Resumed {
    first: u16,
    heads: Vec<u16>,
}

impl Resumed {
    /// `None`: there are none.
    pub(super) fn new(first: u16, heads: Vec<u16>) -> Option<Self> {
        (!heads.is_empty()).then_some(Self { first, heads })
    }

    /// What stands for entry `index`, if one of them does.
    #[inline]
    pub(super) fn head(&self, index: u16) -> Option<u16> {
        self.heads.get(usize::from(index.wrapping_sub(self.first))).copied()
    }

    /// How many are to be taken yet when `next_avail` is the next entry.
    pub(super) fn left(&self, next_avail: u16) -> usize {
        self.heads.len().saturating_sub(usize::from(next_avail.wrapping_sub(self.first)))
    }
}
