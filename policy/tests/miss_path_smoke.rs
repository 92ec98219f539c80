//! The benchmark of the miss path runs, so that it does not rot.

#[allow(dead_code, reason = "its `main`")]
#[path = "../examples/miss_path.rs"]
mod miss_path;

#[test]
fn the_benchmark_runs() {
    let rows = miss_path::run(true);
    let first_number = |row: &String| row.split_whitespace().next().and_then(|word| word.parse::<u32>().ok());
    let rules: Vec<_> = rows.iter().skip(1).take(4).filter_map(first_number).collect();
    assert_eq!(rules, [10, 100, 1_000, 10_000], "{rows:#?}");
    for row in &rows[1..5] {
        // Rules; lookup, miss and ratio with their spans; compilation, memory.
        let figures: Vec<f64> = row
            .split(|c: char| !c.is_ascii_digit() && c != '.')
            .flat_map(|word| word.split(".."))
            .filter_map(|word| word.parse().ok())
            .collect();
        assert_eq!(figures.len(), 12, "{row}");
        // Compilation of ten rules rounds to nothing.
        assert!(figures[..10].iter().all(|figure| *figure > 0.0), "{row}");
    }
    for kind in ["1,000 ports", "touch of 1 ", "touch of 1000 ", "parse of"] {
        assert!(rows.iter().any(|row| row.contains(kind)), "{kind}: {rows:#?}");
    }
}
