//! The keeper's own vhost-user connection to the protocol engine that serves one session.
//!
//! A new engine per front-end connection: it can be claimed (SET_OWNER) once only, and tears nothing down by itself.
//! The socket has a path only between bind and accept, in a directory that nobody else may enter.
//! Every request asks for the engine's verdict, so an answer to the front-end never runs ahead of the session.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::poll::PollFlags;
use vhost_user_backend::VhostUserDaemon;
use vm_memory::GuestMemoryMmap;

use super::connection::{Connection, ConnectionError, wait};
use super::message::{self, Header, request as req};
use super::offer::protocol;
use crate::eventfd::EventFd;
use crate::session::{EngineMemory, Logging, Session, adopt_rings};

/// Makes private socket names unique in this process.
static LINKS: AtomicU64 = AtomicU64::new(0);

/// Why the engine could not be set up or does not serve any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("the session cannot be set up: {0}")]
    SetUp(String),
    #[error("{}: the session refused it", req::name(*.0))]
    Refused(u32),
    #[error("{}: the session answered {bytes} bytes that are no answer to it", req::name(*request))]
    Answer { request: u32, bytes: usize },
    #[error("the private connection to the session: {0}")]
    Connection(#[from] ConnectionError),
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        Self::SetUp(error.to_string())
    }
}

/// The engine of one session and our end of the connection to it.
pub(super) struct EngineLink {
    connection: Connection,
    daemon: VhostUserDaemon<Arc<Session>>,
    session: Arc<Session>,
}

impl EngineLink {
    /// Starts an engine for `session` and negotiates with it.
    pub(super) fn open(
        private_dir: &Path,
        name: &str,
        session: Arc<Session>,
        wake: &EventFd,
    ) -> Result<Self, LinkError> {
        let memory = EngineMemory::new(GuestMemoryMmap::new());
        let engine = Arc::clone(&session);
        let mut daemon = adopt_rings(&session, || VhostUserDaemon::new(format!("vhost-{name}"), engine, memory))
            .map_err(|error| LinkError::SetUp(error.to_string()))?;
        let number = LINKS.fetch_add(1, Ordering::Relaxed); // unique is enough: pairs with nothing
        let path = private_dir.join(format!("{}-{number}", std::process::id()));
        let text = path.to_str().ok_or_else(|| LinkError::SetUp(format!("{} is not UTF-8", path.display())))?;
        let listener = UnixListener::bind(&path)?;
        let started = daemon.start_client(text).map_err(|error| LinkError::SetUp(error.to_string()));
        // The engine's connect has succeeded, so that accept returns at once.
        let accepted = started.and_then(|()| Ok(listener.accept()?));
        let unlinked = std::fs::remove_file(&path);
        let (stream, _) = accepted?;
        unlinked?;
        let mut link = Self { connection: Connection::new(stream)?, daemon, session };
        link.negotiate(wake).map(|()| link)
    }

    fn negotiate(&mut self, wake: &EventFd) -> Result<(), LinkError> {
        let used = protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS | protocol::RESET_DEVICE;
        self.ask(req::GET_FEATURES, &[], &[], wake)?;
        self.ask(req::GET_PROTOCOL_FEATURES, &[], &[], wake)?;
        self.command(req::SET_PROTOCOL_FEATURES, &used.to_ne_bytes(), &[], wake)?;
        self.command(req::SET_OWNER, &[], &[], wake)
    }

    /// Sends a request and waits for its answer.
    pub(super) fn ask(
        &mut self,
        request: u32,
        payload: &[u8],
        descriptors: &[Arc<OwnedFd>],
        wake: &EventFd,
    ) -> Result<Vec<u8>, LinkError> {
        self.connection.send(Header::request(request, payload.len()), payload, descriptors, wake)?;
        loop {
            // No deadline: the session waits for its worker, however long that takes.
            wait(wake, &[(self.stream().as_fd(), PollFlags::POLLIN)], None)?;
            match self.connection.receive(true) {
                Ok(Some(answer)) if answer.header.request == request => return Ok(answer.payload),
                Ok(Some(answer)) => return Err(LinkError::Answer { request, bytes: answer.payload.len() }),
                Ok(None) => {}
                Err(ConnectionError::Closed) => return Err(LinkError::Refused(request)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends a request that has no answer but success.
    pub(super) fn command(
        &mut self,
        request: u32,
        payload: &[u8],
        descriptors: &[Arc<OwnedFd>],
        wake: &EventFd,
    ) -> Result<(), LinkError> {
        let answer = self.ask(request, payload, descriptors, wake)?;
        match message::decode_u64(&answer) {
            Some(0) => Ok(()),
            Some(_) => Err(LinkError::Refused(request)),
            None => Err(LinkError::Answer { request, bytes: answer.len() }),
        }
    }

    /// Tells the session what to do about the dirty log. Not the engine: its own log is slow while there is none, never
    /// removed, and misses memory that comes later.
    pub(super) fn set_logging(&self, logging: Logging) {
        self.session.set_logging(logging);
    }

    /// Tells the session where ring `index` logs its used ring.
    pub(super) fn set_used_log(&self, index: u16, address: Option<u64>) {
        self.session.set_used_log(index, address);
    }

    /// The session behind the link. While the engine serves no request of ours, nobody else uses it.
    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// The stream to wait on: it becomes readable when the engine has ended without being asked.
    pub(super) fn stream(&self) -> &std::os::unix::net::UnixStream {
        self.connection.stream()
    }
}

impl Drop for EngineLink {
    /// Ends the engine's thread, waits for it, and takes all rings back.
    fn drop(&mut self) {
        // Fails only if the engine was first.
        let _ = self.connection.stream().shutdown(Shutdown::Both);
        self.daemon.request_shutdown();
        // Its result is the refusal or hang-up that the keeper knows of already.
        if let Err(error) = self.daemon.wait() {
            tracing::debug!(%error, "session ended");
        }
        self.session.close();
    }
}
