//! Guests whose ports are held to rules: what is denied does not arrive, what is allowed is answered, a change holds for the
//! next frame, and no guest speaks in another's name. With the real Linux driver and the real Linux TCP on both ends.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use common::conversation::Conversation;
use common::counters::{Drops, assert_conserved, assert_quiet_log, drops, wait_drops};
use common::*;
use dreamwire_bench::topology::{
    Capture, Daemon, ECHO_PORT, Frame, FrameFilter, Guest, Needs, Netns, available, wait_until,
};
use serde_json::Value;

const GROUPS: &str = r#"
[[group]]
name = "clients"
[[group]]
name = "web"
[[rule]]
name = "no-telnet"
group = "web"
direction = "ingress"
deny = "tcp"
ports = "23"
priority = 200
"#;

/// The server's port for conversations.
const TALK: u16 = 5000;
/// Said of the frame that was denied.
const DENIED: &str = "ports/vm2/ingress_denied";

fn guarded(number: u8, keys: &str) -> String {
    let addresses = format!("[\"10.0.0.{number}\", \"fd00::{number}\"]");
    port(number, &format!("mac = \"{}\"\naddresses = {addresses}\n{keys}", mac_text(number)))
}

/// An enforced network: `vm1` is a client, `vm2` a server, which clients may ask at these ports.
fn enforced(rules: &[(&str, &str, &str)]) -> String {
    let allowed: String = rules
        .iter()
        .map(|(name, protocol, ports)| {
            format!(
                "[[rule]]\nname = \"{name}\"\ngroup = \"web\"\ndirection = \"ingress\"\nallow = \"{protocol}\"\n\
                 ports = \"{ports}\"\nfrom = \"group:clients\"\n"
            )
        })
        .collect();
    let ports = [guarded(1, "groups = [\"clients\"]"), guarded(2, "groups = [\"web\"]")].concat();
    format!("{DAEMON}{LOCAL_NETWORK}policy = \"enforced\"\n{GROUPS}{allowed}{ports}")
}

