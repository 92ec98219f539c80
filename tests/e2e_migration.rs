//! Live migration of a VM between two QEMU processes, on one host and across two, under TCP and UDP traffic; and memory that
//! is plugged in while traffic runs.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use dreamwire_bench::topology::*;
use serde_json::{Value, json};

const MAC: &str = "52:54:00:00:00:01";
const BOOT: Duration = BOOT_LIMIT;
const MOVE_LIMIT: Duration = Duration::from_secs(120);
/// Emulated guests dirty little, but two QEMUs share two processors with all the rest.
const DOWNTIME_MAX: Duration = Duration::from_millis(500);
/// The file that is on its way, at 500 KiB/s.
const FILE_BYTES: u64 = 16 << 20;
/// TCP for as long as a migration takes, with room before and after.
const IPERF_SECONDS: u32 = 40;

fn start(name: &str, netns: Option<&Netns>, config: &str) -> Daemon {
    Daemon::start(&DaemonSpec { name, binary: Path::new(env!("CARGO_BIN_EXE_dreamwire")), netns, config }).unwrap()
}

fn ports(names: &[&str]) -> String {
    let port =
        |name| format!("[[port]]\nname = \"{name}\"\nnetwork = \"blue\"\nsocket = \"{{run_dir}}/{name}.sock\"\n");
    names.iter().map(port).collect()
}

fn vm(daemon: &Daemon, port: &str, properties: &str) -> GuestSpec {
    let wire = Wire::VhostUser(daemon.path(&format!("{port}.sock")));
    GuestSpec::new("vm1").nic(Nic::new(wire, MAC).address("10.0.0.1/24").properties(properties))
}

fn peer(daemon: &Daemon) -> GuestSpec {
    let wire = Wire::VhostUser(daemon.path("peer.sock"));
    GuestSpec::new("peer").nic(Nic::new(wire, "52:54:00:00:00:02").address("10.0.0.2/24"))
}

/// Nothing is under way any more and every frame is accounted for.
fn assert_conserved(daemon: &Daemon) {
    wait_until(Duration::from_secs(10), "counters that balance", || {
        daemon.stats().is_ok_and(|stats| stats["conservation"]["balanced"] == true)
    })
    .unwrap_or_else(|error| panic!("{error}: {}", daemon.stats().unwrap()["conservation"]));
}

fn stats_of(daemon: &Daemon, port: &str) -> Value {
    let stats = daemon.stats().unwrap();
    let found = stats["ports"].as_array().unwrap().iter().find(|row| row["name"] == port);
    found.cloned().unwrap()
}

/// What runs between the peer and the VM while it moves: TCP to the VM, a file to the VM, and UDP probes from the peer.
struct Traffic<'a> {
    peer: &'a Guest,
    probe: RunningProbe<'a>,
    hash: String,
}

impl<'a> Traffic<'a> {
    fn start(vm: &Guest, peer: &'a Guest) -> Self {
        peer.wait_link("eth0", BOOT).unwrap();
        vm.wait_link("eth0", BOOT).unwrap();
        assert!(vm.ping("10.0.0.2", 3).unwrap());
        peer.sh(&format!("head -c {FILE_BYTES} /dev/urandom >/tmp/file; httpd -h /tmp -p 80")).unwrap();
        let hash = peer.sh("sha256sum </tmp/file").unwrap();
        // Slow enough to be on its way all the time.
        vm.sh("iperf3 -s -1 -D; curl -sS --limit-rate 500k -o /tmp/file http://10.0.0.2/file >/tmp/curl.log 2>&1 &")
            .unwrap();
        wait_until(BOOT, "the VM's iperf3", || vm.sh("netstat -tln").is_ok_and(|list| list.contains(":5201"))).unwrap();
        peer.sh(&format!("iperf3 -c 10.0.0.1 -t {IPERF_SECONDS} -b 8M -i 1 --json >/tmp/iperf.json 2>&1 &")).unwrap();
        let probe = peer.probe(SocketAddr::new([10, 0, 0, 1].into(), ECHO_PORT), Duration::from_millis(10)).unwrap();
        wait_until(BOOT, "the file's beginning", || {
            vm.sh("wc -c </tmp/file").is_ok_and(|bytes| bytes.trim().parse::<u64>().is_ok_and(|bytes| bytes > 1 << 19))
        })
        .unwrap();
        Self { peer, probe, hash }
    }

