//! The demonstration: two hosts, a daemon and a virtual machine on each, one virtual network over VXLAN between them.
//!
//! The hosts are network namespaces joined by a veth pair. Everything that is shown is asked of the real things: the guests'
//! own `ip` and `ethtool`, `dreamwire stats`, tcpdump on the underlay. Ctrl-C and every failure clean up.

use std::io::{IsTerminal as _, Write as _, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use dreamwire_bench::topology::{
    BOOT_LIMIT, Daemon, DaemonSpec, Guest, GuestSpec, Needs, Netns, Nic, TopologyError, VethEnd, Wire,
    clean_up_on_signals, missing,
};

/// Bytes that VXLAN puts around a guest's packet: Ethernet 14, VXLAN 8, UDP 8 (RFC 7348, section 5) and the outer IP header.
const VXLAN_BYTES: u32 = 14 + 8 + 8;
/// Bytes of the file that is carried across. An emulated guest does about 10 MB/s.
const FILE_MEGABYTES: u32 = 16;
/// How long a card may take to see its link once the guest is up.
const LINK_LIMIT: Duration = Duration::from_secs(10);

/// Two hosts, a virtual machine on each, one virtual network between them.
#[derive(Debug, Parser)]
#[command(name = "dreamwire-demo")]
struct Options {
    /// Leave everything running at the end and say how to look around.
    #[arg(long)]
    keep: bool,
    /// MTU of the network between the hosts; at 1500 the guests get what the tunnel leaves.
    #[arg(long, default_value_t = 1600, value_parser = clap::value_parser!(u32).range(1280..=9216))]
    underlay_mtu: u32,
    /// Carry the tunnel over IPv6.
    #[arg(long)]
    ipv6: bool,
    /// The daemon's program; default: `dreamwire` beside this program.
    #[arg(long)]
    dreamwire: Option<PathBuf>,
}

impl Options {
    fn guest_mtu(&self) -> u32 {
        let outer_ip_bytes = if self.ipv6 { 40 } else { 20 };
        (self.underlay_mtu - VXLAN_BYTES - outer_ip_bytes).min(1500)
    }

    fn underlay_address(&self, number: usize) -> String {
        if self.ipv6 { format!("2001:db8::{number}") } else { format!("192.0.2.{number}") }
    }

    fn binary(&self) -> PathBuf {
        let beside = || std::env::current_exe().unwrap_or_default().with_file_name("dreamwire");
        self.dreamwire.clone().unwrap_or_else(beside)
    }
}

/// One host with what runs on it. Guests go first: their link must not be seen to go down.
struct Host {
    number: usize,
    guest: Option<Guest>,
    daemon: Option<Daemon>,
    netns: Netns,
}

impl Host {
    fn guest(&self) -> &Guest {
        self.guest.as_ref().expect("started in an earlier step")
    }

    fn guest_address(&self) -> String {
        format!("10.0.0.{}", self.number)
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().expect("started in an earlier step")
    }
}

fn main() -> ExitCode {
    clean_up_on_signals();
    let options = Options::parse();
    if let Some(reason) = missing(Needs::Guests) {
        eprintln!("dreamwire-demo: {reason}");
        return ExitCode::FAILURE;
    }
    let mut show = Show::new();
    let mut hosts = Vec::new();
    match run(&options, &mut hosts, &mut show) {
        Ok(()) => {
            show.line(&format!("\nAll of it worked, in {:.0} s.", show.start.elapsed().as_secs_f64()));
            if options.keep {
                keep(&options, &hosts);
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            diagnose(&error, &hosts);
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options, hosts: &mut Vec<Host>, show: &mut Show) -> Result<(), TopologyError> {
    show.line(&format!(
        "dreamwire: two hosts, a virtual machine on each, one virtual network between them\n\n  \
         vm1 ─ dreamwire ═══ VXLAN 100 over {} ═══ dreamwire ─ vm2\n",
        if options.ipv6 { "IPv6" } else { "IPv4" }
    ));
    let mtu = options.underlay_mtu;
    show.step(&format!("two hosts, joined by a network with MTU {mtu}"), || connect_hosts(options, hosts))?;
    show.step("a dreamwire daemon on each host", || start_daemons(options, hosts))?;
    show.step("a virtual machine on each host", || boot_guests(options, hosts))?;
    let [one, two] = hosts.as_slice() else {
        unreachable!("two hosts were made");
    };
    for host in [one, two] {
        show.step(&format!("{} sees an ordinary network card", host.guest().name()), || {
            let driver = host.guest().sh("ethtool -i eth0 | head -n 1")?;
            Ok(driver + &host.guest().exec(&["ip", "address", "show", "dev", "eth0"])?)
        })?;
    }
    show.step("vm1 pings vm2", || one.guest().exec(&["ping", "-c", "4", "-i", "0.3", &two.guest_address()]))?;
    show.step("vm1 pings vm2 over IPv6", || one.guest().exec(&["ping", "-q", "-c", "4", "-i", "0.3", "fd00::2"]))?;
    show.step("on the wire between the hosts: VXLAN", || capture(one, two))?;
    show.step(&format!("a file of {FILE_MEGABYTES} MB from vm2 to vm1"), || transfer(one, two))?;
    show.step("TCP throughput from vm1 to vm2", || throughput(one, two))?;
    for host in [one, two] {
        show.step(&format!("what the daemon on host {} counted", host.number), || host.daemon().cli(&["stats"]))?;
    }
    Ok(())
}

fn connect_hosts(options: &Options, hosts: &mut Vec<Host>) -> Result<String, TopologyError> {
    for number in [1, 2] {
        let netns = Netns::new(&format!("host{number}"))?;
        hosts.push(Host { number, guest: None, daemon: None, netns });
    }
    let length = if options.ipv6 { 64 } else { 24 };
    let addresses = [1, 2].map(|number| format!("{}/{length}", options.underlay_address(number)));
    let words = [[addresses[0].as_str()], [addresses[1].as_str()]];
    let end = |index: usize| VethEnd { netns: &hosts[index].netns, interface: "eth1", addresses: &words[index] };
    Netns::join([end(0), end(1)], options.underlay_mtu)?;
    Ok(format!("host 1 has {}, host 2 has {}", addresses[0], addresses[1]))
}

fn start_daemons(options: &Options, hosts: &mut [Host]) -> Result<String, TopologyError> {
    let binary = options.binary();
    for host in &mut *hosts {
        let name = format!("dreamwire on host {}", host.number);
        let spec = DaemonSpec {
            name: &name,
            binary: &binary,
            netns: Some(&host.netns),
            config: &config(options, host.number),
        };
        host.daemon = Some(Daemon::start(&spec)?);
    }
    let written = hosts[0].daemon().config()?;
    Ok(format!("configuration of host 1:\n{written}"))
}

fn config(options: &Options, number: usize) -> String {
    let (mtu, guest_mtu) = (options.underlay_mtu, options.guest_mtu());
    let (local, remote) = (options.underlay_address(number), options.underlay_address(3 - number));
    format!(
        r#"[daemon]
run_dir = "{{run_dir}}"

[[underlay]]
name = "fabric"
driver = "socket"
address = "{local}"
mtu = {mtu}

[[network]]
name = "blue"
vni = 100
encapsulation = "vxlan"
underlay = "fabric"
mtu = {guest_mtu}
remotes = ["{remote}"]

[[port]]
name = "vm{number}"
network = "blue"
socket = "{{run_dir}}/vm{number}.sock"
mode = "server"
mac = "52:54:00:00:00:0{number}"
addresses = ["10.0.0.{number}", "fd00::{number}"]
"#
    )
}

fn boot_guests(options: &Options, hosts: &mut [Host]) -> Result<String, TopologyError> {
    for host in &mut *hosts {
        let number = host.number;
        let socket = host.daemon().path(&format!("vm{number}.sock"));
        let nic = Nic::new(Wire::VhostUser(socket), &format!("52:54:00:00:00:0{number}"))
            .address(&format!("10.0.0.{number}/24"))
            .address(&format!("fd00::{number}/64"))
            .properties(&format!("host_mtu={}", options.guest_mtu()));
        host.guest = Some(Guest::start(&GuestSpec::new(&format!("vm{number}")).nic(nic))?);
    }
    let start = Instant::now();
    for host in &mut *hosts {
        let guest = host.guest.as_mut().expect("just started");
        guest.wait_ready(BOOT_LIMIT)?;
        guest.wait_link("eth0", LINK_LIMIT)?;
    }
    Ok(format!("both are up after {:.1} s", start.elapsed().as_secs_f64()))
}

fn capture(one: &Host, two: &Host) -> Result<String, TopologyError> {
    let line = "timeout 20 tcpdump -n -l -c 6 -i eth1 udp port 4789 2>/dev/null";
    std::thread::scope(|scope| {
        let tcpdump = scope.spawn(|| one.netns.sh(line));
        while !tcpdump.is_finished() {
            one.guest().ping(&two.guest_address(), 3)?;
        }
        tcpdump.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn transfer(one: &Host, two: &Host) -> Result<String, TopologyError> {
    two.guest().sh(&format!(
        "mkdir -p /tmp/www && dd if=/dev/urandom of=/tmp/www/file bs=1M count={FILE_MEGABYTES} && httpd -p 80 -h /tmp/www"
    ))?;
    let url = format!("http://{}/file", two.guest_address());
    let format = "%{size_download} bytes in %{time_total} s\n";
    let fetched = one.guest().exec(&["curl", "-sS", "--fail", "-o", "/tmp/file", "-w", format, &url])?;
    let hash = |host: &Host, path: &str| host.guest().sh(&format!("sha256sum <{path} | cut -d' ' -f1"));
    let (sent, received) = (hash(two, "/tmp/www/file")?, hash(one, "/tmp/file")?);
    if sent != received {
        return Err(failed(&format!("the file changed on its way: SHA-256 {sent} became {received}")));
    }
    Ok(format!("{fetched}SHA-256 agrees on both sides: {received}"))
}

fn throughput(one: &Host, two: &Host) -> Result<String, TopologyError> {
    two.guest().exec(&["iperf3", "--server", "--one-off", "--daemon"])?;
    let report = one.guest().exec(&["iperf3", "--json", "--time", "3", "--client", &two.guest_address()])?;
    let report: serde_json::Value =
        serde_json::from_str(&report).map_err(|error| failed(&format!("iperf3's report: {error}")))?;
    let received = &report["end"]["sum_received"]["bits_per_second"];
    let bits = received.as_f64().filter(|bits| *bits > 0.0).ok_or_else(|| failed("iperf3 received nothing"))?;
    let retransmits = &report["end"]["sum_sent"]["retransmits"];
    Ok(format!(
        "{:.0} Mbit/s, {retransmits} retransmissions (emulated processors set the limit where there is no KVM)",
        bits / 1e6
    ))
}

fn failed(reason: &str) -> TopologyError {
    TopologyError::Unavailable(reason.to_owned())
}

fn diagnose(error: &TopologyError, hosts: &[Host]) {
    eprintln!("\nFAILED: {error}");
    for host in hosts {
        let number = host.number;
        if let Ok(links) = host.netns.sh("ip -brief address; ip -s link show eth1") {
            eprintln!("\n--- host {number}: interfaces ---\n{links}");
        }
        if let Some(daemon) = &host.daemon {
            let stats = daemon.cli(&["stats"]).unwrap_or_else(|error| error.to_string());
            eprintln!(
                "--- host {number}: daemon's log ---\n{}\n--- host {number}: counters ---\n{stats}",
                daemon.log()
            );
        }
        if let Some(guest) = &host.guest {
            eprintln!("--- {}: console ---\n{}", guest.name(), guest.serial_tail());
        }
    }
}

fn keep(options: &Options, hosts: &[Host]) {
    let binary = options.binary();
    println!("\nEverything keeps running. From another terminal, as root:");
    for host in hosts {
        let (netns, run_dir) = (host.netns.name(), host.daemon().run_dir());
        println!("\n  host {}, vm{}", host.number, host.number);
        println!("    shell in the guest    {}", console_command(host.guest().directory()));
        println!("    shell on the host     ip netns exec {netns} bash");
        println!("    the wire              ip netns exec {netns} tcpdump -n -i eth1 udp port 4789");
        println!("    the daemon            {} --run-dir {} stats", binary.display(), run_dir.display());
    }
    println!("\nCtrl-C ends it and cleans up.");
    loop {
        std::thread::park();
    }
}

fn console_command(directory: &Path) -> String {
    format!("socat -,raw,echo=0,escape=0x1d unix-connect:{}/console   (Ctrl-] leaves)", directory.display())
}

/// Progress for people: the step that runs in a terminal, finished steps with their times in a log.
struct Show {
    start: Instant,
    terminal: bool,
}

impl Show {
    fn new() -> Self {
        let colours = std::env::var_os("NO_COLOR").is_none();
        Self { start: Instant::now(), terminal: stdout().is_terminal() && colours }
    }

    fn line(&self, text: &str) {
        println!("{text}");
    }

    /// Runs a step and prints what it gives, indented, behind its name and time.
    fn step(
        &mut self,
        name: &str,
        action: impl FnOnce() -> Result<String, TopologyError>,
    ) -> Result<(), TopologyError> {
        let elapsed = |since: Instant| since.elapsed().as_secs_f64();
        if self.terminal {
            print!("\x1b[2m[{:6.1} s]\x1b[0m ... {name}", elapsed(self.start));
            // A terminal that is gone is noticed by the next println.
            let _ = stdout().flush();
        }
        let step_start = Instant::now();
        let outcome = action();
        let took = elapsed(step_start);
        let (word, colour) = if outcome.is_ok() { ("ok ", 32) } else { ("BAD", 31) };
        let total = elapsed(self.start);
        if self.terminal {
            println!(
                "\r\x1b[2m[{total:6.1} s]\x1b[0m \x1b[1;{colour}m{word}\x1b[0m \x1b[1m{name}\x1b[0m \x1b[2m({took:.1} s)\x1b[0m\x1b[K"
            );
        } else {
            println!("[{total:6.1} s] {word} {name} ({took:.1} s)");
        }
        for line in outcome?.trim_end().lines() {
            println!("               {line}");
        }
        println!();
        Ok(())
    }
}

// A file that takes more time than this at 1 MB/s would run into the guest's limit for commands.
const _: () = assert!(FILE_MEGABYTES < Duration::from_secs(30).as_secs() as u32);
