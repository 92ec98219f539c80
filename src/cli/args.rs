//! What can be typed.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::perimeter_show::WhyArguments;
use super::rules::{GroupCommand, RuleCommand};
use crate::log::LogFormat;

/// A virtual machine's network card: vhost-user back-end and virtual switch.
#[derive(Debug, Parser)]
#[command(name = "dreamwire", version, propagate_version = true)]
pub(super) struct Arguments {
    /// Where the daemon's sockets are [default: what the file says, or /run/dreamwire]
    #[arg(long, global = true, env = "DREAMWIRE_RUN_DIR", value_name = "DIR")]
    pub(super) run_dir: Option<PathBuf>,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the daemon, in the foreground
    Run {
        /// Configuration, TOML (or JSON, by the name's end). Without: a network "default", ports by command
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// error, warn, info, debug, trace, or tracing's filter directives
        #[arg(long, value_name = "LEVEL", default_value = "info", env = "DREAMWIRE_LOG")]
        log_level: String,
        /// How log lines look
        #[arg(long, value_name = "FORMAT", default_value = "text")]
        log_format: LogFormat,
    },
    /// Make a file the desired state, all of it or nothing
    Apply {
        /// TOML, or JSON by the name's end
        file: PathBuf,
    },
    /// What `apply` would change. Exit status 0: nothing, 1: something, 2: the file is refused
    Diff {
        /// TOML, or JSON by the name's end
        file: PathBuf,
    },
    /// What there is
    Show {
        /// Kind of object [default: ports, networks and underlays]
        kind: Option<ShowKind>,
        /// One object, with everything known of it
        name: Option<String>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Add, remove or change a port
    #[command(subcommand)]
    Port(PortCommand),
    /// Add, remove or change a network
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Add or remove another host of a network
    #[command(subcommand)]
    Remote(RemoteCommand),
    /// Add, remove or change a group of ports and prefixes
    #[command(subcommand)]
    Group(GroupCommand),
    /// Add, remove or change a rule
    #[command(subcommand)]
    Rule(RuleCommand),
    /// What attaches a VM to a port: QEMU's flags, to paste into a shell
    QemuArgs {
        /// The port
        port: String,
        /// libvirt's XML instead
        #[arg(long)]
        libvirt: bool,
        /// For that version of QEMU
        #[arg(long, value_name = "VERSION", default_value = "10.0")]
        qemu_version: String,
    },
    /// What would become of a flow, and which rule decides: nothing is sent
    Why(WhyArguments),
    /// Frames that were dropped lately, samples of them, with the reason and the rule
    Drops {
        /// Go on with those that come
        #[arg(long, short)]
        follow: bool,
        /// As JSON, one object a line
        #[arg(long)]
        json: bool,
    },
    /// What is counted
    Stats {
        /// As JSON, with every ring and reason
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ShowKind {
    #[value(alias = "ports")]
    Port,
    #[value(alias = "networks")]
    Network,
    #[value(alias = "underlays")]
    Underlay,
    #[value(alias = "groups")]
    Group,
    #[value(alias = "rules")]
    Rule,
    /// Connections that ports' rules have let begin; with a name, those of a port
    #[value(alias = "connections")]
    Connection,
    #[value(alias = "workers")]
    Worker,
    /// Learned addresses
    Fdb,
    /// Desired state, as JSON
    State,
}

/// An object of any kind.
#[derive(Debug, Args)]
pub(super) struct Named {
    /// Its name
    pub(super) name: String,
}

/// What shall be otherwise with an object of any kind.
#[derive(Debug, Args)]
pub(super) struct Changes {
    /// Its name
    pub(super) name: String,
    /// What to change; lists are separated by commas, tables written as in the file
    #[arg(required = true, value_name = "KEY=VALUE")]
    pub(super) changes: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum PortCommand {
    /// Add a port
    Add {
        /// Its name
        name: String,
        #[command(flatten)]
        keys: PortKeys,
    },
    /// Remove a port
    Del(Named),
    /// Change keys of a port: network, mac, addresses, groups, queues, worker, socket, mode, limits...; `key=` removes one
    Set(Changes),
}

#[derive(Debug, Args)]
pub(super) struct PortKeys {
    /// The network it is in [default: default]
    #[arg(long)]
    pub(super) network: Option<String>,
    /// Its address
    #[arg(long)]
    pub(super) mac: Option<String>,
    /// An address of the guest's; may be repeated
    #[arg(long = "address", value_name = "ADDRESS")]
    pub(super) addresses: Vec<IpAddr>,
    /// A group that it is in; may be repeated
    #[arg(long = "group", value_name = "GROUP")]
    pub(super) groups: Vec<String>,
    /// Queue pairs [default: 1]
    #[arg(long)]
    pub(super) queues: Option<u16>,
    /// The worker that serves it, from 0 [default: one with the fewest ports]
    #[arg(long)]
    pub(super) worker: Option<u16>,
    /// Path of the vhost-user socket [default: NAME.sock in the run directory]
    #[arg(long)]
    pub(super) socket: Option<PathBuf>,
    /// server: the daemon listens; client: the hypervisor does [default: server]
    #[arg(long)]
    pub(super) mode: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(super) enum NetworkCommand {
    /// Add a network; without --vni and --underlay it is local to this host
    Add {
        /// Its name
        name: String,
        #[command(flatten)]
        keys: NetworkKeys,
    },
    /// Remove a network
    Del(Named),
    /// Change keys of a network: vni, underlay, mtu, policy, learning, age_seconds, remotes...; `key=` removes one
    Set(Changes),
}

#[derive(Debug, Args)]
pub(super) struct NetworkKeys {
    /// Its identifier on the underlay
    #[arg(long)]
    pub(super) vni: Option<u32>,
    /// Its underlay
    #[arg(long)]
    pub(super) underlay: Option<String>,
    /// Bytes of an Ethernet payload [default: 1500]
    #[arg(long)]
    pub(super) mtu: Option<u32>,
    /// What happens to what no rule is about: open, or enforced [default: open]
    #[arg(long)]
    pub(super) policy: Option<String>,
    /// Another host's address; may be repeated
    #[arg(long = "remote", value_name = "ADDRESS")]
    pub(super) remotes: Vec<IpAddr>,
}

#[derive(Debug, Subcommand)]
pub(super) enum RemoteCommand {
    /// Add a host
    Add {
        /// The network
        network: String,
        /// The host's VTEP address
        address: IpAddr,
    },
    /// Remove a host
    Del {
        /// The network
        network: String,
        /// The host's VTEP address
        address: IpAddr,
    },
}
