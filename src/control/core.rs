//! The state that the control thread owns, and the order of a change.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use dreamwire_datapath::counters::{NetworkCounters, PortCounters, UnderlayCounters};
use dreamwire_datapath::snapshot::{
    NETWORKS_MAX, NetworkId, PORTS_MAX, PortId, Snapshot, UNDERLAYS_MAX, UnderlayId, WorkerId,
};
use dreamwire_datapath::vni::Vni;
use dreamwire_datapath::worker::{WorkerConfig, WorkerHandle};
use serde::Serialize;
use tokio::sync::watch;

use super::inventory::{Inventory, Workers};
use super::news::{LogLimit, News};
use super::next_hops::NextHops;
use super::perimeters::Guarded;
use super::rulebook::Rulebook;
use super::session::Session;
use super::slots::Slots;
use super::totals::{Counted, Shares, Totals};
use crate::config::diff::{self, Change};
use crate::config::{self, Accepted, Context, Daemon, Document, Mistake, Underlay};
use crate::port::{EndpointSpec, PortEndpoint, WireEndpoint};

/// Changes of one apply that are logged one by one. Ten thousand rules that come at once are one line, not ten thousand.
const CHANGES_LOGGED_MAX: usize = 100;

/// The owner of everything. Lives on the control thread.
#[derive(Debug)]
pub struct Control {
    pub(super) document: Arc<Document>,
    pub(super) generation: u64,
    pub(super) workers: Workers,
    pub(super) ports: BTreeMap<String, LivePort>,
    pub(super) networks: BTreeMap<String, LiveNetwork>,
    pub(super) underlays: BTreeMap<String, LiveUnderlay>,
    pub(super) slots: AllSlots,
    pub(super) retiring: Vec<Retiring>,
    pub(super) retired: Totals,
    pub(super) started: SystemTime,
    pub(super) rulebook: Rulebook,
    /// What workers keep to hold ports to their policies.
    pub(super) guarded: BTreeMap<PortId, Guarded>,
    pub(super) news: Arc<News>,
    /// Of lines about rules; times are since `log_began`.
    pub(super) log_limit: LogLimit,
    pub(super) log_began: Instant,
    /// Oldest first; the last ones, one for each worker, are current.
    snapshots: VecDeque<Arc<Snapshot>>,
    inventory: watch::Sender<Arc<Inventory>>,
    shut_down: bool,
}

#[derive(Debug)]
pub(super) struct LivePort {
    pub(super) id: PortId,
    /// The network that the number was given out for.
    pub(super) network: String,
    pub(super) spec: EndpointSpec,
    pub(super) worker: WorkerId,
    pub(super) counters: Shares<PortCounters>,
    pub(super) session: Arc<Session>,
    pub(super) endpoint: PortEndpoint,
}

#[derive(Debug, Clone)]
pub(super) struct LiveNetwork {
    pub(super) id: NetworkId,
    /// The place on the wire that the number was given out for.
    pub(super) wire: Option<(UnderlayId, Vni)>,
    pub(super) counters: Shares<NetworkCounters>,
}

#[derive(Debug)]
pub(super) struct LiveUnderlay {
    pub(super) id: UnderlayId,
    /// As it was bound; the MTU may be another since.
    pub(super) bound: Underlay,
    pub(super) counters: Arc<UnderlayCounters>,
    /// The front-end's side, where the wire is one.
    pub(super) endpoint: Option<WireEndpoint>,
    /// Follows the kernel's next hops, where nobody else does.
    pub(super) next_hops: Option<NextHops>,
}

/// The numbers that workers know objects by.
#[derive(Debug)]
pub(super) struct AllSlots {
    pub(super) ports: Slots,
    pub(super) networks: Slots,
    pub(super) underlays: Slots,
}

/// A number, and the kind it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    Port(PortId),
    Network(NetworkId),
    Underlay(UnderlayId),
}

/// What is gone from desired state, but perhaps not from a worker's sight.
#[derive(Debug)]
pub(super) struct Retiring {
    slot: Slot,
    /// The first generation without it.
    generation: u64,
    /// `None` if an object that lives goes on counting there.
    counted: Option<Counted>,
}

/// A change that was made, or would be.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Applied {
    /// The generation now.
    pub generation: u64,
    /// Whether nothing was done because only the differences were asked for.
    pub dry_run: bool,
    /// The differences.
    pub changes: Vec<Change>,
    /// Things that work, but hardly as meant.
    pub warnings: Vec<Mistake>,
}

