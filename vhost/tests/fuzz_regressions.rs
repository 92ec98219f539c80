//! What the fuzzers once found, played again.

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
fn findings_in_session_messages_stay_fixed() {
    replay("session_messages", dreamwire_vhost::keeper::fuzz::session_messages);
}
