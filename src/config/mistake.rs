//! What is wrong with a configuration: where, and what to do about it.

use std::fmt;

use serde::Serialize;

/// Mistakes that are listed at most; of others the number alone is told.
pub const MISTAKES_MAX: usize = 1000;
/// Bytes of a mistake's message, and of its path, at most: what is wrong may be megabytes long itself. The longest of ours names 16
/// objects.
const MESSAGE_BYTES_MAX: usize = 2048;
const PATH_BYTES_MAX: usize = 256;

/// The mistakes found so far. What a document can make it keep does not grow with the document.
#[derive(Debug, Default)]
pub(super) struct Mistakes {
    listed: Vec<Mistake>,
    left_out: usize,
}

impl Mistakes {
    /// Notes a mistake; it is not even put into words when there are enough.
    pub(super) fn push(&mut self, mistake: impl FnOnce() -> Mistake) {
        if self.listed.len() == MISTAKES_MAX {
            self.left_out += 1;
            return;
        }
        let mut mistake = mistake();
        clip(&mut mistake.path, PATH_BYTES_MAX);
        clip(&mut mistake.message, MESSAGE_BYTES_MAX);
        // A list of a million times the same.
        if self.listed.last() != Some(&mistake) {
            self.listed.push(mistake);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.listed.is_empty()
    }

    /// In the order of lines, and at the end how many are not among them. Those without a line keep the order in which they were found.
    pub(super) fn into_list(mut self) -> Vec<Mistake> {
        self.listed.sort_by_key(|mistake| mistake.line);
        self.listed.dedup();
        if self.left_out > 0 {
            self.listed.push(Mistake::new("", format!("and {} more", self.left_out)));
        }
        self.listed
    }
}

fn clip(text: &mut String, bytes_max: usize) {
    if text.len() > bytes_max {
        text.truncate(text.floor_char_boundary(bytes_max));
        text.push_str("...");
    }
}

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
