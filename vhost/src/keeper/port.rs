//! A port's thread: waits for front-ends, serves one at a time, turns others away.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::connection::{Connection, ConnectionError, wait};
use super::engine_link::{EngineLink, LinkError};
use super::filter::{Action, Filter};
use super::message::{Header, decode_ring_number, encode_ring_number, request as req};
use super::offer::Offer;
use super::record::{RingSignal, SessionRecord};
use super::reports::Reports;
use super::socket::{Listening, connect_once, peer_pid};
use super::{EndpointState, RingStatus, SignalStatus};
use crate::eventfd::EventFd;
use crate::owner::{RingOwner, SessionEvent};
use crate::session::Session;

/// Pauses between attempts to connect, from and to.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(1);
/// QEMU sends the memory table right after the features; a second later something is amiss.
const MEMORY_DUE: Duration = Duration::from_secs(1);

/// Where the port's front-ends come from.
#[derive(Debug)]
pub(super) enum Source {
    Server(Listening),
    Client(PathBuf),
}

/// Everything the thread owns.
pub(super) struct Port {
    pub(super) name: String,
    pub(super) offer: Offer,
    pub(super) source: Source,
    pub(super) private_dir: PathBuf,
    pub(super) owner: Arc<dyn RingOwner>,
    pub(super) wake: Arc<EventFd>,
    pub(super) state: Arc<Mutex<EndpointState>>,
    pub(super) reports: Arc<Reports>,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ending {
    #[error("{0}")]
    FrontEnd(#[from] ConnectionError),
    #[error("{0}")]
    Session(LinkError),
    #[error("the front-end was sent away: {0}")]
    Refused(String),
    #[error("the session ended by itself")]
    SessionGone,
    #[error(
        "the front-end asked what there is and left; if QEMU says \"you are asking more queues than supported\", its \
         queues= must be the port's: {queue_pairs}"
    )]
    LeftAtOnce { queue_pairs: u16 },
}

impl From<LinkError> for Ending {
    fn from(error: LinkError) -> Self {
        match error {
            LinkError::Connection(ConnectionError::Stopped) => Self::FrontEnd(ConnectionError::Stopped),
            error => Self::Session(error),
        }
    }
}

impl Port {
    /// Serves front-ends until the wake event is signalled.
    pub(super) fn run(mut self) {
        while let Ok(stream) = self.next_front_end() {
            let peer_pid = peer_pid(&stream);
            self.update(|state| {
                *state = EndpointState {
                    connected: true,
                    peer_pid,
                    connections: state.connections + 1,
                    ..Default::default()
                };
            });
            self.reports.event(SessionEvent::Connected);
            let mut filter = Filter::new(self.offer);
            // The session is torn down inside: all rings are detached before anybody hears of the end.
            let Err(ending) = self.serve(stream, &mut filter);
            let left_at_once = filter.was_asked() && !filter.started();
            let reason = match ending {
                Ending::FrontEnd(ConnectionError::Closed) if left_at_once => {
                    Ending::LeftAtOnce { queue_pairs: self.offer.queue_pairs }.to_string()
                }
                ending => ending.to_string(),
            };
            self.update(|state| {
                let (connections, last_reason) = (state.connections, Some(reason.clone()));
                *state = EndpointState { connections, last_reason, ..Default::default() };
            });
            self.reports.event(SessionEvent::Disconnected { reason });
            // QEMU is back at once, and would be some thousand times a second.
            if left_at_once && wait(&self.wake, &[], Some(Instant::now() + RETRY_MIN)).is_err() {
                return;
            }
        }
    }

    /// Waits for a front-end; an error means that the port is to stop.
    fn next_front_end(&mut self) -> Result<UnixStream, ConnectionError> {
        let mut pause = RETRY_MIN;
        loop {
            let attempt = match &self.source {
                Source::Server(listening) => {
                    wait(&self.wake, &[(listening.as_fd(), PollFlags::POLLIN)], None)?;
                    listening.accept()
                }
                Source::Client(path) => {
                    // Also after a front-end has just gone: it is not back within no time.
                    wait(&self.wake, &[], Some(Instant::now() + pause))?;
                    pause = (pause * 2).min(RETRY_MAX);
                    connect_once(path).map(Some)
                }
            };
            match (attempt, &self.source) {
                (Ok(Some(stream)), _) => return Ok(stream),
                (Ok(None), _) => {}
                (Err(error), Source::Client(path)) => {
                    let reason = format!("no front-end at {}: {error}", path.display());
                    self.update(|state| state.last_reason = Some(reason));
                }
                (Err(error), Source::Server(_)) => {
                    // Out of descriptors or memory: the listener stays readable, so pause.
                    self.reports.warn(format!("a front-end could not be accepted: {error}"));
                    wait(&self.wake, &[], Some(Instant::now() + RETRY_MIN))?;
                }
            }
        }
    }

