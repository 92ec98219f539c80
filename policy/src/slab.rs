//! Room for a number of things that is known from the start: places are taken in order, and again once given back.
//!
//! All is allocated at once and nothing moves or grows, but a page is resident only once a thing was put there, or somebody has
//! written to it who knows from [`Memory`] that this will be soon: it costs what its busiest moment needed.

use std::ops::{Index, IndexMut, Range};

/// What can hold the number of another place while nobody needs it.
pub(crate) trait Link {
    fn link(&self) -> u32;
    fn set_link(&mut self, place: u32);
}

/// No place.
const NONE: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) struct Slab<T> {
    /// Those taken so far, within the capacity.
    things: Vec<T>,
    /// The place given back last, which holds the number of the one before.
    given_back: u32,
    given_back_count: u32,
}

impl<T: Link> Slab<T> {
    pub(crate) fn new(capacity: u32) -> Self {
        Self { things: Vec::with_capacity(capacity as usize), given_back: NONE, given_back_count: 0 }
    }

    /// Takes a place for what `fill` makes of what lay there before.
    ///
    /// # Panics
    /// When as many are taken as it was made for.
    #[inline]
    pub(crate) fn take(&mut self, fill: impl FnOnce(Option<&T>) -> T) -> u32 {
        let place = self.given_back;
        if let Some(thing) = self.things.get_mut(place as usize) {
            self.given_back = thing.link();
            self.given_back_count -= 1;
            *thing = fill(Some(thing));
            return place;
        }
        assert!(self.things.len() < self.things.capacity(), "all places are taken");
        self.things.push(fill(None));
        (self.things.len() - 1) as u32
    }

    /// Gives a place back that was taken. All but the link stays there until it is taken again.
    pub(crate) fn give_back(&mut self, place: u32) {
        self.things[place as usize].set_link(self.given_back);
        self.given_back = place;
        self.given_back_count += 1;
    }

    /// Places taken now.
    #[inline]
    pub(crate) fn count(&self) -> u32 {
        self.things.len() as u32 - self.given_back_count
    }

    /// All places that were ever taken, in order.
    pub(crate) fn ever_taken(&self) -> &[T] {
        &self.things
    }

    /// Addresses of all places, and of those that were ever taken.
    pub(crate) fn memory(&self) -> Memory {
        let taken = self.things.as_ptr_range();
        let (start, used_end) = (taken.start as usize, taken.end as usize);
        Memory { all: start..start + self.things.capacity() * size_of::<T>(), used_end }
    }
}

impl<T> Index<u32> for Slab<T> {
    type Output = T;

    #[inline]
    fn index(&self, place: u32) -> &T {
        &self.things[place as usize]
    }
}

impl<T> IndexMut<u32> for Slab<T> {
    #[inline]
    fn index_mut(&mut self, place: u32) -> &mut T {
        &mut self.things[place as usize]
    }
}

/// Memory that comes to be used in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// Its addresses: the same for as long as it is there.
    pub all: Range<usize>,
    /// Where the part ends that has been used so far.
    pub used_end: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Link for u64 {
        fn link(&self) -> u32 {
            (*self >> 32) as u32
        }

        fn set_link(&mut self, place: u32) {
            *self = u64::from(place) << 32 | *self & 0xffff_ffff;
        }
    }

    fn low(last: Option<&u64>) -> u64 {
        last.map_or(0, |last| last & 0xffff_ffff)
    }

    #[test]
    fn places_are_taken_in_order_and_again_once_given_back() {
        let mut slab = Slab::<u64>::new(3);
        assert_eq!([1, 2, 3].map(|thing| slab.take(|last| thing + low(last))), [0, 1, 2]);
        slab.give_back(1);
        slab.give_back(0);
        assert_eq!(slab.count(), 1);
        assert_eq!([40, 50].map(|thing| slab.take(|last| thing + low(last))), [0, 1]);
        assert_eq!((slab.count(), slab.ever_taken()), (3, &[41, 52, 3][..]));
        slab.give_back(2);
        assert_eq!((slab.take(|_| 7), slab[2], slab.count()), (2, 7, 3));
        let memory = slab.memory();
        assert_eq!((memory.all.len(), memory.used_end), (24, memory.all.end));
    }

    #[test]
    #[should_panic(expected = "all places are taken")]
    fn never_more_than_it_was_made_for() {
        let mut slab = Slab::new(2);
        // `with_capacity` may give more than it was asked for, of small things.
        for thing in 0..100u64 {
            slab.take(|_| thing);
        }
    }
}
