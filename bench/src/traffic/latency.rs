//! How long frames take: one at a time through a device that has nothing else to do, or many at a part of its rate.
//!
//! *Wake-up.* Between two frames the generator waits, longer than a device polls before it sleeps, so that every frame finds it
//! asleep: what is measured is wake-up, switching, and the way back to a sink that polls. Every frame has a number of its own, and
//! has to come out once and with every byte as it was, after the one before it.
//!
//! *Under load.* Frames fall due at equal distances. A frame's time begins when it falls due, whether or not the device has room
//! for it or the generator has come round to it, so nobody who stalls hides it by sending less ("coordinated omission"); it ends
//! once the turn is over in which it was received and checked. Both ends are one thread: the time that it takes over frames
//! before is in it. What was lost has no time, and is told beside the times.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::end::End;
use super::frame::{self, HEADERS_BYTES, MAGIC};
use super::throughput::{DRAIN_MAX, Failure, Plan, QUIET, Round, Throughput};
use crate::front_end::{BURST, Received, VirtioNetHeader};

/// Silence before a frame that is to find its device asleep: longer than dreamwire polls (50 us).
pub const SILENCE: Duration = Duration::from_micros(200);

/// After this long a frame is given up as lost.
const LOST: Duration = Duration::from_secs(5);

/// Frames between two looks at the clock that are not recorded, to warm caches and learn addresses.
const WARM_UP: usize = 16;

/// Turns between two looks at what is flooded to the generator.
const TURNS_PER_DISCARD: u32 = 64;

/// Latencies, in ns, and what became of the frames that they are of.
#[derive(Clone, Debug)]
pub struct Latencies {
    times: Histogram<u64>,
    sent: u64,
    received: u64,
    lost: u64,
}

/// What they come to, us.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LatencySummary {
    /// Frames whose time was taken.
    pub frames: u64,
    /// Frames that the device took.
    pub sent: u64,
    /// Frames that came out whole.
    pub received: u64,
    /// Frames that never came out.
    pub lost: u64,
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
        let times = Histogram::new(3).expect("three digits are possible");
        Self { times, sent: 0, received: 0, lost: 0 }
    }
}

impl Latencies {
    pub(super) fn record(&mut self, latency: Duration) {
        self.times.record(latency.as_nanos() as u64).expect("a histogram that grows takes all");
    }

    /// A round in which times were recorded.
    fn count(&mut self, round: &Round) {
        self.sent += round.sent;
        self.received += round.received;
        self.lost += round.lost;
    }

    /// The value that `share` (0 to 1) of all frames were at or below, in us.
    pub fn quantile_us(&self, share: f64) -> f64 {
        self.times.value_at_quantile(share) as f64 / 1e3
    }

    /// `None` before anything was recorded.
    pub fn summary(&self) -> Option<LatencySummary> {
        let [p50_us, p99_us, p999_us, max_us] = [0.5, 0.99, 0.999, 1.0].map(|share| self.quantile_us(share));
        let Self { times, sent, received, lost } = self;
        (!times.is_empty()).then(|| LatencySummary {
            frames: times.len(),
            sent: *sent,
            received: *received,
            lost: *lost,
            p50_us,
            p99_us,
            p999_us,
            max_us,
        })
    }
}

/// The silence before frame `number`: spread over a device's whole way from polling to sleep.
pub(super) fn gap(silence: Duration, number: usize) -> Duration {
    silence + silence.mul_f64((number % 101) as f64 / 100.0)
}

