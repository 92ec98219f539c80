//! Reads groups and rules.

use std::collections::{HashMap, HashSet};

use dreamwire_policy::model::{MEMBERS_MAX, RANGES_MAX};
use dreamwire_policy::{Action, Direction, Family, Protocol};

use super::decode::{name, name_of};
use super::fields::Fields;
use super::notation::{DIRECTIONS, direction_word, has_ports, icmp_kind, port_range, prefix, protocol};
use super::rules::{Group, Remote, Rule};

/// A group's name is a part of its rules' names: `NAME-ingress-65536` is a name too.
const GROUP_NAME_BYTES_MAX: usize = 48;
const PRIORITY_DEFAULT: u16 = 100;

pub(super) fn group(fields: &mut Fields<'_>) -> Group {
    let name = name_of(fields);
    if name.len() > GROUP_NAME_BYTES_MAX {
        fields.mistake(
            "name",
            format!("{name:?} is too long: a group's name has {GROUP_NAME_BYTES_MAX} letters at most"),
        );
    }
    Group {
        name,
        prefixes: fields.texts("prefixes", MEMBERS_MAX, prefix).unwrap_or_default(),
        id: fields
            .integer("id", 1..=65535, "VXLAN group policy: 16 bits, 0 is none")
            .and_then(|id| u16::try_from(id).ok()),
    }
}

pub(super) fn rule(fields: &mut Fields<'_>) -> Rule {
    let given = fields.text("name", name);
    // A name that is wrong gets one that no object may have; one that is missing is made up when all others are known.
    let nameless = if fields.has("name") { format!("#{}", fields.at.index) } else { String::new() };
    let group = fields.required("group", "\"web\"", name).unwrap_or_default();
    if !fields.has("direction") {
        fields.mistake("direction", "missing: add direction = \"ingress\" or \"egress\", seen from the VM");
    }
    let direction = fields.word("direction", &DIRECTIONS, &[]).unwrap_or(Direction::Ingress);
    let (action, protocol) = action(fields);
    let ports = fields.items("ports", RANGES_MAX, port_range);
    if !ports.is_empty() && !protocol.is_some_and(has_ports) {
        fields.mistake("ports", "only tcp, udp, sctp and 136 (UDP-Lite) have ports: name one of them, or remove ports");
    }
    let icmp = match protocol {
        Some(protocol @ (Protocol::Icmp | Protocol::Icmpv6)) => {
            fields.items("icmp", RANGES_MAX, |text| icmp_kind(protocol, text))
        }
        _ => {
            fields.not_here("icmp", "only icmp and icmpv6 have ICMP types: name one of them, or remove it");
            Vec::new()
        }
    };
    Rule {
        name: given.unwrap_or(nameless),
        group,
        direction,
        action,
        protocol: protocol.unwrap_or(Protocol::Any),
        ports,
        icmp,
        remote: remote(fields, direction, protocol),
        priority: fields
            .integer("priority", 0..=65535, "the highest wins")
            .and_then(|priority| u16::try_from(priority).ok())
            .unwrap_or(PRIORITY_DEFAULT),
        log: fields.boolean("log").unwrap_or(false),
    }
}

fn action(fields: &mut Fields<'_>) -> (Action, Option<Protocol>) {
    let allow = fields.scalar("allow", protocol);
    let deny = fields.scalar("deny", protocol);
    match (fields.has("allow"), fields.has("deny")) {
        (true, true) => fields.mistake("deny", "a rule allows or denies, not both: make it two rules"),
        (false, false) => {
            fields.mistake("allow", "missing: add allow = \"tcp\" or deny = \"tcp\" (or any, udp, icmp...)")
        }
        _ => {}
    }
    if fields.has("deny") { (Action::Deny, deny) } else { (Action::Allow, allow) }
}

fn remote(fields: &mut Fields<'_>, direction: Direction, protocol: Option<Protocol>) -> Remote {
    let (key, other) = match direction {
        Direction::Ingress => ("from", "to"),
        Direction::Egress => ("to", "from"),
    };
    let word = direction_word(direction);
    fields.not_here(other, &format!("the far end of {word} is written {key} = ...; the near end is the group's ports"));
    let read = |text: &str| match text.strip_prefix("group:") {
        Some(group) => Ok(Remote::Group(group.to_owned())),
        None if text == "any" => Ok(Remote::Any),
        None => prefix(text).map(Remote::Prefix).map_err(|error| format!("{error}; or any, or group:NAME")),
    };
    let remote = fields.text(key, read).unwrap_or(Remote::Any);
    if let (Remote::Prefix(prefix), Some(protocol)) = (&remote, protocol) {
        let other = match (protocol, Family::of(prefix.address())) {
            (Protocol::Icmp, Family::V6) => Some("icmp is of IPv4, the prefix of IPv6: name icmpv6"),
            (Protocol::Icmpv6, Family::V4) => Some("icmpv6 is of IPv6, the prefix of IPv4: name icmp"),
            _ => None,
        };
        if let Some(message) = other {
            fields.mistake(key, message);
        }
    }
    remote
}

/// Gives the rules without a name one: `GROUP-DIRECTION-N` with the first N, from 1, that is free.
pub(super) fn name_rules(rules: &mut [Rule]) {
    let mut taken: HashSet<String> = rules.iter().map(|rule| rule.name.clone()).collect();
    let mut next: HashMap<(String, Direction), usize> = HashMap::new();
    for rule in rules.iter_mut().filter(|rule| rule.name.is_empty()) {
        let number = next.entry((rule.group.clone(), rule.direction)).or_insert(0);
        while rule.name.is_empty() {
            *number += 1;
            let name = format!("{}-{}-{number}", rule.group, direction_word(rule.direction));
            if taken.insert(name.clone()) {
                rule.name = name;
            }
        }
    }
}
