//! The driver's side of a packed ring (VIRTIO 1.2 §2.8): the verbs of split.rs over one table of descriptors.
//!
//! Theory of operation. A split driver names a chain by its head in a table that it owns for good. So does this one,
//! towards its caller: `set_descriptor` writes into a private table, and `offer` copies the chain at a head to where
//! the ring goes on, with the head as buffer id. Descriptors are written whole and at once, but for the flags of the
//! first chain since the last `publish`: those follow last, so that the device sees all or nothing. What a used descriptor
//! stands for, and how many descriptors it skips, is known by its id. Where the device goes on is expected, though, and not
//! computed from what it wrote: descriptors in a row come from its core one after the other only if each says where the next is.
//!
//! With IN_ORDER the device may use a batch with one descriptor, which has the id of the last chain: all that were offered
//! before are used with it. All of them, that one too, get length 0, as chains for sending do: a device that does so with a
//! receiveq is not understood.
//!
//! Nothing that the device writes is trusted, as in split.rs.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::layout::{DESC_NEXT, DESCRIPTOR_BYTES, Descriptor, RingLayout, Used};
use super::memory::{GuestMemory, Wish};
use super::position::{DESC_AVAIL, DESC_USED, Position};
use super::split::RingError;

/// RING_EVENT_FLAGS_ENABLE: notify of everything (VIRTIO 1.2 §2.8.14).
pub const EVENT_ENABLE: u16 = 0;
/// RING_EVENT_FLAGS_DISABLE: notify of nothing.
pub const EVENT_DISABLE: u16 = 1;
/// RING_EVENT_FLAGS_DESC: notify of one descriptor.
pub const EVENT_DESC: u16 = 2;
/// Of the half of a descriptor with id and flags: the id, and what says that it is used.
const USED_MASK: u32 = (DESC_AVAIL as u32 | DESC_USED as u32) << 16 | 0xffff;

/// How far offering has come: a loop keeps it in registers.
#[derive(Clone, Copy, Debug)]
struct Offering {
    at: Position,
    /// See [`PackedRing`].
    first: Option<(usize, u64)>,
    written: u32,
}

impl Offering {
    /// Writes the next descriptor.
    #[inline(always)]
    fn put(&mut self, memory: &GuestMemory, layout: RingLayout, id: u16, descriptor: Descriptor) {
        let [address, rest] = PackedRing::words(descriptor, id, descriptor.flags | self.at.available_flags());
        let offset = layout.descriptor(self.at.index);
        memory.store_u64(offset, address);
        match self.first {
            None => self.first = Some((offset + 8, rest)),
            Some(_) => memory.store_u64(offset + 8, rest),
        }
        self.at = self.at.after(1, layout.size);
        self.written += 1;
    }
}

/// One packed virtqueue, driven by us.
#[derive(Debug)]
pub struct PackedRing {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    event_idx: bool,
    /// Where the next descriptor goes.
    available: Position,
    /// Where the device's next used descriptor is looked for.
    used: Position,
    /// Chains as the caller describes them.
    table: Box<[Descriptor]>,
    /// Ring descriptors of the chain that had each id last; 0: one that [`Self::reap`] has shown.
    slots: Box<[u16]>,
    /// By where they were put: the chains' ids and ring descriptors.
    chains: Box<[(u16, u16)]>,
    in_order: bool,
    /// All chains up to this id are used, as the device has said with it.
    batch: Option<u16>,
    /// Of the first descriptor since the last publish the second word, and where it goes.
    first: Option<(usize, u64)>,
    /// Descriptors written since then.
    unpublished: u32,
    /// Chains published, not yet reaped.
    in_flight: u16,
    /// Chains offered since the last publish.
    offered: u16,
}

