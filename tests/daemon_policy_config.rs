//! Groups, rules and limits in the configuration: what is accepted, what it becomes, and what is a mistake.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::time::{Duration, Instant};

use common::documents::{accept, expect_marked, mistakes};
use dreamwire::config::diff::between;
use dreamwire::config::{Context, Document, from_json};
use dreamwire_policy::{MeterLimits, Posture};
use serde_json::json;

const GOOD: &str = r#"
[[underlay]]
name = "fabric"
address = "192.0.2.1"
mtu = 1600
[[network]]
name = "blue"
vni = 100
underlay = "fabric"
remotes = ["192.0.2.2", "192.0.2.3"]
trusted_remotes = ["192.0.2.2"]
group_policy = true
policy = "enforced"
[[group]]
name = "web"
id = 10
[[group]]
name = "offices"
prefixes = ["203.0.113.0/24", "2001:db8::/32", "198.51.100.7"]
[[rule]]
group = "web"
direction = "ingress"
allow = "tcp"
ports = "80, 443,8000-8080"
from = "group:offices"
[[rule]]
name = "no-telnet"
group = "web"
direction = "egress"
deny = 6
ports = [23, "2323"]
priority = 200
log = true
[[rule]]
group = "web"
direction = "ingress"
allow = "icmp"
icmp = ["echo-request", "3/4"]
from = "10.0.0.0/8"
[[rule]]
group = "web"
direction = "ingress"
deny = 47
[[port]]
name = "vm1"
network = "blue"
mac = "52:54:00:00:00:01"
addresses = ["10.0.0.1"]
groups = ["web"]
connections = 1000
new_flows = { rate = 100 }
egress = { pps = 5000, bps = 100000000, bps_burst = 600000 }
ingress = { bps = 1000 }
"#;

fn again(document: &Document) -> Document {
    from_json(&document.to_json(), Context::default()).unwrap_or_else(|mistakes| panic!("{mistakes:#?}")).document
}

#[test]
fn rules_are_accepted_named_and_survive_json() {
    let accepted = accept(GOOD);
    assert_eq!(accepted.warnings, []);
    let document = accepted.document;
    assert_eq!(again(&document), document);
    let json = document.to_json();
    assert_eq!(
        json["rule"],
        json!([
            {"name": "web-ingress-1", "group": "web", "direction": "ingress", "allow": "tcp",
             "ports": ["80", "443", "8000-8080"], "from": "group:offices", "priority": 100},
            {"name": "no-telnet", "group": "web", "direction": "egress", "deny": "tcp",
             "ports": ["23", "2323"], "to": "any", "priority": 200, "log": true},
            {"name": "web-ingress-2", "group": "web", "direction": "ingress", "allow": "icmp",
             "icmp": ["echo-request", "destination-unreachable/4"], "from": "10.0.0.0/8", "priority": 100},
            {"name": "web-ingress-3", "group": "web", "direction": "ingress", "deny": "47", "from": "any", "priority": 100},
        ])
    );
    assert_eq!(
        json["group"][1],
        json!({"name": "offices", "prefixes": ["203.0.113.0/24", "2001:db8::/32", "198.51.100.7/32"]})
    );
    assert_eq!(document.network[0].policy, Posture::Enforced);
    let limits = document.port[0].limits;
    assert_eq!(json["port"][0]["new_flows"], json!({"rate": 100, "burst": 100}));
    assert_eq!(
        dreamwire::config::limits::Meter::limits(limits.egress),
        MeterLimits { packets: Some((5000, 500)), bits: Some((100_000_000, 600_000)) }
    );
    // A burst of less than one large frame would let none pass, whatever the rate.
    assert_eq!(json["port"][0]["ingress"], json!({"bps": 1000, "bps_burst": 524_464}));
}

#[test]
fn a_network_is_open_and_a_port_without_limits_unless_told_otherwise() {
    let document = accept("[[network]]\nname='default'\n[[port]]\nname='vm1'\n").document;
    assert_eq!(document.network[0].policy, Posture::Open);
    assert_eq!(document.port[0].limits, Default::default());
    assert_eq!(document.to_json()["port"][0].as_object().unwrap().get("groups"), None);
    assert_eq!(again(&document), document);
}

