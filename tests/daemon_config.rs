//! The configuration: every mistake is reported at once, with its line and what to do.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::path::Path;

use common::documents::{accept, expect_marked, mistakes};
use dreamwire::config::diff::between;
use dreamwire::config::{Context, from_json, from_json_text, from_toml};

const GOOD: &str = r#"
[daemon]
run_dir = "/run/dreamwire"
workers = [1]
polling = "interrupt"
resume_latency_us = 20

[[underlay]]
name = "fabric"
address = "192.0.2.1"
mtu = 1600

[[network]]
name = "blue"
vni = 100
underlay = "fabric"
remotes = ["192.0.2.2"]

[[port]]
name = "vm1"
network = "blue"
mac = "52:54:00:00:00:01"
"#;

#[test]
fn a_good_document_is_accepted_and_survives_json() {
    let accepted = accept(GOOD);
    assert_eq!(accepted.warnings, []);
    let port = accepted.document.find_port("vm1").unwrap();
    assert_eq!(port.socket, Path::new("/run/dreamwire/vm1.sock"));
    assert_eq!((port.queues, accepted.document.network[0].age_seconds), (1, 300));
    let again = from_json(&accepted.document.to_json(), Context::default()).unwrap();
    assert_eq!(again.document, accepted.document);
}

#[test]
fn only_a_pinned_workers_cpu_is_known() {
    expect_marked("[daemon]\nresume_latency_us = 0 #! only for workers that are pinned: add workers = [1]\n");
}

#[test]
fn a_port_with_a_mac_hears_no_unknown_stations_unless_told_to() {
    for (keys, hears) in [
        ("", true),
        ("mac = \"52:54:00:00:00:01\"", false),
        ("mac = \"52:54:00:00:00:01\"\nunknown_unicast = true", true),
        ("unknown_unicast = false", false),
    ] {
        let text = format!("[[network]]\nname = \"default\"\n[[port]]\nname = \"vm1\"\n{keys}\n");
        let document = accept(&text).document;
        assert_eq!(document.find_port("vm1").unwrap().hears_unknown(), hears, "{keys}");
        assert_eq!(from_json(&document.to_json(), Context::default()).unwrap().document, document);
    }
}

#[test]
fn every_mistake_of_a_value_is_reported_at_its_line() {
    expect_marked(
        r#"
colour = 1                       #! unknown key "colour"; allowed here: daemon, underlay, network, group, rule, port
[daemon]
run_dir = "run"                  #! not an absolute path
workers = [1, 2, 1]              #! CPU 1 is listed twice
polling = "sometimes"            #! unknown value "sometimes"; allowed: "poll", "adaptive", "interrupt"
resume_latency_us = 1000001      #! 1000001 is out of range: 0 to 1000000 (microseconds)
[[underlay]]                     #! underlay[0].address: missing: add address = "192.0.2.1" #! underlay[0].name: missing
driver = "dpdk"                  #! unknown value "dpdk"; allowed: "socket", "af_xdp", "vhost-user"
device = "much-too-long-a-name"  #! not a network device's name
mtu = 67                         #! 67 is out of range: 68 to 65535
[[underlay]]
name = "six"
address = "2001:db8::1/64"       #! not an IP address
port = 0                         #! out of range: 1 to 65535
[[network]]
name = "blue green"              #! not a name: 1 to 64
vni = 16777216                   #! 16777216 is out of range: 0 to 16777215 (RFC 7348
underlay = "fabrik"              #! no underlay is called "fabrik" (there are: six)
encapsulation = "geneve"         #! "geneve" is not implemented yet
learning = "yes"                 #! expected true or false, found a string
age_seconds = 0                  #! out of range
[[network]]
name = "local"
remotes = ["224.0.0.1"]          #! 224.0.0.1 is no host's address
[[network]]
name = "half"
vni = 7                          #! a network with a vni needs an underlay
mtu = 1500.5                     #! expected an integer, found a fraction
[[port]]
name = "vm1"
network = "bleu"                 #! no network is called "bleu"
mac = "01:00:5e:00:00:01"        #! is a multicast address
queues = 17                      #! 17 is out of range: 1 to 16 (queue pairs)
mode = "listen"                  #! allowed: "server", "client"
colour = "red"                   #! port.vm1.colour: unknown key "colour"; allowed here: name, network, socket, mode, mac, addresses, unknown_unicast, queues, worker, config_space, features
[[port]]
name = "vm2"
network = "local"
mac = "52:54:00:12:34"           #! is not a MAC address
features = { tso = true, lro = false } #! port.vm2.features.lro: unknown switch "lro"; allowed here: csum, tso
"#,
    );
}

