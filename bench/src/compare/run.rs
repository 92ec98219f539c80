//! Rounds of windows over all lanes.

use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::CompareError;
use super::device::{CONNECTIONS, Device, Site, VMS};
use super::lane::{Case, Lane, Load};
use super::report::{Comparison, LaneReport, Outcome};
use crate::front_end::{ChainShape, FrontEnd, Options, feature};
use crate::traffic::throughput::Throughput;
use crate::traffic::{End, Endpoint, FlowSet, Latencies, Plan, Round, cpu, latency};

/// As a Linux guest sends 64 KiB: header, and pages of a scattered buffer in an indirect table.
const SEGMENTED_CHAIN: ChainShape = ChainShape { descriptors: 18, indirect: true };

/// Share of a device's rate at which latency under load is measured.
const LOAD: f64 = 0.1;

/// How long, how often.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Rounds.
    pub rounds: u32,
    /// Of a lane in a round.
    pub window: Duration,
    /// Before each window, and not counted: at least this long, and once through all flows of the lane.
    pub settle: Duration,
    /// One frame in this many is compared to its last byte.
    pub sample: u64,
    /// Frames in a window at most, where each is a new flow: fewer if the windows of all rounds together would have more than a
    /// table of connections holds, for what is measured is the first frame of a flow, not how a full table is cleared.
    pub new_flows: usize,
}

impl Schedule {
    /// Flows of one window, where each frame is a new one.
    fn new_flows_of_a_window(&self) -> usize {
        // What settling and warming up leave behind is a flow or a few.
        self.new_flows.min((CONNECTIONS - 1024) / self.rounds.max(1) as usize).max(1)
    }
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            rounds: 15,
            window: Duration::from_millis(300),
            settle: Duration::from_millis(50),
            sample: 64,
            new_flows: 1 << 18,
        }
    }
}

/// A lane that has come up.
struct Running<'a> {
    lane: &'a Lane,
    device: Device,
    ends: [Box<dyn End>; 2],
    set: FlowSet,
    /// In the set: where the next window goes on. A window may be too short for all flows.
    position: usize,
    rounds: Vec<Round>,
    latencies: Latencies,
    _bystanders: Vec<FrontEnd>,
}

impl Drop for Running<'_> {
    /// The front-ends say good-bye, and someone has to listen.
    fn drop(&mut self) {
        let _ = self.device.resume();
    }
}

/// Measures all lanes in turns. A lane that does not come up is reported as such, one that fails later ends the run.
///
/// # Errors
/// A frame altered, doubled or out of order, or none at all; a device that ended.
pub fn run(title: &str, lanes: &[Lane], schedule: &Schedule, site: &Site) -> Result<Comparison, CompareError> {
    raise_descriptor_limit();
    let mut outcomes: Vec<_> = lanes.iter().map(|lane| bring_up(lane, site, schedule)).collect();
    for round in 0..schedule.rounds {
        let mut running: Vec<_> = outcomes.iter_mut().filter_map(|outcome| outcome.as_mut().ok()).collect();
        if round % 2 == 1 {
            running.reverse();
        }
        for lane in running {
            lane.device.resume()?;
            let measured = lane.window(round, schedule);
            lane.device.pause()?;
            measured?;
        }
    }
    let reports = lanes.iter().zip(outcomes).map(|(lane, outcome)| {
        let outcome = match outcome {
            Ok(mut running) => {
                Outcome::Measured { rounds: std::mem::take(&mut running.rounds), latency: running.latencies.summary() }
            }
            Err(error) => Outcome::Unavailable { reason: error.to_string() },
        };
        LaneReport { lane: lane.clone(), outcome }
    });
    Ok(Comparison { title: title.to_owned(), window_s: schedule.window.as_secs_f64(), lanes: reports.collect() })
}

fn bring_up<'a>(lane: &'a Lane, site: &Site, schedule: &Schedule) -> Result<Running<'a>, CompareError> {
    let mut device = Device::start(lane, site)?;
    // After the device was started, which would inherit it.
    let _ = cpu::pin(site.cpu);
    let ends = device.connect(&options(&lane.case, schedule))?;
    let bystanders = device.attach_bystanders()?;
    let set = Throughput::flow_set(&plan(lane, schedule), lane.case.ring);
    let latencies = Latencies::default();
    let mut running =
        Running { lane, device, ends, set, position: 0, rounds: Vec::new(), latencies, _bystanders: bystanders };
    let warm_up = Plan { once: false, ..plan(lane, schedule) };
    let [from, to] = &mut running.ends;
    Throughput::new(from.as_mut(), to.as_mut(), warm_up, &running.set)?.warm_up()?;
    running.device.pause()?;
    Ok(running)
}

