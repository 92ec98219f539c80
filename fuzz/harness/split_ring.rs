//! A split ring all of whose content is the guest's: descriptor tables, indices, buffers, features.
//!
//! Used by the fuzz target and by `vhost/tests/fuzz_regressions.rs`. Guest memory lies on the heap, so that
//! AddressSanitizer sees an access one byte outside of a region. Layout: two regions of 4 KiB that are neighbours for the
//! guest alone, and one behind a hole; the ring's parts at 0, 0x400 and 0x800 of the first.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::sync::Arc;

use dreamwire_vhost::frame::{NetHeader, RawFrame};
use dreamwire_vhost::memory::{Memory, Payload};
use dreamwire_vhost::ring::{BURST, FRAME_BYTES_MAX, Ring, RingSetup};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

const REGION_BYTES: usize = 4096;
const REGIONS: [u64; 3] = [0, 0x1000, 0x4000];
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
/// Transport and net features that the ring looks at: indirect, EVENT_IDX, VERSION_1, mergeable.
const FEATURES: [u64; 4] = [1 << 28, 1 << 29, 1 << 32, 1 << 15];

struct Guest {
    regions: [*mut u8; 3],
    memory: Arc<Memory>,
}

thread_local! {
    /// Made once: fuzzers run a case in microseconds.
    static GUEST: Guest = Guest::new();
}

impl Guest {
    fn new() -> Self {
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

    /// Zeros everywhere, then what `bytes` says: available index and entries, descriptors of 8 bytes each (first the
    /// ring's, then a table at the start of the second region), and what is left as the third region's bytes.
    fn fill(&self, size: u16, first: u16, bytes: &[u8]) {
        let mut bytes = bytes.iter().copied();
        let mut byte = || bytes.next().unwrap_or(0);
        for region in self.regions {
            // SAFETY: a region's own bytes; nobody else touches them now.
            unsafe { region.write_bytes(0, REGION_BYTES) }
        }
        let flags = byte();
        self.set_available(2, first.wrapping_add(u16::from(byte()) % (size + 2)));
        self.set_available(0, u16::from(flags));
        for slot in 0..usize::from(size) {
            // One more than there are, now and then.
            self.set_available(4 + 2 * slot, u16::from(byte()) % (size + 1));
        }
        self.set_available(4 + 2 * usize::from(size), u16::from(byte()));
        for table in [0, 1] {
            for entry in 0..if table == 0 { usize::from(size) } else { 32 } {
                let descriptor: [u8; 8] = std::array::from_fn(|_| byte());
                self.describe(table, entry, descriptor, size);
            }
        }
        for at in 0..REGION_BYTES {
            // SAFETY: as above.
            unsafe { self.regions[2].add(at).write(byte()) }
        }
    }

    fn set_available(&self, at: usize, value: u16) {
        // SAFETY: the available ring of at most 64 entries lies in the first region.
        unsafe { self.regions[0].add(AVAILABLE as usize + at).cast::<u16>().write_unaligned(value) }
    }

    /// A descriptor that is likely to mean something: address and length near guest memory or at the ends of their range.
    fn describe(&self, region: usize, entry: usize, [a, b, c, d, flags, next, ends, _]: [u8; 8], size: u16) {
        let (address, bytes) = (u64::from(u16::from_le_bytes([a, b])), u32::from(u16::from_le_bytes([c, d])));
        let address = if ends & 1 == 0 { address & 0x5fff } else { u64::MAX - address };
        let bytes = if ends & 6 == 6 { u32::MAX - bytes } else { bytes };
        let rest = u64::from(bytes) | u64::from(flags & 7) << 32 | u64::from(u16::from(next) % (size + 1)) << 48;
        // SAFETY: at most 64 entries of 16 bytes at the start of a region.
        unsafe {
            let place = self.regions[region].add(16 * entry).cast::<u64>();
            place.write_unaligned(address);
            place.add(1).write_unaligned(rest);
        }
    }
}

pub(crate) fn run(bytes: &[u8]) {
    let [shape, turns, first, length_low, length_high, rest @ ..] = bytes else { return };
    let size = 1u16 << (shape & 7).min(6);
    // Before zero, so that indices wrap.
    let first = u16::from(*first).wrapping_sub(32);
    let features = (0..4).filter(|bit| shape >> (3 + bit) & 1 != 0).map(|bit| FEATURES[bit]).sum();
    GUEST.with(|guest| {
        guest.fill(size, first, rest);
        let setup = RingSetup {
            memory: Arc::clone(&guest.memory),
            size,
            descriptors: 0,
            available: AVAILABLE,
            used: USED,
            next_avail: first,
            next_used: first,
            features,
            enabled: true,
            kick: None,
            call: None,
            error: None,
            fault: None,
            log: None,
        };
        let ring = Ring::new(setup).expect("a ring of at most 64 entries has room");
        let frame_bytes = usize::from(u16::from_le_bytes([*length_low, *length_high]));
        if turns & 1 == 0 { receive(guest, ring, turns >> 1) } else { send(guest, ring, turns >> 1, frame_bytes) }
    });
}

fn receive(guest: &Guest, mut ring: Ring, turns: u8) {
    let mut frames = vec![RawFrame::EMPTY; BURST];
    for _ in 0..=(turns & 7) {
        let (avail, used) = (ring.next_avail(), ring.next_used());
        let Ok(count) = ring.receive(&mut frames) else {
            assert!(ring.is_broken());
            assert!(ring.receive(&mut frames).is_err(), "a broken ring stays broken");
            return;
        };
        for frame in &frames[..count] {
            assert!(frame.frame_bytes <= FRAME_BYTES_MAX);
            let payload = ring.payload(frame);
            assert_eq!(payload.bytes(), frame.tail_bytes());
            let mut copy = vec![0; payload.bytes() as usize];
            payload.copy_out(&mut copy);
        }
        ring.complete();
        let moved = (ring.next_avail().wrapping_sub(avail), ring.next_used().wrapping_sub(used));
        assert_eq!(moved, (count as u16, count as u16), "each chain is given back once");
        ring.enable_kicks();
        ring.disable_kicks();
        guest.set_available(2, ring.next_avail().wrapping_add(u16::from(turns >> 3)));
    }
}

fn send(guest: &Guest, mut ring: Ring, turns: u8, frame_bytes: usize) {
    let frame = vec![0xa5; frame_bytes];
    let (header, payload) = frame.split_at(frame_bytes.min(128));
    for _ in 0..=(turns & 7) {
        let (avail, used) = (ring.next_avail(), ring.next_used());
        let sent = ring.send(NetHeader::default(), header, Payload::private(payload));
        let moved = (ring.next_avail().wrapping_sub(avail), ring.next_used().wrapping_sub(used));
        assert_eq!(moved.0, moved.1);
        assert_eq!(sent.is_ok(), moved.0 > 0, "all of a frame, or nothing");
        ring.flush();
        guest.set_available(2, ring.next_avail().wrapping_add(u16::from(turns >> 3)));
    }
}
