//! The headers around a frame on the wire, complete: Ethernet, IPv4 or IPv6, UDP, VXLAN (RFC 7348 §5).
//!
//! They are made once for a VTEP and a network; of one frame to the next only lengths, the UDP source port and, over
//! IPv4, identification and header checksum differ. DSCP and ECN are zero, DF is not set: both as the `socket` driver
//! has it.

use std::net::IpAddr;

use dreamwire_vhost::frame::{Before, RawFrame};

use crate::checksum::Sum;
use crate::mac::Mac;
use crate::stage::parse::{ETHERNET_BYTES, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use crate::vxlan;

pub(crate) const IPV4_BYTES: usize = 20;
pub(crate) const IPV6_BYTES: usize = 40;
pub(crate) const UDP_BYTES: usize = 8;
pub(crate) const PROTOCOL_UDP: u8 = 17;
/// Linux's default, `net.ipv4.ip_default_ttl` and `net.ipv6.conf.*.hop_limit`.
pub(crate) const HOP_LIMIT: u8 = 64;

/// The longest outer header: over IPv6.
pub const OUTER_BYTES_MAX: usize = ETHERNET_BYTES + IPV6_BYTES + UDP_BYTES + vxlan::HEADER_BYTES;

/// Over IPv4, and how many words of two bytes differ from frame to frame.
const OUTER4_BYTES: usize = ETHERNET_BYTES + IPV4_BYTES + UDP_BYTES + vxlan::HEADER_BYTES;
const OUTER4_WORDS: usize = 5;

/// From where to where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// This host's card and VTEP.
    pub source: (Mac, IpAddr),
    /// The next hop's card and the other VTEP.
    pub destination: (Mac, IpAddr),
    /// UDP port of the tunnels.
    pub udp_port: u16,
}

/// A finished outer header but for what every frame changes. Plain data: a flow may keep one.
#[derive(Debug, Clone)]
pub struct OuterHeader {
    bytes: [u8; OUTER_BYTES_MAX],
    length: u8,
    /// Over the parts of the IPv4 header that stay, or over IPv6 those of pseudo-header, UDP and VXLAN.
    constant: Sum,
    /// RFC 6864 §4.3: fragments of different packets between two hosts must not share one. Counts up by packet, for one
    /// network; two networks start far apart.
    identification: u16,
}

