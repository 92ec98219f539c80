//! What exists right now, for reading: replaced as a whole by the control thread after every change, so that
//! statistics never wait for it.

use std::sync::Arc;
use std::time::SystemTime;

use dreamwire_datapath::counters::{NetworkCounters, PortCounters, UnderlayCounters};
use dreamwire_datapath::snapshot::{NetworkId, PortId, UnderlayId, WorkerId};
use dreamwire_datapath::worker::WorkerHandle;

use super::news::News;
use super::rulebook::Index;
use super::session::Session;
use super::totals::{Counted, Shares, Totals};
use crate::config::{Document, Network, Port, Underlay};

/// All workers, by [`WorkerId`].
pub type Workers = Arc<[WorkerHandle]>;

/// Everything that can be shown.
#[derive(Debug, Clone)]
pub struct Inventory {
    /// Of the desired state that was applied last.
    pub generation: u64,
    /// The desired state.
    pub document: Arc<Document>,
    /// When the daemon started.
    pub started: SystemTime,
    /// By number.
    pub workers: Workers,
    /// In the order of the document.
    pub ports: Vec<PortEntry>,
    /// In the order of the document.
    pub networks: Vec<NetworkEntry>,
    /// In the order of the document.
    pub underlays: Vec<UnderlayEntry>,
    /// Objects that are gone, but that a worker may still be counting at.
    pub retiring: Vec<Counted>,
    /// What objects that are gone have counted.
    pub retired: Totals,
    /// Rules and what they became.
    pub rules: Arc<Index>,
    /// Frames that were dropped lately.
    pub news: Arc<News>,
}

/// A port that is served.
#[derive(Debug, Clone)]
pub struct PortEntry {
    /// Its settings.
    pub port: Port,
    /// Its index at the workers.
    pub id: PortId,
    /// The worker that has its rings.
    pub worker: WorkerId,
    /// Its counters.
    pub counters: Shares<PortCounters>,
    /// Its session.
    pub session: Arc<Session>,
}

/// A network that is served.
#[derive(Debug, Clone)]
pub struct NetworkEntry {
    /// Its settings.
    pub network: Network,
    /// Its index at the workers.
    pub id: NetworkId,
    /// Its counters.
    pub counters: Shares<NetworkCounters>,
}

/// An underlay in use.
#[derive(Debug, Clone)]
pub struct UnderlayEntry {
    /// Its settings.
    pub underlay: Underlay,
    /// Its index at the workers.
    pub id: UnderlayId,
    /// Its counters.
    pub counters: Arc<UnderlayCounters>,
    /// Its front-end's session, where it has one.
    pub session: Option<Arc<Session>>,
}

impl Inventory {
    /// The sum over everything that was ever served.
    pub fn totals(&self) -> Totals {
        let mut totals = self.retired;
        for counted in &self.retiring {
            totals += counted.totals();
        }
        for entry in &self.ports {
            totals += Counted::Port(entry.counters.clone()).totals();
        }
        for entry in &self.networks {
            totals += Counted::Network(entry.counters.clone()).totals();
        }
        for entry in &self.underlays {
            totals += Counted::Underlay(Arc::clone(&entry.counters)).totals();
        }
        for worker in self.workers.iter() {
            totals.dropped += worker.counters().handoff_removed.get();
        }
        totals
    }
}
