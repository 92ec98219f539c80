//! A vhost-user message: its frame, its numbers and its payloads, as both ends of the keeper speak them.
//!
//! docs/interop/vhost-user.rst, "Message Specification": header of three u32 in machine byte order, payload,
//! descriptors as ancillary data. Decoding checks lengths only; meaning is the filter's.
//! Limits: [`PAYLOAD_BYTES_MAX`], [`DESCRIPTORS_MAX`].

use std::os::fd::OwnedFd;

/// request, flags, size: three u32.
pub(super) const HEADER_BYTES: usize = 12;
/// The `vhost` crate's MAX_MSG_SIZE. The largest payload we know is SET_MEM_TABLE with 32 regions: 1032 bytes.
pub(super) const PAYLOAD_BYTES_MAX: usize = 4096;
/// Descriptors in one message; the `vhost` crate's MAX_ATTACHED_FD_ENTRIES.
pub(super) const DESCRIPTORS_MAX: usize = 32;
/// Regions in one SET_MEM_TABLE: each brings one descriptor.
pub(super) const TABLE_REGIONS_MAX: usize = DESCRIPTORS_MAX;

const _: () = assert!(PAYLOAD_BYTES_MAX >= 8 + TABLE_REGIONS_MAX * Region::BYTES);

/// Lower 2 bits of flags: the version, 1.
const FLAG_VERSION: u32 = 0x1;
const FLAG_VERSION_MASK: u32 = 0x3;
/// Bit 2: this is a reply.
const FLAG_REPLY: u32 = 1 << 2;
/// Bit 3: the front-end wants an answer (with REPLY_ACK negotiated).
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Front-end request ids ("Front-end message types").
pub(super) mod request {
    pub(in crate::keeper) const GET_FEATURES: u32 = 1;
    pub(in crate::keeper) const SET_FEATURES: u32 = 2;
    pub(in crate::keeper) const SET_OWNER: u32 = 3;
    pub(in crate::keeper) const RESET_OWNER: u32 = 4;
    pub(in crate::keeper) const SET_MEM_TABLE: u32 = 5;
    pub(in crate::keeper) const SET_LOG_BASE: u32 = 6;
    pub(in crate::keeper) const SET_LOG_FD: u32 = 7;
    pub(in crate::keeper) const SET_VRING_NUM: u32 = 8;
    pub(in crate::keeper) const SET_VRING_ADDR: u32 = 9;
    pub(in crate::keeper) const SET_VRING_BASE: u32 = 10;
    pub(in crate::keeper) const GET_VRING_BASE: u32 = 11;
    pub(in crate::keeper) const SET_VRING_KICK: u32 = 12;
    pub(in crate::keeper) const SET_VRING_CALL: u32 = 13;
    pub(in crate::keeper) const SET_VRING_ERR: u32 = 14;
    pub(in crate::keeper) const GET_PROTOCOL_FEATURES: u32 = 15;
    pub(in crate::keeper) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(in crate::keeper) const GET_QUEUE_NUM: u32 = 17;
    pub(in crate::keeper) const SET_VRING_ENABLE: u32 = 18;
    pub(in crate::keeper) const SEND_RARP: u32 = 19;
    pub(in crate::keeper) const NET_SET_MTU: u32 = 20;
    pub(in crate::keeper) const SET_BACKEND_REQ_FD: u32 = 21;
    pub(in crate::keeper) const GET_CONFIG: u32 = 24;
    pub(in crate::keeper) const SET_CONFIG: u32 = 25;
    pub(in crate::keeper) const GET_INFLIGHT_FD: u32 = 31;
    pub(in crate::keeper) const SET_INFLIGHT_FD: u32 = 32;
    pub(in crate::keeper) const RESET_DEVICE: u32 = 34;
    pub(in crate::keeper) const GET_MAX_MEM_SLOTS: u32 = 36;
    pub(in crate::keeper) const ADD_MEM_REG: u32 = 37;
    pub(in crate::keeper) const REM_MEM_REG: u32 = 38;
    pub(in crate::keeper) const SET_STATUS: u32 = 39;
    pub(in crate::keeper) const GET_STATUS: u32 = 40;

