//! What would change between two documents, object by object and key by key.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use super::document::{Document, Kind};

/// One difference.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "change", rename_all = "lowercase")]
pub enum Change {
    /// The object is new.
    Added {
        /// Kind of object.
        kind: Kind,
        /// Its name.
        name: String,
    },
    /// The object goes.
    Removed {
        /// Kind of object.
        kind: Kind,
        /// Its name.
        name: String,
    },
    /// A key of the object has another value; `null` stands for none.
    Changed {
        /// Kind of object.
        kind: Kind,
        /// Its name.
        name: String,
        /// The key.
        key: String,
        /// Value before.
        old: Value,
        /// Value after.
        new: Value,
    },
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |value: &Value| match value {
            Value::Null => "none".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        match self {
            Self::Added { kind, name } => write!(f, "+ {} {name}", kind.key()),
            Self::Removed { kind, name } => write!(f, "- {} {name}", kind.key()),
            Self::Changed { kind, name, key, old, new } => {
                write!(f, "~ {} {name} {key}: {} → {}", kind.key(), plain(old), plain(new))
            }
        }
    }
}

/// The differences, in the order underlays, networks, groups, rules, ports. `daemon` is fixed while it runs and never differs.
pub fn between(old: &Document, new: &Document) -> Vec<Change> {
    let (old, new) = (old.to_json(), new.to_json());
    let mut changes = Vec::new();
    for kind in [Kind::Underlay, Kind::Network, Kind::Group, Kind::Rule, Kind::Port] {
        objects(kind, &old, &new, &mut changes);
    }
    changes
}

fn objects(kind: Kind, old: &Value, new: &Value, changes: &mut Vec<Change>) {
    let (before, after) = (by_name(kind, old), by_name(kind, new));
    for name in before.keys().filter(|name| !after.contains_key(*name)) {
        changes.push(Change::Removed { kind, name: (*name).to_owned() });
    }
    for (name, object) in &after {
        match before.get(name) {
            None => changes.push(Change::Added { kind, name: (*name).to_owned() }),
            Some(earlier) => keys(kind, name, earlier, object, changes),
        }
    }
}

fn by_name(kind: Kind, document: &Value) -> BTreeMap<&str, &Value> {
    let objects = document[kind.key()].as_array().into_iter().flatten();
    objects.map(|object| (object["name"].as_str().unwrap_or_default(), object)).collect()
}

fn keys(kind: Kind, name: &str, old: &Value, new: &Value, changes: &mut Vec<Change>) {
    let empty = serde_json::Map::new();
    let (before, after) = (old.as_object().unwrap_or(&empty), new.as_object().unwrap_or(&empty));
    let gone = before.keys().filter(|key| !after.contains_key(*key));
    for key in after.keys().chain(gone) {
        let (old, new) = (before.get(key).unwrap_or(&Value::Null), after.get(key).unwrap_or(&Value::Null));
        if old != new {
            let (name, key) = (name.to_owned(), key.clone());
            changes.push(Change::Changed { kind, name, key, old: old.clone(), new: new.clone() });
        }
    }
}
