//! Chores of the repository: `cargo run -p xtask -- header`.

use std::{env, fs, path::Path, process::ExitCode};

use xtask::{abi, bindings, header};

const USAGE: &str = "usage: cargo run -p xtask [--features bindgen] -- WHAT
  header    writes ffi/include/lory.h from the crate lory-ffi
  bindings  writes tests/src/lory_h.rs from that header (needs the feature bindgen and libclang)
  abi       writes ffi/abi/N.txt from both; refuses to take lines away from a version";

fn main() -> ExitCode {
    let done = match env::args().nth(1).as_deref() {
        Some("header") => header::generate().and_then(|text| write(&header::path(), &text)),
        Some("bindings") => bindings::generate().and_then(|text| write(&bindings::path(), &text)),
        Some("abi") => abi(),
        _ => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

fn abi() -> Result<(), String> {
    let (path, new) = (abi::path()?, abi::generate()?);
    let old = fs::read_to_string(&path).unwrap_or_default();
    let gone: Vec<_> = old.lines().filter(|line| !new.lines().any(|l| l == *line)).collect();
    if !gone.is_empty() {
        return Err(format!("raise LORY_ABI_VERSION in ffi/src/version.rs: gone are\n{}", gone.join("\n")));
    }
    write(&path, &new)
}
