//! The compiled classifier and the connection tracking against slow, obvious oracles, on random rule sets, packets and states.
//!
//! `DREAMWIRE_POLICY_CASES=10000000 cargo test --release -p dreamwire-policy --test oracle -- --nocapture` for the long run;
//! `DREAMWIRE_POLICY_SEED` repeats one.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod support;

use dreamwire_policy::oracle::{Subject, verdict};
use dreamwire_policy::{Classifier, Conntrack, ConntrackLimits, Direction, Posture, decide};
use support::random::{Random, cases, seed};
use support::rule_sets::{IDENTITIES, key, policy, port_groups};
use support::slow_port::{SlowPort, next_parsed};

#[test]
fn the_classifier_answers_as_the_list_does() {
    let (seed, wanted) = (seed(), cases(200_000));
    let mut random = Random::new(seed);
    let (mut asked, mut by_rule, mut allowed, mut sets) = (0u64, 0u64, 0u64, 0u64);
    while asked < wanted {
        let policy = policy(&mut random);
        let groups = port_groups(&mut random);
        let posture = if random.one_in(2) { Posture::Open } else { Posture::Enforced };
        let classifier = Classifier::compile(&policy, posture, &groups);
        sets += 1;
        for _ in 0..500 {
            let direction = if random.one_in(2) { Direction::Ingress } else { Direction::Egress };
            let identity = random.one_in(4).then(|| random.below(IDENTITIES as u64 + 1) as u16);
            let key = key(&mut random);
            let (expected, got) = if random.one_in(20) {
                let expected = verdict(&policy, posture, &groups, direction, Subject::Other, identity);
                (expected, classifier.lookup_other(direction, identity))
            } else {
                let expected = verdict(&policy, posture, &groups, direction, Subject::Flow(&key), identity);
                (expected, classifier.lookup(direction, &key, identity))
            };
            assert_eq!(
                got, expected,
                "seed {seed}, set {sets}: {direction:?} {key:?} {identity:?} in {groups:?}\n{policy:#?}"
            );
            asked += 1;
            by_rule += u64::from(expected.rule.is_some());
            allowed += u64::from(expected.allow);
        }
    }
    println!(
        "classifier == list: {asked} packets on {sets} rule sets, {by_rule} decided by a rule, {allowed} allowed (seed {seed})"
    );
    assert!(by_rule > asked / 5 && by_rule < asked * 19 / 20, "hits and misses: {by_rule} of {asked}");
    assert!(allowed > asked / 5 && allowed < asked * 19 / 20, "allowed and denied: {allowed} of {asked}");
}

#[test]
fn decisions_with_state_are_those_of_the_slow_port() {
    let (seed, wanted) = (seed(), cases(200_000));
    let mut random = Random::new(seed ^ 0x5eed);
    let (mut packets, mut allowed, mut kept, mut worlds) = (0u64, 0u64, 0u64, 0u64);
    let mut states = std::collections::BTreeMap::new();
    let limits = ConntrackLimits { connections: 256, liberal: true, ..ConntrackLimits::default() };
    while packets < wanted {
        worlds += 1;
        let groups = port_groups(&mut random);
        let posture = if random.one_in(3) { Posture::Open } else { Posture::Enforced };
        let mut policy = policy(&mut random);
        let mut generation = 1;
        let mut classifier = Classifier::compile(&policy, posture, &groups);
        let mut conntrack = Conntrack::new(limits, random.next());
        let mut slow = SlowPort::new(posture, groups.clone());
        let mut now_ns = 1_000_000_000;
        for step in 0..60 {
            if random.one_in(25) {
                policy = support::rule_sets::policy(&mut random);
                classifier = Classifier::compile(&policy, posture, &groups);
                generation += 1;
            }
            // Together less than five minutes, when stalled connections end.
            now_ns += [0, 0, 0, 0, 0, 0, 0, 3, 3, 31, 61][random.below(11) as usize]
                * 1_000_000_000
                * u64::from(step % 12 == 0)
                + [0, 0, 0, 3][random.below(4) as usize] * 500_000_000;
            let (parsed, direction) = next_parsed(&mut random, &slow);
            let identity =
                (direction == Direction::Ingress && random.one_in(8)).then(|| random.below(IDENTITIES as u64) as u16);
            let got = decide(&classifier, &mut conntrack, &parsed, direction, identity, generation, now_ns);
            let expected = slow.decide(&policy, &parsed, direction, identity, generation, now_ns);
            let got = (got.allow, got.rule, got.state);
            assert_eq!(
                got,
                (expected.allow, expected.rule, expected.state),
                "seed {seed}, world {worlds}, step {step}: {direction:?} {parsed:?}\n{slow:#?}"
            );
            packets += 1;
            allowed += u64::from(expected.allow);
            kept += u64::from(expected.known);
            *states.entry(format!("{:?}", expected.state)).or_insert(0u64) += 1;
        }
    }
    println!(
        "decide == slow port: {packets} packets in {worlds} worlds, {allowed} allowed, {kept} of known connections, {states:?} (seed {seed})"
    );
    assert!(kept > packets / 10, "connections are met again: {kept} of {packets}");
    for state in ["New", "Established", "Reply", "Related", "Invalid"] {
        assert!(states.get(state).is_some_and(|&count| count > packets / 1000), "{state}: {states:?}");
    }
}
