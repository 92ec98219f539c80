//! The real stacks of guest and peer, asked with ping: sizes and path MTU, TTL, fragments, groups, an echo service.

use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use super::{Observations, Site};
use crate::topology::{ECHO_PORT, TopologyError};

/// Time between two packets of the echo service's client.
const ECHO_INTERVAL: Duration = Duration::from_millis(5);
const ECHO_TIME: Duration = Duration::from_millis(700);

pub(super) fn observe(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    for (family, target, own, header_bytes) in [(4, "10.0.0.2", "10.0.0.1", 28), (6, "fd00::2", "fd00::1", 48)] {
        let full = 1500 - header_bytes;
        for size in [0, 1, 8, 56, 1000, 1280 - header_bytes, full - 1, full, full + 1, full + 500] {
            let words = format!("-c 1 -W 2 -s {size} -M do {target}");
            rows.record(format!("internet.out.ipv{family}.whole.{size:05}"), ping(site, &words)?);
            rows.record(
                format!("internet.in.ipv{family}.whole.{size:05}"),
                ping_from_peer(site, &format!("-c 1 -W 2 -s {size} -M do {own}"))?,
            );
        }
        for size in [full + 1, 2000, 4000, 8000, 20_000, 65_507 - if family == 6 { 20 } else { 0 }] {
            let words = format!("-c 1 -W 3 -s {size} -M dont {target}");
            rows.record(format!("internet.out.ipv{family}.fragments.{size:05}"), ping(site, &words)?);
            rows.record(
                format!("internet.in.ipv{family}.fragments.{size:05}"),
                ping_from_peer(site, &format!("-c 1 -W 3 -s {size} -M dont {own}"))?,
            );
        }
        rows.record(format!("internet.out.ipv{family}.ttl_1"), ping(site, &format!("-c 1 -W 2 -t 1 {target}"))?);
        rows.record(format!("internet.out.ipv{family}.ttl_255"), ping(site, &format!("-c 1 -W 2 -t 255 {target}"))?);
        rows.record(format!("internet.in.ipv{family}.ttl_1"), ping_from_peer(site, &format!("-c 1 -W 2 -t 1 {own}"))?);
        let route = site.ask(&format!("ip -{family} route get {target} | head -n 1"))?;
        rows.record(format!("internet.route.ipv{family}"), route.replace("uid 0", ""));
    }
    for tos in ["0x01", "0x02", "0x03", "0xb8", "0xbb"] {
        rows.record(format!("internet.out.ipv4.tos_{tos}"), ping(site, &format!("-c 1 -W 2 -Q {tos} 10.0.0.2"))?);
    }
    rows.record("internet.out.broadcast", ping(site, "-c 1 -W 2 -b 10.0.0.255")?);
    rows.record("internet.out.all_nodes", ping(site, "-c 1 -W 2 ff02::1%eth0")?);
    rows.record("internet.out.link_local", ping(site, "-c 1 -W 2 fe80::5054:ff:fe00:2%eth0")?);
    rows.record("internet.out.unknown_on_link", ping(site, "-c 1 -W 1 10.0.0.99")?);
    rows.record("internet.in.link_local", ping_from_peer(site, "-c 1 -W 2 fe80::5054:ff:fe00:1%peer0")?);
    rows.record("internet.in.all_nodes", ping_from_peer(site, "-c 1 -W 2 ff02::1%peer0")?);
    echo(site, rows)
}

/// A stream of datagrams and its echo: loss, copies, order.
fn echo(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let socket = site.peer.netns.enter(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, ECHO_PORT)))?;
    let failed = |error| TopologyError::Io { what: "echo service".to_owned(), source: error };
    let socket = socket.map_err(failed)?;
    socket.set_read_timeout(Some(Duration::from_millis(100))).map_err(failed)?;
    for (family, target) in [("ipv4", "10.0.0.2"), ("ipv6", "fd00::2")] {
        let target = SocketAddr::new(target.parse().expect("an address"), ECHO_PORT);
        let probe = site.guest.probe(target, ECHO_INTERVAL)?;
        let end = std::time::Instant::now() + ECHO_TIME;
        let answer = || {
            let mut buffer = [0; 2048];
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        };
        while std::time::Instant::now() < end {
            answer();
        }
        let report = std::thread::scope(|scope| {
            let stopping = scope.spawn(|| probe.stop());
            while !stopping.is_finished() {
                answer();
            }
            stopping.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        let name = format!("internet.echo.{family}");
        rows.record(format!("{name}.lost"), report.sent - report.received);
        rows.record(format!("{name}.twice"), report.duplicates);
        rows.record(format!("{name}.out_of_order"), report.reordered);
        rows.record(format!("{name}.refused"), report.refused);
    }
    Ok(())
}

/// One ping from the guest, in words without times.
pub(super) fn ping(site: &Site, words: &str) -> Result<String, TopologyError> {
    Ok(verdict(&site.ask(&format!("ping {words}"))?))
}

/// One ping from the peer.
pub(super) fn ping_from_peer(site: &Site, words: &str) -> Result<String, TopologyError> {
    Ok(verdict(&site.peer.netns.sh(&format!("ping {words} 2>&1 || true"))?))
}

/// "64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time=0.3 ms" without what is different every time; else the error, or "lost".
fn verdict(text: &str) -> String {
    let answers: Vec<_> = text.lines().filter(|line| line.contains("bytes from")).map(answer).collect();
    let errors =
        text.lines().filter(|line| line.contains("error:") || line.contains("too long") || line.starts_with("From"));
    let said: Vec<_> = answers.into_iter().chain(errors.map(str::to_owned)).collect();
    if said.is_empty() { "lost".to_owned() } else { said.join("; ") }
}

fn answer(line: &str) -> String {
    let kept =
        line.split(' ').filter(|word| !word.starts_with("time=") && *word != "ms" && !word.starts_with("icmp_seq"));
    kept.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::verdict;

    #[test]
    fn a_ping_is_told_without_times() {
        let text = "PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.\n64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time=0.31 ms\n\n--- ...";
        assert_eq!(verdict(text), "64 bytes from 10.0.0.2: ttl=64");
        assert_eq!(verdict("PING x\n--- statistics ---\n1 packets transmitted, 0 received, 100% packet loss"), "lost");
        assert_eq!(
            verdict("ping: local error: message too long, mtu=1500"),
            "ping: local error: message too long, mtu=1500"
        );
    }
}
