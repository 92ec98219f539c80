//! What an Ethernet frame from the wire is: a tunnel's packet, something for this host itself, or neither.
//!
//! Everything is read from the private copy of the frame's first bytes. Whatever the wire says of lengths is held against
//! the frame's own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::outer::{IPV4_BYTES, IPV6_BYTES, PROTOCOL_UDP, UDP_BYTES};
use crate::checksum::Sum;
use crate::drop_reason::DropReason;
use crate::mac::Mac;
use crate::stage::parse::{ETHERNET_BYTES, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6};
use crate::vxlan;

pub(super) const PROTOCOL_ICMP: u8 = 1;
pub(super) const PROTOCOL_ICMPV6: u8 = 58;
/// RFC 8200 §4.5.
const PROTOCOL_FRAGMENT: u8 = 44;
/// RFC 791 §3.1: "more fragments" and the offset.
const FRAGMENT_MASK: u16 = 0x3fff;

/// This host on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Station {
    /// Its card.
    pub(crate) mac: Mac,
    /// Its VTEP.
    pub(crate) address: IpAddr,
    /// UDP port of the tunnels.
    pub(crate) udp_port: u16,
}

/// See the module's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Opened {
    /// A tunnel's packet.
    Tunnel(TunnelPacket),
    /// ARP, neighbour discovery or ICMP.
    Host,
    /// Neither.
    Drop(DropReason),
}

/// Where things are in a tunnel's packet: bytes from the Ethernet header. All of it lies within the frame, and its headers
/// within the private copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TunnelPacket {
    /// Whose it is.
    pub(crate) vtep: IpAddr,
    /// What its VXLAN header says.
    pub(crate) tunnel: vxlan::Header,
    /// Start of the UDP header.
    pub(crate) udp_at: usize,
    /// Bytes of UDP header and what follows it.
    pub(crate) udp_bytes: usize,
    /// Whether there is a UDP checksum; then it is to be verified.
    pub(crate) is_summed: bool,
}

impl TunnelPacket {
    /// Start of the inner frame.
    #[inline]
    pub(crate) fn inner_at(&self) -> usize {
        self.udp_at + UDP_BYTES + vxlan::HEADER_BYTES
    }

    /// Bytes of the inner frame.
    #[inline]
    pub(crate) fn inner_bytes(&self) -> usize {
        self.udp_bytes - UDP_BYTES - vxlan::HEADER_BYTES
    }

    /// Whether the UDP checksum over `udp` (the whole datagram with its header) is right.
    pub(crate) fn verify(&self, headers: &[u8], udp: Sum) -> bool {
        let addresses = if self.vtep.is_ipv4() {
            &headers[ETHERNET_BYTES + 12..ETHERNET_BYTES + 20]
        } else {
            &headers[ETHERNET_BYTES + 8..ETHERNET_BYTES + 40]
        };
        let pseudo = Sum::default().pseudo_header(addresses, PROTOCOL_UDP, self.udp_bytes as u32);
        let [high, low] = udp.folded();
        // With the checksum itself a right sum is all ones (RFC 1071 §1).
        pseudo.word(u16::from_be_bytes([high, low])).checksum() == [0, 0]
    }
}

/// What packets of one sender into one network have in common over IPv4: Ethernet and IP header, destination port and VXLAN header,
/// without what differs from packet to packet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Alike([u64; 5]);

impl Alike {
    const UDP_AT: usize = ETHERNET_BYTES + IPV4_BYTES;
    const BYTES: usize = Self::UDP_AT + UDP_BYTES + vxlan::HEADER_BYTES;

    /// Of a packet that was opened; `None` if it is to be summed, or is none over IPv4 without options.
    pub(crate) fn of(packet: &TunnelPacket, headers: &[u8]) -> Option<Self> {
        let is_plain = packet.udp_at == Self::UDP_AT && packet.vtep.is_ipv4() && !packet.is_summed;
        Some(Self::read(headers.first_chunk().filter(|_| is_plain)?))
    }

