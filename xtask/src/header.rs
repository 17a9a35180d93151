//! `include/lory.h`, generated from the crate `lory-ffi`.

use std::path::PathBuf;

use crate::root;

/// Where the header is committed.
pub fn path() -> PathBuf {
    root().join("ffi/include/lory.h")
}

/// The header that belongs to the sources as they are.
///
/// # Errors
/// cbindgen's words.
pub fn generate() -> Result<String, String> {
    let ffi = root().join("ffi");
    let config = cbindgen::Config::from_file(ffi.join("cbindgen.toml"))?;
    let builder = cbindgen::Builder::new().with_config(config).with_src(ffi.join("src/lib.rs"));
    let bindings = builder.generate().map_err(|e| e.to_string())?;
    let mut bytes = Vec::new();
    bindings.write(&mut bytes);
    String::from_utf8(bytes).map(|text| for_c(&text)).map_err(|e| e.to_string())
}

/// Without what is said to readers of the Rust source only.
fn for_c(header: &str) -> String {
    let mut out = String::new();
    let mut skipping = false;
    for line in header.lines() {
        let text = line.trim();
        if text == "* # Safety" {
            skipping = true;
            // The empty line before it.
            while out.ends_with(" *\n") {
                let end = out.trim_end_matches('\n').rfind('\n').map_or(0, |i| i + 1);
                out.truncate(end);
            }
        }
        skipping &= text != "*/";
        if !skipping {
            out.push_str(line.trim_end());
            out.push('\n');
        }
    }
    out
}
