//! The driver's side of a split ring: post descriptors, publish them, reap what the device used.
//!
//! Theory of operation. The driver owns the descriptor table and the available ring, the device the used ring.
//! `offer` writes entries that the device cannot see yet, `publish` makes them visible with one release store of
//! idx and tells whether the device wants a kick; `reap` takes what lies between our index and the device's.
//! Which buffers a head stands for is the caller's business (transmit.rs, receive.rs), so that a packed ring
//! can take this file's place with the same verbs: set_descriptor, offer, publish, reap, suppress_calls,
//! enable_calls, and for chains of one descriptor in a row offer_run and reap_run.
//!
//! Every word that we wrote is remembered in private memory, and a store that would change nothing is left out:
//! it would only take the cache line away from the device. A device that finishes in order thus costs the
//! driver one store of idx per burst. Drivers in use write their descriptors each time: [`SplitRing::rewrite`].
//!
//! Nothing that the device writes is trusted: an index that jumps or a head out of range is a [`RingError`].

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::layout::{AVAIL_NO_INTERRUPT, Descriptor, RingLayout, USED_NO_NOTIFY, Used};
use super::memory::GuestMemory;

/// With EVENT_IDX a polling driver keeps used_event this far ahead, so that the device never calls: the event
/// would have to lie in a burst, and a burst is at most the ring (32768 entries, VIRTIO 1.2 §2.7).
const EVENT_AHEAD: u16 = 0x8000;

/// What a device did wrong on a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// More entries used than are outstanding.
    #[error("used idx went from {from} to {to}, but only {outstanding} chains are outstanding")]
    IndexJump {
        /// Where we had read to.
        from: u16,
        /// What the device wrote.
        to: u16,
        /// Chains offered and not yet used.
        outstanding: u16,
    },
    /// A head that was never offered, or not any more.
    #[error("the device used head {head}, which is not outstanding")]
    HeadNotOutstanding {
        /// What the used ring said.
        head: u32,
    },
    /// More bytes written than the buffers had, or fewer than a header.
    #[error("the device reports {bytes} bytes written where {least} to {most} are possible")]
    WrittenBytes {
        /// What the used ring said.
        bytes: u32,
        /// Least that makes sense.
        least: u32,
        /// Most that fits.
        most: u32,
    },
    /// num_buffers zero or more than a ring.
    #[error("the device reports a frame of {0} buffers")]
    BufferCount(u16),
    /// A frame longer than virtio-net can carry.
    #[error("the device delivered a frame of {0} bytes")]
    FrameTooLong(usize),
}

/// One split virtqueue, driven by us.
#[derive(Debug)]
pub struct SplitRing {
    memory: Arc<GuestMemory>,
    layout: RingLayout,
    event_idx: bool,
    /// Next available index to fill, and the one last published.
    available: u16,
    published: u16,
    /// Next used index to read.
    used: u16,
    /// used_event as last written while polling.
    event: u16,
    polling: bool,
    table: Box<[[u64; 2]]>,
    entries: Box<[u16]>,
    rewrite: bool,
}

impl SplitRing {
    /// A ring whose indices both start at `base`, polling. Writes indices and flags into memory.
    pub fn new(memory: Arc<GuestMemory>, layout: RingLayout, event_idx: bool, base: u16) -> Self {
        let entries = usize::from(layout.size);
        let mut ring = Self {
            event_idx,
            available: base,
            published: base,
            used: base,
            event: base,
            polling: true,
            table: vec![[0; 2]; entries].into(),
            entries: vec![0; entries].into(),
            rewrite: false,
            memory,
            layout,
        };
        for index in 0..layout.size {
            ring.write_descriptor(index, 0, 0);
            ring.memory.store_u16(layout.available_entry(index), 0, Ordering::Relaxed);
        }
        ring.memory.store_u16(layout.used_flags(), 0, Ordering::Relaxed);
        ring.memory.store_u16(layout.available_event(), base, Ordering::Relaxed);
        // Before the device is told of the ring: the message that does so orders these stores.
        ring.memory.store_u16(layout.used_index(), base, Ordering::Release);
        ring.memory.store_u16(layout.available_index(), base, Ordering::Release);
        ring.suppress_calls();
        ring
    }

