//! See `vhost/src/keeper/fuzz.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| dreamwire_vhost::keeper::fuzz::session_messages(bytes));
