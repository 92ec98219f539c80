//! The agent that runs in a guest: reads requests from a virtio-serial port and answers them there.
//!
//! Each request has its own thread, so that a long command does not hold up a capture. Captures and probes outlive the
//! request that started them and have a number. The agent trusts who asks: it runs in a throw-away guest.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::agent_protocol::{FILE_CHUNK_BYTES, HexBytes, Reply, ReplyLine, Request, RequestLine};
use super::probe::{Probe, serve_echo};
use super::{AGENT_PORT_NAME, FrameDigest, Output, PacketSocket};

/// Bytes of each output stream that an answer carries; more is cut off at the front, where it matters least.
const OUTPUT_BYTES_MAX: u64 = 4 << 20;

type Outcome = Result<Reply, String>;

/// What outlives one request.
#[derive(Debug, Default)]
struct Agent {
    next_number: AtomicU64,
    captures: Mutex<HashMap<u64, Arc<PacketSocket>>>,
    probes: Mutex<HashMap<u64, Probe>>,
}

/// Serves the agent's port until it breaks, and the UDP echo port beside it.
///
/// # Errors
/// When there is no such port, or it cannot be read.
pub fn serve() -> io::Result<Infallible> {
    std::thread::spawn(|| {
        let Err(error) = serve_echo();
        eprintln!("dreamwire-guest: echo: {error}");
    });
    let path = find_port(Path::new("/sys/class/virtio-ports"))?;
    let port = OpenOptions::new().read(true).write(true).open(&path)?;
    let answers = Arc::new(Mutex::new(port.try_clone()?));
    let agent = Arc::new(Agent::default());
    let mut lines = BufReader::new(port);
    let mut line = Vec::new();
    loop {
        // End of file means that nobody is connected on the host's side just now.
        if lines.read_until(b'\n', &mut line)? == 0 {
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        if line.ends_with(b"\n") {
            if let Ok(request) = serde_json::from_slice(&line) {
                answer(&agent, &answers, request);
            }
            line.clear();
        }
    }
}

fn answer(agent: &Arc<Agent>, answers: &Arc<Mutex<File>>, line: RequestLine) {
    let (agent, answers) = (Arc::clone(agent), Arc::clone(answers));
    std::thread::spawn(move || {
        let reply = agent.answer(line.request);
        let mut text = serde_json::to_vec(&ReplyLine { id: line.id, reply })
            .unwrap_or_else(|error| format!("{error}").into_bytes());
        text.push(b'\n');
        // Nobody left to tell if it fails; who asked sees its time-out.
        let _ = lock(&answers).write_all(&text);
    });
}

impl Agent {
    fn answer(&self, request: Request) -> Outcome {
        match request {
            Request::Hello => hello(),
            Request::Run { argv, limit_ms } => Self::run(&argv, Duration::from_millis(limit_ms)).map(Reply::Ran),
            Request::SendFrames { interface, frames } => {
                send_all(&interface, frames.into_iter().map(|frame| frame.0), 0)
            }
            Request::SendPattern { interface, pattern } => send_all(&interface, pattern.frames(), pattern.gap_us),
            Request::CaptureStart { interface } => {
                let socket = PacketSocket::open(&interface).map_err(words)?;
                Ok(self.keep(&self.captures, Arc::new(socket)))
            }
            Request::CaptureTake { capture, filter, count, limit_ms, digests_only } => {
                let socket = lock(&self.captures).get(&capture).cloned().ok_or("no such capture")?;
                let frames = socket.receive(&filter, count, Duration::from_millis(limit_ms)).map_err(words)?;
                Ok(if digests_only {
                    let digests = frames.iter().map(|frame| FrameDigest::of(&frame.bytes)).collect();
                    Reply::Digests { digests }
                } else {
                    Reply::Frames { frames }
                })
            }
            Request::CaptureStop { capture } => {
                lock(&self.captures).remove(&capture);
                Ok(Reply::Done)
            }
            Request::FileAppend { path, bytes, from_empty } => append(&path, &bytes.0, from_empty),
            Request::FileRead { path, offset } => read(&path, offset),
            Request::ProbeStart { target, interval_us } => {
                let probe = Probe::start(target, Duration::from_micros(interval_us)).map_err(words)?;
                Ok(self.keep(&self.probes, probe))
            }
            Request::ProbeStop { probe } => {
                let probe = lock(&self.probes).remove(&probe).ok_or("no such probe")?;
                Ok(Reply::Probed(probe.stop()))
            }
        }
    }

    fn keep<T>(&self, table: &Mutex<HashMap<u64, T>>, item: T) -> Reply {
        // Relaxed: only distinct numbers are needed.
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        lock(table).insert(number, item);
        Reply::Started { number }
    }

    /// Output goes through files, so that a daemon which the command leaves behind holds up nothing.
    fn run(argv: &[String], limit: Duration) -> Result<Output, String> {
        let stdout = tempfile::tempfile().map_err(words)?;
        let stderr = tempfile::tempfile().map_err(words)?;
        let (program, arguments) = argv.split_first().ok_or("no command")?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(stdout.try_clone().map_err(words)?)
            .stderr(stderr.try_clone().map_err(words)?)
            .process_group(0)
            .spawn()
            .map_err(|error| format!("{program}: {error}"))?;
        let deadline = Instant::now() + limit;
        let mut timed_out = false;
        let status = loop {
            if let Some(status) = child.try_wait().map_err(words)? {
                break status;
            }
            if Instant::now() >= deadline && !timed_out {
                timed_out = true;
                let group = Pid::from_raw(i32::try_from(child.id()).map_err(words)?);
                killpg(group, Signal::SIGKILL).map_err(words)?;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        Ok(Output { code: status.code(), timed_out, stdout: take_output(stdout)?, stderr: take_output(stderr)? })
    }
}

fn hello() -> Outcome {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(words)?;
    let uptime = fs::read_to_string("/proc/uptime").map_err(words)?;
    let uptime_s = uptime.split(' ').next().and_then(|seconds| seconds.parse().ok());
    Ok(Reply::Hello { boot_id: boot_id.trim().to_owned(), uptime_s: uptime_s.ok_or("no uptime")? })
}

fn send_all(interface: &str, frames: impl Iterator<Item = Vec<u8>>, gap_us: u64) -> Outcome {
    let socket = PacketSocket::open(interface).map_err(words)?;
    for frame in frames {
        socket.send(&frame).map_err(words)?;
        if gap_us > 0 {
            std::thread::sleep(Duration::from_micros(gap_us));
        }
    }
    Ok(Reply::Done)
}

fn append(path: &str, bytes: &[u8], from_empty: bool) -> Outcome {
    let mut options = OpenOptions::new();
    if from_empty {
        options.write(true).truncate(true);
    } else {
        options.append(true);
    }
    let mut file = options.create(true).open(path).map_err(words)?;
    file.write_all(bytes).map_err(words)?;
    Ok(Reply::Done)
}

fn read(path: &str, offset: u64) -> Outcome {
    let mut file = File::open(path).map_err(words)?;
    file.seek(SeekFrom::Start(offset)).map_err(words)?;
    let mut bytes = Vec::new();
    file.take(FILE_CHUNK_BYTES as u64).read_to_end(&mut bytes).map_err(words)?;
    Ok(Reply::Bytes(HexBytes(bytes)))
}

fn take_output(mut file: File) -> Result<String, String> {
    let length = file.metadata().map_err(words)?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(OUTPUT_BYTES_MAX))).map_err(words)?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(words)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Without udev there is no /dev/virtio-ports: the port's number is found by its name.
fn find_port(class: &Path) -> io::Result<PathBuf> {
    for entry in fs::read_dir(class)? {
        let entry = entry?;
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == AGENT_PORT_NAME {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no port named {AGENT_PORT_NAME} yet")))
}

fn words(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A thread that panicked leaves tables that are still whole: each is changed by single inserts and removals.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(argv: &[&str], limit: Duration) -> Output {
        let argv: Vec<String> = argv.iter().map(|&word| word.to_owned()).collect();
        Agent::run(&argv, limit).unwrap()
    }

    #[test]
    fn a_command_reports_both_streams_and_its_code() {
        let output = run(&["sh", "-c", "echo out; echo err >&2; exit 3"], Duration::from_secs(10));
        assert_eq!(
            output,
            Output { code: Some(3), timed_out: false, stdout: "out\n".to_owned(), stderr: "err\n".to_owned() }
        );
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_its_children() {
        let output = run(&["sh", "-c", "echo first; sleep 100 & wait"], Duration::from_millis(100));
        assert!(output.timed_out);
        assert_eq!((output.code, output.stdout.as_str()), (None, "first\n"));
    }
}