    #[inline(always)]
    fn read(header: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| header[at + byte]));
        // Of IP all but DSCP, ECN, lengths, identification, TTL and checksum; of UDP the destination port and the checksum.
        let (types, fragment) = (word(8) & 0x00ff_ffff_ffff_ffff, word(20) & 0x0000_0000_ff00_ffff);
        let udp = u64::from(header[36]) << 32 | u64::from(header[37]) << 40;
        let sum = u64::from(header[40]) << 48 | u64::from(header[41]) << 56;
        Self([word(0), types, fragment | udp | sum, word(26), word(42)])
    }

    /// The bytes of a packet's inner frame if it is alike and sound.
    #[inline(always)]
    pub(crate) fn open(&self, headers: &[u8], frame_bytes: usize) -> Option<usize> {
        let header: &[u8; Self::BYTES] = headers.first_chunk()?;
        let (ip_bytes, udp_bytes) = (be16(header, ETHERNET_BYTES + 2), be16(header, Self::UDP_AT + 4));
        let is_sound = ETHERNET_BYTES + ip_bytes <= frame_bytes
            && IPV4_BYTES + udp_bytes <= ip_bytes
            && udp_bytes >= UDP_BYTES + vxlan::HEADER_BYTES
            && std::iter::zip(Self::read(header).0, self.0).fold(0, |differs, (one, other)| differs | (one ^ other))
                == 0
            && Sum::default().bytes(&header[ETHERNET_BYTES..Self::UDP_AT]).checksum() == [0, 0];
        is_sound.then(|| udp_bytes - UDP_BYTES - vxlan::HEADER_BYTES)
    }

    /// Start of the inner frame.
    pub(crate) const INNER_AT: usize = Self::BYTES;
}

#[inline(always)]
fn be16(bytes: &[u8], at: usize) -> usize {
    usize::from(u16::from_be_bytes([bytes[at], bytes[at + 1]]))
}

/// Looks at the first bytes of a frame that is `frame_bytes` long.
#[inline]
pub(crate) fn open(station: &Station, headers: &[u8], frame_bytes: usize) -> Opened {
    match open_plain(station, headers, frame_bytes) {
        Some(packet) => Opened::Tunnel(packet),
        None => open_any(station, headers, frame_bytes),
    }
}

/// The straight line to what [`open_any`] finds in nearly all packets: VXLAN over IPv4 without options, whole, for this host.
#[inline(always)]
fn open_plain(station: &Station, headers: &[u8], frame_bytes: usize) -> Option<TunnelPacket> {
    const UDP_AT: usize = ETHERNET_BYTES + IPV4_BYTES;
    let IpAddr::V4(here) = station.address else { return None };
    let header: &[u8; UDP_AT + UDP_BYTES + vxlan::HEADER_BYTES] = headers.first_chunk()?;
    let (ethernet, packet) = header.split_first_chunk::<ETHERNET_BYTES>()?;
    let (ip, udp) = packet.split_first_chunk::<IPV4_BYTES>()?;
    let word = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    let (ip_bytes, udp_bytes) = (usize::from(word(ip, 2)), usize::from(word(udp, 4)));
    let is_plain = ethernet[..6] == station.mac.0
        && word(ethernet, 12) == ETHERTYPE_IPV4
        && ip[0] == 0x45
        && word(ip, 6) & FRAGMENT_MASK == 0
        && ip[9] == PROTOCOL_UDP
        && ip[16..] == here.octets()
        && word(udp, 2) == station.udp_port
        && ETHERNET_BYTES + ip_bytes <= frame_bytes
        && IPV4_BYTES + udp_bytes <= ip_bytes
        && udp_bytes >= UDP_BYTES + vxlan::HEADER_BYTES
        && Sum::default().bytes(ip).checksum() == [0, 0];
    let (tunnel, _) = vxlan::decapsulate(&udp[UDP_BYTES..]).filter(|_| is_plain)?;
    let vtep = Ipv4Addr::new(ip[12], ip[13], ip[14], ip[15]).into();
    Some(TunnelPacket { vtep, tunnel, udp_at: UDP_AT, udp_bytes, is_summed: word(udp, 6) != 0 })
}

