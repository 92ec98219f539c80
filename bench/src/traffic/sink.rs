//! The receiver: is every frame one of ours, whole, and in its flow's order?
//!
//! Every frame's length and first [`CHECKED_BYTES`] bytes are compared with what its sequence number says (behind a
//! virtio-net header, that is one cache line); one in `sample` is compared to its last byte. Of frames to be segmented,
//! whose headers are longer by 12 bytes, the MAC addresses are compared in the sample only, and the virtio-net header has to
//! be the sender's. Of OVS-DPDK alone, which was seen to change them, checksum and header may differ
//! ([`Sink::with_offloads_of_ovs`]). In a tunnel the outer headers of every packet are checked too. Sequence numbers repeat with the set, so a gap says how many frames are missing modulo
//! the set; `Sink::in_sequence` weighs the gaps against what was sent. A frame that comes too late looks like a whole round
//! lost, which no count of frames sent bears out: that is how reordering shows.

use super::frame::{FRAME_BYTES_MIN, FlowSet, MAGIC, SEQUENCE_AT, TCP_CHECKSUM_AT};
use super::vxlan::{OUTER_BYTES, OUTER_WORDS, Outer, OuterCheck};
use crate::front_end::header::{VirtioNetHeader, bits};
use crate::front_end::{Received, Taker};

/// Compared in every frame: headers, magic, sequence number. All frames have them.
pub const CHECKED_BYTES: usize = SEQUENCE_AT + 6;
/// Words that are equal in all frames of a set: MAC and IPv4 headers, up to the middle of the destination address.
const COMMON_WORDS: usize = 4;
/// Words that are not, and hold the rest of [`CHECKED_BYTES`]: the last one overlaps, so as to end where they end.
const OWN_WORDS: usize = 3;
const LAST_AT: usize = CHECKED_BYTES - 8;
const _: () = assert!(CHECKED_BYTES <= FRAME_BYTES_MIN && 8 * (COMMON_WORDS + OWN_WORDS - 1) > LAST_AT);
// magic_of and sequence_of take the words apart by these.
const _: () = assert!(SEQUENCE_AT == 46 && LAST_AT == 44);
// checksum_of by this: a frame to be segmented is looked at 12 bytes later.
const _: () = assert!(TCP_CHECKSUM_AT == 12 + 8 * COMMON_WORDS + 6);

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

/// The beginning of a frame: what all have in common, and what is its own.
type Prefix = ([u64; COMMON_WORDS], [u64; OWN_WORDS]);

/// What is known of a frame of the set.
#[derive(Clone, Copy, Debug)]
struct Known {
    own: [u64; OWN_WORDS],
    flow: u32,
    /// Which one of its flow's it is.
    place: u32,
}

/// A checking receiver of one [`FlowSet`].
#[derive(Debug)]
pub struct Sink<'a> {
    set: &'a FlowSet,
    common: [u64; COMMON_WORDS],
    known: Vec<Known>,
    bytes: usize,
    /// Where the checked bytes begin.
    start: usize,
    /// Frames arrive inside of outer packets.
    outer: Option<OuterCheck>,
    /// What frames to be segmented are sent with.
    header: Option<VirtioNetHeader>,
    /// Of frames to be segmented that come through OVS: see [`FlowSet::pseudo_sums`].
    pseudo_sums: Option<[u16; 2]>,
    /// Per flow, the place in the set (sequence / flows) that comes next; `None` before its first frame.
    next: Vec<Option<u32>>,
    places: u32,
    /// Number of the frame that comes next if none is missing and flows keep to each other's order.
    follows: usize,
    /// Frames come as they were sent, each whole and in no tunnel.
    is_plain: bool,
    sample: u64,
    until_sample: u64,
    arrived: Arrived,
    /// The first corrupt frame and its virtio-net header, for the report.
    specimen: Option<(VirtioNetHeader, Vec<u8>)>,
}

