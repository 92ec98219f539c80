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
    /// A front-end can cause log lines at will too; one that reconnects in a loop would fill a disk.
    lines: Mutex<Limiter>,
}

/// The state as of now.
#[derive(Debug, Clone, Default)]
pub struct SessionState {
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Since when it is connected, or is not.
    pub since: Option<SystemTime>,
    /// Whether writes to the VM's memory are logged, for a migration.
    pub migrating: bool,
    /// Connections so far.
    pub connections: u64,
    /// Virtio feature bits that the front-end has accepted.
    pub features: Option<u64>,
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

    /// Takes an event from the endpoint; logs it if the port has lines left.
    pub fn event(&self, event: SessionEvent) {
        if !matches!(event, SessionEvent::QuietWarning(_)) {
            let admitted = self.lines.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
            if let Some(suppressed) = admitted {
                self.log(&event, suppressed);
            }
        }
        let mut state = self.lock();
        match event {
            SessionEvent::Connected => {
                state.connected = true;
                state.since = Some(SystemTime::now());
                state.connections += 1;
                state.features = None;
                state.warnings.clear();
            }
            SessionEvent::Negotiated { features } => {
                state.features = Some(features);
            }
            SessionEvent::DirtyLog { on } => state.migrating = on,
            // The port's owner has told the network.
            SessionEvent::Announce { .. } => {}
            SessionEvent::Disconnected { reason } => {
                state.connected = false;
                state.migrating = false;
                state.since = Some(SystemTime::now());
                state.features = None;
                state.last_end = Some(reason);
            }
            SessionEvent::Warning(warning) | SessionEvent::QuietWarning(warning) => {
                state.warnings.retain(|earlier| *earlier != warning);
                if state.warnings.len() == WARNINGS_MAX {
                    state.warnings.remove(0);
                }
                state.warnings.push(warning);
            }
        }
    }

    fn log(&self, event: &SessionEvent, suppressed: u64) {
        let port = &*self.port;
        if suppressed > 0 {
            tracing::warn!(port, suppressed, "this port's front-ends have caused more log lines than it may have");
        }
        match event {
            SessionEvent::Connected => tracing::info!(port, "front-end connected"),
            SessionEvent::Negotiated { features } => {
                tracing::info!(port, features = format_args!("{features:#x}"), "features negotiated");
            }
            SessionEvent::DirtyLog { on } => {
                tracing::info!(port, on, "writes to the VM's memory are logged for a migration");
            }
            SessionEvent::Announce { mac } => tracing::info!(port, mac = %Mac(*mac), "the VM's place was announced"),
            SessionEvent::Disconnected { reason } => tracing::info!(port, reason, "front-end disconnected"),
            SessionEvent::Warning(warning) | SessionEvent::QuietWarning(warning) => tracing::warn!(port, "{warning}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, SessionState> {
        // Plain data: whatever a panicking holder left is a state that can be shown.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_that_is_not_logged_is_shown() {
        let session = Session::new("vm1");
        session.event(SessionEvent::QuietWarning("odd".into()));
        assert_eq!(session.state().warnings, ["odd"]);
    }
}
