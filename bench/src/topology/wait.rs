//! Waiting for a condition with a deadline, so that no test sleeps for luck.

use std::time::{Duration, Instant};

use super::TopologyError;

/// Pause between two looks at a condition. Small against every boot and restart, large against the cost of a look.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Looks at `condition` until it holds.
///
/// # Errors
/// `TimedOut` naming `what` when `limit` has passed; the condition is looked at once more after that.
pub fn wait_until(limit: Duration, what: &str, mut condition: impl FnMut() -> bool) -> Result<(), TopologyError> {
    let start = Instant::now();
    loop {
        let late = start.elapsed() >= limit;
        if condition() {
            return Ok(());
        }
        if late {
            return Err(TopologyError::TimedOut { what: what.to_owned(), waited: start.elapsed() });
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_that_comes_true_ends_the_wait() {
        let mut looks = 0;
        wait_until(Duration::from_secs(5), "three looks", || {
            looks += 1;
            looks == 3
        })
        .unwrap();
        assert_eq!(looks, 3);
    }

    #[test]
    fn a_condition_that_never_holds_is_named() {
        let error = wait_until(Duration::ZERO, "the moon", || false).unwrap_err();
        assert!(error.to_string().contains("the moon"), "{error}");
    }
}
