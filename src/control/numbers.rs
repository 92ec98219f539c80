//! Numbers for names: a name keeps its number while it lives.
//!
//! A number is given to another name only after many others were: a connection that was let through by a rule remembers the
//! rule's number until its next packet.

use std::collections::{HashMap, VecDeque};

/// Numbers that rest before the first of them is given out again.
const RESTING_MAX: usize = 1024;

/// The numbers of all names of one kind, with a value each.
#[derive(Debug)]
pub(super) struct Numbers<T> {
    by_name: HashMap<String, (u32, T)>,
    /// Oldest first.
    resting: VecDeque<u32>,
    fresh: u32,
}

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self { by_name: HashMap::new(), resting: VecDeque::new(), fresh: 0 }
    }
}

impl<T> Numbers<T> {
    /// Forgets every name but these, and gives the new ones numbers and values.
    pub(super) fn keep<'a>(&mut self, names: impl Iterator<Item = &'a str>, value: impl Fn() -> T) {
        let mut before = std::mem::take(&mut self.by_name);
        let mut unknown = Vec::new();
        for name in names {
            match before.remove_entry(name) {
                Some((name, known)) => drop(self.by_name.insert(name, known)),
                None => unknown.push(name),
            }
        }
        for name in unknown {
            let number = match self.resting.len() > RESTING_MAX {
                true => self.resting.pop_front().expect("more than some are more than none"),
                false => {
                    self.fresh += 1;
                    self.fresh - 1
                }
            };
            self.by_name.insert(name.to_owned(), (number, value()));
        }
        // Last: what has just become free is not given to any of the names that came with it.
        self.resting.extend(before.into_values().map(|(number, _)| number));
    }

    /// The number of a name that is known.
    pub(super) fn of(&self, name: &str) -> u32 {
        self.by_name[name].0
    }

    /// Every name with its number and value.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, u32, &T)> {
        self.by_name.iter().map(|(name, (number, value))| (name.as_str(), *number, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number_and_a_number_rests_before_it_is_given_again() {
        let mut numbers = Numbers::<()>::default();
        numbers.keep(["a", "b"].into_iter(), || ());
        assert_eq!((numbers.of("a"), numbers.of("b")), (0, 1));
        numbers.keep(["c", "b"].into_iter(), || ());
        assert_eq!((numbers.of("b"), numbers.of("c")), (1, 2));
        for round in 0..3 * RESTING_MAX {
            numbers.keep(["b", &format!("x{round}")].into_iter(), || ());
        }
        assert_eq!(numbers.of("b"), 1);
        let most = RESTING_MAX as u32 + 5;
        assert!(numbers.iter().all(|(_, number, ())| number < most), "they do not grow for ever");
    }

    #[test]
    fn however_many_names_are_replaced_at_once_none_gets_a_number_that_was_in_use() {
        let mut numbers = Numbers::<()>::default();
        let names = |round: usize| (0..3 * RESTING_MAX).map(move |name| format!("{round}-{name}")).collect::<Vec<_>>();
        let mut last = Vec::new();
        for round in 0..4 {
            let names = names(round);
            numbers.keep(names.iter().map(String::as_str), || ());
            let given: Vec<_> = names.iter().map(|name| numbers.of(name)).collect();
            assert!(given.iter().all(|number| !last.contains(number)), "round {round}");
            last = given;
        }
    }
}
