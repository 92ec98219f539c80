//! What can go wrong between a front-end and its back-end.

use std::io;
use std::path::PathBuf;

use super::split::RingError;

/// A failed front-end operation.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// A system call failed.
    #[error("{doing}: {source}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// No back-end at a path.
    #[error("no back-end at {}: {source}", path.display())]
    Connect {
        /// Where it was looked for.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The back-end closed the connection.
    #[error("the back-end closed the connection while {waiting_for}")]
    Disconnected {
        /// What was expected of it.
        waiting_for: String,
    },
    /// An answer that the protocol does not allow.
    #[error("the back-end answered {request}: {problem}")]
    Answer {
        /// The message.
        request: String,
        /// What is wrong with the answer.
        problem: String,
    },
    /// A message was refused with a non-zero acknowledgement.
    #[error("the back-end refused {request}: acknowledgement {code}")]
    Refused {
        /// The message.
        request: String,
        /// The acknowledgement.
        code: u64,
    },
    /// Features that the options require are not offered.
    #[error("the back-end offers features {offered:#x}, lacking {missing:#x}")]
    MissingFeatures {
        /// What it offers.
        offered: u64,
        /// What was required beyond.
        missing: u64,
    },
    /// Fewer queue pairs than the options ask for.
    #[error("the back-end has {offered} queues: too few for {pairs} pairs")]
    TooFewQueues {
        /// What GET_QUEUE_NUM said.
        offered: u64,
        /// What was asked for.
        pairs: u16,
    },
    /// Options that contradict each other.
    #[error("front-end options: {0}")]
    Options(String),
    /// Guest memory is too small.
    #[error("no {bytes} bytes left in guest memory: raise Options::spare_bytes")]
    MemoryExhausted {
        /// Bytes that were asked for.
        bytes: usize,
    },
    /// A frame that does not fit a transmit buffer.
    #[error("a frame of {bytes} bytes does not fit a transmit buffer of {most}: raise Options::tx_buffer_bytes")]
    FrameTooLong {
        /// Its length.
        bytes: usize,
        /// What fits.
        most: usize,
    },
    /// The device broke the rules of a ring.
    #[error("ring: {0}")]
    Ring(#[from] RingError),
}

impl FrontEndError {
    /// For `map_err`: a system call, and what it was for.
    pub(crate) fn system<E: Into<io::Error>>(doing: &'static str) -> impl Fn(E) -> Self
    where
        io::Error: From<E>,
    {
        move |source| Self::System { doing, source: source.into() }
    }
}
