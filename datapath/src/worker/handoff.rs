//! The hand-off: how frames and learned addresses reach the worker that owns the port or underlay they are for.
//!
//! Between each ordered pair of workers there is a [`Link`] of fixed size, allocated at the start. The sender copies
//! frames whole into a [`Parcel`] and ships it when it is full, at the latest at the end of its turn; the receiver sends
//! what is in it and gives it back. So a parcel costs four queue operations, whatever is in it; a frame costs one copy
//! more than between ports of one worker; and frames of one sender keep their order. A link is full when all of its parcels
//! are on the way: then frames are dropped and counted, nobody waits. A source may fill half of the free ones with one burst.
//!
//! Between two turns nothing is half done: every parcel with something in it was shipped.

use std::io;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{BURST, FRAME_BYTES_MAX};

use super::doorbell::Doorbell;
use super::outgoing::Outgoing;
use crate::burst::{Burst, NextHop};
use crate::counters::WorkerCounters;
use crate::fdb::Seen;
use crate::snapshot::WorkerId;

/// Parcels of one link: as many large frames (64 KB) can be under way, or bursts of small ones.
pub(crate) const PARCELS: usize = 32;

/// Bytes in one parcel behind its header copies: one frame of the largest size, or a burst of frames of 1518 bytes and
/// half another.
const PARCEL_BYTES: usize = 72 * 1024;

const _: () = assert!(PARCEL_BYTES >= FRAME_BYTES_MAX as usize);

/// Learned addresses under way on one link at most.
pub(super) const SEEN_MAX: usize = 1024;

/// Frames on their way to another worker: a burst that was decided on, and the bytes behind its header copies.
#[derive(Debug)]
pub(crate) struct Parcel {
    /// A next hop is one of the receiver's ports; another host, through its underlay; or a flood: all of its ports in the
    /// frame's network, and the tunnel, as if the frame had come from its origin there. Datagrams are the frames
    /// themselves.
    pub(crate) burst: Burst,
    /// Where the bytes of each begin.
    tails: [u32; BURST],
    bytes: Box<[u8]>,
    used: usize,
}

impl Parcel {
    fn new() -> Self {
        let bytes = vec![0; PARCEL_BYTES].into_boxed_slice();
        Self { burst: Burst::default(), tails: [0; BURST], bytes, used: 0 }
    }

    /// Copies a frame, unless it does not fit any more.
    #[inline]
    fn put(&mut self, next_hop: NextHop, frame: Outgoing<'_>) -> bool {
        let Self { burst, tails, bytes, used } = self;
        let (header, payload, index) = (frame.header(), frame.payload(), burst.length);
        let end = *used + payload.bytes() as usize;
        let Some(room) = bytes.get_mut(*used..end).filter(|_| index < BURST) else { return false };
        payload.copy_out(room);
        let copy = &mut burst.frames[index];
        copy.header[..header.len()].copy_from_slice(header);
        copy.header_bytes = header.len() as u16;
        copy.frame_bytes = header.len() as u32 + payload.bytes();
        burst.networks[index] = frame.network();
        burst.origins[index] = frame.burst.origins[frame.index];
        if let Some(offload) = frame.offload() {
            burst.set_offload(index, *offload);
        }
        burst.groups[index] = frame.burst.groups[frame.index];
        burst.next_hops[index] = next_hop;
        burst.datagrams[index] = index as u8;
        burst.length += 1;
        tails[index] = *used as u32;
        *used = end;
        true
    }

    /// The bytes of frame `index` behind its header copy.
    #[inline]
    pub(crate) fn payload(&self, frame: &RawFrame, index: usize) -> Payload<'_> {
        Payload::private(&self.bytes[self.tails[index] as usize..][..frame.tail_bytes() as usize])
    }

    fn clear(&mut self) {
        self.burst.length = 0;
        self.burst.all_finished();
        self.used = 0;
    }
}

/// From one worker to another.
#[derive(Debug)]
struct Link {
    /// At most [`PARCELS`] exist, so that a push to one of these two never fails.
    shipped: ArrayQueue<Parcel>,
    returned: ArrayQueue<Parcel>,
    seen: ArrayQueue<Seen>,
}

/// What wakes a worker for its inbox.
#[derive(Debug)]
struct Bell {
    door: Doorbell,
    wake: EventFd,
}

/// The sender's end of a link.
#[derive(Debug)]
struct Lane {
    link: Arc<Link>,
    bell: Arc<Bell>,
    /// Being filled.
    open: Option<Parcel>,
    /// Empty ones; the last is the one that was used last, whose memory is the warmest.
    spare: Vec<Parcel>,
    /// Parcels that the source whose burst is under way may still open.
    share: usize,
    /// Something was left since the bell was last rung.
    left: bool,
}

impl Lane {
    /// Another source's burst begins: it gets half of what is free, so that one that sends large frames, of which each fills
    /// a parcel, leaves the others room.
    fn begin(&mut self) {
        while let Some(parcel) = self.link.returned.pop() {
            self.spare.push(parcel);
        }
        self.share = self.spare.len().div_ceil(2);
    }

