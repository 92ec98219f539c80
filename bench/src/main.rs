//! The harness's command line: drive a device under test and say what it carried.

use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

mod compare_command;

use clap::{Args, Parser, Subcommand, ValueEnum};
use compare_command::{self as compare, CompareArguments, StandardArguments};
use dreamwire_bench::compare::CompareError;
use dreamwire_bench::front_end::{ChainShape, FrontEnd, FrontEndError, MessageOrder, Options, feature};
use dreamwire_bench::report::{Series, Table};
use dreamwire_bench::topology::TopologyError;
use dreamwire_bench::traffic::idle::{self, IdleError, IdlePlan};
use dreamwire_bench::traffic::testpmd::{TestpmdError, TestpmdOptions};
use dreamwire_bench::traffic::throughput::Throughput;
use dreamwire_bench::traffic::{
    DeviceUnderTest, Dreamwire, Endpoint, Failure, Latencies, Plan, Round, Testpmd, cost, cpu, dreamwire, frame,
    latency,
};

/// Frames per side of `cost`: about a second.
const COST_FRAMES: u64 = 32 << 20;

#[derive(Debug, Parser)]
#[command(name = "dreamwire-bench", version, about = "Traffic for vhost-user switches, from the guest's side")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Send as fast as one port takes frames; count and check what comes out of another
    Throughput(ThroughputArguments),
    /// Send one frame at a time into a device that sleeps; how long until it comes out
    Latency(LatencyArguments),
    /// Measure several devices in turns, in one run: the only way to compare them
    Compare(CompareArguments),
    /// Run the standard set of comparisons; write a table, JSON and a plot
    Standard(StandardArguments),
    /// What dreamwire takes while many guests are attached and silent: CPU time, memory, wake-up
    Idle(IdleArguments),
    /// What the generator and the sink themselves cost, against a device that does nothing
    Cost(CostArguments),
}

#[derive(Debug, Args)]
struct IdleArguments {
    /// Ports, each with a guest: 2 to 512
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(2..=512))]
    ports: u16,
    /// Seconds to watch
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    seconds: f64,
    /// Frames whose wake-up is measured
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    samples: u32,
    /// CPU of the guests
    #[arg(long, default_value_t = 0)]
    cpu: usize,
    /// CPU of the daemon's worker
    #[arg(long, default_value_t = 1)]
    peer_cpu: usize,
    /// How long that CPU may take to wake up, µs: the daemon's setting of this name; 0: it polls while idle
    #[arg(long)]
    resume_latency_us: Option<u32>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct CostArguments {
    /// CPU to run on
    #[arg(long)]
    cpu: Option<usize>,
    /// Frame length in the ring, without FCS: 60 to 1518
    #[arg(long, default_value_t = 64, value_parser = frame_size)]
    size: usize,
    /// Flows: 1 to 1048576
    #[arg(long, default_value_t = 1, value_parser = flow_count)]
    flows: usize,
    /// Compare one received frame in this many to its last byte
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    sample: u64,
    /// Packed rings
    #[arg(long)]
    packed: bool,
}

#[derive(Debug, Args)]
struct DeviceArguments {
    /// Socket of the port that frames go into
    #[arg(long, required_unless_present = "peer")]
    from: Option<PathBuf>,
    /// Socket of the port where they come out
    #[arg(long, required_unless_present = "peer")]
    to: Option<PathBuf>,
    /// The device connects to these sockets instead of listening there
    #[arg(long)]
    listen: bool,
    /// Start this peer and measure it, instead of --from and --to
    #[arg(long, conflicts_with_all = ["from", "to"])]
    peer: Option<Peer>,
    /// CPU of the peer's forwarding thread
    #[arg(long, default_value_t = 1)]
    peer_cpu: usize,
    /// CPU of the generator and sink
    #[arg(long)]
    cpu: Option<usize>,
}

#[derive(Debug, Args)]
struct LatencyArguments {
    #[command(flatten)]
    device: DeviceArguments,
    /// Frame length in the ring, without FCS: 61 to 1518
    #[arg(long, default_value_t = 64, value_parser = frame_size)]
    size: usize,
    /// Frames
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    samples: u32,
    /// Microseconds of silence before each frame, and up to as many again
    #[arg(long, default_value_t = 200)]
    gap_us: u32,
}

