//! What dreamwire costs while nothing happens: many guests attached, none of them sending.
//!
//! CPU time is the whole daemon's, in clock ticks of 10 ms; memory is told apart by what maps it. The guests' memory is
//! this program's, and counts in the daemon only as far as the daemon has touched it: rings, and buffers of what was sent.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

use super::bare::BareSleeper;
use super::latency::{self, Latencies, LatencySummary};
use super::{Failure, Plan, cpu};
use crate::front_end::{FrontEnd, FrontEndError, Options};
use crate::topology::{Daemon, DaemonSpec, TopologyError};

/// Time for the daemon to settle after the last guest was attached.
const SETTLE: Duration = Duration::from_millis(500);
/// In how many turns the daemon's wake-up and the machine's own are measured.
const TURNS: usize = 10;
/// How /proc names a guest's memory (front_end/memory.rs).
const GUEST_MEMORY: &str = "/memfd:dreamwire-guest";

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct IdlePlan {
    /// Ports, each with a guest: two at least.
    pub ports: usize,
    /// How long to watch.
    pub duration: Duration,
    /// Frames whose wake-up is measured.
    pub wake_ups: usize,
    /// CPU of the guests.
    pub cpu: usize,
    /// CPU of the daemon's worker.
    pub peer_cpu: usize,
    /// The daemon's `resume_latency_us`.
    pub resume_latency_us: Option<u32>,
}

/// What was seen.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Idle {
    /// Ports.
    pub ports: usize,
    /// How long it was watched, seconds.
    pub seconds: f64,
    /// Clock ticks that the daemon ran.
    pub ticks: u64,
    /// Those, in percent of one CPU.
    pub cpu_percent: f64,
    /// Resident memory.
    pub resident: Resident,
    /// From one guest to another, the daemon asleep.
    pub wake_up: LatencySummary,
    /// The same by a thread that does nothing but sleep and answer, on the same CPU, in turns: what the machine itself takes.
    pub bare_wake_up: LatencySummary,
}