/// Sends `samples` frames from `from` to `to`, each `silence` after the one before has arrived, plus up to as much again.
///
/// # Errors
/// An end's, [`Failure::Nothing`] when a frame does not arrive within 5 s, or [`Failure::Altered`] when it does so altered, or one
/// of those before it a second time.
pub fn measure(
    from: &mut dyn End,
    to: &mut dyn End,
    plan: &Plan,
    samples: usize,
    silence: Duration,
    latencies: &mut Latencies,
) -> Result<(), Failure> {
    let hello = frame::frame(plan.to, plan.from, frame::FRAME_BYTES_MIN, 0, u64::MAX);
    to.send(&hello)?;
    for number in 0..samples + WARM_UP {
        // From one on: zero is what traffic before this may have had.
        let probe = frame::frame(plan.from, plan.to, plan.size, 0, number as u64 + 1);
        let idle = Instant::now();
        while idle.elapsed() < gap(silence, number) {
            from.receive_each(&mut |_| ())?;
            std::hint::spin_loop();
        }
        let mut arrival = Arrival::default();
        to.receive_each(&mut |view| arrival.take(view, &[]))?;
        arrival.check()?;
        let started = Instant::now();
        from.send(&probe)?;
        while !arrival.is_there {
            to.receive_each(&mut |view| arrival.take(view, &probe))?;
            arrival.check()?;
            if started.elapsed() > LOST {
                return Err(Failure::Nothing { sent: 1, foreign: 0 });
            }
        }
        if number >= WARM_UP {
            latencies.record(started.elapsed());
            (latencies.sent, latencies.received) = (latencies.sent + 1, latencies.received + 1);
        }
    }
    Ok(())
}

/// What arrives while one frame is waited for.
#[derive(Default)]
struct Arrival {
    is_there: bool,
    /// A test frame that is not the one, or is it once more.
    wrong: Option<(VirtioNetHeader, Vec<u8>)>,
}

impl Arrival {
    /// `probe` is the one, or empty for none. Frames of someone else do not count.
    fn take(&mut self, mut view: Received<'_>, probe: &[u8]) {
        let header = view.header();
        let bytes = view.bytes();
        if bytes == probe && !self.is_there {
            self.is_there = true;
        } else if bytes.get(HEADERS_BYTES..).is_some_and(|payload| payload.starts_with(&MAGIC)) {
            self.wrong.get_or_insert_with(|| (header, bytes.to_vec()));
        }
    }

    fn check(&self) -> Result<(), Failure> {
        match &self.wrong {
            Some((header, frame)) => Err(Failure::altered(*header, frame)),
            None => Ok(()),
        }
    }
}

/// Frames that are due or under way: number in the set, and when they fell due. They arrive in this order.
#[derive(Default)]
struct Waiting(VecDeque<(usize, Instant)>);

impl Waiting {
    /// `None` for a frame that was not waited for, and nothing changes. Otherwise those before it were lost.
    fn settle(&mut self, sequence: usize) -> Option<Instant> {
        let at = self.0.iter().position(|(waiting, _)| *waiting == sequence)?;
        self.0.drain(..=at).next_back().map(|(_, since)| since)
    }
}

impl Throughput<'_> {
    /// A round at `mpps`, evenly paced, of which every frame's time is recorded. The last frame that is sent is the last that
    /// falls due within it.
    ///
    /// # Errors
    /// As [`Throughput::round`].
    pub fn paced(&mut self, mpps: f64, latencies: &mut Latencies) -> Result<Round, Failure> {
        self.drain()?;
        let frames = self.sink.set().frames().len();
        let mut sequence = self.from.next_template();
        self.sink.reset(sequence);
        let sent_before = self.from.sent();
        let per_second = mpps * 1e6;
        let (mut due, mut unsent, mut turns) = (0_u64, 0_u64, 0_u32);
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
            let due_now = (elapsed.min(self.plan.duration).as_secs_f64() * per_second) as u64;
            while due < due_now {
                (due, unsent) = (due + 1, unsent + 1);
                waiting.0.push_back((sequence, started + Duration::from_secs_f64(due as f64 / per_second)));
                sequence = (sequence + 1) % frames;
            }
            unsent -= u64::from(self.from.repost(unsent.min(u64::from(BURST)) as u16)?);
            let sink = &mut self.sink;
            self.to.receive_each(&mut |frame| arrived.extend(sink.take(frame)))?;
            if !arrived.is_empty() {
                last_arrival = Instant::now();
                for since in arrived.drain(..).filter_map(|sequence| waiting.settle(sequence)) {
                    latencies.record(last_arrival.saturating_duration_since(since));
                }
            }
            turns += 1;
            if turns.is_multiple_of(TURNS_PER_DISCARD) {
                self.discard_backwards()?;
            }
        };
        let received = self.sink.arrived().good;
        let round = self.result(sent_before, received, elapsed, Duration::ZERO);
        latencies.count(&round);
        Ok(round)
    }
}