    /// The same ring, whose driver writes each descriptor anew, as Linux and DPDK do: the next buffer is another one.
    pub fn rewrite(self, rewrite: bool) -> Self {
        Self { rewrite, ..self }
    }

    /// Where its parts lie.
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// The memory that it lies in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Chains offered and not yet reaped.
    pub fn outstanding(&self) -> u16 {
        self.available.wrapping_sub(self.used)
    }

    /// Sets a descriptor. The caller sees to it that no outstanding chain contains it.
    #[inline(always)]
    pub fn set_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        // In two registers all the way: put together on the stack the words cost 5 ns a frame in stalled loads.
        let [address, rest] = descriptor.words();
        let [old_address, old_rest] = self.table[usize::from(index)];
        if self.rewrite || address != old_address || rest != old_rest {
            self.write_descriptor(index, address, rest);
        }
    }

    fn write_descriptor(&mut self, index: u16, address: u64, rest: u64) {
        let offset = self.layout.descriptor(index);
        self.memory.store_u64(offset, address);
        self.memory.store_u64(offset + 8, rest);
        self.table[usize::from(index)] = [address, rest];
    }

    /// Enters a chain into the available ring; invisible to the device until [`Self::publish`].
    #[inline(always)]
    pub fn offer(&mut self, head: u16) {
        self.enter(self.available, head);
        self.available = self.available.wrapping_add(1);
    }

    #[inline(always)]
    fn enter(&mut self, index: u16, head: u16) {
        let slot = usize::from(index & (self.layout.size - 1));
        if self.entries[slot] != head {
            self.memory.store_u16(self.layout.available_entry(index), head, Ordering::Relaxed);
            self.entries[slot] = head;
        }
    }

    /// Sets the one descriptor of each of the chains at `heads`, and enters it.
    #[inline(always)]
    pub fn offer_run(&mut self, heads: &[u16], mut descriptor: impl FnMut(u16) -> Descriptor) {
        // Counted in a register: an index stored and loaded again for each chain was half of its cost.
        let mut available = self.available;
        for &head in heads {
            self.set_descriptor(head, descriptor(head));
            self.enter(available, head);
            available = available.wrapping_add(1);
        }
        self.available = available;
    }

    /// Makes all offered chains visible. True if the device has to be kicked for them.
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        if old == self.available {
            return false;
        }
        // Release: pairs with the device's acquire load of idx; it sees the entries, descriptors and buffers.
        self.memory.store_u16(self.layout.available_index(), self.available, Ordering::Release);
        self.published = self.available;
        // SeqCst: pairs with the fence between the device's store of avail_event (or of flags) and its last look
        // at idx. Without it both could read the old value, and the device would sleep on a full ring.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.memory.load_u16(self.layout.available_event(), Ordering::Relaxed);
            crosses(event, self.available, old)
        } else {
            self.memory.load_u16(self.layout.used_flags(), Ordering::Relaxed) & USED_NO_NOTIFY == 0
        }
    }

    /// How many of the chains at `heads` are used next and in this order; `each` is shown which one, and the bytes written.
    /// [`Self::reap`] has to follow, which keeps used_event ahead and reports what the device did wrong.
    #[inline(always)]
    pub fn reap_run(&mut self, heads: &[u16], mut each: impl FnMut(usize, u32)) -> usize {
        // Acquire: as in `reap`. What cannot be is for that one to report.
        let pending = self.memory.load_u16(self.layout.used_index(), Ordering::Acquire).wrapping_sub(self.used);
        if pending > self.published.wrapping_sub(self.used) {
            return 0;
        }
        let (memory, layout, used) = (&*self.memory, self.layout, self.used);
        let mut count = 0;
        for (at, &head) in heads.iter().take(pending.into()).enumerate() {
            let offset = layout.used_entry(used.wrapping_add(at as u16));
            if memory.load_u32(offset) != u32::from(head) {
                break;
            }
            each(at, memory.load_u32(offset + 4));
            count += 1;
        }
        self.used = used.wrapping_add(count as u16);
        count
    }

    /// Shows up to `most` used entries to `each`, oldest first; returns how many.
    ///
    /// # Errors
    /// [`RingError::IndexJump`] if the device used more than there was; what `each` says.
    #[inline]
    pub fn reap(&mut self, most: u16, mut each: impl FnMut(Used) -> Result<(), RingError>) -> Result<u16, RingError> {
        // Acquire: pairs with the device's release store of idx; entries and buffers written before are visible.
        let to = self.memory.load_u16(self.layout.used_index(), Ordering::Acquire);
        let outstanding = self.published.wrapping_sub(self.used);
        let pending = to.wrapping_sub(self.used);
        if pending > outstanding {
            return Err(RingError::IndexJump { from: self.used, to, outstanding });
        }
        let count = pending.min(most);
        for ahead in 0..count {
            let offset = self.layout.used_entry(self.used.wrapping_add(ahead));
            each(Used { head: self.memory.load_u32(offset), bytes: self.memory.load_u32(offset + 4) })?;
        }
        self.used = self.used.wrapping_add(count);
        // Rarely rewritten: the line also ends the available ring, which the device reads.
        if self.polling && self.event_idx && self.event.wrapping_sub(self.used) < EVENT_AHEAD / 2 {
            self.write_event_ahead();
        }
        Ok(count)
    }

    /// The driver polls: no calls, please.
    pub fn suppress_calls(&mut self) {
        self.polling = true;
        // With EVENT_IDX the driver MUST leave flags at 0 (VIRTIO 1.2 §2.7.7.1).
        self.memory.store_u16(
            self.layout.available_flags(),
            if self.event_idx { 0 } else { AVAIL_NO_INTERRUPT },
            Ordering::Relaxed,
        );
        self.write_event_ahead();
    }

    fn write_event_ahead(&mut self) {
        self.event = self.used.wrapping_add(EVENT_AHEAD);
        self.memory.store_u16(self.layout.used_event(), self.event, Ordering::Relaxed);
    }

    /// Asks for a call at the next used entry. False if entries arrived meanwhile, which may never be called for:
    /// reap again before sleeping.
    pub fn enable_calls(&mut self) -> bool {
        self.polling = false;
        self.event = self.used;
        self.memory.store_u16(self.layout.used_event(), self.used, Ordering::Relaxed);
        self.memory.store_u16(self.layout.available_flags(), 0, Ordering::Relaxed);
        // SeqCst: pairs with the fence between the device's store of used idx and its look at used_event (or flags).
        fence(Ordering::SeqCst);
        self.memory.load_u16(self.layout.used_index(), Ordering::Acquire) == self.used
    }
}