/// Resident memory by kind, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resident {
    /// Heap, stacks and private copies.
    pub anonymous_kib: u64,
    /// Program and libraries.
    pub file_kib: u64,
    /// Guests' memory that the daemon has touched, which is not its own.
    pub guest_kib: u64,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum IdleError {
    /// The daemon did not start.
    #[error(transparent)]
    Daemon(#[from] TopologyError),
    /// A guest was not attached.
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    /// A frame did not come through.
    #[error(transparent)]
    Traffic(#[from] Failure),
    /// The daemon is not in /proc any more, or no thread could be started beside it.
    #[error("looking at the daemon in /proc, or waking a thread beside it: {0}")]
    System(#[from] std::io::Error),
}

/// Starts `binary` with ports in one network, attaches a guest to each, and watches.
///
/// # Errors
/// [`IdleError`].
///
/// # Panics
/// If there are fewer than two ports, or no frames.
pub fn measure(binary: &Path, plan: &IdlePlan) -> Result<Idle, IdleError> {
    assert!(plan.ports >= 2 && plan.wake_ups > 0, "two ports and a frame between them: {plan:?}");
    crate::compare::raise_descriptor_limit();
    let mut config = format!("[daemon]\nrun_dir = \"{{run_dir}}\"\nworkers = [{}]\n", plan.peer_cpu);
    if let Some(latency_us) = plan.resume_latency_us {
        writeln!(config, "resume_latency_us = {latency_us}").expect("a string takes all");
    }
    config.push_str("[[network]]\nname = \"idle\"\n");
    for number in 0..plan.ports {
        write!(config, "[[port]]\nname = \"vm{number}\"\nnetwork = \"idle\"\n").expect("a string takes all");
    }
    let mut daemon = Daemon::start(&DaemonSpec { name: "dreamwire", binary, netns: None, config: &config })?;
    let seen = watch(&daemon, plan);
    // Not killed: what it asked the kernel for would stay.
    let ended = daemon.terminate();
    let seen = seen?;
    ended?;
    Ok(seen)
}

fn watch(daemon: &Daemon, plan: &IdlePlan) -> Result<Idle, IdleError> {
    // After the daemon was started, which would inherit it.
    let _ = cpu::pin(plan.cpu);
    let socket = |number| daemon.path(&format!("vm{number}.sock"));
    let options = Options { spare_bytes: 0, ..Options::default() };
    let attach = |number| FrontEnd::connect(&socket(number), options.clone());
    let mut guests = (0..plan.ports).map(attach).collect::<Result<Vec<_>, _>>()?;
    thread::sleep(SETTLE);

    let process = format!("/proc/{}", daemon.pid());
    let before = ticks(&fs::read_to_string(format!("{process}/stat"))?);
    thread::sleep(plan.duration);
    let ticks = ticks(&fs::read_to_string(format!("{process}/stat"))?) - before;
    let resident = resident(&fs::read_to_string(format!("{process}/smaps"))?);

    let [from, to, ..] = guests.as_mut_slice() else { unreachable!("there are two at least") };
    let bare_sleeper = BareSleeper::start(plan.peer_cpu)?;
    let (mut wake_up, mut bare) = (Latencies::default(), Latencies::default());
    for _ in 0..TURNS {
        let count = plan.wake_ups.div_ceil(TURNS);
        latency::measure(from, to, &Plan::default(), count, latency::SILENCE, &mut wake_up)?;
        bare_sleeper.measure(count, latency::SILENCE, &mut bare)?;
    }
    let summary = |latencies: &Latencies| latencies.summary().expect("there was a frame");
    let seconds = plan.duration.as_secs_f64();
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
    Ok(Idle {
        ports: plan.ports,
        seconds,
        ticks,
        cpu_percent: 100.0 * ticks as f64 / ticks_per_second / seconds,
        resident,
        wake_up: summary(&wake_up),
        bare_wake_up: summary(&bare),
    })
}

/// User and system time of all threads, from /proc/PID/stat (proc(5): fields 14 and 15; the second is in parentheses and may
/// hold blanks).
fn ticks(stat: &str) -> u64 {
    let (_, fields) = stat.rsplit_once(')').unwrap_or_default();
    fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// From /proc/PID/smaps (proc(5)): a line with range and name before the figures of each mapping.
fn resident(smaps: &str) -> Resident {
    let mut sum = Resident::default();
    let mut is_guest = false;
    let mut mapped = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let mut kib = || words.next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        match first {
            "Rss:" => mapped = kib(),
            "Anonymous:" if is_guest => sum.guest_kib += mapped,
            "Anonymous:" => {
                let anonymous = kib();
                sum.anonymous_kib += anonymous;
                sum.file_kib += mapped - anonymous.min(mapped);
            }
            _ if !first.ends_with(':') => is_guest = words.nth(4).is_some_and(|name| name.starts_with(GUEST_MEMORY)),
            _ => (),
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_user_and_system_time() {
        assert_eq!(ticks("17 (a (b) c) S 1 17 17 0 -1 4194560 100 0 0 0 31 11 5 6 20 0 8 0 99"), 42);
    }

    #[test]
    fn memory_is_told_apart_by_what_maps_it() {
        let smaps = "\
55d000000000-55d000001000 r-xp 00000000 fe:00 12 /usr/bin/dreamwire
Size:                 40 kB
Rss:                  30 kB
Anonymous:             4 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Rss:                 200 kB
Anonymous:           200 kB
7f1000000000-7f1000100000 rw-s 00000000 00:01 9 /memfd:dreamwire-guest (deleted)
Rss:                1000 kB
Anonymous:             0 kB
";
        assert_eq!(resident(smaps), Resident { anonymous_kib: 204, file_kib: 26, guest_kib: 1000 });
    }
}
