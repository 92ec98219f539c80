//! The receiver: is every frame one of ours, whole, and in its flow's order?
//!
//! Every frame's length and first [`CHECKED_BYTES`] bytes are compared with what its sequence number says; one in
//! `sample` is compared to its last byte. Sequence numbers repeat with the set, so a gap says how many frames are missing
//! modulo the set; `Sink::finish` weighs the gaps against what was sent. A frame that comes too late looks like a
//! whole round lost, which no count of frames sent bears out: that is how reordering shows.

use super::frame::{FRAME_BYTES_MIN, FlowSet, MAGIC, SEQUENCE_AT};
use crate::front_end::Received;

/// Compared in every frame: headers, magic, sequence number, 2 bytes of pattern. All frames have them.
pub const CHECKED_BYTES: usize = 8 * CHECKED_WORDS;
const CHECKED_WORDS: usize = 7;
const _: () = assert!(CHECKED_BYTES <= FRAME_BYTES_MIN && SEQUENCE_AT + 8 <= CHECKED_BYTES);
// magic_of and sequence_of take the words apart by these.
const _: () = assert!(SEQUENCE_AT == 46);

/// What has arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// Test frames that are as they should be.
    pub good: u64,
    /// Test frames with a wrong length or byte.
    pub corrupt: u64,
    /// Frames of someone else: ARP, neighbour discovery, what a switch floods.
    pub foreign: u64,
    /// Sum of the gaps between sequence numbers, frames.
    pub gaps: u64,
}

/// A checking receiver of one [`FlowSet`].
#[derive(Debug)]
pub struct Sink<'a> {
    set: &'a FlowSet,
    prefixes: Vec<[u64; CHECKED_WORDS]>,
    bytes: usize,
    /// Per flow, the place in the set (sequence / flows) that comes next; `None` before its first frame.
    next: Vec<Option<u32>>,
    places: u32,
    sample: u64,
    until_sample: u64,
    arrived: Arrived,
    /// The first corrupt frame, for the report.
    specimen: Option<Vec<u8>>,
}

impl<'a> Sink<'a> {
    /// Expects frames of `set`; compares one in `sample` entirely (1: all).
    pub fn new(set: &'a FlowSet, sample: u64) -> Self {
        let prefix = |frame: &Vec<u8>| {
            let (words, _) = frame.as_chunks::<8>();
            std::array::from_fn(|index| u64::from_le_bytes(words[index]))
        };
        Self {
            prefixes: set.frames().iter().map(prefix).collect(),
            next: vec![None; set.flows()],
            bytes: set.frames()[0].len(),
            places: (set.frames().len() / set.flows()) as u32,
            set,
            sample: sample.max(1),
            until_sample: 1,
            arrived: Arrived::default(),
            specimen: None,
        }
    }

    /// What has arrived since the last [`Self::reset`].
    pub fn arrived(&self) -> Arrived {
        self.arrived
    }

    /// The first corrupt frame.
    pub fn specimen(&self) -> Option<&[u8]> {
        self.specimen.as_deref()
    }

    /// Counts from zero, expecting `sequence` next.
    pub fn reset(&mut self, sequence: usize) {
        self.arrived = Arrived::default();
        let flows = self.next.len();
        for (flow, next) in self.next.iter_mut().enumerate() {
            let first = sequence + (flow + flows - sequence % flows) % flows;
            *next = Some((first / flows) as u32 % self.places);
        }
    }

    /// Takes one frame.
    #[inline]
    pub fn take(&mut self, mut frame: Received<'_>) {
        let Some(prefix) = frame.words::<CHECKED_WORDS>() else {
            self.arrived.foreign += 1;
            return;
        };
        let sequence = sequence_of(&prefix);
        let known = usize::try_from(sequence).ok().and_then(|index| Some((index, self.prefixes.get(index)?)));
        match known {
            Some((index, expected)) if same(expected, &prefix) && frame.len() == self.bytes => {
                // Also if the rest of it turns out to be wrong: it has arrived.
                self.in_order(index);
                self.until_sample -= 1;
                if self.until_sample == 0 {
                    self.until_sample = self.sample;
                    if frame.bytes() != self.set.frames()[index] {
                        self.corrupt(frame);
                        return;
                    }
                }
                self.arrived.good += 1;
            }
            _ if magic_of(&prefix) == MAGIC => self.corrupt(frame),
            _ => self.arrived.foreign += 1,
        }
    }

    #[inline]
    fn in_order(&mut self, sequence: usize) {
        let flows = self.next.len();
        let (flow, place) =
            if flows == 1 { (0, sequence as u32) } else { (sequence % flows, (sequence / flows) as u32) };
        if let Some(expected) = self.next[flow]
            && expected != place
        {
            let gap = if place > expected { place - expected } else { place + self.places - expected };
            self.arrived.gaps += u64::from(gap);
        }
        self.next[flow] = Some(if place + 1 == self.places { 0 } else { place + 1 });
    }

