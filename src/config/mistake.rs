//! What is wrong with a configuration: where, and what to do about it.

use std::fmt;

use serde::Serialize;

/// One mistake, or one warning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mistake {
    /// The object and key, as in `port.vm1.mac`; empty for the document as a whole.
    pub path: String,
    /// Line in the text that was read, from 1. `None` where there was no text (the API's JSON).
    pub line: Option<u32>,
    /// What is wrong, what is allowed, and what to do.
    pub message: String,
}

impl Mistake {
    /// A mistake that belongs to no line.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: path.into(), line: None, message: message.into() }
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}
