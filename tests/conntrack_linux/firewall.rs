//! Two firewalls for one packet: Linux (nftables over nf_conntrack, forwarding between two veth pairs) and ours.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dreamwire_bench::topology::{FrameFilter, Netns, PacketSocket, VethEnd};
use dreamwire_policy::{
    Action, Classifier, ConnectionRow, Conntrack, ConntrackLimits, Decision, Direction, Group, GroupId, IcmpKind,
    Policy, PortRange, Posture, Protocol, Remote, Rule, RuleId, decide, parse,
};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// The same rules as [`rules`]: what the VM begins passes; from outside 443/tcp, 53/udp and pings do.
const RULESET: &str = r#"
table inet filter {
    chain forward {
        type filter hook forward priority 0; policy drop;
        udp dport 9 accept
        ct state established,related accept
        iifname "vm" ct state new accept
        iifname "net" ct state new tcp dport 443 accept
        iifname "net" ct state new udp dport 53 accept
        iifname "net" ct state new icmp type echo-request accept
    }
}
"#;

const LIMIT: Duration = Duration::from_secs(5);
/// Identification of frames that mark the end of what was sent before them.
const FENCE_ID: u16 = 0xffff;

/// Both firewalls.
pub(crate) struct Firewalls {
    _ends: [Netns; 2],
    router: Netns,
    net: PacketSocket,
    vm: PacketSocket,
    /// The router's, towards the net and towards the VM.
    macs: [[u8; 6]; 2],
    classifier: Classifier,
    conntrack: Conntrack,
    start: Instant,
}

impl Firewalls {
    /// `liberal`: windows do not decide; `pick_up`: a connection may begin in its middle.
    pub(crate) fn new(liberal: bool, pick_up: bool) -> Self {
        // One CPU handles what one CPU has sent, in order.
        let mut cpu = CpuSet::new();
        cpu.set(0).unwrap();
        sched_setaffinity(Pid::from_raw(0), &cpu).unwrap();
        let [net, router, vm] = ["net", "router", "vm"].map(|label| Netns::new(label).unwrap());
        let join = |netns, inside, address| {
            let outside = VethEnd { netns, interface: "eth0", addresses: &[] };
            Netns::join([VethEnd { netns: &router, interface: inside, addresses: &[address] }, outside], 1500).unwrap();
            netns.disable_offloads("eth0").unwrap();
            router.disable_offloads(inside).unwrap();
        };
        join(&net, "net", "10.1.0.254/24");
        join(&vm, "vm", "10.2.0.254/24");
        router
            .sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.net.rp_filter=0 \
                 net.ipv4.conf.vm.rp_filter=0 net.netfilter.nf_conntrack_checksum=0")
            .unwrap();
        let settings = [("be_liberal", liberal), ("loose", pick_up)]
            .map(|(name, value)| format!("net.netfilter.nf_conntrack_tcp_{name}={}", u8::from(value)));
        router.sh(&format!("sysctl -qw {}", settings.join(" "))).unwrap();
        for (interface, network) in [("net", 1), ("vm", 2)] {
            for host in [1, 2, 9] {
                let neighbour = format!("10.{network}.0.{host} lladdr 02:00:00:00:00:0{host} dev {interface}");
                router.sh(&format!("ip neigh add {neighbour} nud permanent")).unwrap();
            }
        }
        router.sh(&format!("printf '%s' '{RULESET}' | nft -f -")).expect("nftables; run scripts/setup");
        let macs = ["net", "vm"].map(|interface| {
            let text = router.sh(&format!("cat /sys/class/net/{interface}/address")).unwrap();
            let bytes: Vec<u8> = text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
            bytes.try_into().unwrap()
        });
        let sockets = [&net, &vm].map(|netns| netns.packet_socket("eth0").unwrap());
        let [net_socket, vm_socket] = sockets;
        let policy = Policy::new(vec![Group { id: GroupId(0), members: vec![] }], rules(), vec![]).unwrap();
        let limits = ConntrackLimits { liberal, pick_up, ..ConntrackLimits::default() };
        Self {
            _ends: [net, vm],
            router,
            net: net_socket,
            vm: vm_socket,
            macs,
            classifier: Classifier::compile(&policy, Posture::Enforced, &[GroupId(0)]),
            conntrack: Conntrack::new(limits, 1),
            start: Instant::now(),
        }
    }

    /// Whether Linux lets the datagram through of which these are the packets, in this order.
    pub(crate) fn linux(&mut self, direction: Direction, packets: &[Vec<u8>]) -> bool {
        let (from, to, mac) = match direction {
            Direction::Ingress => (&self.net, &self.vm, self.macs[0]),
            Direction::Egress => (&self.vm, &self.net, self.macs[1]),
        };
        let id = &packets[0][4..6];
        let fence = fence(direction);
        for packet in packets.iter().chain([&fence]) {
            from.send(&frame(mac, packet)).unwrap();
        }
        let ipv4 = FrameFilter::any().ether_type(0x0800);
        let mut passed = false;
        loop {
            let frames = to.receive(&ipv4, 1, LIMIT).unwrap();
            let frame = frames.first().expect("the fence arrives");
            match &frame.bytes[18..20] {
                arrived if arrived == FENCE_ID.to_be_bytes() => return passed,
                arrived => passed |= arrived == id,
            }
        }
    }

    /// What we say of one packet.
    pub(crate) fn ours(&mut self, direction: Direction, packet: &[u8]) -> Decision {
        let now_ns = self.now_ns();
        let frame = frame([0; 6], packet);
        let parsed = parse(&frame[..frame.len().min(128)], frame.len());
        decide(&self.classifier, &mut self.conntrack, &parsed, direction, None, 1, now_ns)
    }

