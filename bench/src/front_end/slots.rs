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
    oldest: usize,
    outstanding: u16,
}

impl Slots {
    /// `count` slots of `stride` descriptors, at least one of each.
    pub(super) fn new(count: u16, stride: u16) -> Self {
        Self { order: (0..count).collect(), stride, oldest: 0, outstanding: 0 }
    }

    /// All there are.
    pub(super) fn count(&self) -> u16 {
        self.order.len() as u16
    }

    /// Those that the device does not have.
    #[inline(always)]
    pub(super) fn free(&self) -> u16 {
        self.count() - self.outstanding
    }

    #[inline(always)]
    fn at(&self, ahead: u16) -> usize {
        let at = self.oldest + usize::from(ahead);
        if at < self.order.len() { at } else { at - self.order.len() }
    }

    /// Up to `most` that have been free for longest, in a row; fewer than there are if the array ends between them.
    #[inline(always)]
    pub(super) fn next(&self, most: u16) -> &[u16] {
        let rest = &self.order[self.at(self.outstanding)..];
        &rest[..usize::from(most.min(self.free())).min(rest.len())]
    }

    /// The device has the first `count` of [`Self::next`] now.
    #[inline(always)]
    pub(super) fn give(&mut self, count: usize) {
        self.outstanding += count as u16;
    }

    /// Up to `most` that the device has had for longest, in the same way.
    #[inline(always)]
    pub(super) fn oldest(&self, most: u16) -> &[u16] {
        let rest = &self.order[self.oldest..];
        &rest[..usize::from(most.min(self.outstanding)).min(rest.len())]
    }

    /// The device is done with the first `count` of [`Self::oldest`].
    #[inline(always)]
    pub(super) fn take_oldest(&mut self, count: usize) {
        self.oldest = self.at(count as u16);
        self.outstanding -= count as u16;
    }

    /// The device is done with the chain at `head`, whichever it is: its slot.
    ///
    /// # Errors
    /// [`RingError::HeadNotOutstanding`] if the device does not have it.
    pub(super) fn take_back(&mut self, head: u32) -> Result<u16, RingError> {
        let is_it = |at: &usize| u32::from(self.order[*at]) * u32::from(self.stride) == head;
        let found = (0..self.outstanding).map(|ahead| self.at(ahead)).find(is_it);
        self.order.swap(self.oldest, found.ok_or(RingError::HeadNotOutstanding { head })?);
        let slot = self.order[self.oldest];
        self.take_oldest(1);
        Ok(slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn give(slots: &mut Slots, count: u16) -> Vec<u16> {
        let mut given = vec![];
        while given.len() < count.into() {
            let run = slots.next(count - given.len() as u16).to_vec();
            slots.give(run.len());
            given.extend(run);
        }
        given
    }

    #[test]
    fn slots_come_back_first_in_first_out() {
        let mut slots = Slots::new(3, 1);
        assert_eq!(give(&mut slots, 2), [0, 1]);
        assert_eq!(slots.oldest(9), [0, 1]);
        slots.take_oldest(2);
        assert_eq!((slots.free(), slots.next(9)), (3, [2].as_slice()), "up to the end of the array");
        assert_eq!(give(&mut slots, 3), [2, 0, 1], "across it");
        assert_eq!((slots.free(), slots.next(9), slots.oldest(9)), (0, [].as_slice(), [2].as_slice()));
    }

    #[test]
    fn a_device_may_finish_in_any_order_and_only_what_it_has() {
        let mut slots = Slots::new(4, 3);
        give(&mut slots, 3);
        let no = |head| Err(RingError::HeadNotOutstanding { head });
        assert_eq!(slots.take_back(9), no(9), "never given");
        assert_eq!(slots.take_back(4), no(4), "the middle of a chain");
        assert_eq!(slots.take_back(70_000), no(70_000), "there is no such");
        assert_eq!(slots.take_back(3), Ok(1));
        assert_eq!(slots.take_back(3), no(3), "twice");
        for head in [6, 0] {
            assert_eq!(slots.take_back(head), Ok(head as u16 / 3));
        }
        assert_eq!(slots.take_back(0), no(0), "it has none");
        let mut given = give(&mut slots, 4);
        assert_eq!(given[0], 3, "the one that waited longest");
        given.sort_unstable();
        assert_eq!(given, [0, 1, 2, 3]);
    }
}
