//! The packed virtqueue (VIRTIO 1.2 §2.8), device side, over cached host pointers.
//!
//! Theory of operation. One table of descriptors, written by both sides in turn. Each side walks it in order and flips
//! its wrap counter at the end; a descriptor is available when its AVAIL flag equals the wrap counter and its USED flag
//! does not, and used when both equal it. We finish every chain in the order in which it came and keep none beyond a
//! burst, so one [`Position`] says all: where the next available descriptor is looked for is where the next used one
//! goes. Taking chains ([`PackedRing::receive`]) moves a copy of it, giving them back moves the ring's.
//!
//! Giving a chain back is one store of the descriptor's second word: length, buffer id and flags at once, so that no
//! torn descriptor ever exists. [`PackedRing::publish`] writes the first used descriptor of a burst last, with release, and the
//! driver, which looks at it first, sees the whole burst or nothing of it (§5.1.6.4 wants that of a frame in several
//! buffers). Those behind it are kept back as well, if they are of chains of one descriptor and as many as there is room for:
//! a driver that polls has the first one's cache line again and again, and three more of them lie in it. With IN_ORDER the
//! chains of a transmitq's burst, whose lengths nobody wants, get one used descriptor together (§2.8.8): of the driver's cache
//! lines two are written.
//!
//! A chain of several descriptors gets one used descriptor, in the place of its first; the driver skips the others
//! (§2.8.6). Those are marked used as well, while they are still ours: then every descriptor in memory is either
//! available or used, and whoever finds the ring later can tell where it stands (`recover.rs`). Of a batch with one used
//! descriptor the last is marked, with the number of all.
//!
//! One of the files with unsafe code in this crate. What makes each access sound is what `split.rs` says: the parts
//! were checked at set-up to lie whole and aligned in one mapped region that [`Memory`] keeps mapped, indices stay below
//! the size, and no Rust reference to guest memory is made other than to an atomic. JUSTIFICATION: as there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use super::buffers::{Buffers, Direction, Way};
use super::inflight_packed::{Copied, PackedTracker};
use super::packed_chain::{
    Chain, DESCRIPTOR_BYTES, Descriptor, FLAG_BATCH_END, FLAG_NEXT, FLAG_WRITE, Head, Simple, Table, descriptor,
    second_word, walk,
};
use super::packed_events::{EVENT_BYTES, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, Events, Kicks};
use super::packed_resumed::Resumed;
use super::packed_staging::{KeptBack, Staging};
use super::position::Position;
use super::{
    BURST, BURST_DESCRIPTORS_MAX, CHAIN_DESCRIPTORS_MAX, MERGED_CHAINS_MAX, RING_SIZE_MAX, RingError, RingFault,
    RingSetup, SendError, Sent,
};
use crate::dirty_log::RingLog;
use crate::distance::timed_load;
use crate::frame::{Before, NetHeader, RawFrame};
use crate::inflight::InflightPart;
use crate::memory::{CACHE_LINE_BYTES, Memory, Payload, Segment, Wish, prefetch};

/// Descriptors of a cache line.
const LINE_DESCRIPTORS: u16 = CACHE_LINE_BYTES as u16 / DESCRIPTOR_BYTES as u16;
/// Descriptors of a ring in which most likely all buffers of the next burst have been posted when those of one are looked for.
const POSTED_AHEAD_MIN: usize = 4 * BURST;

#[derive(Debug)]
pub(super) struct PackedRing {
    buffers: Buffers,
    /// Guest-physical addresses, for whoever sets the ring up anew.
    addresses: (u64, u64, u64),
    table: Table,
    events: Events,
    event_idx: bool,
    indirect: bool,
    mergeable: bool,
    in_order: bool,
    kicks: Kicks,
    staging: Staging,
    kept_back: KeptBack,
    /// Chains taken by `receive` and not completed yet.
    taken: u16,
    chains: [Chain; BURST],
    /// The chains at `next` and behind it, from `simple_at` up to `simple_end`.
    simple: [Simple; BURST],
    simple_at: usize,
    simple_end: usize,
    inflight: Option<Box<PackedTracker>>,
    /// Chains of the device before us that are to be served first.
    resumed: Option<Box<Resumed>>,
}

