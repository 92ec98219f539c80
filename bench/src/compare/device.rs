//! A lane's device: started for its case, and stopped in the middle of whatever it does while others are measured.
//!
//! A peer that polls burns its core while it waits, so everyone but the one that is measured gets SIGSTOP. The device's clock
//! goes on meanwhile: what it forgets by age, such as OVS's flows after 10 s, it has to learn again when a window begins, which is
//! why windows begin with a time that does not count.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::CompareError;
use super::kernel;
use super::lane::{Case, Lane, Way};
use crate::front_end::{FrontEnd, Options};
use crate::topology::{self, Needs, Netns, Ovs, OvsSpec, OvsTunnel};
use crate::traffic::frame::{DESTINATION_PORTS, FLOWS_MAX};
use crate::traffic::testpmd::TestpmdOptions;
use crate::traffic::{DeviceUnderTest, Dreamwire, End, Endpoint, Outer, Tap, Testpmd, Tunnel, dreamwire};

/// The VMs, sender first.
pub(super) const VMS: [Endpoint; 2] = [
    Endpoint { mac: [0x52, 0x54, 0, 0, 0, 1], address: Ipv4Addr::new(10, 0, 0, 1) },
    Endpoint { mac: [0x52, 0x54, 0, 0, 0, 2], address: Ipv4Addr::new(10, 0, 0, 2) },
];
/// From the device's end of the tunnel to the harness's (RFC 5737's addresses).
pub(super) const OUTER: Outer = Outer {
    from: Endpoint { mac: [2, 0, 0, 0, 0, 1], address: Ipv4Addr::new(192, 0, 2, 1) },
    to: Endpoint { mac: [2, 0, 0, 0, 0, 2], address: Ipv4Addr::new(192, 0, 2, 2) },
    vni: 100,
};
/// "1518" are an Ethernet header and 1504 bytes.
pub(super) const VM_MTU: u32 = 1504;
/// As a Linux guest takes frames to be segmented: buffers of a page, put together (MRG_RXBUF).
const SEGMENTED_RX_BYTES: usize = 4096;
/// Connections of a port at most: dreamwire's limit.
pub(super) const CONNECTIONS: usize = 1 << 20;
/// That inside needs 1554.
pub(super) const UNDERLAY_MTU: u32 = 1600;

/// Where everything runs.
#[derive(Clone, Debug)]
pub struct Site {
    /// CPU of the harness.
    pub cpu: usize,
    /// CPU of the devices' forwarding threads.
    pub peer_cpu: usize,
    /// Further daemons: name and program.
    pub binaries: Vec<(String, PathBuf)>,
}

/// A running device; it ends when dropped.
#[derive(Debug)]
pub(super) struct Device {
    peer: Peer,
    ends: Ends,
    /// Ports on which nothing happens.
    bystanders: Vec<PathBuf>,
}

#[derive(Debug)]
enum Peer {
    Dreamwire(Dreamwire),
    Testpmd(Testpmd),
    Ovs(Ovs),
    Kernel { _netns: Netns },
}

/// Where frames go in and come out.
#[derive(Debug)]
enum Ends {
    Sockets(DeviceUnderTest),
    /// Until they are taken.
    Taps(Option<[Tap; 2]>),
}

impl Case {
    /// What comes in or goes out at the physical NIC.
    pub(super) fn tunnel(&self) -> Option<Tunnel> {
        match self.way {
            Way::VmToVm => None,
            Way::Encap => Some(Tunnel::Encapsulate(OUTER)),
            Way::Decap => Some(Tunnel::Decapsulate(OUTER.reversed())),
        }
    }

    /// Of the buffers that frames are received into.
    pub(super) fn rx_buffer_bytes(&self) -> usize {
        if self.is_segmented() { SEGMENTED_RX_BYTES } else { Options::default().rx_buffer_bytes }
    }

    /// Names of the VM ports: the busy ones `a` and `b`, of which the tunnel replaces one.
    fn vm_ports(&self) -> Vec<String> {
        let busy: &[&str] = match self.way {
            Way::VmToVm => &["a", "b"],
            Way::Encap => &["a"],
            Way::Decap => &["b"],
        };
        busy.iter()
            .map(|name| (*name).to_owned())
            .chain((3..=self.ports).map(|number| format!("idle{number}")))
            .collect()
    }

    /// Names of the ports where frames go in and come out.
    pub(super) fn end_names(&self) -> [&'static str; 2] {
        match self.way {
            Way::VmToVm => ["a", "b"],
            Way::Encap => ["a", "fabric"],
            Way::Decap => ["fabric", "b"],
        }
    }

