//! Counters with one writer (a worker) and any number of readers. Each worker counts at instances of its own, of ports and
//! networks too, whoever owns them just then; readers add them up.
//!
//! Frames are conserved. Over everything that all workers serve:
//! `received + originated + copied = sent + dropped`, where *received* counts frames taken from guests and tunnels (and
//! outer packets that turned out to be none), *originated* those made here in a port's name, *copied* the additional
//! frames that flooding and cutting made, *sent* the frames put
//! into guests' rings and tunnels, and *dropped* the sum over all [`DropReason`]s.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

use crate::drop_reason::DropReason;

/// A counter with a single writer: an increment is a plain load and store, no locked instruction.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`. Only the owning worker may call this; a second writer would lose counts, nothing worse.
    #[inline]
    pub fn add(&self, amount: u64) {
        // Relaxed: counters order nothing; readers want each value whole, not consistent with one another.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// The value as of now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Frames and their bytes (Ethernet header to payload, no FCS, no tunnel header).
#[derive(Debug, Default)]
pub struct Traffic {
    /// Frames.
    pub frames: Counter,
    /// Bytes of those frames.
    pub bytes: Counter,
}

impl Traffic {
    /// Counts `frames` frames of together `bytes` bytes.
    #[inline]
    pub fn add(&self, frames: u64, bytes: u64) {
        self.frames.add(frames);
        self.bytes.add(bytes);
    }

    fn gain(&self, other: &Self) {
        self.add(other.frames.get(), other.bytes.get());
    }
}

/// Drops by reason.
#[derive(Debug)]
pub struct Drops([Counter; DropReason::COUNT]);

impl Default for Drops {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl Drops {
    /// Counts `frames` drops.
    #[inline]
    pub fn add(&self, reason: DropReason, frames: u64) {
        self.0[reason as usize].add(frames);
    }

    /// Drops for that reason so far.
    pub fn get(&self, reason: DropReason) -> u64 {
        self.0[reason as usize].get()
    }

    /// Drops for all reasons so far.
    pub fn total(&self) -> u64 {
        self.0.iter().map(Counter::get).sum()
    }

    fn gain(&self, other: &Self) {
        for reason in DropReason::ALL {
            self.add(reason, other.get(reason));
        }
    }
}

/// One ring of a port. Direction as the datapath sees it: `rx` came out of the guest's transmitq.
#[derive(Debug, Default)]
pub struct RingCounters {
    /// Frames that passed through the ring.
    pub traffic: Traffic,
    /// Notifications sent to the guest (writes to the call eventfd).
    pub calls: Counter,
    /// Times a kick by the guest woke the worker.
    pub kicks: Counter,
}

/// A port. Even rings are the guest's receiveqs (our tx), odd ones its transmitqs (our rx), as in the virtio spec.
#[derive(Debug)]
pub struct PortCounters {
    /// `2 * queue_pairs` rings.
    pub rings: Box<[CachePadded<RingCounters>]>,
    /// Drops at this port.
    pub drops: CachePadded<Drops>,
    /// Frames made here in the guest's name: announcements of its new place.
    pub originated: Counter,
}

impl PortCounters {
    /// All zero, for `queue_pairs` pairs.
    pub fn new(queue_pairs: u16) -> Self {
        Self {
            rings: (0..2 * queue_pairs).map(|_| CachePadded::default()).collect(),
            drops: CachePadded::default(),
            originated: Counter::default(),
        }
    }

    /// What several workers have counted for one port, as of now. Drops are read first: who compares them with what was
    /// received finds too few, never too many.
    ///
    /// # Panics
    /// If there are none.
    pub fn sum(shares: &[Arc<Self>]) -> Self {
        let sum = Self::new(shares[0].rings.len() as u16 / 2);
        for share in shares {
            sum.drops.gain(&share.drops);
            for (ring, other) in sum.rings.iter().zip(&share.rings) {
                ring.traffic.gain(&other.traffic);
                ring.calls.add(other.calls.get());
                ring.kicks.add(other.kicks.get());
            }
            sum.originated.add(share.originated.get());
        }
        sum
    }

    /// Frames and bytes received from the guest.
    pub fn rx(&self) -> (u64, u64) {
        self.every_other(1)
    }

    /// Frames and bytes sent to the guest.
    pub fn tx(&self) -> (u64, u64) {
        self.every_other(0)
    }

    fn every_other(&self, first: usize) -> (u64, u64) {
        self.rings.iter().skip(first).step_by(2).fold((0, 0), |(frames, bytes), ring| {
            (frames + ring.traffic.frames.get(), bytes + ring.traffic.bytes.get())
        })
    }
}

/// A network, and its tunnel where it has one.
#[derive(Debug, Default)]
pub struct NetworkCounters {
    /// Frames that came out of the tunnel for this network.
    pub tunnel_rx: CachePadded<Traffic>,
    /// Frames sent into the tunnel, one for each remote that a frame was sent to.
    pub tunnel_tx: Traffic,
    /// Additional frames made by flooding: destinations less one.
    pub flood_copies: Counter,
    /// Additional frames made by cutting large ones for receivers that cannot: pieces less one.
    pub cut_copies: Counter,
    /// Addresses that could not be learned: table or quota full.
    pub learn_refused: Counter,
    /// Drops of frames that came out of the tunnel, or that the underlay did not take.
    pub drops: Drops,
}

impl NetworkCounters {
    /// What several workers have counted for one network, as of now; what ends is read first, as with a port's.
    pub fn sum(shares: &[Arc<Self>]) -> Self {
        let sum = Self::default();
        for share in shares {
            sum.drops.gain(&share.drops);
            sum.tunnel_tx.gain(&share.tunnel_tx);
            sum.tunnel_rx.gain(&share.tunnel_rx);
            sum.flood_copies.add(share.flood_copies.get());
            sum.cut_copies.add(share.cut_copies.get());
            sum.learn_refused.add(share.learn_refused.get());
        }
        sum
    }
}

/// A rule.
#[derive(Debug, Default)]
pub struct RuleCounters {
    /// Times that it has decided: about a connection's first frame, about each one that it denied, and once about each
    /// connection after a change of policy.
    pub hits: Counter,
}

/// An underlay: outer packets.
#[derive(Debug, Default)]
pub struct UnderlayCounters {
    /// Outer packets received that reached no network: the drops say why.
    pub rx_unclaimed: CachePadded<Counter>,
    /// Drops before the network was known.
    pub drops: Drops,
    /// Outer packets for this host itself: ARP, neighbour discovery, echo requests. No frames: not in the sum above.
    pub rx_host: Counter,
    /// What this host itself said: questions for neighbours, answers.
    pub tx_host: Counter,
    /// Receive calls to the kernel.
    pub rx_calls: Counter,
    /// Send calls to the kernel, or notifications of a front-end.
    pub tx_calls: Counter,
}

/// A worker's loop.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Turns of the loop that moved at least one frame.
    pub busy_turns: CachePadded<Counter>,
    /// Turns that found nothing.
    pub empty_turns: Counter,
    /// Times it went to sleep.
    pub sleeps: Counter,
    /// Commands taken from the mailbox.
    pub commands: Counter,
    /// Frames handed to other workers.
    pub handoff_tx: Counter,
    /// Frames taken over from other workers.
    pub handoff_rx: Counter,
    /// Those of them whose network was removed while they were under way: dropped, and counted nowhere else.
    pub handoff_removed: Counter,
    /// Times another worker had to be woken.
    pub handoff_wakes: Counter,
    /// Times that another worker could not be told of a learned address.
    pub handoff_unlearned: Counter,
}
