//! Test frames: Ethernet, IPv4, UDP, then a magic number, a sequence number and a pattern that follows from both. Longer than
//! an MTU, they are TCP instead: one frame for the device or the receiver to cut (TSO).
//!
//! A [`FlowSet`] is all the frames that a generator repeats for ever. Frame `n` belongs to flow `n % flows` and says `n` in
//! its payload, so that the receiver knows from 12 bytes what all the others have to be.

use std::net::Ipv4Addr;

use crate::front_end::header::{VirtioNetHeader, bits};

/// Smallest frame: Ethernet's 64 less FCS.
pub const FRAME_BYTES_MIN: usize = 60;
/// Largest frame: an MTU of 1500 and a VLAN tag's worth more, as generators offer "1518".
pub const FRAME_BYTES_MAX: usize = 1518;
/// Largest frame to be segmented: IPv4's total length and an Ethernet header.
pub const SEGMENTED_BYTES_MAX: usize = 65535 + ETHERNET_BYTES;
/// The usual frame to be segmented: 45 segments of 1448 bytes, as much as 64 KiB hold, and headers.
pub const SEGMENTED_BYTES: usize = 45 * SEGMENT_BYTES as usize + TCP_HEADERS_BYTES;
/// TCP payload per segment: an MTU of 1500 and time stamps.
const SEGMENT_BYTES: u16 = 1448;
/// Flows at most. They differ in the UDP source port, then in the destination port.
pub const FLOWS_MAX: usize = 1 << 20;
/// Source ports, from `SOURCE_PORT` up.
const SOURCE_PORTS: u32 = 32768;

const ETHERNET_BYTES: usize = 14;
const IPV4_BYTES: usize = 20;
const UDP_BYTES: usize = 8;
const TCP_BYTES: usize = 20;
/// Where the checksum lies in a TCP frame.
pub(super) const TCP_CHECKSUM_AT: usize = ETHERNET_BYTES + IPV4_BYTES + 16;
/// IPv4's number of TCP.
const TCP: u8 = 6;
/// Ethernet, IPv4 and UDP headers.
pub const HEADERS_BYTES: usize = ETHERNET_BYTES + IPV4_BYTES + UDP_BYTES;
/// Ethernet, IPv4 and TCP headers.
const TCP_HEADERS_BYTES: usize = ETHERNET_BYTES + IPV4_BYTES + TCP_BYTES;
/// Where the sequence number lies in a UDP frame: after the magic.
pub const SEQUENCE_AT: usize = HEADERS_BYTES + MAGIC.len();
/// Six bytes: then the end of the sequence number is the end of a cache line, behind a virtio-net header of 12 bytes.
const SEQUENCE_BYTES: usize = 6;
/// From magic to pattern.
const MARK_BYTES: usize = MAGIC.len() + SEQUENCE_BYTES;
const _: () = assert!(HEADERS_BYTES + MARK_BYTES <= FRAME_BYTES_MIN);

/// First four bytes of a test frame's payload.
pub const MAGIC: [u8; 4] = *b"DWTF";
/// Source port of flow 0.
const SOURCE_PORT: u16 = 16384;
/// Destination port of the first flows: discard.
const DESTINATION_PORT: u16 = 9;
/// Destination ports of all flows.
pub const DESTINATION_PORTS: std::ops::RangeInclusive<u16> =
    DESTINATION_PORT..=DESTINATION_PORT + ((FLOWS_MAX - 1) / SOURCE_PORTS as usize) as u16;

/// A sender or receiver of test frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its IPv4 address.
    pub address: Ipv4Addr,
}

/// The frames that go round.
#[derive(Clone, Debug)]
pub struct FlowSet {
    frames: Vec<Vec<u8>>,
    flows: usize,
}

impl FlowSet {
    /// At least `least` frames of `bytes` bytes (without FCS) in `flows` flows, a multiple of the flows. Above
    /// [`FRAME_BYTES_MAX`] they are to be segmented, in one flow.
    ///
    /// # Panics
    /// If `bytes` or `flows` are outside of this file's limits.
    pub fn new(from: Endpoint, to: Endpoint, bytes: usize, flows: usize, least: usize) -> Self {
        assert!((1..=FLOWS_MAX).contains(&flows), "{flows} flows: 1 to {FLOWS_MAX}");
        let count = least.max(1).next_multiple_of(flows);
        let make = |sequence: usize| match bytes {
            ..=FRAME_BYTES_MAX => udp_frame(from, to, bytes, (sequence % flows) as u32, sequence as u64),
            _ => tcp_frame(from, to, bytes, sequence as u64),
        };
        assert!(bytes <= FRAME_BYTES_MAX || flows == 1, "frames to be segmented come in one flow");
        Self { frames: (0..count).map(make).collect(), flows }
    }

    /// Whether its frames are to be segmented.
    pub fn is_segmented(&self) -> bool {
        self.frames[0].len() > FRAME_BYTES_MAX
    }

