//! The commands `compare` and `standard`: arguments, progress, files.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use dreamwire_bench::compare::{self, Comparison, Lane, Schedule, Site};
use dreamwire_bench::topology;

use super::{Error, seconds};

#[derive(Debug, Args)]
struct ScheduleArguments {
    /// CPU of generator and sink
    #[arg(long, default_value_t = 0)]
    cpu: usize,
    /// CPU of the devices' forwarding threads
    #[arg(long, default_value_t = 1)]
    peer_cpu: usize,
    /// Another dreamwire daemon as a device: NAME=PATH
    #[arg(long, value_parser = binary)]
    binary: Vec<(String, PathBuf)>,
    /// Rounds: windows of each device
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Seconds per window
    #[arg(long, default_value_t = 0.3, value_parser = seconds)]
    window: f64,
    /// Compare one received frame in this many to its last byte (the first 52 bytes of all are compared)
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    sample: u64,
}

/// Arguments of `compare`.
#[derive(Debug, Args)]
pub(crate) struct CompareArguments {
    /// Device and case, the baseline first: io, ovs, kernel, dreamwire or a --binary, then any of size=N flows=N ring=N ports=N rules=N packed encap decap stateful guard new-flows latency wake-up label=TEXT
    #[arg(required = true, value_name = "DEVICE[,OPTION...]")]
    lanes: Vec<Lane>,
    #[command(flatten)]
    schedule: ScheduleArguments,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// Arguments of `standard`.
#[derive(Debug, Args)]
pub(crate) struct StandardArguments {
    #[command(flatten)]
    schedule: ScheduleArguments,
    /// Only comparisons whose name is this or begins with it
    #[arg(long)]
    only: Vec<String>,
    /// Leave a device out
    #[arg(long)]
    without: Vec<String>,
    /// Print the names of all comparisons and their lanes
    #[arg(long)]
    list: bool,
    /// Directory for table, JSON and plot
    #[arg(long, default_value = "bench-results")]
    output: PathBuf,
}

impl ScheduleArguments {
    fn schedule(&self) -> Schedule {
        let window = Duration::from_secs_f64(self.window);
        Schedule { rounds: self.rounds, window, sample: self.sample, ..Schedule::default() }
    }

    fn site(&self) -> Site {
        Site { cpu: self.cpu, peer_cpu: self.peer_cpu, binaries: self.binary.clone() }
    }
}

fn binary(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && Path::new(path).is_file() => Ok((name.into(), path.into())),
        Some((_, path)) => Err(format!("{path} is no program")),
        None => Err("NAME=PATH".into()),
    }
}

pub(crate) fn compare(arguments: &CompareArguments) -> Result<(), Error> {
    topology::clean_up_on_signals();
    let schedule = &arguments.schedule;
    let comparison = compare::run("", &arguments.lanes, &schedule.schedule(), &schedule.site())?;
    let mut out = io::stdout().lock();
    if arguments.json {
        writeln!(out, "{}", comparison.to_json())?;
    } else {
        write!(out, "{comparison}")?;
    }
    Ok(())
}

pub(crate) fn standard(arguments: &StandardArguments) -> Result<(), Error> {
    topology::clean_up_on_signals();
    let mut wanted = compare::standard();
    if !arguments.only.is_empty() {
        wanted.retain(|standard| standard.is_named(&arguments.only));
        if wanted.is_empty() {
            return Err(Error::NoComparison(arguments.only.join(", ")));
        }
    }
    let mut comparisons = Vec::new();
    for mut standard in wanted {
        standard.lanes.retain(|lane| !arguments.without.contains(&lane.device));
        let mut out = io::stdout().lock();
        if arguments.list {
            writeln!(out, "{}", standard.name)?;
            for lane in &standard.lanes {
                writeln!(out, "    {},{:?}", lane.device, lane.case)?;
            }
            continue;
        }
        let schedule = &arguments.schedule;
        let comparison = compare::run(&standard.title, &standard.lanes, &schedule.schedule(), &schedule.site())?;
        writeln!(out, "{comparison}")?;
        comparisons.push((standard.name, comparison));
        // After each: what was measured is not lost when a later one fails.
        write_results(&arguments.output, &comparisons)?;
    }
    Ok(())
}

/// All together, and a plot of each by its name.
fn write_results(directory: &Path, named: &[(String, Comparison)]) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let comparisons: Vec<_> = named.iter().map(|(_, comparison)| comparison.clone()).collect();
    let table: String = comparisons.iter().map(|comparison| format!("{comparison}\n")).collect();
    fs::write(directory.join("results.txt"), table)?;
    let json: Vec<_> = comparisons.iter().map(Comparison::to_json).collect();
    fs::write(directory.join("results.json"), format!("{}\n", serde_json::Value::Array(json)))?;
    let plot = |comparisons: &[Comparison]| compare::svg(comparisons).map_err(io::Error::other);
    for (name, comparison) in named {
        fs::write(directory.join(format!("{name}.svg")), plot(std::slice::from_ref(comparison))?)?;
    }
    fs::write(directory.join("results.svg"), plot(&comparisons)?)
}
