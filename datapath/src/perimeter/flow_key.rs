//! What names a TCP or UDP flow at a port: the cheap half of parsing.
//!
//! A key exists only for frames that [`dreamwire_policy::parse()`] takes on its straight line too (untagged, whole, without
//! IP options or extension headers, of lengths that agree), and two frames with one key have one source and destination
//! for every stage: stations, addresses, ports. (For TCP, parsing has still to find a sound segment.)

use std::hash::{Hash, Hasher};

/// Which way a frame goes at the port that keeps its key, and who sent it; where [`MASKS4`] and [`MASKS6`] have left the second word empty.
const INBOUND: u64 = 1 << 32;
const IDENTITY_SHIFT: u32 = 48;
/// Where the protocol is in the third word.
const PROTOCOL_SHIFT: u32 = 8;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const IPV4_BYTES: i32 = 20;
const UDP_BYTES: usize = 8;

/// Words of a key of IPv4, and of IPv6.
pub(crate) const WORDS4: usize = 4;
pub(crate) const WORDS6: usize = 7;

/// A flow: the bytes of its frames' headers that say which one it is, in the order in which they lie there; all others are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FlowKey<const WORDS: usize>([u64; WORDS]);

/// Where its words are in the header: both stations; what is before the source's address, with the protocol; addresses and ports.
const PLACES4: [usize; WORDS4] = [0, 8, 22, 30];
const PLACES6: [usize; WORDS6] = [0, 8, 19, 27, 35, 43, 50];

/// What counts of each word: of the second the end of the source's station, of the third the protocol and what is behind
/// the byte (of IPv6), or the three bytes (of IPv4), after it.
const MASKS4: [u64; WORDS4] = [u64::MAX, 0xffff_ffff, 0xffff_ffff_0000_ff00, u64::MAX];
const MASKS6: [u64; WORDS6] = [u64::MAX, 0xffff_ffff, 0xffff_ffff_ff00_ff00, u64::MAX, u64::MAX, u64::MAX, u64::MAX];

/// Of two keys that differ in their first word alone (the destination's station and two bytes of the sender's) the hash is the same,
/// and of others that the exclusive or makes the same: who makes many such has his own flows share a place.
impl<const WORDS: usize> Hash for FlowKey<WORDS> {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        let [_, stations, protocol, addresses @ ..] = self.0.as_slice() else { return };
        state.write_u64(stations ^ protocol);
        addresses.iter().for_each(|&word| state.write_u64(word));
    }
}

impl<const WORDS: usize> FlowKey<WORDS> {
    #[inline]
    fn read(header: &[u8], places: &[usize; WORDS], masks: &[u64; WORDS]) -> Self {
        Self(std::array::from_fn(|index| word(header, places[index]) & masks[index]))
    }

    #[inline]
    pub(crate) fn words(&self) -> &[u64; WORDS] {
        &self.0
    }

    /// Whether these words are the key's.
    #[inline]
    pub(crate) fn is(&self, words: &[u64; WORDS]) -> bool {
        words.iter().zip(&self.0).fold(0, |differs, (word, own)| differs | (word ^ own)) == 0
    }

    #[inline]
    pub(crate) fn is_tcp(&self) -> bool {
        (self.0[2] >> PROTOCOL_SHIFT) as u8 == PROTOCOL_TCP
    }

    /// The key of a frame that comes to the port, from a sender of this identity.
    #[inline]
    pub(crate) fn inbound(mut self, identity: Option<u16>) -> Self {
        self.0[1] |= INBOUND | u64::from(identity.unwrap_or(0)) << IDENTITY_SHIFT;
        self
    }
}

/// Ethernet, IPv4 and what says of the transport which flow it is.
pub(super) const IPV4_HEADERS: usize = HEADERS4 + UDP_BYTES;
const HEADERS4: usize = ETHERNET_BYTES + 20;
const ETHERNET_BYTES: usize = 14;
const IPV6_HEADERS: usize = 14 + 40 + UDP_BYTES;

