//! Small numbers for objects, given out lowest first. A number is given back only when no worker can know it any more.

/// The numbers `0..max`, some of them taken.
#[derive(Debug)]
pub(super) struct Slots {
    taken: Vec<bool>,
    max: usize,
}

impl Slots {
    pub(super) fn new(max: usize) -> Self {
        assert!(max <= usize::from(u16::MAX), "a slot is a u16");
        Self { taken: Vec::new(), max }
    }

    /// The lowest free number; `None` if all are taken.
    pub(super) fn take(&mut self) -> Option<u16> {
        let free = self.taken.iter().position(|taken| !taken).unwrap_or(self.taken.len());
        if free >= self.max {
            return None;
        }
        if free == self.taken.len() {
            self.taken.push(false);
        }
        self.taken[free] = true;
        u16::try_from(free).ok()
    }

    /// Gives a number back.
    pub(super) fn free(&mut self, slot: u16) {
        let taken = &mut self.taken[usize::from(slot)];
        assert!(*taken, "slot {slot} is freed twice");
        *taken = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_is_given_and_no_more_than_there_are() {
        let mut slots = Slots::new(3);
        assert_eq!([slots.take(), slots.take(), slots.take(), slots.take()], [Some(0), Some(1), Some(2), None]);
        slots.free(1);
        assert_eq!([slots.take(), slots.take()], [Some(1), None]);
    }
}
