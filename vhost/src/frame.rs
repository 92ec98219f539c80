//! A frame as a ring gives and takes it: a private copy of its first bytes, and where the rest lies.

/// Bytes at the start of a frame that are copied into private memory, and that alone are parsed. Ethernet, two VLAN
/// tags, IPv6 and TCP with all options need 122; up to here a whole private copy costs nothing extra.
pub const HEADER_COPY_BYTES: usize = 128;

/// `struct virtio_net_hdr` without `num_buffers` (VIRTIO 1.2 §5.1.6): what a guest says about a frame's checksum and
/// segmentation. Fields as read, once, in CPU byte order, and in the ring's order: most processors copy it as two words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct NetHeader {
    /// VIRTIO_NET_HDR_F_*
    pub flags: u8,
    /// VIRTIO_NET_HDR_GSO_*
    pub gso_type: u8,
    /// Bytes of all headers, a hint.
    pub hdr_len: u16,
    /// Bytes of payload in each segment.
    pub gso_size: u16,
    /// Where the checksummed part starts, bytes from the Ethernet header.
    pub csum_start: u16,
    /// Where the checksum goes, bytes from `csum_start`.
    pub csum_offset: u16,
}

impl NetHeader {
    /// Bytes on the ring before VIRTIO 1.0 without mergeable buffers.
    pub const LEGACY_BYTES: usize = 10;
    /// Bytes on the ring with `num_buffers`.
    pub const BYTES: usize = 12;

    /// Reads the little-endian layout; `num_buffers`, if there, is ignored as §5.1.6.2 demands of a device.
    #[inline]
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h, low, high, _, _] = *bytes;
        Self::from_words(u64::from_le_bytes([a, b, c, d, e, f, g, h]), u16::from_le_bytes([low, high]))
    }

    /// The first 8 bytes and the next 2, as little-endian numbers.
    #[inline]
    pub(crate) fn from_words(first: u64, csum_offset: u16) -> Self {
        Self {
            flags: first as u8,
            gso_type: (first >> 8) as u8,
            hdr_len: (first >> 16) as u16,
            gso_size: (first >> 32) as u16,
            csum_start: (first >> 48) as u16,
            csum_offset,
        }
    }

    /// The inverse of [`NetHeader::from_words`].
    #[inline]
    pub(crate) fn to_words(self) -> (u64, u16) {
        let first = u64::from(self.flags)
            | u64::from(self.gso_type) << 8
            | u64::from(self.hdr_len) << 16
            | u64::from(self.gso_size) << 32
            | u64::from(self.csum_start) << 48;
        (first, self.csum_offset)
    }

    /// Whether it says nothing: no checksum to finish, nothing to cut.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.to_words() == (0, 0)
    }

    /// The little-endian layout with `num_buffers`.
    #[inline]
    pub fn to_bytes(self, num_buffers: u16) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        for (at, word) in
            [(2, self.hdr_len), (4, self.gso_size), (6, self.csum_start), (8, self.csum_offset), (10, num_buffers)]
        {
            bytes[at..at + 2].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

/// What is written before each frame of a run: an outer header, say.
pub trait Before<const BYTES: usize, const WORDS: usize> {
    /// What is the same for all of them.
    fn same(&self) -> &[u8; BYTES];

    /// What stands there instead before this one: words of two bytes, and where. `None`: it is not to be sent.
    fn words(&mut self, frame: &RawFrame) -> Option<[(usize, [u8; 2]); WORDS]>;
}

/// Nothing.
#[derive(Debug, Clone, Copy)]
pub struct Bare;

impl Before<0, 0> for Bare {
    #[inline(always)]
    fn same(&self) -> &[u8; 0] {
        &[]
    }

    #[inline(always)]
    fn words(&mut self, _: &RawFrame) -> Option<[(usize, [u8; 2]); 0]> {
        Some([])
    }
}

/// Where the bytes behind the header copy are, in the ring or buffer that the frame was taken from. It means something
/// to that ring alone, and until the burst is completed.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tail {
    pub(crate) first: u16,
    pub(crate) count: u16,
}

/// One frame of a burst.
#[derive(Debug, Clone)]
pub struct RawFrame {
    /// Private copy of the first bytes; valid up to `header_bytes`.
    pub header: [u8; HEADER_COPY_BYTES],
    /// `min(frame_bytes, HEADER_COPY_BYTES)`.
    pub header_bytes: u16,
    /// Whole length: Ethernet header to payload, no FCS.
    pub frame_bytes: u32,
    /// What the sender said about checksum and segmentation.
    pub net: NetHeader,
    /// The bytes behind the header copy.
    pub tail: Tail,
    /// The sender's chain was unusable for a frame: count it, send it nowhere.
    pub fault: Option<FrameFault>,
}

impl RawFrame {
    /// A frame of no bytes.
    pub const EMPTY: RawFrame = RawFrame {
        header: [0; HEADER_COPY_BYTES],
        header_bytes: 0,
        frame_bytes: 0,
        net: NetHeader { flags: 0, gso_type: 0, hdr_len: 0, gso_size: 0, csum_start: 0, csum_offset: 0 },
        tail: Tail { first: 0, count: 0 },
        fault: None,
    };

    /// The private copy.
    #[inline]
    pub fn headers(&self) -> &[u8] {
        &self.header[..usize::from(self.header_bytes)]
    }

    /// Leaves nothing of it but why.
    #[cold]
    pub(crate) fn refuse(&mut self, fault: FrameFault) {
        (self.fault, self.header_bytes, self.frame_bytes, self.tail) = (Some(fault), 0, 0, Tail { first: 0, count: 0 });
    }

    /// Bytes behind the private copy.
    #[inline]
    pub fn tail_bytes(&self) -> u32 {
        self.frame_bytes - u32::from(self.header_bytes)
    }
}

/// Why a chain holds no frame although the ring is sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameFault {
    /// Not even a whole virtio-net header.
    NoHeader,
    /// More pieces or bytes than any frame has.
    TooLarge,
}
