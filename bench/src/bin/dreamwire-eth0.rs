//! Compares what a guest sees of QEMU's tap with what it sees of dreamwire, and judges the difference; `scripts/eth0-test`
//! runs it. The theory is in `dreamwire_bench::eth0`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use dreamwire_bench::eth0::{Difference, Expected, Kind, Observations, Site, differences, observe, write_table};
use dreamwire_bench::report::Table;
use dreamwire_bench::topology::{Needs, TopologyError, clean_up_on_signals, missing};

/// Widest cell of the printed table; the files have it whole.
const CELL_CHARS_MAX: usize = 48;

/// Compares what a guest sees of QEMU's tap with what it sees of dreamwire.
#[derive(Debug, Parser)]
#[command(name = "dreamwire-eth0")]
struct Options {
    /// The daemon's program; default: `dreamwire` beside this program.
    #[arg(long)]
    dreamwire: Option<PathBuf>,
    /// The differences that are known and explained.
    #[arg(long, default_value = "bench/eth0.expected")]
    expected: PathBuf,
    /// The document that has the table.
    #[arg(long, default_value = "docs/eth0.md")]
    document: PathBuf,
    /// Write the differences of this run into both files instead of judging them.
    #[arg(long, env = "BLESS", value_parser = clap::builder::FalseyValueParser::new())]
    bless: bool,
    /// Run each site twice and fail on rows that are not the same both times.
    #[arg(long)]
    twice: bool,
    /// Print every row of both sites.
    #[arg(long)]
    rows: bool,
}

fn main() -> ExitCode {
    clean_up_on_signals();
    let options = Options::parse();
    if let Some(reason) = missing(Needs::Guests) {
        eprintln!("dreamwire-eth0: {reason}");
        return ExitCode::FAILURE;
    }
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("dreamwire-eth0: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the test is passed.
fn run(options: &Options) -> Result<bool, String> {
    let start = Instant::now();
    let beside = || std::env::current_exe().unwrap_or_default().with_file_name("dreamwire");
    let binary = options.dreamwire.clone().unwrap_or_else(beside);
    let [tap, dreamwire] = observe_both(&binary)?;
    let mut good = true;
    if options.twice {
        for (kind, first, second) in
            observe_both(&binary).map(|[a, b]| [(Kind::Tap, &tap, a), (Kind::Dreamwire, &dreamwire, b)])?
        {
            let unstable = differences(first, &second);
            println!("{kind}: {} of {} rows were not the same twice", unstable.len(), first.count());
            print_table(["observable", "first run", "second run"], &unstable);
            good &= unstable.is_empty();
        }
    }
    if options.rows {
        for (kind, rows) in [(Kind::Tap, &tap), (Kind::Dreamwire, &dreamwire)] {
            rows.iter().for_each(|(key, value)| println!("{kind}\t{key}\t{value}"));
        }
    }
    let found = differences(&tap, &dreamwire);
    let observables = tap.count().max(dreamwire.count());
    println!("\n{} of {observables} observables differ, in {:.0} s:", found.len(), start.elapsed().as_secs_f64());
    print_table(["observable", "tap", "dreamwire"], &found);
    let expected = Expected::parse(&read(&options.expected)?)
        .map_err(|error| format!("{}: {error}", options.expected.display()))?;
    if options.bless {
        return bless(options, &expected.bless(&found), observables).map(|()| good);
    }
    let judgement = expected.judge(&found);
    for (what, rows) in [
        ("NEW differences, or other values than expected", &judgement.new),
        ("expected differences that are GONE", &judgement.gone),
        ("expected differences that nobody has EXPLAINED: put them under a cause", &judgement.unexplained),
    ] {
        if !rows.is_empty() {
            println!("\n{} {what}:", rows.len());
            print_table(["observable", "tap", "dreamwire"], rows);
        }
    }
    if !judgement.is_good() {
        println!("\nIf that is right, run BLESS=1 scripts/eth0-test and say why in {}.", options.document.display());
    }
    Ok(good && judgement.is_good())
}

/// Both sites side by side, which is what makes it a minute instead of two.
fn observe_both(binary: &Path) -> Result<[Observations; 2], String> {
    let one = |kind: Kind| -> Result<Observations, TopologyError> {
        // Said at once: the other site goes on for a while.
        let rows = Site::start(kind, binary).and_then(|site| observe(&site));
        rows.inspect_err(|error| eprintln!("eth0-test: {kind}: {error}"))
    };
    std::thread::scope(|scope| {
        let [tap, dreamwire] = [Kind::Tap, Kind::Dreamwire].map(|kind| (kind, scope.spawn(move || one(kind))));
        let finish = |(kind, thread): (Kind, std::thread::ScopedJoinHandle<'_, _>)| {
            let rows: Result<Observations, TopologyError> =
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            rows.map_err(|error| format!("{kind}: {error}"))
        };
        Ok([finish(tap)?, finish(dreamwire)?])
    })
}

fn bless(options: &Options, expected: &Expected, observables: usize) -> Result<(), String> {
    write(&options.expected, &expected.render())?;
    let document = write_table(&read(&options.document)?, expected, observables)
        .map_err(|error| format!("{}: {error}", options.document.display()))?;
    write(&options.document, &document)?;
    println!("wrote {} and {}", options.expected.display(), options.document.display());
    Ok(())
}

fn print_table(headings: [&str; 3], rows: &[Difference]) {
    if rows.is_empty() {
        return;
    }
    let mut table = Table::new(headings);
    let cell = |text: &str| text.chars().take(CELL_CHARS_MAX).collect::<String>();
    for row in rows {
        table.row([row.key.clone(), cell(&row.tap), cell(&row.dreamwire)]);
    }
    print!("{table}");
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))
}
