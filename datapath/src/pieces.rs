//! Does what a sender left undone, for receivers that cannot: finishes checksums, cuts large frames into segments.
//!
//! The frame is first copied whole into private memory: a checksum over bytes that its sender still writes to would be
//! wrong. TCP and UDP are cut as Linux does it (`tcp_gso_segment`, `udp_gso_segment`, `udp4_ufo_fragment`): IPv4
//! identification counts up by piece, CWR stays with the first, FIN and PSH with the last.

use dreamwire_vhost::frame::HEADER_COPY_BYTES;
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::FRAME_BYTES_MAX;

use crate::checksum::Sum;
use crate::offload::{Cut, IPV6_HEADER_BYTES, Large, Offload, TCP, UDP};

/// RFC 8200 §4.5.
const FRAGMENT_HEADER_BYTES: usize = 8;
const FRAGMENT: u8 = 44;

const TCP_FLAGS_AT: usize = 13;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// Buffers for one frame. Owned by a worker.
#[derive(Debug)]
pub(crate) struct Pieces {
    frame: Box<[u8]>,
    header: [u8; HEADER_COPY_BYTES + FRAGMENT_HEADER_BYTES],
    /// Identification of the next fragmented IPv6 datagram.
    fragment_id: u32,
}

impl Default for Pieces {
    fn default() -> Self {
        Self {
            frame: vec![0; FRAME_BYTES_MAX as usize].into_boxed_slice(),
            header: [0; HEADER_COPY_BYTES + FRAGMENT_HEADER_BYTES],
            fragment_id: 0,
        }
    }
}

