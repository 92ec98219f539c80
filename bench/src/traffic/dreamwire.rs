//! Our own daemon as a device under test: two ports in one network.

use std::path::{Path, PathBuf};

use super::DeviceUnderTest;
use crate::topology::{Daemon, DaemonSpec, TopologyError};

/// A running daemon; it ends when dropped.
#[derive(Debug)]
pub struct Dreamwire {
    daemon: Daemon,
    device: DeviceUnderTest,
}

/// The program: `$DREAMWIRE_DAEMON`, else `dreamwire` beside the running program.
#[must_use]
pub fn program() -> PathBuf {
    let beside = || Some(std::env::current_exe().ok()?.parent()?.join("dreamwire"));
    std::env::var_os("DREAMWIRE_DAEMON").map(PathBuf::from).or_else(beside).unwrap_or_else(|| "dreamwire".into())
}

impl Dreamwire {
    /// Starts it with its worker on `cpu`. The ports have no MAC address: the switch learns, as testpmd's users would.
    ///
    /// # Errors
    /// When the program is missing or does not come up.
    pub fn start(cpu: usize) -> Result<Self, TopologyError> {
        let config = format!(
            "[daemon]\nrun_dir = \"{{run_dir}}\"\nworkers = [{cpu}]\n[[network]]\nname = \"bench\"\n\
             [[port]]\nname = \"a\"\nnetwork = \"bench\"\n[[port]]\nname = \"b\"\nnetwork = \"bench\"\n"
        );
        Self::start_with(&program(), &config)
    }

    /// Starts `binary` with a configuration that has ports `a` and `b`; `{run_dir}` stands for a fresh directory.
    ///
    /// # Errors
    /// As [`Dreamwire::start`].
    pub fn start_with(binary: &Path, config: &str) -> Result<Self, TopologyError> {
        let daemon = Daemon::start(&DaemonSpec { name: "dreamwire", binary, netns: None, config })?;
        let device = DeviceUnderTest { from: daemon.path("a.sock"), to: daemon.path("b.sock"), is_client: false };
        Ok(Self { daemon, device })
    }

    /// Its sockets.
    pub fn device(&self) -> &DeviceUnderTest {
        &self.device
    }

    /// The daemon, to ask it for its counters.
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }
}
