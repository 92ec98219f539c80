//! What this process put on the machine and must take away again: processes, namespaces, directories.
//!
//! Each is listed here while it exists and taken off by its owner's `Drop`, also while a panic unwinds. A program that can be
//! interrupted calls [`clean_up_on_signals`] first: a thread then waits for the signals and clears the list. Processes carry
//! a parent-death signal besides, so that they go even when this process is killed; namespaces and
//! directories that such a death leaves behind are removed by the next process that makes some.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::Pid;

use super::TopologyError;
use super::error::during;

/// Where ip-netns(8) keeps its names.
pub(super) const NETNS_DIR: &str = "/run/netns";
/// Every name of ours starts with it; then comes the pid of the process that made it, and a dash.
pub(super) const NAME_PREFIX: &str = "dreamwire-";

/// Something to take away.
#[derive(Debug, Clone)]
pub(super) enum Resource {
    /// A process group, by its leader.
    Process(Pid),
    /// A named network namespace.
    Netns(String),
    /// A directory with everything in it.
    Directory(PathBuf),
}

impl Resource {
    /// Best effort: at the end there is nobody left to tell.
    fn remove(&self) {
        match self {
            Self::Process(leader) => {
                let _ = killpg(*leader, Signal::SIGKILL);
            }
            Self::Netns(name) => {
                let _ = Command::new("ip").args(["netns", "del", name]).output();
            }
            Self::Directory(path) => {
                let _ = fs::remove_dir_all(path);
            }
        }
    }
}

static LISTED: Mutex<Listed> = Mutex::new(Listed { next: 0, resources: BTreeMap::new() });

struct Listed {
    next: u64,
    resources: BTreeMap<u64, Resource>,
}

fn listed() -> MutexGuard<'static, Listed> {
    // Single inserts and removals leave the list whole.
    LISTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place on the list; dropping it takes the resource away.
#[derive(Debug)]
pub(super) struct Owned {
    number: u64,
}

impl Owned {
    pub(super) fn new(resource: Resource) -> Self {
        let mut list = listed();
        let number = list.next;
        list.next += 1;
        list.resources.insert(number, resource);
        Self { number }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let resource = listed().resources.remove(&self.number);
        if let Some(resource) = resource {
            resource.remove();
        }
    }
}

/// A fresh directory for sockets and logs, short enough for the 107 bytes of a socket's path.
pub(super) fn work_directory(label: &str) -> Result<(PathBuf, Owned), TopologyError> {
    remove_leftovers();
    let path = tempfile::Builder::new()
        .prefix(&format!("{NAME_PREFIX}{}-{label}-", std::process::id()))
        .tempdir()
        .map_err(during(|| format!("directory for {label}")))?
        .keep();
    let owned = Owned::new(Resource::Directory(path.clone()));
    Ok((path, owned))
}

/// Takes away, once in the life of this process, what processes that are gone have left, and what an earlier one left that
/// had our pid.
pub(super) fn remove_leftovers() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        for name in names_of_the_dead(Path::new(NETNS_DIR)) {
            Resource::Netns(name).remove();
        }
        let directory = std::env::temp_dir();
        for name in names_of_the_dead(&directory) {
            Resource::Directory(directory.join(name)).remove();
        }
    });
}

fn names_of_the_dead(directory: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| maker(name).is_some_and(|pid| pid == std::process::id() || !is_alive(pid))).collect()
}

fn maker(name: &str) -> Option<u32> {
    name.strip_prefix(NAME_PREFIX)?.split_once('-')?.0.parse().ok()
}

fn is_alive(pid: u32) -> bool {
    fs::exists(format!("/proc/{pid}")).unwrap_or(true)
}

/// Takes everything away: processes first, since they use the rest.
pub fn clean_up() {
    let resources = std::mem::take(&mut listed().resources);
    let (processes, rest): (Vec<_>, Vec<_>) =
        resources.into_values().partition(|resource| matches!(resource, Resource::Process(_)));
    for resource in processes.iter().chain(&rest) {
        resource.remove();
    }
}

/// From now on SIGINT, SIGTERM and SIGHUP clean up and end the process with 128 + signal.
///
/// Call it first thing in `main`: threads that exist already would still be interrupted.
///
/// # Panics
/// When the kernel refuses to block signals, which it never does.
pub fn clean_up_on_signals() {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().expect("these signals can be blocked");
    std::thread::spawn(move || {
        let signal = signals.wait().unwrap_or(Signal::SIGTERM);
        eprintln!("\n{signal}: cleaning up");
        clean_up();
        std::process::exit(128 + signal as i32);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_with_a_pid_are_ours() {
        assert_eq!(maker("dreamwire-12-0-host1"), Some(12));
        assert_eq!(maker("dreamwire-guest"), None);
        assert_eq!(maker("dreamwire-guest-12"), None);
        assert_eq!(maker("other-12-0"), None);
    }
}
