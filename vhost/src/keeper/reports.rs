//! What a port tells its owner. A front-end cannot flood the log: a burst of warnings passes, then one a second; what
//! was left out is counted. A panic in the owner stays there.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

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
        let Some(suppressed) = admitted else { return };
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

/// What an honest front-end's worst start produces, with room.
const BURST: u32 = 10;
const REFILL: Duration = Duration::from_secs(1);

/// A token bucket. Time comes in.
#[derive(Debug)]
struct Limiter {
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
}

impl Limiter {
    fn new(now: Instant) -> Self {
        Self { tokens: BURST, refilled: now, suppressed: 0 }
    }

    /// Whether a report may pass at `now`; if so, how many before it may not.
    fn admit(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.refilled).as_secs() / REFILL.as_secs();
        if earned > 0 {
            self.tokens = BURST.min(self.tokens.saturating_add(u32::try_from(earned).unwrap_or(BURST)));
            self.refilled = now;
        }
        if self.tokens == 0 {
            self.suppressed += 1;
            return None;
        }
        self.tokens -= 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_passes_once_a_second_and_is_counted() {
        let start = Instant::now();
        let mut limiter = Limiter::new(start);
        let passed = (0..1000).filter(|_| limiter.admit(start).is_some()).count();
        assert_eq!(passed, 10);
        assert_eq!(limiter.admit(start + REFILL), Some(990));
        assert_eq!(limiter.admit(start + REFILL), None);
        assert_eq!(limiter.admit(start + 3 * REFILL), Some(1));
    }
}
