//! The host's end of the agent channel: sends numbered requests, hands each answer to the thread that waits for it.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::TopologyError;
use super::agent_protocol::{Reply, ReplyLine, Request, RequestLine};
use super::error::during;

/// What a request may take beyond the time that it names itself: a busy emulated guest starts a process in a second.
pub(super) const SLACK: Duration = Duration::from_secs(10);

type Waiting = Arc<Mutex<HashMap<u64, Sender<Result<Reply, String>>>>>;

/// A connection to one guest's agent; any number of threads may ask at once.
#[derive(Debug)]
pub(super) struct AgentClient {
    guest: String,
    stream: Mutex<UnixStream>,
    waiting: Waiting,
    next_id: AtomicU64,
}

impl AgentClient {
    /// Connects to QEMU's end of the port; whether an agent is behind it shows with the first answer.
    pub(super) fn connect(guest: &str, socket: &Path) -> Result<Self, TopologyError> {
        let connecting = || format!("connect to {guest}'s agent at {}", socket.display());
        let stream = UnixStream::connect(socket).map_err(during(connecting))?;
        let reader = stream.try_clone().map_err(during(connecting))?;
        let waiting = Waiting::default();
        std::thread::spawn({
            let waiting = Arc::clone(&waiting);
            move || read_answers(reader, &waiting)
        });
        Ok(Self { guest: guest.to_owned(), stream: Mutex::new(stream), waiting, next_id: AtomicU64::new(0) })
    }

    /// Asks and waits for the answer.
    pub(super) fn ask(&self, request: Request, limit: Duration) -> Result<Reply, TopologyError> {
        // Relaxed: only distinct numbers are needed.
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, answers) = channel();
        lock(&self.waiting).insert(id, answer);
        let what = format!("{}'s agent to answer {request:.60?}", self.guest);
        let outcome = self
            .send(id, request)
            .and_then(|()| answers.recv_timeout(limit).map_err(|_| TopologyError::TimedOut { what, waited: limit }));
        lock(&self.waiting).remove(&id);
        outcome?.map_err(|reason| self.refused(reason))
    }

    /// An answer that does not fit its question.
    pub(super) fn unexpected(&self, reply: &Reply) -> TopologyError {
        self.refused(format!("answered out of turn: {reply:.60?}"))
    }

    fn refused(&self, reason: String) -> TopologyError {
        TopologyError::Agent { guest: self.guest.clone(), reason }
    }

    fn send(&self, id: u64, request: Request) -> Result<(), TopologyError> {
        let line =
            serde_json::to_string(&RequestLine { id, request }).map_err(|error| self.refused(error.to_string()))?;
        // The leading line end closes whatever a reboot may have left half sent.
        lock(&self.stream)
            .write_all(format!("\n{line}\n").as_bytes())
            .map_err(during(|| format!("send to {}'s agent", self.guest)))
    }
}

impl Drop for AgentClient {
    fn drop(&mut self) {
        // Ends the reading thread.
        let _ = lock(&self.stream).shutdown(std::net::Shutdown::Both);
    }
}

fn read_answers(stream: UnixStream, waiting: &Waiting) {
    let mut lines = BufReader::new(stream);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
        if let Ok(ReplyLine { id, reply }) = serde_json::from_slice(&line)
            && let Some(asker) = lock(waiting).remove(&id)
        {
            // The asker may have given up meanwhile.
            let _ = asker.send(reply);
        }
        line.clear();
    }
    // Askers see their channel close at once instead of waiting for a machine that is gone.
    lock(waiting).clear();
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
