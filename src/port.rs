//! The endpoints of ports, and of underlays that have one: where the daemon's control side meets the vhost crate. Everything that knows about
//! `dreamwire_vhost::keeper` is in this file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::rarp;
use dreamwire_datapath::snapshot::{PortId, UnderlayId, WorkerId};
use dreamwire_datapath::worker::WorkerHandle;
pub use dreamwire_vhost::keeper::ConfigSpace;
use dreamwire_vhost::keeper::{Endpoint, EndpointConfig, SocketMode};
use dreamwire_vhost::owner::{RingOwner, SessionEvent};
use dreamwire_vhost::ring::Ring;

use crate::config::Mode;
use crate::control::inventory::Workers;
use crate::control::session::Session;

/// What an endpoint is started with. Another value means another endpoint: the front-end has to reconnect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSpec {
    /// The port's name.
    pub name: String,
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Who listens.
    pub mode: Mode,
    /// Queue pairs.
    pub queue_pairs: u16,
    /// The network's MTU, bytes.
    pub mtu: u16,
    /// Virtio feature bits that the card offers.
    pub features: u64,
    /// What the VMM may ask for, if it may.
    pub config_space: Option<ConfigSpace>,
}

impl EndpointSpec {
    fn config(&self, run_dir: &Path) -> EndpointConfig {
        EndpointConfig {
            name: self.name.clone(),
            socket: self.socket.clone(),
            mode: match self.mode {
                Mode::Server => SocketMode::Server,
                Mode::Client => SocketMode::Client,
            },
            queue_pairs: self.queue_pairs,
            mtu: self.mtu,
            features: self.features,
            config_space: self.config_space,
            private_dir: run_dir.join("private"),
        }
    }
}

/// A started endpoint. Dropping it without [`PortEndpoint::stop`] stops it as well, without an order of things.
#[derive(Debug)]
pub struct PortEndpoint {
    endpoint: Endpoint,
    owner: Arc<PortOwner>,
}

impl PortEndpoint {
    /// Listens, or begins to connect. The error is a sentence that names the socket and what to do.
    pub fn start(
        spec: &EndpointSpec,
        port: PortId,
        workers: &Workers,
        worker: WorkerId,
        session: &Arc<Session>,
        run_dir: &Path,
    ) -> Result<Self, String> {
        let place = Mutex::new(Place { worker, queues: BTreeSet::new() });
        let owner = PortOwner { port, workers: Arc::clone(workers), place, session: Arc::clone(session) };
        let owner = Arc::new(owner);
        let endpoint = Endpoint::start(spec.config(run_dir), Arc::clone(&owner) as Arc<dyn RingOwner>)
            .map_err(|error| error.to_string())?;
        Ok(Self { endpoint, owner })
    }

    /// Has another worker serve the port, while its guest goes on. All workers were told already where frames to it are to
    /// go; those that come between its receiveqs' two places are dropped and counted. `between` is called while no worker
    /// has a ring of the port, or nothing moves.
    pub fn move_to(&self, worker: WorkerId, between: impl FnOnce()) {
        self.owner.move_to(worker, between);
    }

    /// Ends the session and unlinks the socket; returns when every ring was taken back from the worker.
    pub fn stop(self) {
        self.endpoint.stop();
    }
}

/// Passes a session's rings to the worker that serves the port, and what happens to it to whoever watches.
#[derive(Debug)]
struct PortOwner {
    port: PortId,
    workers: Workers,
    /// Held while a worker is asked, so that whoever takes a ring back finds it even during a move.
    place: Mutex<Place>,
    session: Arc<Session>,
}

/// Where a port's rings are, and which.
#[derive(Debug)]
struct Place {
    worker: WorkerId,
    queues: BTreeSet<u16>,
}

impl PortOwner {
    fn place(&self) -> MutexGuard<'_, Place> {
        // A panic while a worker was asked leaves a list that asks for a ring too many at worst.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn worker(&self, place: &Place) -> &WorkerHandle {
        &self.workers[usize::from(place.worker.0)]
    }

    fn move_to(&self, worker: WorkerId, between: impl FnOnce()) {
        let mut place = self.place();
        if place.worker == worker {
            return between();
        }
        let from = self.worker(&place);
        let to = &self.workers[usize::from(worker.0)];
        let (receiveqs, transmitqs) = place.queues.iter().partition::<Vec<u16>, _>(|queue| queue.is_multiple_of(2));
        let to_receive = from.detach_all(self.port, receiveqs);
        let rings = from.detach_all(self.port, transmitqs);
        between();
        to.attach_all(self.port, to_receive);
        // What the guest has sent until now may be on its way to a third worker: what it sends next must not overtake it.
        for other in self.workers.iter() {
            other.empty_inbox();
        }
        to.attach_all(self.port, rings);
        place.worker = worker;
    }
}

impl RingOwner for PortOwner {
    fn attach(&self, queue: u16, ring: Ring) {
        let mut place = self.place();
        place.queues.insert(queue);
        self.worker(&place).attach(self.port, queue, ring);
    }

    fn detach(&self, queue: u16) -> Option<Ring> {
        let mut place = self.place();
        place.queues.remove(&queue);
        self.worker(&place).detach(self.port, queue)
    }

    fn event(&self, event: SessionEvent) {
        if let SessionEvent::Announce { mac } = event {
            self.worker(&self.place()).originate(self.port, &rarp::announcement(Mac(mac)));
        }
        self.session.event(event);
    }
}

/// The started endpoint of an underlay whose wire is a front-end. Dropping it stops it, as with a port's.
#[derive(Debug)]
pub struct WireEndpoint {
    endpoint: Endpoint,
    session: Arc<Session>,
}

impl WireEndpoint {
    /// As [`PortEndpoint::start`].
    pub fn start(
        spec: &EndpointSpec,
        underlay: UnderlayId,
        workers: &Workers,
        worker: WorkerId,
        run_dir: &Path,
    ) -> Result<Self, String> {
        let session = Arc::new(Session::new(&spec.name));
        let owner = WireOwner { underlay, workers: Arc::clone(workers), worker, session: Arc::clone(&session) };
        let endpoint = Endpoint::start(spec.config(run_dir), Arc::new(owner)).map_err(|error| error.to_string())?;
        Ok(Self { endpoint, session })
    }

    /// What happens to the front-end.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// As [`PortEndpoint::stop`].
    pub fn stop(self) {
        self.endpoint.stop();
    }
}

/// As [`PortOwner`], for an underlay.
#[derive(Debug)]
struct WireOwner {
    underlay: UnderlayId,
    workers: Workers,
    worker: WorkerId,
    session: Arc<Session>,
}

impl WireOwner {
    fn worker(&self) -> &WorkerHandle {
        &self.workers[usize::from(self.worker.0)]
    }
}

impl RingOwner for WireOwner {
    fn attach(&self, queue: u16, ring: Ring) {
        self.worker().attach_wire(self.underlay, queue, ring);
    }

    fn detach(&self, queue: u16) -> Option<Ring> {
        self.worker().detach_wire(self.underlay, queue)
    }

    fn event(&self, event: SessionEvent) {
        self.session.event(event);
    }
}
