//! A virtual machine under QEMU, with the agent inside to ask it things.
//!
//! Life: [`Guest::start`] runs QEMU and returns at once, so that several boot side by side; [`Guest::wait_ready`] waits for
//! the agent; dropping it kills QEMU. When a test panics, the end of the serial console and QEMU's own words are printed.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::agent_client::{AgentClient, SLACK};
use super::agent_protocol::{FILE_CHUNK_BYTES, HexBytes, Reply, Request};
use super::child::{Child, tail};
use super::cleanup::{Owned, work_directory};
use super::{
    Accelerator, Capture, FramePattern, GuestImage, GuestSpec, Output, Qmp, RunningProbe, TopologyError, wait_until,
};

/// How long a boot may take: 3 to 5 s emulated on an idle machine, four times that on a loaded one.
pub const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// How long a command in the guest may take unless told otherwise.
const COMMAND_LIMIT: Duration = Duration::from_secs(30);
/// How long QEMU may take to make its sockets.
const QEMU_LIMIT: Duration = Duration::from_secs(10);

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    name: String,
    directory: PathBuf,
    qemu: Child,
    agent: AgentClient,
    qmp: Mutex<Qmp>,
    _owned: Owned,
}

impl Guest {
    /// Starts QEMU. With a card that QEMU connects, the back-end must listen already.
    ///
    /// # Errors
    /// Without an image, or when QEMU does not take its command line: the error has QEMU's words.
    pub fn start(spec: &GuestSpec) -> Result<Self, TopologyError> {
        let image = GuestImage::find()?;
        let accelerator = Accelerator::detect(&image);
        let (directory, owned) = work_directory("guest")?;
        let words = spec.command_line(&image, accelerator, &directory);
        let mut qemu = Child::start(
            &format!("QEMU of {}", spec.name),
            spec.netns.as_deref(),
            &words,
            &directory.join("qemu.log"),
        )?;
        let qmp = connect(&mut qemu, || Qmp::connect(&directory.join("qmp")))?;
        let agent = connect(&mut qemu, || AgentClient::connect(&spec.name, &directory.join("agent")))?;
        Ok(Self { name: spec.name.clone(), directory, qemu, agent, qmp: Mutex::new(qmp), _owned: owned })
    }

    /// Starts QEMU and waits until the guest is ready.
    ///
    /// # Errors
    /// As [`Self::start`] and [`Self::wait_ready`].
    pub fn boot(spec: &GuestSpec) -> Result<Self, TopologyError> {
        let mut guest = Self::start(spec)?;
        guest.wait_ready(BOOT_LIMIT)?;
        Ok(guest)
    }

