//! What each command asks of the daemon.

use std::path::Path;
use std::process::ExitCode;

use hyper::Method;
use serde_json::{Map, Value, json};

use super::args::{
    Changes, Command, Named, NetworkCommand, NetworkKeys, PortCommand, PortKeys, RemoteCommand, ShowKind,
};
use super::client::{Body, Client, segment};
use super::{perimeter_show, rules, table};
use crate::run::{is_json, listing, load};

/// Does everything but `run` and `diff`.
pub(super) fn execute(client: &Client, command: Command) -> Result<(), String> {
    match command {
        Command::Run { .. } | Command::Diff { .. } => unreachable!("done by the caller"),
        Command::Apply { file } => {
            let applied = put_file(client, &file, false)?;
            report(&applied, Some(&file));
        }
        Command::Show { kind, name, json } => return show(client, kind, name.as_deref(), json),
        Command::Port(command) => port(client, command)?,
        Command::Network(command) => network(client, command)?,
        Command::Remote(command) => {
            let (method, network, address) = match command {
                RemoteCommand::Add { network, address } => (Method::PUT, network, address),
                RemoteCommand::Del { network, address } => (Method::DELETE, network, address),
            };
            let path = format!("/v1/networks/{}/remotes/{}", segment(&network), segment(&address.to_string()));
            change(client, method, &path, Body::Nothing)?;
        }
        Command::Group(command) => rules::group(client, command)?,
        Command::Rule(command) => rules::rule(client, command)?,
        Command::Why(arguments) => perimeter_show::why(client, arguments)?,
        Command::Drops { follow, json } => perimeter_show::drops(client, follow, json)?,
        Command::QemuArgs { port, libvirt, qemu_version } => {
            let format = if libvirt { "libvirt" } else { "qemu" };
            let port = segment(&port);
            let version = segment(&qemu_version);
            let path = format!("/v1/ports/{port}/qemu-args?format={format}&qemu_version={version}");
            print(&client.api_text(&path)?);
        }
        Command::Stats { json } => {
            let stats = client.stats()?;
            print(&if json { pretty(&stats) } else { table::stats(&stats) });
        }
    }
    Ok(())
}