#[test]
fn a_worker_that_does_not_exist_is_reported_at_its_line() {
    expect_marked(
        r#"
[daemon]
workers = [2, 5]
[[underlay]]
name = "fabric"
address = "192.0.2.1"
worker = 2                       #! underlay.fabric.worker: no worker 2: there are 0 to 1
[[network]]
name = "default"
[[port]]
name = "vm1"
worker = 1
[[port]]
name = "vm2"
worker = 7                       #! port.vm2.worker: no worker 7: there are 0 to 1
[[port]]
name = "vm3"
worker = 16                      #! port.vm3.worker: 16 is out of range: 0 to 15
"#,
    );
    expect_marked("[[network]]\nname = 'default'\n[[port]]\nname = 'vm1'\nworker = 1 #! there is worker 0 alone\n");
    expect_marked("[daemon]\nworkers = [] #! empty: name a CPU for each\n");
    let cpus: Vec<_> = (0..17).collect();
    expect_marked(&format!("[daemon]\nworkers = {cpus:?} #! 17 workers; one daemon has 16 at most\n"));
}

#[test]
fn an_address_needs_the_card_it_belongs_to() {
    expect_marked(
        r#"
[[network]]
name = "default"
[[port]]
name = "vm1"
addresses = ["10.0.0.1"]   #! the source guard needs the card's address too
"#,
    );
}

#[test]
fn objects_that_clash_are_reported_with_the_line_of_the_first() {
    expect_marked(
        r#"
[[underlay]]
name = "fabric"
address = "192.0.2.1"
mtu = 1600
[[underlay]]
name = "fabric"                  #! the name "fabric" is taken (line 3)
address = "192.0.2.1"            #! 192.0.2.1 port 4789 is another underlay's (line 4)
[[network]]
name = "blue"
vni = 100
underlay = "fabric"
remotes = ["192.0.2.1", "2001:db8::2", "192.0.2.3", "192.0.2.3"] #! this host's own #! another address family #! listed twice
[[network]]
name = "blue"                    #! the name "blue" is taken (line 10)
[[network]]
name = "red"
vni = 100                        #! vni 100 on underlay "fabric" is another network's (line 11)
underlay = "fabric"
[[port]]
name = "vm1"
network = "blue"
mac = "52:54:00:00:00:01"
socket = "/tmp/x.sock"
[[port]]
name = "vm1"                     #! the name "vm1" is taken (line 21)
network = "blue"
mac = "52:54:00:00:00:01"        #! another port's in network "blue" (line 23)
socket = "/tmp//x.sock"          #! another port's socket (line 24)
[[port]]                         #! /run/dreamwire/api.sock is the daemon's own
name = "api"
network = "red"
mac = "52:54:00:00:00:01"
"#,
    );
}