    /// Serves one front-end to its end, which is always an error of some kind.
    fn serve(&mut self, stream: UnixStream, filter: &mut Filter) -> Result<std::convert::Infallible, Ending> {
        let peer_pid = peer_pid(&stream);
        let mut front_end = Connection::new(stream).map_err(ConnectionError::from)?;
        let session = Session::new(
            self.offer.ring_count(),
            self.offer.features,
            Arc::clone(&self.owner),
            Arc::clone(&self.reports),
        );
        let wake = Arc::clone(&self.wake);
        let mut link = EngineLink::open(&self.private_dir, &self.name, session, &wake)?;
        let mut memory_due: Option<Instant> = None;
        loop {
            let deadline = [front_end.deadline(), memory_due].into_iter().flatten().min();
            let readable = PollFlags::POLLIN;
            let front_end_fd = (front_end.stream().as_fd(), readable);
            let link_fd = (link.stream().as_fd(), readable);
            let [message_due, session_due, another] = match &self.source {
                Source::Server(listening) => {
                    wait(&wake, &[front_end_fd, link_fd, (listening.as_fd(), readable)], deadline)?
                }
                Source::Client(_) => {
                    let [message_due, session_due] = wait(&wake, &[front_end_fd, link_fd], deadline)?;
                    [message_due, session_due, false]
                }
            };
            if session_due {
                return Err(Ending::SessionGone);
            }
            // One that comes as the last one goes is the next, and waits: a VM that is restarted is fast.
            if another && !front_end.peer_is_gone() {
                self.turn_away(peer_pid);
            }
            if memory_due.is_some_and(|due| Instant::now() >= due) {
                self.reports.warn(filter.memory_is_overdue());
            }
            if (message_due || front_end.deadline().is_some())
                && let Some(message) = front_end.receive(false)?
            {
                for action in filter.judge(message) {
                    self.perform(action, filter, &front_end, &mut link)?;
                }
                self.update(|state| describe(filter.record(), state));
            }
            memory_due = filter.memory_is_awaited().then(|| memory_due.unwrap_or_else(|| Instant::now() + MEMORY_DUE));
        }
    }

    fn perform(
        &mut self,
        action: Action,
        filter: &mut Filter,
        front_end: &Connection,
        link: &mut EngineLink,
    ) -> Result<(), Ending> {
        match action {
            Action::Forward { request, payload, descriptors } => {
                link.command(request, &payload, &descriptors, &self.wake)?;
            }
            Action::SetLogging(logging) => link.set_logging(logging),
            Action::SetInflight(region) => link.session().set_inflight(region),
            Action::SetUsedLog { index, address } => link.set_used_log(index, address),
            Action::StopRing { index } => {
                let request = req::GET_VRING_BASE;
                let answer = link.ask(request, &encode_ring_number(index.into(), 0), &[], &self.wake)?;
                let base =
                    decode_ring_number(&answer).ok_or(LinkError::Answer { request, bytes: answer.len() })?.number;
                let answer = encode_ring_number(index.into(), filter.ring_stopped(index, base as u16));
                front_end.send(Header::reply(request, answer.len()), &answer, &[], &self.wake)?;
            }
            Action::DriverReset => link.session().driver_reset(),
            Action::Reply { request, payload } => {
                front_end.send(Header::reply(request, payload.len()), &payload, &[], &self.wake)?;
            }
            Action::ReplyWithFile { request, payload, file } => {
                front_end.send(Header::reply(request, payload.len()), &payload, &[file], &self.wake)?;
            }
            Action::Report(SessionEvent::Warning(text)) => self.reports.warn(text),
            Action::Report(event) => self.reports.event(event),
            Action::Disconnect { reason } => return Err(Ending::Refused(reason)),
        }
        Ok(())
    }

    /// Accepts a second front-end to tell it at once that it cannot have the port, and to learn who it was.
    fn turn_away(&mut self, holder: Option<i32>) {
        let Source::Server(listening) = &self.source else { return };
        let Ok(Some(stream)) = listening.accept() else { return };
        let pid = |pid: Option<i32>| pid.map_or("unknown".to_owned(), |pid| pid.to_string());
        self.reports.warn(format!(
            "a second front-end (pid {}) tried to attach to port {}; it is in use by pid {}",
            pid(peer_pid(&stream)),
            self.name,
            pid(holder)
        ));
    }

    fn update(&self, change: impl FnOnce(&mut EndpointState)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Writes what was negotiated into the state for people.
fn describe(record: &SessionRecord, state: &mut EndpointState) {
    let signal = |signal: &RingSignal| match signal {
        RingSignal::Unset => SignalStatus::Unset,
        RingSignal::Polled => SignalStatus::Polled,
        RingSignal::Descriptor(_) => SignalStatus::Eventfd,
    };
    state.features = record.features;
    state.protocol_features = record.protocol_features;
    state.status = record.status;
    state.mtu = record.mtu;
    state.logging = record.log_all && record.log.is_some();
    state.inflight = record.inflight.is_some();
    state.backend_channel = record.backend_channel.is_some();
    state.pairs_enabled = record.pairs_enabled();
    state.memory_regions = record.memory.len();
    state.memory_bytes = record.memory.iter().map(|mapped| mapped.region.bytes).sum();
    state.rings.clear();
    state.rings.extend(record.rings.iter().map(|ring| RingStatus {
        size: ring.size,
        enabled: ring.enabled,
        addressed: ring.addresses.is_some(),
        base: ring.base,
        kick: signal(&ring.kick),
        call: signal(&ring.call),
        error: signal(&ring.error),
    }));
}
