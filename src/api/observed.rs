//! Objects as they are: settings, session, rings, counters.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use dreamwire_datapath::counters::{Drops, PortCounters, Traffic};
use dreamwire_datapath::drop_reason::DropReason;
use dreamwire_datapath::fdb::{FdbRow, Location};
use dreamwire_datapath::worker::RingRow;
use serde_json::{Value, json};

use super::Shared;
use super::ask;
use super::perimeter;
use super::reply::Refusal;
use crate::config::document::polling_word;
use crate::control::inventory::{Inventory, NetworkEntry, PortEntry, UnderlayEntry};
use crate::control::session::Session;
use crate::features;

pub(super) async fn list(State(shared): State<Shared>, Path(kind): Path<String>) -> Result<Json<Value>, Refusal> {
    let inventory = shared.control.inventory();
    let rows: Vec<Value> = match kind.as_str() {
        "ports" => {
            let rings = shared.rings.get(&inventory.workers).await?;
            inventory.ports.iter().map(|entry| port(entry, &rings)).collect()
        }
        "networks" => inventory.networks.iter().map(network).collect(),
        "underlays" => inventory.underlays.iter().map(underlay).collect(),
        "groups" => {
            let members = perimeter::members(&inventory.document);
            inventory.document.group.iter().map(|shown| perimeter::group(shown, &members)).collect()
        }
        "rules" => inventory.document.rule.iter().map(|shown| perimeter::rule(shown, &inventory)).collect(),
        "connections" => perimeter::connections(&inventory).await?,
        "workers" => workers(&inventory).collect(),
        "fdb" => ask::fdb(&inventory.workers).await?.iter().map(|row| fdb_row(row, &inventory)).collect(),
        _ => {
            let message =
                "no such kind; there are ports, networks, underlays, groups, rules, connections, workers, fdb";
            return Err(Refusal::new(StatusCode::NOT_FOUND, &kind, message));
        }
    };
    Ok(Json(Value::Array(rows)))
}

pub(super) async fn one(
    State(shared): State<Shared>,
    Path((kind, name)): Path<(String, String)>,
) -> Result<(HeaderMap, Json<Value>), Refusal> {
    let inventory = shared.control.inventory();
    let mut headers = HeaderMap::new();
    let found = match kind.as_str() {
        "ports" => match inventory.ports.iter().find(|entry| entry.port.name == name) {
            Some(entry) => Some(port(entry, &shared.rings.get(&inventory.workers).await?)),
            None => None,
        },
        "networks" => inventory.networks.iter().find(|entry| entry.network.name == name).map(network),
        "underlays" => inventory.underlays.iter().find(|entry| entry.underlay.name == name).map(underlay),
        "groups" => {
            let found = inventory.document.group.iter().find(|group| group.name == name);
            found.map(|group| perimeter::group(group, &perimeter::members(&inventory.document)))
        }
        "rules" => {
            let found = inventory.document.rule.iter().find(|rule| rule.name == name);
            found.map(|rule| perimeter::rule(rule, &inventory))
        }
        "connections" => match inventory.ports.iter().find(|entry| entry.port.name == name) {
            Some(entry) => {
                let (shown, cut) = perimeter::connections_of(&inventory, entry).await?;
                if cut {
                    headers = perimeter::cut_header();
                }
                Some(Value::Array(shown))
            }
            None => return Err(Refusal::not_found("port", &name)),
        },
        "workers" => workers(&inventory).find(|worker| worker["name"] == name),
        _ => None,
    };
    found
        .map(|found| (headers, Json(found)))
        .ok_or_else(|| Refusal::not_found(kind.strip_suffix('s').unwrap_or(&kind), &name))
}

/// Everything that is counted, and whether it adds up.
pub(super) async fn stats(State(shared): State<Shared>) -> Result<Json<Value>, Refusal> {
    let inventory = shared.control.inventory();
    let rings = shared.rings.get(&inventory.workers).await?;
    let totals = inventory.totals();
    let difference = totals.difference();
    Ok(Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "generation": inventory.generation,
        "uptime_seconds": inventory.started.elapsed().unwrap_or_default().as_secs(),
        "ports": inventory.ports.iter().map(|entry| port(entry, &rings)).collect::<Vec<_>>(),
        "networks": inventory.networks.iter().map(network).collect::<Vec<_>>(),
        "underlays": inventory.underlays.iter().map(underlay).collect::<Vec<_>>(),
        "workers": workers(&inventory).collect::<Vec<_>>(),
        "retired": inventory.retired,
        "conservation": {
            "received": totals.received,
            "originated": totals.originated,
            "copied": totals.copied,
            "sent": totals.sent,
            "dropped": totals.dropped,
            "difference": difference,
            "balanced": difference == 0,
        },
    })))
}

fn port(entry: &PortEntry, rings: &[RingRow]) -> Value {
    let pair = |(frames, bytes): (u64, u64)| json!({"frames": frames, "bytes": bytes});
    let counters = entry.counters.sum();
    let mut shown = settings(&entry.port);
    merge(
        &mut shown,
        json!({
            "id": entry.id.0,
            "worker": entry.worker.0,
            "session": session(&entry.session),
            "rx": pair(counters.rx()),
            "tx": pair(counters.tx()),
            "originated": counters.originated.get(),
            "rings": ring_list(entry, &counters, rings),
            "drops": drops(&counters.drops),
        }),
    );
    shown
}

