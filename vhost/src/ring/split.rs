//! The split virtqueue (VIRTIO 1.2 §2.7), device side, over cached host pointers.
//!
//! One of the files with unsafe code in this crate (see `memory.rs`). What makes each access sound: the three
//! parts of the ring were checked at set-up to lie whole and aligned in one mapped region, [`Memory`] keeps the
//! regions mapped for as long as the ring lives, indices are masked by the ring's size, and no Rust reference to guest
//! memory is made other than to an atomic. JUSTIFICATION: checked access through virtio-queue and vm-memory costs 180 ns
//! a frame against 10 ns.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::buffers::{Buffers, Direction, Way};
use super::inflight_split::SplitTracker;
use super::split_chain::{DESCRIPTOR_BYTES, Table, descriptor, walk};
use super::split_entries::{Heads, Posted, UsedEntries};
use super::split_resumed::Resumed;
use super::{
    BURST, BURST_DESCRIPTORS_MAX, CHAIN_DESCRIPTORS_MAX, MERGED_CHAINS_MAX, RING_SIZE_MAX, RingError, RingFault,
    RingSetup, SendError, Sent,
};
use crate::dirty_log::RingLog;
use crate::distance::{decoy_if, timed_load};
use crate::frame::{Before, HEADER_COPY_BYTES, NetHeader, RawFrame};
use crate::inflight::InflightPart;
use crate::memory::{Memory, Payload, Segment};

const NO_INTERRUPT: u16 = VRING_AVAIL_F_NO_INTERRUPT as u16;
const NO_NOTIFY: u16 = VRING_USED_F_NO_NOTIFY as u16;

/// Chains that are noted: a burst that was taken, and the next one.
const NOTED_MAX: usize = 2 * BURST;

