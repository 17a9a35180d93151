//! `lory.h` and `lory.hpp` compile alone, and the library exports nothing else.
#![cfg(target_os = "linux")]

use std::{path::Path, process::Command};

use lory_tests::c_api;

fn include() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../ffi/include")
}

/// Compiles a file that has nothing but the header; says so if there is no such compiler.
fn compile(compiler: &str, language: &str, standard: &str, header: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let source = folder.path().join("source");
    std::fs::write(&source, format!("#include \"{header}\"\n#include \"{header}\"\n")).expect("written");
    let mut command = Command::new(compiler);
    command.args([
        "-x",
        language,
        standard,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pedantic",
        "-fsyntax-only",
        "-I",
    ]);
    match command.arg(include()).arg(&source).output() {
        Err(e) => eprintln!("skipped: {compiler}: {e}"),
        Ok(out) => assert!(
            out.status.success(),
            "{compiler} {standard} {header}:\n{}",
            String::from_utf8_lossy(&out.stderr)
        ),
    }
}

#[test]
fn headers_compile_alone() {
    for compiler in ["gcc", "clang"] {
        for standard in ["-std=c11", "-std=c17", "-std=c2x"] {
            compile(compiler, "c", standard, "lory.h");
        }
    }
    for compiler in ["g++", "clang++"] {
        for standard in ["-std=c++17", "-std=c++20"] {
            compile(compiler, "c++", standard, "lory.h");
            compile(compiler, "c++", standard, "lory.hpp");
        }
    }
}

fn lines(program: &str, args: &[&str]) -> Option<Vec<String>> {
    match Command::new(program).args(args).output() {
        Err(e) => {
            eprintln!("skipped: {program}: {e}");
            None
        }
        Ok(out) => Some(String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect()),
    }
}

#[test]
fn the_library_exports_the_header_and_nothing_else() {
    let library = c_api::library_path();
    let Some(symbols) = lines("nm", &["-D", "--defined-only", library.to_str().expect("UTF-8")]) else {
        return;
    };
    let mut exported: Vec<_> = symbols.iter().filter_map(|l| l.split_whitespace().nth(2)).collect();
    let mut declared: Vec<_> = include_str!("../src/lory_h.rs")
        .split("pub unsafe fn lory_")
        .skip(1)
        .filter_map(|f| f.split('(').next())
        .map(|name| format!("lory_{name}"))
        .collect();
    exported.sort_unstable();
    declared.sort_unstable();
    assert_eq!(exported, declared);
}

#[test]
fn the_soname_carries_the_abi_version() {
    let library = c_api::library_path();
    let Some(entries) = lines("readelf", &["-d", library.to_str().expect("UTF-8")]) else { return };
    let want = format!("[liblory.so.{}]", c_api::LORY_ABI_VERSION);
    assert!(entries.iter().any(|l| l.contains("SONAME") && l.contains(&want)), "{entries:#?}");
}
