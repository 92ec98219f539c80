//! Traffic, topologies, peers and reports; the guest side of a ring.
#![deny(unsafe_code)]

pub mod compare;
pub mod eth0;
pub mod front_end;
pub mod hostile;
pub mod report;
pub mod topology;
pub mod traffic;
