//! A site: the guest under test, and its peer on the other side of a bridge or of a tunnel.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use super::peer::Peer;
use crate::topology::{
    BOOT_LIMIT, Daemon, DaemonSpec, Guest, GuestSpec, Netns, Nic, Output, TopologyError, VethEnd, Wire,
};

pub(super) const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
pub(super) const PEER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
pub(super) const GUEST_ADDRESSES: [&str; 2] = ["10.0.0.1/24", "fd00::1/64"];
pub(super) const PEER_ADDRESSES: [&str; 2] = ["10.0.0.2/24", "fd00::2/64"];

/// Carries 1500 bytes inside VXLAN over IPv4 without fragments.
const UNDERLAY_MTU: u32 = 1550;
/// How long a card may take to see its link.
const LINK_LIMIT: Duration = Duration::from_secs(10);
/// How long a command in the guest may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);

/// What the guest's card is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A tap device on a Linux bridge, as QEMU does it by itself.
    Tap,
    /// A dreamwire daemon with a tunnel.
    Dreamwire,
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tap => "tap",
            Self::Dreamwire => "dreamwire",
        })
    }
}

/// A booted guest with everything around it. Fields are dropped in this order: the guest must not see its wire go.
#[derive(Debug)]
pub struct Site {
    kind: Kind,
    pub(super) guest: Guest,
    pub(super) peer: Peer,
    _daemon: Option<Daemon>,
    pub(super) host: Netns,
}

impl Site {
    /// Puts it up and boots the guest; `binary` is the `dreamwire` program.
    ///
    /// # Errors
    /// When a part cannot be made or the guest does not boot.
    pub fn start(kind: Kind, binary: &Path) -> Result<Self, TopologyError> {
        let host = Netns::new(&format!("{kind}-host"))?;
        let peer_netns = Netns::new(&format!("{kind}-peer"))?;
        let (daemon, wire) = match kind {
            Kind::Tap => (None, tap(&host, &peer_netns)?),
            Kind::Dreamwire => {
                let daemon = dreamwire(&host, &peer_netns, binary)?;
                let socket = daemon.path("vm1.sock");
                (Some(daemon), Wire::VhostUser(socket))
            }
        };
        let peer = Peer::new(peer_netns)?;
        let mut nic = Nic::new(wire, "52:54:00:00:00:01");
        nic.addresses.extend(GUEST_ADDRESSES.map(str::to_owned));
        let guest = Guest::boot(&GuestSpec::new("eth0-test").inside(&host).nic(nic))?;
        guest.wait_link("eth0", LINK_LIMIT)?;
        Ok(Self { kind, guest, peer, _daemon: daemon, host })
    }

    /// Which it is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Standard output of a line of shell in the guest, with its standard error behind it; whatever its exit code.
    pub(super) fn ask(&self, line: &str) -> Result<String, TopologyError> {
        let output = self.try_sh(line)?;
        Ok(format!("{}{}", output.stdout, output.stderr))
    }

    /// "ok", or the exit code and first line of error of a line of shell in the guest.
    pub(super) fn outcome(&self, line: &str) -> Result<String, TopologyError> {
        let output = self.try_sh(line)?;
        if output.success() {
            return Ok("ok".to_owned());
        }
        let words = output.stderr.lines().chain(output.stdout.lines()).next().unwrap_or_default();
        let code = output.code.map_or("a signal".to_owned(), |code| code.to_string());
        Ok(format!("failed ({code}): {words}"))
    }

    fn try_sh(&self, line: &str) -> Result<Output, TopologyError> {
        self.guest.run(&["sh", "-c", line], COMMAND_LIMIT)
    }
}

/// The reference: a bridge with the guest's tap and the peer's cable in it.
fn tap(host: &Netns, peer: &Netns) -> Result<Wire, TopologyError> {
    let cable = [
        VethEnd { netns: host, interface: "cable", addresses: &[] },
        VethEnd { netns: peer, interface: Peer::INTERFACE, addresses: &[] },
    ];
    Netns::join(cable, 1500)?;
    host.add_tap("tap1", 1)?;
    host.add_bridge("br0", &["tap1", "cable"])?;
    // The bridge's end cuts and finishes what the guest left to its card, as a physical card there would.
    host.disable_offloads("cable")?;
    // Reserved addresses pass as over a wire, all that a bridge can be told to (not pause); IEEE 802.1D says to keep them.
    for port in ["tap1", "cable"] {
        host.sh(&format!("ip link set {port} type bridge_slave group_fwd_mask 0xfffd"))?;
    }
    // With br_netfilter a bridge parses IP, drops what is broken and cuts what trails.
    host.sh("for file in /proc/sys/net/bridge/bridge-nf-call-*; do [ ! -e $file ] || echo 0 >$file; done")?;
    // The host itself stays silent.
    host.sh("for name in br0 tap1 cable; do echo 1 >/proc/sys/net/ipv6/conf/$name/disable_ipv6; done")?;
    Ok(Wire::Tap("tap1".to_owned()))
}

/// dreamwire on this host, the kernel's vxlan device as the peer's card on the other.
fn dreamwire(host: &Netns, peer: &Netns, binary: &Path) -> Result<Daemon, TopologyError> {
    let underlay = [
        VethEnd { netns: host, interface: "eth1", addresses: &["192.0.2.1/24"] },
        VethEnd { netns: peer, interface: "eth1", addresses: &["192.0.2.2/24"] },
    ];
    Netns::join(underlay, UNDERLAY_MTU)?;
    // A wire carries datagrams with finished checksums, one by one.
    host.disable_offloads("eth1")?;
    peer.disable_offloads("eth1")?;
    let words = "ip link add peer0 mtu 1500 type vxlan id 100 local 192.0.2.2 remote 192.0.2.1 dstport 4789 learning";
    peer.sh(words)?;
    // Neither MAC nor addresses are configured: a guarded guest may do less than one on a bridge, and means to.
    let config = format!(
        "[daemon]\nrun_dir = \"{{run_dir}}\"\n\
         [[underlay]]\nname = \"fabric\"\naddress = \"192.0.2.1\"\nmtu = {UNDERLAY_MTU}\n\
         [[network]]\nname = \"blue\"\nvni = 100\nunderlay = \"fabric\"\nmtu = 1500\nremotes = [\"192.0.2.2\"]\n\
         [[port]]\nname = \"vm1\"\nnetwork = \"blue\"\nsocket = \"{{run_dir}}/vm1.sock\"\n"
    );
    Daemon::start(&DaemonSpec { name: "dreamwire", binary, netns: Some(host), config: &config })
}

// A site that boots slower than this has failed in the topology already.
const _: () = assert!(LINK_LIMIT.as_secs() < BOOT_LIMIT.as_secs());
