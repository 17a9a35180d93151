//! Where test data lies: the committed fixtures, and the optional data folder beside the checkout. Tests of other crates
//! include this file; every crate's folder lies beside `tests`.

use std::path::{Path, PathBuf};

/// A path below `tests/fixtures`.
pub fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(path)
}

/// A path below the optional data folder; `None`, with a line that says so, where it is absent.
pub fn shared_data(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(path);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}
