//! The split virtqueue (VIRTIO 1.2 §2.7), device side, over cached host pointers.
//!
//! One of the files with unsafe code in this crate (see `memory.rs`). What makes each access sound: the three
//! parts of the ring were checked at set-up to lie whole and aligned in one mapped region, [`Memory`] keeps the
//! regions mapped for as long as the ring lives, indices are masked by the ring's size, and no Rust reference to guest
//! memory is made other than to an atomic. JUSTIFICATION: checked access through virtio-queue and vm-memory costs 180 ns
//! a frame against 10 ns.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};

use super::{
    BURST, BURST_DESCRIPTORS_MAX, BURST_SEGMENTS_MAX, CHAIN_DESCRIPTORS_MAX, CHAIN_SEGMENTS_MAX, FRAME_BYTES_MAX,
    MERGED_CHAINS_MAX, RING_SIZE_MAX, RingError, RingFault, RingSetup, SendError,
};
use crate::dirty_log::RingLog;
use crate::frame::{FrameFault, HEADER_COPY_BYTES, NetHeader, RawFrame, Tail};
use crate::memory::{Memory, Payload, PayloadCursor, Segment};

const DESCRIPTOR_BYTES: u64 = 16;
const FLAG_NEXT: u16 = VRING_DESC_F_NEXT as u16;
const FLAG_WRITE: u16 = VRING_DESC_F_WRITE as u16;
const FLAG_INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// `struct virtq_desc`, read once.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

/// A descriptor table that was checked to lie whole in mapped memory.
#[derive(Clone, Copy)]
struct Table {
    host: usize,
    size: u16,
}

/// Which way the buffers of a ring go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    DeviceReads,
    DeviceWrites,
}

#[derive(Debug)]
pub(super) struct SplitRing {
    memory: Arc<Memory>,
    /// Guest-physical addresses, for whoever sets the ring up anew.
    addresses: (u64, u64, u64),
    /// Host addresses of descriptor table, available ring and used ring.
    descriptors: usize,
    available: usize,
    used: usize,
    size: u16,
    net_header_bytes: u8,
    event_idx: bool,
    indirect: bool,
    mergeable: bool,
    /// Next available entry to take.
    next_avail: u16,
    /// The available index as last read, checked to be at most `size` ahead of `next_avail` at that time.
    avail_seen: u16,
    /// Next used entry to write.
    next_used: u16,
    /// The used index as the guest sees it.
    published_used: u16,
    /// Chains taken by `receive` and not completed yet, and their heads.
    taken: u16,
    heads: [u16; BURST],
    /// Pieces of guest memory of the burst (from the guest) or of the frame being written (to the guest).
    segments: Box<[Segment]>,
    segments_used: usize,
    log: Option<RingLog>,
}

