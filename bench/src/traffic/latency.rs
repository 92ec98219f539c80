//! How long frames take: one at a time through a device that has nothing else to do, or many at a part of its rate.
//!
//! *Wake-up.* Between two frames the generator waits, longer than a device polls before it sleeps, so that every frame finds it
//! asleep: what is measured is wake-up, switching, and the way back to a sink that polls.
//!
//! *Under load.* Frames fall due at equal distances. A frame's time begins when the generator sees it due, whether or not the
//! device has room for it, so a device that stalls does not hide it by refusing frames; it ends once the turn is over in which it
//! was received and checked. Both ends are one thread: the time that it takes over frames before is in it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::end::End;
use super::frame;
use super::throughput::{DRAIN_MAX, Failure, Plan, QUIET, Round, Throughput};
use crate::front_end::BURST;

/// Silence before a frame that is to find its device asleep: longer than dreamwire polls (50 us).
pub const SILENCE: Duration = Duration::from_micros(200);

/// After this long a frame is given up as lost.
const LOST: Duration = Duration::from_secs(5);

/// Frames between two looks at the clock that are not recorded, to warm caches and learn addresses.
const WARM_UP: usize = 16;

/// Turns between two looks at what is flooded to the generator.
const TURNS_PER_DISCARD: u32 = 64;

/// Latencies, in ns.
#[derive(Clone, Debug)]
pub struct Latencies(Histogram<u64>);

/// What they come to, us.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LatencySummary {
    /// Frames.
    pub frames: u64,
    /// Half of all frames took at most this.
    pub p50_us: f64,
    /// 99 % did.
    pub p99_us: f64,
    /// 99.9 % did.
    pub p999_us: f64,
    /// The slowest.
    pub max_us: f64,
}

impl Default for Latencies {
    fn default() -> Self {
        // Three digits: a tenth of a percent. It grows with what is recorded.
        Self(Histogram::new(3).expect("three digits are possible"))
    }
}

impl Latencies {
    fn record(&mut self, latency: Duration) {
        self.0.record(latency.as_nanos() as u64).expect("a histogram that grows takes all");
    }

    /// The value that `share` (0 to 1) of all frames were at or below, in us.
    pub fn quantile_us(&self, share: f64) -> f64 {
        self.0.value_at_quantile(share) as f64 / 1e3
    }

    /// `None` before anything was recorded.
    pub fn summary(&self) -> Option<LatencySummary> {
        let [p50_us, p99_us, p999_us, max_us] = [0.5, 0.99, 0.999, 1.0].map(|share| self.quantile_us(share));
        (!self.0.is_empty()).then(|| LatencySummary { frames: self.0.len(), p50_us, p99_us, p999_us, max_us })
    }
}

/// Sends `samples` frames from `from` to `to`, each `gap` after the one before has arrived, plus up to as much again.
///
/// # Errors
/// An end's, or [`Failure::Nothing`] when a frame does not arrive within 5 s.
pub fn measure(
    from: &mut dyn End,
    to: &mut dyn End,
    plan: &Plan,
    samples: usize,
    gap: Duration,
    latencies: &mut Latencies,
) -> Result<(), Failure> {
    let hello = frame::frame(plan.to, plan.from, frame::FRAME_BYTES_MIN, 0, u64::MAX);
    let probe = frame::frame(plan.from, plan.to, plan.size, 0, 0);
    to.send(&hello)?;
    for number in 0..samples + WARM_UP {
        // Spread over the device's whole way from polling to sleep.
        let wait = gap + gap.mul_f64((number % 101) as f64 / 100.0);
        let idle = Instant::now();
        while idle.elapsed() < wait {
            from.receive_each(&mut |_| ())?;
            std::hint::spin_loop();
        }
        let started = Instant::now();
        from.send(&probe)?;
        let mut arrived = false;
        while !arrived {
            to.receive_each(&mut |view| arrived |= view.len() == probe.len())?;
            if started.elapsed() > LOST {
                return Err(Failure::Nothing { sent: 1, foreign: 0 });
            }
        }
        if number >= WARM_UP {
            latencies.record(started.elapsed());
        }
    }
    Ok(())
}

