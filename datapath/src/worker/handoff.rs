//! The hand-off: how frames and learned addresses reach the worker that owns the port or underlay they are for.
//!
//! Between each ordered pair of workers there is a [`Link`] of fixed size, allocated at the start. The sender copies
//! frames whole into a [`Parcel`] and ships it when it is full, at the latest at the end of its turn; the receiver sends
//! what is in it and gives it back. So a parcel costs four queue operations, whatever is in it; a frame costs one copy
//! more than between ports of one worker; and frames of one sender keep their order. A link is full when all of its parcels
//! are on the way: then frames are dropped and counted, nobody waits.
//!
//! Between two turns nothing is half done: every parcel with something in it was shipped.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::FRAME_BYTES_MAX;

use super::doorbell::Doorbell;
use super::outlets::Outgoing;
use crate::burst::Origin;
use crate::counters::WorkerCounters;
use crate::fdb::Seen;
use crate::offload::Offload;
use crate::snapshot::{NetworkId, PortId, WorkerId};

/// Parcels of one link: as many large frames (64 KB) can be under way, or bursts of small ones.
pub(crate) const PARCELS: usize = 32;

/// Frames in one parcel at most: four bursts.
const FRAMES_MAX: usize = 128;

/// Bytes in one parcel: one frame of the largest size, or a burst of frames of 1518 bytes and half another.
const PARCEL_BYTES: usize = 72 * 1024;

const _: () = assert!(PARCEL_BYTES >= FRAME_BYTES_MAX as usize);

/// Learned addresses under way on one link at most.
const SEEN_MAX: usize = 1024;

/// Where the receiver is to send a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// One of its ports.
    Port(PortId),
    /// Another host, through its underlay.
    Vtep(IpAddr),
    /// All of its ports in the frame's network, and the tunnel, as if it had come from there.
    Flood(Origin),
}

#[derive(Debug)]
struct Entry {
    target: Target,
    network: NetworkId,
    offload: Offload,
    at: usize,
    header_bytes: usize,
    frame_bytes: usize,
}

/// Frames on their way to another worker.
#[derive(Debug)]
pub(crate) struct Parcel {
    entries: Vec<Entry>,
    bytes: Box<[u8]>,
    used: usize,
}

impl Parcel {
    fn new() -> Self {
        let bytes = vec![0; PARCEL_BYTES].into_boxed_slice();
        Self { entries: Vec::with_capacity(FRAMES_MAX), bytes, used: 0 }
    }

    /// Copies a frame, unless it does not fit any more.
    #[inline]
    fn put(&mut self, target: Target, frame: &Outgoing<'_>) -> bool {
        let (at, header_bytes) = (self.used, frame.header.len());
        let frame_bytes = header_bytes + frame.payload.bytes() as usize;
        let Some(room) = self.bytes.get_mut(at..at + frame_bytes).filter(|_| self.entries.len() < FRAMES_MAX) else {
            return false;
        };
        let (header, payload) = room.split_at_mut(header_bytes);
        header.copy_from_slice(frame.header);
        frame.payload.copy_out(payload);
        self.used += frame_bytes;
        let (network, offload) = (frame.network, *frame.offload);
        self.entries.push(Entry { target, network, offload, at, header_bytes, frame_bytes });
        true
    }

    /// The number of frames.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Where frame `index` goes.
    pub(crate) fn target(&self, index: usize) -> Target {
        self.entries[index].target
    }

    /// Frame `index`.
    #[inline]
    pub(crate) fn frame(&self, index: usize) -> Outgoing<'_> {
        let entry = &self.entries[index];
        let (header, payload) = self.bytes[entry.at..entry.at + entry.frame_bytes].split_at(entry.header_bytes);
        Outgoing { network: entry.network, offload: &entry.offload, header, payload: Payload::private(payload) }
    }

    fn clear(&mut self) {
        self.entries.clear();
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
    /// Something was left since the bell was last rung.
    left: bool,
}

impl Lane {
    #[inline]
    fn put(&mut self, target: Target, frame: &Outgoing<'_>, counters: &WorkerCounters) -> bool {
        if let Some(open) = &mut self.open {
            if open.put(target, frame) {
                return true;
            }
            self.ship(counters);
        }
        while let Some(parcel) = self.link.returned.pop() {
            self.spare.push(parcel);
        }
        let Some(mut parcel) = self.spare.pop() else { return false };
        let fits = parcel.put(target, frame);
        debug_assert!(fits, "an empty parcel has room for any frame");
        self.open = Some(parcel);
        fits
    }

    fn ship(&mut self, counters: &WorkerCounters) {
        if let Some(parcel) = self.open.take() {
            counters.handoff_tx.add(parcel.len() as u64);
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

    /// Copies a frame for worker `to`; false if the link is full.
    #[inline]
    pub(super) fn put(&mut self, to: WorkerId, target: Target, frame: &Outgoing<'_>) -> bool {
        let lane = self.lanes.get_mut(usize::from(to.0)).and_then(Option::as_mut);
        lane.is_some_and(|lane| lane.put(target, frame, &self.counters))
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
                let lane = Lane { link, bell: Arc::clone(bell), open: None, spare, left: false };
                all[from].outbox.lanes.push(Some(lane));
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_frame_crosses_uncut_and_tells_what_its_sender_left_undone() {
        let all = Links::mesh(2).unwrap();
        let [mut here, there] = <[Links; 2]>::try_from(all).unwrap();
        let bytes: Vec<u8> = (0..FRAME_BYTES_MAX).map(|at| ((at * 7) >> 3) as u8).collect();
        let offload = Offload { checksum: Some((34, 16)), ..Offload::NONE };
        let (header, payload) = bytes.split_at(128);
        let (network, payload) = (NetworkId(3), Payload::private(payload));
        let frame = Outgoing { network, offload: &offload, header, payload };
        let small = Outgoing { payload: Payload::EMPTY, ..frame };
        for _ in 0..2 * PARCELS {
            // Three parcels: what does not fit ships what is before it.
            for frame in [&small, &frame, &frame, &small] {
                assert!(here.outbox.put(WorkerId(1), Target::Port(PortId(9)), frame));
            }
            here.outbox.ship();
            let mut lengths = Vec::new();
            while let Some(parcel) = there.inbox.take(0) {
                for index in 0..parcel.len() {
                    let got = parcel.frame(index);
                    let mut whole = got.header.to_vec();
                    whole.resize(128 + got.payload.bytes() as usize, 0);
                    got.payload.copy_out(&mut whole[128..]);
                    assert_eq!((parcel.target(index), got.network), (Target::Port(PortId(9)), network));
                    assert_eq!((*got.offload, &whole[..]), (offload, &bytes[..whole.len()]));
                    lengths.push(whole.len());
                }
                there.inbox.give_back(0, parcel);
            }
            let largest = FRAME_BYTES_MAX as usize;
            assert_eq!(lengths, [128, largest, largest, 128]);
        }
    }
}
