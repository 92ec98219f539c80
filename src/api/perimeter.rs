//! Groups, rules and what they do: connections, drops, and why.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use dreamwire_datapath::fdb::Location;
use dreamwire_datapath::mac::Mac;
use dreamwire_policy::ConnectionRow;
use dreamwire_policy::tcp::TcpState;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Shared;
use super::observed::{merge, settings};
use super::reply::Refusal;
use super::rings;
use crate::config::notation::direction_word;
use crate::config::{Group, Rule};
use crate::control::inventory::{Inventory, PortEntry};
use crate::control::news::Flow;
use crate::why::{self, Answer, Facts, Place, Question};

/// Connections in one answer; those of one port are never more than its table.
const CONNECTIONS_MAX: usize = 65_536;

/// A group, with the ports that are in it.
pub(super) fn group(group: &Group, inventory: &Inventory) -> Value {
    let ports = inventory.document.port.iter().filter(|port| port.groups.contains(&group.name));
    let mut shown = settings(group);
    merge(&mut shown, json!({"ports": ports.map(|port| &port.name).collect::<Vec<_>>()}));
    shown
}

/// A rule, with how often it has decided.
pub(super) fn rule(rule: &Rule, inventory: &Inventory) -> Value {
    let counted = inventory.rules.rule_ids.get(&rule.name).and_then(|id| inventory.rules.rules.get(id));
    let mut shown = settings(rule);
    merge(&mut shown, json!({"hits": counted.map(|entry| entry.counters.hits())}));
    shown
}

/// Connections of some ports.
pub(super) async fn connections<'a>(
    inventory: &Inventory,
    ports: impl Iterator<Item = &'a PortEntry>,
) -> Result<Vec<Value>, Refusal> {
    let mut shown: Vec<Value> = Vec::new();
    for (count, entry) in ports.enumerate() {
        let rows = rows(inventory, entry).await?;
        if count > 0 && shown.len() + rows.len() > CONNECTIONS_MAX {
            let message = format!("all ports together have more than {CONNECTIONS_MAX}: name a port");
            return Err(Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "connections", message));
        }
        shown.extend(rows.iter().map(|row| connection(row, entry, inventory)));
    }
    Ok(shown)
}

async fn rows(inventory: &Inventory, entry: &PortEntry) -> Result<Vec<ConnectionRow>, Refusal> {
    let (workers, worker, id) = (Arc::clone(&inventory.workers), usize::from(entry.worker.0), entry.id);
    rings::off_thread(move || workers[worker].connections(id, CONNECTIONS_MAX)).await
}

fn connection(row: &ConnectionRow, entry: &PortEntry, inventory: &Inventory) -> Value {
    let rule = row.rule.and_then(|rule| inventory.rules.rules.get(&rule));
    let mut shown = json!({
        "port": entry.port.name,
        "begun": direction_word(row.initiator),
        "state": row.tcp.map(tcp_state),
        "answered": row.replied,
        "assured": row.assured,
        "rule": rule.map(|entry| &entry.name),
        "identity": row.identity,
        "expires_in_seconds": row.expires_in_ns / 1_000_000_000,
    });
    merge(&mut shown, settings(&Flow::of(&row.key)));
    shown
}

/// As nf_conntrack calls them.
fn tcp_state(state: TcpState) -> &'static str {
    match state {
        TcpState::None => "none",
        TcpState::SynSent => "syn_sent",
        TcpState::SynRecv => "syn_recv",
        TcpState::Established => "established",
        TcpState::FinWait => "fin_wait",
        TcpState::CloseWait => "close_wait",
        TcpState::LastAck => "last_ack",
        TcpState::TimeWait => "time_wait",
        TcpState::Close => "close",
        TcpState::SynSent2 => "syn_sent2",
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct DropsQuery {
    #[serde(default)]
    since: u64,
}

/// Samples of dropped frames, from a sequence number on.
pub(super) async fn drops(State(shared): State<Shared>, Query(query): Query<DropsQuery>) -> Json<Value> {
    let (drops, next) = shared.control.inventory().news.since(query.since);
    Json(json!({"drops": drops, "next": next}))
}

#[derive(Debug, Deserialize)]
pub(super) struct WhyQuery {
    port: String,
    protocol: String,
    source: String,
    destination: String,
    icmp: Option<String>,
    mac: Option<String>,
    identity: Option<u16>,
}

/// What would become of a flow.
pub(super) async fn why(State(shared): State<Shared>, Query(query): Query<WhyQuery>) -> Result<Json<Answer>, Refusal> {
    let wrong = |message: String| Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "why", message);
    let key = why::key(&query.protocol, &query.source, &query.destination, query.icmp.as_deref()).map_err(wrong)?;
    let station = query.mac.as_deref().map(str::parse::<Mac>).transpose().map_err(|error| wrong(error.to_string()))?;
    let question = Question { port: query.port, key, station, identity: query.identity };

    let inventory = shared.control.inventory();
    let mut facts = Facts {
        document: &inventory.document,
        rules: &inventory.rules,
        learned: learned(&inventory).await?,
        connections: BTreeMap::new(),
    };
    for port in why::concerned(&question, &inventory.document) {
        if let Some(entry) = inventory.ports.iter().find(|entry| entry.port.name == port.name) {
            facts.connections.insert(port.name.clone(), rows(&inventory, entry).await?);
        }
    }
    why::why(&question, &facts).map(Json).ok_or_else(|| Refusal::not_found("port", &question.port))
}

async fn learned(inventory: &Inventory) -> Result<Vec<(String, Mac, Place)>, Refusal> {
    let rows = rings::fdb(&inventory.workers).await?;
    let station = rows.iter().filter_map(|row| {
        let network = inventory.networks.iter().find(|entry| entry.id == row.network)?;
        let place = match row.location {
            Location::Vtep(vtep) => Place::Vtep(vtep),
            Location::Port(id) => Place::Port(inventory.ports.iter().find(|entry| entry.id == id)?.port.name.clone()),
        };
        Some((network.network.name.clone(), row.mac, place))
    });
    Ok(station.collect())
}