    /// The specification's name, for people.
    pub(in crate::keeper) fn name(id: u32) -> &'static str {
        match id {
            GET_FEATURES => "GET_FEATURES",
            SET_FEATURES => "SET_FEATURES",
            SET_OWNER => "SET_OWNER",
            RESET_OWNER => "RESET_OWNER",
            SET_MEM_TABLE => "SET_MEM_TABLE",
            SET_LOG_BASE => "SET_LOG_BASE",
            SET_LOG_FD => "SET_LOG_FD",
            SET_VRING_NUM => "SET_VRING_NUM",
            SET_VRING_ADDR => "SET_VRING_ADDR",
            SET_VRING_BASE => "SET_VRING_BASE",
            GET_VRING_BASE => "GET_VRING_BASE",
            SET_VRING_KICK => "SET_VRING_KICK",
            SET_VRING_CALL => "SET_VRING_CALL",
            SET_VRING_ERR => "SET_VRING_ERR",
            GET_PROTOCOL_FEATURES => "GET_PROTOCOL_FEATURES",
            SET_PROTOCOL_FEATURES => "SET_PROTOCOL_FEATURES",
            GET_QUEUE_NUM => "GET_QUEUE_NUM",
            SET_VRING_ENABLE => "SET_VRING_ENABLE",
            SEND_RARP => "SEND_RARP",
            NET_SET_MTU => "NET_SET_MTU",
            SET_BACKEND_REQ_FD => "SET_BACKEND_REQ_FD",
            GET_CONFIG => "GET_CONFIG",
            SET_CONFIG => "SET_CONFIG",
            GET_INFLIGHT_FD => "GET_INFLIGHT_FD",
            SET_INFLIGHT_FD => "SET_INFLIGHT_FD",
            RESET_DEVICE => "RESET_DEVICE",
            GET_MAX_MEM_SLOTS => "GET_MAX_MEM_SLOTS",
            ADD_MEM_REG => "ADD_MEM_REG",
            REM_MEM_REG => "REM_MEM_REG",
            SET_STATUS => "SET_STATUS",
            GET_STATUS => "GET_STATUS",
            _ => "a request this device does not know",
        }
    }
}

/// The twelve bytes in front of every message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) request: u32,
    flags: u32,
    pub(super) payload_bytes: u32,
}

impl Header {
    /// A request of ours to the session; always asks for its verdict.
    pub(super) fn request(request: u32, payload_bytes: usize) -> Self {
        Self { request, flags: FLAG_VERSION | FLAG_NEED_REPLY, payload_bytes: payload_bytes as u32 }
    }

    /// A reply to the front-end.
    pub(super) fn reply(request: u32, payload_bytes: usize) -> Self {
        Self { request, flags: FLAG_VERSION | FLAG_REPLY, payload_bytes: payload_bytes as u32 }
    }

    pub(super) fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        Self { request: word(0), flags: word(4), payload_bytes: word(8) }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&self.request.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_ne_bytes());
        bytes[8..12].copy_from_slice(&self.payload_bytes.to_ne_bytes());
        bytes
    }

    pub(super) fn version_is_known(&self) -> bool {
        self.flags & FLAG_VERSION_MASK == FLAG_VERSION
    }

    pub(super) fn is_reply(&self) -> bool {
        self.flags & FLAG_REPLY != 0
    }

    pub(super) fn flags(&self) -> u32 {
        self.flags
    }

    pub(super) fn needs_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}

/// One whole message with the descriptors that came with it.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
}

/// "A vring state description": ring index and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingNumber {
    pub(super) index: u32,
    pub(super) number: u32,
}

/// "A vring address description"; addresses are the front-end's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingAddresses {
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
    pub(super) log: u64,
}

/// "Log description": where in its file the dirty log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LogRange {
    pub(super) bytes: u64,
    pub(super) offset: u64,
}

/// "Memory region description".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) guest_address: u64,
    pub(super) bytes: u64,
    pub(super) front_end_address: u64,
    pub(super) file_offset: u64,
}

impl RingAddresses {
    /// Bit 0 of the flags, VHOST_VRING_F_LOG: writes to the used ring are logged at `log`.
    pub(super) const FLAG_LOG: u32 = 1;

    /// Where writes to the used ring are to be logged, if they are.
    pub(super) fn used_log(&self) -> Option<u64> {
        (self.flags & Self::FLAG_LOG != 0).then_some(self.log)
    }

    /// The same without the log.
    pub(super) fn encode_unlogged(&self) -> Vec<u8> {
        let mut payload = encode_ring_number(self.index, 0);
        let words = [self.descriptors, self.used, self.available, 0];
        words.iter().for_each(|word| payload.extend_from_slice(&word.to_ne_bytes()));
        payload
    }
}

impl Region {
    /// Four u64.
    pub(super) const BYTES: usize = 32;

    fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        Self {
            guest_address: word64(bytes, 0),
            bytes: word64(bytes, 8),
            front_end_address: word64(bytes, 16),
            file_offset: word64(bytes, 24),
        }
    }

    fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.guest_address, self.bytes, self.front_end_address, self.file_offset];
        for (field, word) in bytes.chunks_exact_mut(8).zip(words) {
            field.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// The u64 at `at`; the caller has checked the length.
fn word64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_ne_bytes(word)
}

fn word32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

/// Decoders give `None` if the payload's length is not exactly right (CVE-2020-10724: the length was trusted).
pub(super) fn decode_u64(payload: &[u8]) -> Option<u64> {
    (payload.len() == 8).then(|| word64(payload, 0))
}

pub(super) fn decode_ring_number(payload: &[u8]) -> Option<RingNumber> {
    (payload.len() == 8).then(|| RingNumber { index: word32(payload, 0), number: word32(payload, 4) })
}

pub(super) fn decode_ring_addresses(payload: &[u8]) -> Option<RingAddresses> {
    (payload.len() == 40).then(|| RingAddresses {
        index: word32(payload, 0),
        flags: word32(payload, 4),
        descriptors: word64(payload, 8),
        used: word64(payload, 16),
        available: word64(payload, 24),
        log: word64(payload, 32),
    })
}

pub(super) fn decode_log_range(payload: &[u8]) -> Option<LogRange> {
    (payload.len() == 16).then(|| LogRange { bytes: word64(payload, 0), offset: word64(payload, 8) })
}

/// "Multiple memory regions description": count, padding, regions. A count that the length does not bear out, or
/// beyond [`TABLE_REGIONS_MAX`], gives `None`; a count of zero is for the caller to judge.
pub(super) fn decode_regions(payload: &[u8]) -> Option<Vec<Region>> {
    let count = (payload.len() >= 8).then(|| word32(payload, 0) as usize)?;
    if count > TABLE_REGIONS_MAX || payload.len() != 8 + count * Region::BYTES {
        return None;
    }
    Some(payload[8..].as_chunks().0.iter().map(Region::decode).collect())
}

/// "Single memory region description": padding, one region.
pub(super) fn decode_region(payload: &[u8]) -> Option<Region> {
    (payload.len() == 8 + Region::BYTES).then(|| Region::decode(&payload[8..].as_chunks().0[0]))
}

pub(super) fn encode_ring_number(index: u32, number: u32) -> Vec<u8> {
    [index.to_ne_bytes(), number.to_ne_bytes()].concat()
}

pub(super) fn encode_regions<'a>(regions: impl ExactSizeIterator<Item = &'a Region>) -> Vec<u8> {
    // count and padding
    let mut payload = encode_ring_number(regions.len() as u32, 0);
    regions.for_each(|region| payload.extend_from_slice(&region.encode()));
    payload
}

pub(super) fn encode_region(region: &Region) -> Vec<u8> {
    let mut payload = vec![0; 8];
    payload.extend_from_slice(&region.encode());
    payload
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire() {
        // SET_VRING_NUM, version 1, need_reply, 8 bytes, as QEMU sends it on a little-endian machine
        let bytes = [8, 0, 0, 0, 0x9, 0, 0, 0, 8, 0, 0, 0];
        let header = Header::decode(&bytes);
        assert_eq!((header.request, header.payload_bytes), (request::SET_VRING_NUM, 8));
        assert!(header.version_is_known() && header.needs_reply() && !header.is_reply());
        assert_eq!(header.encode(), bytes);
    }

    #[test]
    fn a_region_count_that_the_length_does_not_bear_out_is_refused() {
        let region = Region { guest_address: 1, bytes: 2, front_end_address: 3, file_offset: 4 };
        let table = encode_regions([region, region].iter());
        assert_eq!(decode_regions(&table), Some(vec![region, region]));
        for count in [1u32, 3, 33, u32::MAX] {
            let mut lying = table.clone();
            lying[..4].copy_from_slice(&count.to_ne_bytes());
            assert_eq!(decode_regions(&lying), None, "count {count}");
        }
        assert_eq!(decode_regions(&table[..7]), None);
        assert_eq!(decode_region(&encode_region(&region)), Some(region));
        assert_eq!(decode_region(&table), None);
    }

    #[test]
    fn payloads_of_the_wrong_length_are_refused() {
        for length in [0, 4, 7, 9, 16] {
            assert_eq!(decode_u64(&vec![0; length]), None);
            assert_eq!(decode_ring_number(&vec![0; length]), None);
            assert_eq!(decode_ring_addresses(&vec![0; length]), None);
            assert_eq!(decode_log_range(&vec![0; length + 1]), None);
        }
    }
}