    #[inline]
    fn put(&mut self, next_hop: NextHop, frame: Outgoing<'_>, counters: &WorkerCounters) -> bool {
        if let Some(open) = &mut self.open {
            if open.put(next_hop, frame) {
                return true;
            }
            self.ship(counters);
        }
        let Some(share) = self.share.checked_sub(1) else { return false };
        let Some(mut parcel) = self.spare.pop() else { return false };
        self.share = share;
        let fits = parcel.put(next_hop, frame);
        debug_assert!(fits, "an empty parcel has room for any frame");
        self.open = Some(parcel);
        fits
    }

    fn ship(&mut self, counters: &WorkerCounters) {
        if let Some(parcel) = self.open.take() {
            counters.handoff_tx.add(parcel.burst.length as u64);
            let shipped = self.link.shipped.push(parcel);
            debug_assert!(shipped.is_ok(), "there are no more parcels than places");
            self.left = true;
        }
    }

    /// Wakes the receiver if something was left for it and it sleeps.
    fn ring(&mut self, counters: &WorkerCounters) {
        if std::mem::take(&mut self.left) && self.bell.door.must_wake() {
            counters.handoff_wakes.add(1);
            // Our own eventfd: the write fails only when the counter is full, and then it is readable anyway.
            let _ = self.bell.wake.signal();
        }
    }
}

/// A worker's ends of all links to others. Empty where there is one worker.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// By worker; none to itself.
    lanes: Vec<Option<Lane>>,
    counters: Arc<WorkerCounters>,
}

impl Outbox {
    /// Whether there is nobody to hand anything to.
    #[inline]
    pub(super) fn is_alone(&self) -> bool {
        self.lanes.is_empty()
    }

    pub(super) fn count_at(&mut self, counters: &Arc<WorkerCounters>) {
        self.counters = Arc::clone(counters);
    }

    /// What is put from now on is another source's.
    #[inline]
    pub(super) fn begin(&mut self) {
        self.lanes.iter_mut().flatten().for_each(Lane::begin);
    }

    /// Copies a frame for worker `to`; false if the link is full.
    #[inline]
    pub(super) fn put(&mut self, to: WorkerId, next_hop: NextHop, frame: Outgoing<'_>) -> bool {
        let lane = self.lanes.get_mut(usize::from(to.0)).and_then(Option::as_mut);
        lane.is_some_and(|lane| lane.put(next_hop, frame, &self.counters))
    }

    /// Counts a frame that came from another worker and is counted nowhere else.
    pub(super) fn count_removed(&self) {
        self.counters.handoff_removed.add(1);
    }

    /// Tells everybody where a station was seen.
    pub(super) fn tell(&mut self, seen: Seen) {
        for lane in self.lanes.iter_mut().flatten() {
            match lane.link.seen.push(seen) {
                Ok(()) => lane.left = true,
                // The next refresh says it again, within a second of traffic.
                Err(_) => self.counters.handoff_unlearned.add(1),
            }
        }
    }

    /// Ships everything, and wakes those that sleep.
    pub(super) fn ship(&mut self) {
        for lane in self.lanes.iter_mut().flatten() {
            lane.ship(&self.counters);
            lane.ring(&self.counters);
        }
    }
}

/// A worker's ends of all links from others. Empty where there is one worker.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    links: Vec<Arc<Link>>,
    bell: Option<Arc<Bell>>,
}

impl Inbox {
    /// How many others there are.
    #[inline]
    pub(super) fn senders(&self) -> usize {
        self.links.len()
    }

    /// The next parcel from the sender at place `index`.
    pub(super) fn take(&self, index: usize) -> Option<Parcel> {
        self.links[index].shipped.pop()
    }

    /// Returns a parcel, emptied, to the sender at place `index`.
    pub(super) fn give_back(&self, index: usize, mut parcel: Parcel) {
        parcel.clear();
        let returned = self.links[index].returned.push(parcel);
        debug_assert!(returned.is_ok(), "there are no more parcels than places");
    }

    /// The next address that the sender at place `index` has learned.
    #[inline]
    pub(super) fn hear(&self, index: usize) -> Option<Seen> {
        self.links[index].seen.pop()
    }

    /// Has the worker woken for what comes from now on; false if there is something already.
    pub(super) fn lie_down(&self) -> bool {
        let Some(bell) = &self.bell else { return true };
        bell.door.lie_down();
        self.links.iter().all(|link| link.shipped.is_empty() && link.seen.is_empty())
    }

    /// The opposite.
    pub(super) fn get_up(&self) {
        if let Some(bell) = &self.bell {
            bell.door.get_up();
        }
    }

    /// For epoll.
    pub(super) fn wake(&self) -> Option<&EventFd> {
        self.bell.as_ref().map(|bell| &bell.wake)
    }
}

/// One worker's ends of all links. Public for tests and harnesses that run turns themselves.
#[derive(Debug, Default)]
pub struct Links {
    pub(super) outbox: Outbox,
    pub(super) inbox: Inbox,
}

