//! TCP segments as a receiver's capture has them: sizes, checksums, and what segmentation did to the headers.

use std::collections::BTreeSet;

use super::Observations;
use super::packet::{TCP, checksum, pseudo_header};
use crate::topology::Frame;

/// Longest frame that fits a wire with MTU 1500.
const FRAME_BYTES_MAX: usize = 1514;
const ETHERNET_BYTES: usize = 14;

/// One frame of a TCP connection, read. It may be longer than its wire's MTU allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Bytes of the frame, Ethernet header included.
    pub frame_bytes: usize,
    /// What TCP carries.
    pub payload: Vec<u8>,
    /// IPv4's identification.
    pub id: Option<u16>,
    /// Of its first byte.
    pub sequence: u32,
    /// TCP's control bits, FIN lowest (RFC 9293 §3.1).
    pub flags: u8,
    /// TCP's: `good`, `bad`, or `pending` where it is left to the receiver's side.
    pub checksum: &'static str,
    /// Of the IPv4 header; IPv6 has none to be bad.
    pub header_checksum_good: bool,
    ecn: u8,
    mss: Option<u16>,
}

impl Segment {
    /// Reads a TCP segment over IPv4 without options, or IPv6; another frame is none.
    #[must_use]
    pub fn read(frame: &Frame) -> Option<Self> {
        let packet = frame.bytes.get(ETHERNET_BYTES..)?;
        let (header_bytes, ends, total, id, ecn) = match packet.first()? >> 4 {
            4 => {
                let total = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
                let id = u16::from_be_bytes([packet[4], *packet.get(5)?]);
                (20, [packet.get(12..16)?, packet.get(16..20)?], total, Some(id), packet[1] & 3)
            }
            6 => {
                let total = 40 + usize::from(u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]));
                (40, [packet.get(8..24)?, packet.get(24..40)?], total, None, packet[1] >> 4 & 3)
            }
            _ => return None,
        };
        // Longer than the header's field can say: an aggregate as the kernel keeps it.
        let total = if packet.len() > usize::from(u16::MAX) { packet.len() } else { total };
        let segment = packet.get(header_bytes..total)?;
        let offset_bytes = usize::from(*segment.get(12)? >> 4) * 4;
        let sum = checksum(segment, pseudo_header(ends, TCP, segment.len()));
        let good = if frame.checksum_pending {
            "pending"
        } else if sum == 0 {
            "good"
        } else {
            "bad"
        };
        Some(Self {
            frame_bytes: frame.bytes.len(),
            payload: segment.get(offset_bytes..)?.to_vec(),
            id,
            ecn,
            sequence: u32::from_be_bytes(segment[4..8].try_into().expect("four bytes")),
            flags: segment[13],
            mss: segment
                .get(20..24)
                .filter(|option| option[..2] == [2, 4])
                .map(|option| u16::from_be_bytes([option[2], option[3]])),
            checksum: good,
            header_checksum_good: id.is_none() || checksum(&packet[..20], 0) == 0,
        })
    }
}

/// Records what a connection's frames, all of one direction, have in common.
pub(super) fn record(prefix: &str, frames: &[Frame], rows: &mut Observations) {
    let segments: Vec<_> = frames.iter().filter_map(Segment::read).collect();
    let full: Vec<_> = segments.iter().filter(|segment| !segment.payload.is_empty()).collect();
    let largest = full.iter().map(|segment| segment.frame_bytes).max().unwrap_or(0);
    let size = if largest > FRAME_BYTES_MAX { "longer than the wire's".to_owned() } else { largest.to_string() };
    rows.record(format!("{prefix}.longest_frame"), size);
    rows.record(format!("{prefix}.checksums"), set(full.iter().map(|segment| segment.checksum.to_owned())));
    let good = full.iter().all(|segment| segment.header_checksum_good);
    rows.record(format!("{prefix}.ip_header_checksums"), if good { "good" } else { "bad" });
    // RFC 3168 §6.1.5: a retransmission is never ECN-capable.
    let mut next = None;
    let mut first_sent = Vec::new();
    for segment in &full {
        if next.is_none_or(|next: u32| segment.sequence.wrapping_sub(next) < 1 << 31) {
            next = Some(segment.sequence.wrapping_add(segment.payload.len() as u32));
            first_sent.push(segment.ecn.to_string());
        }
    }
    rows.record(format!("{prefix}.ecn_of_segments"), set(first_sent.into_iter()));
    let ids: Vec<u16> = full.iter().filter_map(|segment| segment.id).collect();
    // Only between whole segments is the next number one more: an aggregate has taken several.
    if largest <= FRAME_BYTES_MAX && !ids.is_empty() {
        let steps: Vec<_> = ids.windows(2).map(|pair| pair[1].wrapping_sub(pair[0])).collect();
        // A retransmission under load takes a number too.
        let rule = steps.iter().filter(|step| **step == 1).count() * 10 >= steps.len() * 9;
        rows.record(format!("{prefix}.ip_ids"), if rule { "one more each" } else { "otherwise" });
    }
    if let Some(syn) = segments.iter().find(|segment| segment.flags & 2 != 0) {
        rows.record(format!("{prefix}.syn.flags"), format!("{:#04x}", syn.flags));
        rows.record(format!("{prefix}.syn.mss"), syn.mss.map_or("none".to_owned(), |mss| mss.to_string()));
        rows.record(format!("{prefix}.syn.frame_bytes"), syn.frame_bytes);
        rows.record(format!("{prefix}.syn.checksum"), syn.checksum);
    }
}

fn set(words: impl Iterator<Item = String>) -> String {
    let distinct: BTreeSet<_> = words.collect();
    if distinct.is_empty() { "none".to_owned() } else { distinct.into_iter().collect::<Vec<_>>().join(", ") }
}

#[cfg(test)]
mod tests {
    use super::super::packet::{IPV4, Ipv4, NOBODY4, ethernet, tcp};
    use super::*;

    #[test]
    fn a_segment_is_read_and_a_broken_checksum_seen() {
        let ends = NOBODY4.map(|end| end.octets());
        let packet = Ipv4 { tos: 2, ..Ipv4::new(TCP) }.packet(&tcp([&ends[0], &ends[1]], 0x18, &[1; 100]));
        let mut bytes = ethernet([2; 6], [4; 6], IPV4, &packet);
        let segment = Segment::read(&Frame { bytes: bytes.clone(), checksum_pending: false }).unwrap();
        assert_eq!((segment.frame_bytes, segment.payload.len(), segment.checksum), (154, 100, "good"));
        assert_eq!((segment.ecn, segment.id, segment.header_checksum_good), (2, Some(0x1234), true));
        *bytes.last_mut().unwrap() ^= 1;
        assert_eq!(Segment::read(&Frame { bytes, checksum_pending: false }).unwrap().checksum, "bad");
    }
}
