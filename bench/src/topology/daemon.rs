//! A dreamwire daemon under test: the binary with a configuration of its own, in a namespace or on the host.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::child::{Child, command, tail};
use super::cleanup::{Owned, work_directory};
use super::error::during;
use super::netns::output_of;
use super::{HttpAnswer, Netns, TopologyError, http_get, wait_until};

/// In the run directory.
const CONFIG_FILE: &str = "config.toml";
/// How long the daemon may take until its API answers. A loaded machine of two cores takes a second.
const START_LIMIT: Duration = Duration::from_secs(15);
/// How long it may take to end after SIGTERM.
const END_LIMIT: Duration = Duration::from_secs(15);

/// What to run.
#[derive(Debug, Clone)]
pub struct DaemonSpec<'a> {
    /// For people.
    pub name: &'a str,
    /// The `dreamwire` program; in a test of the root package `env!("CARGO_BIN_EXE_dreamwire")`.
    pub binary: &'a Path,
    /// The namespace it runs in; none: the host.
    pub netns: Option<&'a Netns>,
    /// The configuration (TOML). `{run_dir}` stands for a fresh directory: `run_dir = "{run_dir}"`.
    pub config: &'a str,
}

/// A daemon that was started; killed when dropped. When a test panics, the end of its log is printed.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    binary: PathBuf,
    netns: Option<String>,
    /// Further ones of `dreamwire run`.
    arguments: Vec<String>,
    run_dir: PathBuf,
    child: Child,
    _owned: Owned,
}

impl Daemon {
    /// Writes the configuration, starts the daemon, and waits until its API answers.
    ///
    /// # Errors
    /// When it ends or does not answer within 15 s; the error has the end of its log.
    pub fn start(spec: &DaemonSpec<'_>) -> Result<Self, TopologyError> {
        Self::start_with(spec, &[])
    }