    /// Waits until the agent answers; addresses are set by then.
    ///
    /// # Errors
    /// `Ended` when QEMU did, `TimedOut` otherwise, with the end of the serial console.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<(), TopologyError> {
        self.wait_boot_other_than(None, limit)
    }

    /// Waits until an interface sees its link and the kernel has taken note (up to a second later).
    ///
    /// # Errors
    /// `TimedOut`.
    pub fn wait_link(&self, interface: &str, limit: Duration) -> Result<(), TopologyError> {
        let path = format!("/sys/class/net/{interface}/operstate");
        wait_until(limit, &format!("the link of {}'s {interface}", self.name), || {
            self.exec(&["cat", &path]).is_ok_and(|state| state.trim() == "up")
        })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its sockets (`console`, `qmp`) and logs (`serial.log`, `qemu.log`) are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Runs a command and gives its standard output.
    ///
    /// # Errors
    /// When it does not end with code 0 within 30 s; the error has its output.
    pub fn exec(&self, argv: &[&str]) -> Result<String, TopologyError> {
        let output = self.run(argv, COMMAND_LIMIT)?;
        if output.success() {
            return Ok(output.stdout);
        }
        Err(TopologyError::Command {
            command: format!("{}: {}", self.name, argv.join(" ")),
            status: match (output.timed_out, output.code) {
                (true, _) => "its time up".to_owned(),
                (false, Some(code)) => format!("exit code {code}"),
                (false, None) => "a signal".to_owned(),
            },
            output: format!("{}{}", output.stdout, output.stderr).trim().to_owned(),
        })
    }

    /// Runs a line of shell and gives its standard output.
    ///
    /// # Errors
    /// As [`Self::exec`].
    pub fn sh(&self, line: &str) -> Result<String, TopologyError> {
        self.exec(&["sh", "-c", line])
    }

    /// Runs a command and gives all that came of it, whatever that is.
    ///
    /// # Errors
    /// When it cannot be started, or the agent does not answer.
    pub fn run(&self, argv: &[&str], limit: Duration) -> Result<Output, TopologyError> {
        let request =
            Request::Run { argv: argv.iter().map(|&word| word.to_owned()).collect(), limit_ms: millis(limit) };
        match self.agent.ask(request, limit + SLACK)? {
            Reply::Ran(output) => Ok(output),
            other => Err(self.agent.unexpected(&other)),
        }
    }

    /// Whether `count` pings to `target`, 100 ms apart, all come back; the first may still need ARP.
    ///
    /// # Errors
    /// When ping cannot be run.
    pub fn ping(&self, target: &str, count: u32) -> Result<bool, TopologyError> {
        let count_text = count.to_string();
        let limit = Duration::from_secs(5) + Duration::from_millis(100) * count;
        let argv = ["ping", "-q", "-c", &count_text, "-i", "0.1", "-W", "3", target];
        let output = self.run(&argv, limit)?;
        Ok(output.success() && output.stdout.contains(" 0% packet loss"))
    }

    /// Sends raw frames.
    ///
    /// # Errors
    /// When there is no such interface, it is down, or a frame is too long for it.
    pub fn send_frames(&self, interface: &str, frames: &[Vec<u8>]) -> Result<(), TopologyError> {
        let request = Request::SendFrames {
            interface: interface.to_owned(),
            frames: frames.iter().cloned().map(HexBytes).collect(),
        };
        self.done(request, COMMAND_LIMIT)
    }

    /// Sends the frames of a pattern; only the pattern goes to the guest.
    ///
    /// # Errors
    /// As [`Self::send_frames`].
    pub fn send_pattern(&self, interface: &str, pattern: &FramePattern) -> Result<(), TopologyError> {
        let pauses = Duration::from_micros(pattern.gap_us) * u32::try_from(pattern.count()).unwrap_or(u32::MAX);
        let request = Request::SendPattern { interface: interface.to_owned(), pattern: pattern.clone() };
        self.done(request, COMMAND_LIMIT + pauses * 2)
    }

    /// Starts keeping what arrives on an interface; it listens when this returns.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn capture(&self, interface: &str) -> Result<Capture<'_>, TopologyError> {
        let request = Request::CaptureStart { interface: interface.to_owned() };
        let number = self.started(request)?;
        Ok(Capture { guest: self, number })
    }

    /// Starts a stream of UDP probes, `interval` apart, to `target`, where an echo answers (every guest's agent has one on
    /// [`super::ECHO_PORT`]).
    ///
    /// # Errors
    /// When no route leads there.
    pub fn probe(&self, target: SocketAddr, interval: Duration) -> Result<RunningProbe<'_>, TopologyError> {
        let request =
            Request::ProbeStart { target, interval_us: u64::try_from(interval.as_micros()).unwrap_or(u64::MAX) };
        let number = self.started(request)?;
        Ok(RunningProbe { guest: self, number })
    }

    /// Writes a file in the guest.
    ///
    /// # Errors
    /// When the guest refuses.
    pub fn put_file(&self, path: &str, bytes: &[u8]) -> Result<(), TopologyError> {
        let mut from_empty = true;
        let mut chunks = bytes.chunks(FILE_CHUNK_BYTES).peekable();
        while from_empty || chunks.peek().is_some() {
            let request = Request::FileAppend {
                path: path.to_owned(),
                bytes: HexBytes(chunks.next().unwrap_or_default().to_vec()),
                from_empty,
            };
            self.done(request, COMMAND_LIMIT)?;
            from_empty = false;
        }
        Ok(())
    }

    /// Reads a file in the guest.
    ///
    /// # Errors
    /// When the guest refuses.
    pub fn get_file(&self, path: &str) -> Result<Vec<u8>, TopologyError> {
        let mut bytes = Vec::new();
        loop {
            let request = Request::FileRead { path: path.to_owned(), offset: bytes.len() as u64 };
            match self.agent.ask(request, COMMAND_LIMIT)? {
                Reply::Bytes(chunk) if chunk.0.is_empty() => return Ok(bytes),
                Reply::Bytes(chunk) => bytes.extend(chunk.0),
                other => return Err(self.agent.unexpected(&other)),
            }
        }
    }

    /// Resets the machine, as its reset button does, and waits until the new boot is ready.
    ///
    /// # Errors
    /// As [`Self::wait_ready`].
    pub fn reboot(&mut self) -> Result<(), TopologyError> {
        let before = self.boot_id(COMMAND_LIMIT)?;
        self.qmp("system_reset", json!({}))?;
        self.wait_boot_other_than(Some(&before), BOOT_LIMIT)
    }

    /// Lets the guest restart itself, as its administrator would, and waits until the new boot is ready.
    ///
    /// # Errors
    /// As [`Self::wait_ready`].
    pub fn reboot_from_inside(&mut self) -> Result<(), TopologyError> {
        let before = self.boot_id(COMMAND_LIMIT)?;
        // Behind the agent's back, so that its answer is not lost with the guest.
        self.sh("(sleep 0.2; reboot -f) >/dev/null 2>&1 &")?;
        self.wait_boot_other_than(Some(&before), BOOT_LIMIT)
    }

    /// Runs a QMP command.
    ///
    /// # Errors
    /// QEMU's refusal.
    pub fn qmp(&self, command: &str, arguments: Value) -> Result<Value, TopologyError> {
        self.lock_qmp().execute(command, arguments)
    }

    /// QMP events since the last call.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn take_qmp_events(&self) -> Result<Vec<Value>, TopologyError> {
        let mut qmp = self.lock_qmp();
        // An answer comes behind all events before it.
        qmp.execute("query-status", json!({}))?;
        Ok(qmp.take_events())
    }

    /// Lets the guest power itself off, and waits for QEMU's end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn shutdown(mut self) -> Result<(), TopologyError> {
        // The answer may be lost with the guest.
        let request = Request::Run { argv: vec!["poweroff".to_owned(), "-f".to_owned()], limit_ms: millis(QEMU_LIMIT) };
        let _ = self.agent.ask(request, Duration::from_millis(1));
        self.qemu.wait(BOOT_LIMIT).map(drop)
    }

    /// Kills QEMU with SIGKILL and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(mut self) -> Result<(), TopologyError> {
        self.qemu.signal(Signal::SIGKILL)?;
        self.qemu.wait(QEMU_LIMIT).map(drop)
    }

    /// The end of the serial console.
    #[must_use]
    pub fn serial_tail(&self) -> String {
        tail(&self.directory.join("serial.log"))
    }

    pub(super) fn agent(&self) -> &AgentClient {
        &self.agent
    }

    fn boot_id(&self, limit: Duration) -> Result<String, TopologyError> {
        match self.agent.ask(Request::Hello, limit)? {
            Reply::Hello { boot_id, .. } => Ok(boot_id),
            other => Err(self.agent.unexpected(&other)),
        }
    }

    fn wait_boot_other_than(&mut self, old: Option<&str>, limit: Duration) -> Result<(), TopologyError> {
        let start = Instant::now();
        loop {
            self.qemu.check_running()?;
            // A greeting sent to a machine in the middle of its reset is lost: ask again and again.
            match self.boot_id(Duration::from_millis(500)) {
                Ok(boot_id) if old != Some(&boot_id) => return Ok(()),
                _ if start.elapsed() > limit => {
                    return Err(TopologyError::TimedOut {
                        what: format!("{} to boot; its console ends with:\n{}", self.name, self.serial_tail()),
                        waited: start.elapsed(),
                    });
                }
                _ => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    pub(super) fn done(&self, request: Request, limit: Duration) -> Result<(), TopologyError> {
        match self.agent.ask(request, limit)? {
            Reply::Done => Ok(()),
            other => Err(self.agent.unexpected(&other)),
        }
    }

    fn started(&self, request: Request) -> Result<u64, TopologyError> {
        match self.agent.ask(request, COMMAND_LIMIT)? {
            Reply::Started { number } => Ok(number),
            other => Err(self.agent.unexpected(&other)),
        }
    }

    fn lock_qmp(&self) -> MutexGuard<'_, Qmp> {
        self.qmp.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (name, serial, qemu) = (&self.name, self.serial_tail(), tail(self.qemu.log()));
            eprintln!("--- console of {name} ---\n{serial}\n--- QEMU of {name} ---\n{qemu}\n---");
        }
    }
}

/// Tries until QEMU listens, or has ended.
fn connect<T>(qemu: &mut Child, mut attempt: impl FnMut() -> Result<T, TopologyError>) -> Result<T, TopologyError> {
    let deadline = Instant::now() + QEMU_LIMIT;
    loop {
        match attempt() {
            Ok(connected) => return Ok(connected),
            Err(error) => {
                qemu.check_running()?;
                if Instant::now() > deadline {
                    return Err(error);
                }
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
