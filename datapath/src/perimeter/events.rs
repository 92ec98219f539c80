//! What a worker tells of single frames: samples of drops, and what rules want logged. For people who watch, not for
//! counting: counters count everything.
//!
//! A bounded queue out of the worker. Each port has a rate of its own for samples and for log lines, so that no guest
//! crowds out what another's frames have to tell; what was left out is counted and said with the next one.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use dreamwire_policy::{Direction, Key, Parsed, RuleId, TokenBucket};
use dreamwire_vhost::frame::RawFrame;

use super::parse_frame;
use crate::drop_reason::DropReason;
use crate::mac::Mac;
use crate::snapshot::{NetworkId, PORTS_MAX, PortId};
use crate::stage::parse::{ETHERNET_BYTES, destination, source};

/// Events that wait at most.
const EVENTS_MAX: usize = 4096;
/// Samples of drops of one port: per second, and at once.
const SAMPLES: (u64, u64) = (20, 40);
/// Log lines of one port: per second, and at once.
const LOG_LINES: (u64, u64) = (100, 200);

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Where it was judged or dropped; `None`: at the network that it came into by a tunnel.
    pub port: Option<PortId>,
    /// The network that it was in.
    pub network: NetworkId,
    /// Which way it went, seen from the VM.
    pub direction: Direction,
    /// Why it was dropped; `None`: it passed.
    pub dropped: Option<DropReason>,
    /// The rule that decided, if one did.
    pub rule: Option<RuleId>,
    /// Whether that rule is to be logged. Else it is a sample.
    pub log: bool,
    /// Source and destination station.
    pub stations: (Mac, Mac),
    /// EtherType, or length.
    pub ethertype: u16,
    /// Its flow, if it is an IP packet that could be read.
    pub key: Option<Key>,
    /// Whole length.
    pub frame_bytes: u32,
    /// Events of the same port and kind that were left out since the last one.
    pub left_out: u32,
}

/// A queue for one worker and one reader.
#[must_use]
pub fn queue() -> Arc<ArrayQueue<Event>> {
    Arc::new(ArrayQueue::new(EVENTS_MAX))
}

/// The worker's end of the queue.
#[derive(Debug)]
pub(crate) struct Events {
    queue: Arc<ArrayQueue<Event>>,
    /// By port; the last is for frames from tunnels.
    rates: Box<[[Rate; 2]]>,
}

#[derive(Debug, Clone, Copy)]
struct Rate {
    bucket: TokenBucket,
    left_out: u32,
}

/// What is to be told of a frame.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Story {
    pub(crate) port: Option<PortId>,
    pub(crate) network: NetworkId,
    pub(crate) direction: Direction,
    pub(crate) dropped: Option<DropReason>,
    pub(crate) rule: Option<RuleId>,
    pub(crate) log: bool,
}

impl Default for Events {
    fn default() -> Self {
        let rate = |(rate, burst)| Rate { bucket: TokenBucket::new(rate, burst), left_out: 0 };
        Self { queue: queue(), rates: vec![[rate(SAMPLES), rate(LOG_LINES)]; PORTS_MAX + 1].into_boxed_slice() }
    }
}

impl Events {
    /// Another queue.
    pub(crate) fn tell_to(&mut self, queue: Arc<ArrayQueue<Event>>) {
        self.queue = queue;
    }

    /// Tells of a frame, if its port may have told.
    #[cold]
    pub(crate) fn tell(&mut self, story: Story, frame: &RawFrame, now_ns: u64) {
        let index = story.port.map_or(PORTS_MAX, |port| usize::from(port.0));
        let rate = &mut self.rates[index][usize::from(story.log)];
        if self.queue.is_full() || !rate.bucket.take(1, now_ns) {
            rate.left_out = rate.left_out.saturating_add(1);
            return;
        }
        let Story { port, network, direction, dropped, rule, log } = story;
        let header = frame.headers();
        if header.len() < ETHERNET_BYTES {
            return;
        }
        let key = match parse_frame(frame) {
            Parsed::Ip(packet) => Some(packet.key),
            _ => None,
        };
        let event = Event {
            port,
            network,
            direction,
            dropped,
            rule,
            log,
            stations: (source(header), destination(header)),
            ethertype: u16::from_be_bytes([header[12], header[13]]),
            key,
            frame_bytes: frame.frame_bytes,
            left_out: std::mem::take(&mut rate.left_out),
        };
        // There is room: nobody else puts anything in.
        let _ = self.queue.push(event);
    }
}
