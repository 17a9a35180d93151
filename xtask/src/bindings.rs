//! `tests/src/lory_h.rs`: what Rust's bindgen reads in `lory.h`, so that tests call the header as it is.

use std::path::PathBuf;

use crate::{header, root};

/// Where it is committed.
pub fn path() -> PathBuf {
    root().join("tests/src/lory_h.rs")
}

/// The bindings that belong to the committed header.
///
/// # Errors
/// bindgen's words.
#[cfg(feature = "bindgen")]
pub fn generate() -> Result<String, String> {
    let builder = bindgen::Builder::default()
        .header(header::path().to_string_lossy())
        .allowlist_item("(lory|LORY)_.*")
        .dynamic_library_name("Lory")
        .dynamic_link_require_all(true)
        .prepend_enum_name(false)
        .generate_comments(false)
        .derive_default(true)
        .merge_extern_blocks(true)
        .formatter(bindgen::Formatter::Rustfmt)
        .rustfmt_configuration_file(Some(root().join("rustfmt.toml")))
        .raw_line("// Made from lory.h by `cargo run -p xtask --features bindgen -- bindings`.");
    Ok(builder.generate().map_err(|e| e.to_string())?.to_string())
}

/// Says how to get them.
///
/// # Errors
/// Always.
#[cfg(not(feature = "bindgen"))]
pub fn generate() -> Result<String, String> {
    let _ = header::path;
    Err("built without the feature bindgen: cargo run -p xtask --features bindgen -- bindings".into())
}
