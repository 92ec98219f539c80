//! A long-lived process beside the test: QEMU, the daemon, tcpdump. Its output goes to a log; it dies with this process.
//!
//! `PR_SET_PDEATHSIG` fires when the *thread* that forked dies. One thread that lives as long as the process therefore
//! starts all of them, and an owner may move between threads. setpriv(1) sets the signal, which keeps this free of unsafe code.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::cleanup::{Owned, Resource};
use super::error::during;
use super::{TopologyError, wait_until};

/// Lines of a log that an error or a panic shows.
const TAIL_LINES: usize = 40;

/// A running process with its log file.
#[derive(Debug)]
pub(super) struct Child {
    name: String,
    log: PathBuf,
    process: std::process::Child,
    ended: Option<ExitStatus>,
    /// Gone as soon as the process is, so that nobody signals a number that has become another's.
    owned: Option<Owned>,
}

impl Child {
    /// Starts `command` (program and arguments), inside a namespace if one is named; output is appended to `log`.
    pub(super) fn start(
        name: &str,
        netns: Option<&str>,
        command: &[OsString],
        log: &Path,
    ) -> Result<Self, TopologyError> {
        let starting = || format!("start {name}");
        let output =
            File::options().create(true).append(true).open(log).map_err(during(|| format!("log {}", log.display())))?;
        let mut wrapped = Command::new("setpriv");
        wrapped.args(["--pdeathsig", "KILL", "--"]);
        if let Some(netns) = netns {
            wrapped.args(["ip", "netns", "exec", netns]);
        }
        wrapped
            .args(command)
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(during(starting))?)
            .stderr(output)
            // Ctrl-C in a terminal goes to a process group: ours decides what happens to its children.
            .process_group(0);
        let process = spawn_from_nursery(wrapped).map_err(during(starting))?;
        let pid = Pid::from_raw(i32::try_from(process.id()).expect("a pid fits pid_t"));
        Ok(Self {
            name: name.to_owned(),
            log: log.to_owned(),
            process,
            ended: None,
            owned: Some(Owned::new(Resource::Process(pid))),
        })
    }

    pub(super) fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.process.id()).expect("a pid fits pid_t"))
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// How it ended, if it did.
    pub(super) fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.process.try_wait().unwrap_or(None);
            if self.ended.is_some() {
                self.owned = None;
            }
        }
        self.ended
    }

    /// An error with the end of the log when it is no longer running.
    pub(super) fn check_running(&mut self) -> Result<(), TopologyError> {
        match self.ended() {
            None => Ok(()),
            Some(status) => Err(TopologyError::Ended {
                name: self.name.clone(),
                status: describe(status),
                log: self.log.clone(),
                tail: tail(&self.log),
            }),
        }
    }

    /// Sends a signal to the process alone.
    pub(super) fn signal(&self, signal: Signal) -> Result<(), TopologyError> {
        if self.ended.is_some() {
            return Ok(());
        }
        kill(self.pid(), signal).map_err(during(|| format!("{signal} to {}", self.name)))
    }

    /// Waits for its end.
    pub(super) fn wait(&mut self, limit: Duration) -> Result<ExitStatus, TopologyError> {
        let what = format!("{} to end", self.name);
        wait_until(limit, &what, || self.ended().is_some())?;
        Ok(self.ended.expect("just seen"))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ended().is_none() {
            let _ = self.signal(Signal::SIGKILL);
            let _ = self.process.wait();
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => {
            Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |signal| signal.to_string())
        }
        (None, None) => status.to_string(),
    }
}

/// The last lines of a log, for people.
pub(super) fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

/// Program and arguments as `start` takes them.
pub(super) fn command<S: AsRef<OsStr>>(words: impl IntoIterator<Item = S>) -> Vec<OsString> {
    words.into_iter().map(|word| word.as_ref().to_owned()).collect()
}

type Order = (Command, Sender<io::Result<std::process::Child>>);

fn spawn_from_nursery(command: Command) -> io::Result<std::process::Child> {
    static NURSERY: OnceLock<Sender<Order>> = OnceLock::new();
    let nursery = NURSERY.get_or_init(|| {
        let (orders, incoming) = channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in incoming {
                // The asker waits; if it is gone, the dropped child is killed by its parent-death signal at the latest.
                let _ = answer.send(command.spawn());
            }
        });
        orders
    });
    let (answer, result) = channel();
    let gone = |_| io::Error::other("the thread that starts processes is gone");
    nursery.send((command, answer)).map_err(|_| gone(()))?;
    result.recv().map_err(|_| gone(()))?
}
