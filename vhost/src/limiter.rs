//! How many lines of log a front-end can cause: a burst passes, then one a second; what was left out is counted.

use std::time::{Duration, Instant};

/// What an honest front-end's worst start produces, with room.
const BURST: u32 = 10;
const REFILL: Duration = Duration::from_secs(1);

/// A token bucket. Time comes in.
#[derive(Debug)]
pub struct Limiter {
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
}

impl Limiter {
    /// Full at `now`.
    pub fn new(now: Instant) -> Self {
        Self { tokens: BURST, refilled: now, suppressed: 0 }
    }

    /// Whether a line may pass at `now`; if so, how many before it might not.
    pub fn admit(&mut self, now: Instant) -> Option<u64> {
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
