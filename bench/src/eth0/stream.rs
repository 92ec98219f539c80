//! TCP and UDP between the real stacks, with the card's offloads on and off, as the receiver's capture sees them.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use super::{Observations, Site, segment};
use crate::topology::{FrameFilter, TopologyError};

/// Sent per connection. Enough for the guest's stack to want segmentation, little enough for an emulated guest.
const BYTES: usize = 256 << 10;
/// Frames looked at per connection towards the guest: they cross a slow serial port.
const FRAMES_SEEN: usize = 24;
const PORT_OUT: u16 = 9000;
const PORT_IN: u16 = 9001;
/// How long a connection may take on a loaded machine.
const LIMIT: Duration = Duration::from_secs(15);
const ALL_ON: &str = "ethtool -K eth0 tx on sg on tso on gso on gro on rx-gro-hw on >/dev/null 2>&1; true";

/// Peer and guest in one family.
struct Family {
    name: &'static str,
    peer: &'static str,
    guest: &'static str,
    /// Of the TCP destination port in a frame.
    port_at: usize,
}

const FAMILIES: [Family; 2] = [
    Family { name: "ipv4", peer: "10.0.0.2", guest: "10.0.0.1", port_at: 14 + 20 + 2 },
    Family { name: "ipv6", peer: "fd00::2", guest: "fd00::1", port_at: 14 + 40 + 2 },
];

/// What the guest turns off before it sends.
const SENDERS: [(&str, &str); 5] = [
    ("all_on", ""),
    ("tso_off", "tso off"),
    ("gso_off", "tso off gso off"),
    ("tx_off", "tx off"),
    ("sg_off", "sg off"),
];

/// What the guest turns off before it receives. Its own GRO always: it comes before the capture, and what it joins depends on
/// timing.
const RECEIVERS: [(&str, &str); 2] = [("all_on", "gro off"), ("rx_gro_hw_off", "gro off rx-gro-hw off")];

pub(super) fn observe(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    for family in &FAMILIES {
        for (name, off) in SENDERS {
            outwards(site, family, &format!("stream.out.{}.{name}", family.name), off, rows)?;
        }
        for (name, off) in RECEIVERS {
            inwards(site, family, &format!("stream.in.{}.from_a_wire.{name}", family.name), off, rows)?;
        }
        // The peer leaves segmentation and checksums to its card, as another guest of the same host would.
        site.peer.set_offloads(true)?;
        for (name, off) in RECEIVERS {
            inwards(site, family, &format!("stream.in.{}.from_a_card.{name}", family.name), off, rows)?;
        }
        datagram(site, family, rows)?;
        site.peer.set_offloads(false)?;
    }
    site.guest.sh("echo 1 >/proc/sys/net/ipv4/tcp_ecn")?;
    outwards(site, &FAMILIES[0], "stream.out.ipv4.ecn", "", rows)?;
    outwards(site, &FAMILIES[1], "stream.out.ipv6.ecn", "", rows)
}

/// From the guest to the peer.
fn outwards(
    site: &Site,
    family: &Family,
    prefix: &str,
    off: &str,
    rows: &mut Observations,
) -> Result<(), TopologyError> {
    switch_off(site, prefix, off, rows)?;
    let address = SocketAddr::new(parse(family.peer), PORT_OUT);
    let listener = site.peer.netns.enter(|| TcpListener::bind(address))?.map_err(failed)?;
    let listening = site.peer.listen()?;
    let command = format!("head -c {BYTES} /dev/zero | nc -w 10 {} {PORT_OUT}", family.peer);
    let received = std::thread::scope(|scope| {
        let sink = scope.spawn(|| accept_all(&listener));
        let sent = site.guest.run(&["sh", "-c", &command], LIMIT);
        let received = sink.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        sent.map(|_| received)
    })?;
    rows.record(format!("{prefix}.bytes"), received);
    let filter = FrameFilter::any().bytes_at(family.port_at, &PORT_OUT.to_be_bytes());
    let frames = listening.receive(&filter, usize::MAX, Duration::from_millis(50))?;
    segment::record(prefix, &frames, rows);
    site.guest.sh(ALL_ON).map(drop)
}

