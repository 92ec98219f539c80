//! The virtio-net header before every frame (VIRTIO 1.2 §5.1.6), and feature bits by name.

/// Bits of [`VirtioNetHeader::flags`] and values of its `gso_type`.
pub mod bits {
    /// flags: checksum from csum_start on is still to be computed.
    pub const NEEDS_CSUM: u8 = 1;
    /// flags: the device has checked the checksum.
    pub const DATA_VALID: u8 = 2;
    /// gso_type: no segmentation.
    pub const GSO_NONE: u8 = 0;
    /// gso_type: TCP over IPv4.
    pub const GSO_TCPV4: u8 = 1;
    /// gso_type: UDP fragmentation.
    pub const GSO_UDP: u8 = 3;
    /// gso_type: TCP over IPv6.
    pub const GSO_TCPV6: u8 = 4;
    /// gso_type: UDP segmentation.
    pub const GSO_UDP_L4: u8 = 5;
    /// gso_type, or-ed: ECN is in use.
    pub const GSO_ECN: u8 = 0x80;
}

/// Feature bits as masks.
pub mod feature {
    /// The device takes frames with NEEDS_CSUM.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes frames with NEEDS_CSUM.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver takes large TCP/IPv4 frames.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes large TCP/IPv6 frames.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The device takes large TCP/IPv4 frames.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes large TCP/IPv6 frames.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The device takes large TCP frames with ECN.
    pub const HOST_ECN: u64 = 1 << 13;
    /// The device takes large UDP datagrams to be fragmented.
    pub const HOST_UFO: u64 = 1 << 14;
    /// A received frame may span several buffers.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// More than one queue pair.
    pub const MQ: u64 = 1 << 22;
    /// The device can log the pages it writes.
    pub const VHOST_LOG_ALL: u64 = 1 << 26;
    /// A descriptor may point to a table.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// used_event and avail_event.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Protocol features of vhost-user can be negotiated.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// Not a legacy device.
    pub const VERSION_1: u64 = 1 << 32;
    /// Packed rings instead of split ones.
    pub const RING_PACKED: u64 = 1 << 34;
    /// Buffers are used in the order in which they became available.
    pub const IN_ORDER: u64 = 1 << 35;
    /// The device takes large UDP datagrams to be cut into datagrams.
    pub const HOST_USO: u64 = 1 << 56;
}

/// Length of the header that a driver and device with these features exchange, bytes (VIRTIO 1.2 §5.1.6.1:
/// num_buffers exists with VERSION_1 or MRG_RXBUF).
pub fn header_bytes(features: u64) -> usize {
    if features & (feature::VERSION_1 | feature::MRG_RXBUF) != 0 { HEADER_BYTES_MAX } else { 10 }
}

/// Longest header that we speak, bytes.
pub const HEADER_BYTES_MAX: usize = 12;

/// struct virtio_net_hdr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VirtioNetHeader {
    /// [`bits`].
    pub flags: u8,
    /// [`bits`].
    pub gso_type: u8,
    /// Bytes of Ethernet, IP and transport headers, of a frame to be segmented.
    pub hdr_len: u16,
    /// Payload bytes per segment.
    pub gso_size: u16,
    /// Where the checksum begins, bytes into the frame.
    pub csum_start: u16,
    /// Where it is written, bytes after csum_start.
    pub csum_offset: u16,
    /// Buffers that the frame spans. The driver sends 0.
    pub num_buffers: u16,
}

impl VirtioNetHeader {
    /// As it lies in memory; a header of 10 bytes is the first ten.
    #[inline]
    pub fn to_bytes(self) -> [u8; HEADER_BYTES_MAX] {
        let mut bytes = [0; HEADER_BYTES_MAX];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.hdr_len.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_le_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.num_buffers.to_le_bytes());
        bytes
    }

    /// The reverse of [`Self::to_bytes`].
    pub fn from_bytes(bytes: [u8; HEADER_BYTES_MAX]) -> Self {
        let (first, last) = words(bytes);
        Self::from_words(first, last)
    }

    /// The reverse of [`Self::from_words`].
    pub fn to_words(self) -> (u64, u32) {
        words(self.to_bytes())
    }

    /// From the little-endian words of its first eight and last four bytes: twelve bytes copied as a block and then taken
    /// apart stall the core for as long as the rest of a frame takes.
    #[inline(always)]
    pub fn from_words(first: u64, last: u32) -> Self {
        Self {
            flags: first as u8,
            gso_type: (first >> 8) as u8,
            hdr_len: (first >> 16) as u16,
            gso_size: (first >> 32) as u16,
            csum_start: (first >> 48) as u16,
            csum_offset: last as u16,
            num_buffers: (last >> 16) as u16,
        }
    }
}

fn words(bytes: [u8; HEADER_BYTES_MAX]) -> (u64, u32) {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    (u64::from(word(0)) | u64::from(word(4)) << 32, word(8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_has_the_layout_of_the_specification() {
        let header = VirtioNetHeader {
            flags: 1,
            gso_type: 4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 2,
        };
        let bytes = [1, 4, 54, 0, 0xa8, 5, 34, 0, 16, 0, 2, 0];
        assert_eq!(header.to_bytes(), bytes);
        assert_eq!(VirtioNetHeader::from_bytes(bytes), header);
    }

    #[test]
    fn legacy_header_without_mergeable_buffers_is_ten_bytes() {
        assert_eq!(header_bytes(0), 10);
        assert_eq!(header_bytes(feature::MRG_RXBUF), 12);
        assert_eq!(header_bytes(feature::VERSION_1), 12);
    }
}
