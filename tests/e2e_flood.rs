//! One port floods, with SYNs and with a scan of all UDP ports, at a steady pace; two guests talk TCP meanwhile. Their
//! connections stay, their throughput is held against that under the same load without new connections, and every table
//! keeps its bounds.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::conversation::Conversation;
use common::counters::{Drops, assert_conserved, drops};
use common::*;
use dreamwire_bench::front_end::{FrontEnd, Options};
use dreamwire_bench::report::Paired;
use dreamwire_bench::topology::{Daemon, Guest, Needs, Netns, available, wait_until};
use serde_json::Value;

/// Connections of the flooder's port and of its victim's, and how many the flooder may begin a second: enough to fill both
/// tables, and few enough for an emulated victim to answer.
const FLOODER_CONNECTIONS: usize = 1000;
const VICTIM_CONNECTIONS: usize = 512;
const NEW_FLOWS: u64 = 300;
/// Of one measurement.
const SECONDS: u64 = 2;
/// Each a measurement under load, one under a flood of SYNs, one under a scan: neighbours in time, for they share their
/// processors with whatever else runs.
const ROUNDS: usize = 3;
/// Frames per second of load and floods alike: what differs between them is what the frames are, not how many.
const PACE: u64 = 20_000;
/// Of a lump: a worker's burst.
const LUMP: u32 = 32;
const TALK: u16 = 5000;

/// What the flooder sends. Frames of no protocol pass its own port and end at the victim's: the same load, no connection.
const NOTHING: u8 = 0;
const LOAD: u8 = 1;
const SYNS: u8 = 2;
const SCAN: u8 = 3;
const RESETS: u8 = 4;
const END: u8 = 5;

fn config() -> String {
    let keys = |number: u8, more: &str| {
        port(
            number,
            &format!("mac = \"{}\"\naddresses = [\"10.0.0.{number}\", \"fd00::{number}\"]\n{more}", mac_text(number)),
        )
    };
    let rule = "[[group]]\nname = \"web\"\n[[rule]]\nname = \"web\"\ngroup = \"web\"\ndirection = \"ingress\"\n\
                allow = \"tcp\"\nports = \"80,5000,5201\"\n";
    let ports = [
        keys(1, ""),
        keys(2, &format!("groups = [\"web\"]\nconnections = {VICTIM_CONNECTIONS}")),
        keys(
            3,
            &format!(
                "connections = {FLOODER_CONNECTIONS}\nnew_flows = {{ rate = {NEW_FLOWS}, burst = {FLOODER_CONNECTIONS} }}"
            ),
        ),
    ];
    format!("{DAEMON}{LOCAL_NETWORK}policy = \"enforced\"\n{rule}{}", ports.concat())
}

