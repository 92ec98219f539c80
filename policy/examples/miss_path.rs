//! What a flow-cache miss and a hit cost: `cargo run --release -p dreamwire-policy --example miss_path`.
//!
//! For 10, 100, 1,000 and 10,000 rules on a tenth as many groups, all applying to one port: ns for a lookup alone (random
//! flows, half of which meet a rule for their remote), for a whole miss (lookup and a new connection), the time to compile, and
//! memory; and how many times the miss with the fewest rules that is. Then ns for [`Conntrack::touch`], and for parsing. Medians
//! of rounds, those of all numbers of rules in turns. `--smoke` is a short run, for tests.

use std::fmt::{self, Display, Formatter};
use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::Instant;

use dreamwire_policy::tcp::Segment;
use dreamwire_policy::{
    Action, Classifier, Conntrack, ConntrackLimits, Direction, Fragment, Group, GroupId, Key, Packet, Parsed, Policy,
    PortRange, Posture, Prefix, Protocol, Remote, Rule, RuleId, Transport, decide, parse,
};

/// Splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

fn main() {
    run(std::env::args().any(|argument| argument == "--smoke"));
}

/// All rows, as they were printed; a short run if `smoke`.
pub(crate) fn run(smoke: bool) -> Vec<String> {
    let mut rows = Vec::new();
    let mut print = |row: String| {
        println!("{row}");
        rows.push(row);
    };
    let (rounds, lookups) = if smoke { (3, 2_000) } else { (31, 100_000) };
    print("rules   lookup ns [min..max]   miss ns [min..max]   ratio [min..max]   compile ms   KiB".into());
    classifier_rows(rounds, lookups).into_iter().for_each(&mut print);
    let thousand = apart(1_000, 1_000);
    print(format!("{thousand:.0} ms to compile for 1,000 ports in a group of 10 rules each"));
    for flows in [1, 1_000, 100_000] {
        print(touch_row(if smoke { flows.min(1_000) } else { flows }, rounds, lookups));
    }
    print(parse_row(rounds, lookups));
    rows
}

fn address(random: &mut Random) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 | random.below(1 << 24) as u32)
}

/// Rules as security groups have them: most allow a port or two to a group or a prefix, some deny, few are for everybody.
fn policy(rules: u32, port_groups: u32) -> Policy {
    let mut random = Random(7);
    let groups = (rules / 10).max(1);
    let members = |random: &mut Random| (0..20).map(|_| Prefix::host(address(random).into())).collect();
    let mut all: Vec<Group> = (0..groups).map(|id| Group { id: GroupId(id), members: members(&mut random) }).collect();
    all.extend((0..port_groups).map(|id| Group { id: GroupId(1_000_000 + id), members: vec![] }));
    let rules = (0..rules).map(|id| {
        let remote = match random.below(10) {
            0 => Remote::Any,
            1..=3 => {
                let length = [8, 16, 20, 24, 28, 32][random.below(6) as usize];
                Remote::Prefix(Prefix::new(address(&mut random).into(), length).expect("a length of IPv4"))
            }
            _ => Remote::Group(GroupId(random.below(groups.into()) as u32)),
        };
        let first = random.below(10_000) as u16;
        Rule {
            id: RuleId(id),
            group: GroupId(1_000_000 + id % port_groups),
            direction: Direction::Ingress,
            protocol: if random.below(3) == 0 { Protocol::Udp } else { Protocol::Tcp },
            ports: vec![PortRange { first, last: first + random.below(20) as u16 }],
            icmp: vec![],
            remote,
            action: if random.below(5) == 0 { Action::Deny } else { Action::Allow },
            priority: random.below(100) as u16,
            log: false,
        }
    });
    let rules = rules.collect();
    Policy::new(all, rules, vec![]).expect("a policy within its limits")
}

