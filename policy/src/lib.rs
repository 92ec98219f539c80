//! What a port may send and receive: pure decisions, without I/O, clock or threads.
//!
//! Policy never sees a packet's payload. The datapath parses a private copy of the headers ([`parse()`]), asks [`decide()`] on
//! a flow's first packet, and [`Conntrack::touch`] on every further one.
#![forbid(unsafe_code)]

pub mod bucket;
mod buckets;
pub mod classifier;
mod conn_key;
pub mod connection_row;
pub mod conntrack;
pub mod decide;
mod entry;
pub mod explain;
mod fragments;
mod intervals;
pub mod key;
mod lpm;
pub mod model;
#[doc(hidden)]
pub mod oracle;
pub mod parse;
mod rows;
mod segment;
mod slab;
pub mod source_guard;
mod table;
pub mod tcp;
mod tcp_state;

pub use bucket::{Meter, MeterLimits, TokenBucket};
pub use classifier::{Classifier, Verdict};
pub use connection_row::ConnectionRow;
pub use conntrack::{ConnState, Connection, Conntrack, ConntrackLimits, Grant, Refused, Sought, Touched, Track};
pub use decide::{Decision, Reason, decide, decide_sought};
pub use explain::{Explanation, explain};
pub use key::{Family, Key};
pub use model::{
    Action, Direction, Group, GroupId, IcmpKind, Identity, Policy, PolicyError, PortRange, Posture, Prefix, Protocol,
    Remote, Rule, RuleId,
};
pub use parse::{Fragment, Packet, Parsed, Transport, parse, parse_into};
pub use slab::Memory;
pub use source_guard::{Claim, SourceGuard};