    #[cold]
    fn corrupt(&mut self, mut frame: Received<'_>) {
        self.arrived.corrupt += 1;
        self.specimen.get_or_insert_with(|| frame.bytes().to_vec());
    }

    /// Whether the gaps are explained by `lost` frames: they are at most that many unless frames were reordered (or
    /// repeated). Frames lost at the very end leave no gap, and a whole round lost leaves none either.
    pub fn in_sequence(&self, lost: u64) -> bool {
        self.arrived.gaps <= lost
    }
}

/// Without a branch per word.
#[inline]
fn same(left: &[u64; CHECKED_WORDS], right: &[u64; CHECKED_WORDS]) -> bool {
    left.iter().zip(right).fold(0, |difference, (left, right)| difference | (left ^ right)) == 0
}

/// Bytes 46 to 53, big-endian: the end of word 5 and most of word 6.
#[inline]
fn sequence_of(words: &[u64; CHECKED_WORDS]) -> u64 {
    (words[5] >> 48 | words[6] << 16).swap_bytes()
}

/// Bytes 42 to 45: in the middle of word 5.
fn magic_of(words: &[u64; CHECKED_WORDS]) -> [u8; 4] {
    ((words[5] >> 16) as u32).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front_end::memory::GuestMemory;
    use crate::traffic::frame::{Endpoint, FlowSet};
    use std::net::Ipv4Addr;

    fn set(flows: usize) -> FlowSet {
        let endpoint = |last| Endpoint { mac: [2, 0, 0, 0, 0, last], address: Ipv4Addr::new(10, 0, 0, last) };
        FlowSet::new(endpoint(1), endpoint(2), 100, flows, 12)
    }

    fn take(sink: &mut Sink<'_>, frames: impl IntoIterator<Item = Vec<u8>>) {
        let memory = GuestMemory::new(4096, 1).unwrap();
        for mut frame in frames {
            sink.take(Received::fake(&memory, &mut frame));
        }
    }

    fn arrivals(flows: usize, sequences: &[usize]) -> Arrived {
        let set = set(flows);
        let mut sink = Sink::new(&set, 1);
        sink.reset(sequences[0]);
        take(&mut sink, sequences.iter().map(|sequence| set.frames()[*sequence % 12].clone()));
        sink.arrived()
    }

    #[test]
    fn all_in_order_leaves_no_gap() {
        for flows in [1, 3, 12] {
            let all: Vec<_> = (5..60).collect();
            assert_eq!(arrivals(flows, &all), Arrived { good: 55, ..Arrived::default() }, "{flows} flows");
        }
    }

    #[test]
    fn lost_frames_are_gaps_of_as_many() {
        assert_eq!(arrivals(1, &[0, 1, 4, 5]).gaps, 2);
        assert_eq!(arrivals(1, &[10, 11, 1]).gaps, 1, "across the set's end");
        assert_eq!(arrivals(3, &[0, 1, 2, 6, 7, 8]).gaps, 3, "one of each flow");
    }

    #[test]
    fn reordering_within_a_flow_shows_and_between_flows_does_not() {
        assert!(arrivals(1, &[0, 2, 1, 3]).gaps >= 12);
        assert_eq!(arrivals(3, &[0, 2, 1, 3]).gaps, 0);
    }

    #[test]
    fn duplicate_looks_like_a_round_lost() {
        assert_eq!(arrivals(1, &[0, 1, 1, 2]).gaps, 11);
    }

    #[test]
    fn altered_bytes_and_lengths_are_corrupt_and_other_traffic_is_foreign() {
        let set = set(1);
        let mut sink = Sink::new(&set, 1);
        let altered = |at: usize| {
            let mut frame = set.frames()[0].clone();
            frame[at] ^= 1;
            frame
        };
        take(&mut sink, [altered(20), altered(50), altered(99), set.frames()[0][..90].to_vec()]);
        assert_eq!(sink.arrived(), Arrived { corrupt: 4, gaps: 0, ..Arrived::default() });
        assert_eq!(sink.specimen(), Some(altered(20).as_slice()));
        take(&mut sink, [altered(42), vec![0xff; 60], vec![0; 14]]);
        assert_eq!(sink.arrived().foreign, 3);
    }

    #[test]
    fn without_sampling_the_tail_is_not_looked_at() {
        let set = set(1);
        let mut sink = Sink::new(&set, 1000);
        let mut frame = set.frames()[1].clone();
        frame[99] ^= 1;
        take(&mut sink, [set.frames()[0].clone(), frame]);
        assert_eq!(sink.arrived().good, 2);
    }
}