#[derive(Debug)]
pub(super) struct SplitRing {
    buffers: Buffers,
    /// Guest-physical addresses, for whoever sets the ring up anew.
    addresses: (u64, u64, u64),
    /// Host addresses of descriptor table, available ring and used ring.
    descriptors: usize,
    available: usize,
    used: usize,
    size: u16,
    event_idx: bool,
    indirect: bool,
    mergeable: bool,
    /// Next available entry to take.
    next_avail: u16,
    /// The available index as last read, checked to be at most `size` ahead of `next_avail` at that time.
    avail_seen: u16,
    /// The same, unchecked, when that cache line was here last.
    line_seen: u16,
    /// Next used entry to write.
    next_used: u16,
    /// The used index as the guest sees it.
    published_used: u16,
    /// Chains taken by `receive` and not completed yet.
    taken: u16,
    /// Entry `index` of the available ring at `index % NOTED_MAX`: of those that are taken, and of the next, up to `posted_end`.
    posted: [Posted; NOTED_MAX],
    posted_end: u16,
    inflight: Option<Box<SplitTracker>>,
    /// Chains of the device before us that are to be served first.
    resumed: Option<Box<Resumed>>,
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
        let descriptors = part("descriptor table", setup.descriptors, DESCRIPTOR_BYTES * entries, 16)?;
        let available = part("available ring", setup.available, 4 + 2 * entries + event_bytes, 2)?;
        let used = part("used ring", setup.used, 4 + 8 * entries + event_bytes, 4)?;
        let opened = setup.inflight.as_ref().map(|part| SplitTracker::open(part, setup.next_used));
        let (inflight, found) = opened.map_or((None, None), |(tracker, found)| (Some(Box::new(tracker)), found));
        // Whoever was there before has taken what it gave back and what is in flight, and the latter counts as not taken yet:
        // the front-end's word may be older.
        let next_avail = if found.is_some() { setup.next_used } else { setup.next_avail };
        let resumed = found.and_then(|heads| Resumed::new(next_avail, heads)).map(Box::new);
        Ok(Self {
            addresses: (setup.descriptors, setup.available, setup.used),
            descriptors,
            available,
            used,
            buffers: Buffers::new(setup),
            size,
            event_idx,
            indirect: super::indirect(setup.features),
            mergeable: super::mergeable(setup.features),
            next_avail,
            avail_seen: next_avail,
            line_seen: next_avail,
            next_used: setup.next_used,
            published_used: setup.next_used,
            taken: 0,
            posted: [Posted::GENERAL; NOTED_MAX],
            posted_end: next_avail,
            inflight,
            resumed,
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
        &self.buffers.memory
    }

    #[inline]
    pub(super) fn is_far(&self) -> bool {
        self.buffers.distance.is_far()
    }

    #[inline]
    pub(super) fn is_logged(&self) -> bool {
        self.buffers.log.is_some()
    }

    pub(super) fn into_shared(self) -> (Arc<Memory>, Option<RingLog>, Option<InflightPart>) {
        (self.buffers.memory, self.buffers.log, self.inflight.map(|tracker| tracker.part().clone()))
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
        if burst == 0 {
            return Ok(0);
        }
        // All buffers before any is read: cache misses then overlap.
        self.note_up_to(burst as u16, Direction::DeviceReads);
        self.buffers.clear();
        let (mut taken, mut visited) = (0u16, 0);
        for frame in &mut frames[..burst] {
            let index = self.next_avail.wrapping_add(taken);
            let place = usize::from(index) % NOTED_MAX;
            let buffer = self.posted[place].buffer;
            if buffer.bytes() > 0 {
                if buffer.bytes() > HEADER_COPY_BYTES as u32 && !self.buffers.has_room() {
                    break;
                }
                self.buffers.gather_one(buffer, frame);
            } else {
                if !self.buffers.has_room() || visited >= BURST_DESCRIPTORS_MAX {
                    break;
                }
                let head = self.available_entry(index)?;
                self.posted[place].head = head;
                self.gather(head, frame, &mut visited)?;
            }
            taken += 1;
        }
        self.taken = taken;
        self.next_avail = self.next_avail.wrapping_add(taken);
        if self.inflight.is_some() {
            self.track_taken();
        }
        Ok(usize::from(taken))
    }

    /// Asks for the frames of the next burst, as far as it is known that there are any.
    #[inline]
    pub(super) fn expect_frames(&mut self) {
        if self.resumed.is_none() {
            let known = self.avail_seen.wrapping_sub(self.next_avail);
            self.note_up_to(known.min(BURST as u16), Direction::DeviceReads);
        }
    }

    #[inline]
    pub(super) fn payload(&self, frame: &RawFrame) -> Payload<'_> {
        self.buffers.payload(frame)
    }

    /// The pieces of memory that the current burst refers to.
    #[inline]
    pub(super) fn burst_segments(&mut self) -> &mut [Segment] {
        self.buffers.burst_segments()
    }

    /// Stages the used entries of the burst. The device wrote nothing: length 0.
    #[inline]
    pub(super) fn complete(&mut self) {
        let (first, used) = (self.next_avail(), self.used_entries());
        for index in 0..self.taken {
            let head = self.posted[usize::from(first.wrapping_add(index)) % NOTED_MAX].head;
            used.write(self.next_used.wrapping_add(index), head, 0);
        }
        self.next_used = self.next_used.wrapping_add(self.taken);
        self.taken = 0;
        self.buffers.clear();
    }

