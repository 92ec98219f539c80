//! Our connection tracking against Linux nf_conntrack: the same packets through nftables rules in a namespace and through
//! [`dreamwire_policy::decide`] with the same rules, compared packet by packet at the far end, and what both remember
//! of TCP, UDP and ICMP afterwards. Needs root and nftables.
//!
//! `DREAMWIRE_CONNTRACK_TRACES` sets the number of random traces, `DREAMWIRE_CONNTRACK_SEED` repeats a run.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod firewall;
mod packets;
mod random_trace;
mod scenarios;

use std::collections::{BTreeMap, BTreeSet};

use dreamwire_bench::topology::{Needs, available};
use dreamwire_policy::Direction;
use firewall::{Firewalls, Remembered};
use packets::Packet;
use random_trace::{Random, trace};

/// Traces of one pair of firewalls: each has a port of its own, and no table fills so far that Linux drops early.
const TRACES_PER_ROUND: u64 = 2500;
const PORT_FIRST: u16 = 1024;

#[test]
fn named_situations_get_the_same_verdicts() {
    if available(Needs::Netns) {
        let compared = scenarios::run(&mut Firewalls::new(false, true));
        println!("scenarios: {compared} verdicts equal, but for the differences listed above");
    }
}

#[test]
fn random_traces_get_the_same_verdicts_and_leave_the_same_behind() {
    if !available(Needs::Netns) {
        return;
    }
    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (traces, seed) = (number("DREAMWIRE_CONNTRACK_TRACES", 10_000), number("DREAMWIRE_CONNTRACK_SEED", 1));
    let mut comparison = Comparison::default();
    let mut random = Random::new(seed);
    for first in (0..traces).step_by(TRACES_PER_ROUND as usize) {
        // The defaults, and each of both settings.
        let (liberal, pick_up) =
            [(false, true), (true, true), (false, false), (true, false)][(first / TRACES_PER_ROUND % 4) as usize];
        let firewalls = Firewalls::new(liberal, pick_up);
        comparison.round(firewalls, &mut random, TRACES_PER_ROUND.min(traces - first));
    }
    let Comparison { packets, passed, connections, differences } = comparison;
    println!(
        "random: {packets} packets in {traces} traces (seed {seed}), {passed} passed by Linux, connections remembered, by \
         what their traces begin with: {connections:?}"
    );
    for (name, (count, example)) in &differences {
        println!("difference, {count} times: {name}\n{example}");
    }
    let remembers = |kind: &str| connections.get(kind).is_some_and(|count| *count > 0);
    assert!(traces < 100 || ["TCP", "UDP", "ICMP"].into_iter().all(remembers), "each kind occurs: {connections:?}");
    assert!(passed > packets / 4 && passed < packets * 9 / 10, "both verdicts occur: {passed} of {packets}");
    let different: u64 = differences.values().map(|difference| difference.0).sum();
    println!("{different} of {traces} random traces end in a difference");
    assert_eq!(different, 0, "see above");
}

#[derive(Default)]
struct Comparison {
    packets: u64,
    passed: u64,
    /// Known to either at the end of their traces, by what those begin with.
    connections: BTreeMap<&'static str, u64>,
    /// By kind: how many, and the shortest.
    differences: BTreeMap<String, (u64, String)>,
}

impl Comparison {
    fn round(&mut self, mut firewalls: Firewalls, random: &mut Random, traces: u64) {
        let mut equal = Vec::new();
        for (port, _) in (PORT_FIRST..).zip(0..traces) {
            let trace = trace(random);
            if self.verdicts(&mut firewalls, &trace, port) {
                equal.push((port, trace));
            }
        }
        let [linux, ours] = firewalls.remembered();
        for (port, trace) in equal {
            let [linux, ours] = [&linux, &ours].map(|memory| memory.get(&port).cloned().unwrap_or_default());
            let flows: BTreeSet<_> = linux.keys().chain(ours.keys()).collect();
            *self.connections.entry(trace.first().map_or("none", Packet::kind)).or_default() += flows.len() as u64;
            for flow in flows {
                let (linux, ours) = (linux.get(flow), ours.get(flow));
                if !Remembered::same(linux, ours) {
                    self.differs(format!("{flow:?}: Linux {linux:?}, ours {ours:?}"), &trace);
                    break;
                }
            }
        }
    }

    /// Whether all verdicts are equal. Behind the first that is not, the two know different things.
    fn verdicts(&mut self, firewalls: &mut Firewalls, trace: &[Packet], port: u16) -> bool {
        for (at, packet) in trace.iter().enumerate() {
            let direction = if packet.ingress() { Direction::Ingress } else { Direction::Egress };
            let bytes = packet.bytes(at as u16 + 1, port);
            let linux = firewalls.linux(direction, std::slice::from_ref(&bytes));
            let ours = firewalls.ours(direction, &bytes);
            self.packets += 1;
            self.passed += u64::from(linux);
            if linux != ours.allow {
                let name = format!("Linux {linux}, ours {} ({:?} {:?})", ours.allow, ours.reason, ours.state);
                self.differs(name, &trace[..=at]);
                return false;
            }
        }
        true
    }

    fn differs(&mut self, kind: String, trace: &[Packet]) {
        let lines: Vec<String> = trace.iter().map(|packet| format!("  {packet}")).collect();
        let text = lines.join("\n");
        let entry = self.differences.entry(kind).or_insert((0, text.clone()));
        entry.0 += 1;
        if lines.len() < entry.1.lines().count() {
            entry.1 = text;
        }
    }
}