#[test]
fn names_are_made_up_around_those_given() {
    let rule = "[[rule]]\ngroup='a'\ndirection='egress'\nallow='any'\n";
    let text = format!("[[group]]\nname='a'\n{rule}{rule}name='a-egress-1'\n{rule}");
    let names: Vec<_> = accept(&text).document.rule.into_iter().map(|rule| rule.name).collect();
    assert_eq!(names, ["a-egress-2", "a-egress-1", "a-egress-3"]);
}

#[test]
fn every_mistake_about_rules_is_reported_at_its_line() {
    expect_marked(
        r#"
[[network]]
name = "default"
policy = "closed"              #! allowed: "open", "enforced"
group_policy = true            #! has no tunnel
trusted_remotes = ["192.0.2.9"] #! 192.0.2.9 is not among remotes
[[group]]
name = "web"
id = 0                         #! 0 is out of range: 1 to 65535
prefixes = ["10.1.2.3/16", "10.0.0.0/33", "x"] #! write 10.1.0.0/16 #! no such prefix length #! not a prefix
[[group]]
name = "web"                   #! the name "web" is taken (line 8)
id = 5
[[group]]
name = "db"
id = 5                         #! id 5 is another group's (line 13)
members = ["vm1"]              #! unknown key "members"; allowed here: name, prefixes, id
[[rule]]                       #! rule[0].group: missing #! rule[0].direction: missing #! rule[0].allow: missing
[[rule]]
name = "a"
group = "wbe"                  #! no group is called "wbe" (there are: web, web, db)
direction = "in"               #! allowed: "ingress", "egress"
allow = "tpc"                  #! "tpc" is not a protocol
[[rule]]
name = "a"                     #! the name "a" is taken (line 20)
group = "web"
direction = "ingress"
allow = "tcp"
deny = "udp"                   #! allows or denies, not both
to = "any"                     #! the far end of ingress is written from
icmp = "echo-request"          #! only icmp and icmpv6 have ICMP types
[[rule]]
group = "web"
direction = "egress"
allow = "icmp"
ports = "80"                   #! only tcp, udp, sctp
icmp = ["packet-too-big", 300] #! "packet-too-big" is not an ICMP type #! "300" is not an ICMP type
to = "fd00::/8"                #! icmp is of IPv4
from = "any"                   #! the far end of egress is written to
priority = 65536               #! out of range: 0 to 65535
[[rule]]
group = ""                     #! a name
direction = "ingress"
allow = "any"
[[rule]]
group = "web"
direction = "ingress"
allow = 256                    #! "256" is not a protocol
ports = "80"                   #! only tcp
from = "group:bd"              #! no group is called "bd"
[[rule]]
group = "web"
direction = "ingress"
allow = "udp"
ports = ["80-79", "65536", "", 1.5] #! write 79-80 #! "65536" is not a port #! "" is not a port #! found a fraction
from = "web"                   #! "web" is not a prefix
[[port]]
name = "vm1"
groups = ["bd", "db", "db"]    #! no group is called "bd" #! "db" is listed twice
connections = 0                #! out of range: 1 to 1048576
new_flows = { burst = 1 }      #! rate is missing
egress = { pps_burst = 5, mps = 1 } #! a rate is missing #! port.vm1.egress.mps: unknown key "mps"
ingress = { bps = 1000, bps_burst = 1000 } #! never lets a frame of 64 KiB pass
"#,
    );
}

#[test]
fn rules_have_limits() {
    let many: Vec<_> = (1..=65).map(|port: u16| port.to_string()).collect();
    let text = format!(
        "[[group]]\nname='a'\n[[rule]]\ngroup='a'\ndirection='egress'\nallow='tcp'\nports='{}'\n",
        many.join(",")
    );
    assert!(mistakes(&text)[0].to_string().starts_with("line 7: rule[0].ports: 65 values; one rule has 64 at most"));
    let long = "x".repeat(49);
    assert!(mistakes(&format!("[[group]]\nname='{long}'\n"))[0].message.contains("48 letters at most"));
    let rule = "[[rule]]\ngroup='a'\ndirection='egress'\nallow='any'\n".repeat(65_537);
    let found = mistakes(&format!("[[group]]\nname='a'\n{rule}"));
    assert!(found[0].message.contains("65537 objects; one daemon serves 65536 at most"), "{}", found[0]);
    // A name that is made up for a rule of the group with the longest name is a name.
    let long = "x".repeat(48);
    let rule = format!("[[rule]]\ngroup='{long}'\ndirection='ingress'\nallow='any'\n");
    let document = accept(&format!("[[group]]\nname='{long}'\n{rule}")).document;
    assert_eq!(again(&document), document);
}