    #[inline(always)]
    pub(super) fn send(&mut self, net: NetHeader, header: &[u8], payload: Payload<'_>) -> Result<(), SendError> {
        if self.next_avail == self.posted_end {
            self.look_for_room()?;
        }
        let Posted { head, buffer } = self.posted[usize::from(self.next_avail) % NOTED_MAX];
        let need = u64::from(self.buffers.net_header_bytes) + header.len() as u64 + u64::from(payload.bytes());
        if need > u64::from(buffer.bytes()) {
            return self.send_merged(net, header, payload, need);
        }
        self.buffers.fill_one(buffer, net, header, payload);
        // At most the buffer's bytes.
        self.stage_used(head, need as u32);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// [`SplitRing::send`] for frames in a row, as long as each has a buffer that is noted and large enough.
    #[inline(always)]
    pub(super) fn send_run<'f, const BYTES: usize, const WORDS: usize>(
        &mut self,
        way: &mut impl Way,
        frames: &[RawFrame],
        mut before: impl Before<BYTES, WORDS>,
        net: impl Fn(usize) -> Option<NetHeader>,
        payload: impl Fn(usize) -> Payload<'f>,
    ) -> Result<Sent, SendError> {
        if self.next_avail == self.posted_end {
            self.look_for_room()?;
        }
        let (mut sent, used) = (Sent::default(), self.used_entries());
        let (next, first_used) = (self.next_avail, self.next_used);
        for (frame, ahead) in frames.iter().zip(0..self.posted_end.wrapping_sub(next)) {
            let index = usize::from(ahead);
            let Posted { head, buffer } = self.posted[usize::from(next.wrapping_add(ahead)) % NOTED_MAX];
            let filled = self.buffers.fill_frame(way, buffer, net(index), &mut before, frame, || payload(index));
            let Some(bytes) = filled else { break };
            used.write(first_used.wrapping_add(ahead), head, bytes);
            sent += Sent { frames: 1, bytes: u64::from(frame.frame_bytes) };
        }
        way.end();
        self.next_avail = next.wrapping_add(sent.frames as u16);
        self.next_used = first_used.wrapping_add(sent.frames as u16);
        Ok(sent)
    }

    /// Notes the next buffers that the guest has posted to be written to.
    fn look_for_room(&mut self) -> Result<(), SendError> {
        let mut ready = self.avail_seen.wrapping_sub(self.next_avail);
        if ready == 0 {
            let index = self.look_at_index();
            ready = self.see_available(index).map_err(SendError::Fault)?;
        }
        if ready == 0 {
            return Err(SendError::Full);
        }
        self.note_up_to(ready.min(BURST as u16), Direction::DeviceWrites);
        Ok(())
    }

    /// The available index. One look in many tells how far the driver is, if it has written to the line since it was here.
    fn look_at_index(&mut self) -> u16 {
        let is_measured = self.buffers.distance.is_due();
        let line = self.available_u16(2);
        let guessed = decoy_if(is_measured, line);
        let index = if is_measured {
            let (index, ticks) = timed_load(line);
            if index != self.line_seen {
                self.buffers.distance.note(ticks);
            }
            index
        } else {
            // Acquire: as in `refresh_available`.
            guessed.load(Ordering::Acquire)
        };
        self.line_seen = index;
        index
    }

    /// Sees to it that the next `count` chains are noted, at most [`BURST`].
    #[inline(always)]
    fn note_up_to(&mut self, count: u16, direction: Direction) {
        let noted = self.posted_end.wrapping_sub(self.next_avail);
        if noted < count {
            self.note(self.posted_end, count - noted, direction);
            self.posted_end = self.next_avail.wrapping_add(count);
        }
    }

    /// Notes `count` chains from entry `first` on: those of one buffer with at least a net header's room with that buffer, whose
    /// first cache lines are asked for. The others, and what is wrong with them, are looked at when their turn comes.
    #[inline(always)]
    fn note(&mut self, first: u16, count: u16, direction: Direction) {
        // What was resumed goes the general way, which tells the tracker of it.
        if self.resumed.is_some() {
            self.posted.fill(Posted::GENERAL);
            return;
        }
        let wish = self.buffers.wish(direction);
        let (table, heads) = (self.table(), self.heads());
        let least = self.buffers.net_header_bytes;
        let mut finder = self.buffers.memory.finder();
        for index in 0..count {
            let index = first.wrapping_add(index);
            let head = heads.get(index);
            let mut posted = Posted::GENERAL;
            if head < table.size {
                // SAFETY: the head was just checked.
                let descriptor = unsafe { descriptor(table.host, head) };
                if let Some(buffer) = descriptor.single(&mut finder, direction).filter(|buffer| buffer.bytes() >= least)
                {
                    buffer.prefetch(wish);
                    posted = Posted { head, buffer };
                }
            }
            self.posted[usize::from(index) % NOTED_MAX] = posted;
        }
    }

