//! What workers tell of single frames: samples of drops are kept for whoever watches, what rules want logged is logged.
//!
//! Filled by the control thread, which knows the names behind numbers; read by the API. The last 4096 samples are kept.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use dreamwire_datapath::perimeter::events::Event;
use dreamwire_policy::key::protocol_has_ports;
use dreamwire_policy::{Key, TokenBucket};
use serde::Serialize;

use super::core::Control;
use crate::config::notation::{direction_word, protocol_name};

/// Samples kept.
const KEPT_MAX: usize = 4096;
/// Log lines of rules a second, however often the workers' queues are looked at, and at once: what comes between two looks.
const LOG_LINES_PER_SECOND: u64 = 1000;
const LOG_LINES_BURST: u64 = 200;

/// A frame, in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// Rises by one with each sample.
    pub sequence: u64,
    /// When it was heard of, in ms since 1970.
    pub time_ms: u64,
    /// The network that it was in.
    pub network: Option<String>,
    /// The port where it was judged; none: it came by a tunnel and reached no port.
    pub port: Option<String>,
    /// Which way, seen from the VM.
    pub direction: &'static str,
    /// Why it was dropped; none: it passed.
    pub reason: Option<&'static str>,
    /// The rule that decided.
    pub rule: Option<String>,
    /// Its flow, if it was an IP packet that could be read.
    #[serde(flatten)]
    pub flow: Option<Flow>,
    /// Source station.
    pub source_mac: String,
    /// Destination station.
    pub destination_mac: String,
    /// EtherType, or length.
    pub ethertype: u16,
    /// Length of the frame.
    pub bytes: u32,
    /// Frames of this port that were left out since the last sample.
    pub left_out: u32,
}

/// A flow key, in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Flow {
    /// Name or number.
    pub protocol: String,
    /// Address, with the port where there is one.
    pub source: String,
    /// Address, with the port where there is one.
    pub destination: String,
    /// Type and code of an ICMP message.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub icmp: Option<String>,
}

impl Flow {
    /// In words.
    pub fn of(key: &Key) -> Self {
        let end = |address: IpAddr, port: u16| match protocol_has_ports(key.protocol) {
            true => SocketAddr::new(address, port).to_string(),
            false => address.to_string(),
        };
        let [kind, code] = key.destination_port.to_be_bytes();
        Self {
            protocol: protocol_name(key.protocol, key.family),
            source: end(key.source_address(), key.source_port),
            destination: end(key.destination_address(), key.destination_port),
            icmp: key.is_icmp().then(|| format!("{kind}/{code}")),
        }
    }
}

/// How many lines rules may log.
#[derive(Debug)]
pub(super) struct LogLimit {
    bucket: TokenBucket,
    /// Lines left out that nobody has been told of yet.
    left_out: u64,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self { bucket: TokenBucket::new(LOG_LINES_PER_SECOND, LOG_LINES_BURST), left_out: 0 }
    }
}

impl LogLimit {
    /// Whether another line may be logged; if not, `lines` are left out.
    fn take(&mut self, lines: u64, now_ns: u64) -> bool {
        let there = self.bucket.take(1, now_ns);
        self.left_out += if there { 0 } else { lines };
        there
    }

