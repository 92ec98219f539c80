use super::*;
use crate::config::{Context, from_toml};
use crate::control::rulebook::Rulebook;

const TEXT: &str = r#"
[[underlay]]
name = "fabric"
address = "192.0.2.1"
mtu = 1600
[[network]]
name = "blue"
vni = 100
underlay = "fabric"
remotes = ["192.0.2.2"]
group_policy = true
policy = "enforced"
[[network]]
name = "open"
[[group]]
name = "web"
id = 7
[[group]]
name = "clients"
id = 8
prefixes = ["10.9.0.0/16"]
[[rule]]
name = "https"
group = "web"
direction = "ingress"
allow = "tcp"
ports = "443"
from = "group:clients"
priority = 200
[[rule]]
name = "no-web"
group = "web"
direction = "ingress"
deny = "tcp"
from = "10.0.0.0/8"
[[rule]]
name = "no-mail"
group = "clients"
direction = "egress"
deny = "tcp"
ports = "25"
[[port]]
name = "vm1"
network = "blue"
mac = "52:54:00:00:00:01"
addresses = ["10.0.0.1", "fd00::1"]
groups = ["clients"]
[[port]]
name = "vm2"
network = "blue"
mac = "52:54:00:00:00:02"
addresses = ["10.0.0.2", "fd00::2"]
groups = ["web"]
[[port]]
name = "bare"
network = "blue"
mac = "52:54:00:00:00:03"
[[port]]
name = "free"
network = "open"
"#;

struct Bench {
    document: Document,
    book: Rulebook,
    connections: BTreeMap<String, Vec<ConnectionRow>>,
}

impl Bench {
    fn new() -> Self {
        Self::of(TEXT)
    }

    fn of(text: &str) -> Self {
        let accepted = from_toml(text, Context::default()).unwrap_or_else(|mistakes| panic!("{mistakes:#?}"));
        let mut book = Rulebook::new(1);
        book.update(&accepted.document);
        Self { document: accepted.document, book, connections: BTreeMap::new() }
    }

    fn ask(&self, question: &Question) -> Answer {
        let far = ("blue".to_owned(), "52:54:00:00:00:99".parse().unwrap(), Place::Vtep("192.0.2.2".parse().unwrap()));
        let facts = Facts {
            document: &self.document,
            rules: self.book.index(),
            learned: vec![far],
            connections: self.connections.clone(),
        };
        why(question, &facts).unwrap()
    }

    fn why(&self, port: &str, protocol: &str, source: &str, destination: &str) -> Answer {
        self.ask(&question(port, protocol, source, destination))
    }
}

fn question(port: &str, protocol: &str, source: &str, destination: &str) -> Question {
    let key = key(protocol, source, destination, None).unwrap();
    Question { port: port.to_owned(), key, station: None, identity: None }
}

fn row(initiator: Direction, key: Key) -> ConnectionRow {
    ConnectionRow {
        initiator,
        key,
        tcp: None,
        replied: true,
        assured: true,
        rule: None,
        identity: None,
        expires_in_ns: 1,
    }
}

fn steps(path: &Path) -> Vec<(&str, Option<&str>, Verdict)> {
    path.steps.iter().map(|step| (step.at, step.port.as_deref(), step.verdict)).collect()
}

#[test]
fn a_flow_is_followed_from_port_to_port_whichever_end_is_asked() {
    let bench = Bench::new();
    let answer = bench.why("vm1", "tcp", "10.0.0.1:40000", "10.0.0.2:443");
    assert_eq!(
        steps(&answer.path),
        [
            ("source_guard", Some("vm1"), Verdict::Pass),
            ("egress", Some("vm1"), Verdict::Pass),
            ("switch", Some("vm2"), Verdict::Pass),
            ("ingress", Some("vm2"), Verdict::Pass),
        ]
    );
    assert_eq!(answer.path.verdict, Verdict::Pass);
    let ingress = &answer.path.steps[3];
    assert_eq!(ingress.why, "rule https of group web allows it");
    let [shadowed] = ingress.shadowed.as_slice() else { panic!("{:?}", ingress.shadowed) };
    assert_eq!((&*shadowed.rule, shadowed.action, shadowed.priority), ("no-web", "deny", 100));
    assert_eq!(bench.why("vm2", "tcp", "10.0.0.1:40000", "10.0.0.2:443").path, answer.path);
    // The other end may answer, not begin: vm1 is in an enforced network.
    assert!(answer.replies.starts_with("pass"));
    assert_eq!(answer.reverse.verdict, Verdict::Drop);
    assert_eq!(answer.reverse.why, "ingress at vm1: no rule matches: in a network that is enforced, ingress is denied");
}

