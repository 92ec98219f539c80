//! One thread, two front-ends: the generator on one port, the sink on the other, the device under test between them.
//!
//! Theory of operation. The generator reposts a set of frames as fast as its ring takes them; the sink checks what
//! comes out. Both run in turns on one pinned core, so that the device has the other for itself. A round: discard
//! what is still under way, run for a time, stop sending, wait until nothing comes any more, count. Loss is exact:
//! frames that the device took and never delivered. No more large frames are under way than the receiver has buffers for.

use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::end::End;
use super::frame::{self, Endpoint, FlowSet};
use super::in_flight::{InFlight, LIMITED_BYTES};
use super::sink::Sink;
use super::vxlan::Outer;
use crate::front_end::split::RingError;
use crate::front_end::{BURST, FrontEndError, VirtioNetHeader};

/// Turns of generator and sink between two looks at the clock: some microseconds.
const TURNS_PER_LOOK: u32 = 16;

/// After this long without a frame nothing is under way any more.
pub(super) const QUIET: Duration = Duration::from_millis(25);

/// Draining longer than this means that the device never falls silent.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(5);

/// How long a whole pass over a set may take: a million flows at 35,000 a second.
const PASS_MAX: Duration = Duration::from_secs(30);

/// How long the device may take to bring the first frame across.
const FIRST_FRAME_MAX: Duration = Duration::from_secs(30);

/// Frames to be segmented in a set: 4 MiB, what a TCP connection may have under way.
const SEGMENTED_FRAMES: usize = 64;

/// Of an altered frame this much is shown: outer and inner headers, and the start of the payload.
const SPECIMEN_BYTES: usize = 160;

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Frame length in the ring, bytes.
    pub size: usize,
    /// Flows, told apart by UDP source port.
    pub flows: usize,
    /// Length of a round.
    pub duration: Duration,
    /// One frame in this many is compared to its last byte.
    pub sample: u64,
    /// Who sends.
    pub from: Endpoint,
    /// Who receives.
    pub to: Endpoint,
    /// One side of the device is the physical NIC's.
    pub tunnel: Option<Tunnel>,
    /// Every frame is sent once, and a round ends when all are: then every frame can be a new flow.
    pub once: bool,
    /// The device may change offloads as OVS-DPDK does: see [`Sink::with_offloads_of_ovs`].
    pub offloads_of_ovs: bool,
}

/// Which side, and what the packets there look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tunnel {
    /// Frames go into a VM's port; packets with these outer headers come out of the NIC.
    Encapsulate(Outer),
    /// Packets with these outer headers go into the NIC; frames come out of a VM's port.
    Decapsulate(Outer),
}

impl Default for Plan {
    /// One flow of 64-byte frames between the first two stations, in rounds of 2 s.
    fn default() -> Self {
        Self {
            size: 64,
            flows: 1,
            duration: Duration::from_secs(2),
            sample: 64,
            from: Endpoint { mac: [0x52, 0x54, 0, 0, 0, 1], address: [10, 0, 0, 1].into() },
            to: Endpoint { mac: [0x52, 0x54, 0, 0, 0, 2], address: [10, 0, 0, 2].into() },
            tunnel: None,
            once: false,
            offloads_of_ovs: false,
        }
    }
}

/// What a round came to.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Round {
    /// Millions of good frames received per second, while sending.
    pub mpps: f64,
    /// Their bits in the ring.
    pub gbit_per_s: f64,
    /// Frames that the device took.
    pub sent: u64,
    /// Frames that came out whole, to the end.
    pub received: u64,
    /// Frames that never came out.
    pub lost: u64,
    /// Frames that came out altered.
    pub corrupt: u64,
    /// Frames of someone else.
    pub foreign: u64,
    /// Whether every flow kept its order.
    pub in_order: bool,
    /// Share of the time in which the harness waited for the device, which neither took nor brought a frame: near 0, the
    /// harness and not the device was measured.
    pub idle: f64,
}

