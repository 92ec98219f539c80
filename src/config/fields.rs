//! Typed reading of one table. Asking for a key is what makes it allowed: the schema is the code that reads it.

use std::collections::HashMap;
use std::ops::RangeInclusive;

use super::document::Kind;
use super::mistake::{Mistake, Mistakes};
use super::tree::{Node, Value};

/// Bytes of a name at most, for those that are one.
pub(super) const NAME_BYTES_MAX: usize = 64;

/// Where an object stands in its document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct At {
    pub(super) kind: Kind,
    pub(super) index: usize,
}

/// What the decoder has found out so far: mistakes, and where each key stood.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) mistakes: Mistakes,
    pub(super) warnings: Vec<Mistake>,
    lines: HashMap<(At, Option<&'static str>), u32>,
}

impl Findings {
    /// The line of a key, or else of its object.
    pub(super) fn line(&self, at: At, key: Option<&'static str>) -> Option<u32> {
        self.lines.get(&(at, key)).or_else(|| self.lines.get(&(at, None))).copied()
    }
}

/// One table being read.
pub(super) struct Fields<'a> {
    pub(super) at: At,
    /// How the object is called in messages: `port.vm1`.
    path: String,
    entries: &'a [(String, Node)],
    asked: Vec<&'static str>,
    refused: Vec<&'static str>,
    findings: &'a mut Findings,
}

impl<'a> Fields<'a> {
    pub(super) fn new(at: At, line: Option<u32>, entries: &'a [(String, Node)], findings: &'a mut Findings) -> Self {
        if let Some(line) = line {
            findings.lines.insert((at, None), line);
        }
        let name = entries.iter().find(|(key, _)| key == "name").map(|(_, node)| &node.value);
        let path = match (at.kind, name) {
            (Kind::Daemon, _) => at.kind.key().to_owned(),
            // One that is too long is wrong, and would stand in every message about the object.
            (kind, Some(Value::Text(name))) => {
                format!("{}.{}", kind.key(), &name[..name.floor_char_boundary(NAME_BYTES_MAX)])
            }
            (kind, _) => format!("{}[{}]", kind.key(), at.index),
        };
        Self { at, path, entries, asked: Vec::new(), refused: Vec::new(), findings }
    }

