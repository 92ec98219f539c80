//! A worker's CPU and the latency asked for it, while the daemon runs, afterwards, and after it was killed.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::fs;
use std::path::Path;

use dreamwire_bench::topology::{Daemon, DaemonSpec, skip};
use nix::sched::sched_getaffinity;
use nix::unistd::Pid;
use serde_json::Value;

/// The last CPU that this test may use, and the kernel's file for it.
fn cpu() -> (usize, String) {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpu = (0..1024).rev().find(|&cpu| allowed.is_set(cpu).unwrap_or(false)).unwrap();
    (cpu, format!("/sys/devices/system/cpu/cpu{cpu}/power/pm_qos_resume_latency_us"))
}

/// Whatever becomes of the test, the next one finds no request.
struct TakesBack<'a>(&'a str);

impl Drop for TakesBack<'_> {
    fn drop(&mut self) {
        fs::write(self.0, "0").unwrap();
    }
}

#[test]
fn it_is_asked_for_while_the_daemon_runs_and_the_next_clears_up_after_one_that_was_killed() {
    let (cpu, file) = cpu();
    let says = || fs::read_to_string(&file).map(|says| says.trim().to_owned());
    let before = match says().and_then(|before| fs::write(&file, &before).map(|()| before)) {
        Ok(before) => before,
        Err(error) => return skip(&format!("this takes root and a kernel with PM QoS: {file}: {error}")),
    };
    assert_eq!(before, "0", "somebody else asks for something: {file}");
    let _takes_back = TakesBack(&file);
    let config = format!("[daemon]\nrun_dir = \"{{run_dir}}\"\nworkers = [{cpu}]\nresume_latency_us = 0\n");
    let binary = Path::new(env!("CARGO_BIN_EXE_dreamwire"));
    let mut daemon = Daemon::start(&DaemonSpec { name: "dreamwire", binary, netns: None, config: &config }).unwrap();
    assert_eq!(says().unwrap(), "n/a");
    let shown = daemon.cli(&["show", "workers", "--json"]).unwrap();
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown[0]["resume_latency_us"], 0, "{shown}");
    daemon.kill().unwrap();
    assert_eq!(says().unwrap(), "n/a", "nobody was there to take it back");
    daemon.start_again().unwrap();
    assert_eq!(says().unwrap(), "n/a");
    daemon.terminate().unwrap();
    assert_eq!(says().unwrap(), "0");
}