impl PackedRing {
    pub(super) fn new(setup: &RingSetup) -> Result<Self, RingError> {
        let size = setup.size;
        if size == 0 || size > RING_SIZE_MAX {
            return Err(RingError::PackedSize(size));
        }
        let next = Position::from_bits(setup.next_avail);
        if next.index >= size {
            return Err(RingError::Position { index: next.index, size });
        }
        let part = |part, address: u64, bytes, align| {
            setup
                .memory
                .translate(address, bytes)
                .map(|host| host as usize)
                .filter(|host| address.is_multiple_of(align) && (*host as u64).is_multiple_of(align))
                .ok_or(RingError::Address { part, address, bytes })
        };
        // Alignments and sizes: VIRTIO 1.2 §2.8, table "Virtqueue Part".
        let ring = part("descriptor ring", setup.descriptors, DESCRIPTOR_BYTES * u64::from(size), 16)?;
        let mut ring = Self {
            addresses: (setup.descriptors, setup.available, setup.used),
            table: Table { host: ring, size },
            events: Events {
                driver: part("driver event suppression", setup.available, EVENT_BYTES, 4)?,
                device: part("device event suppression", setup.used, EVENT_BYTES, 4)?,
            },
            buffers: Buffers::new(setup),
            event_idx: super::event_idx(setup.features),
            indirect: super::indirect(setup.features),
            mergeable: super::mergeable(setup.features),
            in_order: super::in_order(setup.features),
            kicks: Kicks::Unknown,
            staging: Staging::new(next),
            kept_back: [0; BURST],
            taken: 0,
            chains: [Chain::default(); BURST],
            simple: [Simple { id: 0, buffer: Segment::EMPTY }; BURST],
            simple_at: 0,
            simple_end: 0,
            inflight: None,
            resumed: None,
        };
        if let Some(part) = &setup.inflight {
            let (tracker, found) = PackedTracker::open(part, next, |at| ring.available(at).is_some());
            ring.inflight = Some(Box::new(tracker));
            if let Some(found) = found {
                let (position, resumed) = Resumed::new(found);
                ring.staging.next = position;
                ring.resumed = Some(Box::new(resumed));
            }
        }
        Ok(ring)
    }

    pub(super) fn size(&self) -> u16 {
        self.table.size
    }

