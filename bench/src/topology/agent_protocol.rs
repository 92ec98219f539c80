//! What a test and the agent in a guest say to each other: one line of JSON per request and per answer.
//!
//! The channel is a virtio-serial port. The asker numbers its requests; answers come in any order, since each request runs
//! in a thread of its own. A line that is not JSON (the rest of one that a reboot cut) is skipped by both sides.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::hex;
use super::{Frame, FrameDigest, FrameFilter, FramePattern};

/// Name of the virtio-serial port.
pub const AGENT_PORT_NAME: &str = "org.dreamwire.agent";

/// UDP port on which every agent sends back what it gets (RFC 862).
pub const ECHO_PORT: u16 = 7;

/// Bytes of a file per request; a line then has about twice as many.
pub(super) const FILE_CHUNK_BYTES: usize = 256 << 10;

/// A numbered request.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RequestLine {
    pub(super) id: u64,
    pub(super) request: Request,
}

/// The answer to the request of that number.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ReplyLine {
    pub(super) id: u64,
    pub(super) reply: Result<Reply, String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Request {
    Hello,
    Run { argv: Vec<String>, limit_ms: u64 },
    SendFrames { interface: String, frames: Vec<HexBytes> },
    SendPattern { interface: String, pattern: FramePattern },
    CaptureStart { interface: String },
    CaptureTake { capture: u64, filter: FrameFilter, count: usize, limit_ms: u64, digests_only: bool },
    CaptureStop { capture: u64 },
    FileAppend { path: String, bytes: HexBytes, from_empty: bool },
    FileRead { path: String, offset: u64 },
    ProbeStart { target: SocketAddr, interval_us: u64 },
    ProbeStop { probe: u64 },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Reply {
    Hello { boot_id: String, uptime_s: f64 },
    Done,
    Ran(Output),
    Started { number: u64 },
    Frames { frames: Vec<Frame> },
    Digests { digests: Vec<FrameDigest> },
    Bytes(HexBytes),
    Probed(ProbeReport),
}

/// Bytes, as hexadecimal on the line.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct HexBytes(#[serde(with = "hex")] pub(super) Vec<u8>);

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Exit code; `None` after a signal or when the time was up.
    pub code: Option<i32>,
    /// It was killed because its time was up.
    pub timed_out: bool,
    /// Standard output; what is not UTF-8 is replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
}

impl Output {
    /// Whether it ended by itself with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == Some(0)
    }
}

/// What a stream of numbered UDP packets, sent to an echo port at a steady rate, saw of the network.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// Probes handed to the guest's network stack.
    pub sent: u64,
    /// Probes that the stack refused (no carrier, no route, no neighbour).
    pub refused: u64,
    /// Distinct answers.
    pub received: u64,
    /// Answers that came more than once.
    pub duplicates: u64,
    /// Answers older than one that had come before.
    pub reordered: u64,
    /// Longest time without an answer, from start to stop, in milliseconds.
    pub longest_gap_ms: f64,
    /// Mean time from probe to answer, in milliseconds; 0 without any answer.
    pub round_trip_ms_mean: f64,
}
