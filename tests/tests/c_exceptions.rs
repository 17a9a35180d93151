//! Exceptions that C++ hosts throw in callbacks: `lory.hpp` carries them around the library, and one that
//! leaves a bare C callback ends the process, as the header says, before it reaches a frame of the host.
#![cfg(target_os = "linux")]

use std::{
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use lory_tests::{c_api, fixtures::fixture};

/// The program; `None`, said so, without a compiler.
fn compile(folder: &Path) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The name that the library is looked for under.
    let soname = folder.join(format!("liblory.so.{}", c_api::LORY_ABI_VERSION));
    std::os::unix::fs::symlink(c_api::library_path(), &soname).expect("a link");
    let program = folder.join("c_exceptions");
    let mut command = Command::new("c++");
    command.args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-pedantic", "-I"]);
    command.arg(root.join("../ffi/include")).arg(root.join("tests/c_exceptions.cpp")).arg(&soname);
    command.arg(format!("-Wl,-rpath,{}", folder.display())).arg("-o").arg(&program);
    match command.output() {
        Err(e) => {
            eprintln!("skipped: c++: {e}");
            None
        }
        Ok(out) => {
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
            Some(program)
        }
    }
}

#[test]
fn r9_exceptions_of_callbacks() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(program) = compile(folder.path()) else { return };
    let model = fixture("models/llama.gguf");
    let run = |what: &str| -> (Output, String) {
        let out = Command::new(&program).arg(what).arg(&model).output().expect("run");
        let words = String::from_utf8_lossy(&out.stdout).into_owned();
        (out, words)
    };
    for what in ["run", "drive", "reader"] {
        let (out, words) = run(what);
        assert!(out.status.success(), "{what}: {words}{}", String::from_utf8_lossy(&out.stderr));
        assert!(words.starts_with(&format!("caught {what}\n")), "{what}: {words}");
        assert!(words.ends_with(" bytes\n") && !words.ends_with("\n0 bytes\n"), "{what}: {words}");
    }
    let (out, words) = run("raw");
    const SIGABRT: i32 = 6;
    assert_eq!(out.status.signal(), Some(SIGABRT), "{:?}: {words}", out.status);
    assert_eq!(words, "", "the exception passed through the library");
}