/// Flows of which half come from a member of a group or from a prefix that rules name, to a port that they name.
fn flows(policy: &Policy, count: usize) -> Vec<Packet> {
    let mut random = Random(11);
    let members: Vec<Prefix> = policy.groups().iter().flat_map(|group| group.members.iter().copied()).collect();
    let flow = |_| {
        let rule = &policy.rules()[random.below(policy.rules().len() as u64) as usize];
        let mut source = address(&mut random).into();
        let mut port = random.below(10_000) as u16;
        if random.below(2) == 0 {
            port = rule.ports[0].first;
            source = match rule.remote {
                Remote::Prefix(prefix) => prefix.address(),
                _ => members[random.below(members.len() as u64) as usize].address(),
            };
        }
        let key = Key::new(6, (source, 1024 + random.below(60_000) as u16), ([10, 0, 0, 1].into(), port));
        let syn = Segment { window: 1000, flags: 2, ..Segment::default() };
        Packet { key, fragment: Fragment::Whole, transport: Transport::Tcp(syn) }
    };
    (0..count).map(flow).collect()
}

/// A classifier and what is asked of it.
struct Bench {
    rules: u32,
    classifier: Classifier,
    /// The same rules in an open network, where most flows become connections.
    open: Classifier,
    packets: Vec<Packet>,
    /// A table of the size that a port has; each round fills it with other connections than the last.
    conntrack: Conntrack,
    now_ns: u64,
    compile_ms: f64,
}

impl Bench {
    fn new(rules: u32, flows_count: usize) -> Self {
        let policy = policy(rules, 1);
        let start = Instant::now();
        let classifier = Classifier::compile(&policy, Posture::Enforced, &[GroupId(1_000_000)]);
        let compile_ms = start.elapsed().as_secs_f64() * 1e3;
        let open = Classifier::compile(&policy, Posture::Open, &[GroupId(1_000_000)]);
        let packets = flows(&policy, flows_count);
        let conntrack = Conntrack::new(ConntrackLimits::default(), 1);
        Self { rules, classifier, open, packets, conntrack, now_ns: 0, compile_ms }
    }

    /// ns per look-up.
    fn lookup(&self) -> f64 {
        let lookup = |packet: &&Packet| {
            black_box(self.classifier.lookup(Direction::Ingress, black_box(&packet.key), None)).rule.is_some()
        };
        let start = Instant::now();
        let matched = self.packets.iter().filter(lookup).count();
        let ns = start.elapsed().as_nanos() as f64 / self.packets.len() as f64;
        let flows = self.packets.len();
        assert!(matched * 50 > flows && matched < flows, "{matched} of {flows} flows met a rule");
        ns
    }

    /// ns per flow.
    fn miss(&mut self) -> f64 {
        self.now_ns += 1_000_000_000_000;
        let start = Instant::now();
        for packet in &self.packets {
            let parsed = Parsed::Ip(*packet);
            black_box(decide(&self.open, &mut self.conntrack, &parsed, Direction::Ingress, None, 1, self.now_ns));
        }
        start.elapsed().as_nanos() as f64 / self.packets.len() as f64
    }
}

fn classifier_rows(rounds: usize, lookups: usize) -> Vec<String> {
    let mut benches = [10, 100, 1_000, 10_000].map(|rules| Bench::new(rules, lookups));
    let mut costs = vec![[vec![], vec![], vec![]]; benches.len()];
    for round in 0..=rounds {
        let lookups = benches.each_ref().map(Bench::lookup);
        let misses = benches.each_mut().map(Bench::miss);
        // The first one warms up.
        if round > 0 {
            for ((costs, lookup), miss) in costs.iter_mut().zip(lookups).zip(misses) {
                costs.iter_mut().zip([lookup, miss, miss / misses[0]]).for_each(|(costs, cost)| costs.push(cost));
            }
        }
    }
    let row = |(bench, costs): (&Bench, [Vec<f64>; 3])| {
        let [lookup, miss, ratio] = costs.map(Spread::of);
        let (rules, compile_ms, kib) = (bench.rules, bench.compile_ms, bench.classifier.bytes() / 1024);
        format!("{rules:6}  {lookup:6.1}   {miss:6.1}   {ratio:5.2}   {compile_ms:8.1}   {kib}")
    };
    benches.iter().zip(costs).map(row).collect()
}

