use std::time::{Duration, Instant};

use dreamwire_policy::{Direction, Key};

use super::*;
use crate::config::{Context, from_toml};

const TWO_TENANTS: &str = r#"
[[network]]
name = "blue"
policy = "enforced"
[[network]]
name = "red"
policy = "enforced"
[[group]]
name = "web"
[[group]]
name = "frontends"
prefixes = ["192.0.2.0/24"]
id = 7
[[group]]
name = "lonely"
[[rule]]
group = "web"
direction = "ingress"
allow = "tcp"
ports = "443"
from = "group:frontends"
[[rule]]
group = "lonely"
direction = "egress"
deny = "udp"
[[port]]
name = "web1"
network = "blue"
groups = ["web"]
mac = "52:54:00:00:00:01"
addresses = ["10.0.0.1"]
[[port]]
name = "web2"
network = "blue"
groups = ["web"]
mac = "52:54:00:00:00:02"
addresses = ["10.0.0.2"]
[[port]]
name = "front"
network = "blue"
groups = ["frontends"]
mac = "52:54:00:00:00:03"
addresses = ["10.0.0.3"]
[[port]]
name = "red-web"
network = "red"
groups = ["web"]
mac = "52:54:00:00:00:01"
addresses = ["10.0.0.1"]
[[port]]
name = "other"
network = "red"
groups = ["lonely"]
mac = "52:54:00:00:00:04"
addresses = ["10.0.0.4"]
"#;

fn read(text: &str) -> Document {
    from_toml(text, Context::default()).unwrap_or_else(|mistakes| panic!("{mistakes:#?}")).document
}

fn allows(book: &Rulebook, port: &str, source: &str, destination_port: u16, identity: Option<u16>) -> bool {
    let key = Key::new(6, (source.parse().unwrap(), 40000), ("10.0.0.1".parse().unwrap(), destination_port));
    book.of_port(port).unwrap().classifier.lookup(Direction::Ingress, &key, identity).allow
}

#[test]
fn members_are_prefixes_and_the_ports_of_the_same_network() {
    let mut book = Rulebook::new(2);
    book.update(&read(TWO_TENANTS));
    assert!(allows(&book, "web1", "10.0.0.3", 443, None), "a port of the group");
    assert!(allows(&book, "web1", "192.0.2.9", 443, None), "a prefix of the group");
    assert!(!allows(&book, "web1", "10.0.0.3", 80, None));
    assert!(!allows(&book, "web1", "10.0.0.2", 443, None), "not in the group");
    assert!(!allows(&book, "red-web", "10.0.0.3", 443, None), "that address is somebody else's in this network");
    assert!(allows(&book, "red-web", "192.0.2.9", 443, None));
    assert!(allows(&book, "web1", "10.9.9.9", 443, Some(7)), "by identity");
    assert!(!allows(&book, "web1", "10.0.0.3", 443, Some(8)), "an unknown identity is in no group");
}

#[test]
fn ports_under_the_same_rules_share_a_classifier_and_only_what_changed_is_compiled_anew() {
    let mut book = Rulebook::new(2);
    book.update(&read(TWO_TENANTS));
    let first = |book: &Rulebook, port: &str| Arc::clone(book.of_port(port).unwrap());
    let (web1, web2, other) = (first(&book, "web1"), first(&book, "web2"), first(&book, "other"));
    assert!(Arc::ptr_eq(&web1, &web2));
    assert!(!Arc::ptr_eq(&web1, &first(&book, "red-web")), "another network's members");
    // web in blue, web in red, frontends, lonely.
    assert_eq!((book.compiled(), book.generation()), (4, 1));

    book.update(&read(TWO_TENANTS));
    assert_eq!((book.compiled(), book.generation()), (4, 1), "nothing changed");

    book.update(&read(&TWO_TENANTS.replace("\"443\"", "\"80\"")));
    assert_eq!((book.compiled(), book.generation()), (6, 2), "web, in both networks");
    assert!(!Arc::ptr_eq(&web1, &first(&book, "web1")));
    assert!(Arc::ptr_eq(&other, &first(&book, "other")));

    let before = first(&book, "red-web");
    book.update(&read(&TWO_TENANTS.replace("\"443\"", "\"80\"").replace("\"10.0.0.3\"", "\"10.0.0.33\"")));
    assert_eq!((book.compiled(), book.generation()), (7, 3), "a member moved, in blue alone");
    assert!(Arc::ptr_eq(&before, &first(&book, "red-web")));
    assert!(allows(&book, "web1", "10.0.0.33", 80, None) && !allows(&book, "web1", "10.0.0.3", 80, None));
}

#[test]
fn a_rule_keeps_its_number_when_others_come_and_go() {
    let mut book = Rulebook::new(2);
    book.update(&read(TWO_TENANTS));
    let number = |book: &Rulebook| book.index().rule_ids["lonely-egress-1"];
    let before = number(&book);
    for worker in 0..2 {
        book.counters(WorkerId(worker))[before.0 as usize].hits.add(5);
    }
    let earlier = "[[rule]]\ngroup='web'\ndirection='egress'\ndeny='any'\nto='fd00::/8'\n";
    book.update(&read(&format!("{earlier}{TWO_TENANTS}")));
    assert_eq!(number(&book), before);
    assert_eq!(book.index().rules[&before].counters.hits(), 10);
    assert_eq!(book.counters(WorkerId(0)).len(), 3);
}

/// 10,000 rules and 1,000 groups, all at one port, or each group at a port of its own.
#[test]
fn many_rules_and_groups_are_read_and_compiled_at_once() {
    use std::fmt::Write;
    let mut text = "[[network]]\nname = 'default'\npolicy = 'enforced'\n".to_owned();
    for group in 0..1_000 {
        let (high, low) = (group / 256, group % 256);
        writeln!(text, "[[group]]\nname = 'g{group}'\nprefixes = ['10.{high}.{low}.0/24']").unwrap();
    }
    for rule in 0..10_000 {
        let (group, from, port) = (rule % 1_000, (rule * 7) % 1_000, 1_000 + rule);
        writeln!(text, "[[rule]]\ngroup = 'g{group}'\ndirection = 'ingress'\nallow = 'tcp'").unwrap();
        writeln!(text, "ports = '{port}'\nfrom = 'group:g{from}'").unwrap();
    }
    for port in 0..1_000 {
        writeln!(text, "[[port]]\nname = 'p{port}'\ngroups = ['g{port}']").unwrap();
    }
    let all: Vec<_> = (0..1_000).map(|group| format!("'g{group}'")).collect();
    writeln!(text, "[[port]]\nname = 'all'\ngroups = [{}]", all.join(",")).unwrap();
    let start = Instant::now();
    let document = read(&text);
    let read_in = start.elapsed();
    let mut book = Rulebook::new(2);
    let start = Instant::now();
    book.update(&document);
    let compiled_in = start.elapsed();
    let start = Instant::now();
    book.update(&document);
    println!("read {read_in:?}, {} compiled {compiled_in:?}, again {:?}", book.compiled(), start.elapsed());
    assert_eq!(book.compiled(), 1_001);
    assert_eq!(book.of_port("all").unwrap().classifier.rules().len(), 10_000);
    // An unoptimized build on a busy machine; quadratic text handling alone took longer than this.
    assert!(read_in + compiled_in < Duration::from_secs(30));
}
