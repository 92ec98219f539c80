//! The benchmark of the miss path runs, so that it does not rot.

#[allow(dead_code, reason = "its `main`")]
#[path = "../examples/miss_path.rs"]
mod miss_path;

#[test]
fn the_benchmark_runs() {
    miss_path::run(true);
}