/// The four bytes from the EtherType on, without type of service: IPv4, and a header without options.
const PLAIN: u32 = 0x0045_0008;
/// Of the four bytes from an IPv4 header's flags on: "more fragments", and the fragment's offset.
const FRAGMENT: u32 = 0xff3f;
/// Of the same: the protocol.
const PROTOCOL: u32 = 0xff00_0000;
const UDP: u32 = (PROTOCOL_UDP as u32) << 24;
const TCP: u32 = (PROTOCOL_TCP as u32) << 24;

impl FlowKey<WORDS4> {
    /// The key of an IPv4 frame with this header copy. `frame_bytes` is its whole length.
    #[inline]
    pub(crate) fn ipv4(header: &[u8], frame_bytes: u32) -> Option<Self> {
        let header = header.first_chunk()?;
        has_key4(header, frame_bytes).then(|| Self::of(header))
    }

    /// The key of a frame that has one ([`has_key4`]).
    #[inline]
    pub(super) fn of(header: &[u8; IPV4_HEADERS]) -> Self {
        Self::read(header, &PLACES4, &MASKS4)
    }
}

impl FlowKey<WORDS6> {
    /// The key of an IPv6 frame with this header copy. `frame_bytes` is its whole length.
    #[inline]
    pub(crate) fn ipv6(header: &[u8], frame_bytes: u32) -> Option<Self> {
        let header: &[u8; IPV6_HEADERS] = header.first_chunk()?;
        let payload_bytes = i32::from(quarter(header, 18));
        let is_ipv6 = header[12..14] == [0x86, 0xdd] && header[14] >> 4 == 6;
        let fits = payload_bytes + 54 <= frame_bytes as i32;
        (is_ipv6 && fits && has_room(header[20], payload_bytes, quarter(header, 58)))
            .then(|| Self::read(header, &PLACES6, &MASKS6))
    }
}

/// Whether an IPv4 frame has a key. `frame_bytes` is its whole length. Of `header`, what is behind that may be anything.
#[inline]
pub(super) fn has_key4(header: &[u8; IPV4_HEADERS], frame_bytes: u32) -> bool {
    let is_plain = half(header, 12) & 0xff_ffff == PLAIN;
    let kind = half(header, 20) & (FRAGMENT | PROTOCOL);
    let payload_bytes = i32::from(quarter(header, 16)) - IPV4_BYTES;
    // Behind a UDP header that fits there are all bytes that a key is read from; a TCP header may be cut off.
    let fits = payload_bytes + HEADERS4 as i32 <= frame_bytes as i32;
    if !is_plain || !fits {
        return false;
    }
    if kind == UDP {
        return (UDP_BYTES as i32..=payload_bytes).contains(&quarter(header, 38).into());
    }
    kind == TCP && payload_bytes >= 0 && frame_bytes as usize >= IPV4_HEADERS
}

/// What all UDP frames of one length have in common that are IPv4 and have no padding: most frames. Told with half of the
/// instructions of [`has_key4`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Unpadded4 {
    frame_bytes: u32,
    /// Of the eight bytes from the EtherType on: EtherType, version and header length, total length.
    plain: u64,
    /// The length in the UDP header, as it lies there.
    udp_bytes: [u8; 2],
}

impl Unpadded4 {
    /// What of these eight bytes counts.
    const COUNTS: u64 = 0xffff_00ff_ffff;

    /// Of frames of this length, whole; there may be none.
    #[inline]
    pub(super) fn new(frame_bytes: u32) -> Self {
        let ipv4_bytes = frame_bytes.checked_sub(ETHERNET_BYTES as u32).and_then(|bytes| u16::try_from(bytes).ok());
        let lengths =
            ipv4_bytes.zip(frame_bytes.checked_sub(HEADERS4 as u32).filter(|&bytes| bytes >= UDP_BYTES as u32));
        let (plain, udp_bytes) = lengths.map_or((u64::MAX, 0), |(ipv4_bytes, udp_bytes)| {
            (u64::from(ipv4_bytes.to_be()) << 32 | u64::from(PLAIN), udp_bytes as u16)
        });
        Self { frame_bytes, plain, udp_bytes: udp_bytes.to_be_bytes() }
    }