/// Megabytes of mistakes cost no more than reading them, and what is said of them is short.
#[test]
fn a_document_of_nothing_but_mistakes_is_refused_soon_and_in_few_words() {
    let rule = "[[rule]]\ngroup='a'\ndirection='egress'\nallow='tcp'\n";
    let group = "[[group]]\nname='a'\n";
    let commas = ",".repeat(8 << 20);
    let lists: String = (0..200_000).map(|number| format!("'{number}',")).collect();
    let groups: String = (0..16_384).map(|number| format!("[[group]]\nname='g{number}'\n")).collect();
    let network = "[[network]]\nname='default'\n";
    let cases = [
        ("ports", format!("{group}{rule}ports='{commas}'\n"), 2, "8388609 values; one rule has 64 at most"),
        ("syntax", "=\n".repeat(600_000), 1, "not valid TOML"),
        ("prefixes", format!("{group}prefixes=[{lists}]\n"), 1001, "and 199000 more"),
        ("rules", format!("{groups}{}", rule.repeat(20_000)), 1001, "and 19000 more"),
        (
            "groups",
            format!("{network}{group}[[port]]\nname='p'\ngroups=[{}]\n", "'a',".repeat(16_384)),
            1,
            "listed twice",
        ),
        ("keys", format!("[[port]]\nname='{}'\n{}", "x".repeat(1 << 20), unknown_keys(5000)), 1001, "and 4002 more"),
    ];
    for (what, text, count, said) in cases {
        let begun = Instant::now();
        let found = mistakes(&text);
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}: {:?}", begun.elapsed());
        assert_eq!(found.len(), count, "{what}: {:?}", found.last());
        assert!(found.iter().any(|mistake| mistake.message.contains(said)), "{what}: {:?}", found.last());
        let bytes: usize = found.iter().map(|mistake| mistake.path.len() + mistake.message.len()).sum();
        assert!(bytes < 1 << 20, "{what}: {bytes} bytes");
    }
}

fn unknown_keys(count: usize) -> String {
    (0..count).map(|number| format!("k{number}=1\n")).collect()
}

#[test]
fn what_has_no_effect_is_a_warning() {
    let text = "[[network]]\nname='default'\n[[group]]\nname='a'\n[[port]]\nname='vm1'\ngroups=['a']\nconnections=5\n";
    let said: Vec<_> = accept(text).warnings.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].starts_with("line 7: port.vm1.groups: without addresses"), "{said:?}");
    assert!(said[1].starts_with("line 8: port.vm1.connections: no effect"), "{said:?}");
    let ruled = format!("{text}[[rule]]\ngroup='a'\ndirection='egress'\ndeny='tcp'\n");
    assert_eq!(accept(&ruled).warnings.len(), 1);
    let warnings = accept("[[network]]\nname='default'\npolicy='enforced'\n[[port]]\nname='vm1'\n").warnings;
    assert!(warnings[0].to_string().contains("port.vm1.network: without addresses"), "{warnings:?}");
}

#[test]
fn differences_name_rules_and_groups() {
    let old = accept(GOOD).document;
    let new = accept(
        &GOOD
            .replace("\"80, 443,8000-8080\"", "443")
            .replace("name = \"no-telnet\"", "name = \"telnet\"")
            .replace("id = 10", "id = 11")
            .replace("connections = 1000\n", "")
            .replace("\"enforced\"", "\"open\""),
    );
    let said: Vec<_> = between(&old, &new.document).iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "~ network blue policy: enforced → open",
            "~ group web id: 10 → 11",
            "- rule no-telnet",
            "+ rule telnet",
            "~ rule web-ingress-1 ports: [\"80\",\"443\",\"8000-8080\"] → [\"443\"]",
            "~ port vm1 connections: 1000 → none",
        ]
    );
}
