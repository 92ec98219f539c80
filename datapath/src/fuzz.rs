//! Frames and datagrams from arbitrary bytes, for the fuzz target `headers` and its regression test.

use dreamwire_policy::Claim;
use foldhash::quality::RandomState;

use crate::claim::claim;
use crate::stage::parse::{ETHERNET_BYTES, destination, flow_hash, network_layer, source};
use crate::vxlan;

/// Bytes of a frame's private copy.
const COPY_BYTES: usize = dreamwire_vhost::frame::HEADER_COPY_BYTES;

/// Parses `bytes` as a guest's frame and as a VXLAN datagram.
///
/// # Panics
/// When something was read that is not there.
pub fn headers(bytes: &[u8]) {
    frame(bytes);
    if let Some((tunnel, inner)) = vxlan::decapsulate(bytes) {
        assert_eq!(inner.len() + vxlan::HEADER_BYTES, bytes.len());
        assert_eq!(vxlan::decapsulate(&[&vxlan::header(tunnel)[..], inner].concat()), Some((tunnel, inner)));
        frame(inner);
    }
}

fn frame(bytes: &[u8]) {
    if bytes.len() < ETHERNET_BYTES {
        return;
    }
    let copy = &bytes[..bytes.len().min(COPY_BYTES)];
    assert_eq!([destination(copy).0, source(copy).0].concat(), copy[..12]);
    let _ = network_layer(copy);
    assert_eq!(hash(copy), hash(copy), "one flow, one queue");
    let contains = |address: &[u8]| copy.windows(address.len()).any(|window| window == address);
    match claim(copy, bytes.len() as u32) {
        Claim::Ipv4 { source } | Claim::DhcpClient { source } => assert!(contains(&source.octets())),
        Claim::Ipv6 { source } => assert!(contains(&source.octets())),
        Claim::Arp { mac, address } => assert!(contains(&mac) && contains(&address.octets())),
        Claim::Neighbour { source, advertised, mac } => {
            assert!(contains(&source.octets()));
            assert!(advertised.is_none_or(|address| contains(&address.octets())));
            assert!(mac.is_none_or(|mac| contains(&mac)));
        }
        Claim::Authority | Claim::None | Claim::Unreadable => {}
    }
}

fn hash(header: &[u8]) -> u32 {
    thread_local! {
        static HASHER: RandomState = RandomState::default();
    }
    HASHER.with(|hasher| flow_hash(hasher, header))
}
