//! Longest prefix match by binary search on prefix lengths (M. Waldvogel et al., "Scalable High Speed IP Routing Lookups",
//! SIGCOMM 1997): one hash table per length that occurs, so the cost grows with the logarithm of the number of
//! *lengths*, not with the number of prefixes.
//!
//! Markers in shorter lengths say that something longer exists on their path, and carry the best match so far. Immutable
//! once built; part of a classifier. Addresses are aligned: their first bit is the number's highest.

use std::collections::HashMap;

use foldhash::quality::RandomState;

use crate::model::mask;

type Table = HashMap<u128, u32, RandomState>;

/// Prefixes to values.
#[derive(Debug, Default)]
pub(crate) struct Lpm {
    /// By ascending length. The prefix of length 0 is `root`.
    lengths: Vec<(u128, Table)>,
    root: u32,
}

impl Lpm {
    /// Builds from distinct prefixes (aligned bits, length) with their values; `root` is the value where none matches.
    pub(crate) fn build(root: u32, prefixes: &[(u128, u8, u32)]) -> Self {
        let root = prefixes.iter().find(|prefix| prefix.1 == 0).map_or(root, |prefix| prefix.2);
        let mut lengths: Vec<u8> = prefixes.iter().map(|prefix| prefix.1).filter(|&length| length > 0).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut tables: Vec<Table> = vec![Table::default(); lengths.len()];
        for &(bits, length, value) in prefixes {
            if let Ok(level) = lengths.binary_search(&length) {
                tables[level].insert(bits, value);
            }
        }
        let real = tables.clone();
        for &(bits, length, _) in prefixes {
            let Ok(goal) = lengths.binary_search(&length) else { continue };
            let (mut low, mut high) = (0, lengths.len());
            while low < high {
                let middle = low.midpoint(high);
                if middle >= goal {
                    if middle == goal {
                        break;
                    }
                    high = middle;
                    continue;
                }
                tables[middle].entry(bits & mask(lengths[middle])).or_insert_with_key(|&marker| {
                    let shorter = (0..middle).rev();
                    let best = shorter.filter_map(|level| real[level].get(&(marker & mask(lengths[level])))).next();
                    best.copied().unwrap_or(root)
                });
                low = middle + 1;
            }
        }
        let lengths = lengths.iter().map(|&length| mask(length)).zip(tables).collect();
        Self { lengths, root }
    }

    /// The value of the longest prefix that holds this address.
    #[inline]
    pub(crate) fn lookup(&self, aligned: u128) -> u32 {
        let mut best = self.root;
        let mut levels = &self.lengths[..];
        while !levels.is_empty() {
            let middle = levels.len() / 2;
            let (mask, table) = &levels[middle];
            match table.get(&(aligned & mask)) {
                Some(&value) => {
                    best = value;
                    levels = &levels[middle + 1..];
                }
                None => levels = &levels[..middle],
            }
        }
        best
    }

    /// Bytes on the heap, give or take the hash tables' slack.
    pub(crate) fn bytes(&self) -> usize {
        self.lengths.iter().map(|(_, table)| table.capacity() * (size_of::<(u128, u32)>() + 1)).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_longest_prefix_wins_as_in_a_list(
            prefixes in proptest::collection::hash_map((any::<u16>(), 0..=32u8), any::<u32>(), 0..60),
            asked in proptest::collection::vec(any::<(u16, u32)>(), 50),
        ) {
            // Few distinct high bits, so that prefixes nest.
            let spread = |seed: u16| (u128::from(seed & 0x0f0f) << 112) | (u128::from(seed) << 96);
            let mut list: Vec<(u128, u8, u32)> = prefixes
                .iter()
                .map(|(&(seed, length), &value)| (spread(seed) & mask(length), length, value))
                .collect();
            list.sort_unstable();
            list.dedup_by_key(|prefix| (prefix.0, prefix.1));
            let lpm = Lpm::build(7, &list);
            for (seed, noise) in asked {
                let address = spread(seed) | u128::from(noise & 0xffff) << 80;
                let longest = list
                    .iter()
                    .filter(|(bits, length, _)| address & mask(*length) == *bits)
                    .max_by_key(|prefix| prefix.1)
                    .map_or(7, |prefix| prefix.2);
                prop_assert_eq!(lpm.lookup(address), longest);
            }
        }
    }
}