impl OuterHeader {
    /// `None` if the two addresses are of different families.
    pub fn new(ends: &Ends, tunnel: vxlan::Header) -> Option<Self> {
        let mut bytes = [0; OUTER_BYTES_MAX];
        bytes[..6].copy_from_slice(&ends.destination.0.0);
        bytes[6..12].copy_from_slice(&ends.source.0.0);
        let ip = &mut bytes[ETHERNET_BYTES..];
        let (ethertype, ip_bytes, constant) = match (ends.source.1, ends.destination.1) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                ip[0] = 0x45;
                ip[8] = HOP_LIMIT;
                ip[9] = PROTOCOL_UDP;
                ip[12..16].copy_from_slice(&source.octets());
                ip[16..20].copy_from_slice(&destination.octets());
                (ETHERTYPE_IPV4, IPV4_BYTES, Sum::default().bytes(&ip[..IPV4_BYTES]))
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                ip[0] = 0x60;
                ip[6] = PROTOCOL_UDP;
                ip[7] = HOP_LIMIT;
                ip[8..24].copy_from_slice(&source.octets());
                ip[24..40].copy_from_slice(&destination.octets());
                let pseudo = Sum::default().pseudo_header(&ip[8..40], PROTOCOL_UDP, 0);
                (ETHERTYPE_IPV6, IPV6_BYTES, pseudo.word(ends.udp_port).bytes(&vxlan::header(tunnel)))
            }
            _ => return None,
        };
        bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
        let udp_at = ETHERNET_BYTES + ip_bytes;
        bytes[udp_at + 2..udp_at + 4].copy_from_slice(&ends.udp_port.to_be_bytes());
        let vxlan_at = udp_at + UDP_BYTES;
        bytes[vxlan_at..vxlan_at + vxlan::HEADER_BYTES].copy_from_slice(&vxlan::header(tunnel));
        let length = (vxlan_at + vxlan::HEADER_BYTES) as u8;
        // An odd multiplier spreads neighbouring VNIs over the 16 bits.
        let distinct = tunnel.vni().get() ^ u32::from(tunnel.group()).rotate_left(16);
        let identification = (distinct.wrapping_mul(0x9e37_79b1) >> 16) as u16;
        Some(Self { bytes, length, constant, identification })
    }

    /// Bytes of the header.
    #[inline]
    pub fn length(&self) -> usize {
        usize::from(self.length)
    }

    /// Bytes of the IP packet around an inner frame: what the wire's MTU limits.
    #[inline]
    pub fn packet_bytes(&self, inner_bytes: usize) -> usize {
        self.length() - ETHERNET_BYTES + inner_bytes
    }

    /// The next hop's card.
    #[inline]
    pub fn destination(&self) -> Mac {
        let [a, b, c, d, e, f, ..] = self.bytes;
        Mac([a, b, c, d, e, f])
    }

    /// Another next hop's card.
    #[inline]
    pub(crate) fn redirect(&mut self, destination: Mac) {
        self.bytes[..6].copy_from_slice(&destination.0);
    }

    /// Whether the UDP checksum must be computed: over IPv6, where receivers refuse zero (RFC 6935 §5). Over IPv4 it is
    /// zero (RFC 7348 §5).
    #[inline]
    pub fn is_summed(&self) -> bool {
        self.length() == OUTER_BYTES_MAX
    }

    /// The header for an inner frame of `inner_bytes` bytes. The packet must fit IP's length fields: see
    /// [`OuterHeader::packet_bytes`]. Over IPv6 the UDP checksum is left zero.
    #[inline]
    pub fn finish(&mut self, inner_bytes: usize, flow_hash: u32) -> &[u8] {
        let length = self.length();
        if self.is_summed() {
            let udp_at = length - vxlan::HEADER_BYTES - UDP_BYTES;
            let udp_bytes = ((length - udp_at + inner_bytes) as u16).to_be_bytes();
            let port = vxlan::source_port(flow_hash).to_be_bytes();
            for (at, word) in [(ETHERNET_BYTES + 4, udp_bytes), (udp_at, port), (udp_at + 4, udp_bytes)] {
                self.bytes[at..at + 2].copy_from_slice(&word);
            }
        } else {
            for (at, word) in changing(self.constant, &mut self.identification, inner_bytes, flow_hash) {
                self.bytes[at..at + 2].copy_from_slice(&word);
            }
        }
        &self.bytes[..length]
    }

    /// For a run of frames, each with its hash. `None` over IPv6.
    #[inline]
    pub(crate) fn before<F: Fn(&RawFrame) -> u32>(&mut self, mtu: usize, flow_hash: F) -> Option<BeforeInner<'_, F>> {
        let Self { bytes, constant, identification, .. } = self;
        let is_ipv4 = usize::from(self.length) == OUTER4_BYTES;
        let bytes = bytes.first_chunk().filter(|_| is_ipv4)?;
        Some(BeforeInner { bytes, constant: *constant, identification, mtu, flow_hash })
    }

    /// As [`OuterHeader::finish`], with the UDP checksum where there is one; `inner` is the sum over the inner frame.
    #[inline]
    pub(crate) fn finish_summed(&mut self, inner_bytes: usize, flow_hash: u32, inner: Sum) -> &[u8] {
        self.finish(inner_bytes, flow_hash);
        let length = self.length();
        if self.is_summed() {
            let udp_bytes = (UDP_BYTES + vxlan::HEADER_BYTES + inner_bytes) as u16;
            let [high, low] = inner.folded();
            let sum = self.constant.word(u16::from_be_bytes([high, low])).word(vxlan::source_port(flow_hash));
            // Twice: it is in the pseudo-header and in the UDP header. Zero means "none" (RFC 768).
            let sum = match sum.word(udp_bytes).word(udp_bytes).checksum() {
                [0, 0] => [0xff, 0xff],
                sum => sum,
            };
            let checksum_at = length - vxlan::HEADER_BYTES - 2;
            self.bytes[checksum_at..checksum_at + 2].copy_from_slice(&sum);
        }
        &self.bytes[..length]
    }
}

/// What differs from frame to frame over IPv4, and where.
#[inline(always)]
fn changing(
    constant: Sum,
    identification: &mut u16,
    inner_bytes: usize,
    flow_hash: u32,
) -> [(usize, [u8; 2]); OUTER4_WORDS] {
    const IP: usize = ETHERNET_BYTES;
    const UDP: usize = ETHERNET_BYTES + IPV4_BYTES;
    let ip_bytes = (OUTER4_BYTES - ETHERNET_BYTES + inner_bytes) as u16;
    *identification = identification.wrapping_add(1);
    // RFC 1624: the checksum of what stays is known; only these two words are added.
    let sum = constant.word(ip_bytes).word(*identification).checksum();
    [
        (IP + 2, ip_bytes.to_be_bytes()),
        (IP + 4, identification.to_be_bytes()),
        (IP + 10, sum),
        (UDP, vxlan::source_port(flow_hash).to_be_bytes()),
        (UDP + 4, (ip_bytes - IPV4_BYTES as u16).to_be_bytes()),
    ]
}

/// A header over IPv4 before each of a run of inner frames, whose hashes are `F`'s.
#[derive(Debug)]
pub(crate) struct BeforeInner<'a, F> {
    bytes: &'a [u8; OUTER4_BYTES],
    constant: Sum,
    identification: &'a mut u16,
    /// Bytes of an IP packet that the wire takes.
    mtu: usize,
    flow_hash: F,
}

