//! Topologies: network namespaces as hosts, guests under QEMU, daemons, and the kernel's own vxlan device as a peer.
//!
//! # Theory of operation
//! Everything is an owned value that is taken away when it is dropped, also while a panic unwinds: a [`Netns`] with its
//! interfaces, a [`Guest`] with its QEMU, a [`Daemon`] with its run directory. Whoever is panicking prints the end of its log
//! first. Programs that can be interrupted call [`clean_up_on_signals`]; processes also die with this one when it is killed
//! (`PR_SET_PDEATHSIG`), and what is then left of names and directories the next process sweeps up, for each has its maker's
//! pid in its name.
//!
//! A guest is asked through an agent inside it (`dreamwire-guest`), over a virtio-serial port and not over the network under
//! test. Raw frames are sent and captured as bytes, hashes of bytes for long lists; [`Guest::probe`] measures the longest
//! pause. No test needs to sleep: [`wait_until`] looks at a condition until a deadline.
//!
//! Root, QEMU and the image of `scripts/guest-image` are needed: a test asks [`available`] first.
//!
//! ```no_run
//! use dreamwire_bench::topology::*;
//! use std::{path::Path, time::Duration};
//!
//! # fn main() -> Result<(), TopologyError> {
//! if !available(Needs::Guests) {
//!     return Ok(());
//! }
//! let (host, peer) = (Netns::new("host")?, Netns::new("peer")?);
//! let end = |netns, addresses| VethEnd { netns, interface: "eth1", addresses };
//! Netns::join([end(&host, &["192.0.2.1/24"]), end(&peer, &["192.0.2.2/24"])], 1600)?;
//! let daemon = Daemon::start(&DaemonSpec {
//!     name: "dreamwire",
//!     binary: Path::new("target/debug/dreamwire"), // in a test of the root package: env!("CARGO_BIN_EXE_dreamwire")
//!     netns: Some(&host),
//!     config: "[daemon]\nrun_dir = \"{run_dir}\"\n",
//! })?;
//! let kernel = KernelVxlan::new(&peer, &KernelVxlanSpec {
//!     addresses: &["10.0.0.2/24"],
//!     ..KernelVxlanSpec::new(100, [192, 0, 2, 2].into(), Some([192, 0, 2, 1].into()))
//! })?;
//! let nic = Nic::new(Wire::VhostUser(daemon.path("vm1.sock")), "52:54:00:00:00:01").address("10.0.0.1/24");
//! let guest = Guest::boot(&GuestSpec::new("vm1").nic(nic))?;
//! guest.wait_link("eth0", Duration::from_secs(5))?;
//! assert!(guest.ping("10.0.0.2", 3)?);
//! guest.send_pattern("eth0", &FramePattern::new(&[0xff; 14], &[60, 1514]))?;
//! assert_eq!(kernel.receive(&FrameFilter::any().destination([0xff; 6]), 2, Duration::from_secs(5))?.len(), 2);
//! # Ok(())
//! # }
//! ```

mod accelerator;
mod agent_client;
mod agent_protocol;
mod available;
mod background;
mod child;
mod cleanup;
mod daemon;
mod error;
mod frame;
mod guest;
mod guest_agent;
mod guest_spec;
pub mod hex;
mod http;
mod kernel_vxlan;
mod migration;
mod netns;
pub mod ovs;
mod packet_socket;
mod probe;
mod qmp;
#[cfg(test)]
mod self_test;
mod wait;

pub use accelerator::Accelerator;
pub use agent_protocol::{AGENT_PORT_NAME, ECHO_PORT, Output, ProbeReport};
pub use available::{Needs, available, missing, skip};
pub use background::{Capture, RunningProbe};
pub use cleanup::{clean_up, clean_up_on_signals};
pub use daemon::{Daemon, DaemonSpec};
pub use error::TopologyError;
pub use frame::{FieldMatch, Frame, FrameDigest, FrameFilter, FramePattern};
pub use guest::{BOOT_LIMIT, Guest};
pub use guest_agent::serve as serve_guest_agent;
pub use guest_spec::{GuestImage, GuestSpec, Nic, Wire};
pub use http::{HttpAnswer, http_get};
pub use kernel_vxlan::{KernelVxlan, KernelVxlanSpec, VXLAN_PORT};
pub use migration::MigrationReport;
pub use netns::{Netns, VethEnd};
pub use ovs::{Ovs, OvsSpec, OvsTunnel};
pub use packet_socket::PacketSocket;
pub use probe::{Probe, serve_echo};
pub use qmp::Qmp;
pub use wait::wait_until;