/// Milliseconds to compile for `ports` ports, each in its own group of ten rules.
fn apart(ports: u32, groups: u32) -> f64 {
    let policy = policy(groups * 10, groups);
    let start = Instant::now();
    for port in 0..ports {
        black_box(Classifier::compile(&policy, Posture::Enforced, &[GroupId(1_000_000 + port % groups)]));
    }
    start.elapsed().as_secs_f64() * 1e3
}

fn touch_row(flows: usize, rounds: usize, touches: usize) -> String {
    let policy = policy(10, 1);
    let classifier = Classifier::compile(&policy, Posture::Open, &[GroupId(1_000_000)]);
    let mut conntrack = Conntrack::new(ConntrackLimits { connections: 131_072, ..ConntrackLimits::default() }, 1);
    let mut random = Random(3);
    let mut connections = Vec::new();
    for n in 0..flows as u32 {
        let key = Key::new(6, ([10, 0, 0, 1].into(), n as u16), ([10, 1, 0, (n >> 16) as u8].into(), 443));
        let packet = |sequence, flags| {
            let segment = Segment { sequence, acknowledgment: 0, window: 1000, flags, ..Segment::default() };
            Packet { key, fragment: Fragment::Whole, transport: Transport::Tcp(segment) }
        };
        let open = Parsed::Ip(packet(0, 0x10));
        let decision = decide(&classifier, &mut conntrack, &open, Direction::Egress, None, 1, 0);
        connections.push((decision.connection.expect("an open network"), packet(0, 0x10)));
    }
    let order: Vec<usize> = (0..touches).map(|_| random.below(flows as u64) as usize).collect();
    let touch = median(rounds, touches, || {
        for &at in &order {
            let (connection, packet) = &connections[at];
            black_box(conntrack.touch(*connection, black_box(packet), Direction::Egress, 1, 1));
        }
    });
    format!("touch of {flows} TCP connections: {touch:.1} ns")
}

fn parse_row(rounds: usize, parses: usize) -> String {
    let mut frame = vec![0u8; 12];
    frame.extend([8, 0, 0x45, 0, 0, 52, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([0x9c, 0x40, 1, 0xbb, 0, 0, 0, 1, 0, 0, 0, 2, 0x80, 0x10, 1, 0, 0, 0, 0, 0]);
    frame.extend([1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    assert!(matches!(parse(&frame, frame.len()), Parsed::Ip(_)));
    let cost = median(rounds, parses, || {
        for _ in 0..parses {
            black_box(parse(black_box(&frame), frame.len()));
        }
    });
    format!("parse of a TCP segment with timestamp: {cost:.1} ns")
}

/// Median, lowest and highest of some rounds.
struct Spread([f64; 3]);

impl Spread {
    fn of(mut costs: Vec<f64>) -> Self {
        costs.sort_by(f64::total_cmp);
        Self([costs[costs.len() / 2], costs[0], costs[costs.len() - 1]])
    }
}

impl Display for Spread {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let [median, lowest, highest] = &self.0;
        median.fmt(f)?;
        let digits = f.precision().unwrap_or(1);
        write!(f, " [{lowest:.digits$}..{highest:.digits$}]")
    }
}

/// Nanoseconds per operation.
fn median(rounds: usize, operations: usize, mut round: impl FnMut()) -> Spread {
    round();
    let costs = (0..rounds).map(|_| {
        let start = Instant::now();
        round();
        start.elapsed().as_nanos() as f64 / operations as f64
    });
    Spread::of(costs.collect())
}
