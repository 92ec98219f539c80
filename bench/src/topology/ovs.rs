//! OVS-DPDK as a peer: ovsdb-server and ovs-vswitchd in a directory and a network namespace of their own, without huge pages.
//!
//! A bridge `br-int` with vhost-user ports, to whose sockets OVS connects (dpdkvhostuserclient): the harness listens. Bridges
//! need a tap each, which is what the namespace is for. In a tunnel a second bridge `br-phy` has this host's address and a
//! vhost-user port that the harness serves as the physical NIC. Limits: one PMD thread; its other threads sleep, on a CPU
//! of the caller's choice or anywhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::unistd::Pid;

use super::child::{Child, command};
use super::cleanup::{Owned, work_directory};
use super::error::during;
use super::netns::output_of;
use super::{Netns, TopologyError, wait_until};

/// Debian's build with DPDK; plain `ovs-vswitchd` may be the one without.
const DEBIAN_PROGRAM: &str = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
const SCHEMA: &str = "/usr/share/openvswitch/vswitch.ovsschema";
/// Without huge pages OVS takes its buffers from plain memory, MiB: 262,144 buffers of 3 KiB per MTU, and room beside them.
const MEMORY_MIB: u32 = 2048;
/// How long it may take to come up, and a command to be done.
const START_LIMIT: Duration = Duration::from_secs(30);

/// What to make of it.
#[derive(Debug, Clone, Default)]
pub struct OvsSpec<'a> {
    /// CPU of the thread that forwards.
    pub cpu: usize,
    /// CPU of DPDK's main thread, which sleeps.
    pub main_cpu: usize,
    /// VM ports of br-int.
    pub ports: &'a [&'a str],
    /// Large frames from port to port (userspace-tso-enable).
    pub tso: bool,
    /// A VXLAN port on br-int, and its way out.
    pub tunnel: Option<OvsTunnel<'a>>,
    /// OpenFlow flows of br-int, one a line; empty: it learns and forwards (NORMAL).
    pub flows: &'a str,
}

/// A VXLAN tunnel with one remote end.
#[derive(Debug, Clone, Copy)]
pub struct OvsTunnel<'a> {
    /// The vhost-user port that is the physical NIC.
    pub uplink: &'a str,
    /// VXLAN network identifier.
    pub vni: u32,
    /// This end's address with prefix length, and its MAC address.
    pub local: (&'a str, &'a str),
    /// The other end's address and MAC address.
    pub remote: (&'a str, &'a str),
    /// MTU of the underlay.
    pub mtu: u32,
}

/// A running OVS; it ends when dropped.
#[derive(Debug)]
pub struct Ovs {
    switch: Child,
    _database: Child,
    directory: PathBuf,
    netns: Netns,
    _owned: Owned,
}

/// The program: `$DREAMWIRE_OVS_VSWITCHD`, else Debian's.
fn program() -> PathBuf {
    std::env::var_os("DREAMWIRE_OVS_VSWITCHD").map_or_else(|| DEBIAN_PROGRAM.into(), PathBuf::from)
}

/// Whether OVS with DPDK is installed.
#[must_use]
pub fn is_installed() -> bool {
    program().is_file() && Path::new(SCHEMA).is_file()
}

impl Ovs {
    /// Starts it with its bridges and ports. Their sockets are [`Self::socket`]s, to which it connects within a second
    /// of somebody listening there.
    ///
    /// # Errors
    /// When it is not installed, without root's rights, or when it does not come up; the error has the end of its log.
    pub fn start(spec: &OvsSpec<'_>) -> Result<Self, TopologyError> {
        let (directory, owned) = work_directory("ovs")?;
        let netns = Netns::new("ovs")?;
        let at = |name: &str| directory.join(name).display().to_string();
        run("ovsdb-tool", &["create", &at("conf.db"), SCHEMA])?;
        let remote = format!("--remote=punix:{}", at("db.sock"));
        let words = ["ovsdb-server", &at("conf.db"), &remote, &format!("--unixctl={}", at("db.ctl")), "--no-chdir"]
            .map(str::to_owned);
        let mut database = Child::start("ovsdb-server", None, &command(words), &directory.join("ovsdb.log"))?;
        wait_until(START_LIMIT, "the socket of ovsdb-server", || {
            directory.join("db.sock").exists() || database.ended().is_some()
        })?;
        database.check_running()?;

        let database_socket = format!("unix:{}", at("db.sock"));
        configure(&directory, &settings(spec, &directory))?;
        let program = program().display().to_string();
        let run_directory = format!("OVS_RUNDIR={}", directory.display());
        let words = ["env", &run_directory, &program, &database_socket, &format!("--unixctl={}", at("switch.ctl"))];
        let switch =
            Child::start("ovs-vswitchd", Some(netns.name()), &command(words), &directory.join("vswitchd.log"))?;
        let mut ovs = Self { switch, _database: database, directory, netns, _owned: owned };
        ovs.add_bridges(spec)?;
        Ok(ovs)
    }