impl Round {
    /// What is wrong with it, if anything is: throughput of frames that are wrong is no throughput. `specimen` is the first
    /// frame that came out altered.
    #[must_use]
    pub fn fault(&self, specimen: Option<&[u8]>) -> Option<String> {
        if self.corrupt > 0 {
            let start = start_of(specimen.unwrap_or_default());
            Some(format!("{} frames came out altered; the first: {start}", self.corrupt))
        } else if self.received == 0 {
            Some(format!("nothing came out of {} frames", self.sent))
        } else if self.received > self.sent {
            Some(format!("{} frames came out of {}", self.received, self.sent))
        } else if !self.in_order {
            Some("frames of one flow came out in another order".into())
        } else {
            None
        }
    }
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A front-end failed.
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    /// Nothing came through.
    #[error("no frame came through within {} s: {sent} sent, {foreign} foreign frames received", FIRST_FRAME_MAX.as_secs())]
    Nothing {
        /// Frames that the device took.
        sent: u64,
        /// Frames that were not ours.
        foreign: u64,
    },
    /// What came through first was altered, or came twice.
    #[error("frames come out altered or twice; the first has {bytes} bytes behind {header:?}: {start}")]
    Altered {
        /// Its length.
        bytes: usize,
        /// Its virtio-net header.
        header: VirtioNetHeader,
        /// Its beginning, in hexadecimal.
        start: String,
    },
    /// The device never falls silent.
    #[error("frames keep coming {} s after the last was sent", DRAIN_MAX.as_secs())]
    NeverQuiet,
    /// The device is too slow for so many frames.
    #[error("{sent} frames of a set of {frames} were taken within {} s", PASS_MAX.as_secs())]
    SlowPass {
        /// Frames that the device took.
        sent: u64,
        /// Frames in the set.
        frames: usize,
    },
}

impl Failure {
    pub(super) fn altered(header: VirtioNetHeader, frame: &[u8]) -> Self {
        Self::Altered { bytes: frame.len(), header, start: start_of(frame) }
    }
}

impl From<RingError> for Failure {
    fn from(error: RingError) -> Self {
        Self::FrontEnd(error.into())
    }
}

/// A generator and a sink on either side of a device.
#[derive(Debug)]
pub struct Throughput<'a> {
    pub(super) from: &'a mut dyn End,
    pub(super) to: &'a mut dyn End,
    pub(super) plan: Plan,
    pub(super) sink: Sink<'a>,
}

impl<'a> Throughput<'a> {
    /// The set of frames for `plan`: at least a ring full.
    pub fn flow_set(plan: &Plan, ring_size: u16) -> FlowSet {
        let least = if plan.size > frame::FRAME_BYTES_MAX { SEGMENTED_FRAMES } else { usize::from(ring_size) };
        FlowSet::new(plan.from, plan.to, plan.size, plan.flows, least)
    }

    /// Loads `set` into the generator.
    ///
    /// # Errors
    /// If guest memory is too small for it.
    pub fn new(from: &'a mut dyn End, to: &'a mut dyn End, plan: Plan, set: &'a FlowSet) -> Result<Self, Failure> {
        match plan.tunnel {
            Some(Tunnel::Decapsulate(outer)) => {
                let wrap = |(index, frame): (usize, &Vec<u8>)| outer.wrap(frame, index % set.flows());
                let packets: Vec<_> = set.frames().iter().enumerate().map(wrap).collect();
                from.load(&packets, set.header())?;
            }
            _ => from.load(set.frames(), set.header())?,
        }
        let sink = match plan.tunnel {
            Some(Tunnel::Encapsulate(outer)) => Sink::behind(&outer, set, plan.sample),
            _ => Sink::new(set, plan.sample),
        };
        let sink = if plan.offloads_of_ovs { sink.with_offloads_of_ovs() } else { sink };
        Ok(Self { sink, from, to, plan })
    }

