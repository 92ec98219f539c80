//! A port's vhost-user endpoint: holds the front-end's connection, vets what it sends, plays the session onward.
//!
//! Theory of operation. One thread per port waits for a front-end: on a socket of ours (`server`), or by connecting to
//! the front-end's (`client`). For each connection it starts a protocol engine (`vhost-user-backend`) on a private
//! connection, and passes every message through a filter: some it answers itself, some it forwards once they are
//! vetted, waiting for the engine's verdict before the front-end gets its answer. When the connection ends, for
//! whatever reason, engine and session go with it: all rings are detached, memory and descriptors released, and the
//! thread waits for the next front-end. A front-end can stall or end its own port's connection and nothing else.
//!
//! The thread sleeps in poll(2) only, always with the endpoint's wake event among what it waits for. Only a worker
//! that does not let go of a ring can hold it (and thereby [`Endpoint::stop`]) up.
//!
//! The dirty log of a migration is the keeper's as well, and the in-flight region: it maps them and tells the session,
//! past the engine.
//!
//! Limits: 16 queue pairs, 64 memory regions, 32 descriptors and 4096 bytes per message, 10 s per message.

#[cfg(test)]
mod channel_tests;
mod config_space;
mod connection;
mod engine_link;
mod filter;
#[cfg(test)]
mod filter_tests;
#[doc(hidden)]
pub mod fuzz;
mod inflight;
mod message;
mod offer;
mod port;
mod record;
mod reports;
mod socket;
mod vet;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use self::offer::{Offer, PRIVATE_FEATURES, protocol};
use self::port::{Port, Source};
use self::socket::{Listening, private_directory};
use crate::eventfd::EventFd;
use crate::owner::RingOwner;

pub use self::config_space::ConfigSpace;
pub(crate) use self::filter::RING_SIZE_MAX;
pub(crate) use self::offer::VHOST_USER_F_PROTOCOL_FEATURES;
pub(crate) use self::reports::Reports;

/// Queue pairs of one port. More would only split the work of its one worker.
pub const QUEUE_PAIRS_MAX: u16 = 16;

/// What to do when the guest's memory cannot be mapped by us.
const MEMORY_NOT_SHARED: &str = "the VM's memory is probably not shared; start QEMU with -object \
     memory-backend-memfd,id=mem0,size=SIZE,share=on and -machine memory-backend=mem0 (libvirt: <memoryBacking> with \
     <source type='memfd'/> and <access mode='shared'/>)";

/// Who listens on the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocketMode {
    /// We listen, the front-end connects (QEMU: `-chardev socket,path=...,reconnect-ms=1000`).
    Server,
    /// The front-end listens (QEMU: `server=on`), we connect and keep trying.
    Client,
}

/// What an endpoint is made of.
#[derive(Debug, Clone)]
pub struct EndpointConfig {
    /// The port's name, for messages to people.
    pub name: String,
    /// The UNIX socket between the front-end and us. As a server we create it with mode 0660.
    pub socket: PathBuf,
    /// Who listens on it.
    pub mode: SocketMode,
    /// 1 to [`QUEUE_PAIRS_MAX`].
    pub queue_pairs: u16,
    /// Bytes of payload in the largest frame that the port's network carries.
    pub mtu: u16,
    /// Virtio feature bits to offer; the vhost-user bits are added.
    pub features: u64,
    /// What GET_CONFIG tells; `None`: it is not offered. QEMU warns of a back-end that does, other VMMs need it.
    pub config_space: Option<ConfigSpace>,
    /// A directory of mode 0700 for private sockets, created if missing; all endpoints may share it.
    pub private_dir: PathBuf,
}

/// Why an endpoint cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Somebody listens there.
    #[error("{} is in use by another process that listens on it; stop that one or choose another path", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something else has that name.
    #[error("{} exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket {
        /// The file.
        path: PathBuf,
    },
    /// The socket cannot be created.
    #[error("cannot listen on {}: {source}; the directory must exist and be writable, the path fit in 107 bytes", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The private directory cannot be created.
    #[error("cannot use {} for private sockets: {source}", path.display())]
    PrivateDir {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The private directory is open to others.
    #[error("{} must be a directory of this user's that nobody else can enter: chmod 700 it", path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
    },
    /// More or fewer queue pairs than can be served.
    #[error("{0} queue pairs: a port has 1 to {QUEUE_PAIRS_MAX}")]
    QueuePairs(u16),
    /// No descriptor or thread to be had.
    #[error("cannot start the port's thread: {0}")]
    Thread(#[source] io::Error),
}

