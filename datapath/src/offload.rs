//! What a sender left undone: a checksum to finish, a frame to cut into segments (VIRTIO 1.2 §5.1.6.2).
//!
//! The sender's word is checked against the frame's own headers once, at reception; what does not fit together is
//! dropped. From then on an [`Offload`] can be believed: every offset lies inside the frame.

use dreamwire_vhost::frame::{NetHeader, RawFrame};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use crate::checksum_place;
use crate::stage::parse::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, network_layer};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
const TCP_HEADER_BYTES_MIN: usize = 20;
pub(crate) const UDP_HEADER_BYTES: usize = 8;
pub(crate) const IPV6_HEADER_BYTES: usize = 40;
/// RFC 8200 §4.5.
const IPV6_FRAGMENT_HEADER_BYTES: u16 = 8;

/// Where TCP and UDP keep their checksum, from the start of their header.
const TCP_CHECKSUM_AT: u16 = 16;
const UDP_CHECKSUM_AT: u16 = 6;

/// Pieces that one frame may ask to be cut into: 64 KiB in pieces of 64 bytes, less than any MSS in use. A guest that asked
/// for pieces of one byte would hold its worker for milliseconds per frame.
const PIECES_MAX: u32 = 1024;

/// How a large frame is to be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// TCP segments; `ecn` if the first one alone carries CWR.
    Tcp {
        /// RFC 3168 §6.1.2.
        ecn: bool,
    },
    /// UDP datagrams of equal size (USO).
    Udp,
    /// IP fragments of one UDP datagram (UFO).
    Fragments,
}

/// A large frame's headers and the payload of each piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Large {
    /// How to cut it.
    pub(crate) cut: Cut,
    /// Whether it is IPv6, or else IPv4.
    pub is_ipv6: bool,
    /// Bytes of payload in each piece but the last; not zero.
    pub(crate) piece_bytes: u16,
    /// Where the IP header starts.
    pub(crate) network_at: u16,
    /// Where the TCP or UDP header starts.
    pub(crate) transport_at: u16,
    /// Where the payload starts. All of it is in the header copy.
    pub(crate) payload_at: u16,
}

impl Large {
    /// How many pieces there are of a frame of `frame_bytes`.
    pub(crate) fn pieces(&self, frame_bytes: u32) -> u32 {
        let cut_at = if self.cut == Cut::Fragments { self.transport_at } else { self.payload_at };
        (frame_bytes - u32::from(cut_at)).div_ceil(u32::from(self.piece_bytes))
    }

    /// Bytes of the headers of each piece.
    fn headers_bytes(&self) -> u32 {
        u32::from(match self.cut {
            Cut::Fragments if self.is_ipv6 => self.transport_at + IPV6_FRAGMENT_HEADER_BYTES,
            Cut::Fragments => self.transport_at,
            Cut::Tcp { .. } | Cut::Udp => self.payload_at,
        })
    }
}

/// What is to be done before a receiver without the feature may have the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Offload {
    /// Start of the bytes to sum, and where the checksum goes from there. `start + at + 2` is inside the frame.
    pub(crate) checksum: Option<(u16, u16)>,
    /// What to cut.
    pub(crate) large: Option<Large>,
}

/// Whether a checksum may go where the sender says.
fn may_be_written(frame: &RawFrame, (start, offset): (u16, u16)) -> bool {
    checksum_place::is_allowed(frame.headers(), usize::from(start) + usize::from(offset))
}

/// The sender's header and its frame do not fit together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lie;

impl Offload {
    /// Nothing to do.
    pub(crate) const NONE: Offload = Offload { checksum: None, large: None };

    /// Reads what a sender with the negotiated `features` says about its frame, and checks it.
    #[inline]
    pub(crate) fn read(frame: &RawFrame, features: u64) -> Result<Offload, Lie> {
        if frame.net.is_empty() {
            return Ok(Self::NONE);
        }
        Self::read_header(frame, features)
    }