impl Running<'_> {
    fn window(&mut self, number: u32, schedule: &Schedule) -> Result<(), CompareError> {
        let plan = plan(self.lane, schedule);
        let [from, to] = &mut self.ends;
        let (from, to) = (from.as_mut(), to.as_mut());
        let load = self.lane.case.latency;
        if load == Some(Load::Idle) {
            let samples = schedule.window.div_duration_f64(latency::SILENCE.mul_f64(1.5)).ceil() as usize;
            return Ok(latency::measure(from, to, &plan, samples, latency::SILENCE, &mut self.latencies)?);
        }
        // The set is written anew: the lanes' memory would not stay in the caches anyway.
        let mut settling = Throughput::new(from, to, Plan { once: false, ..plan.clone() }, &self.set)?;
        settling.skip_to(self.position);
        settling.settle(schedule.settle)?;
        let checked = |round: Round, specimen: Option<&[u8]>| match round.fault(specimen) {
            Some(fault) => Err(CompareError::Content(format!("{}, round {}: {fault}", self.lane.label, number + 1))),
            None => Ok(round),
        };
        let round = if plan.once {
            drop(settling);
            // An address that has never sent: nobody knows any of these flows.
            let [.., high, low] = number.to_be_bytes();
            let flows = schedule.new_flows_of_a_window();
            let sender = Endpoint { address: [10, high.wrapping_add(1), low, 1].into(), ..plan.from };
            let set = FlowSet::new(sender, plan.to, plan.size, flows, flows);
            let mut throughput = Throughput::new(from, to, plan, &set)?;
            checked(throughput.round()?, throughput.specimen())?
        } else {
            let round = checked(settling.round()?, settling.specimen())?;
            if load.is_some() {
                checked(settling.paced(LOAD * round.mpps, &mut self.latencies)?, settling.specimen())?;
            }
            self.position = settling.next_template();
            round
        };
        self.rounds.push(round);
        Ok(())
    }
}

fn plan(lane: &Lane, schedule: &Schedule) -> Plan {
    let case = &lane.case;
    Plan {
        size: case.size,
        flows: case.flows,
        duration: schedule.window,
        sample: schedule.sample,
        from: VMS[0],
        to: VMS[1],
        tunnel: case.tunnel(),
        once: case.new_flows,
        offloads_of_ovs: lane.device == "ovs",
    }
}

fn options(case: &Case, schedule: &Schedule) -> Options {
    let defaults = Options::default();
    let frames = case.flows.max(usize::from(case.ring)).max(if case.new_flows { schedule.new_flows } else { 0 });
    let frames = if case.is_segmented() { 128 } else { frames };
    let mut options = Options {
        ring_size: case.ring,
        rewrite: case.rewrite,
        rx_buffer_bytes: case.rx_buffer_bytes(),
        // Outer headers, virtio-net header and rounding.
        spare_bytes: frames * (case.size + 256) + defaults.spare_bytes,
        ..defaults
    };
    let mut require = |features| {
        options.features |= features;
        options.features_required |= features;
    };
    if case.packed {
        require(feature::RING_PACKED);
    }
    if case.is_segmented() {
        require(feature::CSUM | feature::GUEST_CSUM | feature::HOST_TSO4 | feature::GUEST_TSO4);
        require(feature::MRG_RXBUF | feature::INDIRECT_DESC);
        options.tx_chain = SEGMENTED_CHAIN;
    }
    if case.packed {
        // As DPDK's own driver asks for it (virtio-user's `in_order`, on unless told otherwise).
        options.features |= feature::IN_ORDER;
    }
    options
}

/// Every attached VM takes a socket, memory and six eventfds.
pub(crate) fn raise_descriptor_limit() {
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // Without it the lanes that need more say so.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_flows_of_all_rounds_have_room_in_one_table() {
        for (rounds, flows) in [(1, 1 << 18), (3, 1 << 18), (15, 69_836)] {
            let schedule = Schedule { rounds, ..Schedule::default() };
            assert_eq!(schedule.new_flows_of_a_window(), flows, "{rounds} rounds");
            assert!(rounds as usize * flows < CONNECTIONS);
        }
    }
}
