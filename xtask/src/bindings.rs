//! `tests/src/lory_h.rs`: what Rust's bindgen reads in `lory.h`, so that tests call the header as it is.
//!
//! It is committed because bindgen needs libclang, which the tests must not; where libclang is there,
//! `cargo test -p xtask --features bindgen` compares it with what bindgen reads now.

use std::path::PathBuf;

use crate::{header, root};

/// What the file says of itself.
#[cfg(feature = "bindgen")]
const HEAD: &str = "\
//! @generated from ffi/include/lory.h by `cargo run -p xtask --features bindgen -- bindings`: do not edit.
//!
//! Committed so that testing the header needs no libclang; compared with the header by
//! `cargo test -p xtask --features bindgen`. Its unsafe functions have no reasons of their own: each is the
//! C function of the same name, whose conditions are those at the top of the header.";

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
        .raw_line(HEAD);
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
