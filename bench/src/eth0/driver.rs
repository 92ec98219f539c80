//! What the guest's kernel says about its interface: ethtool, sysfs, iproute2, its log.

use std::time::Duration;

use serde_json::Value;

use super::{Observations, Site};
use crate::topology::TopologyError;

/// ethtool's questions by name. None changes anything.
const QUESTIONS: &[(&str, &str)] = &[
    ("features", "-k eth0"),
    ("driver", "-i eth0"),
    ("rings", "-g eth0"),
    ("channels", "-l eth0"),
    ("coalescing", "-c eth0"),
    ("settings", "eth0"),
    ("time_stamping", "-T eth0"),
    ("pause", "-a eth0"),
    ("permanent_address", "-P eth0"),
    ("flow_hash", "-x eth0"),
    ("flow_rules", "-n eth0"),
    ("eee", "--show-eee eth0"),
    ("fec", "--show-fec eth0"),
    ("private_flags", "--show-priv-flags eth0"),
    ("registers", "-d eth0"),
    ("eeprom", "-e eth0 length 16"),
    ("module", "-m eth0"),
    ("tunnels", "--show-tunnels eth0"),
    ("self_test", "-t eth0"),
];

/// Attributes that count or that depend on the boot.
const DYNAMIC: &[&str] = &["ifindex", "iflink", "uevent", "mergeable_rx_buffer_size", "hold_time", "inflight", "limit"];

pub(super) fn observe(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    settle(site)?;
    for (name, words) in QUESTIONS {
        ethtool(site, &format!("driver.{name}"), words, rows)?;
    }
    let statistics = site.ask("ethtool -S eth0")?;
    for (key, _) in fields(&statistics) {
        rows.record_again(&format!("driver.statistics.{key}"), "a counter");
    }
    sysfs(site, rows)?;
    let link = site.ask("ip -d -j link show dev eth0")?;
    flatten("driver.link", &parse(&link)[0], rows);
    let groups = site.ask("ip -j maddress show dev eth0")?;
    flatten("driver.maddress", &parse(&groups)[0]["maddr"], rows);
    let addresses = parse(&site.ask("ip -j address show dev eth0")?);
    let addresses = addresses[0]["addr_info"].as_array().cloned().unwrap_or_default();
    for (index, address) in addresses.iter().enumerate() {
        for field in ["local", "prefixlen", "scope", "tentative", "dadfailed", "broadcast"] {
            rows.record(format!("driver.address.{index}.{field}"), &address[field]);
        }
    }
    rows.record("driver.log", log(site)?);
    Ok(())
}

/// Rows of one of ethtool's answers.
pub(super) fn ethtool(site: &Site, prefix: &str, words: &str, rows: &mut Observations) -> Result<(), TopologyError> {
    for (key, value) in fields(&site.ask(&format!("ethtool {words}"))?) {
        rows.record_again(&format!("{prefix}.{key}"), value);
    }
    Ok(())
}

/// What the kernel has logged about the interface and its driver since the last call, without times.
pub(super) fn log(site: &Site) -> Result<String, TopologyError> {
    let lines = site.ask(
        "dmesg -c | grep -E 'eth0|virtio_net|NETDEV|virtqueue' | grep -v 'ommand line' | sed 's/^\\[ *[0-9.]*\\] //'",
    )?;
    Ok(lines.lines().collect::<Vec<_>>().join(" / "))
}

/// The kernel's own link-local address is usable a second or two after the link came up.
fn settle(site: &Site) -> Result<(), TopologyError> {
    crate::topology::wait_until(Duration::from_secs(10), "duplicate address detection", || {
        site.ask("ip -6 address show dev eth0").is_ok_and(|text| text.contains("fe80") && !text.contains("tentative"))
    })
}

fn sysfs(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    // One process for all of them: starting one takes an emulated guest 20 ms.
    let text = site
        .ask("cd /sys/class/net/eth0 && grep -s '' * power/* queues/*/* queues/*/*/*; ls statistics | tr '\\n' ' '")?;
    for line in text.lines() {
        let Some((path, value)) = line.split_once(':') else {
            rows.record("driver.sysfs.statistics", line);
            continue;
        };
        let name = path.rsplit('/').next().unwrap_or(path);
        let counts = path.starts_with("power/") || path.starts_with("carrier_") && path != "carrier_down_count";
        let value = if DYNAMIC.contains(&name) || counts { "present" } else { value };
        rows.record_again(&format!("driver.sysfs.{}", path.replace('/', ".")), value);
    }
    Ok(())
}

/// `name: value` lines; a heading (a line that ends with a colon) goes in front of the names below it, unless it only
/// names the interface. Lines without a colon continue the value above, or stand for themselves.
fn fields(text: &str) -> Vec<(String, String)> {
    let mut heading = String::new();
    let mut found: Vec<(String, String)> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let line = line.trim();
        match line.split_once(':') {
            Some((name, "")) if name.contains("eth0") => {}
            Some((name, "")) => heading = format!("{}.", slug(name)),
            Some((name, value)) => found.push((format!("{heading}{}", slug(name)), value.trim().to_owned())),
            None => match found.last_mut() {
                Some((_, value)) => value.push_str(&format!(" {line}")),
                None => found.push((format!("{heading}line"), line.to_owned())),
            },
        }
    }
    found
}

fn slug(name: &str) -> String {
    name.trim().replace([' ', '/'], "_")
}

fn parse(json: &str) -> Value {
    serde_json::from_str(json).unwrap_or(Value::Null)
}

fn flatten(prefix: &str, value: &Value, rows: &mut Observations) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields.iter().filter(|(name, _)| !DYNAMIC.contains(&name.as_str())) {
                flatten(&format!("{prefix}.{name}"), value, rows);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                flatten(&format!("{prefix}.{index}"), item, rows);
            }
        }
        other => rows.record_again(prefix, other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ethtool_answers_become_fields() {
        let text = "Ring parameters for eth0:\nPre-set maximums:\nRX:\t\t256\nTX:\t\t256\nCurrent hardware settings:\nRX:\t\t64\n";
        let found = fields(text);
        let found: Vec<_> = found.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(
            found,
            [("Pre-set_maximums.RX", "256"), ("Pre-set_maximums.TX", "256"), ("Current_hardware_settings.RX", "64")]
        );
        assert_eq!(fields("no stats available\n"), [("line".to_owned(), "no stats available".to_owned())]);
    }
}
