//! Raw Ethernet frames as tests see them, and the filter that picks them out of what else is on the wire.

use serde::{Deserialize, Serialize};

use super::hex;

/// A frame as it was on the wire: VLAN tag in place, without preamble and frame check sequence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frame {
    /// From the destination address on.
    #[serde(with = "hex")]
    pub bytes: Vec<u8>,
    /// The transport checksum was left to the receiver's side (virtio `NEEDS_CSUM`): the bytes hold the pseudo header's sum.
    pub checksum_pending: bool,
}

/// Bytes that a frame must hold at an offset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldMatch {
    /// From the first byte of the destination address.
    pub offset: usize,
    /// What must be there.
    #[serde(with = "hex")]
    pub bytes: Vec<u8>,
}

/// All fields must match; a filter without fields takes every frame.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameFilter {
    /// Fields that must match.
    pub fields: Vec<FieldMatch>,
}

impl FrameFilter {
    /// Every frame.
    #[must_use]
    pub fn any() -> Self {
        Self::default()
    }

    /// Additionally these bytes at that offset.
    #[must_use]
    pub fn bytes_at(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.fields.push(FieldMatch { offset, bytes: bytes.to_vec() });
        self
    }

    /// Additionally this destination address.
    #[must_use]
    pub fn destination(self, mac: [u8; 6]) -> Self {
        self.bytes_at(0, &mac)
    }

    /// Additionally this source address.
    #[must_use]
    pub fn source(self, mac: [u8; 6]) -> Self {
        self.bytes_at(6, &mac)
    }

    /// Additionally this type behind the addresses (of a tagged frame: the tag's, 0x8100).
    #[must_use]
    pub fn ether_type(self, ether_type: u16) -> Self {
        self.bytes_at(12, &ether_type.to_be_bytes())
    }

    /// Whether every field is there.
    #[must_use]
    pub fn matches(&self, frame: &[u8]) -> bool {
        self.fields.iter().all(|field| frame.get(field.offset..).is_some_and(|rest| rest.starts_with(&field.bytes)))
    }
}

/// Frames made from a header: one of each length, `repeat` times over, the filler telling position and order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FramePattern {
    /// First bytes of each frame; a length below it cuts it.
    #[serde(with = "hex")]
    pub header: Vec<u8>,
    /// Bytes per frame, header included.
    pub lengths: Vec<usize>,
    /// How many times the list is gone through.
    pub repeat: usize,
    /// Pause between two frames, in microseconds.
    pub gap_us: u64,
}

impl FramePattern {
    /// One frame of each length, back to back.
    #[must_use]
    pub fn new(header: &[u8], lengths: &[usize]) -> Self {
        Self { header: header.to_vec(), lengths: lengths.to_vec(), repeat: 1, gap_us: 0 }
    }

    /// How many frames.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lengths.len() * self.repeat
    }

    /// The frame at `sequence`: filler byte `i` is `sequence + i`, modulo 256.
    ///
    /// # Panics
    /// When there are no lengths.
    #[must_use]
    pub fn frame(&self, sequence: usize) -> Vec<u8> {
        let length = self.lengths[sequence % self.lengths.len()];
        let mut bytes: Vec<u8> = self.header.iter().copied().take(length).collect();
        bytes.extend((bytes.len()..length).map(|index| ((sequence + index) & 0xff) as u8));
        bytes
    }

    /// All of them, in the order they are sent.
    pub fn frames(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        (0..self.count()).map(|sequence| self.frame(sequence))
    }
}

/// Length and FNV-1a hash (64 bits) of a frame: enough to compare long lists of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FrameDigest {
    /// Length in bytes.
    pub bytes: usize,
    /// FNV-1a, 64 bits.
    pub fnv1a: u64,
}

impl FrameDigest {
    /// Of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        // Offset basis and prime from draft-eastlake-fnv, section 5.
        let fnv1a = bytes
            .iter()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
        Self { bytes: bytes.len(), fnv1a }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_needs_every_field() {
        let mut frame = vec![0xff; 6];
        frame.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5, 7]);
        let filter = FrameFilter::any().source([2, 0, 0, 0, 0, 1]).ether_type(0x88b5);
        assert!(filter.matches(&frame));
        assert!(!filter.clone().bytes_at(14, &[8]).matches(&frame));
        assert!(!filter.bytes_at(15, &[7]).matches(&frame), "behind the end");
    }

    #[test]
    fn a_pattern_goes_through_its_lengths() {
        let mut pattern = FramePattern::new(&[1, 2, 3], &[5, 2]);
        pattern.repeat = 2;
        let frames: Vec<_> = pattern.frames().collect();
        assert_eq!(frames, [vec![1, 2, 3, 3, 4], vec![1, 2], vec![1, 2, 3, 5, 6], vec![1, 2]]);
    }

    #[test]
    fn digest_is_fnv1a() {
        // Test vector from draft-eastlake-fnv, appendix C: "foobar".
        assert_eq!(FrameDigest::of(b"foobar").fnv1a, 0x8594_4171_f739_67e8);
    }
}
