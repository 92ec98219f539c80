//! What can go wrong while a topology is put up or asked: always with the words that say where to look next.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a namespace, guest, daemon or command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// A system call on something named failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done, with the path or name it was done to.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A command on the host or in a guest ended with something other than success.
    #[error("`{command}` ended with {status}: {output}")]
    Command {
        /// The command line.
        command: String,
        /// Exit status as text.
        status: String,
        /// Standard output and standard error, trimmed.
        output: String,
    },
    /// A condition did not come true in time.
    #[error("waited {:.1} s in vain for {what}", .waited.as_secs_f64())]
    TimedOut {
        /// The condition.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The guest's agent refused a request or answered out of turn.
    #[error("guest {guest}: {reason}")]
    Agent {
        /// Name of the guest.
        guest: String,
        /// The agent's words.
        reason: String,
    },
    /// QEMU refused a QMP command.
    #[error("QMP {command}: {reason}")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's words.
        reason: String,
    },
    /// A process ended before it was of use.
    #[error("{name} ended early with {status}; log {}:\n{tail}", .log.display())]
    Ended {
        /// Name of the process.
        name: String,
        /// Exit status as text.
        status: String,
        /// Where its output went.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// This machine lacks something; the text says what to run.
    #[error("{0}")]
    Unavailable(String),
}

/// `TopologyError::Io` around what was being done: `.map_err(during(|| format!("open {path}")))`.
pub(super) fn during<E: Into<io::Error>>(what: impl FnOnce() -> String) -> impl FnOnce(E) -> TopologyError {
    move |error| TopologyError::Io { what: what(), source: error.into() }
}
