//! Chores of the repository: `cargo run -p xtask -- header`.

use std::{env, fs, process::ExitCode};

fn main() -> ExitCode {
    let done = match env::args().nth(1).as_deref() {
        Some("header") => header(),
        _ => Err("usage: cargo run -p xtask -- header    (writes ffi/include/lory.h)".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn header() -> Result<(), String> {
    let path = xtask::header::path();
    fs::write(&path, xtask::header::generate()?).map_err(|e| format!("{}: {e}", path.display()))
}
