//! The configuration: desired state, read from TOML or JSON, validated as a whole, compared object by object.
//!
//! Text becomes a `tree` that remembers lines; `decode` makes a [`Document`] of it and notes every mistake;
//! `check` then looks at objects together. Only a document without mistakes leaves this module.

mod check;
mod check_rules;
mod decode;
mod decode_limits;
mod decode_rules;
pub mod diff;
pub mod document;
mod fields;
pub mod limits;
mod mistake;
pub mod notation;
pub mod rules;
mod tree;

use std::path::Path;

pub use document::{Daemon, Document, Driver, Encapsulation, Kind, Mode, Neighbour, Network, Port, Underlay, Wire};
pub use mistake::{MISTAKES_MAX, Mistake};
pub use rules::{Group, Remote, Rule};

use tree::Node;

/// Where the daemon's sockets are if nobody says otherwise.
pub const RUN_DIR_DEFAULT: &str = "/run/dreamwire";

/// Bytes of configuration text at most: as many rules as a policy may have fit twice, with all their keys.
pub const TEXT_BYTES_MAX: usize = 32 << 20;

/// What a document is read for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Context<'a> {
    /// The run directory, where the command line has named one.
    pub run_dir: Option<&'a Path>,
    /// The settings of the running daemon, which a document cannot change. `None` at start.
    pub running: Option<&'a Daemon>,
}

/// A document without mistakes, and what is odd about it nevertheless.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The desired state.
    pub document: Document,
    /// Things that work, but hardly as meant.
    pub warnings: Vec<Mistake>,
}

/// Reads TOML. Returns all mistakes, in the order of lines; where there are more than [`MISTAKES_MAX`], how many more.
pub fn from_toml(text: &str, context: Context<'_>) -> Result<Accepted, Vec<Mistake>> {
    accept(&tree::from_toml(text)?, context)
}

/// Reads JSON text. Returns all mistakes; only one of syntax has a line.
pub fn from_json_text(text: &str, context: Context<'_>) -> Result<Accepted, Vec<Mistake>> {
    let value: serde_json::Value = serde_json::from_str(text).map_err(|error| {
        let line = u32::try_from(error.line()).ok();
        vec![Mistake { path: String::new(), line, message: format!("not valid JSON: {error}") }]
    })?;
    from_json(&value, context)
}

/// Reads a JSON value. Returns all mistakes.
pub fn from_json(value: &serde_json::Value, context: Context<'_>) -> Result<Accepted, Vec<Mistake>> {
    accept(&tree::from_json(value), context)
}

/// The document of a daemon that was given no file: one network, `default`, local to the host.
pub fn without_file(context: Context<'_>) -> Accepted {
    from_toml("[[network]]\nname = \"default\"\n", context).expect("the built-in document has no mistakes")
}

fn accept(root: &Node, context: Context<'_>) -> Result<Accepted, Vec<Mistake>> {
    let (document, mut findings) = decode::document(root, context);
    check::document(&document, &mut findings);
    check_rules::document(&document, &mut findings);
    if findings.mistakes.is_empty() {
        return Ok(Accepted { document, warnings: findings.warnings });
    }
    Err(findings.mistakes.into_list())
}