#[cfg(test)]
mod tests {
    use super::super::loopback::{self, Harm};
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
    fn a_frame_that_nobody_waits_for_leaves_the_others_waiting() {
        let start = Instant::now();
        let mut waiting = Waiting(VecDeque::from([(1, start), (2, start)]));
        assert_eq!(waiting.settle(7), None);
        assert_eq!((waiting.settle(1), waiting.settle(1), waiting.settle(2)), (Some(start), None, Some(start)));
    }

    fn one_at_a_time(harm: Harm) -> Result<LatencySummary, Failure> {
        let [mut from, mut to] = loopback::pair(harm);
        let mut latencies = Latencies::default();
        measure(&mut from, &mut to, &Plan::default(), 100, Duration::ZERO, &mut latencies)?;
        Ok(latencies.summary().unwrap())
    }

    #[test]
    fn every_byte_of_one_frame_at_a_time_is_compared_and_none_comes_twice() {
        let summary = one_at_a_time(|_, frame| vec![vec![0xff; 64], frame]).unwrap();
        assert_eq!((summary.frames, summary.sent, summary.received, summary.lost), (100, 100, 100, 0));
        let harms: [Harm; 4] = [
            |number, mut frame| {
                frame[63] ^= u8::from(number == 50);
                vec![frame]
            },
            |number, mut frame| {
                frame.truncate(if number == 50 { 62 } else { 64 });
                vec![frame]
            },
            |number, frame| vec![frame; if number == 50 { 2 } else { 1 }],
            // The last of all.
            |number, frame| vec![frame; if number == 115 { 2 } else { 1 }],
        ];
        for (index, harm) in harms.into_iter().enumerate() {
            assert!(matches!(one_at_a_time(harm), Err(Failure::Altered { .. })), "harm {index}");
        }
    }

    fn plan() -> Plan {
        Plan { duration: Duration::from_millis(20), ..Plan::default() }
    }

    /// At 0.1 Mpps: 2000 frames.
    fn paced(harm: Harm) -> (Round, LatencySummary) {
        let set = Throughput::flow_set(&plan(), 256);
        let [mut from, mut to] = loopback::pair(harm);
        let mut latencies = Latencies::default();
        let mut throughput = Throughput::new(&mut from, &mut to, plan(), &set).unwrap();
        let round = throughput.paced(0.1, &mut latencies).unwrap();
        (round, latencies.summary().unwrap())
    }

    #[test]
    fn frames_lost_under_load_are_told_beside_the_times() {
        let (round, summary) = paced(|number, frame| if number % 100 == 7 { vec![] } else { vec![frame] });
        assert_eq!((summary.sent, summary.received, summary.lost, summary.frames), (2000, 1980, 20, 1980));
        assert_eq!((round.sent, round.lost, round.in_order), (2000, 20, true));
    }

    #[test]
    fn a_stall_is_in_the_time_of_every_frame_that_fell_due_in_it() {
        let (_, summary) = paced(|number, frame| {
            if number == 500 {
                std::thread::sleep(Duration::from_millis(10));
            }
            vec![frame]
        });
        // 1000 frames in 10 ms: half of all, from 10 ms down to nothing. Whoever counts from the sending sees one or two.
        assert_eq!(summary.frames, 2000);
        assert!(summary.p99_us > 9000.0 && summary.max_us >= 10_000.0, "{summary:?}");
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
