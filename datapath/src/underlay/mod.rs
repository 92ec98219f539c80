//! How outer packets leave and enter this host.
//!
//! An underlay is opened by the control thread, which reports what is wrong with it, and then given to a worker, which
//! makes two halves of it: what receives and what sends.

mod rx;
mod socket;
mod sockopt;
mod tx;

pub(crate) use rx::SocketRx;
pub use socket::SocketUnderlay;
pub(crate) use tx::SocketTx;

/// Room for one packet in a buffer: an IP packet at most (RFC 791 §3.1).
const SLOT_BYTES: usize = 65536;

/// Kernel buffers: 100 bursts of full-sized frames, some 5 ms at 10 Gbit/s.
const KERNEL_BUFFER_BYTES: usize = 8 << 20;