/// VIRTIO 1.2 §2.7.7.2, §2.7.10: a notification is due when `event` lies in [old, new). u16 wraps; the subtraction is
/// the comparison.
#[inline]
fn crosses(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::front_end::memory::Arena;

    fn ring(event_idx: bool, base: u16) -> SplitRing {
        let memory = Arc::new(GuestMemory::new(1 << 16, 1).unwrap());
        let layout = RingLayout::place(&mut Arena::new(&memory), 8).unwrap();
        SplitRing::new(memory, layout, event_idx, base)
    }

    fn device_uses(ring: &SplitRing, used: &[(u32, u32)], index: u16) {
        for (position, (head, bytes)) in used.iter().enumerate() {
            let offset = ring.layout.used_entry(index.wrapping_sub(used.len() as u16).wrapping_add(position as u16));
            ring.memory.store_u32(offset, *head);
            ring.memory.store_u32(offset + 4, *bytes);
        }
        ring.memory.store_u16(ring.layout.used_index(), index, Ordering::Release);
    }

    #[test]
    fn event_lies_in_the_half_open_interval() {
        assert!(crosses(5, 6, 5));
        assert!(!crosses(6, 6, 5));
        assert!(!crosses(4, 6, 5));
        assert!(crosses(0xffff, 1, 0xfffe), "across the wrap");
        assert!(!crosses(1, 1, 0xfffe));
    }

    #[test]
    fn offered_entries_stay_invisible_until_published() {
        let mut ring = ring(false, 65534);
        for head in [3, 1, 2] {
            ring.offer(head);
        }
        let index = |ring: &SplitRing| ring.memory.load_u16(ring.layout.available_index(), Ordering::Acquire);
        assert_eq!(index(&ring), 65534);
        assert!(ring.publish(), "flags are 0: the device wants kicks");
        assert_eq!(index(&ring), 1);
        assert_eq!(ring.memory.load_u16(ring.layout.available_entry(65534), Ordering::Relaxed), 3);
        assert_eq!(ring.memory.load_u16(ring.layout.available_entry(0), Ordering::Relaxed), 2);
        assert!(!ring.publish(), "nothing new");
    }

    #[test]
    fn device_that_polls_is_not_kicked() {
        let mut ring = ring(false, 0);
        ring.memory.store_u16(ring.layout.used_flags(), USED_NO_NOTIFY, Ordering::Relaxed);
        ring.offer(0);
        assert!(!ring.publish());
    }

    #[test]
    fn kick_is_due_when_the_avail_event_is_crossed_and_only_then() {
        let mut ring = ring(true, 0);
        ring.memory.store_u16(ring.layout.available_event(), 1, Ordering::Relaxed);
        ring.offer(0);
        assert!(!ring.publish(), "event 1 not in [0, 1)");
        ring.offer(1);
        assert!(ring.publish(), "event 1 in [1, 2)");
    }

    #[test]
    fn used_entries_come_out_in_order_across_the_wrap() {
        let mut ring = ring(true, 65535);
        for head in 0..4 {
            ring.offer(head);
        }
        ring.publish();
        device_uses(&ring, &[(2, 20), (0, 10)], 1);
        let mut seen = Vec::new();
        for most in [1, 9] {
            let note = |used| {
                seen.push(used);
                Ok(())
            };
            assert_eq!(ring.reap(most, note), Ok(1));
        }
        assert_eq!(seen, [Used { head: 2, bytes: 20 }, Used { head: 0, bytes: 10 }]);
        assert_eq!(ring.outstanding(), 2);
    }

    #[test]
    fn used_index_beyond_what_is_outstanding_is_an_error() {
        let mut ring = ring(true, 0);
        ring.offer(0);
        ring.publish();
        device_uses(&ring, &[], 2);
        assert_eq!(ring.reap(9, |_| Ok(())), Err(RingError::IndexJump { from: 0, to: 2, outstanding: 1 }));
    }

    #[test]
    fn polling_driver_keeps_used_event_out_of_reach() {
        let mut ring = ring(true, 0);
        for round in 0..30_000_u16 {
            ring.offer(round & 7);
            ring.publish();
            let event = ring.memory.load_u16(ring.layout.used_event(), Ordering::Relaxed);
            assert!(!crosses(event, round.wrapping_add(8), round), "round {round}");
            device_uses(&ring, &[(u32::from(round & 7), 0)], round.wrapping_add(1));
            ring.reap(8, |_| Ok(())).unwrap();
        }
    }

    #[test]
    fn enabling_calls_reports_entries_that_arrived_meanwhile() {
        let mut ring = ring(true, 0);
        ring.offer(0);
        ring.publish();
        assert!(ring.enable_calls());
        assert_eq!(ring.memory.load_u16(ring.layout.used_event(), Ordering::Relaxed), 0);
        device_uses(&ring, &[(0, 0)], 1);
        assert!(!ring.enable_calls());
    }
}
