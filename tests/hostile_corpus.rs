//! The corpus of hostile guests and front-ends (`bench/src/hostile`) against the daemon, with another pair of ports busy. Two
//! daemons take a half each, side by side: what a case takes is mostly waiting for what the daemon says.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::path::Path;

use dreamwire_bench::hostile::{self, Case, Report, Target, Verdict};

/// Allocators keep some of what they get; a leak of one page in each of 300 cases would be more.
const GROWTH_MAX_KIB: u64 = 1024;

#[test]
fn every_case_is_contained_and_the_others_lose_nothing() {
    let only = std::env::var("DREAMWIRE_CORPUS_ONLY").unwrap_or_default();
    let testpmd = std::env::var("DREAMWIRE_CORPUS_TARGET").is_ok_and(|target| target == "testpmd");
    let mut cases: Vec<_> = hostile::corpus().into_iter().filter(|case| case.name.contains(&only)).collect();
    assert!(!cases.is_empty(), "no case has {only:?} in its name");
    // testpmd takes a core for itself.
    let rest = if testpmd { vec![] } else { cases.split_off(cases.len() / 2) };
    let halves = [cases, rest].into_iter().filter(|half| !half.is_empty());
    let threads: Vec<_> = halves.map(|half| std::thread::spawn(move || run(&half, testpmd))).collect();
    // Both end, with their daemons, before one's failure is told.
    let ends: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
    let reports: Vec<_> = ends.into_iter().map(Result::unwrap).collect();
    println!("{} cases", reports.iter().map(|report| report.rows.len()).sum::<usize>());
    for report in &reports {
        for testimony in &report.testimonies {
            println!(
                "innocent pair: {} frames sent, {} received, {} wrong, {} frames/s, longest gap {:?}",
                testimony.sent,
                testimony.received,
                testimony.wrong,
                testimony.rate(),
                testimony.gap
            );
        }
        println!("descriptors {:?}, anonymous memory {:?} KiB", report.descriptors, report.private_kib);
    }
    if !testpmd {
        reports.iter().for_each(check);
    }
}

fn run(cases: &[Case], testpmd: bool) -> Report {
    let start = || match testpmd {
        true => Target::testpmd(),
        false => Target::dreamwire(Path::new(env!("CARGO_BIN_EXE_dreamwire"))),
    };
    let report = hostile::run(cases, start, |row| {
        let problem = row.problem.as_deref().unwrap_or_default();
        println!("{:<52} {:>5} ms  {}  {problem}", row.name, row.took.as_millis(), row.verdict);
    });
    report.unwrap()
}

fn check(report: &Report) {
    let bad = |row: &&hostile::runner::Row| {
        row.problem.is_some() || matches!(row.verdict, Verdict::Hung(_) | Verdict::Crashed(_))
    };
    let bad: Vec<_> = report.rows.iter().filter(bad).map(|row| (&row.name, &row.verdict, &row.problem)).collect();
    assert!(bad.is_empty(), "{} of {} cases: {bad:#?}", bad.len(), report.rows.len());
    assert!(report.testimonies.iter().all(hostile::witness::Testimony::is_clean), "{:?}", report.testimonies);
    assert!(report.innocent_drops.is_empty(), "{:?}", report.innocent_drops);
    assert_eq!(report.descriptors.0, report.descriptors.1, "descriptors leak");
    let (before, after) = report.private_kib;
    assert!(after <= before + GROWTH_MAX_KIB, "memory grew from {before} to {after} KiB");
}