    /// [`SplitRing::send`] in the general way: into as many chains as it takes, of any number of pieces.
    fn send_merged(&mut self, net: NetHeader, header: &[u8], payload: Payload<'_>, need: u64) -> Result<(), SendError> {
        let mut chains = [(0u16, 0u32); MERGED_CHAINS_MAX];
        let mut count = 0;
        let mut room = 0u64;
        let mut visited = 0;
        self.buffers.clear();
        while room < need {
            if count > 0 && (!self.mergeable || count == MERGED_CHAINS_MAX) {
                return Err(SendError::BufferTooSmall);
            }
            let ready = self.refresh_available(count as u16 + 1).map_err(SendError::Fault)?;
            if usize::from(ready) <= count {
                return Err(SendError::Full);
            }
            let head = self.available_entry(self.next_avail.wrapping_add(count as u16)).map_err(SendError::Fault)?;
            if !self.buffers.has_room() || visited >= usize::from(CHAIN_DESCRIPTORS_MAX) {
                return Err(SendError::BufferTooSmall);
            }
            let bytes = self.room_in(head, &mut visited).map_err(SendError::Fault)?;
            if count == 0 && bytes < u64::from(self.buffers.net_header_bytes) {
                return Err(SendError::BufferTooSmall);
            }
            // A chain's room can exceed what is still needed, and even u32; what is written cannot.
            chains[count] = (head, bytes.min(need - room) as u32);
            count += 1;
            room += bytes;
        }
        // From here on nothing can fail: the frame is written whole.
        self.buffers.fill(net, count as u16, header, payload);
        if self.resumed.is_some() {
            self.take_resumed(&chains[..count]);
        }
        for &(head, bytes) in &chains[..count] {
            self.stage_used(head, bytes);
        }
        self.next_avail = self.next_avail.wrapping_add(count as u16);
        if self.posted_end.wrapping_sub(self.next_avail) > BURST as u16 {
            // It went beyond what was noted.
            self.posted_end = self.next_avail;
        }
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
        if let Some(log) = &self.buffers.log {
            self.used_entries().log(log, old, new);
        }
        if let Some(tracker) = &self.inflight {
            tracker.using();
        }
        // Release: pairs with the driver's read barrier after it reads the used index; the entries and buffers
        // written before are visible with it (§2.7.8).
        self.used_u16(2).store(new, Ordering::Release);
        if let Some(log) = &self.buffers.log {
            log.used(2, 2);
        }
        // The store of the used index must be visible before the driver's wish is read, or both sides wait for the
        // other (§2.7.7.1, §2.7.10); pairs with the driver's barrier after it writes `used_event` or `flags`.
        fence(Ordering::SeqCst);
        if let Some(tracker) = &mut self.inflight {
            tracker.used(new);
            self.end_resumed();
        }
        if self.event_idx {
            // §2.7.7.2: notify when `used_event` lies in [old, new). u16 wraps; the subtraction is the comparison.
            let used_event = self.available_u16(4 + 2 * usize::from(self.size)).load(Ordering::Relaxed);
            new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let is_wanted = self.available_u16(0).load(Ordering::Relaxed) & NO_INTERRUPT == 0;
            self.line_seen = self.available_index(Ordering::Relaxed);
            is_wanted
        }
    }

    pub(super) fn enable_kicks(&mut self) -> bool {
        if self.event_idx {
            let avail_event = 4 + 8 * usize::from(self.size);
            self.used_u16(avail_event).store(self.next_avail, Ordering::Relaxed);
            if let Some(log) = &self.buffers.log {
                log.used(avail_event as u64, 2);
            }
        } else {
            self.write_flags(0);
        }
        // The wish must be visible before the index is read again; pairs with the driver's barrier between its store
        // of the available index and its reading of `avail_event` or `flags` (§2.7.10.1).
        fence(Ordering::SeqCst);
        self.has_work()
    }