fn session(session: &Session) -> Value {
    let session = session.state();
    let features = session.features.map(|bits| json!({"bits": format!("{bits:#x}"), "names": features::names(bits)}));
    json!({
        "connected": session.connected,
        "since": session.since.map(unix_seconds),
        "connections": session.connections,
        "migrating": session.migrating,
        "features": features,
        "last_end": session.last_end,
        "warnings": session.warnings,
    })
}

fn ring_list(entry: &PortEntry, counters: &PortCounters, rings: &[RingRow]) -> Vec<Value> {
    let row = |queue: usize| rings.iter().find(|row| row.port == entry.id && usize::from(row.queue) == queue);
    let counters = counters.rings.iter().enumerate();
    let ring = counters.map(|(queue, counters)| {
        let row = row(queue);
        json!({
            "queue": queue,
            "direction": ring_direction(queue),
            "attached": row.is_some(),
            "size": row.map(|row| row.size),
            "enabled": row.map(|row| row.enabled),
            "quarantined": row.and_then(|row| row.quarantined.clone()),
            "kicked_but_empty": row.map(|row| row.kicked_but_empty),
            "far": row.and_then(|row| row.far),
            "frames": counters.traffic.frames.get(),
            "bytes": counters.traffic.bytes.get(),
            "calls": counters.calls.get(),
            "kicks": counters.kicks.get(),
        })
    });
    ring.collect()
}

/// VIRTIO 1.2 §5.1.2: even rings are the guest's receiveqs, which are our tx.
pub(super) fn ring_direction(queue: usize) -> &'static str {
    if queue.is_multiple_of(2) { "tx" } else { "rx" }
}

fn network(entry: &NetworkEntry) -> Value {
    let counters = entry.counters.sum();
    let mut shown = settings(&entry.network);
    merge(
        &mut shown,
        json!({
            "id": entry.id.0,
            "tunnel_rx": traffic(&counters.tunnel_rx),
            "tunnel_tx": traffic(&counters.tunnel_tx),
            "flood_copies": counters.flood_copies.get(),
            "learn_refused": counters.learn_refused.get(),
            "drops": drops(&counters.drops),
        }),
    );
    shown
}

fn underlay(entry: &UnderlayEntry) -> Value {
    let counters = &entry.counters;
    let mut shown = settings(&entry.underlay);
    merge(
        &mut shown,
        json!({
            "id": entry.id.0,
            "session": entry.session.as_deref().map(session),
            "rx_host": counters.rx_host.get(),
            "tx_host": counters.tx_host.get(),
            "rx_unclaimed": counters.rx_unclaimed.get(),
            "rx_calls": counters.rx_calls.get(),
            "tx_calls": counters.tx_calls.get(),
            "drops": drops(&counters.drops),
        }),
    );
    shown
}

fn workers(inventory: &Inventory) -> impl Iterator<Item = Value> {
    let daemon = &inventory.document.daemon;
    inventory.workers.iter().enumerate().map(|(index, worker)| {
        let counters = worker.counters();
        json!({
            "name": index.to_string(),
            "cpu": daemon.workers.get(index),
            "polling": polling_word(daemon.polling),
            "resume_latency_us": daemon.resume_latency_us,
            "generation": worker.adopted_generation(),
            "busy_turns": counters.busy_turns.get(),
            "empty_turns": counters.empty_turns.get(),
            "sleeps": counters.sleeps.get(),
            "commands": counters.commands.get(),
            "handoff": {
                "tx": counters.handoff_tx.get(),
                "rx": counters.handoff_rx.get(),
                "removed": counters.handoff_removed.get(),
                "wakes": counters.handoff_wakes.get(),
                "unlearned": counters.handoff_unlearned.get(),
            },
        })
    })
}

fn fdb_row(row: &FdbRow, inventory: &Inventory) -> Value {
    let network = inventory.networks.iter().find(|entry| entry.id == row.network);
    let (port, vtep) = match row.location {
        Location::Port(id) => (inventory.ports.iter().find(|entry| entry.id == id), None),
        Location::Vtep(address) => (None, Some(address)),
    };
    json!({
        "network": network.map(|entry| &entry.network.name),
        "mac": row.mac.to_string(),
        "port": port.map(|entry| &entry.port.name),
        "vtep": vtep,
        "idle_seconds": row.idle_ns / 1_000_000_000,
    })
}

pub(super) fn settings(object: &impl serde::Serialize) -> Value {
    serde_json::to_value(object).expect("settings have string keys and plain values only")
}

pub(super) fn merge(into: &mut Value, from: Value) {
    if let (Value::Object(into), Value::Object(from)) = (into, from) {
        into.extend(from);
    }
}

fn traffic(traffic: &Traffic) -> Value {
    json!({"frames": traffic.frames.get(), "bytes": traffic.bytes.get()})
}

/// The reasons that occurred.
fn drops(drops: &Drops) -> BTreeMap<&'static str, u64> {
    DropReason::ALL.into_iter().map(|reason| (reason.name(), drops.get(reason))).filter(|(_, n)| *n > 0).collect()
}

fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