    fn read_header(frame: &RawFrame, features: u64) -> Result<Offload, Lie> {
        let net = frame.net;
        if u32::from(net.hdr_len) > frame.frame_bytes {
            return Err(Lie);
        }
        let checksum = if u32::from(net.flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0 {
            let end = u32::from(net.csum_start) + u32::from(net.csum_offset) + 2;
            if !has(features, VIRTIO_NET_F_CSUM) || end > frame.frame_bytes {
                return Err(Lie);
            }
            Some((net.csum_start, net.csum_offset))
        } else {
            None
        };
        let large = match u32::from(net.gso_type) {
            // The other fields mean nothing then.
            VIRTIO_NET_HDR_GSO_NONE if checksum.is_some_and(|place| !may_be_written(frame, place)) => return Err(Lie),
            VIRTIO_NET_HDR_GSO_NONE => None,
            _ => Some(large(frame, features).filter(|large| sums_transport(large, checksum)).ok_or(Lie)?),
        };
        Ok(Self { checksum, large })
    }

    /// Length of the longest frame that a receiver without any feature gets of a frame of `frame_bytes`.
    #[inline]
    pub(crate) fn largest_piece_bytes(&self, frame_bytes: u32) -> u32 {
        match self.large {
            Some(large) if large.pieces(frame_bytes) > 1 => large.headers_bytes() + u32::from(large.piece_bytes),
            _ => frame_bytes,
        }
    }

    /// Whether there is nothing to do.
    #[inline]
    pub(crate) fn is_none(&self) -> bool {
        self.checksum.is_none() && self.large.is_none()
    }

    /// Whether a receiver with the negotiated `features` takes the frame as it is.
    #[inline]
    pub(crate) fn suits(&self, features: u64) -> bool {
        let sum = self.checksum.is_none() || has(features, VIRTIO_NET_F_GUEST_CSUM);
        sum && self.large.is_none_or(|large| match large.cut {
            Cut::Tcp { ecn } => {
                let kind = if large.is_ipv6 { VIRTIO_NET_F_GUEST_TSO6 } else { VIRTIO_NET_F_GUEST_TSO4 };
                has(features, kind) && (!ecn || has(features, VIRTIO_NET_F_GUEST_ECN))
            }
            Cut::Udp if large.is_ipv6 => has(features, VIRTIO_NET_F_GUEST_USO6),
            Cut::Udp => has(features, VIRTIO_NET_F_GUEST_USO4),
            Cut::Fragments => has(features, VIRTIO_NET_F_GUEST_UFO),
        })
    }

    /// The header that tells a receiver that takes the frame as it is.
    pub(crate) fn to_net_header(self) -> NetHeader {
        let mut net = NetHeader::default();
        if let Some((start, at)) = self.checksum {
            (net.flags, net.csum_start, net.csum_offset) = (VIRTIO_NET_HDR_F_NEEDS_CSUM as u8, start, at);
        }
        if let Some(large) = self.large {
            let kind = match large.cut {
                Cut::Tcp { .. } if large.is_ipv6 => VIRTIO_NET_HDR_GSO_TCPV6,
                Cut::Tcp { .. } => VIRTIO_NET_HDR_GSO_TCPV4,
                Cut::Udp => VIRTIO_NET_HDR_GSO_UDP_L4,
                Cut::Fragments => VIRTIO_NET_HDR_GSO_UDP,
            };
            let ecn = if large.cut == (Cut::Tcp { ecn: true }) { VIRTIO_NET_HDR_GSO_ECN } else { 0 };
            net.gso_type = (kind | ecn) as u8;
            net.gso_size = large.piece_bytes;
            net.hdr_len = large.payload_at;
        }
        net
    }
}

/// A large frame's transport checksum is the one to be finished: each piece needs its own. UFO's datagram has one in all.
fn sums_transport(large: &Large, checksum: Option<(u16, u16)>) -> bool {
    let at = if matches!(large.cut, Cut::Tcp { .. }) { TCP_CHECKSUM_AT } else { UDP_CHECKSUM_AT };
    checksum == Some((large.transport_at, at))
}

/// The frame's own headers, where they are what the sender's header says.
fn large(frame: &RawFrame, features: u64) -> Option<Large> {
    let net = frame.net;
    let ecn = u32::from(net.gso_type) & VIRTIO_NET_HDR_GSO_ECN != 0;
    let (cut, is_ipv6, feature) = match u32::from(net.gso_type) & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_TCPV4 => (Cut::Tcp { ecn }, Some(false), VIRTIO_NET_F_HOST_TSO4),
        VIRTIO_NET_HDR_GSO_TCPV6 => (Cut::Tcp { ecn }, Some(true), VIRTIO_NET_F_HOST_TSO6),
        VIRTIO_NET_HDR_GSO_UDP_L4 if !ecn => (Cut::Udp, None, VIRTIO_NET_F_HOST_USO),
        VIRTIO_NET_HDR_GSO_UDP if !ecn => (Cut::Fragments, None, VIRTIO_NET_F_HOST_UFO),
        _ => return None,
    };
    if !has(features, feature) || (ecn && !has(features, VIRTIO_NET_F_HOST_ECN)) || net.gso_size == 0 {
        return None;
    }
    let header = frame.headers();
    let (ethertype, packet) = network_layer(header)?;
    let network_at = header.len() - packet.len();
    let (found_ipv6, protocol, network_bytes) = match ethertype {
        ETHERTYPE_IPV4 => ipv4(packet)?,
        ETHERTYPE_IPV6 => (*packet.first()? >> 4 == 6).then_some((true, *packet.get(6)?, IPV6_HEADER_BYTES))?,
        _ => return None,
    };
    let transport_at = network_at + network_bytes;
    let (wanted, transport_bytes) = match cut {
        Cut::Tcp { .. } => (TCP, usize::from(*header.get(transport_at + 12)? >> 4) * 4),
        Cut::Udp | Cut::Fragments => (UDP, UDP_HEADER_BYTES),
    };
    let payload_at = transport_at + transport_bytes;
    let fits = transport_bytes >= if wanted == TCP { TCP_HEADER_BYTES_MIN } else { UDP_HEADER_BYTES }
        && payload_at <= header.len()
        && (payload_at as u32) < frame.frame_bytes;
    if protocol != wanted || is_ipv6.is_some_and(|said| said != found_ipv6) || !fits {
        return None;
    }
    // A fragment's payload is a multiple of 8 bytes (RFC 791 §3.2).
    let piece_bytes = if cut == Cut::Fragments { net.gso_size & !7 } else { net.gso_size };
    let large = Large {
        cut,
        is_ipv6: found_ipv6,
        piece_bytes,
        network_at: network_at as u16,
        transport_at: transport_at as u16,
        payload_at: payload_at as u16,
    };
    (piece_bytes > 0 && large.pieces(frame.frame_bytes) <= PIECES_MAX).then_some(large)
}

/// Protocol and header length of an IPv4 packet that is no fragment.
fn ipv4(packet: &[u8]) -> Option<(bool, u8, usize)> {
    let header_bytes = usize::from(packet.first()? & 0x0f) * 4;
    let header = packet.get(..header_bytes)?;
    let sound = header_bytes >= 20 && header[0] >> 4 == 4 && u16::from_be_bytes([header[6], header[7]]) & 0x3fff == 0;
    sound.then_some((false, header[9], header_bytes))
}

fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}