    /// The virtio-net header that they are sent with.
    pub fn header(&self) -> VirtioNetHeader {
        if !self.is_segmented() {
            return VirtioNetHeader::default();
        }
        VirtioNetHeader {
            flags: bits::NEEDS_CSUM,
            gso_type: bits::GSO_TCPV4,
            hdr_len: TCP_HEADERS_BYTES as u16,
            gso_size: SEGMENT_BYTES,
            csum_start: (ETHERNET_BYTES + IPV4_BYTES) as u16,
            csum_offset: 16,
            num_buffers: 0,
        }
    }

    /// What may stand in the place of the TCP checksum of a frame to be segmented: the sum of the pseudo header as the frame
    /// is sent with, and the same without the length. The latter is what DPDK asks for on the way to a NIC, and what was
    /// seen to come out of OVS-DPDK 3.1 at a VM's port. `None` if the frames are whole.
    pub fn pseudo_sums(&self) -> Option<[u16; 2]> {
        let frame = &self.frames[0];
        let sent = u16::from_be_bytes([frame[TCP_CHECKSUM_AT], frame[TCP_CHECKSUM_AT + 1]]);
        self.is_segmented().then(|| [sent, sum(u32::from(TCP), &frame[26..34])])
    }

    /// How much later than in a UDP frame magic and sequence number come.
    pub fn mark_shift(&self) -> usize {
        if self.is_segmented() { TCP_BYTES - UDP_BYTES } else { 0 }
    }

    /// The frames, by sequence number.
    pub fn frames(&self) -> &[Vec<u8>] {
        &self.frames
    }

    /// Number of flows.
    pub fn flows(&self) -> usize {
        self.flows
    }
}

/// One test frame of `bytes` bytes without FCS, all checksums valid.
///
/// # Panics
/// If `bytes` is outside of [`FRAME_BYTES_MIN`] to [`FRAME_BYTES_MAX`].
pub fn frame(from: Endpoint, to: Endpoint, bytes: usize, flow: u16, sequence: u64) -> Vec<u8> {
    udp_frame(from, to, bytes, flow.into(), sequence)
}

fn udp_frame(from: Endpoint, to: Endpoint, bytes: usize, flow: u32, sequence: u64) -> Vec<u8> {
    assert!((FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&bytes), "frames of {bytes} bytes");
    let mut frame = ip_packet(from, to, bytes, 17);
    let udp_bytes = (bytes - ETHERNET_BYTES - IPV4_BYTES) as u16;
    frame.extend((SOURCE_PORT + (flow % SOURCE_PORTS) as u16).to_be_bytes());
    frame.extend((DESTINATION_PORT + (flow / SOURCE_PORTS) as u16).to_be_bytes());
    frame.extend(udp_bytes.to_be_bytes());
    frame.extend([0, 0]);
    fill(&mut frame, bytes, sequence);

    let checksum = udp_checksum(&frame);
    frame[40..42].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// RFC 768: over a pseudo header of addresses, protocol and length; zero means none and is sent as ones. `frame` has
/// zeros in its place, or a checksum to be verified: then the result is 0xffff.
pub(super) fn udp_checksum(frame: &[u8]) -> u16 {
    let pseudo = sum(17 + (frame.len() - ETHERNET_BYTES - IPV4_BYTES) as u32, &frame[26..34]);
    match !sum(u32::from(pseudo), &frame[34..]) {
        0 => 0xffff,
        checksum => checksum,
    }
}

/// One TCP frame, to be segmented: its checksum is that of the pseudo header, as a guest leaves it.
fn tcp_frame(from: Endpoint, to: Endpoint, bytes: usize, sequence: u64) -> Vec<u8> {
    assert!((FRAME_BYTES_MIN..=SEGMENTED_BYTES_MAX).contains(&bytes), "frames of {bytes} bytes");
    let mut frame = ip_packet(from, to, bytes, TCP);
    let tcp_bytes = (bytes - ETHERNET_BYTES - IPV4_BYTES) as u32;
    let pseudo = sum(u32::from(TCP) + tcp_bytes, &frame[26..34]);
    frame.extend(SOURCE_PORT.to_be_bytes());
    frame.extend(DESTINATION_PORT.to_be_bytes());
    // RFC 9293 §3.1: sequence and acknowledgement numbers, header length, ACK, window, checksum, urgent pointer.
    frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff]);
    frame.extend(pseudo.to_be_bytes());
    frame.extend([0, 0]);
    fill(&mut frame, bytes, sequence);
    frame
}