/// Prints the differences; 0 without any, 1 with some.
pub(super) fn diff(client: &Client, file: &Path) -> Result<ExitCode, String> {
    let applied = put_file(client, file, true)?;
    warn(&applied, Some(file));
    let changes = applied["changes"].as_array().cloned().unwrap_or_default();
    for change in &changes {
        print(&format!("{}\n", table::change(change)));
    }
    Ok(if changes.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn put_file(client: &Client, file: &Path, dry_run: bool) -> Result<Value, String> {
    let text = load(file).map_err(|mistake| listing(file, &[mistake]))?;
    let body = Body::Text { text, json: is_json(file) };
    client.api(Method::PUT, &format!("/v1/state?dry_run={dry_run}"), body, Some(file))
}

fn show(client: &Client, kind: Option<ShowKind>, name: Option<&str>, json: bool) -> Result<(), String> {
    let get = |path: &str| client.api(Method::GET, path, Body::Nothing, None);
    let Some(kind) = kind else {
        let all = ["ports", "networks", "underlays"].map(|kind| Ok((kind, get(&format!("/v1/{kind}"))?)));
        let all = all.into_iter().collect::<Result<Vec<_>, String>>()?;
        if json {
            print(&pretty(&Value::Object(all.into_iter().map(|(kind, rows)| (kind.to_owned(), rows)).collect())));
            return Ok(());
        }
        for (kind, rows) in &all {
            print(&format!("{kind}\n{}\n", table::objects(kind, rows)));
        }
        return Ok(());
    };
    let path = match kind {
        ShowKind::Port => "ports",
        ShowKind::Network => "networks",
        ShowKind::Underlay => "underlays",
        ShowKind::Group => "groups",
        ShowKind::Rule => "rules",
        ShowKind::Connection => "connections",
        ShowKind::Worker => "workers",
        ShowKind::Fdb => "fdb",
        ShowKind::State => {
            print(&pretty(&get("/v1/state")?));
            return Ok(());
        }
    };
    let shown = match name {
        Some(name) => get(&format!("/v1/{path}/{}", segment(name)))?,
        None => get(&format!("/v1/{path}"))?,
    };
    print(&match (json, name) {
        (true, _) => pretty(&shown),
        (false, Some(_)) if shown.is_object() => table::detail(&shown),
        (false, _) => table::objects(path, &shown),
    });
    Ok(())
}

fn port(client: &Client, command: PortCommand) -> Result<(), String> {
    match command {
        PortCommand::Add { name, keys } => {
            let PortKeys { network, mac, addresses, groups, queues, worker, socket, mode } = keys;
            let object = json!({
                "name": name, "network": network, "mac": mac, "addresses": addresses, "groups": groups,
                "queues": queues, "worker": worker, "socket": socket, "mode": mode,
            });
            change(client, Method::POST, "/v1/ports", Body::Json(object))
        }
        PortCommand::Del(object) => remove(client, "ports", &object),
        PortCommand::Set(changes) => set(client, "ports", &changes),
    }
}

fn network(client: &Client, command: NetworkCommand) -> Result<(), String> {
    match command {
        NetworkCommand::Add { name, keys } => {
            let NetworkKeys { vni, underlay, mtu, policy, remotes } = keys;
            let object = json!({
                "name": name, "vni": vni, "underlay": underlay, "mtu": mtu, "policy": policy, "remotes": remotes,
            });
            change(client, Method::POST, "/v1/networks", Body::Json(object))
        }
        NetworkCommand::Del(object) => remove(client, "networks", &object),
        NetworkCommand::Set(changes) => set(client, "networks", &changes),
    }
}

/// Removes an object of that kind.
pub(super) fn remove(client: &Client, kind: &str, object: &Named) -> Result<(), String> {
    change(client, Method::DELETE, &format!("/v1/{kind}/{}", segment(&object.name)), Body::Nothing)
}

/// Changes keys of an object of that kind.
pub(super) fn set(client: &Client, kind: &str, changes: &Changes) -> Result<(), String> {
    let body = Body::Json(keys(&changes.changes)?);
    change(client, Method::PATCH, &format!("/v1/{kind}/{}", segment(&changes.name)), body)
}

/// Keys that are lists, separated by commas.
const LISTS: [&str; 5] = ["remotes", "trusted_remotes", "addresses", "groups", "prefixes"];
const NUMBERS: [&str; 8] = ["vni", "mtu", "queues", "worker", "age_seconds", "connections", "id", "priority"];
/// A group may be called "true".
const BOOLEANS: [&str; 5] = ["learning", "group_policy", "log", "config_space", "unknown_unicast"];

/// `key=value` as JSON: numbers, booleans and tables as such, lists split, nothing as `null`, which removes the key.
fn keys(changes: &[String]) -> Result<Value, String> {
    let mut object = Map::new();
    for change in changes {
        let (key, value) = change.split_once('=').ok_or_else(|| format!("{change:?}: expected KEY=VALUE"))?;
        let value = match (key, value) {
            (_, "") => Value::Null,
            (key, list) if LISTS.contains(&key) => list.split(',').map(str::trim).collect(),
            (key, text) if NUMBERS.contains(&key) => text.parse().map_or(json!(text), |n: i64| json!(n)),
            (key, text @ ("true" | "false")) if BOOLEANS.contains(&key) => json!(text == "true"),
            (key, table) if table.starts_with('{') => {
                let wrong = |error| format!("{key}: {error}: expected a table as in {{ pps = 1000 }}");
                let mut document: Map<_, _> = toml::from_str(&format!("value = {table}")).map_err(wrong)?;
                document.remove("value").unwrap_or_default()
            }
            (_, text) => json!(text),
        };
        object.insert(key.to_owned(), value);
    }
    Ok(Value::Object(object))
}

pub(super) fn change(client: &Client, method: Method, path: &str, body: Body) -> Result<(), String> {
    let applied = client.api(method, path, body, None)?;
    report(&applied, None);
    Ok(())
}

fn report(applied: &Value, file: Option<&Path>) {
    warn(applied, file);
    for change in applied["changes"].as_array().into_iter().flatten() {
        print(&format!("{}\n", table::change(change)));
    }
    let nothing = applied["changes"].as_array().is_none_or(Vec::is_empty);
    let what = if nothing { "nothing to change; generation" } else { "applied; generation" };
    print(&format!("{what} {}\n", applied["generation"]));
}

fn warn(applied: &Value, file: Option<&Path>) {
    for warning in applied["warnings"].as_array().into_iter().flatten() {
        let line = warning["line"].as_u64().map(|line| format!("{line}:")).unwrap_or_default();
        let place = file.map(|file| format!("{}:{line} ", file.display())).unwrap_or_default();
        let text = |key: &str| warning[key].as_str().unwrap_or_default().to_owned();
        eprintln!("{place}warning: {}: {}", text("path"), text("message"));
    }
}

pub(super) fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// As `print!`, but a reader that hangs up (`| head`) is no reason to panic.
pub(super) fn print(text: &str) {
    use std::io::Write;
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}