    /// Lets a switch learn both addresses, and waits until frames come through.
    ///
    /// # Errors
    /// [`Failure::Nothing`], [`Failure::Altered`], or a broken ring.
    pub fn warm_up(&mut self) -> Result<(), Failure> {
        let started = Instant::now();
        // From the sink towards the generator, so that the sink's address is known; not counted anywhere.
        let mut hello = frame::frame(self.plan.to, self.plan.from, frame::FRAME_BYTES_MIN, 0, u64::MAX);
        if let Some(Tunnel::Encapsulate(outer)) = self.plan.tunnel {
            hello = outer.reversed().wrap(&hello, 0);
        }
        self.sink.reset(0);
        while self.sink.arrived().good == 0 {
            if started.elapsed() > FIRST_FRAME_MAX {
                return Err(Failure::Nothing { sent: self.from.sent(), foreign: self.sink.arrived().foreign });
            }
            self.to.send(&hello)?;
            self.from.repost(1)?;
            // Asleep: the device's main thread, which may have ports to set up yet, shares this CPU.
            thread::sleep(Duration::from_millis(10));
            self.receive()?;
            if let (Some(header), Some(frame)) = (self.sink.specimen_header(), self.sink.specimen()) {
                return Err(Failure::altered(header, frame));
            }
        }
        self.to.reap()?;
        self.run(Duration::from_millis(100).min(self.plan.duration), 0).map(|_| ())
    }

    /// Goes on with frame `index` of the set.
    pub fn skip_to(&mut self, index: usize) {
        self.from.skip_to(index);
    }

    /// Index of the frame of the set that goes next.
    pub fn next_template(&self) -> usize {
        self.from.next_template()
    }

    /// A round that does not count, of `duration` at least and the whole set: afterwards a switch has seen every flow, and caches
    /// and tables are warm.
    ///
    /// # Errors
    /// As [`Self::round`], or [`Failure::SlowPass`].
    pub fn settle(&mut self, duration: Duration) -> Result<(), Failure> {
        self.run(duration, self.sink.set().frames().len()).map(drop)
    }

    /// One round.
    ///
    /// # Errors
    /// A broken ring, or a device that never falls silent.
    pub fn round(&mut self) -> Result<Round, Failure> {
        self.run(self.plan.duration, 0)
    }

    /// For `duration`, and until `least` frames were sent.
    fn run(&mut self, duration: Duration, least: usize) -> Result<Round, Failure> {
        self.drain()?;
        let sequence = self.from.next_template();
        self.sink.reset(sequence);
        let sent_before = self.from.sent();
        let mut left = self.sink.set().frames().len();

        let started = Instant::now();
        let mut idle = Idle::default();
        let held = self.to.frames_held(self.plan.size);
        let mut limit = (self.plan.size > LIMITED_BYTES).then(|| InFlight::new(held, started));
        let elapsed = loop {
            for _ in 0..TURNS_PER_LOOK {
                let burst = if self.plan.once { left.min(usize::from(BURST)) as u16 } else { BURST };
                let burst = limit.as_ref().map_or(burst, |limit| burst.min(limit.room()));
                let sent = self.from.repost(burst)?;
                left -= if self.plan.once { usize::from(sent) } else { 0 };
                let received = self.to.receive_into(&mut self.sink)?;
                if let Some(limit) = &mut limit {
                    let arrived = self.sink.arrived();
                    limit.turn(sent, arrived.good + arrived.corrupt, self.from.in_flight() == 0, Instant::now());
                }
                idle.turn(sent == 0 && received == 0);
            }
            self.discard_backwards()?;
            let elapsed = started.elapsed();
            let is_through = left == 0 && self.from.in_flight() == 0;
            let sent = self.from.sent() - sent_before;
            if (elapsed >= duration && sent >= least as u64) || is_through {
                break elapsed;
            }
            if elapsed >= duration.max(PASS_MAX) {
                return Err(Failure::SlowPass { sent, frames: least });
            }
        };
        let in_time = self.sink.arrived().good;
        self.drain()?;
        Ok(self.result(sent_before, in_time, elapsed, idle.total))
    }

