//! What is known of a port's session with its hypervisor, for `show port`, statistics and the log.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use dreamwire_datapath::mac::Mac;
use dreamwire_vhost::limiter::Limiter;
use dreamwire_vhost::owner::SessionEvent;

/// Warnings kept per port; the oldest go first. A front-end can cause them at will.
const WARNINGS_MAX: usize = 8;

/// Shared by the endpoint's thread, which writes it, and the API, which reads it.
#[derive(Debug)]
pub struct Session {
    port: String,
    state: Mutex<SessionState>,
    /// Of the log's lines about coming and going. Warnings have the endpoint's.
    lines: Mutex<Limiter>,
}

/// The state as of now.
#[derive(Debug, Clone, Default)]
pub struct SessionState {
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Since when it is connected, or is not.
    pub since: Option<SystemTime>,
    /// Connections so far.
    pub connections: u64,
    /// Virtio feature bits that the front-end has accepted.
    pub features: Option<u64>,
    /// Writes to the VM's memory are logged: it is being migrated away.
    pub migrating: bool,
    /// Why the last session ended.
    pub last_end: Option<String>,
    /// The last few things that work, but hardly as meant.
    pub warnings: Vec<String>,
}

impl Session {
    /// Of the port `name`, not connected.
    pub fn new(name: &str) -> Self {
        Self { port: name.to_owned(), state: Mutex::default(), lines: Mutex::new(Limiter::new(Instant::now())) }
    }

    /// A copy of the state.
    pub fn state(&self) -> SessionState {
        self.lock().clone()
    }

    /// Takes an event from the endpoint; logs it, unless the front-end comes and goes without end.
    pub fn event(&self, event: SessionEvent) {
        let port = &*self.port;
        let line = match event {
            SessionEvent::Warning(_) => None,
            _ => self.lines.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now()),
        };
        // Lines before this one that were not written; no field where there were none.
        let left_out = line.filter(|count| *count > 0);
        let mut state = self.lock();
        match event {
            SessionEvent::Connected => {
                if line.is_some() {
                    tracing::info!(port, left_out, "front-end connected");
                }
                state.connected = true;
                state.since = Some(SystemTime::now());
                state.connections += 1;
                state.features = None;
                state.warnings.clear();
            }
            SessionEvent::Negotiated { features } => {
                if line.is_some() {
                    tracing::info!(port, left_out, features = format_args!("{features:#x}"), "features negotiated");
                }
                state.features = Some(features);
            }
            SessionEvent::DirtyLog { on } => {
                // A front-end can switch it as often as it likes: `show port` has it, the log need not.
                tracing::debug!(port, on, "writes to the VM's memory are logged for a migration");
                state.migrating = on;
            }
            // The port's owner has told the network.
            SessionEvent::Announce { mac } => {
                tracing::debug!(port, mac = %Mac(mac), "the VM's place was announced");
            }
            SessionEvent::Disconnected { reason } => {
                if line.is_some() {
                    tracing::info!(port, left_out, reason, "front-end disconnected");
                }
                state.connected = false;
                state.migrating = false;
                state.since = Some(SystemTime::now());
                state.features = None;
                state.last_end = Some(reason);
            }
            SessionEvent::Warning(warning) => {
                tracing::warn!(port, "{warning}");
                state.warnings.retain(|earlier| *earlier != warning);
                if state.warnings.len() == WARNINGS_MAX {
                    state.warnings.remove(0);
                }
                state.warnings.push(warning);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, SessionState> {
        // Plain data: whatever a panicking holder left is a state that can be shown.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
