//! Exceptions that C++ hosts throw in callbacks: `lory.hpp` carries them around the library, and one that
//! leaves a bare C callback ends the process, as the header says, before it reaches a frame of the host.
#![cfg(target_os = "linux")]

use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, Output},
};

use lory_tests::{cpp, fixtures::fixture};

#[test]
fn r9_exceptions_of_callbacks() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(program) = cpp::compile("c_exceptions", folder.path()) else { return };
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
