//! The outer headers of VXLAN (RFC 7348): written around frames that the harness sends as the physical NIC, and checked on
//! packets that a device sends there. IPv4 only, without VLAN tag.

use super::frame::{Endpoint, sum};

/// Outer Ethernet, IPv4, UDP and VXLAN headers.
pub const OUTER_BYTES: usize = 14 + 20 + 8 + 8;
/// Words that hold them.
pub(super) const OUTER_WORDS: usize = OUTER_BYTES.div_ceil(8);
/// UDP port of VXLAN (RFC 7348 §5).
const PORT: u16 = 4789;
/// Source ports (RFC 7348 §5: the dynamic range), by the inner flow.
const SOURCE_PORT: u16 = 49152;
const SOURCE_PORTS: usize = 16384;

/// One direction of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outer {
    /// Who sends the outer packets.
    pub from: Endpoint,
    /// Who receives them.
    pub to: Endpoint,
    /// VXLAN network identifier.
    pub vni: u32,
}

impl Outer {
    /// The other direction.
    pub fn reversed(self) -> Self {
        Self { from: self.to, to: self.from, ..self }
    }

    /// `inner` in an outer packet, without UDP checksum (RFC 7348 §5: it SHOULD be zero); `flow` chooses the source port.
    pub fn wrap(&self, inner: &[u8], flow: usize) -> Vec<u8> {
        let mut packet = Vec::with_capacity(OUTER_BYTES + inner.len());
        packet.extend(self.headers(inner.len(), SOURCE_PORT + (flow % SOURCE_PORTS) as u16));
        packet.extend(inner);
        packet
    }

    fn headers(&self, inner_bytes: usize, source_port: u16) -> [u8; OUTER_BYTES] {
        let bytes = |count: usize| ((count + inner_bytes) as u16).to_be_bytes();
        let mut headers = [0; OUTER_BYTES];
        headers[..6].copy_from_slice(&self.to.mac);
        headers[6..12].copy_from_slice(&self.from.mac);
        headers[12..14].copy_from_slice(&[0x08, 0x00]);
        headers[14] = 0x45;
        headers[16..18].copy_from_slice(&bytes(20 + 8 + 8));
        headers[20] = 0x40;
        headers[22..24].copy_from_slice(&[64, 17]);
        headers[26..30].copy_from_slice(&self.from.address.octets());
        headers[30..34].copy_from_slice(&self.to.address.octets());
        let checksum = !sum(0, &headers[14..34]);
        headers[24..26].copy_from_slice(&checksum.to_be_bytes());
        headers[34..36].copy_from_slice(&source_port.to_be_bytes());
        headers[36..38].copy_from_slice(&PORT.to_be_bytes());
        headers[38..40].copy_from_slice(&bytes(8 + 8));
        headers[42] = 0x08;
        headers[46..50].copy_from_slice(&(self.vni << 8).to_be_bytes());
        headers
    }
}

/// What the outer headers around inner frames of one length have to be.
#[derive(Clone, Debug)]
pub(super) struct OuterCheck {
    expected: [u64; OUTER_WORDS],
    mask: [u64; OUTER_WORDS],
}

impl OuterCheck {
    /// Around frames of `inner_bytes`.
    pub(super) fn new(outer: &Outer, inner_bytes: usize) -> Self {
        let mut mask = [0xff; 8 * OUTER_WORDS];
        // The sender's choice: identification, DF, TTL, header checksum (see `matches`), source port. The UDP checksum is none
        // (RFC 7348 §5: it SHOULD be zero): a device that makes it does more work than the others.
        mask[18..20].fill(0);
        mask[20] = !0x40;
        mask[22] = 0;
        mask[24..26].fill(0);
        mask[34..36].fill(0);
        mask[OUTER_BYTES..].fill(0);
        let mut expected = [0; 8 * OUTER_WORDS];
        expected[..OUTER_BYTES].copy_from_slice(&outer.headers(inner_bytes, 0));
        let (mask, expected) = (words(&mask), words(&expected));
        Self { expected: std::array::from_fn(|index| expected[index] & mask[index]), mask }
    }

    /// Whether the outer headers are right, the IPv4 header's checksum included.
    #[inline]
    pub(super) fn matches(&self, words: &[u64; OUTER_WORDS]) -> bool {
        let mut difference = 0;
        for (index, word) in words.iter().enumerate() {
            difference |= (word & self.mask[index]) ^ self.expected[index];
        }
        // RFC 1071 §2: the sum does not care for byte order. Bytes 14 to 33 of the packet, in 32-bit pieces.
        let halves = |word: u64| (word & 0xffff_ffff) + (word >> 32);
        let mut sum = (words[1] >> 48) + halves(words[2]) + halves(words[3]) + (words[4] & 0xffff);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        sum = (sum & 0xffff) + (sum >> 16);
        difference == 0 && sum == 0xffff
    }
}

fn words(bytes: &[u8; 8 * OUTER_WORDS]) -> [u64; OUTER_WORDS] {
    let (words, _) = bytes.as_chunks::<8>();
    std::array::from_fn(|index| u64::from_le_bytes(words[index]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::frame::udp_checksum;
    use std::net::Ipv4Addr;

    const OUTER: Outer = Outer {
        from: Endpoint { mac: [2, 0, 0, 0, 0, 1], address: Ipv4Addr::new(192, 0, 2, 1) },
        to: Endpoint { mac: [2, 0, 0, 0, 0, 2], address: Ipv4Addr::new(192, 0, 2, 2) },
        vni: 0x012345,
    };

    fn matches(packet: &[u8]) -> bool {
        let (chunks, _) = packet.as_chunks::<8>();
        let words = std::array::from_fn(|index| u64::from_le_bytes(chunks[index]));
        OuterCheck::new(&OUTER, 60).matches(&words)
    }

    #[test]
    fn headers_are_those_of_the_rfc() {
        #[rustfmt::skip]
        let expected = [
            2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x08, 0x00,
            0x45, 0, 0, 96, 0, 0, 0x40, 0, 64, 17, 0xb6, 0x89, 192, 0, 2, 1, 192, 0, 2, 2,
            0xc0, 3, 0x12, 0xb5, 0, 76, 0, 0,
            8, 0, 0, 0, 0x01, 0x23, 0x45, 0,
        ];
        assert_eq!(OUTER.wrap(&[7; 60], 3)[..OUTER_BYTES], expected);
    }

    #[test]
    fn every_header_byte_but_the_senders_choice_is_checked() {
        let packet = OUTER.wrap(&[7; 60], 0);
        assert!(matches(&packet));
        for at in 0..OUTER_BYTES {
            let mut altered = packet.clone();
            altered[at] ^= 1;
            // A bit more or less anywhere in the IPv4 header breaks its checksum.
            let is_free = (34..36).contains(&at);
            assert_eq!(matches(&altered), is_free, "byte {at}");
        }
        let mut other = packet.clone();
        other[18..26].copy_from_slice(&[0x12, 0x34, 0, 0, 63, 17, 0, 0]);
        let checksum = !sum(0, &other[14..34]);
        other[24..26].copy_from_slice(&checksum.to_be_bytes());
        assert!(matches(&other), "identification, no DF and TTL are the sender's choice");
    }

    #[test]
    fn a_udp_checksum_is_not_taken_even_if_it_is_right() {
        let mut packet = OUTER.wrap(&[7; 60], 0);
        let checksum = udp_checksum(&packet);
        packet[40..42].copy_from_slice(&checksum.to_be_bytes());
        assert!(!matches(&packet));
    }
}
