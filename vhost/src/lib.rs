//! vhost-user sessions and virtqueues: guest memory, never packet formats.
//!
//! A front-end (QEMU) talks to the [`keeper`], which holds its connection, vets what it sends and plays the
//! session to a [`session`] in the order of the specification. The session turns it into [`ring::Ring`]s and
//! hands them to a [`owner::RingOwner`] (the datapath), which alone touches them while they are attached.

pub mod dirty_log;
mod distance;
pub mod eventfd;
pub mod frame;
pub mod inflight;
mod interrupt;
pub mod keeper;
pub mod limiter;
pub mod memory;
pub mod owner;
pub mod ring;
pub mod session;
pub mod sigbus;
mod stream;
