//! What the fuzzer once found in headers, played again.

#[test]
fn findings_in_headers_stay_fixed() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus-regressions/headers");
    for entry in std::fs::read_dir(directory).expect("a directory for each target") {
        let path = entry.expect("a file").path();
        println!("{}", path.display());
        dreamwire_datapath::fuzz::headers(&std::fs::read(path).expect("a file"));
    }
}
