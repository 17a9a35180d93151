//! What is committed is what would be generated now.

#[test]
fn the_header_belongs_to_the_sources() {
    let committed = std::fs::read_to_string(xtask::header::path()).expect("it is committed");
    let generated = xtask::header::generate().expect("cbindgen reads the crate");
    let line = committed.lines().zip(generated.lines()).position(|(a, b)| a != b);
    assert!(
        committed == generated,
        "ffi/include/lory.h differs from line {} on: run `cargo run -p xtask -- header`",
        line.map_or(committed.lines().count().min(generated.lines().count()), |n| n) + 1
    );
}