    #[inline]
    pub(super) fn frame_bytes(self) -> u32 {
        self.frame_bytes
    }

    /// Whether a frame of this length has a key if that says UDP.
    #[inline]
    pub(super) fn has(self, header: &[u8; IPV4_HEADERS]) -> bool {
        word(header, 12) & Self::COUNTS == self.plain
            && half(header, 20) & FRAGMENT == 0
            && chunk(header, 38) == self.udp_bytes
    }
}

/// Whether the keys of two IPv4 frames that have one are the same. What differs most is compared first.
#[inline]
pub(super) fn same_key4(one: &[u8; IPV4_HEADERS], other: &[u8; IPV4_HEADERS]) -> bool {
    let same = |index: usize| (word(one, PLACES4[index]) ^ word(other, PLACES4[index])) & MASKS4[index] == 0;
    same(3) && same(2) && same(0) && same(1)
}

/// Whether it is UDP of a length that fits, or TCP.
#[inline]
fn has_room(protocol: u8, payload_bytes: i32, udp_bytes: u16) -> bool {
    match protocol {
        PROTOCOL_UDP => (UDP_BYTES as i32..=payload_bytes).contains(&udp_bytes.into()),
        PROTOCOL_TCP => payload_bytes >= 0,
        _ => false,
    }
}

#[inline]
fn chunk<const BYTES: usize>(header: &[u8], at: usize) -> [u8; BYTES] {
    *header[at..].first_chunk().expect("it lies in the header")
}

#[inline]
fn word(header: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(chunk(header, at))
}

#[inline]
fn half(header: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(chunk(header, at))
}

/// A number.
#[inline]
fn quarter(header: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(chunk(header, at))
}

#[cfg(test)]
mod tests {
    use dreamwire_policy::{Family, Fragment, Packet, Parsed, Transport, parse};
    use proptest::prelude::*;

    use super::*;

    /// A frame that is nearly right: each field is what it should be, or not.
    fn nearly(v6: bool) -> impl Strategy<Value = Vec<u8>> {
        let bytes = proptest::collection::vec(any::<u8>(), 120);
        let odd = proptest::collection::vec((14..64usize, any::<u8>()), 0..3);
        (bytes, odd, prop_oneof![Just(6u8), Just(17), any::<u8>()], 40..120usize).prop_map(
            move |(mut frame, odd, protocol, length)| {
                let (ethertype, at) = if v6 { ([0x86, 0xdd], 54) } else { ([8, 0], 34) };
                frame[12..14].copy_from_slice(&ethertype);
                let payload = (length as u16).saturating_sub(at as u16);
                if v6 {
                    frame[14] = 0x60;
                    frame[18..20].copy_from_slice(&payload.to_be_bytes());
                    frame[20] = protocol;
                } else {
                    frame[14] = 0x45;
                    frame[16..18].copy_from_slice(&(payload + 20).to_be_bytes());
                    frame[20..22].fill(0);
                    frame[23] = protocol;
                }
                if protocol == 17 {
                    frame[at + 4..at + 6].copy_from_slice(&payload.to_be_bytes());
                } else {
                    frame[at + 12] = 0x50;
                }
                odd.iter().for_each(|&(at, value)| frame[at] = value);
                frame.truncate(length);
                frame
            },
        )
    }