#[derive(Debug, Args)]
struct ThroughputArguments {
    #[command(flatten)]
    device: DeviceArguments,
    /// Frame length in the ring, without FCS: 60 to 1518
    #[arg(long, default_value_t = 64, value_parser = frame_size)]
    size: usize,
    /// Flows, told apart by UDP ports: 1 to 1048576
    #[arg(long, default_value_t = 1, value_parser = flow_count)]
    flows: usize,
    /// Seconds per round
    #[arg(long, default_value_t = 2.0, value_parser = seconds)]
    seconds: f64,
    /// Rounds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Compare one received frame in this many to its last byte (the first 52 bytes of all are compared)
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..))]
    sample: u64,
    /// Compare all received frames to the last byte
    #[arg(long)]
    check_all: bool,
    /// Descriptors per ring
    #[arg(long, default_value_t = 256, value_parser = ring_size)]
    ring: u16,
    /// Descriptors per frame sent
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=32))]
    chain: u16,
    /// Packed rings
    #[arg(long)]
    packed: bool,
    /// Put the descriptors of a frame into an indirect table
    #[arg(long)]
    indirect: bool,
    /// Virtio features to negotiate where offered (a number, 0x for hexadecimal)
    #[arg(long, value_parser = mask)]
    features: Option<u64>,
    /// Send messages in QEMU's order
    #[arg(long)]
    qemu_order: bool,
    /// Sender's MAC address
    #[arg(long, default_value = "52:54:00:00:00:01")]
    from_mac: Mac,
    /// Receiver's MAC address
    #[arg(long, default_value = "52:54:00:00:00:02")]
    to_mac: Mac,
    /// Sender's IPv4 address
    #[arg(long, default_value = "10.0.0.1")]
    from_address: Ipv4Addr,
    /// Receiver's IPv4 address
    #[arg(long, default_value = "10.0.0.2")]
    to_address: Ipv4Addr,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Peer {
    /// The dreamwire daemon beside this program, with two ports in one network
    Dreamwire,
    /// DPDK's testpmd in io mode: a bare copy
    Testpmd,
    /// testpmd connecting to us
    TestpmdClient,
}

#[derive(Clone, Copy, Debug)]
struct Mac([u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<_> = text
            .split(':')
            .map(|part| u8::from_str_radix(part, 16))
            .collect::<Result<_, _>>()
            .map_err(|error| error.to_string())?;
        parts.try_into().map(Self).map_err(|_| "six bytes, as in 52:54:00:00:00:01".into())
    }
}