/// Frames that are due or under way: number in the set, and since when. They arrive in this order.
#[derive(Default)]
struct Waiting(VecDeque<(usize, Instant)>);

impl Waiting {
    /// `None` for a frame that was not waited for. Those before it were lost.
    fn settle(&mut self, sequence: usize) -> Option<Instant> {
        while let Some((waiting, since)) = self.0.pop_front() {
            if waiting == sequence {
                return Some(since);
            }
        }
        None
    }
}

impl Throughput<'_> {
    /// A round at `mpps`, evenly paced, of which every frame's time is recorded.
    ///
    /// # Errors
    /// As [`Throughput::round`].
    pub fn paced(&mut self, mpps: f64, latencies: &mut Latencies) -> Result<Round, Failure> {
        self.drain()?;
        let frames = self.sink.set().frames().len();
        let mut sequence = self.from.next_template();
        self.sink.reset(sequence);
        let sent_before = self.from.sent();
        let (mut due, mut unsent, mut turns) = (0, 0_u64, 0_u32);
        let mut waiting = Waiting::default();
        let mut arrived = Vec::with_capacity(BURST.into());
        let started = Instant::now();
        let mut last_arrival = started;
        let elapsed = loop {
            let now = Instant::now();
            let elapsed = now - started;
            let is_over = elapsed >= self.plan.duration;
            if is_over && now - last_arrival > QUIET {
                self.from.reap()?;
                if unsent == 0 && self.from.in_flight() == 0 {
                    break self.plan.duration;
                }
                if elapsed > self.plan.duration + DRAIN_MAX {
                    return Err(Failure::NeverQuiet);
                }
            }
            let due_now = (elapsed.as_secs_f64() * mpps * 1e6) as u64;
            while due < due_now && !is_over {
                waiting.0.push_back((sequence, now));
                sequence = (sequence + 1) % frames;
                (due, unsent) = (due + 1, unsent + 1);
            }
            unsent -= u64::from(self.from.repost(unsent.min(u64::from(BURST)) as u16)?);
            let sink = &mut self.sink;
            self.to.receive_each(&mut |frame| arrived.extend(sink.take(frame)))?;
            if !arrived.is_empty() {
                last_arrival = Instant::now();
                for since in arrived.drain(..).filter_map(|sequence| waiting.settle(sequence)) {
                    latencies.record(last_arrival - since);
                }
            }
            turns += 1;
            if turns.is_multiple_of(TURNS_PER_DISCARD) {
                self.discard_backwards()?;
            }
        };
        let received = self.sink.arrived().good;
        Ok(self.result(sent_before, received, elapsed, Duration::ZERO))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_lost_does_not_take_the_time_of_what_arrived() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut waiting = Waiting(VecDeque::from([(7, at(1)), (0, at(2)), (1, at(3)), (2, at(4))]));
        assert_eq!(waiting.settle(7), Some(at(1)));
        assert_eq!(waiting.settle(1), Some(at(3)), "0 was lost");
        assert_eq!(waiting.settle(2), Some(at(4)));
        assert_eq!(waiting.settle(3), None);
    }

    #[test]
    fn quantiles_are_in_microseconds() {
        let mut latencies = Latencies::default();
        assert!(latencies.summary().is_none());
        for us in 1..=1000 {
            latencies.record(Duration::from_micros(us));
        }
        let summary = latencies.summary().unwrap();
        for (value, expected) in
            [(summary.p50_us, 500.0), (summary.p99_us, 990.0), (summary.p999_us, 999.0), (summary.max_us, 1000.0)]
        {
            assert!((value / expected - 1.0).abs() < 0.002, "{summary:?}");
        }
        assert_eq!(summary.frames, 1000);
    }
}