#[test]
fn a_flood_takes_neither_connections_nor_throughput_from_others() {
    if !available(Needs::Guests) {
        return;
    }
    let host = Netns::new("host").unwrap();
    let daemon = start_daemon("host", &host, &config());
    let [one, two] = boot([guest(&daemon, 1), guest(&daemon, 2)]);
    two.sh("iperf3 -s -D && httpd -p 80 -h /tmp").unwrap();
    let mut talk = Conversation::begin(&one, &two, "10.0.0.2", 40_000, TALK);
    talk.both_hear_each_other();
    let flooder = Flooder::start(&daemon.path("vm3.sock"));

    let measure = |what: &str, kind: u8| {
        let before = drops(&daemon);
        flooder.send(kind);
        let (start, sent) = (Instant::now(), flooder.sent());
        let megabits = transfer(&one);
        let rate = (flooder.sent() - sent) as f64 / start.elapsed().as_secs_f64();
        let [flooders, victims] = ["vm3", "vm2"].map(|port| connections(&daemon, port));
        flooder.send(NOTHING);
        let dropped = dropped_since(&daemon, &before);
        println!(
            "{what}: {megabits:.0} Mbit/s between the guests; the flooder sent {rate:.0} frames/s, its port knew {} \
             connections, the victim's {}; dropped: {dropped:?}",
            flooders.len(),
            victims.len()
        );
        assert!(flooders.len() <= FLOODER_CONNECTIONS && victims.len() <= VICTIM_CONNECTIONS);
        // TCP finds its speed by loss: a full ring is no fault.
        let at_neighbour = |place: &&String| place.starts_with("ports/vm1/") && !place.ends_with("/ring_full");
        assert_eq!(dropped.keys().find(at_neighbour), None, "{dropped:?}");
        for port in ["vm1", "vm2"] {
            let stays = connections(&daemon, port).iter().any(|row| {
                row["source"] == "10.0.0.1:40000" && row["state"] == "established" && row["assured"] == true
            });
            assert!(stays, "{what}: {port} has forgotten the conversation");
        }
        assert!(kind == NOTHING || rate > PACE as f64 / 4.0, "{what}: {rate:.0} frames/s are no load");
        (megabits, dropped, victims.len())
    };
    measure("nothing else", NOTHING);
    let floods = [("a flood of SYNs", SYNS), ("a scan of UDP ports", SCAN)];
    let mut ratios = [Paired::default(), Paired::default()];
    for _ in 0..ROUNDS {
        let (loaded, ..) = measure("the same load, no connections", LOAD);
        for ((what, kind), ratio) in floods.into_iter().zip(&mut ratios) {
            let (megabits, dropped, victims) = measure(what, kind);
            ratio.push(megabits, loaded);
            assert!(dropped["ports/vm3/new_flow_rate"] > 0, "{what}: {dropped:?}");
            match kind {
                SYNS => assert!(victims > VICTIM_CONNECTIONS / 2, "the flood reached the victim's table: {victims}"),
                _ => assert!(dropped["ports/vm2/ingress_denied"] > 0, "{what}: {dropped:?}"),
            }
            talk.both_hear_each_other();
        }
    }
    for ((what, _), ratio) in floods.iter().zip(&ratios) {
        let ratio = ratio.ratio().unwrap();
        println!(
            "{what}: {:.2} of the throughput under the same load ({:.2} to {:.2})",
            ratio.median, ratio.min, ratio.max
        );
        assert!(ratio.median >= 0.5, "{what}: {ratio:?}");
    }
    nobody_resets_what_is_not_his(&daemon, &flooder, &mut talk);
    assert_conserved(&daemon);
}

/// Resets in the client's name, for the conversation, from the flooder's port.
fn nobody_resets_what_is_not_his(daemon: &Daemon, flooder: &Flooder, talk: &mut Conversation<'_>) {
    let (before, sent) = (drops(daemon), flooder.sent());
    flooder.send(RESETS);
    talk.both_hear_each_other();
    flooder.send(NOTHING);
    let resets = flooder.sent() - sent;
    assert!(resets > 0);
    // Whatever else is dropped now, the victim still sends to those who began connections before.
    let refused = || dropped_since(daemon, &before).get("ports/vm3/source_guard").copied();
    wait_until(LIMIT, "the resets' end", || refused() == Some(resets)).unwrap();
    talk.both_hear_each_other();
}

/// Mbit/s that arrived over one new TCP connection.
fn transfer(one: &Guest) -> f64 {
    let seconds = SECONDS.to_string();
    let ran = one.run(&["iperf3", "-c", "10.0.0.2", "-t", &seconds, "-J"], Duration::from_secs(3 * SECONDS)).unwrap();
    let report: Value = serde_json::from_str(&ran.stdout).unwrap_or_default();
    let bits = report["end"]["sum_received"]["bits_per_second"].as_f64();
    bits.unwrap_or_else(|| panic!("the transfer failed: {ran:?}")) / 1e6
}

fn connections(daemon: &Daemon, port: &str) -> Vec<Value> {
    serde_json::from_str(&daemon.cli(&["show", "connections", port, "--json"]).unwrap()).unwrap()
}

fn dropped_since(daemon: &Daemon, before: &Drops) -> Drops {
    let since = |name: &String| before.get(name).copied().unwrap_or(0);
    let now = drops(daemon).into_iter();
    now.map(|(name, count)| (name.clone(), count - since(&name))).filter(|(_, count)| *count > 0).collect()
}

