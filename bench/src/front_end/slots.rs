//! Which of a ring's slots the device has, in the order in which it got them.
//!
//! One array is both queues: from `oldest` on the slots that are outstanding, behind them those that are free, round to where
//! it began. A device that finishes in order gives back the oldest one: nothing but two counters moves then, the array stays as
//! it is, and with it what the ring says, which needs not be written again. One that does not costs a search.

use super::split::RingError;

/// Slots 0 to n - 1, at first all free. Slot s has the descriptors from s * stride on: that one is the head of its chain.
#[derive(Debug)]
pub(super) struct Slots {
    order: Box<[u16]>,
    stride: u16,
    ends: Ends,
}

/// Where the oldest one is, and how many there are from there on. A loop keeps its own in registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    oldest: usize,
    outstanding: u16,
}

impl Slots {
    /// `count` slots of `stride` descriptors, at least one of each.
    pub(super) fn new(count: u16, stride: u16) -> Self {
        Self { order: (0..count).collect(), stride, ends: Ends { oldest: 0, outstanding: 0 } }
    }

    /// All there are.
    pub(super) fn count(&self) -> u16 {
        self.order.len() as u16
    }

    /// Those that the device does not have.
    #[inline(always)]
    pub(super) fn free(&self) -> u16 {
        self.count() - self.ends.outstanding
    }

    #[inline(always)]
    fn at(&self, ends: Ends, ahead: u16) -> usize {
        let at = ends.oldest + usize::from(ahead);
        if at < self.order.len() { at } else { at - self.order.len() }
    }

    /// The `count` slots that have been free for longest: the device has them now. At most [`Self::free`].
    #[inline(always)]
    pub(super) fn give(&mut self, count: u16) -> impl Iterator<Item = u16> {
        let first = self.at(self.ends, self.ends.outstanding);
        self.ends.outstanding += count;
        let (before, after) = self.order.split_at(first);
        let count = usize::from(count);
        let turned = count.saturating_sub(after.len());
        after[..count - turned].iter().chain(&before[..turned]).copied()
    }

    /// Where to begin to take back.
    #[inline(always)]
    pub(super) fn ends(&self) -> Ends {
        self.ends
    }

    /// Where taking back has ended.
    #[inline(always)]
    pub(super) fn set_ends(&mut self, ends: Ends) {
        self.ends = ends;
    }

    /// The device is done with the chain at `head`: its slot.
    ///
    /// # Errors
    /// [`RingError::HeadNotOutstanding`] if the device does not have it.
    #[inline(always)]
    pub(super) fn take_back(&mut self, ends: &mut Ends, head: u32) -> Result<u16, RingError> {
        // What is returned is the array's, not what `head` says: that comes from another core, and who goes on with it waits.
        let mut slot = self.order[ends.oldest];
        if ends.outstanding == 0 || u32::from(slot) * u32::from(self.stride) != head {
            slot = self.make_oldest(*ends, head)?;
        }
        *ends = Ends { oldest: self.at(*ends, 1), outstanding: ends.outstanding - 1 };
        Ok(slot)
    }

    #[cold]
    #[inline(never)]
    fn make_oldest(&mut self, ends: Ends, head: u32) -> Result<u16, RingError> {
        let is_it = |at: &usize| u32::from(self.order[*at]) * u32::from(self.stride) == head;
        let found = (0..ends.outstanding).map(|ahead| self.at(ends, ahead)).find(is_it);
        self.order.swap(ends.oldest, found.ok_or(RingError::HeadNotOutstanding { head })?);
        Ok(self.order[ends.oldest])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn give(slots: &mut Slots, count: u16) -> Vec<u16> {
        slots.give(count).collect()
    }

    fn take_back(slots: &mut Slots, head: u32) -> Result<u16, RingError> {
        let mut ends = slots.ends();
        let slot = slots.take_back(&mut ends, head)?;
        slots.set_ends(ends);
        Ok(slot)
    }

    #[test]
    fn slots_come_back_first_in_first_out() {
        let mut slots = Slots::new(3, 1);
        assert_eq!(give(&mut slots, 2), [0, 1]);
        assert_eq!((take_back(&mut slots, 0), take_back(&mut slots, 1)), (Ok(0), Ok(1)));
        assert_eq!(slots.free(), 3);
        assert_eq!(give(&mut slots, 3), [2, 0, 1], "across the end of the array");
        assert_eq!((slots.free(), give(&mut slots, 0)), (0, vec![]));
    }

    #[test]
    fn a_device_may_finish_in_any_order_and_only_what_it_has() {
        let mut slots = Slots::new(4, 3);
        give(&mut slots, 3);
        let no = |head| Err(RingError::HeadNotOutstanding { head });
        assert_eq!(take_back(&mut slots, 9), no(9), "never given");
        assert_eq!(take_back(&mut slots, 4), no(4), "the middle of a chain");
        assert_eq!(take_back(&mut slots, 70_000), no(70_000), "there is no such");
        assert_eq!(take_back(&mut slots, 3), Ok(1));
        assert_eq!(take_back(&mut slots, 3), no(3), "twice");
        for head in [6, 0] {
            assert_eq!(take_back(&mut slots, head), Ok(head as u16 / 3));
        }
        assert_eq!(take_back(&mut slots, 0), no(0), "it has none");
        let mut given = give(&mut slots, 4);
        assert_eq!(given[0], 3, "the one that waited longest");
        given.sort_unstable();
        assert_eq!(given, [0, 1, 2, 3]);
    }
}