impl<'a> Sink<'a> {
    /// Expects frames of `set`; compares one in `sample` entirely (1: all).
    ///
    /// # Panics
    /// If the set's frames begin differently: they come from one sender.
    pub fn new(set: &'a FlowSet, sample: u64) -> Self {
        let shift = set.mark_shift();
        let prefix = |frame: &[u8]| {
            let word = |at: usize| u64::from_le_bytes(frame[shift + at..][..8].try_into().expect("eight bytes"));
            let common: [u64; COMMON_WORDS] = std::array::from_fn(|index| word(8 * index));
            (common, [word(32), word(40), word(LAST_AT)])
        };
        let (common, _) = prefix(&set.frames()[0]);
        let flows = set.flows();
        let known = |(index, frame): (usize, &Vec<u8>)| {
            let (its, own) = prefix(frame);
            assert_eq!(its, common, "frames of one set begin alike");
            Known { own, flow: (index % flows) as u32, place: (index / flows) as u32 }
        };
        Self {
            common,
            known: set.frames().iter().enumerate().map(known).collect(),
            next: vec![None; flows],
            bytes: set.frames()[0].len(),
            start: shift,
            outer: None,
            header: set.is_segmented().then(|| set.header()),
            pseudo_sums: None,
            follows: 0,
            is_plain: !set.is_segmented(),
            places: (set.frames().len() / flows) as u32,
            set,
            sample: sample.max(1),
            until_sample: 1,
            arrived: Arrived::default(),
            specimen: None,
        }
    }

    /// As [`Self::new`], with every frame inside of a packet with these outer headers.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn behind(outer: &Outer, set: &'a FlowSet, sample: u64) -> Self {
        let mut sink = Self::new(set, sample);
        sink.start += OUTER_BYTES;
        sink.outer = Some(OuterCheck::new(outer, sink.bytes));
        sink.is_plain = false;
        sink
    }

    /// Of frames to be segmented takes either sum of [`FlowSet::pseudo_sums`] and does not compare lengths and offsets of the
    /// virtio-net header: what OVS-DPDK 3.1 was seen to do to them. No other device is allowed to.
    #[must_use]
    pub fn with_offloads_of_ovs(mut self) -> Self {
        self.pseudo_sums = self.set.pseudo_sums();
        self
    }

    /// The frames that it expects.
    pub fn set(&self) -> &'a FlowSet {
        self.set
    }

    /// What has arrived since the last [`Self::reset`].
    pub fn arrived(&self) -> Arrived {
        self.arrived
    }

    /// The first corrupt frame.
    pub fn specimen(&self) -> Option<&[u8]> {
        self.specimen.as_ref().map(|(_, frame)| frame.as_slice())
    }

    /// The first corrupt frame's virtio-net header.
    pub fn specimen_header(&self) -> Option<VirtioNetHeader> {
        self.specimen.as_ref().map(|(header, _)| *header)
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

    /// Takes one frame; its number in the set if it is good.
    #[inline(always)]
    pub fn take(&mut self, frame: Received<'_>) -> Option<usize> {
        // Nearly always it is the next one, which need not be read to know what it has to be.
        let index = self.follows;
        if self.is_plain
            && frame.len() == self.bytes
            && prefix(&frame, 0).is_some_and(|prefix| self.is_frame(&self.known[index], &prefix))
        {
            self.accept(index, frame)
        } else {
            self.take_any(frame)
        }
    }

    #[inline(never)]
    fn take_any(&mut self, frame: Received<'_>) -> Option<usize> {
        let Some(prefix) = self.prefix(&frame) else {
            self.arrived.foreign += 1;
            return None;
        };
        let index = usize::try_from(sequence_of(&prefix)).unwrap_or(usize::MAX);
        if let Some(known) = self.known.get(index)
            && self.is_frame(known, &prefix)
            && self.is_carried_right(&frame)
        {
            return self.accept(index, frame);
        }
        if magic_of(&prefix) == MAGIC {
            self.corrupt(frame);
        } else {
            self.arrived.foreign += 1;
        }
        None
    }

    /// Without a branch per word.
    #[inline(always)]
    fn is_frame(&self, known: &Known, (common, own): &Prefix) -> bool {
        let differ =
            |left: &[u64], right: &[u64]| left.iter().zip(right).fold(0, |all, (left, right)| all | (left ^ right));
        differ(&self.common, common) | differ(&known.own, own) == 0
    }

    /// It has arrived, also if its end, which is looked at in one of many, turns out to be wrong.
    #[inline(always)]
    fn accept(&mut self, index: usize, frame: Received<'_>) -> Option<usize> {
        self.in_order(index);
        self.until_sample -= 1;
        if self.until_sample == 0 {
            self.until_sample = self.sample;
            return self.compare(index, frame);
        }
        self.arrived.good += 1;
        Some(index)
    }

    fn prefix(&self, frame: &Received<'_>) -> Option<Prefix> {
        let (common, [mut first, middle, last]) = prefix(frame, self.start)?;
        if let Some([sent, other]) = self.pseudo_sums
            && checksum_of(first) == other
        {
            first = with_checksum(first, sent);
        }
        Some((common, [first, middle, last]))
    }

    /// Length, what the virtio-net header says, and outer headers.
    fn is_carried_right(&self, frame: &Received<'_>) -> bool {
        if let Some(sent) = &self.header {
            let header = frame.header();
            let is_large = header.gso_type & !bits::GSO_ECN == sent.gso_type && header.flags & bits::NEEDS_CSUM != 0;
            let is_as_sent = self.pseudo_sums.is_some() || offloads_of(&header) == offloads_of(sent);
            return is_large && is_as_sent && frame.len() == self.bytes;
        }
        match &self.outer {
            None => frame.len() == self.bytes,
            Some(outer) => {
                frame.len() == self.bytes + OUTER_BYTES
                    && frame
                        .words(0, std::array::from_fn::<_, OUTER_WORDS, _>(|index| 8 * index))
                        .is_some_and(|words| outer.matches(&words))
            }
        }
    }

    #[cold]
    fn compare(&mut self, index: usize, mut frame: Received<'_>) -> Option<usize> {
        let packet = frame.bytes();
        let is_good = match &self.outer {
            // Its checksum is in the prefix.
            None if self.pseudo_sums.is_some() => {
                let expected = &self.set.frames()[index];
                packet[..TCP_CHECKSUM_AT] == expected[..TCP_CHECKSUM_AT]
                    && packet[TCP_CHECKSUM_AT + 2..] == expected[TCP_CHECKSUM_AT + 2..]
            }
            None => packet == self.set.frames()[index],
            Some(_) => packet[OUTER_BYTES..] == self.set.frames()[index],
        };
        if !is_good {
            self.corrupt(frame);
            return None;
        }
        self.arrived.good += 1;
        Some(index)
    }

    #[inline(always)]
    fn in_order(&mut self, index: usize) {
        let Known { flow, place, .. } = self.known[index];
        let after = if place + 1 == self.places { 0 } else { place + 1 };
        if let Some(expected) = self.next[flow as usize].replace(after)
            && expected != place
        {
            let gap = if place > expected { place - expected } else { place + self.places - expected };
            self.arrived.gaps += u64::from(gap);
        }
        self.follows = if index + 1 == self.known.len() { 0 } else { index + 1 };
    }

    #[cold]
    fn corrupt(&mut self, mut frame: Received<'_>) {
        self.arrived.corrupt += 1;
        let header = frame.header();
        self.specimen.get_or_insert_with(|| (header, frame.bytes().to_vec()));
    }

    /// Whether the gaps are explained by `lost` frames: they are at most that many unless frames were reordered (or
    /// repeated). Frames lost at the very end leave no gap, and a whole round lost leaves none either.
    pub fn in_sequence(&self, lost: u64) -> bool {
        self.arrived.gaps <= lost
    }
}

