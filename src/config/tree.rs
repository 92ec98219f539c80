//! TOML and JSON as one tree whose nodes remember their line.
//!
//! Neither `serde` nor the parsers report more than the first mistake of a kind; a tree lets the decoder look at
//! every key of every object and say everything at once.

use super::mistake::{Mistake, Mistakes};

/// A value and the line it stands on.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) line: Option<u32>,
    pub(super) value: Value,
}

/// The kinds of values that both notations have; what only TOML has is `Other` with its name.
#[derive(Debug, Clone)]
pub(super) enum Value {
    Text(String),
    Integer(i64),
    Boolean(bool),
    List(Vec<Node>),
    Table(Vec<(String, Node)>),
    Other(&'static str),
}

impl Value {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Boolean(_) => "a boolean",
            Self::List(_) => "a list",
            Self::Table(_) => "a table",
            Self::Other(kind) => kind,
        }
    }
}

/// Bytes of TOML in which every syntax error is looked for. Of a longer text the first alone is told: the parser keeps whatever it
/// finds, up to 300 bytes of errors for each byte of text.
const RECOVERED_BYTES_MAX: usize = 1 << 20;

/// Parses TOML, carrying on after syntax errors so that all of them are reported.
pub(super) fn from_toml(text: &str) -> Result<Node, Vec<Mistake>> {
    let (table, errors) = if text.len() <= RECOVERED_BYTES_MAX {
        toml::de::DeTable::parse_recoverable(text)
    } else {
        match toml::de::DeTable::parse(text) {
            Ok(table) => (table, Vec::new()),
            Err(first) => (toml::Spanned::new(0..0, toml::de::DeTable::new()), vec![first]),
        }
    };
    let lines = Lines::of(text);
    if errors.is_empty() {
        let entries = toml_entries(table.get_ref(), &lines);
        return Ok(Node { line: Some(1), value: Value::Table(entries) });
    }
    let mut mistakes = Mistakes::default();
    for error in errors {
        mistakes.push(|| Mistake {
            path: String::new(),
            line: error.span().map(|span| lines.at(span.start)),
            message: format!("not valid TOML: {}", error.message().replace('\n', ": ")),
        });
    }
    Err(mistakes.into_list())
}

/// Takes JSON over. `null` is the same as an absent key.
pub(super) fn from_json(value: &serde_json::Value) -> Node {
    use serde_json::Value as Json;
    let value = match value {
        Json::String(text) => Value::Text(text.clone()),
        Json::Bool(value) => Value::Boolean(*value),
        Json::Number(number) => number.as_i64().map_or(Value::Other("a number that is no integer"), Value::Integer),
        Json::Array(items) => Value::List(items.iter().map(from_json).collect()),
        Json::Object(entries) => Value::Table(
            entries
                .iter()
                .filter(|(_, value)| !value.is_null())
                .map(|(key, value)| (key.clone(), from_json(value)))
                .collect(),
        ),
        Json::Null => Value::Other("null"),
    };
    Node { line: None, value }
}

fn toml_entries(table: &toml::de::DeTable<'_>, lines: &Lines) -> Vec<(String, Node)> {
    let mut entries: Vec<_> = table
        .iter()
        .map(|(key, value)| {
            let mut node = toml_node(value, lines);
            // A key's value may be a table that was opened elsewhere; the key itself is where people look.
            node.line = Some(lines.at(key.span().start));
            (key.get_ref().to_string(), node)
        })
        .collect();
    entries.sort_by_key(|(_, node)| node.line);
    entries
}

fn toml_node(value: &toml::Spanned<toml::de::DeValue<'_>>, lines: &Lines) -> Node {
    use toml::de::DeValue;
    let line = Some(lines.at(value.span().start));
    let value = match value.get_ref() {
        DeValue::String(text) => Value::Text(text.to_string()),
        DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix())
            .map_or(Value::Other("an integer over 64 bits"), Value::Integer),
        DeValue::Boolean(value) => Value::Boolean(*value),
        DeValue::Array(items) => Value::List(items.iter().map(|item| toml_node(item, lines)).collect()),
        DeValue::Table(table) => Value::Table(toml_entries(table, lines)),
        DeValue::Float(_) => Value::Other("a fraction"),
        DeValue::Datetime(_) => Value::Other("a date"),
    };
    Node { line, value }
}

/// Where lines end: counting from the start for each node would be quadratic in the text, seconds for 10,000 rules.
struct Lines(Vec<usize>);

impl Lines {
    fn of(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(offset, _)| offset).collect())
    }

    /// The line of an offset, from 1.
    fn at(&self, offset: usize) -> u32 {
        let newlines = self.0.partition_point(|end| *end < offset);
        u32::try_from(newlines).unwrap_or(u32::MAX - 1) + 1
    }
}
