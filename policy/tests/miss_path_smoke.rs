//! The benchmark of the miss path runs, so that it does not rot.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::process::Command;

#[test]
fn the_benchmark_runs() {
    // Cargo builds a package's examples before it runs its tests, two directories beside them.
    let program = std::env::current_exe().unwrap();
    let example = program.parent().unwrap().parent().unwrap().join("examples/miss_path");
    let output = Command::new(example).arg("--smoke").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().any(|line| line.starts_with(" 10000")), "{text}");
}