impl Taker for Sink<'_> {
    #[inline(always)]
    fn take(&mut self, frame: Received<'_>) {
        Sink::take(self, frame);
    }
}

/// Of a frame to be segmented: how, and where its checksum goes.
#[inline]
fn offloads_of(header: &VirtioNetHeader) -> [u16; 4] {
    [header.hdr_len, header.gso_size, header.csum_start, header.csum_offset]
}

/// What a frame that begins at `start` begins with.
#[inline(always)]
fn prefix(frame: &Received<'_>, start: usize) -> Option<Prefix> {
    let [a, b, c, d, e, f, last] = frame.words(start, [0, 8, 16, 24, 32, 40, LAST_AT])?;
    Some(([a, b, c, d], [e, f, last]))
}

/// The TCP checksum of a frame to be segmented: the end of the first word of its own.
#[inline]
fn checksum_of(word: u64) -> u16 {
    ((word >> 48) as u16).swap_bytes()
}

/// The word with another one.
#[inline]
fn with_checksum(word: u64, checksum: u16) -> u64 {
    word & (u64::MAX >> 16) | u64::from(checksum.swap_bytes()) << 48
}

/// Bytes 46 to 51, big-endian: the end of the last word, which begins at 44.
#[inline]
fn sequence_of((_, [_, _, last]): &Prefix) -> u64 {
    last.swap_bytes() & 0xffff_ffff_ffff
}

