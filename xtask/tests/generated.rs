//! What is committed is what would be generated now.

use std::{fs, path::Path};

fn compare(path: &Path, generated: &str, how: &str) {
    let committed = fs::read_to_string(path).expect("it is committed");
    let same = committed.lines().zip(generated.lines()).take_while(|(a, b)| a == b).count();
    let line = same + 1;
    assert!(
        committed == generated,
        "{} differs from line {line} on: run `cargo run -p xtask {how}`",
        path.display()
    );
}

#[test]
fn the_header_belongs_to_the_sources() {
    let generated = xtask::header::generate().expect("cbindgen reads the crate");
    compare(&xtask::header::path(), &generated, "-- header");
}

#[cfg(feature = "bindgen")]
#[test]
fn the_bindings_belong_to_the_header() {
    let generated = xtask::bindings::generate().expect("bindgen reads the header");
    compare(&xtask::bindings::path(), &generated, "--features bindgen -- bindings");
}

#[test]
fn the_abi_is_the_one_its_version_promises() {
    let path = xtask::abi::path().expect("a version");
    let promised = fs::read_to_string(&path).expect("every ABI version has its list");
    let now = xtask::abi::generate().expect("header and bindings");
    let gone: Vec<_> = promised.lines().filter(|line| !now.lines().any(|l| l == *line)).collect();
    assert!(gone.is_empty(), "raise LORY_ABI_VERSION in ffi/src/version.rs: gone are {gone:#?}");
    compare(&path, &now, "-- abi");
}