    /// The TCP connections are the ones from before, and carried everything.
    fn finish(self, vm: &Guest, name: &str, report: MigrationReport, started: Instant) {
        let limit = Duration::from_secs(120);
        wait_until(limit, "the whole file", || {
            vm.sh("wc -c </tmp/file").is_ok_and(|bytes| bytes.trim() == FILE_BYTES.to_string())
        })
        .unwrap();
        assert_eq!(vm.sh("sha256sum </tmp/file").unwrap(), self.hash, "the file arrived torn");
        wait_until(limit, "iperf3's end", || {
            self.peer.sh("cat /tmp/iperf.json").is_ok_and(|text| text.trim_end().ends_with('}'))
        })
        .unwrap();
        let iperf: Value = serde_json::from_slice(&self.peer.get_file("/tmp/iperf.json").unwrap()).unwrap();
        assert_eq!(iperf.get("error"), None, "{iperf}");
        let intervals = iperf["intervals"].as_array().unwrap();
        // About one a second; long after the migration the same connection still carries something.
        let last = &intervals[intervals.len().saturating_sub(5)..];
        let bytes = last.iter().map(|interval| interval["sum"]["bytes"].as_u64().unwrap()).sum::<u64>();
        assert!(bytes > 0, "TCP stands still after the migration: {last:?}");
        assert!(last.iter().any(|i| i["sum"]["end"].as_f64().unwrap() > f64::from(IPERF_SECONDS - 2)), "{last:?}");
        let received = iperf["end"]["sum_received"]["bytes"].as_u64().unwrap();
        assert!(received > 1 << 20, "{}", iperf["end"]);
        let probed = self.probe.stop().unwrap();
        eprintln!(
            "{name}: longest gap {:.0} ms of the 10 ms probe ({} of {} answered), QEMU's downtime {} ms, {} ms in all, {} MiB \
             in {} rounds; iperf3 {:.1} Mbit/s, {} retransmits; test {:.0} s",
            probed.longest_gap_ms,
            probed.received,
            probed.sent,
            report.downtime_ms,
            report.total_ms,
            report.memory_bytes >> 20,
            report.rounds,
            iperf["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e6,
            iperf["end"]["sum_sent"]["retransmits"],
            started.elapsed().as_secs_f64(),
        );
        assert!(probed.received > 0);
        // The guest's own time stands still as well, and the switch must not add much to it.
        let allowed_ms = report.downtime_ms as f64 + 3000.0;
        assert!(probed.longest_gap_ms < allowed_ms, "{probed:?} against {report:?}");
    }
}

/// Frames that the VM had sent and got so far at its old and its new place, and whether its rings are served there.
struct Sample {
    at: SystemTime,
    places: [Place; 2],
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    from_vm: u64,
    to_vm: u64,
    is_served: bool,
}

impl Place {
    fn of(daemon: &Daemon, port: &str) -> Self {
        let stats = stats_of(daemon, port);
        let frames = |direction: &str| stats[direction]["frames"].as_u64().unwrap();
        let is_served = stats["rings"].as_array().unwrap().iter().any(|ring| ring["enabled"] == true);
        Self { from_vm: frames("rx"), to_vm: frames("tx"), is_served }
    }
}

/// Looks at both places every few milliseconds while `migrate` runs, and for some time after.
fn watched<T>(places: impl Fn() -> [Place; 2] + Sync, migrate: impl FnOnce() -> T) -> (T, Vec<Sample>) {
    const AFTERWARDS: Duration = Duration::from_secs(2);
    let ended = Mutex::new(None);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut samples = Vec::new();
            while ended.lock().unwrap().is_none_or(|end: Instant| end.elapsed() < AFTERWARDS) {
                samples.push(Sample { at: SystemTime::now(), places: places() });
                std::thread::sleep(Duration::from_millis(2));
            }
            samples
        });
        let result = migrate();
        *ended.lock().unwrap() = Some(Instant::now());
        (result, watcher.join().unwrap())
    })
}

/// Where the time went: QEMU has the guest until it resumes, we until frames get through, the guest until it answers.
fn print_timeline(report: MigrationReport, samples: &[Sample]) {
    let since_stop = |at: SystemTime| match at.duration_since(report.stopped) {
        Ok(after) => after.as_secs_f64() * 1e3,
        Err(before) => -before.duration().as_secs_f64() * 1e3,
    };
    let first = |what: fn(&Place) -> bool| {
        let found = samples.iter().find(|sample| what(&sample.places[1]));
        found.map_or("never".to_owned(), |sample| format!("{:.0}", since_stop(sample.at)))
    };
    let silent = samples.windows(2).rev().find(|pair| pair[0].places[0].from_vm != pair[1].places[0].from_vm);
    eprintln!(
        "    ms after the guest stopped: last frame from its old place {:.0}; resumed {:.0}; its rings are served {}, first \
         frame from it {}, first frame to it {}, fifth frame from it {}",
        silent.map_or(f64::NAN, |pair| since_stop(pair[1].at)),
        since_stop(report.resumed),
        first(|place| place.is_served),
        first(|place| place.from_vm >= 1),
        first(|place| place.to_vm >= 1),
        first(|place| place.from_vm >= 5),
    );
}

