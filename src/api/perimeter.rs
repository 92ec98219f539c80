//! Groups, rules and what they do: connections, drops, and why.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use dreamwire_datapath::fdb::Location;
use dreamwire_datapath::mac::Mac;
use dreamwire_policy::ConnectionRow;
use dreamwire_policy::tcp::TcpState;
use serde::Deserialize;
use serde_json::{Value, json};

use super::ask;
use super::observed::{merge, settings};
use super::reply::Refusal;
use super::{CUT_HEADER, Shared};
use crate::config::notation::direction_word;
use crate::config::{Document, Group, Rule};
use crate::control::inventory::{Inventory, PortEntry};
use crate::control::news::Flow;
use crate::why::{self, Answer, Facts, Place, Question};

/// Connections in one answer. A port may have more: then a header says that these are not all.
const CONNECTIONS_MAX: usize = 65_536;

/// The ports of each group, by name.
pub(super) fn members(document: &Document) -> HashMap<&str, Vec<&str>> {
    let mut members = HashMap::<_, Vec<_>>::new();
    for port in &document.port {
        for group in &port.groups {
            members.entry(group.as_str()).or_default().push(port.name.as_str());
        }
    }
    members
}

/// A group, with the ports that are in it.
pub(super) fn group(group: &Group, members: &HashMap<&str, Vec<&str>>) -> Value {
    let mut shown = settings(group);
    merge(&mut shown, json!({"ports": members.get(group.name.as_str()).map_or(&[][..], Vec::as_slice)}));
    shown
}

/// A rule, with how often it has decided.
pub(super) fn rule(rule: &Rule, inventory: &Inventory) -> Value {
    let counted = inventory.rules.rule_ids.get(&rule.name).and_then(|id| inventory.rules.rules.get(id));
    let mut shown = settings(rule);
    merge(&mut shown, json!({"hits": counted.map(|entry| entry.counters.hits())}));
    shown
}

/// Connections of all ports.
pub(super) async fn connections(inventory: &Inventory) -> Result<Vec<Value>, Refusal> {
    let mut shown: Vec<Value> = Vec::new();
    for entry in &inventory.ports {
        let (rows, cut) = connections_of(inventory, entry).await?;
        if cut || shown.len() + rows.len() > CONNECTIONS_MAX {
            let message = format!("all ports together have more than {CONNECTIONS_MAX}: name a port");
            return Err(Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "connections", message));
        }
        shown.extend(rows);
    }
    Ok(shown)
}

/// Connections of a port, and whether there are more than these.
pub(super) async fn connections_of(inventory: &Inventory, entry: &PortEntry) -> Result<(Vec<Value>, bool), Refusal> {
    let (workers, worker, id) = (Arc::clone(&inventory.workers), usize::from(entry.worker.0), entry.id);
    let (rows, cut) = ask::off_thread(move || workers[worker].connections(id, CONNECTIONS_MAX)).await?;
    Ok((rows.iter().map(|row| connection(row, entry, inventory)).collect(), cut))
}

/// The header of an answer that does not have everything: how many there are in it.
pub(super) fn cut_header() -> HeaderMap {
    HeaderMap::from_iter([(HeaderName::from_static(CUT_HEADER), HeaderValue::from(CONNECTIONS_MAX))])
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
    let port = question.port.clone();
    let answer = ask::off_thread(move || answer(&question, &inventory)).await?;
    answer.map(Json).ok_or_else(|| Refusal::not_found("port", &port))
}

/// Asks the workers for what it takes to answer, and answers. Blocks.
fn answer(question: &Question, inventory: &Inventory) -> Option<Answer> {
    let document = &inventory.document;
    let mut connections = BTreeMap::new();
    for port in why::concerned(question, document) {
        if let Some(entry) = inventory.ports.iter().find(|entry| entry.port.name == port.name) {
            let worker = &inventory.workers[usize::from(entry.worker.0)];
            connections.insert(port.name.clone(), worker.connections_of(entry.id, &why::packets(question)));
        }
    }
    let learned = learned(question, inventory).into_iter().collect();
    why::why(question, &Facts { document, rules: &inventory.rules, learned, connections })
}

/// Where the station that is asked about was learned.
fn learned(question: &Question, inventory: &Inventory) -> Option<(String, Mac, Place)> {
    let mac = question.station?;
    let port = inventory.ports.iter().find(|entry| entry.port.name == question.port)?;
    let network = inventory.networks.iter().find(|entry| entry.network.name == port.port.network)?;
    // Workers tell each other: the one that saw it last counts.
    let rows = inventory.workers.iter().filter_map(|worker| worker.station(network.id, mac));
    let place = match rows.min_by_key(|row| row.idle_ns)?.location {
        Location::Vtep(vtep) => Place::Vtep(vtep),
        Location::Port(id) => Place::Port(inventory.ports.iter().find(|entry| entry.id == id)?.port.name.clone()),
    };
    Some((network.network.name.clone(), mac, place))
}