fn open_any(station: &Station, headers: &[u8], frame_bytes: usize) -> Opened {
    let Some((ethernet, packet)) = headers.split_first_chunk::<ETHERNET_BYTES>() else {
        return Opened::Drop(DropReason::TooShort);
    };
    let to = Mac([ethernet[0], ethernet[1], ethernet[2], ethernet[3], ethernet[4], ethernet[5]]);
    if to != station.mac && !to.is_group() {
        return Opened::Drop(DropReason::NotForHost);
    }
    let packet_bytes = frame_bytes - ETHERNET_BYTES;
    let opened = match u16::from_be_bytes([ethernet[12], ethernet[13]]) {
        ETHERTYPE_IPV4 => open_ipv4(station, packet, packet_bytes),
        ETHERTYPE_IPV6 => open_ipv6(station, packet, packet_bytes),
        ETHERTYPE_ARP => Opened::Host,
        _ => Opened::Drop(DropReason::NotForHost),
    };
    match opened {
        // A packet for one host in a frame for many is nobody's (RFC 1122 §3.3.6).
        Opened::Tunnel(_) if to != station.mac => Opened::Drop(DropReason::NotForHost),
        opened => opened,
    }
}

fn open_ipv4(station: &Station, packet: &[u8], packet_bytes: usize) -> Opened {
    let word = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
    let bad = Opened::Drop(DropReason::BadEncapsulation);
    if packet.len() < IPV4_BYTES || packet[0] >> 4 != 4 {
        return bad;
    }
    let header_bytes = usize::from(packet[0] & 0xf) * 4;
    let total_bytes = usize::from(word(2));
    if header_bytes < IPV4_BYTES
        || packet.len() < header_bytes
        || total_bytes < header_bytes
        || total_bytes > packet_bytes
    {
        return bad;
    }
    if Sum::default().bytes(&packet[..header_bytes]).checksum() != [0, 0] {
        return Opened::Drop(DropReason::OuterChecksum);
    }
    let address = |at: usize| Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]);
    if IpAddr::V4(address(16)) != station.address {
        return Opened::Drop(DropReason::NotForHost);
    }
    if word(6) & FRAGMENT_MASK != 0 {
        return Opened::Drop(DropReason::OuterFragment);
    }
    match packet[9] {
        PROTOCOL_UDP => {
            let udp = &packet[header_bytes..];
            open_udp(station, udp, total_bytes - header_bytes, address(12).into(), ETHERNET_BYTES + header_bytes)
        }
        PROTOCOL_ICMP => Opened::Host,
        _ => Opened::Drop(DropReason::NotForHost),
    }
}

fn open_ipv6(station: &Station, packet: &[u8], packet_bytes: usize) -> Opened {
    if packet.len() < IPV6_BYTES || packet[0] >> 4 != 6 {
        return Opened::Drop(DropReason::BadEncapsulation);
    }
    let payload_bytes = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
    if IPV6_BYTES + payload_bytes > packet_bytes {
        return Opened::Drop(DropReason::BadEncapsulation);
    }
    let address = |at: usize| {
        let octets: [u8; 16] = packet[at..at + 16].try_into().expect("16 bytes were sliced");
        Ipv6Addr::from(octets)
    };
    let to = address(24);
    match packet[6] {
        // Solicitations come to a group; whether it is ours is seen when it is read.
        PROTOCOL_ICMPV6 if to.is_multicast() => Opened::Host,
        _ if IpAddr::V6(to) != station.address => Opened::Drop(DropReason::NotForHost),
        PROTOCOL_UDP => {
            open_udp(station, &packet[IPV6_BYTES..], payload_bytes, address(8).into(), ETHERNET_BYTES + IPV6_BYTES)
        }
        PROTOCOL_ICMPV6 => Opened::Host,
        PROTOCOL_FRAGMENT => Opened::Drop(DropReason::OuterFragment),
        _ => Opened::Drop(DropReason::NotForHost),
    }
}