impl Links {
    /// Joins `workers` workers; the links of each, in their order. Fails if descriptors have run out.
    pub fn mesh(workers: usize) -> io::Result<Vec<Self>> {
        if workers < 2 {
            return Ok((0..workers).map(|_| Self::default()).collect());
        }
        let bells: io::Result<Vec<_>> =
            (0..workers).map(|_| Ok(Arc::new(Bell { door: Doorbell::new(), wake: EventFd::new()? }))).collect();
        let bells = bells?;
        let mut all: Vec<Self> = bells
            .iter()
            .map(|bell| Self { inbox: Inbox { bell: Some(Arc::clone(bell)), ..Inbox::default() }, ..Self::default() })
            .collect();
        for from in 0..workers {
            for (to, bell) in bells.iter().enumerate() {
                if from == to {
                    all[from].outbox.lanes.push(None);
                    continue;
                }
                let link = Arc::new(Link {
                    shipped: ArrayQueue::new(PARCELS),
                    returned: ArrayQueue::new(PARCELS),
                    seen: ArrayQueue::new(SEEN_MAX),
                });
                all[to].inbox.links.push(Arc::clone(&link));
                let spare = (0..PARCELS).map(|_| Parcel::new()).collect();
                let lane = Lane { link, bell: Arc::clone(bell), open: None, spare, share: 0, left: false };
                all[from].outbox.lanes.push(Some(lane));
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::Offload;
    use crate::snapshot::{NetworkId, PortId};
    use crate::stage::transmit::Tails;

    #[test]
    fn the_largest_frame_crosses_uncut_and_tells_what_its_sender_left_undone() {
        let all = Links::mesh(2).unwrap();
        let [mut here, there] = <[Links; 2]>::try_from(all).unwrap();
        let largest: Vec<u8> = (0..FRAME_BYTES_MAX).map(|at| ((at * 7) >> 3) as u8).collect();
        let mut from = Parcel::new();
        from.bytes[..largest.len() - 128].copy_from_slice(&largest[128..]);
        for (index, bytes) in [128, largest.len(), largest.len(), 128].into_iter().enumerate() {
            let frame = &mut from.burst.frames[index];
            frame.header.copy_from_slice(&largest[..128]);
            (frame.header_bytes, frame.frame_bytes) = (128, bytes as u32);
            from.burst.networks[index] = NetworkId(3);
            if index != 1 {
                from.burst.set_offload(index, Offload { checksum: Some((34, 16)), ..Offload::NONE });
            }
        }
        let next_hop = NextHop::Port(PortId(9));
        fn frame(index: usize, parcel: &Parcel) -> Outgoing<'_> {
            Outgoing { burst: &parcel.burst, tails: Tails::Parcel(parcel), index }
        }
        for _ in 0..2 * PARCELS {
            here.outbox.begin();
            // Two large ones do not fit together: what does not fit ships what is before it.
            for index in 0..4 {
                assert!(here.outbox.put(WorkerId(1), next_hop, frame(index, &from)));
            }
            here.outbox.ship();
            let mut lengths = Vec::new();
            while let Some(parcel) = there.inbox.take(0) {
                for index in 0..parcel.burst.length {
                    let got = frame(index, &parcel);
                    let mut whole = got.header().to_vec();
                    whole.resize(128 + got.payload().bytes() as usize, 0);
                    got.payload().copy_out(&mut whole[128..]);
                    assert_eq!((parcel.burst.next_hops[index], got.network()), (next_hop, NetworkId(3)));
                    let offload = from.burst.offload(lengths.len());
                    assert_eq!((got.offload(), &whole[..]), (offload, &largest[..whole.len()]));
                    lengths.push(whole.len());
                }
                there.inbox.give_back(0, parcel);
            }
            assert_eq!(lengths, [128, largest.len(), largest.len(), 128]);
        }
    }

    #[test]
    fn one_sources_large_frames_leave_others_room() {
        let [mut here, there] = <[Links; 2]>::try_from(Links::mesh(2).unwrap()).unwrap();
        let mut from = Parcel::new();
        for (index, bytes) in [FRAME_BYTES_MAX as usize, 128].into_iter().enumerate() {
            let frame = &mut from.burst.frames[index];
            (frame.header_bytes, frame.frame_bytes) = (128, bytes as u32);
        }
        let frame = |index| Outgoing { burst: &from.burst, tails: Tails::Parcel(&from), index };
        let put = |here: &mut Links, index| here.outbox.put(WorkerId(1), NextHop::Port(PortId(9)), frame(index));
        for turn in 0..100 {
            // A burst of large frames, and after it a neighbour's of small ones, while the receiver takes four parcels.
            here.outbox.begin();
            let large = (0..BURST).filter(|_| put(&mut here, 0)).count();
            here.outbox.begin();
            let small = (0..BURST).filter(|_| put(&mut here, 1)).count();
            assert_eq!((small, large > 0), (BURST, true), "turn {turn}");
            here.outbox.ship();
            for _ in 0..4 {
                there.inbox.take(0).into_iter().for_each(|parcel| there.inbox.give_back(0, parcel));
            }
        }
    }
}
