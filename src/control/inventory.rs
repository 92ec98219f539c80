//! What exists right now, for reading: replaced as a whole by the control thread after every change, so that
//! statistics never wait for it.

use std::sync::Arc;
use std::time::SystemTime;

use dreamwire_datapath::counters::{NetworkCounters, PortCounters, UnderlayCounters};
use dreamwire_datapath::snapshot::{NetworkId, PortId, UnderlayId};
use dreamwire_datapath::worker::WorkerHandle;

use super::session::Session;
use super::totals::{Counted, Totals};
use crate::config::{Document, Network, Port, Underlay};

/// Everything that can be shown.
#[derive(Debug, Clone)]
pub struct Inventory {
    /// Of the desired state that was applied last.
    pub generation: u64,
    /// The desired state.
    pub document: Arc<Document>,
    /// When the daemon started.
    pub started: SystemTime,
    /// The one worker.
    pub worker: Arc<WorkerHandle>,
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
}

/// A port that is served.
#[derive(Debug, Clone)]
pub struct PortEntry {
    /// Its settings.
    pub port: Port,
    /// Its index at the workers.
    pub id: PortId,
    /// Its counters.
    pub counters: Arc<PortCounters>,
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
    pub counters: Arc<NetworkCounters>,
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
            totals += Counted::Port(Arc::clone(&entry.counters)).totals();
        }
        for entry in &self.networks {
            totals += Counted::Network(Arc::clone(&entry.counters)).totals();
        }
        for entry in &self.underlays {
            totals += Counted::Underlay(Arc::clone(&entry.counters)).totals();
        }
        totals
    }
}
