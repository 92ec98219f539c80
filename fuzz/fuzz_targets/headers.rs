//! See `datapath/src/fuzz.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dreamwire_datapath::fuzz::headers(bytes));
