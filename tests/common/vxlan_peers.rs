//! A host with a daemon, and two more with the Linux kernel's vxlan device, on one underlay.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use dreamwire_bench::topology::{KernelVxlan, KernelVxlanSpec, Netns, VXLAN_PORT, VethEnd};

/// The network's identifier, as in `tunnel_config`.
pub(crate) const VNI: u32 = 100;
/// VXLAN header with the I flag (RFC 7348, section 5).
const FLAGS: [u8; 4] = [0x08, 0, 0, 0];

/// Addresses of the underlay: the daemon's, the two peers', and one on the first peer that no network knows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Underlay {
    pub(crate) daemon: &'static str,
    pub(crate) peers: [&'static str; 2],
    pub(crate) stranger: &'static str,
    pub(crate) prefix: u8,
}

pub(crate) const IPV4: Underlay =
    Underlay { daemon: "192.0.2.1", peers: ["192.0.2.2", "192.0.2.3"], stranger: "192.0.2.66", prefix: 24 };
pub(crate) const IPV6: Underlay =
    Underlay { daemon: "2001:db8::1", peers: ["2001:db8::2", "2001:db8::3"], stranger: "2001:db8::66", prefix: 64 };

/// The daemon's host.
pub(crate) struct Hosts {
    pub(crate) daemon: Netns,
    pub(crate) peers: [Netns; 2],
}

impl Hosts {
    /// A bridge in the daemon's host joins all three.
    pub(crate) fn join(underlay: Underlay) -> Self {
        let hosts = Self {
            daemon: Netns::new("host").unwrap(),
            peers: [Netns::new("peer1").unwrap(), Netns::new("peer2").unwrap()],
        };
        let long = |address: &str| format!("{address}/{}", underlay.prefix);
        for (index, peer) in hosts.peers.iter().enumerate() {
            let (there, here) = (long(underlay.peers[index]), format!("peer{index}"));
            let ends = [
                VethEnd { netns: &hosts.daemon, interface: &here, addresses: &[] },
                VethEnd { netns: peer, interface: "eth1", addresses: &[&there] },
            ];
            Netns::join(ends, 1600).unwrap();
            peer.disable_offloads("eth1").unwrap();
        }
        hosts.peers[0].add_addresses("eth1", &[&long(underlay.stranger)]).unwrap();
        hosts.daemon.add_bridge("br0", &["peer0", "peer1"]).unwrap();
        hosts.daemon.add_addresses("br0", &[&long(underlay.daemon)]).unwrap();
        hosts
    }

    /// The kernel's device on each peer; the first has `addresses`.
    pub(crate) fn devices<'a>(
        &'a self,
        underlay: Underlay,
        mtu: u32,
        addresses: &'a [&'a str],
    ) -> [KernelVxlan<'a>; 2] {
        [0, 1].map(|index| {
            let mut spec = KernelVxlanSpec::new(VNI, ip(underlay.peers[index]), Some(ip(underlay.daemon)));
            spec.mtu = mtu;
            if index == 0 {
                spec.addresses = addresses;
            }
            KernelVxlan::new(&self.peers[index], &spec).unwrap()
        })
    }

    /// Sends datagrams to the daemon's VXLAN port from an address of the first peer.
    pub(crate) fn send_datagrams(&self, underlay: Underlay, from: &str, datagrams: &[Vec<u8>]) {
        let target = SocketAddr::new(ip(underlay.daemon), VXLAN_PORT);
        self.peers[0]
            .enter(|| {
                let socket = UdpSocket::bind((ip(from), 0)).unwrap();
                socket.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
                for datagram in datagrams {
                    socket.send_to(datagram, target).unwrap();
                }
            })
            .unwrap();
    }
}

/// A VXLAN header and what it carries.
pub(crate) fn vxlan(vni: u32, inner: &[u8]) -> Vec<u8> {
    [&FLAGS[..], &(vni << 8).to_be_bytes(), inner].concat()
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