/// Why a change was refused. Nothing of it was made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ApplyError {
    /// The document has mistakes.
    #[error("{} mistakes in the configuration", .0.len())]
    Mistakes(Vec<Mistake>),
    /// The host does not let us: a socket in use, an address that is not here.
    #[error("{0}")]
    Host(Mistake),
}

impl Control {
    /// Starts the workers, with nothing to serve yet.
    pub fn new(daemon: Daemon) -> std::io::Result<Self> {
        let initial = |index| Arc::new(Snapshot { worker: WorkerId(index), ..Snapshot::default() });
        let snapshots: VecDeque<_> = (0..daemon.worker_count()).map(initial).collect();
        let configs = (0..).zip(&snapshots).map(|(index, initial)| {
            let cpu = daemon.workers.get(usize::from(index)).copied();
            (WorkerConfig { index, cpu, polling: daemon.polling }, Arc::clone(initial))
        });
        let workers: Workers = WorkerHandle::spawn_all(configs.collect())?.into();
        let document = Arc::new(Document { daemon, ..Document::default() });
        let started = SystemTime::now();
        let news = Arc::<News>::default();
        let empty = Inventory {
            generation: 0,
            document: Arc::clone(&document),
            started,
            workers: Arc::clone(&workers),
            ports: Vec::new(),
            networks: Vec::new(),
            underlays: Vec::new(),
            retiring: Vec::new(),
            retired: Totals::default(),
            rules: Arc::default(),
            news: Arc::clone(&news),
        };
        let rulebook = Rulebook::new(workers.len());
        Ok(Self {
            document,
            generation: 0,
            workers,
            ports: BTreeMap::new(),
            networks: BTreeMap::new(),
            underlays: BTreeMap::new(),
            slots: AllSlots {
                ports: Slots::new(PORTS_MAX),
                networks: Slots::new(NETWORKS_MAX),
                underlays: Slots::new(UNDERLAYS_MAX),
            },
            retiring: Vec::new(),
            retired: Totals::default(),
            started,
            rulebook,
            guarded: BTreeMap::new(),
            news,
            log_limit: LogLimit::default(),
            log_began: Instant::now(),
            snapshots,
            inventory: watch::Sender::new(Arc::new(empty)),
            shut_down: false,
        })
    }

    /// Where the inventory is announced.
    pub fn watch(&self) -> watch::Receiver<Arc<Inventory>> {
        self.inventory.subscribe()
    }

    /// Desired state as it is applied.
    pub fn document(&self) -> &Document {
        &self.document
    }

    /// Reads TOML as it would be applied here.
    pub fn read_toml(&self, text: &str) -> Result<Accepted, ApplyError> {
        config::from_toml(text, self.context()).map_err(ApplyError::Mistakes)
    }

    /// Reads JSON as it would be applied here.
    pub fn read_json(&self, value: &serde_json::Value) -> Result<Accepted, ApplyError> {
        config::from_json(value, self.context()).map_err(ApplyError::Mistakes)
    }

    /// Reads JSON text as it would be applied here.
    pub fn read_json_text(&self, text: &str) -> Result<Accepted, ApplyError> {
        config::from_json_text(text, self.context()).map_err(ApplyError::Mistakes)
    }

