//! Groups and rules as desired state: what `[[group]]` and `[[rule]]` say, after validation.

use dreamwire_policy::{Action, Direction, IcmpKind, PortRange, Prefix, Protocol};
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::notation::{direction_word, icmp_kind_text, port_range_text, prefix_text, protocol_text};

/// Ports and prefixes that rules speak of under one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// Unique among groups.
    pub name: String,
    /// Members beside the addresses of the ports in it.
    #[serde(skip_serializing_if = "Vec::is_empty", serialize_with = "prefixes")]
    pub prefixes: Vec<Prefix>,
    /// What names the group in tunnel headers. `None`: nothing, its members are known by address alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u16>,
}

/// The far end that a rule is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remote {
    /// Everybody.
    Any,
    /// Addresses.
    Prefix(Prefix),
    /// The members of the group of that name.
    Group(String),
}

/// What ports in a group may do, or may not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Unique among rules; made up where the document has none.
    pub name: String,
    /// The group whose ports it applies to.
    pub group: String,
    /// Which way, seen from the VM.
    pub direction: Direction,
    /// Allow or deny.
    pub action: Action,
    /// Which protocols.
    pub protocol: Protocol,
    /// Destination ports; all if empty.
    pub ports: Vec<PortRange>,
    /// ICMP types; all if empty.
    pub icmp: Vec<IcmpKind>,
    /// The far end.
    pub remote: Remote,
    /// The highest wins.
    pub priority: u16,
    /// Whether decisions by it are logged.
    pub log: bool,
}

impl Rule {
    /// What the far end is called: it depends on the direction.
    pub fn far_end_key(&self) -> &'static str {
        if self.direction == Direction::Ingress { "from" } else { "to" }
    }
}

impl Serialize for Rule {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &self.name)?;
        map.serialize_entry("group", &self.group)?;
        map.serialize_entry("direction", direction_word(self.direction))?;
        let action = if self.action == Action::Allow { "allow" } else { "deny" };
        map.serialize_entry(action, &protocol_text(self.protocol))?;
        if !self.ports.is_empty() {
            let ports: Vec<_> = self.ports.iter().copied().map(port_range_text).collect();
            map.serialize_entry("ports", &ports)?;
        }
        if !self.icmp.is_empty() {
            let kinds: Vec<_> = self.icmp.iter().map(|kind| icmp_kind_text(self.protocol, *kind)).collect();
            map.serialize_entry("icmp", &kinds)?;
        }
        let remote = match &self.remote {
            Remote::Any => "any".to_owned(),
            Remote::Prefix(prefix) => prefix_text(*prefix),
            Remote::Group(group) => format!("group:{group}"),
        };
        map.serialize_entry(self.far_end_key(), &remote)?;
        map.serialize_entry("priority", &self.priority)?;
        if self.log {
            map.serialize_entry("log", &true)?;
        }
        map.end()
    }
}

fn prefixes<S: Serializer>(value: &[Prefix], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(value.iter().copied().map(prefix_text))
}