    /// The socket of the port of that name.
    #[must_use]
    pub fn socket(&self, port: &str) -> PathBuf {
        self.directory.join(format!("{port}.sock"))
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.switch.pid()
    }

    /// Asks the running switch something: `appctl(&["dpif-netdev/pmd-stats-show"])`.
    ///
    /// # Errors
    /// When it refuses.
    pub fn appctl(&self, words: &[&str]) -> Result<String, TopologyError> {
        let target = self.directory.join("switch.ctl").display().to_string();
        run("ovs-appctl", &[&["--target", target.as_str()], words].concat())
    }

    fn add_bridges(&mut self, spec: &OvsSpec<'_>) -> Result<(), TopologyError> {
        let mut words = bridge("br-int");
        for port in spec.ports {
            words.extend(self.vhost_port("br-int", port));
        }
        if let Some(tunnel) = &spec.tunnel {
            let (address, _) = tunnel.local.0.split_once('/').unwrap_or((tunnel.local.0, ""));
            let options = [
                format!("options:remote_ip={}", tunnel.remote.0),
                format!("options:local_ip={address}"),
                format!("options:key={}", tunnel.vni),
            ];
            words.extend(
                ["--", "add-port", "br-int", "vxlan", "--", "set", "Interface", "vxlan", "type=vxlan"]
                    .map(String::from),
            );
            words.extend(options);
            words.push("--".into());
            words.extend(bridge("br-phy"));
            words.extend([format!("other_config:hwaddr={}", tunnel.local.1)]);
            words.extend(self.vhost_port("br-phy", tunnel.uplink));
            words.push(format!("mtu_request={}", tunnel.mtu));
        }
        let added = configure(&self.directory, &words);
        self.switch.check_running()?;
        added?;
        if !spec.flows.is_empty() {
            let (file, bridge) = (self.directory.join("flows"), self.directory.join("br-int.mgmt"));
            fs::write(&file, spec.flows).map_err(during(|| format!("write {}", file.display())))?;
            let target = format!("unix:{}", bridge.display());
            run("ovs-ofctl", &["del-flows", &target])?;
            run("ovs-ofctl", &["add-flows", &target, &file.display().to_string()])?;
        }
        if let Some(tunnel) = &spec.tunnel {
            let (remote, mac) = tunnel.remote;
            self.netns.run("ip", ["addr", "add", tunnel.local.0, "dev", "br-phy"])?;
            self.netns.run("ip", ["link", "set", "br-phy", "up"])?;
            self.appctl(&["tnl/arp/set", "br-phy", remote, mac])?;
        }
        Ok(())
    }

    fn vhost_port(&self, bridge: &str, port: &str) -> Vec<String> {
        let socket = self.socket(port).display().to_string();
        let words = ["--", "add-port", bridge, port, "--", "set", "Interface", port, "type=dpdkvhostuserclient"];
        words.into_iter().map(String::from).chain([format!("options:vhost-server-path={socket}")]).collect()
    }
}

fn bridge(name: &str) -> Vec<String> {
    ["add-br", name, "--", "set", "bridge", name, "datapath_type=netdev"].map(String::from).into()
}

/// Before the switch starts: DPDK is set up once.
fn settings(spec: &OvsSpec<'_>, directory: &Path) -> Vec<String> {
    // --legacy-mem: without it OVS 3.1 adds --in-memory, which DPDK refuses beside --no-huge.
    let prefix = directory.file_name().unwrap_or_default().to_string_lossy();
    let extra =
        format!("--no-huge --legacy-mem -m {MEMORY_MIB} --no-pci --no-telemetry --iova-mode=va --file-prefix={prefix}");
    let mut words: Vec<String> =
        ["--no-wait", "init", "--", "set", "Open_vSwitch", ".", "other_config:dpdk-init=true"].map(String::from).into();
    words.extend([
        format!("other_config:dpdk-extra=\"{extra}\""),
        format!("other_config:pmd-cpu-mask={:#x}", 1_u64 << spec.cpu),
        format!("other_config:dpdk-lcore-mask={:#x}", 1_u64 << spec.main_cpu),
        format!("other_config:userspace-tso-enable={}", spec.tso),
    ]);
    words
}

/// ovs-vsctl, which waits until the switch has done as told.
fn configure(directory: &Path, words: &[String]) -> Result<String, TopologyError> {
    let database = format!("--db=unix:{}", directory.join("db.sock").display());
    let limit = format!("--timeout={}", START_LIMIT.as_secs());
    let mut all = vec![database.as_str(), limit.as_str()];
    all.extend(words.iter().map(String::as_str));
    run("ovs-vsctl", &all)
}

fn run(program: &str, words: &[&str]) -> Result<String, TopologyError> {
    let mut command = Command::new(program);
    command.args(words);
    output_of(command)
}
