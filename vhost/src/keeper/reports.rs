//! What a port tells its owner. A front-end cannot flood the log: a burst of warnings passes, then one a second; what
//! is left out there is counted, and still shown with the port. A panic in the owner stays there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::limiter::Limiter;
use crate::owner::{RingOwner, SessionEvent};

/// Where keeper and session report to; one per port, so that reconnecting buys no new burst.
pub(crate) struct Reports {
    owner: Arc<dyn RingOwner>,
    limiter: Mutex<Limiter>,
}

impl Reports {
    pub(super) fn new(owner: Arc<dyn RingOwner>) -> Arc<Self> {
        Arc::new(Self { owner, limiter: Mutex::new(Limiter::new(Instant::now())) })
    }

    /// Warnings are a front-end's to cause, so they are limited.
    pub(crate) fn warn(&self, mut text: String) {
        let admitted = self.limiter.lock().unwrap_or_else(PoisonError::into_inner).admit(Instant::now());
        let Some(suppressed) = admitted else { return self.event(SessionEvent::QuietWarning(text)) };
        if suppressed > 0 {
            text.push_str(&format!(" ({suppressed} warnings before this were suppressed)"));
        }
        self.event(SessionEvent::Warning(text));
    }

    pub(super) fn event(&self, event: SessionEvent) {
        if catch_unwind(AssertUnwindSafe(|| self.owner.event(event))).is_err() {
            tracing::error!("a panic in the ring owner was contained; it has missed an event");
        }
    }
}