    /// What has been left out, when there is a line to say so in.
    fn take_left_out(&mut self, now_ns: u64) -> Option<u64> {
        let may = self.left_out > 0 && self.bucket.take(1, now_ns);
        may.then(|| std::mem::take(&mut self.left_out))
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub struct News(Mutex<Recent>);

#[derive(Debug, Default)]
struct Recent {
    next: u64,
    /// Oldest first.
    samples: VecDeque<Sample>,
}

impl News {
    /// The samples from this sequence number on, and the number that the next one will have.
    pub fn since(&self, sequence: u64) -> (Vec<Sample>, u64) {
        let recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = recent.samples.iter().filter(|sample| sample.sequence >= sequence);
        (new.cloned().collect(), recent.next)
    }

    fn keep(&self, mut sample: Sample) {
        let mut recent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.samples.len() == KEPT_MAX {
            recent.samples.pop_front();
        }
        sample.sequence = recent.next;
        recent.next += 1;
        recent.samples.push_back(sample);
    }
}

impl Control {
    /// Takes what the workers have to tell.
    pub(super) fn hear(&mut self) {
        // 2^64 ns are 584 years.
        let now_ns = self.log_began.elapsed().as_nanos() as u64;
        // First: there may be no line left for it afterwards.
        if let Some(unlogged) = self.log_limit.take_left_out(now_ns) {
            tracing::warn!(target: "rule", unlogged, "rules want more lines logged than are");
        }
        // At most what was there when it was looked at: a worker that goes on telling must not hold the control thread.
        let workers = Arc::clone(&self.workers);
        for event in workers.iter().flat_map(|worker| worker.events().take(KEPT_MAX)) {
            let sample = self.in_words(&event);
            if !event.log {
                self.news.keep(sample);
            } else if self.log_limit.take(1 + u64::from(event.left_out), now_ns) {
                log(&sample);
            }
        }
    }

    fn in_words(&self, event: &Event) -> Sample {
        let port = self.ports.iter().find(|(_, live)| Some(live.id) == event.port);
        let network = self.networks.iter().find(|(_, live)| live.id == event.network);
        let rule = event.rule.and_then(|rule| self.rulebook.index().rules.get(&rule));
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Sample {
            sequence: 0,
            time_ms: since.as_millis() as u64,
            network: network.map(|(name, _)| name.clone()),
            port: port.map(|(name, _)| name.clone()),
            direction: direction_word(event.direction),
            reason: event.dropped.map(|reason| reason.name()),
            rule: rule.map(|entry| entry.name.clone()),
            flow: event.key.as_ref().map(Flow::of),
            source_mac: event.stations.0.to_string(),
            destination_mac: event.stations.1.to_string(),
            ethertype: event.ethertype,
            bytes: event.frame_bytes,
            left_out: event.left_out,
        }
    }
}

/// One line; with `--log-format json`, one JSON object.
fn log(sample: &Sample) {
    let flow = sample.flow.as_ref();
    tracing::info!(
        target: "rule",
        rule = sample.rule,
        verdict = if sample.reason.is_some() { "deny" } else { "allow" },
        reason = sample.reason,
        port = sample.port,
        network = sample.network,
        direction = sample.direction,
        protocol = flow.map(|flow| flow.protocol.as_str()),
        source = flow.map(|flow| flow.source.as_str()),
        destination = flow.map(|flow| flow.destination.as_str()),
        icmp = flow.and_then(|flow| flow.icmp.as_deref()),
        source_mac = sample.source_mac,
        destination_mac = sample.destination_mac,
        ethertype = sample.ethertype,
        bytes = sample.bytes,
        left_out = sample.left_out,
        "a rule has decided"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        let key = Key::new(6, ("fd00::1".parse().unwrap(), 4000), ("fd00::2".parse().unwrap(), 443));
        Sample {
            sequence: 0,
            time_ms: 0,
            network: None,
            port: None,
            direction: direction_word(dreamwire_policy::Direction::Egress),
            reason: None,
            rule: None,
            flow: Some(Flow::of(&key)),
            source_mac: String::new(),
            destination_mac: String::new(),
            ethertype: 0x86dd,
            bytes: 60,
            left_out: 0,
        }
    }

    #[test]
    fn the_last_samples_are_kept_and_each_is_told_once() {
        let news = News::default();
        for _ in 0..KEPT_MAX + 10 {
            news.keep(sample());
        }
        let (all, next) = news.since(0);
        assert_eq!((all.len(), all[0].sequence, next), (KEPT_MAX, 10, KEPT_MAX as u64 + 10));
        assert_eq!(news.since(next).0, []);
        news.keep(sample());
        assert_eq!(news.since(next).0.len(), 1);
    }

    #[test]
    fn rules_log_so_many_lines_a_second_however_often_the_workers_are_heard() {
        let mut limit = LogLimit::default();
        let (mut logged, mut told) = (0, 0);
        let wanted = 10 * 10_000;
        for look in 0..10_000_u64 {
            let now_ns = look * 1_000_000;
            let said = limit.take_left_out(now_ns);
            told += said.unwrap_or(0);
            logged += u64::from(said.is_some());
            for _ in 0..10 {
                let line = limit.take(1, now_ns);
                logged += u64::from(line);
                told += u64::from(line);
            }
        }
        assert!((10_000..=10_200).contains(&logged), "{logged} lines in ten seconds");
        assert_eq!(told + limit.left_out, wanted, "every line is logged or told of");
    }

    #[test]
    fn flows_are_told_in_the_way_people_write_them() {
        let flow = sample().flow.unwrap();
        assert_eq!((&*flow.protocol, &*flow.source, flow.icmp), ("tcp", "[fd00::1]:4000", None));
        let ping = Key::new(1, ("10.0.0.1".parse().unwrap(), 7), ("10.0.0.2".parse().unwrap(), 8 << 8));
        let flow = Flow::of(&ping);
        assert_eq!((&*flow.protocol, &*flow.source, flow.icmp.as_deref()), ("icmp", "10.0.0.1", Some("8/0")));
    }
}