#[test]
fn rules_hold_between_guests_and_changes_hold_at_once() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let with_rule = enforced(&[("talk", "tcp", "5000")]);
    let daemon = start_daemon("host", &host, &with_rule);
    let [one, two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    let arrived = two.capture("eth0").unwrap();
    denied_is_denied(&daemon, &one);

    let mut talk = Conversation::begin(&one, &two, "10.0.0.2", 40_000, TALK);
    talk.both_hear_each_other();
    // Nothing of what was denied has come before.
    let first = next(&arrived, &from_one());
    assert_eq!(first.bytes[36..38], TALK.to_be_bytes(), "{:02x?}", first.bytes);
    why_agrees(&daemon);

    let cli = |line: &str| drop(daemon.cli(&line.split(' ').collect::<Vec<_>>()).unwrap());
    let apply = |config: &str| drop(daemon.apply(config).unwrap());
    let add = "rule add talk --group web --direction ingress --allow tcp --ports 5000 --from group:clients";
    let by_command: [&dyn Fn(); 2] = [&|| cli("rule del talk"), &|| cli(add)];
    a_removed_rule_cuts_and_an_added_one_opens(&daemon, &mut talk, &arrived, "by command", by_command);
    let by_file: [&dyn Fn(); 2] = [&|| apply(&enforced(&[])), &|| apply(&with_rule)];
    a_removed_rule_cuts_and_an_added_one_opens(&daemon, &mut talk, &arrived, "by file", by_file);
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

/// What comes from the first guest over IPv4.
fn from_one() -> FrameFilter {
    FrameFilter::any().source(mac(1)).ether_type(0x0800)
}

#[track_caller]
fn next(capture: &Capture<'_>, filter: &FrameFilter) -> Frame {
    let mut frames = capture.frames(filter, 1, LIMIT).unwrap();
    frames.pop().expect("a frame should have arrived")
}

fn denied_is_denied(daemon: &Daemon, one: &Guest) {
    let before = drops(daemon);
    one.send_frames("eth0", &[udp_frame([(mac(1), 1), (mac(2), 2)], 4000, b"denied")]).unwrap();
    wait_drops(daemon, &before, &[(DENIED, 1)]);
    wait_sample(daemon, "vm2 ingress ingress_denied: udp 10.0.0.1:4000 → 10.0.0.2:9, 48 bytes");
    // And by the guest's own stack: no answer to a ping, nor to a SYN.
    assert!(!one.ping("10.0.0.2", 2).unwrap());
    assert!(!one.ping("fd00::2", 2).unwrap());
    let refused = one.run(&["socat", "-u", "TCP:10.0.0.2:23,sourceport=40001,connect-timeout=1", "-"], LIMIT).unwrap();
    assert!(!refused.success(), "{refused:?}");
    wait_sample(daemon, "vm2 ingress ingress_denied by rule no-telnet: tcp 10.0.0.1:40001 → 10.0.0.2:23");
    let moved: Drops = drops(daemon).into_iter().filter(|(name, count)| before.get(name) != Some(count)).collect();
    assert_eq!(moved.keys().collect::<Vec<_>>(), [DENIED], "dropped elsewhere or otherwise");
}

/// Waits for these words in what `drops` shows.
#[track_caller]
fn wait_sample(daemon: &Daemon, words: &str) {
    let mut said = String::new();
    let waited = wait_until(LIMIT, "a sample of a drop", || {
        said = daemon.cli(&["drops"]).unwrap();
        said.contains(words)
    });
    assert!(waited.is_ok(), "{words:?} is not in:\n{said}");
}

fn verdicts(daemon: &Daemon, arguments: &[&str]) -> Value {
    let answer: Value =
        serde_json::from_str(&daemon.cli(&[&["why"], arguments, &["--json"]].concat()).unwrap()).unwrap();
    answer["path"]["verdict"].clone()
}

/// Of what has just happened: the rule that let the conversation pass, the one that denied telnet, and both ways.
fn why_agrees(daemon: &Daemon) {
    for (port, verdict, by) in [("5000", "pass", "talk"), ("23", "drop", "no-telnet"), ("9", "drop", "no rule matches")]
    {
        let flow = ["vm1", "tcp", "10.0.0.1:41000", &format!("10.0.0.2:{port}")];
        assert_eq!(verdicts(daemon, &flow), verdict, "{flow:?}");
        let said = daemon.cli(&[&["why"], &flow[..]].concat()).unwrap();
        assert!(said.contains(by), "{by:?} is not in:\n{said}");
    }
    // The server speaks to the client in the conversation, and not otherwise.
    let of_conversation = daemon.cli(&["why", "vm2", "tcp", "10.0.0.2:5000", "10.0.0.1:40000"]).unwrap();
    assert!(of_conversation.contains("a connection carries it (answered"), "{of_conversation}");
    assert_eq!(verdicts(daemon, &["vm2", "tcp", "10.0.0.2:5000", "10.0.0.1:40000"]), "pass");
    assert_eq!(verdicts(daemon, &["vm2", "tcp", "10.0.0.2:5000", "10.0.0.1:40007"]), "drop");
}

/// The connection is cut in both directions, whoever speaks; and when the rule is back, the same connection goes on.
fn a_removed_rule_cuts_and_an_added_one_opens(
    daemon: &Daemon,
    talk: &mut Conversation<'_>,
    arrived: &Capture<'_>,
    how: &str,
    [without, with]: [&dyn Fn(); 2],
) {
    talk.both_hear_each_other();
    arrived.frames(&from_one(), usize::MAX, Duration::from_millis(500)).unwrap();
    let before = drops(daemon);
    let denied = |place: &str| drops(daemon).get(place).copied().unwrap_or(0) - before.get(place).copied().unwrap_or(0);
    without();
    let (client_says, server_says) = (format!("client, {how}"), format!("server, {how}"));
    talk.client_says(&client_says);
    talk.server_says(&server_says);
    // A segment and a retransmission of it, each way: what an end sends again begins nothing anew.
    for place in [DENIED, "ports/vm2/egress_denied"] {
        let waited = wait_until(LIMIT, place, || denied(place) >= 2);
        assert!(waited.is_ok(), "{how}: {place} is {}", denied(place));
    }
    assert_eq!(verdicts(daemon, &["vm1", "tcp", "10.0.0.1:40000", "10.0.0.2:5000"]), "drop", "{how}");
    let came = arrived.frames(&from_one(), 1, Duration::ZERO).unwrap();
    assert!(came.is_empty(), "{how}: it came through: {:02x?}", came[0].bytes);
    assert!(!talk.server_heard(&client_says) && !talk.client_heard(&server_says));

    with();
    let start = Instant::now();
    talk.server_hears(&client_says);
    talk.client_hears(&server_says);
    eprintln!("{how}: the same connection went on {:.1} s after the rule was back", start.elapsed().as_secs_f64());
    talk.both_hear_each_other();
}

#[test]
fn a_guest_speaks_in_its_own_name_only() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let daemon = start_daemon("host", &host, &format!("{DAEMON}{LOCAL_NETWORK}{}{}", guarded(1, ""), guarded(2, "")));
    let [one, two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    for address in ["10.0.0.2", "fd00::2"] {
        assert_ping(&one, address);
    }
    let arrived = two.capture("eth0").unwrap();
    let forged = forged();
    let honest = text_frame(mac(2), mac(1), "honest");
    let came = || {
        one.send_frames("eth0", std::slice::from_ref(&honest)).unwrap();
        let mut came = Vec::new();
        while came.last() != Some(&honest) {
            came.push(next(&arrived, &FrameFilter::any()).bytes);
        }
        came
    };
    let believes_router =
        || two.sh("ip -6 route show default; ip -6 address show dev eth0").unwrap().contains("2001:db8:bad:");

    for (what, frame) in &forged {
        let before = drops(&daemon);
        one.send_frames("eth0", std::slice::from_ref(frame)).unwrap();
        let dropped = wait_until(LIMIT, what, || drops(&daemon) != before);
        assert!(dropped.is_ok(), "{what} was not dropped");
        wait_drops(&daemon, &before, &[("ports/vm1/source_guard", 1)]);
    }
    let seen = came();
    for (what, frame) in &forged {
        assert!(!seen.contains(frame), "{what} arrived");
    }
    assert!(!believes_router());
    wait_sample(&daemon, "vm1 egress source_guard");

    // The same frames from a port that nobody has given addresses: the guard it was, and the victim falls for them.
    daemon.cli(&["port", "set", "vm1", "addresses="]).unwrap();
    let before = drops(&daemon);
    one.send_frames("eth0", &forged.iter().map(|(_, frame)| frame.clone()).collect::<Vec<_>>()).unwrap();
    let seen = came();
    for (what, frame) in &forged {
        assert!(seen.contains(frame), "{what} did not arrive");
    }
    wait_until(LIMIT, "the victim's new router", believes_router).unwrap();
    wait_drops(&daemon, &before, &[]);
    assert_conserved(&daemon);
}

/// What no guest with addresses may say, by the first guest.
fn forged() -> [(&'static str, Vec<u8>); 9] {
    let stolen = mac(9);
    let arp = |sender_mac: [u8; 6], sender: u8| {
        let rest =
            [&[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &sender_mac[..], &[10, 0, 0, sender], &mac(2), &[10, 0, 0, 2]].concat();
        frame(mac(2), mac(1), &rest)
    };
    let dhcp_answer = {
        let mut bytes = udp_frame([(mac(1), 1), (mac(2), 2)], 67, b"an offer");
        bytes[36..38].copy_from_slice(&68_u16.to_be_bytes());
        bytes
    };
    // RFC 4861 §4.2 and §4.6.2: a router for half an hour, and a prefix to make addresses of.
    let router = [
        &[134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 64, 0xc0, 0, 0, 7, 8, 0, 0, 7, 8, 0, 0, 0, 0][..],
        &ipv6("2001:db8:bad::"),
    ]
    .concat();
    // §4.4: solicited, override, and the link-layer address.
    let advertisement = |target: &str| [&[136, 0, 0, 0, 0x60, 0, 0, 0][..], &ipv6(target), &[2, 1], &mac(1)].concat();
    let own = ipv6("fe80::5054:ff:fe00:1");
    [
        ("another's MAC address", text_frame(mac(2), stolen, "another's MAC address")),
        ("another's IPv4 address", udp_frame([(mac(1), 9), (mac(2), 2)], 1000, b"another's IP address")),
        ("ARP of another's IPv4 address", arp(mac(1), 9)),
        ("ARP of another's MAC address", arp(stolen, 1)),
        ("a DHCP server's answer", dhcp_answer),
        ("another's IPv6 address", icmpv6(mac(2), ipv6("fd00::9"), ipv6("fd00::2"), vec![128, 0, 0, 0, 0, 1, 0, 1])),
        (
            "an advertisement of another's address",
            icmpv6(mac(2), ipv6("fd00::1"), ipv6("fd00::2"), advertisement("fd00::9")),
        ),
        ("a router advertisement to one", icmpv6(mac(2), own, ipv6("fd00::2"), router.clone())),
        ("a router advertisement to all", icmpv6([0x33, 0x33, 0, 0, 0, 1], own, ipv6("ff02::1"), router)),
    ]
}

fn ipv6(text: &str) -> [u8; 16] {
    text.parse::<Ipv6Addr>().unwrap().octets()
}

/// An ICMPv6 message of the first guest in its frame, with its checksum (RFC 4443 §2.3).
fn icmpv6(to: [u8; 6], source: [u8; 16], destination: [u8; 16], mut message: Vec<u8>) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    let summed = [&source[..], &destination, &[0, 0], &length, &[0, 0, 0, 58], &message].concat();
    let sum: u32 = summed.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    message[2..4].copy_from_slice(&(!u16::try_from(folded).unwrap()).to_be_bytes());
    let rest = [&[0x86, 0xdd, 0x60, 0, 0, 0][..], &length, &[58, 255], &source, &destination, &message].concat();
    frame(to, mac(1), &rest)
}

#[test]
fn ports_used_again_resets_and_fragments_go_as_the_rules_say() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let rules = [("talk", "tcp", "5000-5001"), ("echo", "udp", "7")];
    let daemon = start_daemon("host", &host, &enforced(&rules));
    let [one, two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    a_port_can_be_used_again_at_once(&daemon, &one, &two);
    resets_pass(&daemon, &one, &two);
    fragments_follow_their_first(&daemon, &one, &two);
    assert_conserved(&daemon);
    assert_quiet_log(&daemon);
}

/// The server closes first and is left in TIME_WAIT; the client comes again from the same port, ten times.
fn a_port_can_be_used_again_at_once(daemon: &Daemon, one: &Guest, two: &Guest) {
    const ROUNDS: u32 = 10;
    let before = drops(daemon);
    two.sh("(nc -ll -p 5000 -e echo served >/dev/null 2>&1 &)").unwrap();
    wait_until(LIMIT, "the server", || two.sh("netstat -tln | grep :5000").is_ok()).unwrap();
    let start = Instant::now();
    for round in 0..ROUNDS {
        let said = one.sh("timeout 5 socat -u TCP:10.0.0.2:5000,sourceport=4444 -");
        assert!(said.as_ref().is_ok_and(|said| said == "served\n"), "round {round}: {said:?}");
    }
    eprintln!("{ROUNDS} connections from one port in {:.1} s", start.elapsed().as_secs_f64());
    let waits = two.sh("netstat -tn").unwrap();
    assert!(waits.contains("TIME_WAIT") && waits.contains(":4444"), "the server did not close first:\n{waits}");
    wait_drops(daemon, &before, &[]);
}

/// The answer to a SYN for a closed port, and that of an end that was killed with unread bytes: neither client hangs.
fn resets_pass(daemon: &Daemon, one: &Guest, two: &Guest) {
    let before = drops(daemon);
    let refused = one.run(&["nc", "10.0.0.2", "5001"], LIMIT).unwrap();
    assert!(refused.stderr.contains("refused"), "{refused:?}");
    let mut talk = Conversation::begin(one, two, "10.0.0.2", 40_000, 5001);
    talk.both_hear_each_other();
    let arrived = one.capture("eth0").unwrap();
    two.sh("kill -STOP $(pidof socat)").unwrap();
    talk.client_says("never read");
    let acknowledged = FrameFilter::any().source(mac(2)).bytes_at(34, &5001_u16.to_be_bytes());
    next(&arrived, &acknowledged);
    two.sh("kill -KILL $(pidof socat)").unwrap();
    let flags = next(&arrived, &acknowledged).bytes[47];
    assert_eq!(flags & 0x04, 0x04, "RFC 9293 §3.1: RST; {flags:#x}");
    wait_until(LIMIT, "the client's end", || one.sh("pidof socat").is_err()).unwrap();
    wait_drops(daemon, &before, &[]);
}

/// Datagrams of 3000 bytes, which the guests' own stacks cut and put together.
fn fragments_follow_their_first(daemon: &Daemon, one: &Guest, two: &Guest) {
    let [at_one, at_two] = [one, two].map(|guest| guest.capture("eth0").unwrap());
    let udp = |from: u8| FrameFilter::any().source(mac(from)).ether_type(0x0800).bytes_at(23, &[17]);
    let send =
        |port: u16| drop(one.sh(&format!("head -c 3000 /dev/zero | socat -u -b 3000 - UDP:10.0.0.2:{port}")).unwrap());
    let before = drops(daemon);
    send(9);
    wait_drops(daemon, &before, &[(DENIED, 1), ("ports/vm2/fragment_without_first", 2)]);
    let before = drops(daemon);
    send(7);
    for (capture, from, port) in [(&at_two, 1, 36), (&at_one, 2, 34)] {
        // The first to arrive is that of the allowed datagram, and its echo is one, too.
        let fragments = capture.frames(&udp(from), 3, LIMIT).unwrap();
        assert_eq!(fragments.len(), 3, "from {from}");
        assert_eq!(fragments[0].bytes[port..port + 2], ECHO_PORT.to_be_bytes());
        let offsets: Vec<_> =
            fragments.iter().map(|frame| u16::from_be_bytes([frame.bytes[20], frame.bytes[21]])).collect();
        // In units of eight bytes, below the flag that more follow.
        assert_eq!(offsets, [0x2000, 0x2000 | 185, 370], "from {from}");
    }
    assert!(at_two.frames(&udp(1), 1, Duration::from_millis(500)).unwrap().is_empty());
    wait_drops(daemon, &before, &[]);
}