    /// After all has arrived that will: `in_time` good frames did so in `elapsed`.
    pub(super) fn result(&self, sent_before: u64, in_time: u64, elapsed: Duration, idle: Duration) -> Round {
        let sent = self.from.sent() - sent_before;
        let arrived = self.sink.arrived();
        let lost = sent.saturating_sub(arrived.good + arrived.corrupt);
        let per_second = in_time as f64 / elapsed.as_secs_f64();
        Round {
            mpps: per_second / 1e6,
            gbit_per_s: per_second * self.plan.size as f64 * 8.0 / 1e9,
            sent,
            received: arrived.good,
            lost,
            corrupt: arrived.corrupt,
            foreign: arrived.foreign,
            in_order: self.sink.in_sequence(lost),
            idle: (idle.as_secs_f64() / elapsed.as_secs_f64()).min(1.0),
        }
    }

    /// What a switch floods towards the generator must not fill its ring.
    pub(super) fn discard_backwards(&mut self) -> Result<(), Failure> {
        self.from.receive_each(&mut |_| ())?;
        Ok(())
    }

    /// Receives until all that was sent has been taken and nothing has come for [`QUIET`].
    pub(super) fn drain(&mut self) -> Result<(), Failure> {
        let started = Instant::now();
        let mut last = started;
        loop {
            self.from.reap()?;
            let waiting = self.from.in_flight() > 0;
            if self.receive()? > 0 || waiting {
                last = Instant::now();
            }
            if last.elapsed() > QUIET {
                return Ok(());
            }
            if started.elapsed() > DRAIN_MAX {
                return Err(Failure::NeverQuiet);
            }
        }
    }

    fn receive(&mut self) -> Result<usize, Failure> {
        self.discard_backwards()?;
        Ok(self.to.receive_into(&mut self.sink)?)
    }

    /// The first corrupt frame, if there was one.
    pub fn specimen(&self) -> Option<&[u8]> {
        self.sink.specimen()
    }
}

/// As much of a frame as tells what is wrong with it, in hexadecimal.
fn start_of(frame: &[u8]) -> String {
    frame.iter().take(SPECIMEN_BYTES).map(|byte| format!("{byte:02x}")).collect()
}

/// Time in which nothing moves. The clock is read in idle turns alone: there is time for it.
#[derive(Default)]
struct Idle {
    /// The first and the last of a series of idle turns.
    series: Option<(Instant, Instant)>,
    total: Duration,
}

impl Idle {
    #[inline]
    fn turn(&mut self, is_idle: bool) {
        if is_idle {
            let now = Instant::now();
            self.series = Some((self.series.map_or(now, |(first, _)| first), now));
        } else if let Some((first, last)) = self.series.take() {
            self.total += last - first;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::loopback;
    use super::*;

    #[test]
    fn settling_is_a_whole_pass_and_the_round_goes_on_behind_it() {
        let plan = Plan { flows: 5000, duration: Duration::ZERO, ..Plan::default() };
        let set = Throughput::flow_set(&plan, 256);
        let [mut from, mut to] = loopback::pair(|_, frame| vec![frame]);
        let mut throughput = Throughput::new(&mut from, &mut to, plan, &set).unwrap();
        throughput.skip_to(1000);
        throughput.settle(Duration::ZERO).unwrap();
        let burst = TURNS_PER_LOOK * u32::from(BURST);
        let settled = throughput.from.sent();
        assert!((5000..5000 + u64::from(burst)).contains(&settled), "{settled}");
        assert_eq!(throughput.next_template() as u64, (1000 + settled) % 5000);
        let round = throughput.round().unwrap();
        assert_eq!((round.sent, round.received, round.lost), (burst.into(), burst.into(), 0));
        assert!(round.in_order, "{round:?}");
    }
}
