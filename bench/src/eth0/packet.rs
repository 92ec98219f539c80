//! Bytes of packets that a test makes up, with finished checksums, and the checksums of those it gets.

use std::net::{Ipv4Addr, Ipv6Addr};

pub(super) const ARP: u16 = 0x0806;
pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;

/// Raw packets go to addresses that nobody has, so that nobody answers.
pub(super) const NOBODY4: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 9, 9, 1), Ipv4Addr::new(10, 9, 9, 2)];
pub(super) const NOBODY6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 1), Ipv6Addr::new(0xfd09, 0, 0, 0, 0, 0, 0, 2)];

/// Destination, source, type, and what follows.
pub(super) fn ethernet(destination: [u8; 6], source: [u8; 6], ether_type: u16, rest: &[u8]) -> Vec<u8> {
    [&destination[..], &source[..], &ether_type.to_be_bytes(), rest].concat()
}

/// RFC 791 §3.1. `fragment` is the whole word: flags and offset in units of 8 bytes.
pub(super) struct Ipv4 {
    pub(super) tos: u8,
    pub(super) id: u16,
    pub(super) fragment: u16,
    pub(super) ttl: u8,
    pub(super) protocol: u8,
    pub(super) ends: [Ipv4Addr; 2],
    pub(super) options: Vec<u8>,
}

impl Ipv4 {
    pub(super) fn new(protocol: u8) -> Self {
        Self { tos: 0, id: 0x1234, fragment: 0, ttl: 64, protocol, ends: NOBODY4, options: Vec::new() }
    }

    pub(super) fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let header_bytes = 20 + self.options.len();
        let total = (header_bytes + payload.len()) as u16;
        let mut bytes = vec![0x40 | (header_bytes / 4) as u8, self.tos];
        bytes.extend(total.to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        bytes.extend(self.fragment.to_be_bytes());
        bytes.extend([self.ttl, self.protocol, 0, 0]);
        bytes.extend(self.ends[0].octets());
        bytes.extend(self.ends[1].octets());
        bytes.extend(&self.options);
        let sum = checksum(&bytes, 0);
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(payload);
        bytes
    }
}

/// RFC 8200 §3.
pub(super) fn ipv6(traffic_class: u8, next_header: u8, ends: [Ipv6Addr; 2], payload: &[u8]) -> Vec<u8> {
    let mut bytes = (0x6000_0000 | u32::from(traffic_class) << 20 | 0xabcde).to_be_bytes().to_vec();
    bytes.extend((payload.len() as u16).to_be_bytes());
    bytes.extend([next_header, 64]);
    bytes.extend(ends[0].octets());
    bytes.extend(ends[1].octets());
    bytes.extend(payload);
    bytes
}

/// RFC 768, over the pseudo header with these addresses.
pub(super) fn udp(ends: [&[u8]; 2], ports: [u16; 2], payload: &[u8]) -> Vec<u8> {
    let mut bytes = [ports[0].to_be_bytes(), ports[1].to_be_bytes()].concat();
    bytes.extend((8 + payload.len() as u16).to_be_bytes());
    bytes.extend([0, 0]);
    bytes.extend(payload);
    let sum = checksum(&bytes, pseudo_header(ends, UDP, bytes.len()));
    bytes[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    bytes
}

/// A segment without options; RFC 9293 §3.1.
pub(super) fn tcp(ends: [&[u8]; 2], flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x9c, 0x40, 0x23, 0x28, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    bytes.extend(payload);
    let sum = checksum(&bytes, pseudo_header(ends, TCP, bytes.len()));
    bytes[16..18].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// RFC 1071 over whole words from `start`, complemented.
pub(super) fn checksum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = u64::from(start);
    for pair in bytes.chunks(2) {
        sum += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The sum, not complemented, of the pseudo header (RFC 9293 §3.1, RFC 8200 §8.1).
pub(super) fn pseudo_header(ends: [&[u8]; 2], protocol: u8, length: usize) -> u32 {
    let words = ends.into_iter().flat_map(|end| end.chunks(2));
    words.map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>() + u32::from(protocol) + length as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_a_real_packet() {
        // IPv4 header of RFC 1071's kind: the sum over a header with its checksum is zero.
        let packet = Ipv4::new(UDP).packet(&[]);
        assert_eq!(checksum(&packet, 0), 0);
        let ends = NOBODY4.map(|end| end.octets());
        let ends = [&ends[0][..], &ends[1][..]];
        let datagram = udp(ends, [1, 2], b"odd");
        assert_eq!(checksum(&datagram, pseudo_header(ends, UDP, datagram.len())), 0);
        let segment = tcp(ends, 2, b"");
        assert_eq!(checksum(&segment, pseudo_header(ends, TCP, segment.len())), 0);
    }
}