/// One ring, as the front-end has set it up.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RingStatus {
    /// Entries, once set.
    pub size: Option<u16>,
    /// SET_VRING_ENABLE's state.
    pub enabled: bool,
    /// Its addresses are set.
    pub addressed: bool,
    /// The available index it was last started from or stopped at.
    pub base: u16,
    /// Guest to device: started with a kick descriptor, or `polled`.
    pub kick: SignalStatus,
    /// Device to guest.
    pub call: SignalStatus,
    /// Where a broken ring is reported.
    pub error: SignalStatus,
}

/// How one of a ring's signals is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SignalStatus {
    /// Not said yet.
    #[default]
    Unset,
    /// No descriptor: the receiver polls.
    Polled,
    /// An eventfd.
    Eventfd,
}

/// An endpoint's state, for `show port`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EndpointState {
    /// A front-end is connected.
    pub connected: bool,
    /// Its process.
    pub peer_pid: Option<i32>,
    /// Front-ends that have connected so far.
    pub connections: u64,
    /// Acked virtio feature bits, without the vhost-user bit 30.
    pub features: Option<u64>,
    /// Acked vhost-user protocol feature bits.
    pub protocol_features: u64,
    /// VIRTIO 1.2 §2.1 device status as QEMU reports it; bit 2 is DRIVER_OK.
    pub status: u8,
    /// The MTU that the guest was told, if any.
    pub mtu: Option<u16>,
    /// Writes to guest memory are being logged: the VM is being migrated away.
    pub logging: bool,
    /// Chains that are taken are noted in a region that the front-end keeps.
    pub inflight: bool,
    /// The front-end has given us a channel for requests of ours. There is none that we would make: the configuration
    /// space of a port never changes under a connection.
    pub backend_channel: bool,
    /// Queue pairs that the guest has enabled.
    pub pairs_enabled: u16,
    /// Mapped memory regions.
    pub memory_regions: usize,
    /// Bytes in them.
    pub memory_bytes: u64,
    /// One per ring; even: guest receiveq, odd: guest transmitq.
    pub rings: Vec<RingStatus>,
    /// Why the last connection ended, or why no front-end can be reached.
    pub last_reason: Option<String>,
}

/// A running vhost-user endpoint. Dropping it stops it.
#[derive(Debug)]
pub struct Endpoint {
    state: Arc<Mutex<EndpointState>>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl Endpoint {
    /// Starts the port's thread. As a server the socket listens when this returns.
    pub fn start(config: EndpointConfig, owner: Arc<dyn RingOwner>) -> Result<Self, EndpointError> {
        if !(1..=QUEUE_PAIRS_MAX).contains(&config.queue_pairs) {
            return Err(EndpointError::QueuePairs(config.queue_pairs));
        }
        private_directory(&config.private_dir)?;
        let source = match config.mode {
            SocketMode::Server => Source::Server(Listening::start(&config.socket)?),
            SocketMode::Client => Source::Client(config.socket),
        };
        let wake = Arc::new(EventFd::new().map_err(EndpointError::Thread)?);
        let state = Arc::new(Mutex::new(EndpointState::default()));
        let port = Port {
            offer: Offer {
                features: config.features & !PRIVATE_FEATURES,
                protocol_features: protocol::ALL | config.config_space.map_or(0, |_| protocol::CONFIG),
                queue_pairs: config.queue_pairs,
                mtu: config.mtu,
                config_space: config.config_space,
            },
            source,
            private_dir: config.private_dir,
            reports: Reports::new(Arc::clone(&owner)),
            owner,
            wake: Arc::clone(&wake),
            state: Arc::clone(&state),
            // Thread names are C strings.
            name: config.name.replace('\0', ""),
        };
        let thread = Builder::new().name(format!("keeper-{}", port.name)).spawn(move || port.run());
        Ok(Self { state, wake, thread: Some(thread.map_err(EndpointError::Thread)?) })
    }

    /// What there is to say about it now.
    pub fn state(&self) -> EndpointState {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Disconnects the front-end, detaches all rings, removes the socket file. Returns when all that is done.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        if let Err(error) = self.wake.signal() {
            tracing::error!(%error, "the port's thread cannot be woken to stop; it is left behind");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the port's thread has panicked");
        }
    }
}
