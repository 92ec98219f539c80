//! Longest prefix match by binary search on prefix lengths (M. Waldvogel et al., "Scalable High Speed IP Routing Lookups",
//! SIGCOMM 1997): one hash table per length that occurs, so the cost grows with the logarithm of the number of
//! *lengths*, not with the number of prefixes.
//!
//! Markers in shorter lengths say that something longer exists on their path, and carry the best match so far. Immutable
//! once built; part of a classifier. Addresses are aligned: their first bit is the number's highest.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::BitAnd;

use foldhash::quality::RandomState;

use crate::model::mask;

/// The first bits of an aligned address: all that its family has. (Tables of IPv4 take a quarter of what they would with 128 bits,
/// and lookups wait for memory.)
pub(crate) trait Bits: Copy + Eq + Hash + BitAnd<Output = Self> {
    /// Of an aligned address or mask.
    fn first_of(aligned: u128) -> Self;
}

impl Bits for u32 {
    #[inline]
    fn first_of(aligned: u128) -> Self {
        (aligned >> 96) as u32
    }
}

impl Bits for u128 {
    #[inline]
    fn first_of(aligned: u128) -> Self {
        aligned
    }
}

/// Prefixes of one family to values.
#[derive(Debug)]
pub(crate) struct Lpm<B> {
    /// By ascending length. The prefix of length 0 is `root`.
    lengths: Vec<(B, HashMap<B, u32, RandomState>)>,
    root: u32,
}

impl<B> Default for Lpm<B> {
    fn default() -> Self {
        Self { lengths: vec![], root: 0 }
    }
}

impl<B: Bits> Lpm<B> {
    /// Builds from distinct prefixes (aligned bits, length) with their values; `root` is the value where none matches.
    pub(crate) fn build(root: u32, prefixes: &[(u128, u8, u32)]) -> Self {
        let root = prefixes.iter().find(|prefix| prefix.1 == 0).map_or(root, |prefix| prefix.2);
        let mut lengths: Vec<u8> = prefixes.iter().map(|prefix| prefix.1).filter(|&length| length > 0).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let mut tables = vec![HashMap::new(); lengths.len()];
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
        let narrow = |(length, table): (u8, HashMap<_, _>)| {
            let entries = table.into_iter().map(|(bits, value)| (B::first_of(bits), value));
            (B::first_of(mask(length)), entries.collect())
        };
        let lengths = lengths.into_iter().zip(tables).map(narrow).collect();
        Self { lengths, root }
    }

    /// The value of the longest prefix that holds this address.
    #[inline]
    pub(crate) fn lookup(&self, aligned: u128) -> u32 {
        let address = B::first_of(aligned);
        let mut best = self.root;
        let mut levels = &self.lengths[..];
        while !levels.is_empty() {
            let middle = levels.len() / 2;
            let (mask, table) = &levels[middle];
            match table.get(&(address & *mask)) {
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
        self.lengths.iter().map(|(_, table)| table.capacity() * (size_of::<(B, u32)>() + 1)).sum()
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
            let (wide, narrow) = (Lpm::<u128>::build(7, &list), Lpm::<u32>::build(7, &list));
            for (seed, noise) in asked {
                let address = spread(seed) | u128::from(noise & 0xffff) << 80;
                let longest = list
                    .iter()
                    .filter(|(bits, length, _)| address & mask(*length) == *bits)
                    .max_by_key(|prefix| prefix.1)
                    .map_or(7, |prefix| prefix.2);
                prop_assert_eq!(wide.lookup(address), longest);
                prop_assert_eq!(narrow.lookup(address), longest);
            }
        }
    }
}
