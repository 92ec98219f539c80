//! DPDK's testpmd as a device under test: two vhost ports and a bare copy between them, the least any switch can do.
//!
//! Owned by whoever started it; killed on drop. Needs `dpdk-testpmd` (Debian: dpdk-dev), no huge pages, no NIC.
//! `--in-memory` cannot be had together with `--no-huge` (EAL refuses), so each instance has a file prefix of its own.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::DeviceUnderTest;

/// Without huge pages 1 GiB is what two ports' buffers need with room to spare.
const MEMORY_MIB: u32 = 1024;

/// How long it may take to come up.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// A testpmd that could not be started.
#[derive(Debug, thiserror::Error)]
pub enum TestpmdError {
    /// Not installed, or not runnable.
    #[error("dpdk-testpmd does not run ({0}): apt-get install dpdk-dev, or point DREAMWIRE_TESTPMD at it")]
    Missing(io::Error),
    /// It ended or did nothing.
    #[error("dpdk-testpmd did not open its sockets: {0}")]
    NotReady(String),
}

/// How to run it.
#[derive(Clone, Debug)]
pub struct TestpmdOptions {
    /// CPU of the forwarding thread.
    pub cpu: usize,
    /// CPU of its main thread, which sleeps.
    pub main_cpu: usize,
    /// Queue pairs per port.
    pub queue_pairs: u16,
    /// It connects to our sockets instead of listening.
    pub client: bool,
    /// Two more ports, c.sock and d.sock, forwarding between each other.
    pub bystanders: bool,
}

impl Default for TestpmdOptions {
    fn default() -> Self {
        Self { cpu: 1, main_cpu: 0, queue_pairs: 1, client: false, bystanders: false }
    }
}

/// A running testpmd.
#[derive(Debug)]
pub struct Testpmd {
    child: Child,
    directory: PathBuf,
    device: DeviceUnderTest,
}

/// The program: `$DREAMWIRE_TESTPMD`, else `dpdk-testpmd` in PATH.
fn program() -> PathBuf {
    std::env::var_os("DREAMWIRE_TESTPMD").map_or_else(|| "dpdk-testpmd".into(), PathBuf::from)
}

/// Whether testpmd is installed.
pub fn is_installed() -> bool {
    let program = program();
    program.is_file()
        || std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|at| at.join(&program).is_file()))
}

impl Testpmd {
    /// Starts it with its sockets in a fresh directory below `parent`, and waits until it has opened
    /// both.
    ///
    /// # Errors
    /// [`TestpmdError`].
    pub fn start(parent: &Path, options: &TestpmdOptions) -> Result<Self, TestpmdError> {
        // Unique per process and instance: the sockets' directory and the file prefix.
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        // Relaxed: only the value has to be unique.
        let name =
            format!("dreamwire-{}-{}", std::process::id(), COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
        let directory = parent.join(format!("testpmd-{name}"));
        fs::create_dir_all(&directory).map_err(TestpmdError::Missing)?;
        let device =
            DeviceUnderTest { from: directory.join("a.sock"), to: directory.join("b.sock"), is_client: options.client };
        let log = fs::File::create(directory.join("log")).map_err(TestpmdError::Missing)?;
        let child = Command::new(program())
            .args(arguments(&name, &device, options))
            // It ends at a key press: an open pipe keeps it going, and a closed one stops it when we die.
            .stdin(Stdio::piped())
            .stdout(log.try_clone().map_err(TestpmdError::Missing)?)
            .stderr(log)
            .spawn()
            .map_err(TestpmdError::Missing)?;
        let mut testpmd = Self { child, directory, device };
        testpmd.wait_until_ready()?;
        Ok(testpmd)
    }

    /// Its sockets.
    pub fn device(&self) -> &DeviceUnderTest {
        &self.device
    }

    fn wait_until_ready(&mut self) -> Result<(), TestpmdError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            // Its standard output is buffered for as long as it runs; the vhost library's log is not, and names a
            // socket that was opened. Forwarding begins a little later: Throughput::warm_up waits for that.
            let log = self.log();
            if [&self.device.from, &self.device.to].iter().all(|path| log.contains(&format!("({})", path.display()))) {
                return Ok(());
            }
            let ended = self.child.try_wait().map_err(TestpmdError::Missing)?;
            if ended.is_some() || Instant::now() > deadline {
                let tail: Vec<_> = log.lines().rev().take(5).collect();
                return Err(TestpmdError::NotReady(tail.into_iter().rev().collect::<Vec<_>>().join(" | ")));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The socket of that name: the bystanders' are `c.sock` and `d.sock`.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// What it has printed.
    pub fn log(&self) -> String {
        let mut bytes = Vec::new();
        if let Ok(mut file) = fs::File::open(self.directory.join("log")) {
            let _ = file.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn arguments(prefix: &str, device: &DeviceUnderTest, options: &TestpmdOptions) -> Vec<String> {
    let TestpmdOptions { cpu, main_cpu, queue_pairs, client, bystanders } = options;
    let port = |index: usize, path: &Path| {
        format!("--vdev=net_vhost{index},iface={},queues={queue_pairs},client={}", path.display(), u8::from(*client))
    };
    let mut arguments: Vec<String> = [
        format!("--lcores=0@{main_cpu},1@{cpu}"),
        "--main-lcore=0".into(),
        "--no-huge".into(),
        format!("-m{MEMORY_MIB}"),
        "--no-pci".into(),
        "--no-telemetry".into(),
        format!("--file-prefix={prefix}"),
        port(0, &device.from),
        port(1, &device.to),
        "--".into(),
        "--forward-mode=io".into(),
        "--auto-start".into(),
        "--disable-link-check".into(),
        "--nb-cores=1".into(),
    ]
    .into();
    if *bystanders {
        let at = |name: &str| device.from.with_file_name(name);
        let first = arguments.iter().position(|argument| argument == "--").expect("EAL's arguments end there");
        arguments.splice(first..first, [port(2, &at("c.sock")), port(3, &at("d.sock"))]);
    }
    if *queue_pairs > 1 {
        arguments.extend([format!("--rxq={queue_pairs}"), format!("--txq={queue_pairs}")]);
    }
    arguments
}
