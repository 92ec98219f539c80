//! Our connection tracking against Linux nf_conntrack: the same packets through nftables rules in a namespace and through
//! [`dreamwire_policy::decide`] with the same rules, compared packet by packet at the far end. Needs root and nftables.
//!
//! `DREAMWIRE_CONNTRACK_TRACES` sets the number of random TCP traces, `DREAMWIRE_CONNTRACK_SEED` repeats a run.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod firewall;
mod packets;
mod random_trace;
mod scenarios;

use std::collections::BTreeMap;

use dreamwire_bench::topology::{Needs, available};
use dreamwire_policy::Direction;
use firewall::Firewalls;
use random_trace::{Random, trace};

/// One random trace in so many may end in a difference that is not one of the listed.
const UNEXPLAINED_PER_TRACES: u64 = 100;

#[test]
fn the_same_packets_get_the_same_verdicts() {
    if !available(Needs::Netns) {
        return;
    }
    let mut firewalls = Firewalls::new();
    let scripted = scenarios::run(&mut firewalls);
    println!("scenarios: {scripted} verdicts equal, but for the differences listed above");

    let number = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (traces, seed) = (number("DREAMWIRE_CONNTRACK_TRACES", 1500), number("DREAMWIRE_CONNTRACK_SEED", 1));
    let mut random = Random::new(seed);
    let (mut compared, mut passed) = (0u32, 0u32);
    let mut differences: BTreeMap<String, (u32, String)> = BTreeMap::new();
    for number in 0..traces {
        let port = 1024 + (number % 64_000) as u16;
        let trace = trace(&mut random);
        for (at, segment) in trace.iter().enumerate() {
            let direction = if segment.ingress { Direction::Ingress } else { Direction::Egress };
            let packet = segment.packet(at as u16 + 1, port);
            let linux = firewalls.linux(direction, std::slice::from_ref(&packet));
            let ours = firewalls.ours(direction, &packet);
            compared += 1;
            passed += u32::from(linux);
            if linux != ours.allow {
                let name = format!("Linux {linux}, ours {} ({:?} {:?})", ours.allow, ours.reason, ours.state);
                let lines: Vec<String> = trace[..=at].iter().map(ToString::to_string).collect();
                let text = format!("trace {number}:\n  {}", lines.join("\n  "));
                let entry = differences.entry(name).or_insert((0, text.clone()));
                entry.0 += 1;
                // The shortest example says most.
                if text.lines().count() < entry.1.lines().count() {
                    entry.1 = text;
                }
                // From here on the two know different things.
                break;
            }
        }
    }
    println!("random TCP: {compared} packets in {traces} traces compared, {passed} passed (seed {seed})");
    for (name, (count, example)) in &differences {
        println!("difference, {count} times: {name}\n{example}");
    }
    assert!(passed > compared / 4 && passed < compared * 9 / 10, "both verdicts occur: {passed} of {compared}");
    let different: u32 = differences.values().map(|difference| difference.0).sum();
    println!("{different} of {traces} random traces end in a difference");
    // Simultaneous or half-open beginnings with resets and numbers that were never sent; see docs/policy.md.
    assert!(
        u64::from(different) <= traces / UNEXPLAINED_PER_TRACES,
        "{different} of {traces} traces end in a difference"
    );
}