#[test]
fn whatever_drops_ends_the_way_and_is_named() {
    let bench = Bench::new();
    let mail = bench.why("vm1", "tcp", "10.0.0.1:40000", "10.0.0.2:25").path;
    assert_eq!((mail.verdict, mail.steps.len()), (Verdict::Drop, 2));
    assert_eq!(mail.why, "egress at vm1: rule no-mail of group clients denies it");
    let web = bench.why("vm1", "tcp", "10.0.0.1:40000", "10.0.0.2:80").path;
    assert_eq!(web.why, "ingress at vm2: rule no-web of group web denies it");
    let spoofed = bench.why("vm1", "udp", "10.0.0.7:1", "10.0.0.2:2").path;
    assert_eq!(spoofed.why, "source guard at vm1: 10.0.0.7 is not among the port's addresses");
    let server = bench.why("vm1", "udp", "10.0.0.1:67", "10.0.0.2:68").path;
    assert_eq!(server.why, "source guard at vm1: a message that only servers and routers send");
    let own = bench.why("vm1", "udp", "10.0.0.1:1", "10.0.0.1:2").path;
    assert!(own.why.starts_with("switch: the sender's own port"), "{}", own.why);
}

#[test]
fn who_has_no_address_yet_may_ask_for_one_and_no_more() {
    let bench = Bench::new();
    let guard = |question: &Question| {
        let Step { at: "source_guard", verdict, why, .. } = bench.ask(question).path.steps.swap_remove(0) else {
            panic!("{question:?}")
        };
        (verdict, why)
    };
    let dhcp = question("vm1", "udp", "0.0.0.0:68", "255.255.255.255:67");
    assert_eq!(guard(&dhcp), (Verdict::Pass, "a DHCP client has no address yet: 0.0.0.0 passes".to_owned()));
    let other = question("vm1", "udp", "0.0.0.0:68", "255.255.255.255:68");
    assert_eq!(guard(&other), (Verdict::Drop, "0.0.0.0 is not among the port's addresses".to_owned()));
    // It renews an address that it has.
    let renews = question("vm1", "udp", "10.0.0.1:68", "10.0.0.2:67");
    assert_eq!(guard(&renews), (Verdict::Pass, "10.0.0.1 is the port's own".to_owned()));

    let icmpv6 = |kind| {
        let key = key("icmpv6", "::", "ff02::1", Some(kind)).unwrap();
        guard(&Question { key, ..dhcp.clone() })
    };
    // Router and neighbour solicitation, listener reports.
    for kind in ["133", "135", "131", "143"] {
        let passes = "neighbour discovery begins without an address: :: passes".to_owned();
        assert_eq!(icmpv6(kind), (Verdict::Pass, passes), "{kind}");
    }
    // A listener query and an echo request: the guard reads them as any other packet.
    for kind in ["130", "128"] {
        assert_eq!(icmpv6(kind), (Verdict::Drop, ":: is not among the port's addresses".to_owned()), "{kind}");
    }
}

#[test]
fn other_hosts_are_reached_by_station_and_known_by_identity() {
    let bench = Bench::new();
    let far = question("vm1", "udp", "10.0.0.1:1", "10.0.0.99:53");
    let unknown = bench.ask(&far).path;
    assert_eq!(unknown.verdict, Verdict::Unknown);
    assert!(unknown.why.contains("no port of this network has 10.0.0.99"), "{}", unknown.why);
    let known = bench.ask(&Question { station: Some("52:54:00:00:00:99".parse().unwrap()), ..far }).path;
    assert_eq!(known.verdict, Verdict::Pass);
    assert_eq!(
        known.steps[2].why,
        "to host 192.0.2.2, where the station was learned, in VXLAN 100 over fabric, from group 8"
    );
    let arrives = question("vm2", "tcp", "10.0.0.99:1", "10.0.0.2:443");
    assert_eq!(bench.ask(&arrives).path.why, "ingress at vm2: rule no-web of group web denies it");
    // As in the datapath, an identity is worth what its remote is.
    let told = Question { identity: Some(8), ..arrives };
    let ignored = bench.ask(&told).path;
    assert_eq!(ignored.verdict, Verdict::Drop);
    assert_eq!(
        ignored.why,
        "ingress at vm2: rule no-web of group web denies it (identity 8 is ignored: network blue has no trusted_remotes)"
    );
    let bench =
        Bench::of(&TEXT.replace("group_policy = true", "group_policy = true\ntrusted_remotes = [\"192.0.2.2\"]"));
    let believed = bench.ask(&told).path;
    assert_eq!((believed.verdict, believed.steps.len()), (Verdict::Pass, 2));
    assert_eq!(
        believed.steps[1].why,
        "rule https of group web allows it (identity 8 is believed if the remote is one of 192.0.2.2)"
    );
    let none = bench.ask(&Question { identity: Some(0), ..told }).path;
    assert!(none.why.ends_with("denies it (identity 0 is none)"), "{}", none.why);
}