#[test]
fn a_vm_migrates_on_one_host_under_traffic() {
    if !available(Needs::Guests) {
        return;
    }
    let started = Instant::now();
    let config = "[daemon]\nrun_dir = \"{run_dir}\"\n[[network]]\nname = \"blue\"\nmtu = 1500\n".to_owned();
    // Two ports of one network cannot have one configured MAC: both learn it.
    let daemon = start("dreamwire", None, &(config + &ports(&["vm1a", "vm1b", "peer"])));
    let (mut source, mut peer) =
        (Guest::start(&vm(&daemon, "vm1a", "")).unwrap(), Guest::start(&peer(&daemon)).unwrap());
    source.wait_ready(BOOT).unwrap();
    peer.wait_ready(BOOT).unwrap();
    // A migration that is broken off: nothing is logged any more, and the VM goes on here.
    let logging = || stats_of(&daemon, "vm1a")["session"]["migrating"] == true;
    let refused = Guest::start(&vm(&daemon, "vm1b", "").incoming()).unwrap();
    source.abort_migration_to(&refused, MOVE_LIMIT, logging).unwrap();
    wait_until(MOVE_LIMIT, "the log's end", || !logging()).unwrap();
    drop(refused);

    let mut destination = Guest::start(&vm(&daemon, "vm1b", "").incoming()).unwrap();
    let traffic = Traffic::start(&source, &peer);
    assert!(daemon.cli(&["show", "fdb"]).unwrap().contains("vm1a"));

    let places = || ["vm1a", "vm1b"].map(|port| Place::of(&daemon, port));
    let (report, samples) = watched(places, || source.migrate_to(&destination, DOWNTIME_MAX, MOVE_LIMIT).unwrap());
    destination.wait_ready(BOOT).unwrap();
    assert!(logging(), "the log was on to the end");
    wait_until(BOOT, "the VM's new place", || daemon.cli(&["show", "fdb"]).is_ok_and(|fdb| fdb.contains("vm1b")))
        .unwrap();
    source.kill().unwrap();

    traffic.finish(&destination, "one host", report, started);
    print_timeline(report, &samples);
    assert_eq!(stats_of(&daemon, "vm1b")["originated"], 0, "the driver announces itself");
    assert_conserved(&daemon);
}

#[test]
fn a_vm_migrates_across_the_overlay_under_traffic() {
    if !available(Needs::Guests) {
        return;
    }
    let started = Instant::now();
    let (left, right) = (Netns::new("left").unwrap(), Netns::new("right").unwrap());
    let end = |netns, addresses| VethEnd { netns, interface: "eth1", addresses };
    Netns::join([end(&left, &["192.0.2.1/24"]), end(&right, &["192.0.2.2/24"])], 1600).unwrap();
    let host = |name, netns, own: u8, names: &[&str]| {
        let config = format!(
            "[daemon]\nrun_dir = \"{{run_dir}}\"\n[[underlay]]\nname = \"fabric\"\naddress = \"192.0.2.{own}\"\nmtu = 1600\n\
             [[network]]\nname = \"blue\"\nvni = 100\nunderlay = \"fabric\"\nmtu = 1500\nremotes = [\"192.0.2.{}\"]\n",
            3 - own
        );
        start(name, Some(netns), &(config + &ports(names)).replace("vm1.sock\"\n", "vm1.sock\"\nqueues = 2\n"))
    };
    let here = host("left", &left, 1, &["vm1", "peer"]);
    let there = host("right", &right, 2, &["vm1"]);
    // A driver that cannot announce itself: QEMU sends SEND_RARP, and the daemon there speaks for it.
    let silent = "guest_announce=off";
    let vm = |daemon| {
        let mut spec = vm(daemon, "vm1", silent).cpus(2);
        spec.nics[0].queues = 2;
        spec
    };
    let (mut source, mut peer) = (Guest::start(&vm(&here)).unwrap(), Guest::start(&peer(&here)).unwrap());
    source.wait_ready(BOOT).unwrap();
    peer.wait_ready(BOOT).unwrap();
    let mut destination = Guest::start(&vm(&there).incoming()).unwrap();
    let traffic = Traffic::start(&source, &peer);

    let places = || [&here, &there].map(|daemon| Place::of(daemon, "vm1"));
    let (report, samples) = watched(places, || source.migrate_to(&destination, DOWNTIME_MAX, MOVE_LIMIT).unwrap());
    destination.wait_ready(BOOT).unwrap();
    wait_until(BOOT, "the VM's new place", || {
        here.cli(&["show", "fdb"])
            .is_ok_and(|fdb| fdb.lines().any(|row| row.contains(MAC) && row.contains("192.0.2.2")))
    })
    .unwrap();
    source.kill().unwrap();

    traffic.finish(&destination, "two hosts", report, started);
    print_timeline(report, &samples);
    assert!(stats_of(&there, "vm1")["originated"].as_u64().unwrap() > 0, "announced in the driver's stead");
    for daemon in [&here, &there] {
        assert_conserved(daemon);
    }
}

