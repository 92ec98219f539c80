//! OpenMetrics. Families are gathered from the inventory at each scrape; nothing is counted twice.
//!
//! Drops appear from the first frame on that was dropped for a reason: 1024 ports times 20 reasons, nearly all zero,
//! would be most of the text.

use std::fmt;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use dreamwire_datapath::counters::Drops;
use dreamwire_datapath::drop_reason::DropReason;
use dreamwire_datapath::worker::RingRow;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::Shared;
use super::observed::ring_direction;
use super::reply::Refusal;
use crate::control::inventory::Inventory;

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(super) async fn scrape(State(shared): State<Shared>) -> Result<([(HeaderName, &'static str); 1], String), Refusal> {
    let inventory = shared.control.inventory();
    let rings = shared.rings.get(&inventory.workers).await?;
    let mut registry = Registry::with_prefix("dreamwire");
    registry.register_collector(Box::new(Scrape { inventory, rings }));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).map_err(|error| {
        tracing::error!("metrics cannot be encoded: {error}");
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "", "metrics cannot be encoded; see the log")
    })?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text))
}

#[derive(Debug)]
struct Scrape {
    inventory: Arc<Inventory>,
    rings: Arc<Vec<RingRow>>,
}

type Labels = Vec<(&'static str, String)>;

/// Samples under one name.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    samples: Vec<(Labels, u64)>,
}

impl Family {
    fn counter(name: &'static str, help: &'static str) -> Self {
        Self { name, help, kind: MetricType::Counter, samples: Vec::new() }
    }

    fn gauge(name: &'static str, help: &'static str) -> Self {
        Self { name, help, kind: MetricType::Gauge, samples: Vec::new() }
    }

    fn add(&mut self, labels: &[(&'static str, &str)], value: u64) {
        let labels = labels.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
        self.samples.push((labels, value));
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let families = [self.ports(), self.networks(), self.underlays(), self.rules(), self.daemon(), self.workers()];
        for family in families.into_iter().flatten().filter(|family| !family.samples.is_empty()) {
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, family.kind)?;
            for (labels, value) in &family.samples {
                let mut sample = metric.encode_family(labels)?;
                match family.kind {
                    MetricType::Counter => sample.encode_counter::<NoLabelSet, u64, u64>(value, None)?,
                    _ => sample.encode_gauge(value)?,
                }
            }
        }
        Ok(())
    }
}

impl Scrape {
    fn ports(&self) -> Vec<Family> {
        let mut frames = Family::counter("port_frames", "Frames by port; rx came from the guest");
        let mut bytes = Family::counter("port_bytes", "Bytes of those frames, Ethernet header to payload");
        let mut connected = Family::gauge("port_connected", "Whether a front-end is connected");
        let mut connections = Family::counter("port_connections", "Front-ends that have connected so far");
        let mut ring_frames = Family::counter("ring_frames", "Frames by ring; even rings are the guest's receiveqs");
        let mut ring_bytes = Family::counter("ring_bytes", "Bytes of those frames");
        let mut calls = Family::counter("ring_calls", "Interrupts sent to the guest");
        let mut kicks = Family::counter("ring_kicks", "Times a guest's kick woke the worker");
        let mut quarantined = Family::gauge("ring_quarantined", "Whether an attached ring was found corrupt");
        let mut far = Family::gauge("ring_far", "Whether the guest is as far from its worker as memory, by receiveq");
        for entry in &self.inventory.ports {
            let (port, session, counters) = (entry.port.name.as_str(), entry.session.state(), entry.counters.sum());
            for (direction, sum) in [("rx", counters.rx()), ("tx", counters.tx())] {
                let labels = [("port", port), ("network", &entry.port.network), ("direction", direction)];
                frames.add(&labels, sum.0);
                bytes.add(&labels, sum.1);
            }
            connected.add(&[("port", port)], u64::from(session.connected));
            connections.add(&[("port", port)], session.connections);
            for (queue, ring) in counters.rings.iter().enumerate() {
                let number = queue.to_string();
                let labels = [("port", port), ("ring", number.as_str()), ("direction", ring_direction(queue))];
                ring_frames.add(&labels, ring.traffic.frames.get());
                ring_bytes.add(&labels, ring.traffic.bytes.get());
                calls.add(&labels, ring.calls.get());
                kicks.add(&labels, ring.kicks.get());
            }
            for row in self.rings.iter().filter(|row| row.port == entry.id) {
                let queue = row.queue.to_string();
                let labels = [("port", port), ("ring", queue.as_str())];
                quarantined.add(&labels, u64::from(row.quarantined.is_some()));
                if let Some(is_far) = row.far {
                    far.add(&labels, u64::from(is_far));
                }
            }
        }
        vec![frames, bytes, connected, connections, ring_frames, ring_bytes, calls, kicks, quarantined, far]
    }