    fn ends(&self, socket: impl Fn(&str) -> PathBuf, is_client: bool) -> Ends {
        let [from, to] = self.end_names().map(socket);
        Ends::Sockets(DeviceUnderTest { from, to, is_client })
    }
}

impl Device {
    pub(super) fn start(lane: &Lane, site: &Site) -> Result<Self, CompareError> {
        let case = &lane.case;
        let idle = |socket: &dyn Fn(&str) -> PathBuf| {
            case.vm_ports().iter().filter(|name| name.starts_with("idle")).map(|name| socket(name)).collect()
        };
        let cannot = |what: &str| Err(CompareError::Cannot { device: lane.device.clone(), what: what.into() });
        Ok(match lane.device.as_str() {
            "io" | "testpmd" => {
                if case.way != Way::VmToVm || case.stateful || case.guard || case.ports > 2 || case.is_segmented() {
                    return cannot(
                        "testpmd copies from one port to another, and knows neither tunnels, rules, a source guard nor segmentation",
                    );
                }
                let options = TestpmdOptions { cpu: site.peer_cpu, main_cpu: site.cpu, ..TestpmdOptions::default() };
                let peer = Testpmd::start(&std::env::temp_dir(), &options)?;
                let ends = Ends::Sockets(peer.device().clone());
                Self { ends, peer: Peer::Testpmd(peer), bystanders: Vec::new() }
            }
            "kernel" => {
                let (netns, taps) = kernel::start(case, site)?;
                Self { ends: Ends::Taps(Some(taps)), peer: Peer::Kernel { _netns: netns }, bystanders: Vec::new() }
            }
            "ovs" => {
                let peer = start_ovs(case, site)?;
                let socket = |name: &str| peer.socket(name);
                Self { ends: case.ends(socket, true), bystanders: idle(&socket), peer: Peer::Ovs(peer) }
            }
            name => {
                let binary = match site.binaries.iter().find(|(known, _)| known == name) {
                    Some((_, path)) => path.clone(),
                    None if name == "dreamwire" => dreamwire::program(),
                    None => return cannot("there is no such device; --binary NAME=PATH names another daemon"),
                };
                let peer = Dreamwire::start_with(&binary, &configuration(case, site.peer_cpu))?;
                let socket = |name: &str| peer.daemon().path(&format!("{name}.sock"));
                Self { ends: case.ends(socket, false), bystanders: idle(&socket), peer: Peer::Dreamwire(peer) }
            }
        })
    }

    /// Connects to where frames go in and where they come out. Once.
    pub(super) fn connect(&mut self, options: &Options) -> Result<[Box<dyn End>; 2], CompareError> {
        Ok(match &mut self.ends {
            Ends::Taps(taps) => {
                let [from, to] = taps.take().expect("a device is connected to once");
                [Box::new(from), Box::new(to)]
            }
            Ends::Sockets(DeviceUnderTest { from, to, is_client }) => {
                let connect = if *is_client { FrontEnd::listen } else { FrontEnd::connect };
                [Box::new(connect(from, options.clone())?), Box::new(connect(to, options.clone())?)]
            }
        })
    }

    /// Connects to the ports on which nothing happens.
    pub(super) fn attach_bystanders(&self) -> Result<Vec<FrontEnd>, CompareError> {
        let is_client = matches!(&self.ends, Ends::Sockets(DeviceUnderTest { is_client: true, .. }));
        let connect = if is_client { FrontEnd::listen } else { FrontEnd::connect };
        let options = Options { spare_bytes: 0, ..Options::default() };
        self.bystanders.iter().map(|path| Ok(connect(path, options.clone())?)).collect()
    }

    /// It does nothing any more, wherever it stands.
    pub(super) fn pause(&self) -> Result<(), CompareError> {
        self.signal(Signal::SIGSTOP)
    }

    /// It goes on.
    pub(super) fn resume(&self) -> Result<(), CompareError> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<(), CompareError> {
        let pid = match &self.peer {
            Peer::Dreamwire(peer) => Pid::from_raw(peer.daemon().pid().cast_signed()),
            Peer::Testpmd(peer) => Pid::from_raw(peer.pid().cast_signed()),
            Peer::Ovs(peer) => peer.pid(),
            Peer::Kernel { .. } => return Ok(()),
        };
        kill(pid, signal).map_err(CompareError::Signal)
    }
}

