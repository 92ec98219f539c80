//! The Internet checksum (RFC 1071), by pieces.

/// A running one's complement sum. Pieces may be added in any order, each at an even offset of the whole.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sum(u64);

impl Sum {
    /// Adds bytes; an odd last one counts as if a zero followed (RFC 1071 §4.1).
    #[inline]
    #[must_use]
    pub(crate) fn bytes(self, bytes: &[u8]) -> Self {
        // One's complement addition does not care for word size or byte order (RFC 1071 §2): 32-bit lanes into 64-bit
        // accumulators, eight side by side, which the compiler makes vector instructions of. A lane overflows after
        // 2^32 additions, far beyond any frame.
        let mut lanes = [0u64; 8];
        let mut blocks = bytes.chunks_exact(32);
        for block in &mut blocks {
            for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
        let mut sum = self.0 + lanes.iter().sum::<u64>();
        let (words, rest) = blocks.remainder().as_chunks::<4>();
        for word in words {
            sum += u64::from(u32::from_ne_bytes(*word));
        }
        let (halves, rest) = rest.as_chunks::<2>();
        for half in halves {
            sum += u64::from(u16::from_ne_bytes(*half));
        }
        if let [last] = rest {
            sum += u64::from(u16::from_ne_bytes([*last, 0]));
        }
        // Folded so far that many more pieces fit.
        Self((sum & 0xffff_ffff) + (sum >> 32))
    }

    /// Adds a 16-bit number.
    #[inline]
    #[must_use]
    pub(crate) fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word.to_be()))
    }

    /// Adds what TCP and UDP sum beside their own bytes: addresses (both, as they stand in the IP header), protocol and
    /// length of header and payload (RFC 9293 §3.1, RFC 8200 §8.1).
    #[inline]
    #[must_use]
    pub(crate) fn pseudo_header(self, addresses: &[u8], protocol: u8, bytes: u32) -> Self {
        self.bytes(addresses).word(u16::from(protocol)).word((bytes >> 16) as u16).word(bytes as u16)
    }

    /// The sum, folded to 16 bits, in the order in which it stands in a packet. Not complemented.
    #[inline]
    pub(crate) fn folded(self) -> [u8; 2] {
        let mut sum = self.0;
        // From 64 bits to 33, 18, 17 and 16.
        sum = (sum & 0xffff_ffff) + (sum >> 32);
        for _ in 0..3 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum: the complement of the sum.
    #[inline]
    pub(crate) fn checksum(self) -> [u8; 2] {
        self.folded().map(|byte| !byte)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::checksum as oracle;

    use super::*;

    #[test]
    fn the_example_of_rfc_1071() {
        let sum = Sum::default().bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.folded(), [0xdd, 0xf2]);
        assert_eq!(sum.checksum(), [0x22, 0x0d]);
    }

    proptest! {
        #[test]
        fn equals_smoltcp_in_one_piece_and_in_two(
            bytes in proptest::collection::vec(any::<u8>(), 0..5000), at in 0..5000usize, word: u16,
        ) {
            let at = at.min(bytes.len()) & !1;
            let expected = oracle::combine(&[oracle::data(&bytes), word]);
            let whole = Sum::default().bytes(&bytes).word(word);
            let parts = Sum::default().word(word).bytes(&bytes[at..]).bytes(&bytes[..at]);
            // 0 and 0xffff are the same number in one's complement.
            let normal = |sum: Sum| u16::from_be_bytes(sum.folded()) % 0xffff;
            prop_assert_eq!(normal(whole), expected % 0xffff);
            prop_assert_eq!(normal(parts), expected % 0xffff);
        }
    }
}
