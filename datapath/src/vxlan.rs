//! The VXLAN header, RFC 7348 §5, with the group of draft-smith-vxlan-group-policy-05 §2.1, as Linux's `vxlan gbp` has it.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |G|R|R|R|I|R|R|R|R|D|R|R|A|R|R|R|        Group Policy ID        |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |                VXLAN Network Identifier (VNI) |   Reserved    |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! ```

use crate::vni::Vni;

/// UDP port assigned by IANA.
pub const UDP_PORT: u16 = 4789;

/// Length of the header.
pub const HEADER_BYTES: usize = 8;

/// The I flag: the VNI is valid.
const FLAG_VNI: u8 = 0x08;

/// The G flag: the group policy ID is valid.
const FLAG_GROUP: u8 = 0x80;

/// What a VXLAN header says: the segment, and the group that the frame is from; 0: none is said. One word, so that what was
/// just written is read back in one go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Header(u64);

impl Header {
    /// Both.
    #[inline]
    pub fn new(vni: Vni, group: u16) -> Self {
        Self(u64::from(group) << 32 | u64::from(vni.get()))
    }

    /// The segment.
    #[inline]
    pub fn vni(self) -> Vni {
        Vni::new(self.0 as u32).expect("it was one")
    }

    /// The group that the frame is from; 0: none is said.
    #[inline]
    pub fn group(self) -> u16 {
        (self.0 >> 32) as u16
    }
}

impl From<Vni> for Header {
    fn from(vni: Vni) -> Self {
        Self::new(vni, 0)
    }
}

/// The header as it is on the wire.
#[inline]
pub fn header(header: Header) -> [u8; HEADER_BYTES] {
    let (vni, group) = (header.vni(), header.group());
    let [_, a, b, c] = vni.get().to_be_bytes();
    let [high, low] = group.to_be_bytes();
    [if group == 0 { FLAG_VNI } else { FLAG_VNI | FLAG_GROUP }, 0, high, low, a, b, c, 0]
}

/// The header and the inner frame of a UDP payload. `None` without a whole header or
/// the I flag. Other bits are ignored, as §5 demands of a receiver. A frame to which policy was applied already (A) is
/// judged here all the same.
#[inline]
pub fn decapsulate(datagram: &[u8]) -> Option<(Header, &[u8])> {
    let (header, frame) = datagram.split_first_chunk::<HEADER_BYTES>()?;
    if header[0] & FLAG_VNI == 0 {
        return None;
    }
    let vni = Vni::new(u32::from_be_bytes([0, header[4], header[5], header[6]]))?;
    let group = if header[0] & FLAG_GROUP == 0 { 0 } else { u16::from_be_bytes([header[2], header[3]]) };
    Some((Header::new(vni, group), frame))
}

/// Range of outer source ports: the dynamic ports, as §5 recommends.
const SOURCE_PORT_MIN: u16 = 49152;
const SOURCE_PORT_MASK: u32 = 0x3fff;

/// The outer UDP source port of a flow: spreads flows over the paths of the underlay, and keeps each in order.
#[inline]
pub fn source_port(flow_hash: u32) -> u16 {
    SOURCE_PORT_MIN + (flow_hash & SOURCE_PORT_MASK) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_is_as_in_the_rfc_both_ways() {
        let vni = Vni::new(0x12_3456).unwrap();
        let bytes = [0x08, 0, 0, 0, 0x12, 0x34, 0x56, 0, 0xaa];
        assert_eq!(header(vni.into()), bytes[..8]);
        assert_eq!(decapsulate(&bytes), Some((vni.into(), &[0xaa][..])));
        let bytes = [0x88, 0, 0xab, 0xcd, 0x12, 0x34, 0x56, 0, 0xaa];
        let grouped = Header::new(vni, 0xabcd);
        assert_eq!(header(grouped), bytes[..8]);
        assert_eq!(decapsulate(&bytes), Some((grouped, &[0xaa][..])));
        assert_eq!(
            decapsulate(&[0x7f, 1, 2, 3, 0x12, 0x34, 0x56, 9]),
            Some((vni.into(), &[][..])),
            "reserved bits are ignored"
        );
    }

    #[test]
    fn no_flag_or_no_room_is_no_vxlan() {
        assert_eq!(decapsulate(&[0x00, 0, 0, 0, 0, 0, 1, 0, 0xaa]), None);
        assert_eq!(decapsulate(&[0x08, 0, 0, 0, 0, 0, 1]), None);
    }

    #[test]
    fn source_ports_are_dynamic_ports() {
        assert_eq!(source_port(0), 49152);
        assert_eq!(source_port(u32::MAX), 65535);
    }
}
