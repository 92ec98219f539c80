//! The sum over everything that was ever served, so that `received + originated + copied = sent + dropped` holds across
//! changes.

use std::ops::AddAssign;
use std::sync::Arc;

use dreamwire_datapath::counters::{NetworkCounters, PortCounters, RuleCounters, UnderlayCounters};
use dreamwire_datapath::snapshot::WorkerId;
use serde::Serialize;

/// One object's counters, a share for each worker: whichever owns it counts at its own.
#[derive(Debug)]
pub struct Shares<T>(Arc<[Arc<T>]>);

// Not derived: that would ask it of `T` too.
impl<T> Clone for Shares<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Shares<T> {
    /// One for each of `workers` workers.
    pub fn new(workers: usize, zero: impl Fn() -> T) -> Self {
        Self((0..workers).map(|_| Arc::new(zero())).collect())
    }

    /// What a worker counts at.
    pub fn of(&self, worker: WorkerId) -> Arc<T> {
        Arc::clone(&self.0[usize::from(worker.0)])
    }
}

impl Shares<PortCounters> {
    /// All workers' together, as of now.
    pub fn sum(&self) -> PortCounters {
        PortCounters::sum(&self.0)
    }
}

impl Shares<NetworkCounters> {
    /// All workers' together, as of now.
    pub fn sum(&self) -> NetworkCounters {
        NetworkCounters::sum(&self.0)
    }
}

impl Shares<RuleCounters> {
    /// All workers' together, as of now.
    pub fn hits(&self) -> u64 {
        self.0.iter().map(|share| share.hits.get()).sum()
    }
}

/// Frames by their fate, as `dreamwire_datapath::counters` defines it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Taken from guests and tunnels, and outer packets that turned out to be none.
    pub received: u64,
    /// Made here in a guest's name.
    pub originated: u64,
    /// Additional frames made by flooding, and by cutting large ones.
    pub copied: u64,
    /// Put into guests' rings and tunnels.
    pub sent: u64,
    /// Ended for a reason.
    pub dropped: u64,
}

impl Totals {
    /// `received + originated + copied - sent - dropped`: zero when nothing is under way; frames in flight otherwise.
    pub fn difference(self) -> i64 {
        let gained = self.received.wrapping_add(self.originated).wrapping_add(self.copied);
        let ended = self.sent.wrapping_add(self.dropped);
        gained.wrapping_sub(ended) as i64
    }
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Self) {
        self.received += other.received;
        self.originated += other.originated;
        self.copied += other.copied;
        self.sent += other.sent;
        self.dropped += other.dropped;
    }
}

/// Counters of one object, whatever its kind.
#[derive(Debug, Clone)]
pub enum Counted {
    /// A port's.
    Port(Shares<PortCounters>),
    /// A network's.
    Network(Shares<NetworkCounters>),
    /// An underlay's.
    Underlay(Arc<UnderlayCounters>),
}

impl Counted {
    /// What the object contributes.
    pub fn totals(&self) -> Totals {
        // What ends is read before what begins: a frame counted between the two reads makes the difference
        // positive (in flight), never negative.
        match self {
            Self::Port(shares) => {
                let counters = shares.sum();
                let (dropped, sent) = (counters.drops.total(), counters.tx().0);
                let received = counters.rx().0;
                Totals { dropped, sent, received, originated: counters.originated.get(), copied: 0 }
            }
            Self::Network(shares) => {
                let counters = shares.sum();
                let (dropped, sent) = (counters.drops.total(), counters.tunnel_tx.frames.get());
                let copied = counters.flood_copies.get() + counters.cut_copies.get();
                Totals { dropped, sent, copied, received: counters.tunnel_rx.frames.get(), ..Totals::default() }
            }
            Self::Underlay(counters) => {
                let dropped = counters.drops.total();
                Totals { dropped, received: counters.rx_unclaimed.get(), ..Totals::default() }
            }
        }
    }
}