    /// Where the next available descriptor is looked for and where the next used one goes: they are the same.
    pub(super) fn position(&self) -> u16 {
        self.staging.next.bits()
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

    /// Nothing was ever made available in a ring that is still at its start, where all memory is zero.
    pub(super) fn never_used(&self) -> bool {
        self.staging.next == (Position { index: 0, wrap: true }) && self.available(self.staging.next).is_none()
    }

    #[inline]
    pub(super) fn receive(&mut self, frames: &mut [RawFrame]) -> Result<usize, RingFault> {
        debug_assert_eq!(self.taken, 0, "the last burst was not completed");
        let burst = frames.len().min(BURST);
        self.buffers.clear();
        let mut taken = 0;
        let mut visited = 0;
        let mut at = self.staging.next;
        while taken < burst && self.buffers.has_room() {
            // All usual chains at once, before any buffer is read: cache misses then overlap.
            let simple = self.look_ahead(at, burst - taken, Direction::DeviceReads);
            for index in 0..simple {
                let Simple { id, buffer } = self.simple[index];
                self.buffers.gather_one(buffer, &mut frames[taken]);
                self.chains[taken] = Chain { id, slots: 1 };
                taken += 1;
            }
            visited += simple;
            at = at.after(simple as u16, self.table.size);
            if taken == burst || !self.buffers.has_room() || visited >= BURST_DESCRIPTORS_MAX {
                break;
            }
            let Some(head) = self.next_head(at, taken) else { break };
            let chain = self.gather(head, &mut frames[taken], &mut visited)?;
            self.chains[taken] = chain;
            at = at.after(chain.slots, self.table.size);
            taken += 1;
        }
        self.taken = taken as u16;
        if self.inflight.is_some() {
            self.track_taken();
        }
        Ok(taken)
    }

    /// Notes the available chains from `at` on that are one descriptor each, up to `most` or to the first of another kind;
    /// asks for the cache lines of their buffers. Returns how many.
    #[inline]
    fn look_ahead(&mut self, mut at: Position, most: usize, direction: Direction) -> usize {
        let wish = self.buffers.wish(direction);
        let least = if direction == Direction::DeviceReads { self.buffers.net_header_bytes } else { 0 };
        // No descriptor twice: a small ring could lap. What was resumed goes the general way.
        let most = if self.resumed.is_some() { 0 } else { most.min(usize::from(self.table.size)) };
        if self.available(at).is_none() {
            return 0;
        }
        // What is given back one by one is asked for to be written, once.
        let is_rewritten = direction == Direction::DeviceWrites || !self.in_order;
        let mut finder = self.buffers.memory.finder();
        for index in 0..most {
            if is_rewritten && at.index.is_multiple_of(LINE_DESCRIPTORS) {
                prefetch(self.second_word_at(at.index).as_ptr() as usize, Wish::Write);
            }
            let simple = self.available(at).and_then(|descriptor| {
                let buffer = descriptor.single(&mut finder, direction)?;
                (buffer.bytes() >= least).then_some(Simple { id: descriptor.id, buffer })
            });
            let Some(simple) = simple else { return index };
            simple.buffer.prefetch(wish);
            self.simple[index] = simple;
            at = at.after(1, self.table.size);
        }
        most
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

    /// Stages the used descriptors of the burst. The device wrote nothing: length 0.
    #[inline]
    pub(super) fn complete(&mut self) {
        if !self.in_order || !self.stage_batch() {
            let mut staging = self.staging;
            for index in 0..usize::from(self.taken) {
                self.stage_used(&mut staging, self.chains[index], 0, 0);
            }
            self.staging = staging;
        }
        self.taken = 0;
        self.buffers.clear();
    }

    #[inline(always)]
    pub(super) fn send(&mut self, net: NetHeader, header: &[u8], payload: Payload<'_>) -> Result<(), SendError> {
        if self.simple_at == self.simple_end {
            self.look_for_room();
        }
        let need = u64::from(self.buffers.net_header_bytes) + header.len() as u64 + u64::from(payload.bytes());
        let simple = self.simple[..self.simple_end].get(self.simple_at).copied();
        let Some(Simple { id, buffer }) = simple.filter(|simple| need <= u64::from(simple.buffer.bytes())) else {
            return self.send_merged(net, header, payload, need);
        };
        self.buffers.fill_one(buffer, net, header, payload);
        let mut staging = self.staging;
        // At most the buffer's bytes.
        self.stage(&mut staging, Chain { id, slots: 1 }, need as u32, FLAG_WRITE);
        self.staging = staging;
        self.simple_at += 1;
        Ok(())
    }

    /// [`PackedRing::send`] for frames in a row, as long as each has a buffer that is noted and large enough.
    #[inline(always)]
    pub(super) fn send_run<'f, const BYTES: usize, const WORDS: usize>(
        &mut self,
        way: &mut impl Way,
        frames: &[RawFrame],
        mut before: impl Before<BYTES, WORDS>,
        net: impl Fn(usize) -> Option<NetHeader>,
        payload: impl Fn(usize) -> Payload<'f>,
    ) -> Result<Sent, SendError> {
        if self.simple_at == self.simple_end {
            self.look_for_room();
            if self.simple_end == 0 && self.next_head(self.staging.next, 0).is_none() {
                return Err(SendError::Full);
            }
        }
        let (mut sent, mut staging) = (Sent::default(), self.staging);
        for (index, (frame, place)) in frames.iter().zip(self.simple_at..self.simple_end).enumerate() {
            let Simple { id, buffer } = self.simple[place];
            let filled = self.buffers.fill_frame(way, buffer, net(index), &mut before, frame, || payload(index));
            let Some(bytes) = filled else { break };
            self.stage(&mut staging, Chain { id, slots: 1 }, bytes, FLAG_WRITE);
            sent += Sent { frames: 1, bytes: u64::from(frame.frame_bytes) };
        }
        way.end();
        self.staging = staging;
        self.simple_at += sent.frames as usize;
        Ok(sent)
    }

    /// Notes the next buffers that the guest has posted to be written to, if they are of the usual kind.
    #[inline(never)]
    fn look_for_room(&mut self) {
        if self.buffers.distance.is_due() {
            self.measure();
        }
        self.simple_end = self.look_ahead(self.staging.next, BURST, Direction::DeviceWrites);
        self.simple_at = 0;
        if self.simple_end == BURST && usize::from(self.table.size) >= POSTED_AHEAD_MIN {
            self.ask_for(self.staging.next.after(BURST as u16, self.table.size));
        }
    }

    /// How far the driver is, by a descriptor that it has most likely made available since it was used, and that nobody has asked for:
    /// half a ring away.
    #[cold]
    fn measure(&mut self) {
        if usize::from(self.table.size) >= POSTED_AHEAD_MIN {
            let at = self.staging.next.after(self.table.size / 2, self.table.size);
            let (flags, ticks) = timed_load(self.flags_at(at.index));
            if at.is_available(u16::from_le(flags)) {
                self.buffers.distance.note(ticks);
            }
        }
    }

    /// Asks for the cache lines of a burst's descriptors from `at` on, to write to them.
    fn ask_for(&self, mut at: Position) {
        for _ in 0..BURST as u16 / LINE_DESCRIPTORS {
            prefetch(self.second_word_at(at.index).as_ptr() as usize, Wish::Write);
            at = at.after(LINE_DESCRIPTORS, self.table.size);
        }
    }

    /// [`PackedRing::send`] in the general way: into as many chains as it takes, of any number of pieces.
    fn send_merged(&mut self, net: NetHeader, header: &[u8], payload: Payload<'_>, need: u64) -> Result<(), SendError> {
        let mut chains = [(Chain::default(), 0u32); MERGED_CHAINS_MAX];
        let mut count = 0;
        let mut room = 0u64;
        let mut visited = 0;
        let mut at = self.staging.next;
        self.buffers.clear();
        while room < need {
            if count > 0 && (!self.mergeable || count == MERGED_CHAINS_MAX) {
                return Err(SendError::BufferTooSmall);
            }
            let Some(head) = self.next_head(at, count) else { return Err(SendError::Full) };
            if !self.buffers.has_room() || visited >= usize::from(CHAIN_DESCRIPTORS_MAX) {
                return Err(SendError::BufferTooSmall);
            }
            let (chain, bytes) = self.room_in(head, &mut visited).map_err(SendError::Fault)?;
            if count == 0 && bytes < u64::from(self.buffers.net_header_bytes) {
                return Err(SendError::BufferTooSmall);
            }
            // A chain's room can exceed what is still needed, and even u32; what is written cannot.
            chains[count] = (chain, bytes.min(need - room) as u32);
            at = at.after(chain.slots, self.table.size);
            count += 1;
            room += bytes;
        }
        // From here on nothing can fail: the frame is written whole.
        self.buffers.fill(net, count as u16, header, payload);
        if self.resumed.is_some() {
            self.take_resumed(count);
        }
        let mut staging = self.staging;
        for &(chain, bytes) in &chains[..count] {
            self.stage_used(&mut staging, chain, bytes, FLAG_WRITE);
        }
        self.staging = staging;
        // Chains of one descriptor are the next that were noted; of others it is not known where they lead.
        let noted =
            chains[..count].iter().all(|(chain, _)| chain.slots == 1) && count <= self.simple_end - self.simple_at;
        (self.simple_at, self.simple_end) = if noted { (self.simple_at + count, self.simple_end) } else { (0, 0) };
        Ok(())
    }

    /// Publishes staged used descriptors; returns whether the guest wants to be notified of them.
    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        let Staging { start, slots, kept, next } = self.staging;
        if slots == 0 {
            return false;
        }
        self.staging = Staging::new(next);
        if let Some(tracker) = &mut self.inflight {
            tracker.using(next);
        }
        let mut at = start;
        for &word in &self.kept_back[1..kept as usize] {
            at = if at + 1 < self.table.size { at + 1 } else { 0 };
            // Relaxed: the driver does not look behind the first one, whose store is the release.
            self.second_word_at(at).store(word, Ordering::Relaxed);
        }
        // Release: pairs with the driver's read barrier after it reads the flags; the descriptors behind and the
        // buffers written before are visible with it (§2.8.15).
        self.second_word_at(start).store(self.kept_back[0], Ordering::Release);
        if self.buffers.log.is_some() {
            self.log_used(start, slots);
        }
        // The store must be visible before the driver's wish is read, or both sides wait for the other (§2.8.21.3.1 for
        // the mirror image); pairs with the driver's barrier after it writes its event suppression structure.
        fence(Ordering::SeqCst);
        if let Some(tracker) = &mut self.inflight {
            tracker.used(self.staging.next);
        }
        self.events.driver_wants(next, slots, self.table.size, self.event_idx)
    }

