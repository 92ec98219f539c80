//! See `harness/packed_ring.rs`.
#![no_main]

#[path = "../harness/guest.rs"]
mod guest;
#[path = "../harness/packed_ring.rs"]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| harness::run(bytes));
