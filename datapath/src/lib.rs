//! Frames, tables, stages, tunnels, underlays and the worker loop.

pub mod burst;
mod checksum;
mod checksum_place;
mod claim;
pub mod counters;
pub mod drop_reason;
pub mod fdb;
mod flow_cache;
#[doc(hidden)]
pub mod fuzz;
pub mod huge_pages;
pub mod mac;
mod offload;
pub mod perimeter;
mod pieces;
pub mod rarp;
pub mod snapshot;
mod stage;
pub mod underlay;
pub mod vni;
pub mod vxlan;
pub mod worker;