    #[inline]
    pub(super) fn has_work(&self) -> bool {
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
        if let Some(log) = &self.buffers.log {
            log.used(0, 2);
        }
    }

    /// Notes the burst that was just taken in the in-flight region.
    #[cold]
    fn track_taken(&mut self) {
        let Some(tracker) = &mut self.inflight else { return };
        let first = self.next_avail.wrapping_sub(self.taken);
        (0..self.taken).for_each(|index| {
            tracker.took(self.posted[usize::from(first.wrapping_add(index)) % NOTED_MAX].head);
        });
    }

    /// Notes buffers of the device before us that are given back with the next `publish`. The others of a guest receiveq
    /// are never in flight.
    #[cold]
    fn take_resumed(&mut self, chains: &[(u16, u32)]) {
        let (Some(resumed), Some(tracker)) = (&self.resumed, &mut self.inflight) else { return };
        chains.iter().take(resumed.left(self.next_avail)).for_each(|&(head, _)| tracker.took(head));
    }

    /// Lets go of them when all were served: an index that comes round again means the available ring's entry.
    fn end_resumed(&mut self) {
        if self.taken == 0 && self.resumed.as_ref().is_some_and(|resumed| resumed.left(self.next_avail) == 0) {
            self.resumed = None;
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
        self.see_available(self.available_index(Ordering::Acquire))
    }

    /// Notes the available index; tells how many chains are ready.
    fn see_available(&mut self, index: u16) -> Result<u16, RingFault> {
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
        if let Some(head) = self.resumed.as_ref().and_then(|resumed| resumed.head(index)) {
            return Ok(head);
        }
        let head = self.heads().get(index);
        if head >= self.size {
            return Err(RingFault::DescriptorIndex { index: head, size: self.size });
        }
        Ok(head)
    }

    /// A frame out of the chain at `head`.
    fn gather(&mut self, head: u16, frame: &mut RawFrame, visited: &mut usize) -> Result<(), RingFault> {
        let (table, indirect) = (self.table(), self.indirect);
        // SAFETY: the head was checked to be below the size.
        let first = unsafe { descriptor(table.host, head) };
        self.buffers.gather(frame, |memory, take| {
            let whole = walk(memory, table, indirect, (head, first), Direction::DeviceReads, visited, take)?;
            Ok(((), whole))
        })
    }

    /// Notes the segments of a chain that the device may write to; returns their bytes.
    fn room_in(&mut self, head: u16, visited: &mut usize) -> Result<u64, RingFault> {
        let (table, indirect) = (self.table(), self.indirect);
        // SAFETY: the head was checked to be below the size.
        let first = unsafe { descriptor(table.host, head) };
        let noted = self.buffers.note(|memory, take| {
            let whole = walk(memory, table, indirect, (head, first), Direction::DeviceWrites, visited, take)?;
            Ok(((), whole))
        })?;
        Ok(noted.1)
    }

    fn table(&self) -> Table {
        Table { host: self.descriptors, size: self.size }
    }

    /// The heads in the available ring.
    #[inline]
    fn heads(&self) -> Heads {
        Heads::new(self.available, self.size)
    }

    #[inline]
    fn used_entries(&self) -> UsedEntries {
        UsedEntries::new(self.used, self.size)
    }

    /// Writes a used entry that the guest does not see yet.
    #[inline]
    fn stage_used(&mut self, head: u16, bytes: u32) {
        self.used_entries().write(self.next_used, head, bytes);
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline]
    fn available_u16(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= 6 + 2 * usize::from(self.size));
        // SAFETY: callers stay in the available ring, which is 2-byte aligned and mapped while `self.buffers.memory` lives.
        unsafe { AtomicU16::from_ptr((self.available + at) as *mut u16) }
    }

    #[inline]
    fn used_u16(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at + 2 <= 6 + 8 * usize::from(self.size));
        // SAFETY: callers stay in the used ring, which is 4-byte aligned and mapped while `self.buffers.memory` lives.
        unsafe { AtomicU16::from_ptr((self.used + at) as *mut u16) }
    }
}
