//! What the stages need to know of a frame's headers, from the private copy alone.

use std::hash::{BuildHasher, Hasher};

use crate::mac::Mac;

/// Ethernet II header: destination, source, EtherType.
pub(crate) const ETHERNET_BYTES: usize = 14;

/// IEEE 802.1Q tag.
const VLAN_TAG_BYTES: usize = 4;

/// Tags that are looked behind: QinQ (IEEE 802.1ad) has two.
const VLAN_TAGS_MAX: usize = 2;

pub(crate) const ETHERTYPE_VLAN: u16 = 0x8100;
pub(crate) const ETHERTYPE_QINQ: u16 = 0x88a8;
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Destination address. The copy holds a whole Ethernet header.
#[inline]
pub(crate) fn destination(header: &[u8]) -> Mac {
    Mac(*header.first_chunk().expect("frames shorter than an Ethernet header were dropped"))
}

/// Source address. The copy holds a whole Ethernet header.
#[inline]
pub(crate) fn source(header: &[u8]) -> Mac {
    Mac(*header[6..].first_chunk().expect("frames shorter than an Ethernet header were dropped"))
}

/// Hash of the flow that a frame belongs to: addresses and, of unfragmented TCP, UDP and SCTP, ports; of anything
/// that is not IP, the MAC addresses. Frames of one flow and direction have one hash, so whatever is chosen by it (queue,
/// outer UDP source port: RFC 7348 §5) keeps them in order. Fragments of one datagram agree: they are hashed without ports.
#[inline]
pub(crate) fn flow_hash(hasher: &impl BuildHasher, header: &[u8]) -> u32 {
    if let Some(words) = plain_ipv4(header) {
        return (hasher.hash_one(words) >> 32) as u32;
    }
    let mut state = hasher.build_hasher();
    match flow_bytes(header) {
        Some((addresses, protocol, ports)) => {
            if let (Ok(addresses), Ok(ports)) = (addresses.try_into(), ports.try_into()) {
                return (hasher.hash_one(words(addresses, protocol, ports)) >> 32) as u32;
            }
            state.write(addresses);
            state.write_u8(protocol);
            state.write(ports);
        }
        None => state.write(&header[..header.len().min(12)]),
    }
    (state.finish() >> 32) as u32
}

/// What is hashed of a packet with IPv4 addresses and ports.
#[inline]
fn words(addresses: [u8; 8], protocol: u8, ports: [u8; 4]) -> (u64, u64) {
    (u64::from_ne_bytes(addresses), u64::from(u32::from_ne_bytes(ports)) | u64::from(protocol) << 32)
}

/// The short way to what [`flow_bytes`] finds in the usual packet: no tag, no IPv4 option, no fragment, TCP or UDP.
#[inline]
fn plain_ipv4(header: &[u8]) -> Option<(u64, u64)> {
    let header: &[u8; 38] = header.first_chunk()?;
    let [.., 0x08, 0x00, 0x45, _] = header[..16] else { return None };
    let whole = u16::from_be_bytes([header[20], header[21]]) & 0x3fff == 0;
    let protocol = header[23];
    if !whole || !matches!(protocol, 6 | 17) {
        return None;
    }
    Some(words(*header[26..].first_chunk()?, protocol, *header[34..].first_chunk()?))
}

/// The EtherType behind up to [`VLAN_TAGS_MAX`] tags, and the bytes behind it. `None` if the copy ends before.
#[inline]
pub(crate) fn network_layer(header: &[u8]) -> Option<(u16, &[u8])> {
    let mut at = ETHERNET_BYTES;
    let mut ethertype = be16(header, at - 2)?;
    for _ in 0..VLAN_TAGS_MAX {
        if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_QINQ {
            break;
        }
        at += VLAN_TAG_BYTES;
        ethertype = be16(header, at - 2)?;
    }
    Some((ethertype, header.get(at..)?))
}

/// Addresses, protocol and ports (empty if there are none) of an IP packet.
fn flow_bytes(header: &[u8]) -> Option<(&[u8], u8, &[u8])> {
    let (ethertype, packet) = network_layer(header)?;
    match ethertype {
        ETHERTYPE_IPV4 => {
            // RFC 791 §3.1: header length in 32-bit words; fragment offset and More Fragments.
            let header_bytes = usize::from(packet.first()? & 0x0f) * 4;
            let fragment = be16(packet, 6)? & 0x3fff != 0;
            let protocol = *packet.get(9)?;
            Some((packet.get(12..20)?, protocol, ports(packet, header_bytes, protocol, fragment)))
        }
        ETHERTYPE_IPV6 => {
            // RFC 8200 §3. Behind extension headers no ports are looked for: a flow keeps to one shape.
            let protocol = *packet.get(6)?;
            Some((packet.get(8..40)?, protocol, ports(packet, 40, protocol, false)))
        }
        _ => None,
    }
}

#[inline]
fn ports(packet: &[u8], at: usize, protocol: u8, fragment: bool) -> &[u8] {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const SCTP: u8 = 132;
    if fragment || !matches!(protocol, TCP | UDP | SCTP) {
        return &[];
    }
    packet.get(at..at + 4).unwrap_or(&[])
}

#[inline]
fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|pair| u16::from_be_bytes(*pair))
}

#[cfg(test)]
mod tests {
    use foldhash::quality::RandomState;
    use proptest::prelude::*;

    use super::*;

    fn udp4(source_port: u16, flags: u16) -> Vec<u8> {
        let mut frame = vec![0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 0];
        frame.extend([0x45, 0, 0, 32, 0, 1]);
        frame.extend(flags.to_be_bytes());
        frame.extend([64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend(source_port.to_be_bytes());
        frame.extend([0, 53, 0, 12, 0, 0, 1, 2, 3, 4]);
        frame
    }

    #[test]
    fn ports_tell_flows_apart_with_and_without_tags() {
        let hasher = RandomState::default();
        assert_ne!(flow_hash(&hasher, &udp4(1, 0)), flow_hash(&hasher, &udp4(2, 0)));
        let tagged = |port| {
            let mut frame = udp4(port, 0);
            frame.splice(12..12, [0x88, 0xa8, 0, 5, 0x81, 0, 0, 7]);
            frame
        };
        assert_ne!(flow_hash(&hasher, &tagged(1)), flow_hash(&hasher, &tagged(2)));
        assert_eq!(flow_hash(&hasher, &tagged(1)), flow_hash(&hasher, &udp4(1, 0)));
    }

    #[test]
    fn fragments_of_one_datagram_agree() {
        let hasher = RandomState::default();
        assert_eq!(flow_hash(&hasher, &udp4(1, 0x2000)), flow_hash(&hasher, &udp4(2, 0x00b9)));
    }

    proptest! {
        #[test]
        fn any_bytes_hash_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            flow_hash(&RandomState::default(), &bytes);
        }
    }
}