/// Port `vm3`, driven by a thread at [`PACE`].
struct Flooder {
    sends: Arc<AtomicU8>,
    rests: Arc<AtomicU8>,
    sent: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flooder {
    fn start(socket: &Path) -> Self {
        let mut front_end = FrontEnd::connect(socket, Options::default()).unwrap();
        let [sends, rests] = [(); 2].map(|()| Arc::new(AtomicU8::new(NOTHING)));
        let sent = Arc::new(AtomicU64::new(0));
        let thread = std::thread::spawn({
            let (sends, rests, sent) = (sends.clone(), rests.clone(), sent.clone());
            move || {
                let mut number = 0;
                let lump_time = Duration::from_secs(LUMP.into()) / PACE as u32;
                let mut due = Instant::now();
                loop {
                    let kind = sends.load(Ordering::Acquire);
                    rests.store(kind, Ordering::Release);
                    if kind == END {
                        break;
                    }
                    // The victim answers some of it.
                    front_end.receive_burst(|_, _| ()).unwrap();
                    if kind == NOTHING {
                        std::thread::sleep(Duration::from_millis(1));
                        continue;
                    }
                    let now = Instant::now();
                    if now < due {
                        std::thread::sleep(due - now);
                    }
                    // What was missed is not made up for: a lump at a time.
                    due = due.max(now) + lump_time;
                    let frames: Vec<_> = (number..number + LUMP).map(|number| flooding(kind, number)).collect();
                    let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
                    let count = front_end.send_burst(&frames).unwrap() as u32;
                    number = number.wrapping_add(count);
                    sent.fetch_add(count.into(), Ordering::Relaxed);
                }
            }
        });
        Self { sends, rests, sent, thread: Some(thread) }
    }

    /// Sends that from now on; when this returns, nothing else is sent any more.
    fn send(&self, kind: u8) {
        self.sends.store(kind, Ordering::Release);
        while self.rests.load(Ordering::Acquire) != kind {
            assert!(!self.thread.as_ref().unwrap().is_finished(), "the flooder's port is broken");
            std::thread::yield_now();
        }
    }

    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Flooder {
    fn drop(&mut self) {
        self.sends.store(END, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Another connection with each number, as long as there are source ports.
fn flooding(kind: u8, number: u32) -> Vec<u8> {
    let [source_port, low] = [(1024 + number % 64_000) as u16, (number % 65_535 + 1) as u16];
    let udp = |from: u8, source_port: u16| udp_frame([(mac(3), from), (mac(2), 2)], source_port, &[0; 18]);
    match kind {
        LOAD => text_frame(mac(2), mac(3), ""),
        SCAN => {
            let mut bytes = udp(3, source_port);
            bytes[36..38].copy_from_slice(&low.to_be_bytes());
            bytes
        }
        SYNS => tcp(udp(3, source_port), 80, number, 0x02),
        _ => tcp(udp(1, 40_000), TALK, number.wrapping_mul(65_521), 0x04),
    }
}

/// Makes a TCP segment (RFC 9293 §3.1) of a UDP packet with the same ends and as many bytes, with its checksums.
fn tcp(mut bytes: Vec<u8>, port: u16, sequence: u32, flags: u8) -> Vec<u8> {
    const IP: usize = 14;
    const TCP: usize = IP + 20;
    // The protocol; the checksum minds the difference to UDP's 17.
    bytes[IP + 9] = 6;
    let sum = u16::from_be_bytes([bytes[IP + 10], bytes[IP + 11]]);
    let sum = ones_complement(u32::from(sum) + 17 - 6);
    bytes[IP + 10..IP + 12].copy_from_slice(&sum.to_be_bytes());
    bytes[TCP + 2..TCP + 4].copy_from_slice(&port.to_be_bytes());
    bytes[TCP + 4..TCP + 8].copy_from_slice(&sequence.to_be_bytes());
    bytes[TCP + 8..].fill(0);
    bytes[TCP + 12..TCP + 16].copy_from_slice(&[0x50, flags, 0xff, 0xff]);
    let length = (bytes.len() - TCP) as u32;
    let words = bytes[IP + 12..].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum = !ones_complement(words.sum::<u32>() + 6 + length);
    bytes[TCP + 16..TCP + 18].copy_from_slice(&sum.to_be_bytes());
    bytes
}

fn ones_complement(sum: u32) -> u16 {
    let folded = (sum & 0xffff) + (sum >> 16);
    ((folded & 0xffff) + (folded >> 16)) as u16
}
