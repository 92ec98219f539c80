//! The two messages about the in-flight region: their payload, and what must hold of it before it is mapped.
//!
//! vhost-user, "Inflight description". The region is for at most as many rings as the port has, of at most the size that
//! a ring may have (CVE-2021-3839), and what a front-end brings must really be as long as that takes. What is in it is
//! for the rings to check.

use std::os::fd::OwnedFd;

use super::filter::RING_SIZE_MAX;
use super::vet::{self, Shrink};
use crate::inflight::{Inflight, region_bytes};

/// mmap size, mmap offset, number of queues, queue size: 20 bytes, and 24 in C, where the structure is padded.
const BYTES: usize = 20;
const BYTES_PADDED: usize = 24;

/// "Inflight description".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InflightRange {
    pub(super) bytes: u64,
    pub(super) offset: u64,
    pub(super) queues: u16,
    pub(super) queue_size: u16,
}

impl InflightRange {
    /// `None` if the length is not right.
    pub(super) fn decode(payload: &[u8]) -> Option<Self> {
        if !matches!(payload.len(), BYTES | BYTES_PADDED) {
            return None;
        }
        let (words, rest) = payload.split_at(16);
        let words = words.as_chunks().0;
        let halves = rest.as_chunks().0;
        Some(Self {
            bytes: u64::from_ne_bytes(words[0]),
            offset: u64::from_ne_bytes(words[1]),
            queues: u16::from_ne_bytes(halves[0]),
            queue_size: u16::from_ne_bytes(halves[1]),
        })
    }

    /// As long as `length`, the front-end's own.
    pub(super) fn encode(&self, length: usize) -> Vec<u8> {
        let mut payload = [self.bytes.to_ne_bytes(), self.offset.to_ne_bytes()].concat();
        payload.extend([self.queues.to_ne_bytes(), self.queue_size.to_ne_bytes()].concat());
        payload.resize(length, 0);
        payload
    }

    fn check(&self, rings: usize) -> Result<(), String> {
        let Self { queues, queue_size, .. } = *self;
        if queues == 0 || usize::from(queues) > rings {
            return Err(format!("an in-flight region for {queues} rings, the port has {rings}"));
        }
        if queue_size == 0 || queue_size > RING_SIZE_MAX {
            return Err(format!("an in-flight region for rings of {queue_size}, which have 1 to {RING_SIZE_MAX}"));
        }
        Ok(())
    }
}

/// GET_INFLIGHT_FD: a new region for what the front-end asks for; what it says of size and offset means nothing.
pub(super) fn create(
    asked: &InflightRange,
    rings: usize,
    packed: bool,
) -> Result<(InflightRange, Inflight, OwnedFd), String> {
    let InflightRange { queues, queue_size, .. } = *asked;
    asked.check(rings)?;
    let (region, file) = Inflight::create(packed, queues, queue_size)
        .map_err(|error| format!("an in-flight region cannot be made: {error}"))?;
    let bytes = region_bytes(packed, queues, queue_size);
    Ok((InflightRange { bytes, offset: 0, queues, queue_size }, region, file))
}

/// SET_INFLIGHT_FD: a region that the front-end has kept. Of one for split rings there is no more mapped than those need.
pub(super) fn adopt(range: &InflightRange, file: &OwnedFd, rings: usize) -> Result<(Inflight, Shrink), String> {
    let InflightRange { bytes, offset, queues, queue_size } = *range;
    range.check(rings)?;
    let need = region_bytes(false, queues, queue_size);
    if bytes < need {
        return Err(format!("an in-flight region of {bytes:#x} bytes, {queues} rings of {queue_size} need {need:#x}"));
    }
    let shrink = vet::file_range("in-flight region", offset, bytes, file)?;
    vet::usual_pages("in-flight region", file)?;
    let packed = bytes >= region_bytes(true, queues, queue_size);
    let region = Inflight::map(file, offset, packed, queues, queue_size)
        .map_err(|error| format!("the in-flight region cannot be mapped: {error}"))?;
    Ok((region, shrink))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_description_has_one_of_two_lengths() {
        let range = InflightRange { bytes: 0x1040, offset: 0x2000, queues: 4, queue_size: 256 };
        for length in [BYTES, BYTES_PADDED] {
            assert_eq!(InflightRange::decode(&range.encode(length)), Some(range));
        }
        for length in [0, 8, 16, 19, 21, 23, 25, 40] {
            assert_eq!(InflightRange::decode(&vec![0; length]), None, "{length}");
        }
    }
}
