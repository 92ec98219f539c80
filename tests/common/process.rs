//! A daemon's process from outside, and front-ends that are no guest.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dreamwire_bench::topology::{Daemon, wait_until};
use tempfile::NamedTempFile;

use super::LIMIT;

/// What a process holds that it might leak. The API's own threads are left out: tokio keeps idle ones for ten seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) descriptors: usize,
    pub(crate) guest_mappings: usize,
    pub(crate) threads: usize,
}

impl Held {
    pub(crate) fn by(daemon: &Daemon) -> Self {
        let proc = format!("/proc/{}", daemon.pid());
        let maps = fs::read_to_string(format!("{proc}/maps")).unwrap();
        let names = fs::read_dir(format!("{proc}/task")).unwrap().map(|task| {
            // A thread may end between two looks.
            fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()
        });
        Self {
            descriptors: fs::read_dir(format!("{proc}/fd")).unwrap().count(),
            guest_mappings: maps.lines().filter(|line| line.contains("memfd:")).count(),
            threads: names.filter(|name| !name.is_empty() && !name.starts_with("tokio")).count(),
        }
    }
}

/// Waits until a daemon holds what it held before.
#[track_caller]
pub(crate) fn assert_nothing_leaked(daemon: &Daemon, before: Held) {
    let mut now = before;
    let waited = wait_until(LIMIT, "the daemon to let go", || {
        now = Held::by(daemon);
        now == before
    });
    assert!(waited.is_ok(), "before {before:?}, now {now:?}");
}

/// Processor time of a daemon, user and system.
pub(crate) fn processor_time(daemon: &Daemon) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).unwrap();
    // proc_pid_stat(5): utime and stime are fields 14 and 15; the name, field 2, is in parentheses.
    let fields: Vec<u64> =
        stat.rsplit(')').next().unwrap().split_whitespace().map(|word| word.parse().unwrap_or(0)).collect();
    let ticks = fields[11] + fields[12];
    // USER_HZ is 100 on every Linux this runs on.
    Duration::from_millis(ticks * 10)
}

/// QEMU with a card and no guest: it negotiates as far as a machine that has not started. Killed when dropped.
pub(crate) struct IdleQemu {
    child: Child,
    said: NamedTempFile,
}

impl IdleQemu {
    /// Connects to a port with so many queue pairs.
    pub(crate) fn connect(socket: &Path, queues: u16) -> Self {
        let chardev = format!("socket,id=wire,path={}", socket.display());
        let netdev = format!("vhost-user,id=net,chardev=wire,queues={queues}");
        let said = NamedTempFile::new().unwrap();
        let arguments = ["-nodefaults", "-no-user-config", "-display", "none", "-S", "-machine", "none"];
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
            .args(arguments)
            .args(["-chardev", &chardev, "-netdev", &netdev])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(said.reopen().unwrap())
            .spawn()
            .unwrap();
        Self { child, said }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until QEMU has said that.
    #[track_caller]
    pub(crate) fn wait_says(&self, words: &str) {
        let said = || fs::read_to_string(self.said.path()).unwrap();
        let waited = wait_until(LIMIT, words, || said().contains(words));
        assert!(waited.is_ok(), "{words:?} is not in QEMU's words: {:.1000}", said());
    }
}

impl Drop for IdleQemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