/// Anything that ends the program with an error.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Compare(#[from] CompareError),
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    #[error(transparent)]
    Failure(#[from] Failure),
    #[error(transparent)]
    Idle(#[from] IdleError),
    #[error(transparent)]
    Testpmd(#[from] TestpmdError),
    #[error(transparent)]
    Dreamwire(#[from] TopologyError),
    #[error("pinning to CPU {cpu}: {source}")]
    Pin { cpu: usize, source: io::Error },
    #[error("round {round}: {problem}")]
    Content { round: usize, problem: String },
    #[error("no comparison's name begins with {0}; --list names them all")]
    NoComparison(String),
    #[error("writing the report: {0}")]
    Report(#[from] io::Error),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Throughput(arguments) => throughput(&arguments),
        Command::Latency(arguments) => latency(&arguments),
        Command::Compare(arguments) => compare::compare(&arguments),
        Command::Standard(arguments) => compare::standard(&arguments),
        Command::Idle(arguments) => idle(&arguments),
        Command::Cost(arguments) => cost(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dreamwire-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Starts the peer if there is one, pins this thread, and connects both front-ends.
fn connect(arguments: &DeviceArguments, options: Options) -> Result<(Option<RunningPeer>, FrontEnd, FrontEnd), Error> {
    let peer = arguments.peer.map(|peer| start_peer(peer, arguments)).transpose()?;
    let device = match (&peer, &arguments.from, &arguments.to) {
        (Some(peer), ..) => peer.device().clone(),
        (None, Some(from), Some(to)) => {
            DeviceUnderTest { from: from.clone(), to: to.clone(), is_client: arguments.listen }
        }
        _ => unreachable!("clap requires --from and --to without --peer"),
    };
    // After the peer was started: it would inherit the affinity.
    if let Some(cpu) = arguments.cpu {
        cpu::pin(cpu).map_err(|source| Error::Pin { cpu, source })?;
    }
    let connect = if device.is_client { FrontEnd::listen } else { FrontEnd::connect };
    let from = connect(&device.from, options.clone())?;
    let to = connect(&device.to, options)?;
    Ok((peer, from, to))
}

fn latency(arguments: &LatencyArguments) -> Result<(), Error> {
    let (_peer, mut from, mut to) = connect(&arguments.device, Options::default())?;
    let plan = Plan { size: arguments.size, flows: 1, ..Plan::default() };
    let gap = Duration::from_micros(u64::from(arguments.gap_us));
    let mut latencies = Latencies::default();
    latency::measure(&mut from, &mut to, &plan, arguments.samples as usize, gap, &mut latencies)?;
    let mut table = Table::new(["share of frames", "at most us"]);
    for (name, share) in [("50 %", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("99.9 %", 0.999), ("all", 1.0)] {
        table.row([name.into(), format!("{:.1}", latencies.quantile_us(share))]);
    }
    write!(io::stdout().lock(), "{table}")?;
    from.stop()?;
    to.stop()?;
    Ok(())
}

fn throughput(arguments: &ThroughputArguments) -> Result<(), Error> {
    let (_peer, mut from, mut to) = connect(&arguments.device, options(arguments))?;
    let plan = plan(arguments);
    let set = Throughput::flow_set(&plan, arguments.ring);
    let mut throughput = Throughput::new(&mut from, &mut to, plan, &set)?;
    throughput.warm_up()?;
    let rounds = (0..arguments.rounds).map(|_| throughput.round()).collect::<Result<Vec<_>, _>>()?;
    let specimen = throughput.specimen().map(<[u8]>::to_vec);
    report(arguments, &rounds)?;
    from.stop()?;
    to.stop()?;
    check(&rounds, specimen.as_deref())
}

fn idle(arguments: &IdleArguments) -> Result<(), Error> {
    let plan = IdlePlan {
        ports: arguments.ports.into(),
        duration: Duration::from_secs_f64(arguments.seconds),
        wake_ups: arguments.samples as usize,
        cpu: arguments.cpu,
        peer_cpu: arguments.peer_cpu,
        resume_latency_us: arguments.resume_latency_us,
    };
    let idle = idle::measure(&dreamwire::program(), &plan)?;
    let mut out = io::stdout().lock();
    if arguments.json {
        return Ok(writeln!(out, "{}", serde_json::json!(idle))?);
    }
    let (resident, wake_up, bare) = (idle.resident, idle.wake_up, idle.bare_wake_up);
    let mib = |kib: u64| format!("{:.1}", kib as f64 / 1024.0);
    let mut table = Table::new([&format!("{} silent guests", idle.ports), "figure"]);
    for (name, figure) in [
        ("CPU, % of one", format!("{:.2} ({} ticks in {} s)", idle.cpu_percent, idle.ticks, idle.seconds)),
        ("memory, MiB: its own", mib(resident.anonymous_kib + resident.file_kib)),
        ("    of that anonymous", mib(resident.anonymous_kib)),
        ("    of that program and libraries", mib(resident.file_kib)),
        ("memory, MiB: guests' that it touched", mib(resident.guest_kib)),
        ("wake-up, us: 50 %", format!("{:.1}", wake_up.p50_us)),
        ("wake-up, us: 99 %", format!("{:.1}", wake_up.p99_us)),
        ("wake-up, us: 99.9 %", format!("{:.1}", wake_up.p999_us)),
        ("wake-up, us: most", format!("{:.1}", wake_up.max_us)),
        ("    a bare thread's: 50 %", format!("{:.1}", bare.p50_us)),
        ("    a bare thread's: 99 %", format!("{:.1}", bare.p99_us)),
    ] {
        table.row([name.into(), figure]);
    }
    Ok(write!(out, "{table}")?)
}

fn cost(arguments: &CostArguments) -> Result<(), Error> {
    if let Some(cpu) = arguments.cpu {
        cpu::pin(cpu).map_err(|source| Error::Pin { cpu, source })?;
    }
    let cost = cost::measure(arguments.size, arguments.flows, arguments.sample, COST_FRAMES, arguments.packed)?;
    let mut table = Table::new(["side", "ns/frame", "Mpps"]);
    for (side, ns) in [("generator", cost.generator_ns), ("sink", cost.sink_ns)] {
        table.row([side.into(), format!("{ns:.1}"), format!("{:.1}", 1e3 / ns)]);
    }
    Ok(write!(io::stdout().lock(), "{table}")?)
}

/// A peer that was started; it ends when dropped.
enum RunningPeer {
    Dreamwire(Dreamwire),
    Testpmd(Testpmd),
}

impl RunningPeer {
    fn device(&self) -> &DeviceUnderTest {
        match self {
            Self::Dreamwire(peer) => peer.device(),
            Self::Testpmd(peer) => peer.device(),
        }
    }
}

fn start_peer(peer: Peer, arguments: &DeviceArguments) -> Result<RunningPeer, Error> {
    if peer == Peer::Dreamwire {
        return Ok(RunningPeer::Dreamwire(Dreamwire::start(arguments.peer_cpu)?));
    }
    let options = TestpmdOptions {
        cpu: arguments.peer_cpu,
        main_cpu: arguments.cpu.unwrap_or(0),
        client: peer == Peer::TestpmdClient,
        ..TestpmdOptions::default()
    };
    Ok(RunningPeer::Testpmd(Testpmd::start(&std::env::temp_dir(), &options)?))
}

fn options(arguments: &ThroughputArguments) -> Options {
    let defaults = Options::default();
    let packed = if arguments.packed { feature::RING_PACKED } else { 0 };
    let in_order = if arguments.packed { feature::IN_ORDER } else { 0 };
    let set_bytes = arguments.flows.max(usize::from(arguments.ring)) * 2 * (arguments.size + 256);
    Options {
        ring_size: arguments.ring,
        tx_chain: ChainShape { descriptors: arguments.chain, indirect: arguments.indirect },
        features: arguments.features.unwrap_or(defaults.features | in_order) | packed,
        features_required: defaults.features_required | packed,
        order: if arguments.qemu_order { MessageOrder::Qemu } else { MessageOrder::Specification },
        spare_bytes: defaults.spare_bytes.max(set_bytes),
        ..defaults
    }
}

fn plan(arguments: &ThroughputArguments) -> Plan {
    Plan {
        size: arguments.size,
        flows: arguments.flows,
        duration: Duration::from_secs_f64(arguments.seconds),
        sample: if arguments.check_all { 1 } else { arguments.sample },
        from: Endpoint { mac: arguments.from_mac.0, address: arguments.from_address },
        to: Endpoint { mac: arguments.to_mac.0, address: arguments.to_address },
        ..Plan::default()
    }
}

fn report(arguments: &ThroughputArguments, rounds: &[Round]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let mpps = Series::new(rounds.iter().map(|round| round.mpps)).summary();
    let gbit = Series::new(rounds.iter().map(|round| round.gbit_per_s)).summary();
    if arguments.json {
        let json = serde_json::json!({
            "size_bytes": arguments.size, "flows": arguments.flows, "seconds": arguments.seconds, "ring": arguments.ring,
            "mpps": mpps, "gbit_per_s": gbit, "rounds": rounds,
        });
        return writeln!(out, "{json}");
    }
    let mut table =
        Table::new(["round", "Mpps", "Gbit/s", "sent", "received", "lost", "loss %", "foreign", "order", "idle %"]);
    for (number, round) in (1..).zip(rounds) {
        table.row([
            format!("{number}"),
            format!("{:.2}", round.mpps),
            format!("{:.2}", round.gbit_per_s),
            round.sent.to_string(),
            round.received.to_string(),
            round.lost.to_string(),
            format!("{:.3}", 100.0 * round.lost as f64 / round.sent.max(1) as f64),
            round.foreign.to_string(),
            if round.in_order { "kept" } else { "broken" }.into(),
            format!("{:.0}", 100.0 * round.idle),
        ]);
    }
    write!(out, "{table}")?;
    if let Some(mpps) = mpps {
        writeln!(
            out,
            "{} B, {} flows: median {:.2} Mpps, {:.2} to {:.2}, spread {:.0} %",
            arguments.size,
            arguments.flows,
            mpps.median,
            mpps.min,
            mpps.max,
            100.0 * mpps.spread
        )?;
    }
    Ok(())
}

fn check(rounds: &[Round], specimen: Option<&[u8]>) -> Result<(), Error> {
    let fault = |(round, measured): (usize, &Round)| Some((round, measured.fault(specimen)?));
    match (1..).zip(rounds).find_map(fault) {
        Some((round, problem)) => Err(Error::Content { round, problem }),
        None => Ok(()),
    }
}

fn frame_size(text: &str) -> Result<usize, String> {
    in_range(text, frame::FRAME_BYTES_MIN, frame::FRAME_BYTES_MAX)
}

fn flow_count(text: &str) -> Result<usize, String> {
    in_range(text, 1, frame::FLOWS_MAX)
}

fn in_range(text: &str, least: usize, most: usize) -> Result<usize, String> {
    let number = text.parse().map_err(|_| "not a number".to_owned())?;
    if (least..=most).contains(&number) { Ok(number) } else { Err(format!("{least} to {most}")) }
}

fn ring_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && size >= 2 => Ok(size),
        _ => Err("a power of two, 2 to 32768".into()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if seconds > 0.0 && seconds <= 3600.0 => Ok(seconds),
        _ => Err("more than 0, up to 3600".into()),
    }
}

fn mask(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|error| error.to_string())
}