impl Pieces {
    /// Gives `send` the finished pieces of a frame, each as header and payload; returns how many. `offload` was read
    /// from this frame, and the frame is no longer than [`FRAME_BYTES_MAX`].
    pub(crate) fn cut(
        &mut self,
        offload: Offload,
        header: &[u8],
        payload: Payload<'_>,
        mut send: impl FnMut(&[u8], Payload<'_>),
    ) -> u64 {
        let bytes = header.len() + payload.bytes() as usize;
        self.frame[..header.len()].copy_from_slice(header);
        payload.copy_out(&mut self.frame[header.len()..bytes]);
        match offload.large {
            Some(large) if large.cut != Cut::Fragments => self.segments(large, bytes, send),
            large => {
                if let Some((start, at)) = offload.checksum {
                    let start = usize::from(start);
                    let sum = not_zero(Sum::default().bytes(&self.frame[start..bytes]).checksum());
                    self.frame[start + usize::from(at)..][..2].copy_from_slice(&sum);
                }
                match large {
                    // A datagram that fits into one packet is none of fragments.
                    Some(large) if large.pieces(bytes as u32) > 1 => self.fragments(large, bytes, send),
                    _ => {
                        send(&self.frame[..bytes], Payload::EMPTY);
                        1
                    }
                }
            }
        }
    }

    /// TCP segments and UDP datagrams: every piece has all headers and a checksum of its own.
    fn segments(&mut self, large: Large, bytes: usize, mut send: impl FnMut(&[u8], Payload<'_>)) -> u64 {
        let (payload_at, transport_at) = (usize::from(large.payload_at), usize::from(large.transport_at));
        let (headers, payload) = self.frame[..bytes].split_at(payload_at);
        let header = &mut self.header[..payload_at];
        let pieces = payload.chunks(usize::from(large.piece_bytes));
        let count = pieces.len();
        for (index, piece) in pieces.enumerate() {
            header.copy_from_slice(headers);
            let (network, transport) =
                header[usize::from(large.network_at)..].split_at_mut(transport_at - usize::from(large.network_at));
            let transport_bytes = transport.len() + piece.len();
            set_network_lengths(network, large.is_ipv6, transport_bytes, index as u16);
            let (protocol, checksum_at) = match large.cut {
                Cut::Tcp { .. } => {
                    let sequence = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
                    let sequence = sequence.wrapping_add((index * usize::from(large.piece_bytes)) as u32);
                    transport[4..8].copy_from_slice(&sequence.to_be_bytes());
                    if index > 0 {
                        transport[TCP_FLAGS_AT] &= !CWR;
                    }
                    if index + 1 < count {
                        transport[TCP_FLAGS_AT] &= !(FIN | PSH);
                    }
                    (TCP, 16)
                }
                Cut::Udp | Cut::Fragments => {
                    transport[4..6].copy_from_slice(&(transport_bytes as u16).to_be_bytes());
                    (UDP, 6)
                }
            };
            transport[checksum_at..checksum_at + 2].copy_from_slice(&[0, 0]);
            let sum = Sum::default()
                .pseudo_header(addresses(network, large.is_ipv6), protocol, transport_bytes as u32)
                .bytes(transport)
                .bytes(piece);
            transport[checksum_at..checksum_at + 2].copy_from_slice(&not_zero(sum.checksum()));
            send(header, Payload::private(piece));
        }
        count as u64
    }

    /// IP fragments of a datagram whose checksum is finished (RFC 791 §3.2, RFC 8200 §4.5).
    fn fragments(&mut self, large: Large, bytes: usize, mut send: impl FnMut(&[u8], Payload<'_>)) -> u64 {
        let (network_at, transport_at) = (usize::from(large.network_at), usize::from(large.transport_at));
        let (headers, datagram) = self.frame[..bytes].split_at(transport_at);
        let pieces = datagram.chunks(usize::from(large.piece_bytes));
        let count = pieces.len();
        self.fragment_id = self.fragment_id.wrapping_add(1);
        let mut offset = 0;
        for (index, piece) in pieces.enumerate() {
            // The offset is a multiple of 8: all pieces but the last are. Its lower bits hold the flags.
            let more = index + 1 < count;
            let header_bytes = if large.is_ipv6 { transport_at + FRAGMENT_HEADER_BYTES } else { transport_at };
            let header = &mut self.header[..header_bytes];
            header[..transport_at].copy_from_slice(headers);
            if large.is_ipv6 {
                let (network, fragment) = header[network_at..].split_at_mut(IPV6_HEADER_BYTES);
                network[6] = FRAGMENT;
                network[4..6].copy_from_slice(&((FRAGMENT_HEADER_BYTES + piece.len()) as u16).to_be_bytes());
                fragment[..2].copy_from_slice(&[UDP, 0]);
                fragment[2..4].copy_from_slice(&(offset as u16 | u16::from(more)).to_be_bytes());
                fragment[4..8].copy_from_slice(&self.fragment_id.to_be_bytes());
            } else {
                let network = &mut header[network_at..];
                network[6..8].copy_from_slice(&((offset / 8) as u16 | u16::from(more) << 13).to_be_bytes());
                set_network_lengths(network, false, piece.len(), 0);
            }
            send(header, Payload::private(piece));
            offset += piece.len();
        }
        count as u64
    }
}

/// Sets a piece's length; for IPv4 also identification and header checksum.
fn set_network_lengths(network: &mut [u8], is_ipv6: bool, transport_bytes: usize, index: u16) {
    if is_ipv6 {
        let bytes = network.len() - IPV6_HEADER_BYTES + transport_bytes;
        network[4..6].copy_from_slice(&(bytes as u16).to_be_bytes());
        return;
    }
    let bytes = network.len() + transport_bytes;
    network[2..4].copy_from_slice(&(bytes as u16).to_be_bytes());
    let identification = u16::from_be_bytes([network[4], network[5]]).wrapping_add(index);
    network[4..6].copy_from_slice(&identification.to_be_bytes());
    network[10..12].copy_from_slice(&[0, 0]);
    let sum = Sum::default().bytes(network).checksum();
    network[10..12].copy_from_slice(&sum);
}

/// Source and destination, as the pseudo-header sums them.
fn addresses(network: &[u8], is_ipv6: bool) -> &[u8] {
    if is_ipv6 { &network[8..40] } else { &network[12..20] }
}

/// Zero means "no checksum" in UDP; TCP takes the other zero as well.
fn not_zero(checksum: [u8; 2]) -> [u8; 2] {
    if checksum == [0, 0] { [0xff, 0xff] } else { checksum }
}

#[cfg(test)]
mod tests {
    use dreamwire_vhost::frame::{NetHeader, RawFrame};
    use proptest::prelude::*;
    use smoltcp::wire::{
        EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv6FragmentHeader, Ipv6Packet, TcpPacket,
        UdpPacket,
    };

    use super::*;

    /// Every offload that a sender can use.
    const ALL: u64 = 1 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 56;
    const TSO4: u8 = 1;
    const UFO: u8 = 3;
    const TSO6: u8 = 4;
    const USO: u8 = 5;
    const ECN: u8 = 0x80;

    fn ethernet(ethertype: u16) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        frame.extend(ethertype.to_be_bytes());
        frame
    }

    /// A frame whose transport checksum is the pseudo-header's sum, as senders leave it.
    fn frame(is_ipv6: bool, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let mut transport = match protocol {
            TCP => {
                // Ports, sequence 0xffff_fff0, acknowledgement, data offset 5, CWR | ACK | PSH | FIN.
                let mut tcp = vec![0, 80, 0x9c, 0x40, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 9, 0x50];
                tcp.extend([CWR | 0x10 | PSH | FIN, 1, 0, 0, 0, 0, 0]);
                tcp
            }
            _ => [&[0, 80, 0x9c, 0x40][..], &((8 + payload.len()) as u16).to_be_bytes(), &[0, 0]].concat(),
        };
        let bytes = transport.len() + payload.len();
        let mut frame = ethernet(if is_ipv6 { 0x86dd } else { 0x0800 });
        let network_at = frame.len();
        if is_ipv6 {
            frame.extend([0x60, 0, 0, 0, (bytes >> 8) as u8, bytes as u8, protocol, 64]);
            frame.extend([0xfd; 16].into_iter().chain([0xfc; 16]));
        } else {
            frame.extend([0x45, 0, ((20 + bytes) >> 8) as u8, (20 + bytes) as u8, 0xff, 0xff, 0x40, 0, 64, protocol]);
            frame.extend([0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        }
        let checksum_at = if protocol == TCP { 16 } else { 6 };
        let pseudo = Sum::default().pseudo_header(addresses(&frame[network_at..], is_ipv6), protocol, bytes as u32);
        transport[checksum_at..checksum_at + 2].copy_from_slice(&pseudo.folded());
        [frame, transport, payload.to_vec()].concat()
    }

    fn net(is_ipv6: bool, protocol: u8, gso_type: u8, gso_size: u16) -> NetHeader {
        let csum_start = if is_ipv6 { 54 } else { 34 };
        let csum_offset = if protocol == TCP { 16 } else { 6 };
        NetHeader { flags: 1, gso_type, hdr_len: 0, gso_size, csum_start, csum_offset }
    }

    fn raw(bytes: &[u8], net: NetHeader) -> RawFrame {
        let mut frame = RawFrame { net, frame_bytes: bytes.len() as u32, ..RawFrame::EMPTY };
        let header_bytes = bytes.len().min(HEADER_COPY_BYTES);
        frame.header[..header_bytes].copy_from_slice(&bytes[..header_bytes]);
        frame.header_bytes = header_bytes as u16;
        frame
    }

    fn cut(bytes: &[u8], net: NetHeader) -> Vec<Vec<u8>> {
        let raw = raw(bytes, net);
        let offload = Offload::read(&raw, ALL).unwrap();
        let mut pieces = Vec::new();
        let tail = &bytes[raw.headers().len()..];
        let count = Pieces::default().cut(offload, raw.headers(), Payload::private(tail), |header, payload| {
            let mut piece = header.to_vec();
            piece.resize(header.len() + payload.bytes() as usize, 0);
            payload.copy_out(&mut piece[header.len()..]);
            pieces.push(piece);
        });
        assert_eq!(count, pieces.len() as u64);
        assert!(pieces.iter().all(|piece| piece.len() as u32 <= offload.largest_piece_bytes(bytes.len() as u32)));
        pieces
    }

    /// The IP payload and the addresses, after smoltcp has checked lengths and checksum.
    fn network(piece: &[u8]) -> (Vec<u8>, IpAddress, IpAddress, Option<Ipv4Packet<Vec<u8>>>) {
        let frame = EthernetFrame::new_checked(piece).unwrap();
        match frame.ethertype() {
            EthernetProtocol::Ipv4 => {
                let packet = Ipv4Packet::new_checked(frame.payload().to_vec()).unwrap();
                assert!(packet.verify_checksum());
                assert_eq!(usize::from(packet.total_len()), frame.payload().len());
                let (from, to) = (packet.src_addr().into(), packet.dst_addr().into());
                (frame.payload()[usize::from(packet.header_len())..].to_vec(), from, to, Some(packet))
            }
            _ => {
                let packet = Ipv6Packet::new_checked(frame.payload()).unwrap();
                assert_eq!(packet.total_len(), frame.payload().len());
                (packet.payload().to_vec(), packet.src_addr().into(), packet.dst_addr().into(), None)
            }
        }
    }

    proptest! {
        #[test]
        fn tcp_segments_are_whole_checked_and_in_sequence(
            is_ipv6: bool, ecn: bool, payload in proptest::collection::vec(any::<u8>(), 1..20_000), size in 100..3000u16,
        ) {
            let kind = if is_ipv6 { TSO6 } else { TSO4 } | if ecn { ECN } else { 0 };
            let pieces = cut(&frame(is_ipv6, TCP, &payload), net(is_ipv6, TCP, kind, size));
            prop_assert_eq!(pieces.len(), payload.len().div_ceil(usize::from(size)));
            let mut whole = Vec::<u8>::new();
            for (index, piece) in pieces.iter().enumerate() {
                let (segment, from, to, ipv4) = network(piece);
                let tcp = TcpPacket::new_checked(&segment[..]).unwrap();
                prop_assert!(tcp.verify_checksum(&from, &to));
                prop_assert_eq!(tcp.seq_number().0 as u32, 0xffff_fff0u32.wrapping_add(whole.len() as u32));
                let last = index + 1 == pieces.len();
                prop_assert_eq!((tcp.cwr(), tcp.psh(), tcp.fin(), tcp.ack()), (index == 0, last, last, true));
                if let Some(ipv4) = ipv4 {
                    prop_assert_eq!(ipv4.ident(), 0xffffu16.wrapping_add(index as u16));
                }
                whole.extend(tcp.payload());
            }
            prop_assert_eq!(whole, payload);
        }

        #[test]
        fn udp_datagrams_are_whole_and_checked(
            is_ipv6: bool, payload in proptest::collection::vec(any::<u8>(), 1..20_000), size in 100..3000u16,
        ) {
            let mut whole = Vec::<u8>::new();
            for piece in cut(&frame(is_ipv6, UDP, &payload), net(is_ipv6, UDP, USO, size)) {
                let (datagram, from, to, _) = network(&piece);
                let udp = UdpPacket::new_checked(&datagram[..]).unwrap();
                prop_assert!(udp.verify_checksum(&from, &to) && udp.checksum() != 0);
                whole.extend(udp.payload());
            }
            prop_assert_eq!(whole, payload);
        }

        #[test]
        fn fragments_make_one_datagram_with_a_good_checksum(
            is_ipv6: bool, payload in proptest::collection::vec(any::<u8>(), 3000..20_000), size in 100..3000u16,
        ) {
            let pieces = cut(&frame(is_ipv6, UDP, &payload), net(is_ipv6, UDP, UFO, size));
            let mut whole = Vec::<u8>::new();
            let mut ends = (IpAddress::v4(0, 0, 0, 0), IpAddress::v4(0, 0, 0, 0));
            for (index, piece) in pieces.iter().enumerate() {
                let (payload, from, to, ipv4) = network(piece);
                let last = index + 1 == pieces.len();
                if let Some(ipv4) = ipv4 {
                    prop_assert_eq!((ipv4.frag_offset() as usize, ipv4.more_frags()), (whole.len(), !last));
                    whole.extend(payload);
                } else {
                    // The extension's first two bytes are next header and reserved.
                    let fragment = Ipv6FragmentHeader::new_checked(&payload[2..8]).unwrap();
                    prop_assert_eq!(fragment.frag_offset() as usize * 8, whole.len());
                    prop_assert_eq!((payload[0], fragment.more_frags()), (u8::from(IpProtocol::Udp), !last));
                    whole.extend(&payload[8..]);
                }
                ends = (from, to);
            }
            let udp = UdpPacket::new_checked(&whole[..]).unwrap();
            prop_assert!(udp.verify_checksum(&ends.0, &ends.1));
            prop_assert_eq!(udp.payload(), &payload[..]);
        }

        #[test]
        fn a_lone_checksum_is_finished_where_it_may_be(
            payload in proptest::collection::vec(any::<u8>(), 10..1400), start in 14..1000u16, at in 0..400u16,
        ) {
            let mut bytes = frame(false, UDP, &payload);
            let net = NetHeader { flags: 1, csum_start: start, csum_offset: at, ..NetHeader::default() };
            let (start, at) = (usize::from(start), usize::from(at));
            if start + at + 2 > bytes.len() || !crate::checksum_place::is_allowed(raw(&bytes, net).headers(), start + at) {
                prop_assert_eq!(Offload::read(&raw(&bytes, net), ALL), Err(crate::offload::Lie));
                return Ok(());
            }
            let expected = not_zero(Sum::default().bytes(&bytes[start..]).checksum());
            bytes[start + at..start + at + 2].copy_from_slice(&expected);
            let before = frame(false, UDP, &payload);
            prop_assert_eq!(cut(&before, net), vec![bytes]);
        }

        #[test]
        fn no_header_and_no_frame_make_it_panic(
            bytes in proptest::collection::vec(any::<u8>(), 14..300), flags: u8, gso_type in 0..8u8, ecn: bool,
            hdr_len: u16, gso_size in prop_oneof![Just(0u16), Just(1), Just(65535), any::<u16>()],
            csum_start in 0..310u16, csum_offset in prop_oneof![Just(6u16), Just(16), any::<u16>()], ip in 0..3usize,
        ) {
            let mut bytes = bytes;
            bytes[12..14].copy_from_slice(&[[8, 0], [0x86, 0xdd], [0x81, 0]][ip]);
            let gso_type = gso_type | if ecn { ECN } else { 0 };
            let net = NetHeader { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset };
            if Offload::read(&raw(&bytes, net), ALL).is_ok() {
                cut(&bytes, net);
            }
        }
    }

    #[test]
    fn a_header_that_lies_is_refused() {
        let good = frame(false, TCP, &[0; 4000]);
        let told = net(false, TCP, TSO4, 1448);
        let lies = [
            NetHeader { gso_size: 0, ..told },
            NetHeader { gso_type: TSO6, ..told },
            NetHeader { gso_type: UFO, csum_offset: 6, ..told },
            NetHeader { gso_type: USO | ECN, csum_offset: 6, ..told },
            NetHeader { gso_type: 2, ..told },
            NetHeader { flags: 0, ..told },
            NetHeader { csum_start: 33, ..told },
            NetHeader { csum_start: 4054, csum_offset: 0, ..told },
            NetHeader { csum_start: 65535, csum_offset: 65535, ..told },
            NetHeader { hdr_len: 4100, ..told },
        ];
        assert!(Offload::read(&raw(&good, told), ALL).is_ok());
        for net in lies {
            assert!(Offload::read(&raw(&good, net), ALL).is_err(), "{net:?}");
        }
        for feature in [0, 11] {
            assert!(Offload::read(&raw(&good, told), ALL & !(1 << feature)).is_err(), "without feature {feature}");
        }
    }

    #[test]
    fn a_receiver_with_the_feature_gets_the_frame_uncut() {
        let offload =
            Offload::read(&raw(&frame(false, TCP, &[0; 4000]), net(false, TCP, TSO4 | ECN, 1448)), ALL).unwrap();
        let guest_csum_tso4_ecn = 1 << 1 | 1 << 7 | 1 << 9;
        assert!(offload.suits(guest_csum_tso4_ecn));
        for feature in [1, 7, 9] {
            assert!(!offload.suits(guest_csum_tso4_ecn & !(1 << feature)), "without feature {feature}");
        }
        assert_eq!(offload.to_net_header(), NetHeader { hdr_len: 54, ..net(false, TCP, TSO4 | ECN, 1448) });
    }
}
