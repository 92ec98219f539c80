//! A steady stream of numbered UDP packets and its echo. Unlike ping it neither pauses while a link is down nor hides loss.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{ECHO_PORT, ProbeReport};

/// How long answers are still waited for after the last probe.
const LINGER: Duration = Duration::from_millis(300);

/// A running stream.
#[derive(Debug)]
pub struct Probe {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<ProbeReport>,
}

impl Probe {
    /// Starts sending to an echo port.
    ///
    /// # Errors
    /// When no socket can be opened towards the target.
    pub fn start(target: SocketAddr, interval: Duration) -> io::Result<Self> {
        let local: SocketAddr =
            if target.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
        let socket = UdpSocket::bind(local)?;
        socket.connect(target)?;
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("probe".to_owned()).spawn({
            let stop = Arc::clone(&stop);
            move || Stream::new(socket).run(interval, &stop)
        })?;
        Ok(Self { stop, thread })
    }

    /// Stops sending, waits for the last answers, and reports.
    #[must_use]
    pub fn stop(self) -> ProbeReport {
        // Relaxed: nothing but the flag itself is handed over; join() orders the report.
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_default()
    }
}

struct Stream {
    socket: UdpSocket,
    /// When each probe left, and whether its answer came.
    probes: Vec<(Instant, bool)>,
    newest_answered: Option<usize>,
    last_answer: Instant,
    round_trip_ms_sum: f64,
    report: ProbeReport,
}

impl Stream {
    fn new(socket: UdpSocket) -> Self {
        Self {
            socket,
            probes: Vec::new(),
            newest_answered: None,
            last_answer: Instant::now(),
            round_trip_ms_sum: 0.0,
            report: ProbeReport::default(),
        }
    }

    fn run(mut self, interval: Duration, stop: &AtomicBool) -> ProbeReport {
        let mut next = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            self.send();
            next += interval;
            self.receive_until(next);
        }
        let last_sent = Instant::now();
        let end = last_sent + LINGER;
        while Instant::now() < end && (self.report.received as usize) < self.probes.len() {
            self.receive_until(end.min(Instant::now() + interval));
        }
        self.note_gap(last_sent.max(self.last_answer));
        if self.report.received > 0 {
            self.report.round_trip_ms_mean = self.round_trip_ms_sum / self.report.received as f64;
        }
        self.report
    }

    fn send(&mut self) {
        let number = self.probes.len() as u64;
        match self.socket.send(&number.to_be_bytes()) {
            Ok(_) => {
                self.report.sent += 1;
                self.probes.push((Instant::now(), false));
            }
            // No carrier, or an ICMP error for an earlier probe: both are what is being measured.
            Err(_) => self.report.refused += 1,
        }
    }

    fn receive_until(&mut self, deadline: Instant) {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.socket.set_read_timeout(Some(left)).is_err() {
                return;
            }
            let mut buffer = [0; 8];
            if let Ok(8) = self.socket.recv(&mut buffer) {
                self.note_answer(u64::from_be_bytes(buffer) as usize);
            }
        }
    }

    fn note_answer(&mut self, number: usize) {
        let now = Instant::now();
        let Some((sent, answered)) = self.probes.get_mut(number) else {
            return;
        };
        if std::mem::replace(answered, true) {
            self.report.duplicates += 1;
            return;
        }
        self.round_trip_ms_sum += now.duration_since(*sent).as_secs_f64() * 1e3;
        self.report.received += 1;
        if self.newest_answered.is_some_and(|newest| number < newest) {
            self.report.reordered += 1;
        }
        self.newest_answered = self.newest_answered.max(Some(number));
        self.note_gap(now);
        self.last_answer = now;
    }

    fn note_gap(&mut self, now: Instant) {
        let gap_ms = now.saturating_duration_since(self.last_answer).as_secs_f64() * 1e3;
        self.report.longest_gap_ms = self.report.longest_gap_ms.max(gap_ms);
    }
}

/// Sends back every datagram that comes to `ECHO_PORT`, IPv4 and IPv6, for ever.
///
/// # Errors
/// When the port is taken or may not be bound.
pub fn serve_echo() -> io::Result<std::convert::Infallible> {
    // Linux: a socket on :: takes IPv4 too, unless net.ipv6.bindv6only says otherwise.
    echo_on(&UdpSocket::bind((Ipv6Addr::UNSPECIFIED, ECHO_PORT))?)
}

fn echo_on(socket: &UdpSocket) -> io::Result<std::convert::Infallible> {
    let mut buffer = vec![0; 65_536];
    loop {
        // A lost answer is a lost probe: nothing to do about an error here.
        if let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(&buffer[..length], from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_that_works_loses_nothing() {
        let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
        let target = echo.local_addr().unwrap();
        std::thread::spawn(move || echo_on(&echo));
        let probe = Probe::start(target, Duration::from_millis(2)).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let report = probe.stop();
        assert!(report.sent >= 5, "{report:?}");
        assert_eq!((report.sent, 0, 0), (report.received, report.duplicates, report.refused));
    }

    #[test]
    fn silence_is_one_long_gap() {
        let deaf = UdpSocket::bind("127.0.0.1:0").unwrap();
        let probe = Probe::start(deaf.local_addr().unwrap(), Duration::from_millis(5)).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let report = probe.stop();
        assert_eq!(report.received, 0);
        assert!(report.longest_gap_ms >= 50.0, "{report:?}");
    }
}
