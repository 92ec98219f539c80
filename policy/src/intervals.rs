//! Which rule is the first for every destination port (or ICMP type and code): elementary intervals of 0 to 65,535 with the
//! best rank in each.
//!
//! Small tables are searched by halving. A table with more than [`SEARCHED_MAX`] intervals has a bitmap of the ports where
//! an interval begins and a running count, so a port's interval is two loads and a count of bits, whatever their number.
//! Built once, then immutable; part of a classifier.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Rank of nothing.
pub(crate) const NONE: u32 = u32::MAX;

/// Intervals up to which halving is used: 8 steps. A bitmap is 16 KiB, so 64 bytes for each interval at most.
const SEARCHED_MAX: usize = 256;

const WORDS: usize = 65_536 / 64;

/// A port range with the rank of its rule: (first, last, rank).
pub(crate) type Ranged = (u16, u16, u32);

/// Many tables, end to end.
#[derive(Debug, Default)]
pub(crate) struct Intervals {
    firsts: Vec<u16>,
    ranks: Vec<u32>,
    bitmaps: Vec<Bitmap>,
}

#[derive(Debug)]
struct Bitmap {
    /// Ports where an interval begins, and how many begin before this word.
    words: Box<[(u64, u32); WORDS]>,
}

/// One table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Table {
    /// The best rank anywhere in it. With one interval, the rank.
    pub(crate) best: u32,
    start: u32,
    count: u32,
    bitmap: u32,
}

impl Intervals {
    /// Adds a table for these rules.
    pub(crate) fn add(&mut self, ranged: &[Ranged]) -> Table {
        let list = elementary(ranged);
        let best = list.iter().map(|interval| interval.1).min().unwrap_or(NONE);
        let start = u32::try_from(self.firsts.len()).expect("classifiers are bounded far below 2^32 intervals");
        let mut bitmap = u32::MAX;
        if list.len() > 1 {
            self.firsts.extend(list.iter().map(|interval| interval.0));
            self.ranks.extend(list.iter().map(|interval| interval.1));
        }
        if list.len() > SEARCHED_MAX {
            bitmap = u32::try_from(self.bitmaps.len()).expect("fewer than intervals");
            self.bitmaps.push(Bitmap::new(&list));
        }
        Table { best, start, count: list.len() as u32, bitmap }
    }

    /// The best rank for this port.
    #[inline]
    pub(crate) fn find(&self, table: Table, port: u16) -> u32 {
        if table.count <= 1 {
            return table.best;
        }
        let start = table.start as usize;
        if table.bitmap != u32::MAX {
            return self.ranks[start + self.bitmaps[table.bitmap as usize].index(port)];
        }
        // The last interval that begins at or before the port; the first begins at 0.
        let firsts = &self.firsts[start..start + table.count as usize];
        let mut low = 0;
        let mut size = firsts.len();
        while size > 1 {
            let half = size / 2;
            low = if firsts[low + half] <= port { low + half } else { low };
            size -= half;
        }
        self.ranks[start + low]
    }

    pub(crate) fn count(&self) -> usize {
        self.firsts.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.firsts.len() * 6 + self.bitmaps.len() * size_of::<[(u64, u32); WORDS]>()
    }

    pub(crate) fn shrink(&mut self) {
        self.firsts.shrink_to_fit();
        self.ranks.shrink_to_fit();
        self.bitmaps.shrink_to_fit();
    }
}

impl Bitmap {
    fn new(list: &[(u16, u32)]) -> Self {
        let mut words = Box::new([(0, 0); WORDS]);
        for &(first, _) in list {
            words[usize::from(first / 64)].0 |= 1 << (first % 64);
        }
        let mut before = 0;
        for (bits, count) in words.iter_mut() {
            *count = before;
            before += u64::count_ones(*bits);
        }
        Self { words }
    }

    #[inline]
    fn index(&self, port: u16) -> usize {
        let (bits, before) = self.words[usize::from(port / 64)];
        // Bits up to and including the port's.
        let begun = (bits << (63 - port % 64)).count_ones();
        (before + begun) as usize - 1
    }
}

/// Cuts 0 to 65,535 into intervals with one best rank each; neighbours differ.
fn elementary(ranged: &[Ranged]) -> Vec<(u16, u32)> {
    let mut ranged = ranged.to_vec();
    ranged.sort_unstable();
    let mut edges: Vec<u32> = vec![0];
    for &(first, last, _) in &ranged {
        edges.push(first.into());
        edges.push(u32::from(last) + 1);
    }
    edges.sort_unstable();
    edges.dedup();
    let mut active: BinaryHeap<Reverse<(u32, u16)>> = BinaryHeap::new();
    let mut coming = ranged.into_iter().peekable();
    let mut list: Vec<(u16, u32)> = Vec::new();
    for edge in edges {
        let Ok(edge) = u16::try_from(edge) else { break };
        while let Some((_, last, rank)) = coming.next_if(|range| range.0 <= edge) {
            active.push(Reverse((rank, last)));
        }
        while active.peek().is_some_and(|Reverse((_, last))| *last < edge) {
            active.pop();
        }
        let rank = active.peek().map_or(NONE, |Reverse((rank, _))| *rank);
        if list.last().is_none_or(|interval| interval.1 != rank) {
            list.push((edge, rank));
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(ranged: &[Ranged], ports: impl Iterator<Item = u16>) {
        let mut intervals = Intervals::default();
        intervals.add(&[(5, 500, 9)]);
        let table = intervals.add(ranged);
        for port in ports {
            let list = ranged.iter().filter(|(first, last, _)| (*first..=*last).contains(&port));
            assert_eq!(intervals.find(table, port), list.map(|range| range.2).min().unwrap_or(NONE), "port {port}");
        }
    }

    #[test]
    fn large_tables_answer_as_small_ones_for_every_port() {
        let ranged: Vec<Ranged> = (0..300u16).map(|n| (n * 211, n * 211 + n * 3, u32::from(n) * 7919 % 300)).collect();
        check(&ranged, 0..=u16::MAX);
        check(&ranged[..20], 0..=u16::MAX);
        check(&[(0, u16::MAX, 3), (u16::MAX, u16::MAX, 1), (0, 0, 2)], 0..=u16::MAX);
        check(&[], 0..10);
    }

    proptest! {
        #[test]
        fn the_best_rank_wins_as_in_a_list(
            ranged in proptest::collection::vec((any::<u16>(), 0..2000u16, 0..50u32), 0..400),
            ports in proptest::collection::vec(any::<u16>(), 50),
        ) {
            let ranged: Vec<Ranged> = ranged.iter().map(|&(first, n, rank)| (first, first.saturating_add(n), rank)).collect();
            let edges = ranged.iter().flat_map(|range| [range.0, range.1, range.1.wrapping_add(1)]);
            check(&ranged, ports.iter().copied().chain(edges.collect::<Vec<_>>()));
        }
    }
}