impl SplitRing {
    pub(super) fn new(setup: &RingSetup) -> Result<Self, RingError> {
        let size = setup.size;
        if !size.is_power_of_two() || size > RING_SIZE_MAX {
            return Err(RingError::Size(size));
        }
        let event_idx = super::event_idx(setup.features);
        let event_bytes = if event_idx { 2 } else { 0 };
        let entries = u64::from(size);
        let part = |part, address: u64, bytes, align| {
            setup
                .memory
                .translate(address, bytes)
                .map(|host| host as usize)
                .filter(|host| address.is_multiple_of(align) && (*host as u64).is_multiple_of(align))
                .ok_or(RingError::Address { part, address, bytes })
        };
        // Alignments and sizes: VIRTIO 1.2 §2.7, table "Virtqueue Part".
        Ok(Self {
            addresses: (setup.descriptors, setup.available, setup.used),
            descriptors: part("descriptor table", setup.descriptors, DESCRIPTOR_BYTES * entries, 16)?,
            available: part("available ring", setup.available, 4 + 2 * entries + event_bytes, 2)?,
            used: part("used ring", setup.used, 4 + 8 * entries + event_bytes, 4)?,
            memory: Arc::clone(&setup.memory),
            size,
            net_header_bytes: super::net_header_bytes(setup.features) as u8,
            event_idx,
            indirect: super::indirect(setup.features),
            mergeable: super::mergeable(setup.features),
            next_avail: setup.next_avail,
            avail_seen: setup.next_avail,
            next_used: setup.next_used,
            published_used: setup.next_used,
            taken: 0,
            heads: [0; BURST],
            segments: vec![Segment::EMPTY; BURST_SEGMENTS_MAX].into_boxed_slice(),
            segments_used: 0,
            log: setup.log.clone(),
        })
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn next_avail(&self) -> u16 {
        self.next_avail.wrapping_sub(self.taken)
    }

    pub(super) fn next_used(&self) -> u16 {
        self.next_used
    }

    pub(super) fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    pub(super) fn into_memory_and_log(self) -> (Arc<Memory>, Option<RingLog>) {
        (self.memory, self.log)
    }

    pub(super) fn addresses(&self) -> (u64, u64, u64) {
        self.addresses
    }

    pub(super) fn never_used(&self) -> bool {
        self.next_avail == 0 && self.next_used == 0 && self.available_index(Ordering::Relaxed) == 0
    }

    #[inline]
    pub(super) fn receive(&mut self, frames: &mut [RawFrame]) -> Result<usize, RingFault> {
        debug_assert_eq!(self.taken, 0, "the last burst was not completed");
        let ready = usize::from(self.refresh_available(BURST as u16)?);
        let burst = ready.min(frames.len()).min(BURST);
        for index in 0..burst {
            self.heads[index] = self.available_entry(self.next_avail.wrapping_add(index as u16))?;
        }
        self.segments_used = 0;
        let mut taken = 0;
        let mut visited = 0;
        for frame in &mut frames[..burst] {
            if self.segments_used + CHAIN_SEGMENTS_MAX > BURST_SEGMENTS_MAX || visited >= BURST_DESCRIPTORS_MAX {
                break;
            }
            self.gather(self.heads[taken], frame, &mut visited)?;
            taken += 1;
        }
        self.taken = taken as u16;
        self.next_avail = self.next_avail.wrapping_add(self.taken);
        Ok(taken)
    }

    #[inline]
    pub(super) fn payload(&self, frame: &RawFrame) -> Payload<'_> {
        let first = usize::from(frame.tail.first);
        let end = first + usize::from(frame.tail.count);
        // A frame of another ring or burst would name segments that are not there: then it has no payload.
        match self.segments[..self.segments_used].get(first..end) {
            Some(segments) => Payload::segments(segments),
            None => Payload::EMPTY,
        }
    }

    /// Stages the used entries of the burst. The device wrote nothing: length 0.
    #[inline]
    pub(super) fn complete(&mut self) {
        for index in 0..usize::from(self.taken) {
            self.stage_used(self.heads[index], 0);
        }
        self.taken = 0;
        self.segments_used = 0;
    }

    #[inline]
    pub(super) fn send(&mut self, net: NetHeader, header: &[u8], payload: Payload<'_>) -> Result<(), SendError> {
        let net_header_bytes = usize::from(self.net_header_bytes);
        let need = net_header_bytes as u64 + header.len() as u64 + u64::from(payload.bytes());
        let mut chains = [(0u16, 0u32); MERGED_CHAINS_MAX];
        let mut count = 0;
        let mut room = 0u64;
        let mut visited = 0;
        self.segments_used = 0;
        while room < need {
            if count > 0 && (!self.mergeable || count == MERGED_CHAINS_MAX) {
                return Err(SendError::BufferTooSmall);
            }
            let ready = self.refresh_available(count as u16 + 1).map_err(SendError::Fault)?;
            if usize::from(ready) <= count {
                return Err(SendError::Full);
            }
            let head = self.available_entry(self.next_avail.wrapping_add(count as u16)).map_err(SendError::Fault)?;
            if self.segments_used + CHAIN_SEGMENTS_MAX > BURST_SEGMENTS_MAX
                || visited >= usize::from(CHAIN_DESCRIPTORS_MAX)
            {
                return Err(SendError::BufferTooSmall);
            }
            let bytes = self.room_in(head, &mut visited).map_err(SendError::Fault)?;
            if count == 0 && bytes < net_header_bytes as u64 {
                return Err(SendError::BufferTooSmall);
            }
            // A chain's room can exceed what is still needed, and even u32; what is written cannot.
            chains[count] = (head, bytes.min(need - room) as u32);
            count += 1;
            room += bytes;
        }
        // From here on nothing can fail: the frame is written whole.
        let net = net.to_bytes(count as u16);
        let header_payloads = [Payload::private(&net[..net_header_bytes]), Payload::private(header), payload];
        let mut segments = self.segments[..self.segments_used].iter();
        let mut into = Segment::EMPTY;
        for piece in header_payloads {
            let mut cursor = PayloadCursor::new(piece);
            let mut left = piece.bytes();
            while left > 0 {
                if into.bytes() == 0 {
                    into = *segments.next().expect("the chains have room for the whole frame");
                    continue;
                }
                let before = into.bytes();
                // SAFETY: the segments were checked against `self.memory`, which is alive.
                into = unsafe { cursor.copy_into(into) };
                left -= before - into.bytes();
            }
        }
        if let Some(log) = &self.log {
            log.written(&self.memory, &self.segments[..self.segments_used], need);
        }
        for &(head, bytes) in &chains[..count] {
            self.stage_used(head, bytes);
        }
        self.next_avail = self.next_avail.wrapping_add(count as u16);
        Ok(())
    }