fn start_ovs(case: &Case, site: &Site) -> Result<Ovs, CompareError> {
    let (ports, flows) = (case.vm_ports(), if case.stateful { stateful_flows(case.rules) } else { String::new() });
    if case.stateful && case.way != Way::VmToVm {
        return Err(CompareError::Cannot { device: "ovs".into(), what: "rules are set up from VM to VM only".into() });
    }
    if case.guard {
        return Err(CompareError::Cannot { device: "ovs".into(), what: "no source guard is set up".into() });
    }
    let ports: Vec<_> = ports.iter().map(String::as_str).collect();
    let (local, remote) = (OUTER.from, OUTER.to);
    let (local_address, remote_address) = (format!("{}/24", local.address), remote.address.to_string());
    let (local_mac, remote_mac) = (mac_text(local.mac), mac_text(remote.mac));
    let tunnel = OvsTunnel {
        uplink: "fabric",
        vni: OUTER.vni,
        local: (&local_address, &local_mac),
        remote: (&remote_address, &remote_mac),
        mtu: UNDERLAY_MTU,
    };
    Ok(Ovs::start(&OvsSpec {
        cpu: site.peer_cpu,
        main_cpu: site.cpu,
        ports: &ports,
        tso: case.is_segmented(),
        tunnel: (case.way != Way::VmToVm).then_some(tunnel),
        flows: &flows,
    })?)
}

/// Addresses that nobody has (RFC 2544's 198.18.0.0/15), for all rules but one: those match nothing.
fn strangers(rules: usize) -> impl Iterator<Item = Ipv4Addr> {
    let first = u32::from(Ipv4Addr::new(198, 18, 0, 0));
    (first..).take(rules.saturating_sub(1)).map(Ipv4Addr::from)
}

/// A security group as OVN's pipeline has it: the sender's rules in its zone, then the receiver's in its own.
fn stateful_flows(rules: usize) -> String {
    let mut flows = String::from("table=0,priority=10,arp,actions=NORMAL\n");
    // Priority 0 of each table: dropped.
    for (zone, (port, vm)) in (1..).zip(["a", "b"].iter().zip(VMS)) {
        let (mac, ingress) = (mac_text(vm.mac), 10 + zone);
        let mut flow = |text: String| writeln!(flows, "{text}").expect("a string takes all");
        flow(format!("table=0,priority=10,ip,in_port={port},actions=ct(zone={zone},table={zone})"));
        flow(format!("table={zone},priority=10,ip,ct_state=+trk+new-inv,actions=ct(commit,zone={zone}),resubmit(,5)"));
        flow(format!("table={zone},priority=10,ip,ct_state=+trk+est-inv,actions=resubmit(,5)"));
        flow(format!("table=5,priority=10,ip,dl_dst={mac},actions=ct(zone={zone},table={ingress})"));
        for udp_port in DESTINATION_PORTS {
            flow(format!(
                "table={ingress},priority=10,udp,ct_state=+trk+new-inv,tp_dst={udp_port},actions=ct(commit,zone={zone}),{port}"
            ));
        }
        for stranger in strangers(rules) {
            flow(format!(
                "table={ingress},priority=20,udp,ct_state=+trk+new-inv,nw_src={stranger},actions=ct(commit,zone={zone}),{port}"
            ));
        }
        flow(format!("table={ingress},priority=10,ip,ct_state=+trk+est-inv,actions={port}"));
    }
    flows
}

