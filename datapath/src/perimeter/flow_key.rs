//! What names a TCP or UDP flow at a port: the cheap half of parsing.
//!
//! A key exists only for frames that [`dreamwire_policy::parse()`] takes on its straight line too (untagged, whole, without
//! IP options or extension headers, of lengths that agree), and two frames with one key have one source and destination
//! for every stage: stations, addresses, ports. (For TCP, parsing has still to find a sound segment.)

use std::hash::{Hash, Hasher};

/// Which way a frame goes at the port that keeps its key; in `kind`.
const INBOUND: u64 = 1 << 8;
/// Where the sender's identity is in `kind`.
const IDENTITY_SHIFT: u32 = 16;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const IPV4_BYTES: i32 = 20;
const UDP_BYTES: usize = 8;

/// A flow with addresses of `WORDS` words, source and destination together: 1 for IPv4, 4 for IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FlowKey<const WORDS: usize> {
    /// Destination station and the first bytes of the source's.
    stations: u64,
    /// The rest of it, and the ports.
    station_ports: u64,
    addresses: [u64; WORDS],
    /// The protocol, and more.
    kind: u64,
}

impl<const WORDS: usize> Hash for FlowKey<WORDS> {
    #[inline]
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.stations);
        state.write_u64(self.station_ports);
        self.addresses.iter().for_each(|&word| state.write_u64(word));
        state.write_u64(self.kind);
    }
}

impl<const WORDS: usize> FlowKey<WORDS> {
    /// Words beside the addresses.
    pub(crate) const FIXED_WORDS: usize = 3;

    /// The key of no flow: none has protocol 0.
    pub(crate) const NONE: Self = Self { stations: 0, station_ports: 0, addresses: [0; WORDS], kind: 0 };

    /// Whether these words are the key, as [`FlowKey::write`] has written it.
    #[inline]
    pub(crate) fn is(&self, words: &[u64]) -> bool {
        let [stations, station_ports, kind] = [0, 1, 2].map(|at| words[at]);
        let differs = (stations ^ self.stations) | (station_ports ^ self.station_ports) | (kind ^ self.kind);
        let addresses = words[3..3 + WORDS].iter().zip(&self.addresses);
        addresses.fold(differs, |differs, (word, address)| differs | (word ^ address)) == 0
    }

    /// Writes it into as many words.
    pub(crate) fn write(&self, words: &mut [u64]) {
        words[..3].copy_from_slice(&[self.stations, self.station_ports, self.kind]);
        words[3..3 + WORDS].copy_from_slice(&self.addresses);
    }

    #[inline]
    pub(crate) fn is_tcp(&self) -> bool {
        self.kind as u8 == PROTOCOL_TCP
    }

    /// The key of a frame that comes to the port, from a sender of this identity.
    #[inline]
    pub(crate) fn inbound(mut self, identity: Option<u16>) -> Self {
        self.kind |= INBOUND | u64::from(identity.unwrap_or(0)) << IDENTITY_SHIFT;
        self
    }

    #[inline]
    fn new(header: &[u8], addresses: [u64; WORDS], ports: u32, protocol: u8) -> Option<Self> {
        Some(Self {
            stations: word(header, 0)?,
            station_ports: u64::from(half(header, 8)?) | u64::from(ports) << 32,
            addresses,
            kind: u64::from(protocol),
        })
    }
}

impl FlowKey<1> {
    /// The key of an IPv4 frame with this header copy. `frame_bytes` is its whole length.
    #[inline]
    pub(crate) fn ipv4(header: &[u8], frame_bytes: u32) -> Option<Self> {
        const HEADERS: usize = 14 + 20;
        let header: &[u8; HEADERS + UDP_BYTES] = header.first_chunk()?;
        // EtherType, version and header length; flags and fragment offset.
        let is_plain = half(header, 12)?.to_be() >> 8 == 0x08_0045 && quarter(header, 20)? & 0x3fff == 0;
        let total = i32::from(quarter(header, 16)?);
        let protocol = header[23];
        let fits = total + 14 <= frame_bytes as i32;
        if !is_plain || !fits || !has_room(protocol, total - IPV4_BYTES, &header[HEADERS..]) {
            return None;
        }
        Self::new(header, [word(header, 26)?], half(header, HEADERS)?, protocol)
    }
}

impl FlowKey<4> {
    /// The key of an IPv6 frame with this header copy. `frame_bytes` is its whole length.
    #[inline]
    pub(crate) fn ipv6(header: &[u8], frame_bytes: u32) -> Option<Self> {
        const HEADERS: usize = 14 + 40;
        let header: &[u8; HEADERS + UDP_BYTES] = header.first_chunk()?;
        let payload_bytes = i32::from(quarter(header, 18)?);
        let is_ipv6 = header[12..14] == [0x86, 0xdd] && header[14] >> 4 == 6;
        if !is_ipv6
            || payload_bytes + HEADERS as i32 > frame_bytes as i32
            || !has_room(header[20], payload_bytes, &header[HEADERS..])
        {
            return None;
        }
        let addresses = [word(header, 22)?, word(header, 30)?, word(header, 38)?, word(header, 46)?];
        Self::new(header, addresses, half(header, HEADERS)?, header[20])
    }
}

/// Whether it is UDP of a length that fits, or TCP.
#[inline]
fn has_room(protocol: u8, payload_bytes: i32, transport: &[u8]) -> bool {
    let udp_bytes = i32::from(u16::from_be_bytes([transport[4], transport[5]]));
    match protocol {
        PROTOCOL_UDP => (UDP_BYTES as i32..=payload_bytes).contains(&udp_bytes),
        PROTOCOL_TCP => payload_bytes >= 0,
        _ => false,
    }
}

#[inline]
fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A number.
#[inline]
fn quarter(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[inline]
fn half(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
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
                let ports = [packet.key.source_port.to_be_bytes(), packet.key.destination_port.to_be_bytes()].concat();
                assert_eq!((key.station_ports >> 32) as u32, u32::from_ne_bytes(ports.try_into().unwrap()));
                let addresses: Vec<u8> = key.addresses.iter().flat_map(|word| word.to_ne_bytes()).collect();
                let of = |number: u128| number.to_be_bytes()[16 - WORDS * 4..].to_vec();
                assert_eq!(addresses, [of(packet.key.source), of(packet.key.destination)].concat());
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