impl PackedRing {
    /// A ring that stands `base` descriptors after its start, polling. Writes descriptors and flags into memory.
    pub fn new(memory: Arc<GuestMemory>, layout: RingLayout, event_idx: bool, in_order: bool, base: u16) -> Self {
        let entries = usize::from(layout.size);
        let at = Position::after_start(base, layout.size);
        for index in 0..layout.size {
            // As a device leaves them: those behind used in this lap, the others in the lap before.
            let lap = Position { index, wrap: if index < at.index { at.wrap } else { !at.wrap } };
            memory.store_u64(layout.descriptor(index), 0);
            memory.store_u64(layout.descriptor(index) + 8, u64::from(lap.used_flags()) << 48);
        }
        memory.store_u32(layout.used_ring, 0);
        let mut ring = Self {
            event_idx,
            available: at,
            used: at,
            table: vec![Descriptor::default(); entries].into(),
            slots: vec![0; entries].into(),
            chains: vec![(0, 0); entries].into(),
            in_order,
            batch: None,
            first: None,
            unpublished: 0,
            in_flight: 0,
            offered: 0,
            memory,
            layout,
        };
        ring.suppress_calls();
        ring
    }

    /// Where its parts lie.
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// The memory that it lies in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Where the next chain goes.
    pub fn next_offer(&self) -> Position {
        self.available
    }

    /// Where the device goes on, as far as it has been looked at.
    pub fn position(&self) -> Position {
        self.used
    }

    /// Chains offered and not yet reaped.
    pub fn outstanding(&self) -> u16 {
        self.in_flight + self.offered
    }