    fn context(&self) -> Context<'_> {
        Context { run_dir: Some(self.run_dir()), running: Some(&self.document.daemon) }
    }

    pub(super) fn run_dir(&self) -> &Path {
        &self.document.daemon.run_dir
    }

    /// Makes `accepted` the desired state, or changes nothing. With `dry_run`, only tells the differences.
    pub fn apply(&mut self, accepted: Accepted, dry_run: bool) -> Result<Applied, ApplyError> {
        let Accepted { document, warnings } = accepted;
        let changes = diff::between(&self.document, &document);
        if !dry_run && !changes.is_empty() {
            // Numbers that have become free since are wanted now.
            self.sweep();
            let places = self.place_ports(&document);
            let replaced = self.bring_up(&document, &places).map_err(ApplyError::Host)?;
            self.rulebook.update(&document);
            self.document = Arc::new(document);
            for (name, worker) in places {
                self.ports.get_mut(&name).expect("every port of the document is up").worker = worker;
            }
            self.publish();
            self.move_ports();
            self.retire_replaced(replaced);
            self.retire_removed();
            self.announce();
            for change in changes.iter().take(CHANGES_LOGGED_MAX) {
                tracing::info!(generation = self.generation, "{change}");
            }
            if let Some(more) = changes.len().checked_sub(CHANGES_LOGGED_MAX).filter(|more| *more > 0) {
                tracing::info!(generation = self.generation, "and {more} more changes");
            }
            for warning in &warnings {
                tracing::warn!("{warning}");
            }
        }
        Ok(Applied { generation: self.generation, dry_run, changes, warnings })
    }

    pub(super) fn publish(&mut self) {
        self.generation += 1;
        self.guard_ports();
        for (index, worker) in (0..).zip(self.workers.iter()) {
            let snapshot = Arc::new(self.build_snapshot(WorkerId(index)));
            worker.publish(Arc::clone(&snapshot));
            self.snapshots.push_back(snapshot);
        }
        self.unguard_ports();
        for (name, live) in &self.underlays {
            if let Some(next_hops) = &live.next_hops {
                next_hops.set_remotes(self.remotes_over(name));
            }
        }
    }

    /// The worker that an underlay is given to.
    pub(super) fn worker_of(&self, underlay: &Underlay) -> &WorkerHandle {
        &self.workers[usize::from(underlay.worker)]
    }

    /// The hosts that networks over an underlay reach.
    pub(super) fn remotes_over(&self, underlay: &str) -> Vec<IpAddr> {
        let networks = self.document.network.iter().filter(|network| network.underlay.as_deref() == Some(underlay));
        let remotes: BTreeSet<IpAddr> = networks.flat_map(|network| network.remotes.iter().copied()).collect();
        remotes.into_iter().collect()
    }

    /// Stops what the document no longer has.
    fn retire_removed(&mut self) {
        let document = Arc::clone(&self.document);
        let ports: Vec<_> = self.ports.extract_if(.., |name, _| document.find_port(name).is_none()).collect();
        for (_, port) in ports {
            port.endpoint.stop();
            self.retire(Slot::Port(port.id), Some(Counted::Port(port.counters)));
        }
        let networks: Vec<_> = self.networks.extract_if(.., |name, _| document.find_network(name).is_none()).collect();
        for (_, network) in networks {
            self.retire(Slot::Network(network.id), Some(Counted::Network(network.counters)));
        }
        let underlays: Vec<_> =
            self.underlays.extract_if(.., |name, _| document.find_underlay(name).is_none()).collect();
        for (_, underlay) in underlays {
            if let Some(endpoint) = underlay.endpoint {
                endpoint.stop();
            }
            self.worker_of(&underlay.bound).remove_underlay(underlay.id);
            self.retire(Slot::Underlay(underlay.id), Some(Counted::Underlay(underlay.counters)));
        }
    }

    /// Keeps a number and counters until all workers work with the current generation.
    pub(super) fn retire(&mut self, slot: Slot, counted: Option<Counted>) {
        self.retiring.push(Retiring { slot, generation: self.generation, counted });
    }

    /// Whether there is something to [`Control::sweep`].
    pub(super) fn has_retiring(&self) -> bool {
        !self.retiring.is_empty() || self.snapshots.len() > self.workers.len()
    }

    /// Lets go of what all workers have let go of.
    pub(super) fn sweep(&mut self) {
        let adopted = self.workers.iter().map(WorkerHandle::adopted_generation).min().unwrap_or_default();
        while self.snapshots.front().is_some_and(|first| first.generation < adopted) {
            self.snapshots.pop_front();
        }
        let (gone, staying) = std::mem::take(&mut self.retiring).into_iter().partition(|r| r.generation <= adopted);
        self.retiring = staying;
        let gone: Vec<Retiring> = gone;
        if gone.is_empty() {
            return;
        }
        for Retiring { slot, counted, .. } in gone {
            match slot {
                Slot::Port(id) => self.slots.ports.free(id.0),
                Slot::Network(id) => self.slots.networks.free(id.0),
                Slot::Underlay(id) => self.slots.underlays.free(id.0),
            }
            if let Some(counted) = counted {
                self.retired += counted.totals();
            }
        }
        self.announce();
    }

    pub(super) fn announce(&mut self) {
        let inventory = self.build_inventory(self.retiring.iter().filter_map(|r| r.counted.clone()).collect());
        self.inventory.send_replace(Arc::new(inventory));
    }

    /// Ends every session and unlinks every socket. The control thread ends after it.
    pub fn shut_down(&mut self) {
        for (_, port) in std::mem::take(&mut self.ports) {
            port.endpoint.stop();
        }
        for (_, underlay) in std::mem::take(&mut self.underlays) {
            if let Some(endpoint) = underlay.endpoint {
                endpoint.stop();
            }
            self.worker_of(&underlay.bound).remove_underlay(underlay.id);
        }
        self.shut_down = true;
    }

    pub(super) fn is_shut_down(&self) -> bool {
        self.shut_down
    }
}
