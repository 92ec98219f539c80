//! The index of a connection table: buckets of places that say where entries are, each bucket one cache line.

use std::ops::{Index, IndexMut, Range};

/// Connections in a bucket: with the count of those who went elsewhere, one cache line.
pub(crate) const WAYS: usize = 15;

/// A place: part of the hash, never 0, above the connection's slot. 0: free.
pub(crate) const SLOT_BITS: u32 = 20;
const SLOT: u32 = (1 << SLOT_BITS) - 1;
pub(crate) const TAG: u32 = !SLOT;

/// The word of a bucket that counts those who went to their second bucket from here.
pub(crate) const AWAY: usize = WAYS;

/// A large index begins where a huge page of the processor's could.
const HUGE_BYTES: usize = 2 << 20;

/// Where entries are.
#[derive(Debug)]
pub(crate) struct Buckets {
    /// Plain words, so that the allocator's zeroed pages are taken as they are.
    words: Box<[u32]>,
    first: usize,
    pub(crate) count: usize,
}

pub(crate) type Bucket = [u32; WAYS + 1];

impl Buckets {
    pub(crate) fn new(count: usize) -> Self {
        let bytes = count * size_of::<Bucket>();
        let aligned_to = if bytes < HUGE_BYTES { size_of::<Bucket>() } else { HUGE_BYTES } / size_of::<u32>();
        let words = vec![0u32; bytes / size_of::<u32>() + aligned_to].into_boxed_slice();
        let first = (words.as_ptr() as usize / size_of::<u32>()).wrapping_neg() % aligned_to;
        Self { words, first, count }
    }

    pub(crate) fn memory(&self) -> Range<usize> {
        let first = &raw const self.words[self.first] as usize;
        first..first + self.count * size_of::<Bucket>()
    }
}

impl Index<usize> for Buckets {
    type Output = Bucket;

    #[inline]
    fn index(&self, bucket: usize) -> &Bucket {
        self.words[self.first + bucket * (WAYS + 1)..].first_chunk().expect("whole buckets behind the first")
    }
}

impl IndexMut<usize> for Buckets {
    #[inline]
    fn index_mut(&mut self, bucket: usize) -> &mut Bucket {
        self.words[self.first + bucket * (WAYS + 1)..].first_chunk_mut().expect("whole buckets behind the first")
    }
}

/// A bit for each way of a bucket whose place, as far as `mask` goes, is `place`.
#[inline]
pub(crate) fn ways(bucket: &Bucket, mask: u32, place: u32) -> u32 {
    (0..WAYS).fold(0, |ways, way| ways | u32::from(bucket[way] & mask == place) << way)
}

/// The places of a bucket.
#[inline]
pub(crate) fn places(bucket: &Bucket) -> &[u32; WAYS] {
    bucket.first_chunk().expect("shorter than a bucket")
}

#[inline]
pub(crate) fn places_mut(bucket: &mut Bucket) -> &mut [u32; WAYS] {
    bucket.first_chunk_mut().expect("shorter than a bucket")
}

#[inline]
pub(crate) const fn slot_of(place: u32) -> u32 {
    place & SLOT
}