    /// Sets a descriptor of the caller's table. The caller sees to it that no outstanding chain contains it.
    #[inline(always)]
    pub fn set_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        self.table[usize::from(index)] = descriptor;
    }

    /// Writes a chain into the ring; invisible to the device until [`Self::publish`].
    #[inline]
    pub fn offer(&mut self, head: u16) {
        let mut offering = self.offering();
        let (start, mut slots) = (offering.at, 0);
        let mut next = Some(head);
        while let Some(index) = next {
            let descriptor = self.table[usize::from(index)];
            offering.put(&self.memory, self.layout, head, descriptor);
            slots += 1;
            next = (descriptor.flags & DESC_NEXT != 0).then_some(descriptor.next);
        }
        debug_assert!(slots <= self.layout.size, "a chain of {slots} at {head}");
        self.slots[usize::from(head)] = slots;
        self.chains[usize::from(start.index)] = (head, slots);
        self.offered(offering, 1);
    }

    /// As [`Self::offer`], of chains of one descriptor, which need not be in the table.
    #[inline(always)]
    pub fn offer_run(&mut self, heads: &[u16], mut descriptor: impl FnMut(u16) -> Descriptor) {
        self.prefetch(heads.len());
        let mut offering = self.offering();
        let Self { memory, layout, slots, chains, .. } = self;
        for &head in heads {
            slots[usize::from(head)] = 1;
            chains[usize::from(offering.at.index)] = (head, 1);
            offering.put(memory, *layout, head, descriptor(head));
        }
        self.offered(offering, heads.len() as u16);
    }

    #[inline(always)]
    fn offering(&self) -> Offering {
        Offering { at: self.available, first: self.first, written: self.unpublished }
    }

    #[inline(always)]
    fn offered(&mut self, Offering { at, first, written }: Offering, chains: u16) {
        (self.available, self.first, self.unpublished) = (at, first, written);
        self.offered += chains;
    }

    /// Asks for the next `count` descriptors, to write them: the device had them last.
    #[inline(always)]
    fn prefetch(&self, count: usize) {
        const PER_LINE: u16 = (64 / DESCRIPTOR_BYTES) as u16;
        let mut at = self.available;
        for _ in (0..count).step_by(PER_LINE.into()) {
            self.memory.prefetch(self.layout.descriptor(at.index), Wish::Write);
            at = at.after(PER_LINE.min(self.layout.size), self.layout.size);
        }
    }

    /// A descriptor's two words as a packed ring has them: id before flags, and no next.
    #[inline]
    pub(super) fn words(descriptor: Descriptor, id: u16, flags: u16) -> [u64; 2] {
        let Descriptor { address, bytes, .. } = descriptor;
        [address, u64::from(bytes) | u64::from(id) << 32 | u64::from(flags) << 48]
    }

    /// Makes all offered chains visible. True if the device has to be kicked for them.
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        let Some((offset, rest)) = self.first.take() else { return false };
        // Release: pairs with the device's acquire load of the flags; it sees descriptors and buffers.
        fence(Ordering::Release);
        self.memory.store_u64(offset, rest);
        let count = std::mem::take(&mut self.unpublished) as i32;
        self.in_flight += std::mem::take(&mut self.offered);
        // SeqCst: pairs with the fence between the device's store of its event structure and its last look at the ring.
        fence(Ordering::SeqCst);
        let event = self.memory.load_u32(self.layout.used_ring);
        match (event >> 16) as u16 & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                crosses(Position::from_bits(event as u16), self.available, count, self.layout.size)
            }
            _ => true,
        }
    }

    /// How many of the chains at `heads`, of one descriptor each and outstanding in this order, are used next and in this order;
    /// `each` is shown which one, and the bytes written. What is in their buffers may be read afterwards.
    #[inline(always)]
    pub fn reap_run(&mut self, heads: &[u16], mut each: impl FnMut(usize, u32)) -> usize {
        let heads = &heads[..heads.len().min(self.in_flight.into())];
        let (memory, layout) = (&*self.memory, self.layout);
        let mut count = 0;
        while count < heads.len() {
            // Up to the table's end.
            let run = heads[count..].iter().take((layout.size - self.used.index).into());
            let (flags, mut at, mut id) =
                (u32::from(self.used.used_flags()) << 16, layout.descriptor(self.used.index) + 8, None);
            let before = count;
            for &head in run {
                let rest = memory.load_u64(at);
                let used = (rest >> 32) as u32 & USED_MASK;
                if used != flags | u32::from(head) {
                    id = (used & !0xffff == flags).then_some(used as u16);
                    break;
                }
                each(count, rest as u32);
                count += 1;
                at += DESCRIPTOR_BYTES;
            }
            self.used = self.used.after((count - before) as u16, layout.size);
            if count == before {
                // Nothing is used here, or another one: with IN_ORDER the last of a batch.
                let last =
                    id.filter(|_| self.in_order).and_then(|id| heads[count..].iter().position(|head| *head == id));
                let Some(last) = last else { break };
                (count..=count + last).for_each(|at| each(at, 0));
                self.used = self.used.after(last as u16 + 1, layout.size);
                count += last + 1;
            }
        }
        self.in_flight -= count as u16;
        // Acquire: pairs with the device's release stores of the flags.
        fence(Ordering::Acquire);
        count
    }

    /// Shows up to `most` chains that the device has used to `each`, in its order; returns how many. What is in their buffers may
    /// be read afterwards.
    ///
    /// # Errors
    /// [`RingError::HeadNotOutstanding`] if it used what it was not given; what `each` says, which has to know what
    /// [`Self::reap_run`] has shown before.
    #[inline]
    pub fn reap(&mut self, most: u16, mut each: impl FnMut(Used) -> Result<(), RingError>) -> Result<u16, RingError> {
        let most = most.min(self.in_flight);
        let Self { layout, slots, chains, in_order, .. } = self;
        let (layout, in_order, memory) = (*layout, *in_order, &*self.memory);
        let (mut at, mut batch) = (self.used, self.batch);
        let mut count = 0;
        while count < most {
            let (expected, mut length) = chains[usize::from(at.index)];
            let (mut id, mut bytes) = (expected, 0);
            if batch.is_none() {
                let rest = memory.load_u64(layout.descriptor(at.index) + 8);
                if (rest >> 48) as u16 & (DESC_AVAIL | DESC_USED) != at.used_flags() {
                    break;
                }
                (id, bytes) = ((rest >> 32) as u16, rest as u32);
            } else if batch == Some(id) {
                batch = None;
            }
            if id != expected || length == 0 || slots[usize::from(id)] != length {
                length = unexpected(slots, id)?;
                if in_order {
                    if id == expected {
                        return Err(RingError::HeadNotOutstanding { head: u32::from(id) });
                    }
                    batch = Some(id);
                    continue;
                }
            }
            slots[usize::from(id)] = 0;
            each(Used { head: u32::from(id), bytes })?;
            at = at.after(length, layout.size);
            count += 1;
        }
        (self.used, self.batch) = (at, batch);
        self.in_flight -= count;
        // Acquire: pairs with the device's release stores of the flags.
        fence(Ordering::Acquire);
        match self.batch {
            Some(id) if self.in_flight == 0 => Err(RingError::HeadNotOutstanding { head: u32::from(id) }),
            _ => Ok(count),
        }
    }

    /// The driver polls: no calls, please.
    pub fn suppress_calls(&mut self) {
        self.write_event(EVENT_DISABLE);
    }

    /// Asks for a call at the next used chain. False if there is one already, which may never be called for: reap again
    /// before sleeping.
    pub fn enable_calls(&mut self) -> bool {
        self.write_event(if self.event_idx { EVENT_DESC } else { EVENT_ENABLE });
        // SeqCst: pairs with the fence between the device's store of used flags and its look at our structure.
        fence(Ordering::SeqCst);
        let flags = self.memory.load_u16(self.layout.descriptor(self.used.index) + 14, Ordering::Acquire);
        let used = self.in_flight > 0 && flags & (DESC_AVAIL | DESC_USED) == self.used.used_flags();
        self.batch.is_none() && !used
    }

    fn write_event(&self, flags: u16) {
        let word = u32::from(self.used.bits()) | u32::from(flags) << 16;
        self.memory.store_u32(self.layout.available_ring, word);
    }
}