/// From the peer to the guest.
fn inwards(
    site: &Site,
    family: &Family,
    prefix: &str,
    off: &str,
    rows: &mut Observations,
) -> Result<(), TopologyError> {
    switch_off(site, prefix, off, rows)?;
    let capture = site.guest.capture("eth0")?;
    let command = format!("nc -l -p {PORT_IN} | wc -c");
    let address = SocketAddr::new(parse(family.guest), PORT_IN);
    let received = std::thread::scope(|scope| {
        let sink = scope.spawn(|| site.guest.run(&["sh", "-c", &command], LIMIT));
        site.peer.netns.enter(|| send_all(address))??;
        sink.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    rows.record(format!("{prefix}.bytes"), received.stdout);
    let filter = FrameFilter::any().bytes_at(family.port_at, &PORT_IN.to_be_bytes());
    let frames = capture.frames(&filter, FRAMES_SEEN, Duration::from_millis(200))?;
    segment::record(prefix, &frames, rows);
    site.guest.sh(ALL_ON).map(drop)
}

/// A datagram of a peer that leaves the checksum to its card.
fn datagram(site: &Site, family: &Family, rows: &mut Observations) -> Result<(), TopologyError> {
    const PORT: u16 = 9002;
    let capture = site.guest.capture("eth0")?;
    let local = SocketAddr::new(parse(family.peer), 0);
    let socket = site.peer.netns.enter(|| UdpSocket::bind(local))?.map_err(failed)?;
    socket.send_to(&[7; 1000], SocketAddr::new(parse(family.guest), PORT)).map_err(failed)?;
    let filter = FrameFilter::any().bytes_at(family.port_at, &PORT.to_be_bytes());
    let frames = capture.frames(&filter, 1, Duration::from_secs(3))?;
    let value = match frames.first() {
        None => "lost",
        Some(frame) if frame.checksum_pending => "pending",
        Some(_) => "finished",
    };
    rows.record(format!("stream.in.{}.from_a_card.datagram.checksum", family.name), value);
    Ok(())
}

fn switch_off(site: &Site, prefix: &str, off: &str, rows: &mut Observations) -> Result<(), TopologyError> {
    if !off.is_empty() {
        rows.record(format!("{prefix}.switching"), site.outcome(&format!("ethtool -K eth0 {off}"))?);
    }
    Ok(())
}

/// Bytes of the first connection, up to its end.
fn accept_all(listener: &TcpListener) -> String {
    let deadline = Instant::now() + LIMIT;
    let mut buffer = vec![0; 65_536];
    let mut count = 0;
    // A guest that cannot connect must not hold the test up for ever.
    let nonblocking = listener.set_nonblocking(true);
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(_) if nonblocking.is_ok() && Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            Err(error) => return format!("no connection: {:?}", error.kind()),
        }
    };
    if stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(LIMIT))).is_err() {
        return "no time limit".to_owned();
    }
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return count.to_string(),
            Ok(length) => count += length,
            Err(error) => return format!("{count}, then {:?}", error.kind()),
        }
    }
}

/// Connects as soon as somebody listens, and sends.
fn send_all(address: SocketAddr) -> Result<(), TopologyError> {
    let deadline = Instant::now() + LIMIT;
    let mut stream = loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(3)) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() >= deadline => return Err(failed(error)),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    stream.write_all(&vec![0; BYTES]).map_err(failed)
}

fn parse(address: &str) -> IpAddr {
    address.parse().expect("written above")
}

fn failed(error: std::io::Error) -> TopologyError {
    TopologyError::Io { what: "stream to or from the guest".to_owned(), source: error }
}