    /// Publishes staged used entries; returns whether the guest wants to be notified of them.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let (old, new) = (self.published_used, self.next_used);
        if old == new {
            return false;
        }
        self.published_used = new;
        if self.log.is_some() {
            self.log_used_entries(old, new);
        }
        // Release: pairs with the driver's read barrier after it reads the used index; the entries and buffers
        // written before are visible with it (§2.7.8).
        self.used_u16(2).store(new, Ordering::Release);
        if let Some(log) = &self.log {
            log.used(2, 2);
        }
        // The store of the used index must be visible before the driver's wish is read, or both sides wait for the
        // other (§2.7.7.1, §2.7.10); pairs with the driver's barrier after it writes `used_event` or `flags`.
        fence(Ordering::SeqCst);
        if self.event_idx {
            // §2.7.7.2: notify when `used_event` lies in [old, new). u16 wraps; the subtraction is the comparison.
            let used_event = self.available_u16(4 + 2 * usize::from(self.size)).load(Ordering::Relaxed);
            new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.available_u16(0).load(Ordering::Relaxed) & NO_INTERRUPT == 0
        }
    }

    pub(super) fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            let avail_event = 4 + 8 * usize::from(self.size);
            self.used_u16(avail_event).store(self.next_avail, Ordering::Relaxed);
            if let Some(log) = &self.log {
                log.used(avail_event as u64, 2);
            }
        } else {
            self.write_flags(0);
        }
        // The wish must be visible before the index is read again; pairs with the driver's barrier between its store
        // of the available index and its reading of `avail_event` or `flags` (§2.7.10.1).
        fence(Ordering::SeqCst);
        self.available_index(Ordering::Relaxed) != self.next_avail
    }

    pub(super) fn disable_kicks(&mut self) {
        // With EVENT_IDX a stale `avail_event` asks for one kick in 65536 at most: nothing to write.
        if !self.event_idx {
            self.write_flags(NO_NOTIFY);
        }
    }

    fn write_flags(&self, flags: u16) {
        self.used_u16(0).store(flags, Ordering::Relaxed);
        if let Some(log) = &self.log {
            log.used(0, 2);
        }
    }

    /// Logs the used entries with indices from `old` to `new`, before the guest can see them.
    #[cold]
    fn log_used_entries(&self, old: u16, new: u16) {
        let Some(log) = &self.log else { return };
        let first = old & (self.size - 1);
        // At most two runs: up to the end of the ring, and from its start.
        let count = new.wrapping_sub(old);
        let before_end = count.min(self.size - first);
        for (slot, count) in [(first, before_end), (0, count - before_end)] {
            log.used(4 + 8 * u64::from(slot), 8 * u64::from(count));
        }
    }

    /// How many chains the guest has made available; the index is read again if fewer than `wanted` are known of.
    #[inline]
    fn refresh_available(&mut self, wanted: u16) -> Result<u16, RingFault> {
        let known = self.avail_seen.wrapping_sub(self.next_avail);
        if known >= wanted {
            return Ok(known);
        }
        // Acquire: pairs with the driver's write barrier before it stores the index; entries and descriptors written
        // before are visible after (§2.7.13.3).
        let index = self.available_index(Ordering::Acquire);
        let ready = index.wrapping_sub(self.next_avail);
        if ready > self.size {
            return Err(RingFault::AvailableIndex { index, next: self.next_avail, size: self.size });
        }
        self.avail_seen = index;
        Ok(ready)
    }

    #[inline]
    fn available_index(&self, ordering: Ordering) -> u16 {
        self.available_u16(2).load(ordering)
    }

    /// The head of the chain in entry `index`, checked.
    #[inline]
    fn available_entry(&self, index: u16) -> Result<u16, RingFault> {
        let slot = usize::from(index & (self.size - 1));
        let head = self.available_u16(4 + 2 * slot).load(Ordering::Relaxed);
        if head >= self.size {
            return Err(RingFault::DescriptorIndex { index: head, size: self.size });
        }
        Ok(head)
    }

    /// Copies a chain's net header and first bytes into `frame` and notes where the rest lies.
    #[inline]
    fn gather(&mut self, head: u16, frame: &mut RawFrame, visited: &mut usize) -> Result<(), RingFault> {
        let net_header_bytes = usize::from(self.net_header_bytes);
        let mut net = [0u8; NetHeader::BYTES];
        let mut net_bytes = 0;
        let mut header_bytes = 0;
        let mut tail_bytes = 0u64;
        let first = self.segments_used;
        let segments = &mut self.segments;
        let mut used = first;
        let whole = walk(
            &self.memory,
            Table { host: self.descriptors, size: self.size },
            self.indirect,
            head,
            Direction::DeviceReads,
            visited,
            |mut segment: Segment| {
                if net_bytes < net_header_bytes {
                    let bytes = segment.bytes().min((net_header_bytes - net_bytes) as u32);
                    let end = net_bytes + bytes as usize;
                    // SAFETY: the segment was checked against `self.memory`, which is alive.
                    unsafe { segment.copy_out(&mut net[net_bytes..end]) };
                    net_bytes = end;
                    segment = segment.skip(bytes);
                }
                if segment.bytes() > 0 && header_bytes < HEADER_COPY_BYTES {
                    let bytes = segment.bytes().min((HEADER_COPY_BYTES - header_bytes) as u32);
                    let end = header_bytes + bytes as usize;
                    // SAFETY: as above.
                    unsafe { segment.copy_out(&mut frame.header[header_bytes..end]) };
                    header_bytes = end;
                    segment = segment.skip(bytes);
                }
                if segment.bytes() > 0 {
                    if used - first == CHAIN_SEGMENTS_MAX {
                        return false;
                    }
                    tail_bytes += u64::from(segment.bytes());
                    segments[used] = segment;
                    used += 1;
                }
                true
            },
        )?;
        let bytes = header_bytes as u64 + tail_bytes;
        frame.net = NetHeader::from_bytes(&net);
        if !whole || bytes > u64::from(FRAME_BYTES_MAX) {
            (frame.fault, frame.header_bytes, frame.frame_bytes) = (Some(FrameFault::TooLarge), 0, 0);
            frame.tail = Tail::default();
            return Ok(());
        }
        frame.fault = (net_bytes < net_header_bytes).then_some(FrameFault::NoHeader);
        frame.header_bytes = header_bytes as u16;
        frame.frame_bytes = bytes as u32;
        frame.tail = Tail { first: first as u16, count: (used - first) as u16 };
        self.segments_used = used;
        Ok(())
    }

    /// Notes the segments of a chain that the device may write to; returns their bytes.
    #[inline]
    fn room_in(&mut self, head: u16, visited: &mut usize) -> Result<u64, RingFault> {
        let first = self.segments_used;
        let segments = &mut self.segments;
        let mut used = first;
        let mut room = 0u64;
        // A chain of more pieces than the maximum is used as far as it was noted.
        walk(
            &self.memory,
            Table { host: self.descriptors, size: self.size },
            self.indirect,
            head,
            Direction::DeviceWrites,
            visited,
            |segment: Segment| {
                if used - first == CHAIN_SEGMENTS_MAX {
                    return false;
                }
                room += u64::from(segment.bytes());
                segments[used] = segment;
                used += 1;
                true
            },
        )?;
        self.segments_used = used;
        Ok(room)
    }

    /// Writes a used entry that the guest does not see yet.
    #[inline]
    fn stage_used(&mut self, head: u16, bytes: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let entry = (self.used + 4 + 8 * slot) as *mut u64;
        // `struct virtq_used_elem`: id in the lower half, len in the upper, little-endian.
        let value = (u64::from(head) | u64::from(bytes) << 32).to_le();
        // SAFETY: `slot < size`, so the entry lies in the used ring, which is 4-byte aligned and mapped. The guest does
        // not read it before the used index is published.
        unsafe { entry.write_unaligned(value) };
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline]
    fn available_u16(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= 6 + 2 * usize::from(self.size));
        // SAFETY: callers stay in the available ring, which is 2-byte aligned and mapped while `self.memory` lives.
        unsafe { AtomicU16::from_ptr((self.available + at) as *mut u16) }
    }

    #[inline]
    fn used_u16(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= 6 + 8 * usize::from(self.size));
        // SAFETY: callers stay in the used ring, which is 4-byte aligned and mapped while `self.memory` lives.
        unsafe { AtomicU16::from_ptr((self.used + at) as *mut u16) }
    }
}

