//! Groups and rules as they are.

use serde_json::{Value, json};

use super::observed::{merge, settings};
use crate::config::{Group, Rule};
use crate::control::inventory::Inventory;

/// A group, with the ports that are in it.
pub(super) fn group(group: &Group, inventory: &Inventory) -> Value {
    let ports = inventory.document.port.iter().filter(|port| port.groups.contains(&group.name));
    let mut shown = settings(group);
    merge(&mut shown, json!({"ports": ports.map(|port| &port.name).collect::<Vec<_>>()}));
    shown
}

/// A rule.
pub(super) fn rule(rule: &Rule, _inventory: &Inventory) -> Value {
    settings(rule)
}