/// How many descriptors the chain with this id has. Not inlined: whoever does expect it does not wait for the answer.
#[cold]
#[inline(never)]
fn unexpected(slots: &[u16], id: u16) -> Result<u16, RingError> {
    match slots.get(usize::from(id)) {
        None | Some(0) => Err(RingError::HeadNotOutstanding { head: u32::from(id) }),
        Some(length) => Ok(*length),
    }
}

/// VIRTIO 1.2 §2.8.10: whether the descriptor at `event` is among the `count` before `new`.
fn crosses(event: Position, new: Position, count: i32, size: u16) -> bool {
    // Counted from the start of the lap that `new` is in.
    let end = i32::from(new.index);
    let event = i32::from(event.index) - if event.wrap == new.wrap { 0 } else { i32::from(size) };
    (end - count..end).contains(&event)
}

const _: () = assert!(DESCRIPTOR_BYTES == 16, "length, id and flags are the second half of a descriptor");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front_end::memory::Arena;

    fn ring(size: u16, event_idx: bool, base: u16) -> PackedRing {
        ring_in_order(size, event_idx, false, base)
    }

    fn ring_in_order(size: u16, event_idx: bool, in_order: bool, base: u16) -> PackedRing {
        let memory = Arc::new(GuestMemory::new(1 << 16, 1).unwrap());
        let layout = RingLayout::place_packed(&mut Arena::new(&memory), size).unwrap();
        PackedRing::new(memory, layout, event_idx, in_order, base)
    }

    fn flags(ring: &PackedRing, index: u16) -> u16 {
        ring.memory.load_u16(ring.layout.descriptor(index) + 14, Ordering::Acquire)
    }

    fn device_uses(ring: &PackedRing, at: Position, id: u16, bytes: u32) {
        let offset = ring.layout.descriptor(at.index);
        let rest = u64::from(bytes) | u64::from(id) << 32 | u64::from(at.used_flags()) << 48;
        ring.memory.store_u64(offset + 8, rest);
    }

    fn reap(ring: &mut PackedRing, most: u16) -> Result<Vec<Used>, RingError> {
        let mut all = Vec::new();
        let count = ring.reap(most, |used| {
            all.push(used);
            Ok(())
        })?;
        assert_eq!(usize::from(count), all.len());
        Ok(all)
    }

    #[test]
    fn offered_chains_stay_invisible_until_published() {
        let mut ring = ring(3, false, 2);
        ring.set_descriptor(0, Descriptor { address: 0x1000, bytes: 12, flags: DESC_NEXT, next: 1 });
        ring.set_descriptor(1, Descriptor { address: 0x2000, bytes: 60, flags: 0, next: 0 });
        let before = flags(&ring, 2);
        ring.offer(0);
        assert_eq!(flags(&ring, 2), before);
        assert!(ring.publish(), "the device's structure is zero: it wants kicks");
        // The last descriptor of the first lap, the first of the second.
        assert_eq!(flags(&ring, 2), DESC_AVAIL | DESC_NEXT);
        assert_eq!(flags(&ring, 0), DESC_USED);
        assert_eq!(ring.memory.load_u64(ring.layout.descriptor(0)), 0x2000);
        assert!(!ring.publish(), "nothing new");
        assert_eq!(reap(&mut ring, 9), Ok(vec![]));
        device_uses(&ring, Position { index: 2, wrap: true }, 0, 72);
        assert_eq!(reap(&mut ring, 9), Ok(vec![Used { head: 0, bytes: 72 }]));
        assert_eq!((ring.outstanding(), ring.position()), (0, Position { index: 1, wrap: false }));
    }

    #[test]
    fn an_id_that_was_not_given_is_an_error() {
        let mut ring = ring(4, true, 0);
        ring.offer(2);
        ring.publish();
        device_uses(&ring, Position::START, 3, 0);
        assert_eq!(reap(&mut ring, 9), Err(RingError::HeadNotOutstanding { head: 3 }));
    }

    #[test]
    fn an_id_that_was_given_back_is_an_error() {
        let mut ring = ring(4, true, 0);
        for head in [2, 1] {
            ring.offer(head);
        }
        ring.publish();
        device_uses(&ring, Position::START, 2, 0);
        device_uses(&ring, Position { index: 1, wrap: true }, 2, 0);
        assert_eq!(reap(&mut ring, 1).unwrap().len(), 1);
        assert_eq!(reap(&mut ring, 1), Err(RingError::HeadNotOutstanding { head: 2 }));
    }

    #[test]
    fn a_device_may_finish_in_any_order() {
        let mut ring = ring(4, true, 3);
        ring.set_descriptor(1, Descriptor { address: 0x1000, bytes: 12, flags: DESC_NEXT, next: 2 });
        for head in [3, 1, 0] {
            ring.offer(head);
        }
        ring.publish();
        // The second one is two descriptors long, so the next one that it uses is two further on.
        device_uses(&ring, Position { index: 3, wrap: true }, 1, 5);
        device_uses(&ring, Position { index: 1, wrap: false }, 0, 6);
        device_uses(&ring, Position { index: 2, wrap: false }, 3, 7);
        let used = [(1, 5), (0, 6), (3, 7)].map(|(head, bytes)| Used { head, bytes });
        assert_eq!(reap(&mut ring, 9).unwrap(), used);
        assert_eq!((ring.outstanding(), ring.position()), (0, Position { index: 3, wrap: false }));
    }

    #[test]
    fn one_used_descriptor_stands_for_all_that_were_offered_before() {
        let mut ring = ring_in_order(4, true, true, 3);
        ring.set_descriptor(1, Descriptor { address: 0x1000, bytes: 12, flags: DESC_NEXT, next: 2 });
        for head in [3, 1] {
            ring.offer(head);
        }
        ring.publish();
        ring.offer(0);
        device_uses(&ring, Position { index: 3, wrap: true }, 1, 0);
        // In as many pieces as the caller likes.
        for head in [3, 1] {
            assert_eq!(reap(&mut ring, 1), Ok(vec![Used { head, bytes: 0 }]));
        }
        assert_eq!(reap(&mut ring, 1), Ok(vec![]));
        assert_eq!((ring.outstanding(), ring.position()), (1, Position { index: 2, wrap: false }));
        ring.publish();
        device_uses(&ring, ring.position(), 0, 0);
        assert_eq!(reap(&mut ring, 9).unwrap().len(), 1);
    }

    #[test]
    fn a_batch_that_reaches_beyond_what_was_published_is_an_error() {
        let mut ring = ring_in_order(4, true, true, 0);
        ring.offer(0);
        ring.publish();
        ring.offer(1);
        ring.offer(2);
        device_uses(&ring, Position::START, 2, 0);
        assert!(reap(&mut ring, 9).is_err());
    }

    /// Offers and publishes chains of one descriptor, none of which is in the table.
    fn offer_run(ring: &mut PackedRing, heads: &[u16]) {
        ring.offer_run(heads, |head| Descriptor { address: 0x1000, bytes: u32::from(head), flags: 0, next: 0 });
        ring.publish();
    }

    fn reap_run(ring: &mut PackedRing, heads: &[u16]) -> Vec<(usize, u32)> {
        let mut all = Vec::new();
        let count = ring.reap_run(heads, |at, bytes| all.push((at, bytes)));
        assert_eq!(count, all.len());
        all
    }

    #[test]
    fn a_run_is_reaped_across_the_end_of_the_table_as_far_as_it_is_used_in_this_order() {
        let mut ring = ring(4, true, 3);
        offer_run(&mut ring, &[2, 0, 3]);
        assert_eq!(reap_run(&mut ring, &[2, 0, 3]), [], "nothing is used");
        device_uses(&ring, Position { index: 3, wrap: true }, 2, 5);
        device_uses(&ring, Position { index: 0, wrap: false }, 0, 6);
        device_uses(&ring, Position { index: 1, wrap: false }, 1, 7);
        assert_eq!(reap_run(&mut ring, &[2, 0, 3]), [(0, 5), (1, 6)], "the third was not given");
        assert_eq!((ring.outstanding(), ring.position()), (1, Position { index: 1, wrap: false }));
        assert_eq!(reap(&mut ring, 9), Err(RingError::HeadNotOutstanding { head: 1 }));
    }

    #[test]
    fn a_run_that_one_descriptor_stands_for_is_used_up_to_its_id_and_no_further_than_was_published() {
        let mut ring = ring_in_order(4, true, true, 3);
        offer_run(&mut ring, &[0, 1, 2]);
        device_uses(&ring, Position { index: 3, wrap: true }, 1, 9);
        assert_eq!(reap_run(&mut ring, &[0, 1, 2]), [(0, 0), (1, 0)]);
        assert_eq!(ring.position(), Position { index: 1, wrap: false });
        device_uses(&ring, ring.position(), 2, 9);
        ring.offer_run(&[3], |_| Descriptor::default());
        assert_eq!(reap_run(&mut ring, &[2, 3]), [(0, 9)], "one by itself says its length");
        device_uses(&ring, ring.position(), 3, 0);
        assert_eq!(reap_run(&mut ring, &[3]), [], "not published");
    }

    #[test]
    fn kick_is_due_when_its_descriptor_is_crossed_and_only_then() {
        let mut ring = ring(4, true, 3);
        // One on, across the end of the table.
        let event = Position { index: 0, wrap: false };
        ring.memory.store_u32(ring.layout.used_ring, u32::from(event.bits()) | u32::from(EVENT_DESC) << 16);
        ring.offer(0);
        assert!(!ring.publish());
        ring.offer(1);
        assert!(ring.publish());
        ring.offer(2);
        assert!(!ring.publish());
    }

    #[test]
    fn enabling_calls_reports_what_arrived_meanwhile() {
        let mut ring = ring(4, true, 0);
        ring.offer(0);
        ring.publish();
        assert!(ring.enable_calls());
        assert_eq!(ring.memory.load_u32(ring.layout.available_ring), 0x2_8000);
        device_uses(&ring, Position::START, 0, 0);
        assert!(!ring.enable_calls());
    }
}
