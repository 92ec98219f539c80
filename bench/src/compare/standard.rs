//! The standard set: what scripts/bench runs, and docs and releases quote.

use super::lane::Lane;
use crate::traffic::frame::SEGMENTED_BYTES;

/// One comparison of the set.
#[derive(Clone, Debug)]
pub struct Standard {
    /// For file names and `--only`.
    pub name: String,
    /// For tables and plots.
    pub title: String,
    /// The baseline first.
    pub lanes: Vec<Lane>,
}

/// All of it.
///
/// # Panics
/// Never: the lanes are this file's own.
#[must_use]
pub fn standard() -> Vec<Standard> {
    let mut set = Vec::new();
    let mut add = |name: &str, title: &str, lanes: &[&str]| {
        let parse = |text: &&str| text.parse().expect("a lane of ours");
        set.push(Standard { name: name.into(), title: title.into(), lanes: lanes.iter().map(parse).collect() });
    };
    for size in [64, 256, 512, 1518] {
        let lanes = ["io", "dreamwire", "ovs", "kernel"].map(|device| format!("{device},size={size},label={device}"));
        add(&format!("l2-{size}"), &format!("VM to VM, {size} B"), &lanes.each_ref().map(String::as_str));
    }
    let tso = ["ovs", "dreamwire", "kernel"]
        .map(|device| format!("{device},size={SEGMENTED_BYTES},ring=1024,label={device}"));
    add("tso", "VM to VM, 64 KB TSO", &tso.each_ref().map(String::as_str));
    for way in ["encap", "decap"] {
        for size in [64, 1518] {
            let io = format!("io,size={size},label=io (L2)");
            let others =
                ["dreamwire", "ovs", "kernel"].map(|device| format!("{device},size={size},{way},label={device}"));
            let [first, second, third] = others.each_ref().map(String::as_str);
            add(&format!("vxlan-{way}-{size}"), &format!("VXLAN {way}, {size} B"), &[&io, first, second, third]);
        }
    }
    let labelled = |device: &str, option: &str| format!("{device},{option},label={device} {option}");
    for device in ["dreamwire", "ovs"] {
        let lanes = [1, 1000, 100_000, 1_000_000].map(|flows| labelled(device, &format!("flows={flows}")));
        add(&format!("flows-{device}"), &format!("64 B by flows, {device}"), &lanes.each_ref().map(String::as_str));
    }
    let ports = [2, 8, 32, 128, 512].map(|ports| labelled("dreamwire", &format!("ports={ports}")));
    add("ports", "64 B by ports attached, two busy", &ports.each_ref().map(String::as_str));
    let rules = [1, 10, 100, 1000, 10_000];
    // With the source guard that the lanes of rules have; neither has one where flows come from ever new addresses.
    for (name, title, option, guard) in [
        ("rules", "64 B by rules", "", ",guard"),
        ("rules-new-flows", "64 B by rules, every frame a new flow", ",new-flows", ""),
    ] {
        let without = format!("dreamwire{option}{guard},label=dreamwire no rules");
        let with = rules.map(|rules| format!("dreamwire,rules={rules}{option},label=dreamwire rules={rules}"));
        let lanes: Vec<_> = std::iter::once(&without).chain(&with).map(String::as_str).collect();
        add(name, title, &lanes);
    }
    for (name, title, option) in
        [("latency", "Latency, 64 B, at 10 % load", "latency"), ("wake-up", "Wake-up, 64 B", "wake-up")]
    {
        let lanes = ["io", "dreamwire", "ovs", "kernel"].map(|device| format!("{device},{option},label={device}"));
        add(name, title, &lanes.each_ref().map(String::as_str));
    }
    add(
        "packed",
        "64 B, packed against split rings",
        &[
            "dreamwire,label=dreamwire split",
            "dreamwire,rewrite,label=dreamwire split rewritten",
            "dreamwire,packed,label=dreamwire packed",
            "io,label=io split",
            "io,rewrite,label=io split rewritten",
            "io,packed,label=io packed",
        ],
    );
    add(
        "ring",
        "64 B by ring size",
        &[
            "io,label=io 256",
            "io,ring=1024,label=io 1024",
            "dreamwire,label=dreamwire 256",
            "dreamwire,ring=1024,label=dreamwire 1024",
        ],
    );
    add(
        "stateful",
        "64 B, rules with connection tracking at both ports",
        &["io", "dreamwire,stateful,label=dreamwire", "ovs,stateful,label=ovs"],
    );
    add(
        "stateful-flows",
        "64 B, 1,000 flows, rules with connection tracking at both ports",
        &[
            "io,flows=1000,label=io",
            "dreamwire,stateful,flows=1000,label=dreamwire",
            "ovs,stateful,flows=1000,label=ovs",
        ],
    );
    add(
        "new-flows",
        "64 B, every frame a new flow",
        &[
            "io,new-flows,label=io",
            "dreamwire,new-flows,label=dreamwire",
            "ovs,new-flows,label=ovs",
            "ovs,new-flows,stateful,label=ovs stateful",
            "dreamwire,new-flows,stateful,label=dreamwire stateful",
        ],
    );
    set
}

impl Standard {
    /// Whether one of `wanted` is its name or begins it: `flows` takes in `flows-ovs`, but not `new-flows`.
    #[must_use]
    pub fn is_named(&self, wanted: &[String]) -> bool {
        wanted.iter().any(|start| self.name.starts_with(start.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_chosen_by_how_it_begins() {
        let named = |start: &str| {
            let set = standard().into_iter().filter(|comparison| comparison.is_named(&[start.to_owned()]));
            set.map(|comparison| comparison.name).collect::<Vec<_>>()
        };
        assert_eq!(named("flows"), ["flows-dreamwire", "flows-ovs"]);
        assert_eq!(named("vxlan-encap"), ["vxlan-encap-64", "vxlan-encap-1518"]);
        assert_eq!(named("l2-64"), ["l2-64"]);
        assert!(named("encap").is_empty());
    }

    #[test]
    fn names_are_unique_and_every_comparison_has_a_baseline() {
        let set = standard();
        let mut names: Vec<_> = set.iter().map(|comparison| comparison.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), set.len());
        assert!(set.iter().all(|comparison| comparison.lanes.len() >= 2));
    }
}