    pub(super) fn enable_kicks(&mut self) -> bool {
        let flags = if self.event_idx { EVENT_DESC } else { EVENT_ENABLE };
        self.write_device_event(flags);
        self.kicks = Kicks::Wanted;
        // The wish must be visible before the descriptor is looked at again; pairs with the driver's barrier between
        // making it available and reading our structure (§2.8.21.3.1).
        fence(Ordering::SeqCst);
        self.has_work()
    }

    #[inline]
    pub(super) fn has_work(&self) -> bool {
        self.available(self.staging.next).is_some()
    }

    pub(super) fn disable_kicks(&mut self) {
        if self.kicks != Kicks::Unwanted {
            self.write_device_event(EVENT_DISABLE);
            self.kicks = Kicks::Unwanted;
        }
    }

    /// Marks `slots` descriptors from `first` on, which were written. After the writes: a page that is marked before may
    /// be copied before.
    #[cold]
    fn log_used(&self, first: u16, slots: u32) {
        let Some(RingLog { log, used_address: Some(_) }) = &self.buffers.log else { return };
        let to_the_end = u32::from(self.table.size - first);
        let mark = |index: u16, slots: u32| {
            log.mark(self.addresses.0 + DESCRIPTOR_BYTES * u64::from(index), DESCRIPTOR_BYTES * u64::from(slots));
        };
        mark(first, slots.min(to_the_end));
        mark(0, slots.saturating_sub(to_the_end));
    }