    fn networks(&self) -> Vec<Family> {
        let mut frames = Family::counter("tunnel_frames", "Frames through a network's tunnels, one for each remote");
        let mut bytes = Family::counter("tunnel_bytes", "Bytes of those frames, without the tunnel's headers");
        let mut copies = Family::counter("network_flood_copies", "Additional frames made by flooding");
        let mut refused = Family::counter("network_learn_refused", "Addresses that could not be learned");
        for entry in &self.inventory.networks {
            let (network, counters) = (entry.network.name.as_str(), entry.counters.sum());
            for (direction, traffic) in [("rx", &*counters.tunnel_rx), ("tx", &counters.tunnel_tx)] {
                let labels = [("network", network), ("direction", direction)];
                frames.add(&labels, traffic.frames.get());
                bytes.add(&labels, traffic.bytes.get());
            }
            copies.add(&[("network", network)], counters.flood_copies.get());
            refused.add(&[("network", network)], counters.learn_refused.get());
        }
        vec![frames, bytes, copies, refused]
    }

    /// As drops: from the first hit on. A daemon has 65,536 rules at most.
    fn rules(&self) -> Vec<Family> {
        let mut hits = Family::counter("rule_hits", "Connections and denied frames that a rule has decided about");
        for rule in &self.inventory.document.rule {
            let entry = self.inventory.rules.rule_ids.get(&rule.name).and_then(|id| self.inventory.rules.rules.get(id));
            let count = entry.map_or(0, |entry| entry.counters.hits());
            if count > 0 {
                hits.add(&[("rule", &rule.name), ("group", &rule.group)], count);
            }
        }
        vec![hits]
    }

    fn underlays(&self) -> Vec<Family> {
        let mut unclaimed = Family::counter("underlay_unclaimed_packets", "Outer packets that reached no network");
        let mut calls = Family::counter("underlay_calls", "Send and receive calls to the kernel");
        for entry in &self.inventory.underlays {
            let (underlay, counters) = (entry.underlay.name.as_str(), &entry.counters);
            unclaimed.add(&[("underlay", underlay)], counters.rx_unclaimed.get());
            calls.add(&[("underlay", underlay), ("direction", "rx")], counters.rx_calls.get());
            calls.add(&[("underlay", underlay), ("direction", "tx")], counters.tx_calls.get());
        }
        vec![unclaimed, calls, self.drops()]
    }

    fn drops(&self) -> Family {
        let mut family = Family::counter("drops", "Frames that ended without reaching anybody, by reason");
        let mut add = |kind, name: &str, drops: &Drops| {
            for reason in DropReason::ALL.into_iter().filter(|reason| drops.get(*reason) > 0) {
                family.add(&[("kind", kind), ("name", name), ("reason", reason.name())], drops.get(reason));
            }
        };
        for entry in &self.inventory.ports {
            add("port", &entry.port.name, &entry.counters.sum().drops);
        }
        for entry in &self.inventory.networks {
            add("network", &entry.network.name, &entry.counters.sum().drops);
        }
        for entry in &self.inventory.underlays {
            add("underlay", &entry.underlay.name, &entry.counters.drops);
        }
        family
    }

    fn daemon(&self) -> Vec<Family> {
        let totals = self.inventory.totals();
        let mut frames = Family::counter(
            "frames",
            "All frames by fate, removed objects included: received + originated + copied = sent + dropped",
        );
        for (fate, count) in [
            ("received", totals.received),
            ("originated", totals.originated),
            ("copied", totals.copied),
            ("sent", totals.sent),
            ("dropped", totals.dropped),
        ] {
            frames.add(&[("fate", fate)], count);
        }
        let mut generation = Family::gauge("generation", "Generation of the desired state that is applied");
        generation.add(&[], self.inventory.generation);
        let mut build = Family::gauge("build", "Always 1; the label is the version");
        build.add(&[("version", env!("CARGO_PKG_VERSION"))], 1);
        vec![frames, generation, build]
    }

    fn workers(&self) -> Vec<Family> {
        let mut turns = Family::counter("worker_turns", "Turns of a worker's loop");
        let mut sleeps = Family::counter("worker_sleeps", "Times a worker went to sleep");
        let mut commands = Family::counter("worker_commands", "Commands taken from a worker's mailbox");
        let mut handoff = Family::counter("worker_handoff_frames", "Frames given to (tx) and taken from other workers");
        let mut removed = Family::counter("worker_handoff_removed", "Those whose network was removed on the way");
        let mut wakes = Family::counter("worker_handoff_wakes", "Times a worker had to wake another");
        let mut unlearned = Family::counter("worker_handoff_unlearned", "Learned addresses not told to another worker");
        for (index, worker) in self.inventory.workers.iter().enumerate() {
            let (name, counters) = (index.to_string(), worker.counters());
            let own = ("worker", name.as_str());
            turns.add(&[own, ("outcome", "busy")], counters.busy_turns.get());
            turns.add(&[own, ("outcome", "empty")], counters.empty_turns.get());
            sleeps.add(&[own], counters.sleeps.get());
            commands.add(&[own], counters.commands.get());
            handoff.add(&[own, ("direction", "tx")], counters.handoff_tx.get());
            handoff.add(&[own, ("direction", "rx")], counters.handoff_rx.get());
            removed.add(&[own], counters.handoff_removed.get());
            wakes.add(&[own], counters.handoff_wakes.get());
            unlearned.add(&[own], counters.handoff_unlearned.get());
        }
        vec![turns, sleeps, commands, handoff, removed, wakes, unlearned]
    }
}
