//! What the perimeter does, for people: why, and drops.

use std::io::{self, Write as _};
use std::time::Duration;

use clap::Args;
use hyper::Method;
use serde_json::Value;

use super::client::{Body, Client, segment};
use super::command::{pretty, print};
use super::table::{align, cell_text};

/// How often new drops are asked for. The daemon collects them five times a second.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(250);

#[derive(Debug, Args)]
pub(super) struct WhyArguments {
    /// The port whose guest sends or receives it
    port: String,
    /// tcp, udp, icmp, icmpv6, sctp, or a number
    protocol: String,
    /// As 10.0.0.1:40000 or [fd00::1]:40000; ICMP without a port
    source: String,
    /// As 10.0.0.2:443
    destination: String,
    /// Type of an ICMP message, with a code: 3/4 [default: echo-request]
    #[arg(long, value_name = "TYPE")]
    icmp: Option<String>,
    /// The station that it is sent to, where the destination is no port's address
    #[arg(long)]
    mac: Option<String>,
    /// The group in the tunnel header that it comes with, from another host
    #[arg(long, value_name = "ID")]
    identity: Option<u16>,
    /// As JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn why(client: &Client, arguments: WhyArguments) -> Result<(), String> {
    let WhyArguments { port, protocol, source, destination, icmp, mac, identity, json } = arguments;
    let named = [("port", port), ("protocol", protocol), ("source", source), ("destination", destination)];
    let optional = [("icmp", icmp), ("mac", mac), ("identity", identity.map(|id| id.to_string()))];
    let optional = optional.into_iter().filter_map(|(key, value)| Some((key, value?)));
    let query = named.into_iter().chain(optional).map(|(key, value)| format!("{key}={}", segment(&value)));
    let path = format!("/v1/why?{}", query.collect::<Vec<_>>().join("&"));
    let answer = client.api(Method::GET, &path, Body::Nothing, None)?;
    print(&if json { pretty(&answer) } else { story(&answer) });
    Ok(())
}

fn story(answer: &Value) -> String {
    let mut text = path(&answer["path"]);
    text += &format!("answers: {}\n\nthe other way\n", cell_text(&answer["replies"]));
    text + &path(&answer["reverse"])
}

fn path(path: &Value) -> String {
    let cell = |value: &Value, key: &str| cell_text(&value[key]);
    let icmp = path["icmp"].as_str().map(|icmp| format!(" type {icmp}")).unwrap_or_default();
    let mut text =
        format!("{}{icmp} {} → {}\n", cell(path, "protocol"), cell(path, "source"), cell(path, "destination"));
    let mut rows = Vec::new();
    for step in path["steps"].as_array().into_iter().flatten() {
        let port = step["port"].as_str().unwrap_or_default().to_owned();
        let place = format!("  {}", cell(step, "at").replace('_', " "));
        rows.push(vec![place, port, cell(step, "verdict"), cell(step, "why")]);
        for rule in step["shadowed"].as_array().into_iter().flatten() {
            let [action, name, group, priority] = ["action", "rule", "group", "priority"].map(|key| cell(rule, key));
            let also = format!("(before {name} of group {group}: {action}, priority {priority})");
            rows.push(vec![String::new(), String::new(), String::new(), also]);
        }
    }
    text += &align(rows);
    text + &format!("{}: {}\n", cell(path, "verdict"), cell(path, "why"))
}

/// Prints what was dropped lately, and goes on if told to follow.
pub(super) fn drops(client: &Client, follow: bool, json: bool) -> Result<(), String> {
    let mut since = 0;
    loop {
        let answer = client.api(Method::GET, &format!("/v1/drops?since={since}"), Body::Nothing, None)?;
        for sample in answer["drops"].as_array().into_iter().flatten() {
            let line = if json { sample.to_string() } else { dropped(sample) };
            match writeln!(io::stdout(), "{line}") {
                Ok(()) => {}
                // Whoever read has gone, as `head` does: there is nobody to go on for.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(format!("cannot write to standard output: {error}")),
            }
        }
        if !follow {
            return Ok(());
        }
        // A daemon that was started again counts from zero.
        since = answer["next"].as_u64().unwrap_or(0);
        std::thread::sleep(FOLLOW_INTERVAL);
    }
}

fn dropped(sample: &Value) -> String {
    let text = |key: &str| sample[key].as_str();
    let at = text("port").map_or_else(|| format!("network {}", text("network").unwrap_or("?")), str::to_owned);
    let what = match (text("protocol"), text("source"), text("destination")) {
        (Some(protocol), Some(source), Some(destination)) => {
            let icmp = text("icmp").map(|icmp| format!(" type {icmp}")).unwrap_or_default();
            format!("{protocol}{icmp} {source} → {destination}")
        }
        _ => {
            let ethertype = sample["ethertype"].as_u64().unwrap_or_default();
            let [source, destination] = ["source_mac", "destination_mac"].map(|key| text(key).unwrap_or_default());
            format!("{ethertype:#06x} {source} → {destination}")
        }
    };
    let rule = text("rule").map(|rule| format!(" by rule {rule}")).unwrap_or_default();
    let more = match sample["left_out"].as_u64() {
        None | Some(0) => String::new(),
        Some(more) => format!(" (and {more} not shown)"),
    };
    let [reason, direction] = ["reason", "direction"].map(|key| text(key).unwrap_or_default());
    let time_ms = sample["time_ms"].as_u64().unwrap_or_default();
    let (hours, minutes, seconds) = (time_ms / 3_600_000 % 24, time_ms / 60_000 % 60, time_ms / 1000 % 60);
    let time = format!("{hours:02}:{minutes:02}:{seconds:02}.{:03}Z", time_ms % 1000);
    format!("{time} {at} {direction} {reason}{rule}: {what}, {} bytes{more}", sample["bytes"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drop_is_one_line() {
        let sample = serde_json::json!({
            "sequence": 1, "time_ms": 3_723_004, "network": "blue", "port": "vm1", "direction": "egress",
            "reason": "egress_denied", "rule": "no-mail", "protocol": "tcp", "source": "10.0.0.1:4000",
            "destination": "10.0.0.2:25", "source_mac": "a", "destination_mac": "b", "ethertype": 0x800, "bytes": 60,
            "left_out": 3,
        });
        assert_eq!(
            dropped(&sample),
            "01:02:03.004Z vm1 egress egress_denied by rule no-mail: tcp 10.0.0.1:4000 → 10.0.0.2:25, 60 bytes (and 3 not shown)"
        );
        let other = serde_json::json!({
            "time_ms": 0, "network": "blue", "port": null, "direction": "ingress", "reason": "split_horizon", "rule": null,
            "source_mac": "a", "destination_mac": "b", "ethertype": 0x88b5, "bytes": 60, "left_out": 0,
        });
        assert_eq!(dropped(&other), "00:00:00.000Z network blue ingress split_horizon: 0x88b5 a → b, 60 bytes");
    }
}
