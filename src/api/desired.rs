//! Desired state over HTTP. A change to one object is a change of the document's JSON, so that everything is
//! validated and applied the same way.

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Shared;
use super::reply::Refusal;
use crate::config::{self, Accepted};
use crate::control::{Applied, ApplyError, Control};
use crate::qemu;

#[derive(Debug, Deserialize)]
pub(super) struct ChangeQuery {
    #[serde(default)]
    dry_run: bool,
}

type Changed = Result<Json<Applied>, Refusal>;

pub(super) async fn show(State(shared): State<Shared>) -> Json<Value> {
    Json(shared.control.inventory().document.to_json())
}

pub(super) async fn replace(
    State(shared): State<Shared>,
    Query(query): Query<ChangeQuery>,
    headers: HeaderMap,
    body: Bytes,
) -> Changed {
    let media = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let media = media.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if media == "application/toml" {
        let text = String::from_utf8(body.to_vec())
            .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, "", format!("not UTF-8: {error}")))?;
        return apply(&shared, query.dry_run, move |control| Ok(control.read_toml(&text)?)).await;
    }
    if media != "application/json" {
        let message = format!("content type {media:?}: send application/json or application/toml");
        return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "", message));
    }
    let value = json_body(&body)?;
    apply(&shared, query.dry_run, move |control| Ok(control.read_json(&value)?)).await
}

pub(super) async fn add(
    State(shared): State<Shared>,
    Path(kind): Path<String>,
    Query(query): Query<ChangeQuery>,
    body: Bytes,
) -> Changed {
    let kind = singular(&kind)?;
    let object = object_body(&body)?;
    edit(&shared, query.dry_run, move |document| {
        let name = object.get("name").and_then(Value::as_str).unwrap_or_default();
        if find(document, kind, name).is_some() {
            let message = format!("there is a {kind} {name:?} already; change it, or choose another name");
            return Err(Refusal::new(StatusCode::CONFLICT, &format!("{kind}.{name}"), message));
        }
        list(document, kind).push(Value::Object(object));
        Ok(())
    })
    .await
}

pub(super) async fn put(
    State(shared): State<Shared>,
    Path((kind, name)): Path<(String, String)>,
    Query(query): Query<ChangeQuery>,
    body: Bytes,
) -> Changed {
    let kind = singular(&kind)?;
    let mut object = object_body(&body)?;
    same_name(&mut object, kind, &name)?;
    edit(&shared, query.dry_run, move |document| {
        let object = Value::Object(object);
        match find(document, kind, &name) {
            Some(place) => list(document, kind)[place] = object,
            None => list(document, kind).push(object),
        }
        Ok(())
    })
    .await
}

pub(super) async fn patch(
    State(shared): State<Shared>,
    Path((kind, name)): Path<(String, String)>,
    Query(query): Query<ChangeQuery>,
    body: Bytes,
) -> Changed {
    let kind = singular(&kind)?;
    let mut object = object_body(&body)?;
    same_name(&mut object, kind, &name)?;
    edit(&shared, query.dry_run, move |document| {
        let place = find(document, kind, &name).ok_or_else(|| Refusal::not_found(kind, &name))?;
        // RFC 7396, one level deep: what objects have inside is replaced whole. `null` is read as absent.
        let patched = &mut list(document, kind)[place];
        for (key, value) in object {
            patched[key] = value;
        }
        Ok(())
    })
    .await
}

pub(super) async fn remove(
    State(shared): State<Shared>,
    Path((kind, name)): Path<(String, String)>,
    Query(query): Query<ChangeQuery>,
) -> Changed {
    let kind = singular(&kind)?;
    edit(&shared, query.dry_run, move |document| {
        let place = find(document, kind, &name).ok_or_else(|| Refusal::not_found(kind, &name))?;
        list(document, kind).remove(place);
        Ok(())
    })
    .await
}

pub(super) async fn add_remote(
    State(shared): State<Shared>,
    Path((name, address)): Path<(String, String)>,
    Query(query): Query<ChangeQuery>,
) -> Changed {
    edit(&shared, query.dry_run, move |document| {
        let remotes = remotes(document, &name)?;
        // PUT is idempotent: what is there already is no mistake.
        if !remotes.iter().any(|remote| remote.as_str() == Some(&address)) {
            remotes.push(Value::String(address));
        }
        Ok(())
    })
    .await
}

