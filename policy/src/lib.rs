//! What a port may send and receive: pure decisions, without I/O, clock or threads.
//!
//! Policy never sees a packet. The datapath reads from a frame what it claims and asks here.
#![forbid(unsafe_code)]

pub mod source_guard;

pub use source_guard::{Claim, SourceGuard};
