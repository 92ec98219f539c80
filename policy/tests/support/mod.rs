//! What the tests of this crate share.
#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod random;
pub(crate) mod rule_sets;
pub(crate) mod slow_port;
