//! Groups, rules and ports seen together: names and identities twice, references to nothing, what has no effect.

use std::collections::HashSet;

use dreamwire_policy::Posture;
use dreamwire_policy::model::MEMBERS_MAX;

use super::check::{Known, Seen, at, mistake};
use super::document::{Document, Kind, Network, Port};
use super::fields::Findings;
use super::rules::Remote;

pub(super) fn document(document: &Document, findings: &mut Findings) {
    let groups = Known::new("group", document.group.iter().map(|group| group.name.as_str()));
    self::groups(document, findings);
    rules(document, &groups, findings);
    for (index, network) in document.network.iter().enumerate() {
        self::network(network, index, findings);
    }
    let ruled: HashSet<&str> = document.rule.iter().map(|rule| rule.group.as_str()).collect();
    for (index, port) in document.port.iter().enumerate() {
        self::port(document, port, index, &groups, &ruled, findings);
    }
}

fn groups(document: &Document, findings: &mut Findings) {
    let mut names = Seen::new(Kind::Group, "name");
    let mut ids = Seen::new(Kind::Group, "id");
    for (index, group) in document.group.iter().enumerate() {
        names.once(group.name.clone(), index, &group.name, findings, |first| {
            format!("the name {:?} is taken{first}; choose another", group.name)
        });
        if let Some(id) = group.id {
            ids.once(id, index, &group.name, findings, |first| {
                format!("id {id} is another group's{first}; give each its own")
            });
        }
    }
    let prefixes = document.group.iter().map(|group| group.prefixes.len());
    let addresses = document.port.iter().map(|port| port.groups.len() * port.addresses.len());
    let members: usize = prefixes.chain(addresses).sum();
    if let (true, Some(last)) = (members > MEMBERS_MAX, document.group.last()) {
        let message = format!("{members} members in all groups; a policy has {MEMBERS_MAX} at most");
        mistake(findings, Kind::Group, document.group.len() - 1, &last.name, "prefixes", message);
    }
}

fn rules(document: &Document, groups: &Known<'_>, findings: &mut Findings) {
    let mut names = Seen::new(Kind::Rule, "name");
    let missing = |index, rule: &str, key, group: &str, findings: &mut Findings| {
        if !groups.has(group) {
            mistake(findings, Kind::Rule, index, rule, key, groups.without(group));
        }
    };
    for (index, rule) in document.rule.iter().enumerate() {
        names.once(rule.name.clone(), index, &rule.name, findings, |first| {
            format!("the name {:?} is taken{first}; choose another, or leave it out", rule.name)
        });
        if !rule.group.is_empty() {
            missing(index, &rule.name, "group", &rule.group, findings);
        }
        if let Remote::Group(group) = &rule.remote {
            let key = rule.far_end_key();
            missing(index, &rule.name, key, group, findings);
        }
    }
}

fn network(network: &Network, index: usize, findings: &mut Findings) {
    let mut report = |key, message| mistake(findings, Kind::Network, index, &network.name, key, message);
    let remotes: HashSet<_> = network.remotes.iter().collect();
    for remote in network.trusted_remotes.iter().filter(|remote| !remotes.contains(remote)) {
        report("trusted_remotes", format!("{remote} is not among remotes: add it there, or remove it here"));
    }
    if network.group_policy && network.underlay.is_none() {
        report(
            "group_policy",
            "a network without vni and underlay has no tunnel: add both, or remove group_policy".into(),
        );
    }
}

fn port(
    document: &Document,
    port: &Port,
    index: usize,
    groups: &Known<'_>,
    ruled: &HashSet<&str>,
    findings: &mut Findings,
) {
    let mut listed = HashSet::new();
    for group in &port.groups {
        let message = match (groups.has(group), listed.insert(group)) {
            (false, _) => groups.without(group),
            (true, false) => format!("{group:?} is listed twice"),
            (true, true) => continue,
        };
        mistake(findings, Kind::Port, index, &port.name, "groups", message);
    }
    let Some(network) = document.find_network(&port.network) else { return };
    let mut warn = |key, message: &str| {
        let warning = at(findings, Kind::Port, index, &port.name, key, message.to_owned());
        findings.warnings.push(warning);
    };
    if port.addresses.is_empty() && !port.groups.is_empty() {
        warn(
            "groups",
            "without addresses no rule knows the port as a member, and it may claim those of others: add them",
        );
    } else if port.addresses.is_empty() && network.policy == Posture::Enforced {
        warn("network", "without addresses the port may claim those of any group's members: add them");
    }
    let judged = network.policy == Posture::Enforced || port.groups.iter().any(|group| ruled.contains(group.as_str()));
    for (key, set) in
        [("connections", port.limits.connections.is_some()), ("new_flows", port.limits.new_flows.is_some())]
    {
        if set && !judged {
            warn(key, "no effect: in an open network, connections of a port without rules are not tracked");
        }
    }
}