    fn now_ns(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }

    /// What each of the two, Linux first, remembers, by the host's port (or the identifier of an ICMP query).
    pub(crate) fn remembered(&self) -> [Memory; 2] {
        let table = self.router.sh("cat /proc/net/nf_conntrack").unwrap();
        let now_ns = self.now_ns();
        let [mut linux, mut ours] = [Memory::new(), Memory::new()];
        for (port, flow, remembered) in table.lines().map(Remembered::of_line) {
            linux.entry(port).or_default().insert(flow, remembered);
        }
        for (port, flow, remembered) in self.conntrack.rows(now_ns).map(|row| Remembered::of_row(&row)) {
            ours.entry(port).or_default().insert(flow, remembered);
        }
        [linux, ours]
    }
}

/// By the host's port, then by connection.
pub(crate) type Memory = BTreeMap<u16, BTreeMap<Flow, Remembered>>;

/// One of the connections of a host's port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Flow {
    /// IPv4's number.
    protocol: u8,
    /// The VM's port, or the type of an ICMP query.
    vm_port: u16,
    /// The host began it.
    ingress: bool,
}

/// A connection as a firewall remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remembered {
    /// Of TCP; else empty.
    state: String,
    replied: bool,
    assured: bool,
    seconds_left: u64,
}

impl Remembered {
    /// The two tables are read one after the other, and one of them counts in ticks.
    const SECONDS_APART_MAX: u64 = 2;

    /// `ipv4 2 tcp 6 431999 ESTABLISHED src=10.1.0.1 dst=10.2.0.1 sport=1024 dport=443 src=... [ASSURED] mark=0 use=1`,
    /// `ipv4 2 udp 17 29 src=10.1.0.1 dst=10.2.0.1 sport=1024 dport=53 [UNREPLIED] src=... mark=0 use=1`,
    /// `ipv4 2 icmp 1 29 src=10.1.0.1 dst=10.2.0.1 type=8 code=0 id=1024 [UNREPLIED] src=... mark=0 use=1`
    fn of_line(line: &str) -> (u16, Flow, Self) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let value = |name: &str| {
            let found = words.iter().find_map(|word| word.split_once('=').filter(|(key, _)| *key == name));
            found.unwrap_or_else(|| panic!("no {name}: {line}")).1
        };
        let number = |name: &str| value(name).parse::<u16>().unwrap();
        let protocol = words[3].parse().unwrap();
        let ingress = value("src").starts_with("10.1.");
        let (port, vm_port) = match protocol {
            1 => (number("id"), number("type")),
            _ if ingress => (number("sport"), number("dport")),
            _ => (number("dport"), number("sport")),
        };
        let remembered = Self {
            state: if protocol == 6 { words[5].replace('_', "") } else { String::new() },
            replied: !line.contains("[UNREPLIED]"),
            assured: line.contains("[ASSURED]"),
            seconds_left: words[4].parse().unwrap(),
        };
        (port, Flow { protocol, vm_port, ingress }, remembered)
    }

    fn of_row(row: &ConnectionRow) -> (u16, Flow, Self) {
        let (protocol, ingress) = (row.key.protocol, row.initiator == Direction::Ingress);
        let ports = [row.key.source_port, row.key.destination_port];
        let (port, vm_port) = match protocol {
            1 => (ports[0], ports[1] >> 8),
            _ if ingress => (ports[0], ports[1]),
            _ => (ports[1], ports[0]),
        };
        let state = row.tcp.map(|state| format!("{state:?}").to_uppercase()).unwrap_or_default();
        let seconds_left = row.expires_in_ns / 1_000_000_000;
        let remembered = Self { state, replied: row.replied, assured: row.assured, seconds_left };
        (port, Flow { protocol, vm_port, ingress }, remembered)
    }

    /// Whether two firewalls remember the same, but for what expires just now.
    pub(crate) fn same(linux: Option<&Self>, ours: Option<&Self>) -> bool {
        match (linux, ours) {
            (None, None) => true,
            (Some(one), None) | (None, Some(one)) => one.seconds_left <= Self::SECONDS_APART_MAX,
            (Some(linux), Some(ours)) => {
                (&linux.state, linux.replied, linux.assured) == (&ours.state, ours.replied, ours.assured)
                    && linux.seconds_left.abs_diff(ours.seconds_left) <= Self::SECONDS_APART_MAX
            }
        }
    }
}

fn rules() -> Vec<Rule> {
    let rule = |id, protocol, port: Option<u16>, kind: Option<u8>| Rule {
        id: RuleId(id),
        group: GroupId(0),
        direction: Direction::Ingress,
        protocol,
        ports: port.map(|port| PortRange { first: port, last: port }).into_iter().collect(),
        icmp: kind.map(|kind| IcmpKind { kind, code: None }).into_iter().collect(),
        remote: Remote::Any,
        action: Action::Allow,
        priority: 0,
        log: false,
    };
    vec![
        rule(1, Protocol::Tcp, Some(443), None),
        rule(2, Protocol::Udp, Some(53), None),
        rule(3, Protocol::Icmp, None, Some(8)),
    ]
}

fn frame(router: [u8; 6], packet: &[u8]) -> Vec<u8> {
    [&router[..], &[2, 0, 0, 0, 0, 1], &[8, 0], packet].concat()
}

fn fence(direction: Direction) -> Vec<u8> {
    let (from, to) = match direction {
        Direction::Ingress => ([10, 1, 0, 9], [10, 2, 0, 9]),
        Direction::Egress => ([10, 2, 0, 9], [10, 1, 0, 9]),
    };
    super::packets::ipv4(FENCE_ID, 17, from, to, 0, &super::packets::udp(9, 9, 0))
}