    fn check<const WORDS: usize>(frame: &[u8], key: Option<FlowKey<WORDS>>, family: Family) {
        let parsed = parse(frame, frame.len());
        let Some(key) = key else {
            let header_bytes = if family == Family::V4 { usize::from(frame[14] & 15) * 4 } else { 40 };
            let has_one = matches!(&parsed, Parsed::Ip(Packet { key, fragment: Fragment::Whole, .. })
                if key.family == family && matches!(key.protocol, PROTOCOL_TCP | PROTOCOL_UDP));
            // Behind options or extension headers there is none.
            let is_plain = header_bytes == if family == Family::V4 { 20 } else { 40 }
                && (family == Family::V4 || matches!(frame[20], PROTOCOL_TCP | PROTOCOL_UDP));
            assert!(!has_one || !is_plain, "a key is missing: {parsed:?}");
            return;
        };
        match parsed {
            Parsed::Ip(packet) => {
                assert_eq!((packet.fragment, packet.key.family), (Fragment::Whole, family));
                assert_eq!(matches!(packet.transport, Transport::Tcp(_)), key.is_tcp());
                let bytes: Vec<u8> = key.0.iter().flat_map(|word| word.to_le_bytes()).collect();
                let addresses = if family == Family::V4 {
                    bytes[20..28].to_vec()
                } else {
                    [&bytes[19..48], &bytes[49..52]].concat()
                };
                let of = |number: u128| number.to_be_bytes()[16 - usize::from(family.bits()) / 8..].to_vec();
                assert_eq!(addresses, [of(packet.key.source), of(packet.key.destination)].concat());
                let ports = [packet.key.source_port, packet.key.destination_port].map(u16::to_be_bytes).concat();
                assert_eq!(bytes[bytes.len() - 4..], ports);
                assert_eq!(bytes[..12], frame[..12]);
            }
            other => assert!(key.is_tcp(), "only a segment may be unsound: {other:?}"),
        }
    }

    proptest! {
        #[test]
        fn a_key_is_what_parsing_finds(frame in nearly(false), six in nearly(true)) {
            check(&frame, FlowKey::ipv4(&frame, frame.len() as u32), Family::V4);
            check(&six, FlowKey::ipv6(&six, six.len() as u32), Family::V6);
            prop_assert!(FlowKey::ipv6(&frame, frame.len() as u32).is_none());
        }

        #[test]
        fn unpadded_frames_are_told_in_short(mut frame in nearly(false), padding in 0..3u32, less in 0..3u8) {
            frame[39] = frame[39].wrapping_sub(less);
            let bytes = frame.len() as u32 + padding;
            let Some(header) = frame.first_chunk() else { return Ok(()) };
            let is_udp = header[23] == PROTOCOL_UDP;
            let has_key = has_key4(header, bytes);
            let ends = [quarter(header, 16) as u32 + 14, quarter(header, 38) as u32 + 34];
            let is_unpadded = ends == [bytes; 2];
            prop_assert_eq!(Unpadded4::new(bytes).has(header) && is_udp, has_key && is_udp && is_unpadded);
        }

        #[test]
        fn what_lies_behind_a_short_frame_counts_for_nothing(
            frame in nearly(false), length in 14..60usize, total in 20..46u8, behind in any::<[u8; 60]>(),
        ) {
            // A private copy in which a longer frame was before.
            let mut copy = behind;
            let length = length.min(frame.len());
            copy[..length].copy_from_slice(&frame[..length]);
            if length > 17 {
                copy[16..18].copy_from_slice(&[0, total]);
            }
            let key = FlowKey::ipv4(&copy[..length], length as u32);
            let header = copy.first_chunk().unwrap();
            prop_assert_eq!(has_key4(header, length as u32).then(|| FlowKey::of(header)), key);
        }
    }

    #[test]
    fn of_some_lengths_there_is_no_unpadded_datagram() {
        for frame_bytes in [0, 13, 33, 41, 65535 + 15, u32::MAX] {
            let Unpadded4 { plain, .. } = Unpadded4::new(frame_bytes);
            assert_ne!(plain & Unpadded4::COUNTS, plain, "no header's");
        }
        assert_eq!(Unpadded4::new(65535 + 14).udp_bytes, 65515u16.to_be_bytes());
    }

    #[test]
    fn identities_and_directions_are_told_apart() {
        let mut frame = [0; 60];
        frame[12..24].copy_from_slice(&[8, 0, 0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17]);
        frame[39] = 26;
        let key = FlowKey::ipv4(&frame, 60).unwrap();
        assert_ne!(key, key.inbound(None));
        assert_ne!(key.inbound(None), key.inbound(Some(7)));
        assert_eq!(FlowKey::ipv4(&frame, 59), None, "longer than its frame");
    }
}
