//! One frame at a time through a device that has nothing else to do: how long until it comes out.
//!
//! Between two frames the generator waits, longer than a device polls before it sleeps, so that every frame finds it
//! asleep: what is measured is wake-up, switching, and the way back to a sink that polls.

use std::time::{Duration, Instant};

use super::frame;
use super::throughput::{Failure, Plan};
use crate::front_end::FrontEnd;

/// After this long a frame is given up as lost.
const LOST: Duration = Duration::from_secs(5);

/// Frames between two looks at the clock that are not recorded, to warm caches and learn addresses.
const WARM_UP: usize = 16;

/// What was measured, in ns, sorted.
#[derive(Clone, Debug)]
pub struct Latencies(Vec<u64>);

impl Latencies {
    /// The value that `share` (0 to 1) of all frames were at or below, in ns.
    pub fn quantile(&self, share: f64) -> u64 {
        let last = self.0.len().saturating_sub(1);
        self.0.get((share * last as f64).round() as usize).copied().unwrap_or(0)
    }
}

/// Sends `samples` frames from `from` to `to`, each `gap` after the one before has arrived, plus up to as much again.
///
/// # Errors
/// A front-end's, or [`Failure::Nothing`] when a frame does not arrive within 5 s.
pub fn measure(
    from: &mut FrontEnd,
    to: &mut FrontEnd,
    plan: &Plan,
    samples: usize,
    gap: Duration,
) -> Result<Latencies, Failure> {
    let hello = frame::frame(plan.to, plan.from, frame::FRAME_BYTES_MIN, 0, u64::MAX);
    let probe = frame::frame(plan.from, plan.to, plan.size, 0, 0);
    to.send_burst(&[&hello])?;
    let mut latencies = Vec::with_capacity(samples);
    for number in 0..samples + WARM_UP {
        // Spread over the device's whole way from polling to sleep.
        let wait = gap + gap.mul_f64((number % 101) as f64 / 100.0);
        let idle = Instant::now();
        while idle.elapsed() < wait {
            from.pairs()[0].receive.receive_views(|_| ())?;
            std::hint::spin_loop();
        }
        let started = Instant::now();
        let sent = from.send_burst(&[&probe])? as u64;
        let mut arrived = false;
        while !arrived {
            to.pairs()[0].receive.receive_views(|view| arrived |= view.len() == probe.len())?;
            if started.elapsed() > LOST {
                return Err(Failure::Nothing { sent, foreign: 0 });
            }
        }
        if number >= WARM_UP {
            latencies.push(started.elapsed().as_nanos() as u64);
        }
    }
    latencies.sort_unstable();
    Ok(Latencies(latencies))
}