    /// Whether the key is there, right or wrong.
    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|(name, _)| name == key)
    }

    /// Reports a mistake at a key.
    pub(super) fn mistake(&mut self, key: &'static str, message: impl Into<String>) {
        let line = self.findings.line(self.at, Some(key));
        self.report(key, line, message.into());
    }

    /// Reports a mistake inside of a key's value, which has lines of its own.
    fn report(&mut self, key: &str, line: Option<u32>, message: String) {
        let path = &self.path;
        self.findings.mistakes.push(|| Mistake { path: format!("{path}.{key}"), line, message });
    }

    fn take(&mut self, key: &'static str) -> Option<&'a Node> {
        self.asked.push(key);
        let (_, node) = self.entries.iter().find(|(name, _)| name == key)?;
        if let Some(line) = node.line {
            self.findings.lines.insert((self.at, Some(key)), line);
        }
        Some(node)
    }

    fn expected(&mut self, key: &'static str, expected: &str, found: &Value) {
        self.mistake(key, format!("expected {expected}, found {}", found.kind()));
    }

    /// A string that `parse` makes something of; its error is the message.
    pub(super) fn text<T>(&mut self, key: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        match &self.take(key)?.value {
            Value::Text(text) => parse(text).map_err(|message| self.mistake(key, message)).ok(),
            other => {
                self.expected(key, "a string", other);
                None
            }
        }
    }

    /// As [`Fields::text`], but the key must be there.
    pub(super) fn required<T>(
        &mut self,
        key: &'static str,
        example: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<T> {
        if !self.has(key) {
            self.asked.push(key);
            self.mistake(key, format!("missing: add {key} = {example}"));
            return None;
        }
        self.text(key, parse)
    }

    /// A string or an integer, read by `parse` as text.
    pub(super) fn scalar<T>(&mut self, key: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        match &self.take(key)?.value {
            Value::Text(text) => parse(text).map_err(|message| self.mistake(key, message)).ok(),
            Value::Integer(value) => parse(&value.to_string()).map_err(|message| self.mistake(key, message)).ok(),
            other => {
                self.expected(key, "a string or an integer", other);
                None
            }
        }
    }

    /// One value or several, `max` at most: an integer, a string with commas, or a list of those.
    pub(super) fn items<T>(
        &mut self,
        key: &'static str,
        max: usize,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Vec<T> {
        let Some(node) = self.take(key) else { return Vec::new() };
        let nodes = match &node.value {
            Value::List(items) => items.as_slice(),
            _ => std::slice::from_ref(node),
        };
        let count: usize = nodes.iter().map(|node| item_count(&node.value)).sum();
        if count > max {
            let kind = self.at.kind.key();
            self.mistake(key, format!("{count} values; one {kind} has {max} at most: make it two"));
        }
        let mut values = Vec::new();
        let mut left = max;
        for node in nodes.iter().take(max) {
            let number;
            let text = match &node.value {
                Value::Text(text) => text.as_str(),
                Value::Integer(value) => {
                    number = value.to_string();
                    number.as_str()
                }
                other => {
                    let found = other.kind();
                    self.mistake(key, format!("expected an integer, a string or a list of them, found {found}"));
                    left = left.saturating_sub(1);
                    continue;
                }
            };
            for item in text.split(',').take(left).map(str::trim) {
                match parse(item) {
                    Ok(value) => values.push(value),
                    Err(message) => self.report(key, node.line, message),
                }
            }
            left = left.saturating_sub(item_count(&node.value));
        }
        values
    }

    /// A table of integers within `range`, as in `{ rate = 100, burst = 10 }`: the values of `names`, in their order.
    pub(super) fn integer_table<const N: usize>(
        &mut self,
        key: &'static str,
        names: [&'static str; N],
        range: RangeInclusive<i64>,
    ) -> Option<[Option<i64>; N]> {
        let node = self.take(key)?;
        let Value::Table(entries) = &node.value else {
            self.expected(key, &format!("a table of integers ({})", names.join(", ")), &node.value);
            return None;
        };
        let mut values = [None; N];
        for (name, node) in entries {
            let message = match (names.iter().position(|known| known == name), &node.value) {
                (Some(place), Value::Integer(value)) if range.contains(value) => {
                    values[place] = Some(*value);
                    continue;
                }
                (Some(_), Value::Integer(value)) => {
                    format!("{value} is out of range: {} to {}", range.start(), range.end())
                }
                (Some(_), other) => format!("expected an integer, found {}", other.kind()),
                (None, _) => format!("unknown key {name:?}; allowed here: {}", names.join(", ")),
            };
            self.report(&format!("{key}.{name}"), node.line, message);
        }
        Some(values)
    }

    /// An integer within `range`; `why` says where the limit comes from.
    pub(super) fn integer(&mut self, key: &'static str, range: RangeInclusive<i64>, why: &str) -> Option<i64> {
        match &self.take(key)?.value {
            Value::Integer(value) if range.contains(value) => Some(*value),
            Value::Integer(value) => {
                let (low, high) = (range.start(), range.end());
                self.mistake(key, format!("{value} is out of range: {low} to {high} ({why})"));
                None
            }
            other => {
                self.expected(key, "an integer", other);
                None
            }
        }
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, key: &'static str) -> Option<bool> {
        match &self.take(key)?.value {
            Value::Boolean(value) => Some(*value),
            other => {
                self.expected(key, "true or false", other);
                None
            }
        }
    }

    /// A table of switches, as in `{ tso = false }`: those of `names` that are `false`, in the order of `names`.
    pub(super) fn switches_off(&mut self, key: &'static str, names: &[&'static str]) -> Vec<&'static str> {
        let Some(node) = self.take(key) else { return Vec::new() };
        let allowed = names.join(", ");
        let Value::Table(entries) = &node.value else {
            self.expected(
                key,
                &format!("a table of switches ({allowed}), as in {{ {} = false }}", names[0]),
                &node.value,
            );
            return Vec::new();
        };
        let mut off = Vec::new();
        for (switch, node) in entries {
            let known = names.iter().find(|name| *name == switch);
            let message = match (known, &node.value) {
                (Some(name), Value::Boolean(false)) => {
                    off.push(*name);
                    continue;
                }
                (Some(_), Value::Boolean(true)) => continue,
                (Some(_), other) => format!("expected true or false, found {}", other.kind()),
                (None, _) => format!("unknown switch {switch:?}; allowed here: {allowed}"),
            };
            self.report(&format!("{key}.{switch}"), node.line, message);
        }
        off.sort_by_key(|switch| names.iter().position(|name| name == switch));
        off
    }

    /// A list of strings, `max` at most, each read by `parse`.
    pub(super) fn texts<T>(
        &mut self,
        key: &'static str,
        max: usize,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<T>> {
        let Value::List(items) = &self.take(key)?.value else {
            self.mistake(key, "expected a list of strings");
            return None;
        };
        self.at_most(key, max, items);
        let mut values = Vec::with_capacity(items.len().min(max));
        for item in items.iter().take(max) {
            let parsed = match &item.value {
                Value::Text(text) => parse(text),
                other => Err(format!("expected a string, found {}", other.kind())),
            };
            match parsed {
                Ok(value) => values.push(value),
                Err(message) => self.report(key, item.line, message),
            }
        }
        Some(values)
    }

    /// Reports a list that is too long.
    fn at_most(&mut self, key: &'static str, max: usize, items: &[Node]) {
        if items.len() > max {
            let kind = self.at.kind.key();
            self.mistake(key, format!("{} {key}; one {kind} has {max} at most", items.len()));
        }
    }

    /// A list of tables, `max` at most, each with these two strings and nothing else, which `parse` makes something of.
    pub(super) fn pairs<T>(
        &mut self,
        key: &'static str,
        names: [&'static str; 2],
        max: usize,
        parse: impl Fn(&str, &str) -> Result<T, String>,
    ) -> Vec<T> {
        let Some(node) = self.take(key) else { return Vec::new() };
        let shape = format!("{{ {} = \"...\", {} = \"...\" }}", names[0], names[1]);
        let Value::List(items) = &node.value else {
            self.expected(key, &format!("a list of tables {shape}"), &node.value);
            return Vec::new();
        };
        self.at_most(key, max, items);
        let mut values = Vec::with_capacity(items.len().min(max));
        for item in items.iter().take(max) {
            let text = |table: &'a [(String, Node)], name| match &table.iter().find(|(key, _)| key == name)?.1.value {
                Value::Text(text) => Some(text.as_str()),
                _ => None,
            };
            let parsed = match &item.value {
                Value::Table(table) if table.len() == names.len() => text(table, names[0])
                    .zip(text(table, names[1]))
                    .ok_or_else(|| format!("expected {shape}"))
                    .and_then(|(first, second)| parse(first, second)),
                _ => Err(format!("expected {shape}")),
            };
            match parsed {
                Ok(value) => values.push(value),
                Err(message) => self.report(key, item.line, message),
            }
        }
        values
    }

    /// A list of integers within `range`.
    pub(super) fn integers(&mut self, key: &'static str, range: RangeInclusive<i64>) -> Option<Vec<i64>> {
        let (low, high) = (*range.start(), *range.end());
        let Value::List(items) = &self.take(key)?.value else {
            self.mistake(key, format!("expected a list of integers, {low} to {high}"));
            return None;
        };
        let mut values = Vec::with_capacity(items.len());
        let mut wrong = false;
        for item in items {
            match item.value {
                Value::Integer(value) if range.contains(&value) => values.push(value),
                // One for all: they would all read the same.
                _ => wrong = true,
            }
        }
        if wrong {
            self.mistake(key, format!("expected integers, {low} to {high}"));
        }
        Some(values)
    }

    /// One of a few words; words of `planned` are known, but not implemented yet.
    pub(super) fn word<T: Copy>(&mut self, key: &'static str, words: &[(&str, T)], planned: &[&str]) -> Option<T> {
        let allowed: Vec<_> = words.iter().map(|(word, _)| format!("{word:?}")).collect();
        let allowed = allowed.join(", ");
        self.text(key, |text| {
            if let Some((_, value)) = words.iter().find(|(word, _)| *word == text) {
                Ok(*value)
            } else if planned.contains(&text) {
                Err(format!("{text:?} is not implemented yet; allowed: {allowed}"))
            } else {
                Err(format!("unknown value {text:?}; allowed: {allowed}"))
            }
        })
    }

    /// A key that other objects of the kind have: refused where it means nothing.
    pub(super) fn not_here(&mut self, key: &'static str, why: &str) {
        if self.take(key).is_some() {
            self.mistake(key, why);
        }
        self.asked.retain(|asked| *asked != key);
        self.refused.push(key);
    }

    /// Reports every key that nobody asked for.
    pub(super) fn finish(self) {
        let allowed = self.asked.join(", ");
        for (key, node) in self.entries {
            if self.asked.contains(&key.as_str()) || self.refused.contains(&key.as_str()) {
                continue;
            }
            let message = format!("unknown key {key:?}; allowed here: {allowed}");
            let path = format!("{}.{key}", self.path);
            self.findings.mistakes.push(|| Mistake { path, line: node.line, message });
        }
    }
}

/// How many items a value stands for.
fn item_count(value: &Value) -> usize {
    match value {
        Value::Text(text) => 1 + text.bytes().filter(|byte| *byte == b',').count(),
        _ => 1,
    }
}
