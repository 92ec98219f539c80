//! The Linux kernel's vxlan device in a namespace: the peer that says whether our tunnels are anyone else's.

use std::net::IpAddr;
use std::time::Duration;

use super::{Frame, FrameFilter, Netns, PacketSocket, TopologyError};

/// Port of VXLAN (RFC 7348, section 5).
pub const VXLAN_PORT: u16 = 4789;

/// What to make.
#[derive(Debug, Clone)]
pub struct KernelVxlanSpec<'a> {
    /// VXLAN network identifier.
    pub vni: u32,
    /// This end's address on the underlay.
    pub local: IpAddr,
    /// Where frames without a known destination go; none: nowhere until [`KernelVxlan::add_remote`].
    pub remote: Option<IpAddr>,
    /// Whether sources of what arrives are learned.
    pub learning: bool,
    /// Outer UDP port.
    pub port: u16,
    /// MTU inside. The device itself would take less where the underlay is small.
    pub mtu: u32,
    /// Addresses of the device, with prefix lengths.
    pub addresses: &'a [&'a str],
    /// Further words for `ip link add ... type vxlan`, such as `udpcsum`.
    pub options: &'a [&'a str],
}

impl KernelVxlanSpec<'_> {
    /// Learning, port 4789, MTU 1500, no addresses.
    #[must_use]
    pub fn new(vni: u32, local: IpAddr, remote: Option<IpAddr>) -> Self {
        Self { vni, local, remote, learning: true, port: VXLAN_PORT, mtu: 1500, addresses: &[], options: &[] }
    }
}

/// A vxlan device that is up, with a raw socket on it.
#[derive(Debug)]
pub struct KernelVxlan<'a> {
    netns: &'a Netns,
    interface: String,
    socket: PacketSocket,
}

impl<'a> KernelVxlan<'a> {
    /// Makes the device. It is not bound to an underlay interface: the route decides, and outer packets may be fragmented.
    ///
    /// # Errors
    /// When the kernel has no vxlan, or the namespace has a device of that VNI and port already.
    pub fn new(netns: &'a Netns, spec: &KernelVxlanSpec<'_>) -> Result<Self, TopologyError> {
        let interface = format!("vxlan{}", spec.vni);
        let (vni, local) = (spec.vni.to_string(), spec.local.to_string());
        let (port, mtu) = (spec.port.to_string(), spec.mtu.to_string());
        let remote = spec.remote.map(|remote| remote.to_string());
        let mut words = vec!["link", "add", &interface, "mtu", &mtu, "type", "vxlan"];
        words.extend(["id", &vni, "local", &local, "dstport", &port]);
        if let Some(remote) = &remote {
            words.extend(["remote", remote]);
        }
        words.push(if spec.learning { "learning" } else { "nolearning" });
        words.extend(spec.options);
        netns.run("ip", words)?;
        // Raw readers and writers want frames as they are on a wire.
        netns.disable_offloads(&interface)?;
        netns.add_addresses(&interface, spec.addresses)?;
        netns.run("ip", ["link", "set", &interface, "up"])?;
        let socket = netns.packet_socket(&interface)?;
        Ok(Self { netns, interface, socket })
    }

    /// Name of the device.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The namespace it is in.
    #[must_use]
    pub fn netns(&self) -> &'a Netns {
        self.netns
    }

    /// Its own MAC address.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn mac(&self) -> Result<String, TopologyError> {
        let path = format!("/sys/class/net/{}/address", self.interface);
        Ok(self.netns.run("cat", [path])?.trim().to_owned())
    }

    /// Sends frames to `mac` to another tunnel end; the all-zero address adds to the flood list.
    ///
    /// # Errors
    /// When the device is gone or the entry exists.
    pub fn add_remote(&self, mac: &str, remote: IpAddr) -> Result<(), TopologyError> {
        let (remote, interface) = (remote.to_string(), self.interface.as_str());
        self.netns.run("bridge", ["fdb", "append", mac, "dev", interface, "dst", &remote]).map(drop)
    }

    /// The kernel's table of MAC addresses and tunnel ends, as `bridge fdb show` prints it.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn fdb(&self) -> Result<String, TopologyError> {
        self.netns.run("bridge", ["fdb", "show", "dev", &self.interface])
    }

    /// Puts an inner frame into the tunnel.
    ///
    /// # Errors
    /// When it is longer than the MTU allows.
    pub fn send(&self, frame: &[u8]) -> Result<(), TopologyError> {
        self.socket.send(frame)
    }

    /// Takes inner frames that came out of the tunnel, since the device was made or since the last call.
    ///
    /// # Errors
    /// When the device is gone.
    pub fn receive(&self, filter: &FrameFilter, count: usize, limit: Duration) -> Result<Vec<Frame>, TopologyError> {
        self.socket.receive(filter, count, limit)
    }
}
