//! A connection as it is shown.

use crate::conn_key::conn_key;
use crate::entry::Entry;
use crate::key::Key;
use crate::model::{Direction, RuleId};
use crate::table::Table;
use crate::tcp::{TcpState, Tracker};

/// A connection, for `show connections`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionRow {
    /// Which way its first packet went.
    pub initiator: Direction,
    /// That packet's key.
    pub key: Key,
    /// State of a TCP connection.
    pub tcp: Option<TcpState>,
    /// It has gone both ways.
    pub replied: bool,
    /// Nothing less useful than it goes before it.
    pub assured: bool,
    /// The rule that let it pass.
    pub rule: Option<RuleId>,
    /// The far end's identity, from a tunnel header.
    pub identity: Option<u16>,
    /// Time until it is forgotten, in ns.
    pub expires_in_ns: u64,
}

impl ConnectionRow {
    pub(crate) fn new(table: &Table, entry: &Entry, now_ns: u64) -> Self {
        Self {
            initiator: entry.initiator,
            key: table.key(entry).key(entry.initiator),
            tcp: table.tracker(entry).map(Tracker::state),
            replied: entry.has(Entry::REPLIED),
            assured: entry.has(Entry::ASSURED),
            rule: (entry.rule != u32::MAX).then_some(RuleId(entry.rule)),
            identity: entry.has(Entry::IDENTITY).then_some(entry.identity),
            expires_in_ns: entry.expires_ns.saturating_sub(now_ns),
        }
    }

    /// Whether a packet that goes this way is of the connection. Of ICMP, any query's that fits: whoever asks for people does not know
    /// its identifier.
    #[must_use]
    pub fn carries(&self, key: &Key, direction: Direction) -> bool {
        let source_port = if key.is_icmp() { self.key.source_port } else { key.source_port };
        let packet = conn_key(&Key { source_port, ..*key }, direction).map(|(key, _)| key);
        packet.is_some() && packet == conn_key(&self.key, self.initiator).map(|(key, _)| key)
    }
}