#[test]
fn a_wire_of_its_own_is_accepted_and_survives_json() {
    let accepted = accept(
        r#"
[[underlay]]
name = "fabric"
driver = "vhost-user"
mode = "client"
mac = "02:00:00:00:00:01"
address = "192.0.2.1"
gateway = "192.0.2.254"
neighbours = [{ address = "192.0.2.2", mac = "02:00:00:00:00:02" }]
[[underlay]]
name = "other"
driver = "vhost-user"
socket = "/tmp/other.sock"
mac = "02:00:00:00:00:01"
address = "2001:db8::1"
"#,
    );
    let wire = accepted.document.underlay[0].wire.clone().unwrap();
    assert_eq!(wire.socket, Path::new("/run/dreamwire/fabric.sock"));
    assert_eq!(wire.neighbours[0].mac.to_string(), "02:00:00:00:00:02");
    let json = accepted.document.to_json();
    assert_eq!(json["underlay"][1]["driver"], "vhost-user");
    let again = from_json(&json, Context::default()).unwrap();
    assert_eq!(again.document, accepted.document);
}

#[test]
fn each_mistake_about_a_bypassed_device_is_reported_at_its_line() {
    let text = "[[underlay]]\nname='x'\ndriver='af_xdp'\naddress='192.0.2.1'\ndevice='eth1'\nqueues=4\nmtu=1600\n";
    let accepted = accept(text);
    assert_eq!(
        (accepted.document.underlay[0].queues, accepted.document.to_json()["underlay"][0]["driver"].as_str()),
        (Some(4), Some("af_xdp"))
    );
    let again = from_json(&accepted.document.to_json(), Context::default()).unwrap();
    assert_eq!(again.document, accepted.document);
    expect_marked(
        r#"
[[underlay]]
name = "a"
driver = "af_xdp"
device = "eth1"
address = "192.0.2.1"
queues = 65                      #! 65 is out of range: 1 to 64 (queues of the device)
mtu = 9000                       #! driver "af_xdp" carries packets of up to 3826 bytes
[[underlay]]
name = "b"
driver = "af_xdp"
device = "eth1"                  #! underlay "a" has that device
address = "192.0.2.2"
mac = "02:00:00:00:00:01"        #! only driver "vhost-user" has it
[[underlay]]                     #! missing: add device = "eth1"
name = "c"
driver = "af_xdp"
address = "192.0.2.3"
[[underlay]]
name = "d"
address = "192.0.2.4"
queues = 2                       #! only driver "af_xdp" has it
"#,
    );
}

#[test]
fn each_mistake_about_a_wire_is_reported_at_its_line() {
    expect_marked(
        r#"
[[underlay]]
name = "a"
address = "192.0.2.1"
mac = "02:00:00:00:00:01"                     #! only driver "vhost-user" has it
[[underlay]]                                  #! missing: add mac = "02:00:00:00:00:01"
name = "b"
driver = "vhost-user"
device = "eth1"                               #! uses no network device
address = "192.0.2.2"
gateway = "2001:db8::1"                       #! another address family
neighbours = ["192.0.2.3", { address = "192.0.2.3" }, { address = "192.0.2.3", mac = "x" }] #! expected { address = "...", mac = "..." } #! is not a MAC address
[[underlay]]
name = "c"
driver = "vhost-user"
socket = "/run/dreamwire/api.sock"            #! is the daemon's own
mac = "02:00:00:00:00:01"
address = "192.0.2.4"
neighbours = [{ address = "192.0.2.4", mac = "02:00:00:00:00:02" }] #! this host's own
[[underlay]]
name = "d"
driver = "vhost-user"
socket = "/run/dreamwire/vm1.sock"            #! port "vm1"'s socket
mac = "02:00:00:00:00:01"
address = "192.0.2.5"
neighbours = [{ address = "192.0.2.6", mac = "02:00:00:00:00:02" }, { address = "192.0.2.6", mac = "02:00:00:00:00:03" }] #! listed twice
[[network]]
name = "default"
[[port]]
name = "vm1"
"#,
    );
}

