//! The kernel as a device: two taps on a bridge in a network namespace, for a tunnel one tap on a bridge with a vxlan device whose
//! underlay is the other tap.
//!
//! What is measured includes a system call per frame at either end, each with a copy, on the harness's core: that is how QEMU
//! serves a tap without vhost-net. Bridge, vxlan device and IP stack run on the device's core, where receive packet steering
//! (RPS) sends every frame that is written; without it all of the kernel's work would be done in the generator's write(2).
//! The vxlan device sends without UDP checksums (`noudpcsum`), as dreamwire and OVS do over IPv4: it would make them in software.
//! There is nothing to be stopped while others are measured: it does nothing without frames.

use super::CompareError;
use super::device::{OUTER, Site, UNDERLAY_MTU, VM_MTU, mac_text};
use super::lane::{Case, Way};
use crate::topology::{Netns, TopologyError, VXLAN_PORT};
use crate::traffic::{Receiveq, Tap};

const VXLAN: &str = "vxlan0";

/// Builds it: the namespace that holds it, and both ends.
pub(super) fn start(case: &Case, site: &Site) -> Result<(Netns, [Tap; 2]), CompareError> {
    if case.stateful || case.guard || case.ports > 2 || case.packed || case.rewrite {
        let what = "taps have no rings, and neither rules, a source guard nor idle ports are set up for it".into();
        return Err(CompareError::Cannot { device: "kernel".into(), what });
    }
    let netns = Netns::new("kernel")?;
    // It would send of its own accord, and be counted as foreign frames.
    netns.sh("for file in /proc/sys/net/ipv6/conf/*/disable_ipv6; do echo 1 >$file; done")?;
    // ip-link(8) takes a plain "a" for "address".
    let names = case.end_names().map(|name| format!("tap-{name}"));
    let names = names.each_ref().map(String::as_str);
    for name in names {
        netns.add_tap(name, 1)?;
        netns.sh(&format!("ip link set {name} mtu {VM_MTU}"))?;
        steer(&netns, name, site.peer_cpu)?;
    }
    match case.way {
        Way::VmToVm => netns.add_bridge("br0", &names)?,
        Way::Encap => tunnel(&netns, names[0], names[1])?,
        Way::Decap => tunnel(&netns, names[1], names[0])?,
    }
    let receiveq = Receiveq { buffers: case.ring, buffer_bytes: case.rx_buffer_bytes() };
    let open =
        |name| -> Result<Tap, CompareError> { Ok(netns.enter(|| Tap::open(name, case.is_segmented(), receiveq))??) };
    let taps = [open(names[0])?, open(names[1])?];
    Ok((netns, taps))
}

/// Has what comes out of an interface processed on `cpu`.
fn steer(netns: &Netns, interface: &str, cpu: usize) -> Result<(), TopologyError> {
    // Words of 32 bits, the highest first.
    let mask = format!("{:x}{}", 1_u32 << (cpu % 32), ",00000000".repeat(cpu / 32));
    netns.sh(&format!("echo {mask} >/sys/class/net/{interface}/queues/rx-0/rps_cpus")).map(drop)
}

fn tunnel(netns: &Netns, vm: &str, underlay: &str) -> Result<(), TopologyError> {
    let (local, remote, vni) = (OUTER.from, OUTER.to, OUTER.vni);
    netns.sh(&format!(
        "ip link set {underlay} address {} mtu {UNDERLAY_MTU} &&
         ip address add {}/24 dev {underlay} &&
         ip neighbour add {} lladdr {} dev {underlay} nud permanent &&
         ip link add {VXLAN} mtu {VM_MTU} type vxlan id {vni} local {} remote {} dstport {VXLAN_PORT} noudpcsum",
        mac_text(local.mac),
        local.address,
        remote.address,
        mac_text(remote.mac),
        local.address,
        remote.address,
    ))?;
    netns.add_bridge("br0", &[vm, VXLAN])
}
