//! Random numbers from a seed (splitmix64), and how many cases are wanted.

use std::hash::{BuildHasher, RandomState};

pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// `DREAMWIRE_POLICY_SEED`, or another one each run; failures print it.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("DREAMWIRE_POLICY_SEED").ok();
    given
        .map_or_else(|| RandomState::new().hash_one(0), |text| text.parse().expect("DREAMWIRE_POLICY_SEED is a number"))
}

pub(crate) fn cases(default: u64) -> u64 {
    let given = std::env::var("DREAMWIRE_POLICY_CASES").ok();
    given.map_or(default, |text| text.parse().expect("DREAMWIRE_POLICY_CASES is a number"))
}
