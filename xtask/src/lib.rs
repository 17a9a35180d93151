//! What is generated or packed, so that tests can compare it with what is committed.

pub mod abi;
pub mod bindings;
pub mod header;

use std::path::{Path, PathBuf};

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("in the workspace").into()
}
