//! What was observed at one site: keys and values, and where two sites differ.

use std::collections::{BTreeMap, BTreeSet};

/// Stands for a row that one site has and the other has not.
pub(super) const ABSENT: &str = "—";
/// Longest value. A longer one is cut: a table is for people.
const VALUE_CHARS_MAX: usize = 120;

/// Rows by key. Keys are words joined by dots, from the general to the particular: `wire.out.size.60`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observations {
    rows: BTreeMap<String, String>,
}

impl Observations {
    /// Adds a row.
    ///
    /// # Panics
    /// When there is one of that key: two questions must not hide each other.
    pub(super) fn record(&mut self, key: impl Into<String>, value: impl ToString) {
        let key = key.into();
        let value: String = value.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        let value = if value.is_empty() { "(empty)".to_owned() } else { value.chars().take(VALUE_CHARS_MAX).collect() };
        let old = self.rows.insert(key.clone(), value);
        assert!(old.is_none(), "{key} was recorded twice");
    }

    /// Adds a row, under a numbered key if there is one of that key already: for what tools print.
    pub(super) fn record_again(&mut self, key: &str, value: impl ToString) {
        let mut numbered = key.to_owned();
        let mut number = 1;
        while self.rows.contains_key(&numbered) {
            number += 1;
            numbered = format!("{key}#{number}");
        }
        self.record(numbered, value);
    }

    /// How many rows.
    #[must_use]
    pub fn count(&self) -> usize {
        self.rows.len()
    }

    /// All rows in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.rows.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The value of a row, [`ABSENT`] without one.
    fn value(&self, key: &str) -> &str {
        self.rows.get(key).map_or(ABSENT, String::as_str)
    }
}

/// A row that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What was asked.
    pub key: String,
    /// What the guest on the tap saw.
    pub tap: String,
    /// What the guest on dreamwire saw.
    pub dreamwire: String,
}

/// Rows that are not the same in both, in the order of their keys.
#[must_use]
pub fn differences(tap: &Observations, dreamwire: &Observations) -> Vec<Difference> {
    let keys: BTreeSet<_> = tap.rows.keys().chain(dreamwire.rows.keys()).collect();
    keys.into_iter()
        .filter(|key| tap.value(key) != dreamwire.value(key))
        .map(|key| Difference {
            key: key.clone(),
            tap: tap.value(key).to_owned(),
            dreamwire: dreamwire.value(key).to_owned(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(pairs: &[(&str, &str)]) -> Observations {
        let mut rows = Observations::default();
        for (key, value) in pairs {
            rows.record(*key, value);
        }
        rows
    }

    #[test]
    fn a_row_that_one_site_lacks_is_a_difference() {
        let found = differences(&rows(&[("a", "1"), ("b", "2")]), &rows(&[("b", "3"), ("c", "4")]));
        let found: Vec<_> =
            found.iter().map(|row| (row.key.as_str(), row.tap.as_str(), row.dreamwire.as_str())).collect();
        assert_eq!(found, [("a", "1", ABSENT), ("b", "2", "3"), ("c", ABSENT, "4")]);
    }

    #[test]
    fn equal_rows_are_none() {
        assert_eq!(differences(&rows(&[("a", "1")]), &rows(&[("a", "1")])), []);
    }

    #[test]
    fn values_are_one_line() {
        assert_eq!(rows(&[("a", " one\n\ttwo ")]).value("a"), "one two");
    }

    #[test]
    #[should_panic(expected = "a was recorded twice")]
    fn a_key_names_one_question() {
        drop(rows(&[("a", "1"), ("a", "1")]));
    }

    #[test]
    fn what_a_tool_prints_twice_is_numbered() {
        let mut rows = Observations::default();
        rows.record_again("a", 1);
        rows.record_again("a", 2);
        assert_eq!(rows.iter().collect::<Vec<_>>(), [("a", "1"), ("a#2", "2")]);
    }
}