    fn write_device_event(&self, flags: u16) {
        self.events.want(self.staging.next, flags);
        if let Some(RingLog { log, used_address: Some(_) }) = &self.buffers.log {
            log.mark(self.addresses.2, EVENT_BYTES);
        }
    }

    /// The descriptor at `at` if the driver has made it available. Its flags, length and id are read once, at once.
    #[inline]
    fn available(&self, at: Position) -> Option<Descriptor> {
        // Acquire: pairs with the driver's write barrier before it stores the flags of a chain's first descriptor; the
        // address, the chain's other descriptors and the buffers written before are visible after (§2.8.21.1).
        let rest = self.second_word_at(at.index).load(Ordering::Acquire);
        if !at.is_available((u64::from_le(rest) >> 48) as u16) {
            return None;
        }
        let address = (self.table.host + usize::from(at.index) * DESCRIPTOR_BYTES as usize) as *mut u64;
        // SAFETY: `at.index` is below the size, the table is 16-byte aligned and mapped while `self.buffers.memory` lives.
        let address = unsafe { AtomicU64::from_ptr(address) }.load(Ordering::Relaxed);
        Some(Descriptor::from_words(address, rest))
    }

    /// The head of the chain that is `ahead` chains behind the next one and whose place in the ring is `at`.
    #[inline]
    fn next_head(&self, at: Position, ahead: usize) -> Option<Head> {
        if let Some(resumed) = &self.resumed
            && let Some(&(first, _, _)) = resumed.chains.get(ahead)
        {
            let [address, rest] = resumed.words[usize::from(first)];
            let descriptor = Descriptor::from_words(address, rest);
            return Some(Head { table: resumed.table(), index: first, descriptor });
        }
        let descriptor = self.available(at)?;
        Some(Head { table: self.table, index: at.index, descriptor })
    }

    /// Notes the burst that was just taken in the in-flight region.
    #[cold]
    fn track_taken(&mut self) {
        let resumed = self.take_resumed(usize::from(self.taken));
        let Some(mut tracker) = self.inflight.take() else { return };
        let mut at = self.staging.next;
        for (index, chain) in self.chains[..usize::from(self.taken)].iter().enumerate() {
            if index >= resumed {
                // A second look at what the driver may change meanwhile: it misleads nobody but its own next device, which
                // checks it anew.
                tracker.took((0..usize::from(chain.slots)).map(|slot| {
                    let index = at.after(slot as u16, self.table.size).index;
                    // SAFETY: `index` is below the size of the ring's own table.
                    let Descriptor { address, bytes, id, flags } = unsafe { descriptor(self.table.host, index) };
                    Copied { address, bytes, id, flags }
                }));
            }
            at = at.after(chain.slots, self.table.size);
        }
        self.inflight = Some(tracker);
    }

