//! What `dreamwire qemu-args` prints attaches a VM, as printed.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::path::PathBuf;

use common::counters::{assert_conserved, assert_quiet_log, wait_connected};
use common::*;
use dreamwire_bench::topology::{GuestSpec, Needs, Netns, Wire, available};

#[test]
fn printed_flags_attach_a_guest_in_both_modes() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let mac_key = |number: u8| format!("mac = \"{}\"", mac_text(number));
    let listening = port(1, &format!("{}\nqueues = 2", mac_key(1)));
    let connecting = port(2, &format!("{}\nmode = \"client\"", mac_key(2)));
    let daemon = start_daemon("host", &host, &format!("{DAEMON}{LOCAL_NETWORK}{listening}{connecting}"));
    let guests = boot([1, 2].map(|number| {
        let name = format!("vm{number}");
        let flags = daemon.cli(&["qemu-args", &name]).unwrap();
        // The card is the flags'; of this one only the guest's addresses are used.
        let addresses = nic(Wire::VhostUser(PathBuf::new()), number);
        GuestSpec::new(&name).cpus(2).nic(addresses).pasted(&flags)
    }));
    let [one, two] = &guests;
    assert_ping(one, "10.0.0.2");
    assert_ping(two, "fd00::1");
    for (guest, number) in [(one, 1), (two, 2)] {
        assert_eq!(guest.exec(&["cat", "/sys/class/net/eth0/address"]).unwrap().trim(), mac_text(number));
        assert_eq!(guest.exec(&["cat", "/sys/class/net/eth0/mtu"]).unwrap(), "1500\n");
    }
    let channels = one.exec(&["ethtool", "-l", "eth0"]).unwrap();
    assert_eq!(channels.lines().filter(|line| *line == "Combined:\t2").count(), 2, "{channels}");

    // QEMU that listened is killed and listens again: the daemon finds it.
    let [one, two] = guests;
    two.kill().unwrap();
    wait_connected(&daemon, "vm2", false);
    let flags = daemon.cli(&["qemu-args", "vm2"]).unwrap();
    let [two] = boot([GuestSpec::new("vm2").nic(nic(Wire::VhostUser(PathBuf::new()), 2)).pasted(&flags)]);
    assert_ping(&two, "10.0.0.1");
    assert_ping(&one, "10.0.0.2");
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

#[test]
fn libvirt_xml_is_well_formed_and_names_the_port() {
    if !available(Needs::Netns) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let odd = port(2, "mode = \"client\"\nqueues = 4").replace("vm2.sock", "it's <2> & \\\"more\\\".sock");
    let daemon = start_daemon("host", &host, &format!("{DAEMON}{LOCAL_NETWORK}{}{odd}", port(1, "")));
    let xml = |port: &str| daemon.cli(&["qemu-args", port, "--libvirt"]).unwrap();

    let one = xml("vm1");
    assert_eq!(
        elements(&one),
        ["memoryBacking", "source", "access", "interface", "mac", "source", "reconnect", "model", "driver", "rom"]
    );
    let socket = format!("path='{}' mode='client'", daemon.path("vm1.sock").display());
    assert!(one.contains(&socket) && one.contains("<source type='memfd'/>"), "{one}");

    let two = xml("vm2");
    elements(&two);
    assert!(two.contains("it&apos;s &lt;2&gt; &amp; \"more\".sock' mode='server'"), "{two}");
    assert!(two.contains("<driver queues='4'/>"), "{two}");
}

/// Names of the elements in order of their start; panics unless each is closed where it should be, attribute values are
/// quoted, and nothing stands for itself that must be escaped (XML 1.0, sections 2.4 and 3.1).
fn elements(xml: &str) -> Vec<String> {
    let (mut names, mut open) = (Vec::new(), Vec::new());
    let mut rest = xml;
    while let Some(start) = rest.find('<') {
        assert!(rest[..start].trim().is_empty(), "text between elements: {:?}", &rest[..start]);
        rest = &rest[start + 1..];
        if let Some(comment) = rest.strip_prefix("!--") {
            rest = comment.split_once("-->").expect("comments end").1;
            continue;
        }
        let (tag, behind) = rest.split_once('>').expect("tags end");
        rest = behind;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop().as_deref(), Some(name), "closed out of turn");
            continue;
        }
        let body = tag.strip_suffix('/').unwrap_or(tag);
        let (name, attributes) = body.split_once(' ').unwrap_or((body, ""));
        let mut pieces = attributes.split('\'');
        while let Some(key) = pieces.next().filter(|key| !key.is_empty()) {
            assert!(key.trim_start().ends_with('=') && !key.contains(['<', '&', '"']), "{key:?} in <{tag}>");
            let value = pieces.next().unwrap_or_else(|| panic!("an open quote in <{tag}>"));
            let escaped = ["&amp;", "&lt;", "&gt;", "&apos;"].iter().fold(value.to_owned(), |v, e| v.replace(e, ""));
            assert!(!escaped.contains(['<', '&']), "{value:?} in <{tag}>");
        }
        names.push(name.to_owned());
        if body.len() == tag.len() {
            open.push(name.to_owned());
        }
    }
    assert!(open.is_empty() && rest.trim().is_empty(), "still open: {open:?}, rest {rest:?}");
    names
}
