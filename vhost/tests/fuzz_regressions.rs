//! What the fuzzers once found, played again.

#[path = "../../fuzz/harness/guest.rs"]
mod guest;
#[path = "../../fuzz/harness/packed_ring.rs"]
mod packed_ring;
#[path = "../../fuzz/harness/split_ring.rs"]
mod split_ring;

fn replay(target: &str, run: fn(&[u8])) {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus-regressions").join(target);
    for entry in std::fs::read_dir(directory).expect("a directory for each target") {
        let path = entry.expect("a file").path();
        println!("{}", path.display());
        run(&std::fs::read(path).expect("a file"));
    }
}

#[test]
fn findings_in_split_rings_stay_fixed() {
    replay("split_ring", split_ring::run);
}

#[test]
fn findings_in_packed_rings_stay_fixed() {
    replay("packed_ring", packed_ring::run);
}

/// The harness itself: cases of all shapes, as a fuzzer without feedback would make them.
#[test]
fn arbitrary_bytes_break_no_ring_harness() {
    let mut dice = 0x9e37_79b9_7f4a_7c15u64;
    for round in 0..2000 {
        let bytes: Vec<u8> = (0..round % 600)
            .map(|_| {
                dice = dice.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (dice >> 33) as u8
            })
            .collect();
        split_ring::run(&bytes);
        packed_ring::run(&bytes);
    }
}

#[test]
fn findings_in_session_messages_stay_fixed() {
    replay("session_messages", dreamwire_vhost::keeper::fuzz::session_messages);
}
