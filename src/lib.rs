//! The daemon and its command line: configuration, control, API and statistics.
#![deny(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "STYLE: unwrap in tests"))]

pub mod api;
pub mod card;
pub mod cli;
pub mod config;
pub mod control;
pub mod features;
pub mod log;
pub mod port;
pub mod qemu;
pub mod resume_latency;
pub mod run;
pub mod run_dir;
pub mod why;