/// The yardstick: the same guests on QEMU's tap devices and a bridge. What the gap has beyond QEMU's own down-time here is
/// the guest's, which wakes with nothing translated yet.
#[test]
fn the_same_migration_on_tap_and_bridge() {
    if !available(Needs::Guests) {
        return;
    }
    let started = Instant::now();
    let host = Netns::new("host").unwrap();
    let taps = ["tap1a", "tap1b", "tap2"];
    for tap in taps {
        host.add_tap(tap, 1).unwrap();
    }
    host.add_bridge("br0", &taps).unwrap();
    let spec = |tap: &str, number: u8| {
        let nic = Nic::new(Wire::Tap(tap.to_owned()), &format!("52:54:00:00:00:0{number}"));
        GuestSpec::new(&format!("vm{number}")).inside(&host).nic(nic.address(&format!("10.0.0.{number}/24")))
    };
    let (mut source, mut peer) = (Guest::start(&spec("tap1a", 1)).unwrap(), Guest::start(&spec("tap2", 2)).unwrap());
    source.wait_ready(BOOT).unwrap();
    peer.wait_ready(BOOT).unwrap();
    let mut destination = Guest::start(&spec("tap1b", 1).incoming()).unwrap();
    let traffic = Traffic::start(&source, &peer);
    let report = source.migrate_to(&destination, DOWNTIME_MAX, MOVE_LIMIT).unwrap();
    destination.wait_ready(BOOT).unwrap();
    source.kill().unwrap();
    traffic.finish(&destination, "tap and bridge", report, started);
}

#[test]
fn memory_is_plugged_in_while_traffic_runs() {
    if !available(Needs::Guests) {
        return;
    }
    let config = "[daemon]\nrun_dir = \"{run_dir}\"\n[[network]]\nname = \"blue\"\nmtu = 1500\n".to_owned();
    let daemon = start("dreamwire", None, &(config + &ports(&["vm1", "peer"])));
    let mut spec = vm(&daemon, "vm1", "").qemu_args(["-m", "slots=2,maxmem=1G"]);
    spec.kernel_args = "memhp_default_state=online".into();
    let (mut vm, mut peer) = (Guest::start(&spec).unwrap(), Guest::start(&peer(&daemon)).unwrap());
    vm.wait_ready(BOOT).unwrap();
    peer.wait_ready(BOOT).unwrap();
    vm.wait_link("eth0", BOOT).unwrap();
    assert!(vm.ping("10.0.0.2", 3).unwrap());
    let total =
        || vm.sh("sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo").unwrap().trim().parse::<u64>().unwrap();
    let before = total();
    let probe = peer.probe(SocketAddr::new([10, 0, 0, 1].into(), ECHO_PORT), Duration::from_millis(10)).unwrap();
    vm.qmp("object-add", json!({ "qom-type": "memory-backend-memfd", "id": "dimm", "size": 128 << 20, "share": true }))
        .unwrap();
    vm.qmp("device_add", json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "dimm" })).unwrap();
    wait_until(BOOT, "the guest's new memory", || total() > before + (100 << 10)).unwrap();
    // Frames to and from everywhere in memory, the new region included: Linux fills high addresses first.
    assert!(vm.ping("10.0.0.2", 10).unwrap());
    let report = probe.stop().unwrap();
    eprintln!("memory grew from {before} to {} KiB; {report:?}", total());
    assert!(report.received + 3 >= report.sent, "{report:?}");
    assert_conserved(&daemon);
}
