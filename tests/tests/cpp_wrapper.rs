//! The C++ wrapper where it does more than hand on a call: sets of options, bytes, several generations.
#![cfg(target_os = "linux")]

use std::process::Command;

use lory_tests::{cpp, engines, fixtures::fixture};

#[test]
fn wrapper_of_adapters_in_memory_packs_and_saved_sessions() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(program) = cpp::compile("cpp_wrapper", folder.path()) else { return };
    let pack = folder.path().join("pack.gguf");
    std::fs::write(&pack, engines::pack(3)).expect("a pack");
    let lora = fixture("lora/attn.gguf");
    let out =
        Command::new(program).arg(fixture("models/llama.gguf")).arg(lora).arg(pack).output().expect("run");
    let (said, errors) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{said}{errors}");
    assert_eq!(said, "13 parts hold\n", "{errors}");
}
