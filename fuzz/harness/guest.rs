//! A guest's memory for the ring harnesses, on the heap, so that AddressSanitizer sees an access one byte outside of a
//! region. Two regions of 4 KiB that are neighbours for the guest alone, and one behind a hole; the ring's parts lie at 0,
//! 0x400 and 0x800 of the first.
#![allow(dead_code, reason = "each harness uses a part of it")]

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::sync::Arc;

use dreamwire_vhost::frame::{Bare, NetHeader, RawFrame};
use dreamwire_vhost::memory::{Memory, Payload};
use dreamwire_vhost::ring::{FRAME_BYTES_MAX, Ring, RingSetup};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

pub(crate) const REGION_BYTES: usize = 4096;
const REGIONS: [u64; 3] = [0, 0x1000, 0x4000];
pub(crate) const AVAILABLE: u64 = 0x400;
pub(crate) const USED: u64 = 0x800;
/// Transport and net features that the ring looks at: indirect, EVENT_IDX, VERSION_1, mergeable.
const FEATURES: [u64; 4] = [1 << 28, 1 << 29, 1 << 32, 1 << 15];
/// Entries of a ring at most, and of the table at the start of the second region.
pub(crate) const ENTRIES_MAX: u16 = 64;

pub(crate) struct Guest {
    regions: [*mut u8; 3],
    memory: Arc<Memory>,
}

impl Guest {
    pub(crate) fn new() -> Self {
        let layout = Layout::from_size_align(REGION_BYTES, 4096).expect("a page");
        let regions = REGIONS.map(|_| {
            // SAFETY: the layout has a size; never freed.
            let region = unsafe { alloc_zeroed(layout) };
            if region.is_null() { handle_alloc_error(layout) } else { region }
        });
        let mapped = regions.into_iter().zip(REGIONS).map(|(region, at)| {
            // SAFETY: the allocation lives as long as the process.
            let region = unsafe { MmapRegion::<()>::build_raw(region, REGION_BYTES, 3, 1) }.expect("an aligned page");
            GuestRegionMmap::new(region, GuestAddress(at)).expect("addresses that do not wrap")
        });
        let mapped = GuestMemoryMmap::from_regions(mapped.collect()).expect("regions in order");
        Self { regions, memory: Arc::new(Memory::new(Arc::new(mapped)).expect("room for three regions")) }
    }

    /// Features by the upper bits of `shape`, and a ring of them that starts at `position`.
    pub(crate) fn setup(&self, shape: u8, size: u16, position: u16) -> RingSetup {
        RingSetup {
            memory: Arc::clone(&self.memory),
            size,
            descriptors: 0,
            available: AVAILABLE,
            used: USED,
            next_avail: position,
            next_used: position,
            features: (0..4).filter(|bit| shape >> (3 + bit) & 1 != 0).map(|bit| FEATURES[bit]).sum(),
            enabled: true,
            kick: None,
            call: None,
            error: None,
            inflight: None,
            fault: None,
            log: None,
        }
    }

    pub(crate) fn clear(&self) {
        for region in self.regions {
            // SAFETY: a region's own bytes; nobody else touches them now.
            unsafe { region.write_bytes(0, REGION_BYTES) }
        }
    }

    /// The third region: buffers, net headers, frames.
    pub(crate) fn fill_buffers(&self, mut byte: impl FnMut() -> u8) {
        for at in 0..REGION_BYTES {
            // SAFETY: as in `clear`.
            unsafe { self.regions[2].add(at).write(byte()) }
        }
    }

    /// Writes two bytes of the first region.
    pub(crate) fn set(&self, at: u64, value: u16) {
        assert!(at as usize + 2 <= REGION_BYTES);
        // SAFETY: inside of the region.
        unsafe { self.regions[0].add(at as usize).cast::<u16>().write_unaligned(value) }
    }

    /// Reads two bytes of the first region.
    pub(crate) fn get(&self, at: u64) -> u16 {
        assert!(at as usize + 2 <= REGION_BYTES);
        // SAFETY: as in `set`.
        unsafe { self.regions[0].add(at as usize).cast::<u16>().read_unaligned() }
    }

    /// Entry `entry` of the table at the start of a region: two words.
    pub(crate) fn set_entry(&self, region: usize, entry: u16, words: [u64; 2]) {
        assert!(entry < ENTRIES_MAX);
        // SAFETY: at most 64 entries of 16 bytes at the start of a region.
        unsafe { self.regions[region].add(16 * usize::from(entry)).cast::<[u64; 2]>().write_unaligned(words) }
    }
}

/// Address and length of a descriptor that is likely to mean something: near guest memory, or at the ends of their range.
pub(crate) fn buffer([a, b, c, d, ends]: [u8; 5]) -> (u64, u32) {
    let (address, bytes) = (u64::from(u16::from_le_bytes([a, b])), u32::from(u16::from_le_bytes([c, d])));
    let address = if ends & 1 == 0 { address & 0x5fff } else { u64::MAX - address };
    (address, if ends & 6 == 6 { u32::MAX - bytes } else { bytes })
}

/// What was received can be read, and is as long as it says.
pub(crate) fn check_frames(ring: &Ring, frames: &[RawFrame]) {
    for frame in frames {
        assert!(frame.frame_bytes <= FRAME_BYTES_MAX);
        let payload = ring.payload(frame);
        assert_eq!(payload.bytes(), frame.tail_bytes());
        let mut copy = vec![0; payload.bytes() as usize];
        payload.copy_out(&mut copy);
    }
}

/// Sends three frames of these bytes in a run; returns how many went in.
pub(crate) fn send_run(ring: &mut Ring, header: &[u8], payload: &[u8]) -> u16 {
    let frame_bytes = (header.len() + payload.len()) as u32;
    let mut frame = RawFrame { header_bytes: header.len() as u16, frame_bytes, ..RawFrame::EMPTY };
    frame.header[..header.len()].copy_from_slice(header);
    let frames = [frame.clone(), frame.clone(), frame];
    let net = |number| (number == 1).then_some(NetHeader::default());
    let payload_of = |_| Payload::private(payload);
    // To a driver that is near, or far.
    let sent = match payload.len() % 2 {
        0 => ring.send_run::<false, _, _>(&frames, Bare, net, payload_of),
        _ => ring.send_run::<true, _, _>(&frames, Bare, net, payload_of),
    };
    sent.map_or(0, |sent| sent.frames as u16)
}