/// Bytes 42 to 45: in the middle of the word that begins at 40.
fn magic_of((_, [_, middle, _]): &Prefix) -> [u8; 4] {
    ((middle >> 16) as u32).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::frame::{Endpoint, FlowSet, SEGMENTED_BYTES};
    use std::net::Ipv4Addr;

    fn endpoint(last: u8) -> Endpoint {
        Endpoint { mac: [2, 0, 0, 0, 0, last], address: Ipv4Addr::new(10, 0, 0, last) }
    }

    fn set(flows: usize) -> FlowSet {
        FlowSet::new(endpoint(1), endpoint(2), 100, flows, 12)
    }

    fn take(sink: &mut Sink<'_>, frames: impl IntoIterator<Item = Vec<u8>>) {
        for mut frame in frames {
            sink.take(Received::private(&mut frame, VirtioNetHeader::default()));
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

    #[test]
    fn in_a_tunnel_outer_headers_and_inner_frame_are_checked() {
        let set = set(1);
        let outer = Outer { from: endpoint(1), to: endpoint(2), vni: 100 };
        let mut sink = Sink::behind(&outer, &set, 1);
        take(&mut sink, [outer.wrap(&set.frames()[0], 0), outer.wrap(&set.frames()[1], 0)]);
        assert_eq!(sink.arrived(), Arrived { good: 2, ..Arrived::default() });
        let other_vni = Outer { vni: 101, ..outer };
        let mut last_byte = outer.wrap(&set.frames()[3], 0);
        *last_byte.last_mut().unwrap() ^= 1;
        take(&mut sink, [other_vni.wrap(&set.frames()[2], 0), last_byte, set.frames()[4].clone(), vec![0; 150]]);
        assert_eq!((sink.arrived().good, sink.arrived().corrupt, sink.arrived().foreign), (2, 2, 2));
    }

    #[test]
    fn a_frame_to_be_segmented_must_still_say_so() {
        let set = FlowSet::new(endpoint(1), endpoint(2), SEGMENTED_BYTES, 1, 4);
        let mut sink = Sink::new(&set, 1);
        sink.take(Received::private(&mut set.frames()[0].clone(), set.header()));
        assert_eq!(sink.arrived(), Arrived { good: 1, ..Arrived::default() });
        sink.take(Received::private(&mut set.frames()[1].clone(), VirtioNetHeader::default()));
        assert_eq!(sink.arrived().corrupt, 1);
    }

    #[test]
    fn a_frame_to_be_segmented_keeps_its_checksum_and_every_field_of_its_header() {
        let set = FlowSet::new(endpoint(1), endpoint(2), SEGMENTED_BYTES, 1, 4);
        let sent = set.header();
        let altered = [
            VirtioNetHeader { hdr_len: sent.hdr_len + 1, ..sent },
            VirtioNetHeader { gso_size: 1460, ..sent },
            VirtioNetHeader { csum_start: sent.csum_start + 1, ..sent },
            VirtioNetHeader { csum_offset: sent.csum_offset + 1, ..sent },
        ];
        for header in altered {
            for (mut sink, corrupt) in [(Sink::new(&set, 1), 1), (Sink::new(&set, 1).with_offloads_of_ovs(), 0)] {
                sink.take(Received::private(&mut set.frames()[0].clone(), header));
                assert_eq!((sink.arrived().good, sink.arrived().corrupt), (1 - corrupt, corrupt), "{header:?}");
            }
        }
        let mut sink = Sink::new(&set, 1000);
        let mut frame = set.frames()[0].clone();
        frame[50..52].copy_from_slice(&0x1409_u16.to_be_bytes());
        sink.take(Received::private(&mut frame, sent));
        assert_eq!((sink.arrived().good, sink.arrived().corrupt), (0, 1), "the sum without the length");
    }

    #[test]
    fn through_ovs_a_frame_to_be_segmented_may_have_the_pseudo_sum_without_length_and_no_other() {
        let set = FlowSet::new(endpoint(1), endpoint(2), SEGMENTED_BYTES, 1, 4);
        let mut sink = Sink::new(&set, 1).with_offloads_of_ovs();
        // RFC 1071 over 10.0.0.1, 10.0.0.2 and protocol 6.
        for (checksum, good, corrupt) in [(0x1409_u16, 1, 0), (0x140a, 1, 1)] {
            let mut frame = set.frames()[0].clone();
            frame[50..52].copy_from_slice(&checksum.to_be_bytes());
            sink.take(Received::private(&mut frame, set.header()));
            assert_eq!((sink.arrived().good, sink.arrived().corrupt), (good, corrupt), "{checksum:#x}");
        }
    }
}
