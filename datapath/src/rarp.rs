//! The frame that tells a network where a station is: a RARP request in its name (RFC 903), broadcast, as QEMU's
//! announcement of a migrated VM. No station answers it; every switch learns from it.

use crate::mac::Mac;
use crate::stage::parse::ETHERNET_BYTES;

/// The shortest Ethernet frame without its FCS.
const FRAME_BYTES: usize = 60;

/// EtherType of RARP.
const ETHERTYPE_RARP: u16 = 0x8035;

/// RFC 903: "request reverse".
const REQUEST_REVERSE: u16 = 3;

/// The announcement of `mac`.
pub fn announcement(mac: Mac) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    frame[..6].copy_from_slice(&Mac::BROADCAST.0);
    frame[6..12].copy_from_slice(&mac.0);
    frame[12..ETHERNET_BYTES].copy_from_slice(&ETHERTYPE_RARP.to_be_bytes());
    // Hardware: Ethernet, 6 bytes; protocol: IPv4, 4 bytes (RFC 826). Both protocol addresses are unknown: zero.
    frame[14..20].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame[20..22].copy_from_slice(&REQUEST_REVERSE.to_be_bytes());
    frame[22..28].copy_from_slice(&mac.0);
    frame[32..38].copy_from_slice(&mac.0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_qemus_frame() {
        // announce_self_create() of QEMU 10.0 for 52:54:00:12:34:56
        let mut expected = b"\xff\xff\xff\xff\xff\xff\x52\x54\x00\x12\x34\x56\x80\x35".to_vec();
        expected.extend(b"\x00\x01\x08\x00\x06\x04\x00\x03\x52\x54\x00\x12\x34\x56\x00\x00\x00\x00");
        expected.extend(b"\x52\x54\x00\x12\x34\x56\x00\x00\x00\x00");
        expected.resize(60, 0);
        assert_eq!(announcement(Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]))[..], expected);
    }
}