    /// The same with further arguments of `dreamwire run`: `&["--log-format", "json"]`.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(spec: &DaemonSpec<'_>, arguments: &[&str]) -> Result<Self, TopologyError> {
        let (run_dir, owned) = work_directory("run")?;
        write_config(&run_dir, spec.config)?;
        let netns = spec.netns.map(|netns| netns.name().to_owned());
        let arguments: Vec<_> = arguments.iter().map(|&word| word.to_owned()).collect();
        let mut daemon = Self {
            child: launch(spec.name, spec.binary, netns.as_deref(), &arguments, &run_dir)?,
            name: spec.name.to_owned(),
            binary: spec.binary.to_owned(),
            netns,
            arguments,
            run_dir,
            _owned: owned,
        };
        daemon.wait_ready()?;
        Ok(daemon)
    }

    /// Where its sockets are.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Path for a socket or file of that name in the run directory: `port_socket` of a port `vm1` is `path("vm1.sock")`.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.run_dir.join(name)
    }

    /// The configuration file as it was last written.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn config(&self) -> Result<String, TopologyError> {
        let path = self.path(CONFIG_FILE);
        fs::read_to_string(&path).map_err(during(|| format!("read {}", path.display())))
    }

    /// Process number, to look at it in /proc.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.pid().as_raw().unsigned_abs()
    }

    /// Runs the command-line client against it and gives its standard output: `daemon.cli(&["show", "port"])`.
    ///
    /// # Errors
    /// When it fails; the error has its output.
    pub fn cli(&self, arguments: &[&str]) -> Result<String, TopologyError> {
        let mut command = Command::new(&self.binary);
        command.arg("--run-dir").arg(&self.run_dir).args(arguments);
        output_of(command)
    }

    /// Applies another configuration through the client; `{run_dir}` is replaced as at the start. A restart keeps it.
    ///
    /// # Errors
    /// The daemon's refusal.
    pub fn apply(&self, config: &str) -> Result<String, TopologyError> {
        let path = write_config(&self.run_dir, config)?;
        self.cli(&["apply", &path.display().to_string()])
    }

    /// The statistics, as `GET /stats` gives them.
    ///
    /// # Errors
    /// When the daemon does not answer 200 with JSON.
    pub fn stats(&self) -> Result<Value, TopologyError> {
        let answer = self.get_stats_socket("/stats")?;
        serde_json::from_str(&answer.body).map_err(during(|| format!("JSON of {}'s stats", self.name)))
    }

    /// The metrics, as `GET /metrics` gives them (OpenMetrics).
    ///
    /// # Errors
    /// When the daemon does not answer 200.
    pub fn metrics(&self) -> Result<String, TopologyError> {
        Ok(self.get_stats_socket("/metrics")?.body)
    }

    /// Ends it with SIGTERM and waits.
    ///
    /// # Errors
    /// When it does not end, or not with exit code 0.
    pub fn terminate(&mut self) -> Result<(), TopologyError> {
        self.child.signal(Signal::SIGTERM)?;
        let status = self.child.wait(END_LIMIT)?;
        if status.success() {
            return Ok(());
        }
        self.child.check_running()
    }

    /// Kills it with SIGKILL and waits.
    ///
    /// # Errors
    /// When it cannot be signalled.
    pub fn kill(&mut self) -> Result<(), TopologyError> {
        self.child.signal(Signal::SIGKILL)?;
        self.child.wait(END_LIMIT).map(drop)
    }

    /// Starts it again, after [`Self::terminate`] or [`Self::kill`], with the same directory and the last configuration.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_again(&mut self) -> Result<(), TopologyError> {
        self.child = launch(&self.name, &self.binary, self.netns.as_deref(), &self.arguments, &self.run_dir)?;
        self.wait_ready()
    }

    /// Fails when the daemon is no longer running, with the end of its log.
    ///
    /// # Errors
    /// `Ended`.
    pub fn check_running(&mut self) -> Result<(), TopologyError> {
        self.child.check_running()
    }

    /// Everything it has logged, over restarts too.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.child.log()).unwrap_or_default()).into_owned()
    }

    fn wait_ready(&mut self) -> Result<(), TopologyError> {
        let api = self.path("api.sock");
        let what = format!("the API of {}", self.name);
        let waited = wait_until(START_LIMIT, &what, || self.child.ended().is_some() || http_get(&api, "/").is_ok());
        self.child.check_running()?;
        waited.map_err(|error| match error {
            TopologyError::TimedOut { what, waited } => TopologyError::TimedOut {
                what: format!("{what}; its log ends with:\n{}", tail(self.child.log())),
                waited,
            },
            other => other,
        })
    }

    fn get_stats_socket(&self, path: &str) -> Result<HttpAnswer, TopologyError> {
        let asking = || format!("GET {path} of {}", self.name);
        let answer = http_get(&self.path("stats.sock"), path).map_err(during(asking))?;
        if answer.status == 200 {
            return Ok(answer);
        }
        let refused = std::io::Error::other(format!("status {}: {}", answer.status, answer.body));
        Err(during(asking)(refused))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {} ---\n{}\n---", self.name, tail(self.child.log()));
        }
    }
}

fn write_config(run_dir: &Path, config: &str) -> Result<PathBuf, TopologyError> {
    let path = run_dir.join(CONFIG_FILE);
    let text = config.replace("{run_dir}", &run_dir.display().to_string());
    fs::write(&path, text).map_err(during(|| format!("write {}", path.display())))?;
    Ok(path)
}

fn launch(
    name: &str,
    binary: &Path,
    netns: Option<&str>,
    arguments: &[String],
    run_dir: &Path,
) -> Result<Child, TopologyError> {
    let mut words: Vec<OsString> = vec![binary.into()];
    words.extend(command(["run", "--config"]));
    words.push(run_dir.join(CONFIG_FILE).into());
    words.extend(arguments.iter().map(OsString::from));
    Child::start(&format!("daemon {name}"), netns, &words, &run_dir.join("daemon.log"))
}