    /// Lets go of chains of the device before us, which are given back with the next `publish`: as many of `count` as are
    /// left.
    #[cold]
    fn take_resumed(&mut self, count: usize) -> usize {
        let (Some(resumed), Some(tracker)) = (&mut self.resumed, &mut self.inflight) else { return 0 };
        let count = count.min(resumed.chains.len());
        resumed.chains.drain(..count).for_each(|(_, _, chained)| tracker.took_again(chained));
        if resumed.chains.is_empty() {
            self.resumed = None;
        }
        count
    }

    /// A frame out of the chain that begins with `head`.
    fn gather(&mut self, head: Head, frame: &mut RawFrame, visited: &mut usize) -> Result<Chain, RingFault> {
        let indirect = self.indirect;
        self.buffers.gather(frame, |memory, take| walk(memory, indirect, head, Direction::DeviceReads, visited, take))
    }

    /// Notes the segments of a chain that the device may write to; returns the chain and their bytes.
    fn room_in(&mut self, head: Head, visited: &mut usize) -> Result<(Chain, u64), RingFault> {
        let indirect = self.indirect;
        self.buffers.note(|memory, take| walk(memory, indirect, head, Direction::DeviceWrites, visited, take))
    }

    /// Gives the burst back with one used descriptor, which has the id of its last chain. Returns whether it could: chains
    /// that are more than the ring are those of a driver that overtakes itself.
    #[inline]
    fn stage_batch(&mut self) -> bool {
        let chains = &self.chains[..usize::from(self.taken)];
        let slots = chains.iter().map(|chain| u32::from(chain.slots)).sum::<u32>();
        let (Some(last), true) = (chains.last(), slots <= u32::from(self.table.size)) else { return false };
        let batch = Chain { id: last.id, slots: slots as u16 };
        if batch.slots > 1 {
            let tail = self.staging.next.after(batch.slots - 1, self.table.size);
            let word = second_word(slots, batch.id, FLAG_BATCH_END | tail.used_flags());
            self.second_word_at(tail.index).store(word, Ordering::Relaxed);
        }
        let mut staging = self.staging;
        self.stage(&mut staging, batch, 0, 0);
        self.staging = staging;
        true
    }

    /// Gives the next chain back; the driver sees nothing of it before `publish`.
    #[inline]
    fn stage_used(&mut self, staging: &mut Staging, chain: Chain, bytes: u32, flags: u16) {
        // The chain's other descriptors first: once its head is used, all of it is the driver's; until then NEXT tells its length.
        let mut at = staging.next;
        for slot in 1..chain.slots {
            at = at.after(1, self.table.size);
            let next = if slot + 1 < chain.slots { FLAG_NEXT } else { 0 };
            self.flags_at(at.index).store((at.used_flags() | next).to_le(), Ordering::Relaxed);
        }
        self.stage(staging, chain, bytes, flags);
    }

    /// The used descriptor of the next chain, or of several.
    #[inline(always)]
    fn stage(&mut self, staging: &mut Staging, chain: Chain, bytes: u32, flags: u16) {
        let now = staging.give_back(&mut self.kept_back, chain, bytes, flags, self.table.size);
        if let Some((index, word)) = now {
            // Relaxed: as in `publish`.
            self.second_word_at(index).store(word, Ordering::Relaxed);
        }
    }

    #[inline]
    fn second_word_at(&self, index: u16) -> &AtomicU64 {
        debug_assert!(index < self.table.size);
        let word = self.table.host + usize::from(index) * DESCRIPTOR_BYTES as usize + 8;
        // SAFETY: every index here comes from a `Position`, which stays below the size; the table is 16-byte aligned and
        // mapped while `self.buffers.memory` lives.
        unsafe { AtomicU64::from_ptr(word as *mut u64) }
    }

    #[inline]
    fn flags_at(&self, index: u16) -> &AtomicU16 {
        debug_assert!(index < self.table.size);
        let flags = self.table.host + usize::from(index) * DESCRIPTOR_BYTES as usize + 14;
        // SAFETY: as in `second_word_at`.
        unsafe { AtomicU16::from_ptr(flags as *mut u16) }
    }
}