pub(super) async fn remove_remote(
    State(shared): State<Shared>,
    Path((name, address)): Path<(String, String)>,
    Query(query): Query<ChangeQuery>,
) -> Changed {
    edit(&shared, query.dry_run, move |document| {
        let remotes = remotes(document, &name)?;
        let place = remotes.iter().position(|remote| remote.as_str() == Some(&address));
        let place = place.ok_or_else(|| Refusal::not_found("remote", &address))?;
        remotes.remove(place);
        Ok(())
    })
    .await
}

#[derive(Debug, Deserialize)]
pub(super) struct QemuQuery {
    #[serde(default)]
    format: qemu::Format,
    #[serde(default)]
    qemu_version: qemu::Version,
}

pub(super) async fn qemu_args(
    State(shared): State<Shared>,
    Path(name): Path<String>,
    Query(query): Query<QemuQuery>,
) -> Result<String, Refusal> {
    let document = &shared.control.inventory().document;
    let port = document.find_port(&name).ok_or_else(|| Refusal::not_found("port", &name))?;
    let network = document.find_network(&port.network).expect("a validated document has every port's network");
    Ok(qemu::attach(port, network.mtu, query.format, query.qemu_version))
}

async fn apply(
    shared: &Shared,
    dry_run: bool,
    read: impl FnOnce(&Control) -> Result<Accepted, Refusal> + Send + 'static,
) -> Changed {
    let applied = shared.control.call(move |control| {
        let accepted = read(control)?;
        control.apply(accepted, dry_run).map_err(|error: ApplyError| Refusal::from(error))
    });
    Ok(Json(applied.await??))
}

/// Applies the current document after `change` was made to its JSON.
async fn edit(
    shared: &Shared,
    dry_run: bool,
    change: impl FnOnce(&mut Value) -> Result<(), Refusal> + Send + 'static,
) -> Changed {
    apply(shared, dry_run, move |control| {
        let mut document = control.document().to_json();
        change(&mut document)?;
        Ok(control.read_json(&document)?)
    })
    .await
}

fn json_body(body: &[u8]) -> Result<Value, Refusal> {
    serde_json::from_slice(body)
        .map_err(|error| Refusal::new(StatusCode::BAD_REQUEST, "", format!("not valid JSON: {error}")))
}

fn object_body(body: &[u8]) -> Result<Map<String, Value>, Refusal> {
    match json_body(body)? {
        Value::Object(object) => Ok(object),
        _ => Err(Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, "", "expected an object")),
    }
}

/// The name in the path is the object's; the body may repeat it, not contradict it.
fn same_name(object: &mut Map<String, Value>, kind: &str, name: &str) -> Result<(), Refusal> {
    let inside = object.insert("name".to_owned(), json!(name));
    if inside.is_some_and(|inside| inside != name) {
        let message = "the body names another object than the path; to rename, remove it and add it anew";
        return Err(Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, &format!("{kind}.{name}.name"), message));
    }
    Ok(())
}

fn singular(kind: &str) -> Result<&'static str, Refusal> {
    use config::Kind::{Group, Network, Port, Rule, Underlay};
    let known = [Port, Network, Underlay, Group, Rule].map(config::Kind::key);
    let found = known.into_iter().find(|known| kind.strip_suffix('s') == Some(known));
    let message = "no such kind; there are ports, networks, underlays, groups, rules";
    found.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, kind, message))
}

fn list<'a>(document: &'a mut Value, kind: &str) -> &'a mut Vec<Value> {
    document[kind].as_array_mut().expect("a document's JSON has a list of every kind")
}

fn find(document: &Value, kind: &str, name: &str) -> Option<usize> {
    document[kind].as_array()?.iter().position(|object| object["name"] == name)
}

fn remotes<'a>(document: &'a mut Value, network: &str) -> Result<&'a mut Vec<Value>, Refusal> {
    let place = find(document, "network", network).ok_or_else(|| Refusal::not_found("network", network))?;
    Ok(list(document, "network")[place]["remotes"].as_array_mut().expect("a network's JSON has its remotes"))
}
