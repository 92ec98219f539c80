//! The endpoints of ports, and of underlays that have one: where the daemon's control side meets the vhost crate. Everything that knows about
//! `dreamwire_vhost::keeper` is in this file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::rarp;
use dreamwire_datapath::snapshot::{PortId, UnderlayId};
use dreamwire_datapath::worker::WorkerHandle;
pub use dreamwire_vhost::keeper::ConfigSpace;
use dreamwire_vhost::keeper::{Endpoint, EndpointConfig, SocketMode};
use dreamwire_vhost::owner::{RingOwner, SessionEvent};
use dreamwire_vhost::ring::Ring;

use crate::config::Mode;
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
}

impl PortEndpoint {
    /// Listens, or begins to connect. The error is a sentence that names the socket and what to do.
    pub fn start(
        spec: &EndpointSpec,
        port: PortId,
        worker: &Arc<WorkerHandle>,
        session: &Arc<Session>,
        run_dir: &Path,
    ) -> Result<Self, String> {
        let owner = PortOwner { port, worker: Arc::clone(worker), session: Arc::clone(session) };
        let endpoint = Endpoint::start(spec.config(run_dir), Arc::new(owner)).map_err(|error| error.to_string())?;
        Ok(Self { endpoint })
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
    worker: Arc<WorkerHandle>,
    session: Arc<Session>,
}

impl RingOwner for PortOwner {
    fn attach(&self, queue: u16, ring: Ring) {
        self.worker.attach(self.port, queue, ring);
    }

    fn detach(&self, queue: u16) -> Option<Ring> {
        self.worker.detach(self.port, queue)
    }

    fn event(&self, event: SessionEvent) {
        if let SessionEvent::Announce { mac } = event {
            self.worker.originate(self.port, &rarp::announcement(Mac(mac)));
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
        worker: &Arc<WorkerHandle>,
        run_dir: &Path,
    ) -> Result<Self, String> {
        let session = Arc::new(Session::new(&spec.name));
        let owner = WireOwner { underlay, worker: Arc::clone(worker), session: Arc::clone(&session) };
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
    worker: Arc<WorkerHandle>,
    session: Arc<Session>,
}

impl RingOwner for WireOwner {
    fn attach(&self, queue: u16, ring: Ring) {
        self.worker.attach_wire(self.underlay, queue, ring);
    }

    fn detach(&self, queue: u16) -> Option<Ring> {
        self.worker.detach_wire(self.underlay, queue)
    }

    fn event(&self, event: SessionEvent) {
        self.session.event(event);
    }
}