/// `udp` is what the private copy has of the datagram's `bytes` bytes.
fn open_udp(station: &Station, udp: &[u8], bytes: usize, vtep: IpAddr, udp_at: usize) -> Opened {
    let bad = Opened::Drop(DropReason::BadEncapsulation);
    // The copy may have bytes behind the packet's end: Ethernet's padding.
    let udp = &udp[..udp.len().min(bytes)];
    if udp.len() < UDP_BYTES {
        return bad;
    }
    let word = |at: usize| u16::from_be_bytes([udp[at], udp[at + 1]]);
    if word(2) != station.udp_port {
        return Opened::Drop(DropReason::NotForHost);
    }
    let udp_bytes = usize::from(word(4));
    if udp_bytes < UDP_BYTES || udp_bytes > bytes {
        return bad;
    }
    let datagram = &udp[UDP_BYTES..udp.len().min(udp_bytes)];
    match vxlan::decapsulate(datagram) {
        Some((tunnel, _)) => Opened::Tunnel(TunnelPacket { vtep, tunnel, udp_at, udp_bytes, is_summed: word(6) != 0 }),
        None => bad,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::underlay::outer::{Ends, OuterHeader};
    use crate::vni::Vni;

    const OURS: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const THEIRS: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn station(address: &str) -> Station {
        Station { mac: OURS, address: address.parse().unwrap(), udp_port: 4789 }
    }

    /// From `there` to `here`, with 200 bytes in it.
    fn packet(here: &str, there: &str) -> Vec<u8> {
        let ends = Ends {
            source: (THEIRS, there.parse().unwrap()),
            destination: (OURS, here.parse().unwrap()),
            udp_port: 4789,
        };
        let mut outer = OuterHeader::new(&ends, Vni::new(7).unwrap().into()).unwrap();
        let inner: Vec<u8> = (0..200).map(|n| n as u8).collect();
        let mut frame = outer.finish_summed(200, 5, Sum::default().bytes(&inner)).to_vec();
        frame.extend(inner);
        frame
    }

    fn opened(address: &str, frame: &[u8]) -> Opened {
        open(&station(address), &frame[..frame.len().min(128)], frame.len())
    }

    fn ipv4() -> Vec<u8> {
        packet("192.0.2.1", "192.0.2.2")
    }

    /// The reason for an IPv4 packet whose header was changed, with a right header checksum again.
    fn reason_for(change: impl FnOnce(&mut [u8])) -> Opened {
        let mut frame = ipv4();
        change(&mut frame);
        frame[24..26].copy_from_slice(&[0, 0]);
        let sum = Sum::default().bytes(&frame[14..34]).checksum();
        frame[24..26].copy_from_slice(&sum);
        opened("192.0.2.1", &frame)
    }

    #[test]
    fn what_this_host_would_send_is_taken_both_families() {
        for (here, there, udp_at, is_summed) in
            [("192.0.2.1", "192.0.2.2", 34, false), ("2001:db8::1", "2001:db8::2", 54, true)]
        {
            let frame = packet(here, there);
            let Opened::Tunnel(found) = opened(here, &frame) else { panic!("no tunnel packet") };
            let vni = Vni::new(7).unwrap();
            assert_eq!(
                found,
                TunnelPacket { vtep: there.parse().unwrap(), tunnel: vni.into(), udp_at, udp_bytes: 216, is_summed }
            );
            assert_eq!((found.inner_at(), found.inner_bytes()), (frame.len() - 200, 200));
            if is_summed {
                assert!(found.verify(&frame[..128], Sum::default().bytes(&frame[udp_at..])));
                let mut wrong = frame.clone();
                wrong[150] ^= 1;
                assert!(!found.verify(&wrong[..128], Sum::default().bytes(&wrong[udp_at..])));
            }
        }
    }

    proptest! {
        /// Whatever is changed in a packet: if it still passes for one like the first, opening it finds the same.
        #[test]
        fn what_is_alike_is_what_opening_finds(
            changes in proptest::collection::vec((0..60usize, any::<u8>()), 0..3),
            lengths in proptest::option::of((0..300u16, 0..300u16)),
            is_summed_again: bool,
            cut in prop_oneof![3 => Just(250), 1 => 40..250usize],
        ) {
            let first = ipv4();
            let Opened::Tunnel(opened_first) = opened("192.0.2.1", &first) else { panic!("no tunnel packet") };
            let alike = Alike::of(&opened_first, &first[..128]).unwrap();
            prop_assert_eq!(alike.open(&first[..128], first.len()), Some(200));
            let mut frame = first;
            for (at, value) in changes {
                frame[at] = value;
            }
            if let Some((ip_bytes, udp_bytes)) = lengths {
                frame[16..18].copy_from_slice(&ip_bytes.to_be_bytes());
                frame[38..40].copy_from_slice(&udp_bytes.to_be_bytes());
            }
            if is_summed_again {
                frame[24..26].copy_from_slice(&[0, 0]);
                let sum = Sum::default().bytes(&frame[14..34]).checksum();
                frame[24..26].copy_from_slice(&sum);
            }
            frame.truncate(cut);
            if let Some(inner_bytes) = alike.open(&frame[..frame.len().min(128)], frame.len()) {
                let Opened::Tunnel(found) = opened("192.0.2.1", &frame) else { panic!("alike, but no tunnel packet") };
                prop_assert_eq!((found.vtep, found.tunnel), (opened_first.vtep, opened_first.tunnel));
                prop_assert_eq!((found.inner_at(), found.inner_bytes()), (Alike::INNER_AT, inner_bytes));
                prop_assert!(!found.is_summed);
            }
        }
    }

    #[test]
    fn a_packet_with_ip_options_has_none_alike() {
        let mut frame = ipv4();
        frame.splice(34..34, [1; 4]);
        (frame[14], frame[17]) = (0x46, frame[17] + 4);
        frame[24..26].copy_from_slice(&[0, 0]);
        let sum = Sum::default().bytes(&frame[14..38]).checksum();
        frame[24..26].copy_from_slice(&sum);
        let Opened::Tunnel(found) = opened("192.0.2.1", &frame) else { panic!("no tunnel packet") };
        assert!(found.udp_at == 38 && Alike::of(&found, &frame[..128]).is_none());
    }

    #[test]
    fn packets_that_are_summed_have_none_alike() {
        for (here, change) in [("192.0.2.1", 41), ("2001:db8::1", 0)] {
            let there = if change == 0 { "2001:db8::2" } else { "192.0.2.2" };
            let mut frame = packet(here, there);
            frame[change] |= u8::from(change != 0);
            let Opened::Tunnel(found) = opened(here, &frame) else { panic!("no tunnel packet") };
            assert!(found.is_summed && Alike::of(&found, &frame[..128]).is_none(), "{here}");
        }
    }

    #[test]
    fn padding_behind_the_packet_is_not_the_inner_frame_s() {
        let mut frame = ipv4();
        frame.extend([0xee; 9]);
        let Opened::Tunnel(found) = opened("192.0.2.1", &frame) else { panic!("no tunnel packet") };
        assert_eq!(found.inner_bytes(), 200);
    }

    #[test]
    fn ipv4_options_are_skipped() {
        let plain = ipv4();
        let mut frame = plain[..34].to_vec();
        frame.extend([1; 40]);
        frame.extend(&plain[34..]);
        frame[14] = 0x4f;
        frame[16..18].copy_from_slice(&(plain.len() as u16 - 14 + 40).to_be_bytes());
        frame[24..26].copy_from_slice(&[0, 0]);
        let sum = Sum::default().bytes(&frame[14..74]).checksum();
        frame[24..26].copy_from_slice(&sum);
        let Opened::Tunnel(found) = opened("192.0.2.1", &frame) else { panic!("no tunnel packet") };
        assert_eq!((found.udp_at, found.inner_bytes()), (74, 200));
    }

    type Case<'a> = (DropReason, &'a dyn Fn(&mut [u8]));

    #[test]
    fn each_wrong_packet_has_its_reason() {
        use DropReason::{BadEncapsulation, NotForHost, OuterChecksum, OuterFragment};
        let cases: [Case<'_>; 14] = [
            (NotForHost, &|f| f[5] = 9),
            (NotForHost, &|f| f[..6].fill(0xff)),
            (NotForHost, &|f| f[12..14].copy_from_slice(&[0x81, 0])),
            (NotForHost, &|f| f[33] = 9),
            (NotForHost, &|f| f[23] = 6),
            (NotForHost, &|f| f[37] = 0),
            (OuterFragment, &|f| f[20] = 0x20),
            (OuterFragment, &|f| f[21] = 1),
            (BadEncapsulation, &|f| f[14] = 0x65),
            (BadEncapsulation, &|f| f[14] = 0x44),
            (BadEncapsulation, &|f| f[16] = 0xff),
            (BadEncapsulation, &|f| f[38] = 0xff),
            (BadEncapsulation, &|f| f[38..40].copy_from_slice(&[0, 15])),
            (BadEncapsulation, &|f| f[42] = 0),
        ];
        for (number, (reason, change)) in cases.iter().enumerate() {
            assert_eq!(reason_for(change), Opened::Drop(*reason), "case {number}");
        }
        let mut frame = ipv4();
        frame[24] ^= 1;
        assert_eq!(opened("192.0.2.1", &frame), Opened::Drop(OuterChecksum));
        let mut frame = packet("2001:db8::1", "2001:db8::2");
        frame[20] = 44;
        assert_eq!(opened("2001:db8::1", &frame), Opened::Drop(OuterFragment));
        frame[20] = 0;
        assert_eq!(opened("2001:db8::1", &frame), Opened::Drop(NotForHost), "hop-by-hop options");
    }

    #[test]
    fn every_truncated_packet_is_dropped() {
        for (here, frame) in [("192.0.2.1", ipv4()), ("2001:db8::1", packet("2001:db8::1", "2001:db8::2"))] {
            for bytes in 0..frame.len() {
                assert!(matches!(opened(here, &frame[..bytes]), Opened::Drop(_)), "{bytes} bytes");
            }
        }
    }

    proptest! {
        #[test]
        fn the_straight_line_finds_what_the_general_way_finds(
            changes in proptest::collection::vec((0..50usize, any::<u8>()), 0..3), sum: bool, bytes in prop_oneof![4 => 250..260usize, 1 => 40..250usize],
        ) {
            let mut frame = ipv4();
            frame.resize(bytes, 0);
            changes.iter().filter(|(at, _)| *at < bytes).for_each(|&(at, byte)| frame[at] = byte);
            if sum {
                frame[24..26].fill(0);
                let sum = Sum::default().bytes(&frame[14..34]).checksum();
                frame[24..26].copy_from_slice(&sum);
            }
            let headers = &frame[..bytes.min(128)];
            let station = station("192.0.2.1");
            if let Some(packet) = open_plain(&station, headers, bytes) {
                prop_assert_eq!(Opened::Tunnel(packet), open_any(&station, headers, bytes));
            }
            prop_assert!(open_plain(&station, &ipv4()[..128], ipv4().len()).is_some());
        }

        #[test]
        fn no_bytes_make_it_panic_or_look_outside(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), valid: bool, v6: bool) {
            let (here, there) = if v6 { ("2001:db8::1", "2001:db8::2") } else { ("192.0.2.1", "192.0.2.2") };
            if valid {
                // The start of a real one, then rubbish.
                let start = packet(here, there);
                let keep = bytes.len().min(40);
                bytes[..keep].copy_from_slice(&start[..keep]);
            }
            if let Opened::Tunnel(found) = opened(here, &bytes) {
                prop_assert!(found.udp_at + found.udp_bytes <= bytes.len());
                prop_assert!(found.inner_at() <= 128);
            }
        }
    }
}
