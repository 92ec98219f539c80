//! The guest's only neighbour: `peer0` in a namespace of its own, the same at both sites but for what is under it.

use std::time::Duration;

use super::site::PEER_ADDRESSES;
use crate::topology::{Frame, FrameFilter, Netns, PacketSocket, TopologyError};

/// Pause between two frames towards the guest: an emulated guest with a ring of 256 must keep up on a loaded machine.
const GAP: Duration = Duration::from_micros(300);

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) netns: Netns,
}

impl Peer {
    pub(super) const INTERFACE: &str = "peer0";

    /// Addresses the interface, which exists already, and brings it up.
    pub(super) fn new(netns: Netns) -> Result<Self, TopologyError> {
        let name = Self::INTERFACE;
        // Down: its link-local address comes from the one it has when it goes up.
        netns.sh(&format!("ip link set {name} down address 52:54:00:00:00:02"))?;
        netns.disable_offloads(name)?;
        netns.add_addresses(name, &PEER_ADDRESSES)?;
        netns.sh("echo 0 >/proc/sys/net/ipv4/icmp_echo_ignore_broadcasts; echo 1 >/proc/sys/net/ipv4/tcp_ecn")?;
        // Answers to the raw frames of a test must not run dry.
        netns.sh("echo 0 >/proc/sys/net/ipv4/icmp_ratelimit; echo 0 >/proc/sys/net/ipv6/icmp/ratelimit")?;
        netns.sh(&format!("ip link set {name} up"))?;
        Ok(Self { netns })
    }

    /// A raw socket that hears from now on. A new one each time: one that saw the link go down has an error to report.
    pub(super) fn listen(&self) -> Result<PacketSocket, TopologyError> {
        self.netns.packet_socket(Self::INTERFACE)
    }

    /// Sends frames to the guest at a pace that it can follow.
    pub(super) fn send(&self, frames: &[Vec<u8>]) -> Result<(), TopologyError> {
        let socket = self.listen()?;
        for frame in frames {
            socket.send(frame)?;
            std::thread::sleep(GAP);
        }
        Ok(())
    }

    /// Sends one frame and gives what comes back that matches: a first answer within `first`, a second within `again`.
    pub(super) fn ask(
        &self,
        frame: &[u8],
        answer: &FrameFilter,
        first: Duration,
        again: Duration,
    ) -> Result<Vec<Frame>, TopologyError> {
        let listening = self.listen()?;
        listening.send(frame)?;
        let mut answers = listening.receive(answer, 1, first)?;
        answers.extend(listening.receive(answer, 1, again)?);
        Ok(answers)
    }

    /// Segmentation and checksums left to the interface, as between guests of one host, or done before it.
    pub(super) fn set_offloads(&self, on: bool) -> Result<(), TopologyError> {
        if !on {
            return self.netns.disable_offloads(Self::INTERFACE);
        }
        let on = ["-K", Self::INTERFACE, "tx", "on", "tso", "on", "gso", "on"];
        self.netns.run("ethtool", on).map(drop)
    }
}
