//! Traffic through a device under test: frames to send, a sink that checks them, and rounds of both.
//!
//! **Sizes.** "64 B" means 64 bytes of Ethernet frame in the ring, without FCS: rings carry none, and published vhost
//! figures (DPDK's, OVS's, VPP's) count the same way. On a wire such a frame would be 68 bytes with FCS, so the RFC 2544 frame
//! of 64 bytes is our 60. Gbit/s counts the ring's bytes alone: no FCS, preamble or gap.

mod bare;
pub mod cost;
pub mod cpu;
pub mod dreamwire;
pub mod end;
pub mod frame;
pub mod idle;
mod in_flight;
pub mod latency;
#[cfg(test)]
mod loopback;
pub mod sink;
pub mod tap;
pub mod testpmd;
pub mod throughput;
pub mod vxlan;

use std::path::PathBuf;

pub use dreamwire::Dreamwire;
pub use end::End;
pub use frame::{Endpoint, FlowSet};
pub(crate) use in_flight::LIMITED_BYTES;
pub use latency::{Latencies, LatencySummary};
pub use sink::Sink;
pub use tap::{Receiveq, Tap};
pub use testpmd::Testpmd;
pub use throughput::{Failure, Plan, Round, Tunnel};
pub use vxlan::Outer;

/// What is measured: anything that carries frames from one vhost-user socket to another.
#[derive(Clone, Debug)]
pub struct DeviceUnderTest {
    /// Socket of the port that frames go into.
    pub from: PathBuf,
    /// Socket of the port where they should come out.
    pub to: PathBuf,
    /// It connects to these sockets instead of listening there.
    pub is_client: bool,
}