pub(super) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The daemon's configuration for a case. Without rules its ports have no addresses: it learns, as testpmd's and OVS's do.
fn configuration(case: &Case, cpu: usize) -> String {
    let mut text = format!("[daemon]\nrun_dir = \"{{run_dir}}\"\nworkers = [{cpu}]\n");
    let mut add = |line: String| text.push_str(&line);
    if case.way == Way::VmToVm {
        add("[[network]]\nname = \"bench\"\n".into());
    } else {
        let Outer { from, to, vni } = OUTER;
        add(format!(
            "[[underlay]]\nname = \"fabric\"\ndriver = \"vhost-user\"\nsocket = \"{{run_dir}}/fabric.sock\"\n\
             mode = \"server\"\nmac = \"{}\"\naddress = \"{}\"\nmtu = {UNDERLAY_MTU}\n\
             neighbours = [{{ address = \"{}\", mac = \"{}\" }}]\n\
             [[network]]\nname = \"bench\"\nvni = {vni}\nunderlay = \"fabric\"\nremotes = [\"{}\"]\n",
            mac_text(from.mac),
            from.address,
            to.address,
            mac_text(to.mac),
            to.address
        ));
    }
    // Of the network, in either case.
    if case.stateful {
        add("policy = \"enforced\"\n".into());
    }
    for name in case.vm_ports() {
        add(format!("[[port]]\nname = \"{name}\"\nnetwork = \"bench\"\n"));
        if (case.stateful || case.guard) && ["a", "b"].contains(&name.as_str()) {
            let vm = VMS[usize::from(name == "b")];
            add(format!("mac = \"{}\"\n", mac_text(vm.mac)));
            // New flows come from an address of their own in each round, which a source guard would not let out.
            if !case.new_flows {
                add(format!("addresses = [\"{}\"]\n", vm.address));
            }
        }
        if case.stateful {
            // Room for every flow of the case at once, and for those of all windows where every frame is a new one
            // (`Schedule::new_flows_of_a_window`): OVS's conntrack has three million by default.
            let flows = if case.new_flows { FLOWS_MAX } else { case.flows };
            let connections = (2 * flows).clamp(32_768, CONNECTIONS);
            add(format!("groups = [\"bench\"]\nconnections = {connections}\n"));
        }
    }
    if case.stateful {
        let rule = "[[rule]]\ngroup = \"bench\"\ndirection = \"ingress\"\nallow = \"udp\"\n";
        for stranger in strangers(case.rules) {
            add(format!("{rule}from = \"{stranger}/32\"\n"));
        }
        add(format!(
            "[[group]]\nname = \"bench\"\n{rule}\
             ports = \"{}-{}\"\nfrom = \"any\"\n",
            DESTINATION_PORTS.start(),
            DESTINATION_PORTS.end()
        ));
    }
    text
}

/// Whether the lane's device is there to be started.
#[must_use]
pub fn is_installed(lane: &Lane) -> bool {
    match lane.device.as_str() {
        "io" | "testpmd" => crate::traffic::testpmd::is_installed(),
        "ovs" => crate::topology::ovs::is_installed(),
        "kernel" => topology::missing(Needs::Netns).is_none() && Path::new("/dev/net/tun").exists(),
        _ => dreamwire::program().exists() || lane.device != "dreamwire",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_replaces_one_of_the_busy_ports() {
        let case = Case { way: Way::Encap, ports: 3, ..Case::default() };
        let text = configuration(&case, 1);
        assert!(text.contains("name = \"a\"") && text.contains("name = \"idle3\"") && !text.contains("name = \"b\""));
        assert!(!text.contains("enforced"));
        assert_eq!(case.end_names(), ["a", "fabric"]);
    }

    #[test]
    fn both_ports_of_a_security_group_have_a_zone_of_their_own() {
        let flows = stateful_flows(1);
        assert!(flows.contains("table=0,priority=10,ip,in_port=b,actions=ct(zone=2,table=2)"));
        assert!(flows.contains("table=5,priority=10,ip,dl_dst=52:54:00:00:00:02,actions=ct(zone=2,table=12)"));
        assert!(flows.contains("table=12,priority=10,udp,ct_state=+trk+new-inv,tp_dst=9,actions=ct(commit,zone=2),b"));
    }

    #[test]
    fn rules_are_enforced_whichever_way_frames_go() {
        for way in [Way::VmToVm, Way::Encap, Way::Decap] {
            let text = configuration(&Case { way, stateful: true, ..Case::default() }, 1);
            assert_eq!(text.matches("policy = \"enforced\"").count(), 1, "{text}");
            assert!(text.contains("addresses = [\"10.0.0."), "{text}");
        }
    }

    #[test]
    fn a_source_guard_is_there_without_rules() {
        let text = configuration(&Case { guard: true, ..Case::default() }, 1);
        assert!(text.contains("addresses = [\"10.0.0.1\"]") && text.contains("addresses = [\"10.0.0.2\"]"), "{text}");
        assert!(!text.contains("enforced") && !text.contains("groups"), "{text}");
    }

    #[test]
    fn all_rules_but_one_are_about_strangers() {
        let case = Case { stateful: true, rules: 300, ..Case::default() };
        let text = configuration(&case, 1);
        assert_eq!(text.matches("[[rule]]").count(), 300);
        assert!(text.contains("from = \"198.18.1.42/32\"") && text.contains("from = \"any\""));
        assert_eq!(stateful_flows(300).matches("nw_src=").count(), 2 * 299);
    }
}
