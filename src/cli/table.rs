//! Objects as aligned columns, for people.

use serde_json::Value;

/// A list of objects of one kind.
pub(super) fn objects(kind: &str, rows: &Value) -> String {
    let columns: &[(&str, &str)] = match kind {
        "ports" => &[
            ("NAME", "/name"),
            ("NETWORK", "/network"),
            ("MAC", "/mac"),
            ("QUEUES", "/queues"),
            ("WORKER", "/worker"),
            ("MODE", "/mode"),
            ("CONNECTED", "/session/connected"),
            ("RX", "/rx/frames"),
            ("TX", "/tx/frames"),
            ("DROPS", "/drops"),
            ("SOCKET", "/socket"),
        ],
        "networks" => &[
            ("NAME", "/name"),
            ("VNI", "/vni"),
            ("UNDERLAY", "/underlay"),
            ("MTU", "/mtu"),
            ("TUNNEL RX", "/tunnel_rx/frames"),
            ("TUNNEL TX", "/tunnel_tx/frames"),
            ("DROPS", "/drops"),
            ("REMOTES", "/remotes"),
        ],
        "underlays" => &[
            ("NAME", "/name"),
            ("DRIVER", "/driver"),
            ("ADDRESS", "/address"),
            ("PORT", "/port"),
            ("MTU", "/mtu"),
            ("DEVICE", "/device"),
            ("WORKER", "/worker"),
            ("UNCLAIMED", "/rx_unclaimed"),
            ("DROPS", "/drops"),
        ],
        "groups" => &[("NAME", "/name"), ("ID", "/id"), ("PREFIXES", "/prefixes"), ("PORTS", "/ports")],
        "rules" => &[
            ("NAME", "/name"),
            ("GROUP", "/group"),
            ("DIRECTION", "/direction"),
            ("ALLOW", "/allow"),
            ("DENY", "/deny"),
            ("PORTS", "/ports"),
            ("ICMP", "/icmp"),
            ("FROM", "/from"),
            ("TO", "/to"),
            ("PRIORITY", "/priority"),
            ("LOG", "/log"),
            ("HITS", "/hits"),
        ],
        "connections" => &[
            ("PORT", "/port"),
            ("BEGUN", "/begun"),
            ("PROTOCOL", "/protocol"),
            ("SOURCE", "/source"),
            ("DESTINATION", "/destination"),
            ("STATE", "/state"),
            ("ANSWERED", "/answered"),
            ("RULE", "/rule"),
            ("EXPIRES IN SECONDS", "/expires_in_seconds"),
        ],
        "workers" => &[
            ("WORKER", "/name"),
            ("CPU", "/cpu"),
            ("POLLING", "/polling"),
            ("GENERATION", "/generation"),
            ("BUSY TURNS", "/busy_turns"),
            ("EMPTY TURNS", "/empty_turns"),
            ("SLEEPS", "/sleeps"),
            ("HANDED OVER", "/handoff/tx"),
            ("TAKEN OVER", "/handoff/rx"),
        ],
        _ => &[
            ("NETWORK", "/network"),
            ("MAC", "/mac"),
            ("PORT", "/port"),
            ("VTEP", "/vtep"),
            ("IDLE SECONDS", "/idle_seconds"),
        ],
    };
    let header = columns.iter().map(|(title, _)| (*title).to_owned()).collect();
    let body = rows.as_array().into_iter().flatten().map(|row| {
        let cell = |(_, pointer): &(&str, &str)| row.pointer(pointer).map_or("-".to_owned(), cell_text);
        columns.iter().map(cell).collect()
    });
    align(std::iter::once(header).chain(body).collect())
}

/// One object, everything known of it.
pub(super) fn detail(object: &Value) -> String {
    let mut text = String::new();
    for (key, value) in object.as_object().into_iter().flatten() {
        match value {
            Value::Array(rows) if rows.first().is_some_and(Value::is_object) => {
                text += &format!("{key}:\n");
                for row in rows {
                    text += &format!("  {}\n", pairs(row));
                }
            }
            Value::Object(_) => text += &format!("{key}: {}\n", pairs(value)),
            other => text += &format!("{key}: {}\n", cell_text(other)),
        }
    }
    text
}

/// What was counted, in short.
pub(super) fn stats(stats: &Value) -> String {
    let mut text = String::new();
    for kind in ["ports", "networks", "underlays", "workers"] {
        text += &format!("{kind}\n{}\n", objects(kind, &stats[kind]));
    }
    let drops = ["ports", "networks", "underlays"].into_iter().flat_map(|kind| {
        stats[kind].as_array().into_iter().flatten().flat_map(move |object| {
            object["drops"].as_object().into_iter().flatten().map(move |(reason, count)| {
                let kind = kind.trim_end_matches('s').to_owned();
                vec![kind, cell_text(&object["name"]), reason.clone(), count.to_string()]
            })
        })
    });
    let drops: Vec<Vec<String>> = drops.collect();
    if !drops.is_empty() {
        let header = ["DROPPED AT", "NAME", "REASON", "FRAMES"].map(str::to_owned).to_vec();
        text += &align(std::iter::once(header).chain(drops).collect());
        text.push('\n');
    }
    let sum = &stats["conservation"];
    text += &format!(
        "received {} + originated {} + copied {} = sent {} + dropped {} (difference {})\n",
        sum["received"], sum["originated"], sum["copied"], sum["sent"], sum["dropped"], sum["difference"]
    );
    text
}

/// A difference as `+ port vm1`, `- port vm1`, `~ port vm1 mac: old → new`.
pub(super) fn change(change: &Value) -> String {
    let text = |key: &str| cell_text(&change[key]);
    match change["change"].as_str() {
        Some("added") => format!("+ {} {}", text("kind"), text("name")),
        Some("removed") => format!("- {} {}", text("kind"), text("name")),
        _ => format!("~ {} {} {}: {} → {}", text("kind"), text("name"), text("key"), text("old"), text("new")),
    }
}

fn pairs(object: &Value) -> String {
    let shown = object.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let pairs: Vec<_> = shown
        .map(|(key, value)| match value {
            Value::Object(_) => format!("{key} ({})", pairs(value)),
            other => format!("{key} {}", cell_text(other)),
        })
        .collect();
    if pairs.is_empty() { "none".to_owned() } else { pairs.join(", ") }
}

/// A value in one cell. Of a table of counters, the sum.
pub(super) fn cell_text(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.is_empty() => "none".to_owned(),
        Value::Array(items) => items.iter().map(cell_text).collect::<Vec<_>>().join(","),
        Value::Object(counters) => counters.values().filter_map(Value::as_u64).sum::<u64>().to_string(),
        other => other.to_string(),
    }
}

pub(super) fn align(rows: Vec<Vec<String>>) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = serde_json::json!([
            {"network": "default", "mac": "52:54:00:00:00:01", "port": "vm1", "vtep": null, "idle_seconds": 0},
            {"network": "b", "mac": "52:54:00:00:00:02", "port": null, "vtep": "192.0.2.2", "idle_seconds": 12},
        ]);
        assert_eq!(
            objects("fdb", &rows),
            "NETWORK  MAC                PORT  VTEP       IDLE SECONDS\n\
             default  52:54:00:00:00:01  vm1   none       0\n\
             b        52:54:00:00:00:02  none  192.0.2.2  12\n"
        );
    }
}