#[test]
fn a_connection_carries_its_packets_while_the_rules_let_its_first_through() {
    let mut bench = Bench::new();
    let first = key("tcp", "10.0.0.1:40000", "10.0.0.2:443", None).unwrap();
    bench.connections.insert("vm1".to_owned(), vec![row(Direction::Egress, first)]);
    bench.connections.insert("vm2".to_owned(), vec![row(Direction::Ingress, first)]);
    let reply = bench.why("vm2", "tcp", "10.0.0.2:443", "10.0.0.1:40000").path;
    assert_eq!(reply.verdict, Verdict::Pass, "{}", reply.why);
    assert!(reply.steps[3].connection && reply.steps[3].why.starts_with("a connection carries it (answered)"));
    let denied = key("tcp", "10.0.0.1:40000", "10.0.0.2:80", None).unwrap();
    bench.connections.insert("vm2".to_owned(), vec![row(Direction::Ingress, denied)]);
    let ending = bench.why("vm1", "tcp", "10.0.0.1:40000", "10.0.0.2:80").path;
    assert!(ending.why.contains("its connection ends with its next packet; rule no-web"), "{}", ending.why);
    // Another port pair is another connection.
    assert!(!bench.why("vm1", "tcp", "10.0.0.1:40001", "10.0.0.2:80").path.steps[3].connection);
}

#[test]
fn icmp_and_ports_without_addresses() {
    let bench = Bench::new();
    let ping = bench.why("vm1", "icmp", "10.0.0.1", "10.0.0.2").path;
    assert_eq!((ping.verdict, ping.flow.icmp.as_deref()), (Verdict::Drop, Some("8/0")));
    let answer = key("icmp", "10.0.0.1", "10.0.0.2", Some("echo-reply")).unwrap();
    let question = Question { port: "vm1".to_owned(), key: answer, station: None, identity: None };
    assert!(bench.ask(&question).path.why.contains("an answer to a query"));
    // With the query's connection, whatever its identifier, the answer passes.
    let mut asked = key("icmp", "10.0.0.2", "10.0.0.1", None).unwrap();
    asked.source_port = 77;
    let mut carried = Bench::new();
    carried.connections.insert("vm1".to_owned(), vec![row(Direction::Ingress, asked)]);
    let step = &carried.ask(&question).path.steps[1];
    assert!(step.connection, "{}", step.why);
    let error = key("icmp", "10.0.0.1", "10.0.0.2", Some("destination-unreachable")).unwrap();
    let error = Question { key: error, ..question.clone() };
    assert_eq!(bench.ask(&error).path.steps[1].verdict, Verdict::Unknown);
    let six = bench.why("vm1", "tcp", "[fd00::1]:1", "[fd00::2]:443").path;
    assert_eq!(six.verdict, Verdict::Pass, "members are IPv6 addresses too");
    let bare = bench.why("bare", "tcp", "10.0.0.1:1", "10.0.0.2:443").path;
    assert!(bare.steps[0].why.contains("may claim any"), "{}", bare.steps[0].why);
    let free = bench.why("free", "udp", "10.0.0.1:1", "255.255.255.255:67").path;
    assert_eq!(free.steps[1].why, "no rule applies to the port, and its network is open");
    assert!(free.why.contains("a group address"), "{}", free.why);
    assert!(
        why(
            &Question { port: "none".to_owned(), ..question },
            &Facts {
                document: &bench.document,
                rules: bench.book.index(),
                learned: Vec::new(),
                connections: BTreeMap::new(),
            }
        )
        .is_none()
    );
}