/// Ethernet and IPv4 headers of a frame of `bytes`.
fn ip_packet(from: Endpoint, to: Endpoint, bytes: usize, protocol: u8) -> Vec<u8> {
    let mut frame = Vec::with_capacity(bytes);
    frame.extend(to.mac);
    frame.extend(from.mac);
    frame.extend([0x08, 0x00]);
    // RFC 791 §3.1: version and header length, TOS, total length, identification, DF, TTL, protocol, checksum, addresses.
    frame.extend([0x45, 0]);
    frame.extend(((bytes - ETHERNET_BYTES) as u16).to_be_bytes());
    frame.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    frame.extend(from.address.octets());
    frame.extend(to.address.octets());
    let checksum = !sum(0, &frame[ETHERNET_BYTES..]);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// Magic, sequence number (its low six bytes) and pattern.
fn fill(frame: &mut Vec<u8>, bytes: usize, sequence: u64) {
    frame.extend(MAGIC);
    frame.extend(&sequence.to_be_bytes()[8 - SEQUENCE_BYTES..]);
    for at in frame.len()..bytes {
        frame.push(pattern(sequence, at));
    }
}

/// Differs between neighbouring bytes and neighbouring frames, so that a shifted or mixed-up copy shows.
fn pattern(sequence: u64, at: usize) -> u8 {
    (at as u64).wrapping_mul(31).wrapping_add(sequence.wrapping_mul(131)) as u8
}

/// RFC 1071: the ones' complement sum of 16-bit words, folded.
pub(super) fn sum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = start;
    for word in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Endpoint = Endpoint { mac: [0x52, 0x54, 0, 0, 0, 1], address: Ipv4Addr::new(10, 0, 0, 1) };
    const B: Endpoint = Endpoint { mac: [0x52, 0x54, 0, 0, 0, 2], address: Ipv4Addr::new(10, 0, 0, 2) };

    #[test]
    fn headers_are_those_of_the_rfcs() {
        let frame = frame(A, B, 64, 3, 7);
        assert_eq!(frame.len(), 64);
        #[rustfmt::skip]
        let headers = [
            0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1, 0x08, 0x00,
            0x45, 0, 0, 50, 0, 0, 0x40, 0, 64, 17, 0x26, 0xb9, 10, 0, 0, 1, 10, 0, 0, 2,
            0x40, 0x03, 0, 9, 0, 30,
        ];
        assert_eq!(frame[..40], headers);
        assert_eq!(frame[42..52], [b'D', b'W', b'T', b'F', 0, 0, 0, 0, 0, 7]);
    }

    #[test]
    fn checksum_is_that_of_rfc_1071() {
        assert_eq!(sum(0, &[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), 0xddf2, "§3, example");
    }

    #[test]
    fn both_checksums_verify_at_all_sizes() {
        for bytes in FRAME_BYTES_MIN..=FRAME_BYTES_MAX {
            let frame = frame(A, B, bytes, 9, bytes as u64 * 977);
            assert_eq!(sum(0, &frame[14..34]), 0xffff, "IPv4, {bytes} bytes");
            let pseudo = sum(17 + bytes as u32 - 34, &frame[26..34]);
            assert_eq!(sum(u32::from(pseudo), &frame[34..]), 0xffff, "UDP, {bytes} bytes");
        }
    }

    #[test]
    fn a_frame_to_be_segmented_has_the_sum_of_its_pseudo_header() {
        let set = FlowSet::new(A, B, SEGMENTED_BYTES, 1, 3);
        let (frame, header) = (&set.frames()[2], set.header());
        assert_eq!((frame.len(), set.mark_shift()), (65214, 12));
        assert_eq!(frame[54..64], [b'D', b'W', b'T', b'F', 0, 0, 0, 0, 0, 2]);
        // What whoever finishes the checksum computes is the checksum of pseudo header and segment.
        let finished = !sum(0, &frame[usize::from(header.csum_start)..]);
        let mut whole = frame.clone();
        let at = usize::from(header.csum_start + header.csum_offset);
        whole[at..at + 2].copy_from_slice(&finished.to_be_bytes());
        let pseudo = sum(6 + (frame.len() - 34) as u32, &whole[26..34]);
        assert_eq!(sum(u32::from(pseudo), &whole[34..]), 0xffff);
    }

    #[test]
    fn flows_beyond_the_source_ports_differ_in_the_destination_port() {
        let set = FlowSet::new(A, B, 60, 40_000, 1);
        let mut ports: Vec<_> = set.frames().iter().map(|frame| frame[34..38].to_vec()).collect();
        ports.sort_unstable();
        ports.dedup();
        assert_eq!(ports.len(), 40_000);
        assert_eq!(set.frames()[32768][36..38], [0, 10]);
    }

    #[test]
    fn set_is_a_whole_number_of_rounds_through_its_flows() {
        let set = FlowSet::new(A, B, 64, 1000, 256);
        assert_eq!((set.frames().len(), set.flows()), (1000, 1000));
        let set = FlowSet::new(A, B, 64, 100, 256);
        assert_eq!(set.frames().len(), 300);
        assert_eq!(set.frames()[101][34..36], set.frames()[1][34..36]);
        assert_ne!(set.frames()[101], set.frames()[1]);
    }
}