#[test]
fn paths_and_lists_have_limits() {
    let long = "x".repeat(108);
    let found = mistakes(&format!("[[network]]\nname='default'\n[[port]]\nname='a'\nsocket='/{long}'\n"));
    assert!(found[0].to_string().starts_with("line 5: port.a.socket: 109 bytes long"), "{found:#?}");
    let ports: String = (0..=1024).map(|n| format!("[[port]]\nname='p{n}'\n")).collect();
    let found = mistakes(&format!("[[network]]\nname='default'\n{ports}"));
    assert_eq!(found[0].to_string(), "line 2051: port: 1025 objects; one daemon serves 1024 at most");
    let remotes: Vec<_> = (0..257).map(|n| format!("'10.0.{}.{}'", n / 250, n % 250 + 1)).collect();
    let network = format!("[[network]]\nname='n'\nvni=1\nunderlay='u'\nremotes=[{}]\n", remotes.join(","));
    let found = mistakes(&format!("[[underlay]]\nname='u'\naddress='192.0.2.1'\nmtu=1600\n{network}"));
    assert_eq!(found[0].to_string(), "line 9: network.n.remotes: 257 remotes; one network has 256 at most");
}

#[test]
fn a_wire_too_narrow_for_its_tunnel_is_a_warning() {
    for (address, lower, raise) in [("192.0.2.1", 1450, 1550), ("2001:db8::1", 1430, 1570)] {
        let text = format!("[[underlay]]\nname='u'\naddress='{address}'\n[[network]]\nname='n'\nvni=1\nunderlay='u'\n");
        let warnings = accept(&text).warnings;
        assert_eq!(warnings.len(), 1);
        let said = warnings[0].to_string();
        assert!(said.starts_with("line 4: network.n.mtu: mtu 1500"), "{said}");
        assert!(said.contains(&format!("lower it to {lower} or raise the underlay's to {raise}")), "{said}");
    }
}

#[test]
fn syntax_errors_have_their_lines() {
    let found = mistakes("[[port]]\nname = \n[[network]\nname = 'a'\nname = 'b'\n");
    let lines: Vec<_> = found.iter().map(|mistake| mistake.line).collect();
    assert!(lines.contains(&Some(2)) && lines.contains(&Some(3)), "{found:#?}");
    let found = from_json_text("{\n\"port\": [,]\n}", Context::default()).unwrap_err();
    assert_eq!(found[0].line, Some(2), "{found:#?}");
    let found = from_json_text("[]", Context::default()).unwrap_err();
    assert_eq!(found[0].message, "expected an object, found a list");
}

#[test]
fn a_running_daemon_keeps_what_is_fixed_at_start() {
    let running = accept(GOOD).document.daemon;
    let context = Context { run_dir: None, running: Some(&running) };
    let text = "[daemon]\nrun_dir='/elsewhere'\nworkers=[0]\npolling='poll'\nresume_latency_us=5\n";
    let found = from_toml(text, context).unwrap_err();
    let lines: Vec<_> = found.iter().map(|mistake| mistake.line).collect();
    assert_eq!(lines, [Some(2), Some(3), Some(4), Some(5)], "{found:#?}");
    assert!(found.iter().all(|mistake| mistake.message.contains("restart the daemon to change it")), "{found:#?}");
    assert_eq!(from_toml("", context).unwrap().document.daemon, running);
}

#[test]
fn differences_name_the_object_and_the_key() {
    let old = accept(GOOD).document;
    let new = accept(&GOOD.replace("192.0.2.2", "192.0.2.3").replace("vm1", "vm2").replace("vni = 100", "vni = 7"));
    let said: Vec<_> = between(&old, &new.document).iter().map(ToString::to_string).collect();
    assert_eq!(
        said,
        [
            "~ network blue remotes: [\"192.0.2.2\"] → [\"192.0.2.3\"]",
            "~ network blue vni: 100 → 7",
            "- port vm1",
            "+ port vm2"
        ]
    );
    assert_eq!(between(&old, &old), []);
}

#[test]
fn the_example_is_accepted_without_a_warning() {
    let example = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/dreamwire.example.toml"));
    let accepted = accept(&example.unwrap());
    assert_eq!(accepted.warnings, []);
    assert_eq!((accepted.document.network.len(), accepted.document.port.len()), (2, 3));
}
