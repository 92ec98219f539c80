//! See `harness/split_ring.rs`.
#![no_main]

#[path = "../harness/guest.rs"]
mod guest;
#[path = "../harness/split_ring.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| harness::run(bytes));