/// A u64 wherever it lies: an indirect table may have any alignment.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned(u64);

/// Reads entry `index` of a descriptor table at host address `table`, once.
///
/// # Safety
/// The table has more than `index` entries and is mapped.
#[inline]
unsafe fn descriptor(table: usize, index: u16) -> Descriptor {
    let entry = (table + usize::from(index) * DESCRIPTOR_BYTES as usize) as *const Unaligned;
    // SAFETY: by the caller's promise; `Unaligned` has no alignment. Volatile: the guest may write meanwhile, and the
    // compiler must not read twice. Two loads of 8 bytes: a volatile read of `[u8; 16]` becomes 16 loads of one.
    let (Unaligned(address), Unaligned(rest)) = unsafe { (entry.read_volatile(), entry.add(1).read_volatile()) };
    let rest = u64::from_le(rest);
    Descriptor {
        address: u64::from_le(address),
        bytes: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}

/// Walks the chain at `head`, giving each non-empty segment to `take`. Returns false if `take` did, which ends the walk.
/// Every descriptor is read once and counted in `visited`; a chain has at most as many as its table, or as the limit.
#[inline]
fn walk(
    memory: &Memory,
    mut table: Table,
    indirect: bool,
    head: u16,
    direction: Direction,
    visited: &mut usize,
    mut take: impl FnMut(Segment) -> bool,
) -> Result<bool, RingFault> {
    let mut index = head;
    let mut left = table.size.min(CHAIN_DESCRIPTORS_MAX);
    let mut in_indirect = false;
    loop {
        if index >= table.size {
            return Err(RingFault::DescriptorIndex { index, size: table.size });
        }
        if left == 0 {
            return Err(RingFault::Loop { head });
        }
        left -= 1;
        *visited += 1;
        // SAFETY: `index < table.size`; the ring's table was checked at set-up, an indirect one below.
        let entry = unsafe { descriptor(table.host, index) };
        if entry.flags & FLAG_INDIRECT != 0 {
            // §2.7.5.3.1: never nested, never with NEXT, and only if negotiated. It may have more descriptors than the
            // ring (Linux makes such); indices are 16 bits wide and reach no further than the largest ring's.
            let entries = entry.bytes / DESCRIPTOR_BYTES as u32;
            let whole = u64::from(entry.bytes).is_multiple_of(DESCRIPTOR_BYTES);
            if !indirect || in_indirect || entry.flags & FLAG_NEXT != 0 || !whole || entries == 0 {
                return Err(RingFault::Indirect { index });
            }
            let host = memory
                .translate(entry.address, u64::from(entry.bytes))
                .ok_or(RingFault::BufferAddress { address: entry.address, bytes: entry.bytes })?;
            table = Table { host: host as usize, size: entries.min(u32::from(RING_SIZE_MAX)) as u16 };
            (left, index, in_indirect) = (table.size.min(CHAIN_DESCRIPTORS_MAX), 0, true);
            continue;
        }
        let writes = entry.flags & FLAG_WRITE != 0;
        if writes != (direction == Direction::DeviceWrites) {
            return Err(RingFault::Direction { index });
        }
        if entry.bytes > 0 {
            let mut wanted = true;
            let mapped = memory.segments(entry.address, entry.bytes, |segment| {
                wanted = take(segment);
                wanted
            });
            if !wanted {
                return Ok(false);
            }
            if !mapped {
                return Err(RingFault::BufferAddress { address: entry.address, bytes: entry.bytes });
            }
        }
        if entry.flags & FLAG_NEXT == 0 {
            return Ok(true);
        }
        index = entry.next;
    }
}
