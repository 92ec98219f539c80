//! Network namespaces as hosts of a small network: made and removed here, joined by veth pairs.

use std::ffi::OsStr;
use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

use super::cleanup::{NAME_PREFIX, NETNS_DIR, Owned, Resource, remove_leftovers};
use super::error::during;
use super::{PacketSocket, TopologyError};

/// A named network namespace with its loopback up; removed when dropped, with every interface in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    _owned: Owned,
}

/// One end of a [`Netns::join`].
#[derive(Debug, Clone, Copy)]
pub struct VethEnd<'a> {
    /// The namespace it is in.
    pub netns: &'a Netns,
    /// The interface's name there.
    pub interface: &'a str,
    /// Its addresses with prefix lengths, IPv4 and IPv6.
    pub addresses: &'a [&'a str],
}

impl Netns {
    /// Makes one. `label` is for people who look; the name is unique to this process.
    ///
    /// # Errors
    /// Without root's rights.
    pub fn new(label: &str) -> Result<Self, TopologyError> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remove_leftovers();
        // Relaxed: only distinct numbers are needed.
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{NAME_PREFIX}{}-{number}-{label}", std::process::id());
        host_command("ip", ["netns", "add", &name])?;
        let netns = Self { _owned: Owned::new(Resource::Netns(name.clone())), name };
        netns.run("ip", ["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// The name that `ip netns` knows.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a command inside and gives its standard output.
    ///
    /// # Errors
    /// When it cannot be started or fails; the error has its output.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<String, TopologyError> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).args(arguments);
        output_of(command)
    }

    /// Runs a command line inside, split at blanks: `netns.sh("ip link set eth1 up")`.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn sh(&self, line: &str) -> Result<String, TopologyError> {
        self.run("sh", ["-c", line])
    }

    /// Calls `action` in a thread that has entered the namespace: sockets it opens stay there wherever they are used.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    ///
    /// # Panics
    /// When `action` does.
    pub fn enter<T: Send>(&self, action: impl FnOnce() -> T + Send) -> Result<T, TopologyError> {
        let path = format!("{NETNS_DIR}/{}", self.name);
        let entering = || format!("enter {}", self.name);
        let file = File::open(&path).map_err(during(entering))?;
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    setns(&file, CloneFlags::CLONE_NEWNET).map_err(during(entering))?;
                    Ok(action())
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A raw socket on one of its interfaces.
    ///
    /// # Errors
    /// As [`PacketSocket::open`].
    pub fn packet_socket(&self, interface: &str) -> Result<PacketSocket, TopologyError> {
        self.enter(|| PacketSocket::open(interface))?
    }

    /// Joins two namespaces (or one with itself) by a veth pair, both ends up and addressed.
    ///
    /// # Errors
    /// When a name is taken or an address is none.
    pub fn join(ends: [VethEnd<'_>; 2], mtu: u32) -> Result<(), TopologyError> {
        let [a, b] = ends;
        let mtu = mtu.to_string();
        host_command(
            "ip",
            [
                "link",
                "add",
                a.interface,
                "mtu",
                &mtu,
                "netns",
                &a.netns.name,
                "type",
                "veth",
                "peer",
                "name",
                b.interface,
                "mtu",
                &mtu,
                "netns",
                &b.netns.name,
            ],
        )?;
        for end in ends {
            end.netns.add_addresses(end.interface, end.addresses)?;
        }
        for end in ends {
            end.netns.run("ip", ["link", "set", end.interface, "up"])?;
        }
        Ok(())
    }

    /// Adds addresses; IPv6 ones are usable at once (no duplicate address detection).
    ///
    /// # Errors
    /// When an address is none, or the interface does not exist.
    pub fn add_addresses(&self, interface: &str, addresses: &[&str]) -> Result<(), TopologyError> {
        for address in addresses {
            let mut arguments = vec!["address", "add", address, "dev", interface];
            if address.contains(':') {
                arguments.push("nodad");
            }
            self.run("ip", arguments)?;
        }
        Ok(())
    }

    /// Makes an interface hand over frames as they are on a wire: no checksums left open, none longer than the MTU.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn disable_offloads(&self, interface: &str) -> Result<(), TopologyError> {
        let features = ["rx", "tx", "tso", "gso", "gro"];
        let mut arguments = vec!["-K", interface];
        arguments.extend(features.iter().flat_map(|feature| [*feature, "off"]));
        self.run("ethtool", arguments).map(drop)
    }

    /// A bridge with these interfaces in it: the plain network that a guest on tap devices has.
    ///
    /// # Errors
    /// When a name is taken or an interface does not exist.
    pub fn add_bridge(&self, bridge: &str, members: &[&str]) -> Result<(), TopologyError> {
        self.run("ip", ["link", "add", bridge, "up", "type", "bridge", "mcast_snooping", "0"])?;
        for member in members {
            self.run("ip", ["link", "set", member, "up", "master", bridge])?;
        }
        Ok(())
    }

    /// A tap device for QEMU, with as many queues as the guest has.
    ///
    /// # Errors
    /// When the name is taken.
    pub fn add_tap(&self, interface: &str, queues: u16) -> Result<(), TopologyError> {
        let mut arguments = vec!["tuntap", "add", "dev", interface, "mode", "tap", "vnet_hdr"];
        if queues > 1 {
            arguments.push("multi_queue");
        }
        self.run("ip", arguments)?;
        self.run("ip", ["link", "set", interface, "up"]).map(drop)
    }
}

/// Runs a command on the host and gives its standard output.
///
/// # Errors
/// When it cannot be started or fails; the error has its output.
pub(super) fn host_command<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
) -> Result<String, TopologyError> {
    let mut command = Command::new(program);
    command.args(arguments);
    output_of(command)
}

pub(super) fn output_of(mut command: Command) -> Result<String, TopologyError> {
    let line = format!("{command:?}").replace('"', "");
    let output = command.output().map_err(during(|| line.clone()))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(TopologyError::Command {
        command: line,
        status: output.status.to_string(),
        output: format!("{stdout}{stderr}").trim().to_owned(),
    })
}