impl<F: Fn(&RawFrame) -> u32> Before<OUTER4_BYTES, OUTER4_WORDS> for BeforeInner<'_, F> {
    #[inline(always)]
    fn same(&self) -> &[u8; OUTER4_BYTES] {
        self.bytes
    }

    #[inline(always)]
    fn words(&mut self, frame: &RawFrame) -> Option<[(usize, [u8; 2]); OUTER4_WORDS]> {
        let inner_bytes = frame.frame_bytes as usize;
        if OUTER4_BYTES - ETHERNET_BYTES + inner_bytes > self.mtu {
            return None;
        }
        Some(changing(self.constant, self.identification, inner_bytes, (self.flow_hash)(frame)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, UdpPacket};

    use super::*;
    use crate::vni::Vni;

    const VNI: u32 = 0x12_3456;

    fn header(source: &str, destination: &str) -> OuterHeader {
        let ends = Ends {
            source: (Mac([2, 0, 0, 0, 0, 1]), source.parse().unwrap()),
            destination: (Mac([2, 0, 0, 0, 0, 2]), destination.parse().unwrap()),
            udp_port: 4789,
        };
        OuterHeader::new(&ends, Vni::new(VNI).unwrap().into()).unwrap()
    }

    fn assert_udp(payload: &[u8], ends: (IpAddress, IpAddress), inner: &[u8], flow_hash: u32, summed: bool) {
        let udp = UdpPacket::new_checked(payload).unwrap();
        assert_eq!(udp.dst_port(), 4789);
        assert_eq!(udp.src_port(), vxlan::source_port(flow_hash));
        assert!(udp.verify_checksum(&ends.0, &ends.1));
        assert_eq!(udp.checksum() != 0, summed);
        assert_eq!(vxlan::decapsulate(udp.payload()), Some((Vni::new(VNI).unwrap().into(), inner)));
    }

    proptest! {
        #[test]
        fn every_ipv4_header_is_what_smoltcp_takes(inner in proptest::collection::vec(any::<u8>(), 0..1600), flow_hash: u32) {
            let mut outer = header("192.0.2.1", "198.51.100.254");
            let mut identifications = Vec::new();
            for _ in 0..3 {
                let mut frame = outer.finish(inner.len(), flow_hash).to_vec();
                prop_assert_eq!(frame.len(), 50);
                frame.extend(&inner);
                let ethernet = EthernetFrame::new_checked(&frame).unwrap();
                prop_assert_eq!(ethernet.ethertype(), EthernetProtocol::Ipv4);
                prop_assert_eq!(ethernet.dst_addr().0, [2, 0, 0, 0, 0, 2]);
                prop_assert_eq!(ethernet.src_addr().0, [2, 0, 0, 0, 0, 1]);
                let ip = Ipv4Packet::new_checked(ethernet.payload()).unwrap();
                prop_assert!(ip.verify_checksum());
                prop_assert_eq!(usize::from(ip.total_len()), outer.packet_bytes(inner.len()));
                prop_assert!(!ip.dont_frag() && !ip.more_frags() && ip.frag_offset() == 0);
                prop_assert_eq!((ip.dscp(), ip.ecn(), ip.hop_limit()), (0, 0, 64));
                prop_assert_eq!(ip.next_header(), IpProtocol::Udp);
                prop_assert_eq!(ip.dst_addr().octets(), [198, 51, 100, 254]);
                identifications.push(ip.ident());
                assert_udp(ip.payload(), (ip.src_addr().into(), ip.dst_addr().into()), &inner, flow_hash, false);
            }
            identifications.dedup();
            prop_assert_eq!(identifications.len(), 3, "each packet has its own");
        }

        #[test]
        fn every_ipv6_header_is_what_smoltcp_takes(inner in proptest::collection::vec(any::<u8>(), 0..1600), flow_hash: u32) {
            let mut outer = header("2001:db8::1", "2001:db8:ffff::2");
            let sum = Sum::default().bytes(&inner);
            let mut frame = outer.finish_summed(inner.len(), flow_hash, sum).to_vec();
            prop_assert_eq!(frame.len(), OUTER_BYTES_MAX);
            frame.extend(&inner);
            let ethernet = EthernetFrame::new_checked(&frame).unwrap();
            prop_assert_eq!(ethernet.ethertype(), EthernetProtocol::Ipv6);
            let ip = Ipv6Packet::new_checked(ethernet.payload()).unwrap();
            prop_assert_eq!(usize::from(ip.payload_len()) + IPV6_BYTES, outer.packet_bytes(inner.len()));
            prop_assert_eq!((ip.traffic_class(), ip.hop_limit()), (0, 64));
            prop_assert_eq!(ip.next_header(), IpProtocol::Udp);
            assert_udp(ip.payload(), (ip.src_addr().into(), ip.dst_addr().into()), &inner, flow_hash, true);
        }
    }

    #[test]
    fn addresses_of_two_families_have_no_header() {
        let mut ends = Ends {
            source: (Mac([2, 0, 0, 0, 0, 1]), "192.0.2.1".parse().unwrap()),
            destination: (Mac([2, 0, 0, 0, 0, 2]), "2001:db8::1".parse().unwrap()),
            udp_port: 4789,
        };
        assert!(OuterHeader::new(&ends, Vni::new(1).unwrap().into()).is_none());
        std::mem::swap(&mut ends.source, &mut ends.destination);
        assert!(OuterHeader::new(&ends, Vni::new(1).unwrap().into()).is_none());
    }
}
