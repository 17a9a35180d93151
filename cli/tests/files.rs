//! Files that cannot be used: one line that names the file, exit code 1, no hang.

mod program;

use std::{fs, path::Path};

use program::{arg, fixture, lory, shared_data};

/// Every command that opens a model.
fn commands(path: &str, out: &str) -> Vec<Vec<String>> {
    let words = |args: &[&str]| args.iter().map(|a| a.to_string()).collect();
    vec![
        words(&["inspect", path]),
        words(&["inspect", path, "--json"]),
        words(&["tokenize", "-m", path, "-p", "x"]),
        words(&["run", "-m", path, "-p", "x", "-n", "1"]),
        words(&["chat", "-m", path, "-p", "x", "-st"]),
        words(&["logits", "-m", path, "-p", "x", "-o", out]),
        words(&["run", "-m", &arg(&fixture("models/llama.gguf")), "-p", "x", "-n", "1", "--lora", path]),
        words(&["run", "-m", &arg(&fixture("models/llama.gguf")), "-p", "x", "-n", "1", "--pack", path]),
    ]
}

fn assert_all_refuse(path: &Path) {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.npy");
    for args in commands(&arg(path), &arg(&out)) {
        let ran = lory(&args);
        let line = ran.one_line_error(1);
        let name = path.file_name().unwrap().to_string_lossy();
        assert!(line.contains(&*name), "{args:?}: {line}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{args:?} left a file behind");
    }
}

#[test]
fn missing_directory_empty_and_garbage() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    assert_all_refuse(&at("missing.gguf"));
    fs::create_dir(at("directory.gguf")).unwrap();
    assert_all_refuse(&at("directory.gguf"));
    fs::write(at("empty.gguf"), "").unwrap();
    assert_all_refuse(&at("empty.gguf"));
    fs::write(at("garbage.gguf"), "This is no model. ".repeat(1000)).unwrap();
    assert_all_refuse(&at("garbage.gguf"));
    fs::write(at("magic.gguf"), "GGUF").unwrap();
    assert_all_refuse(&at("magic.gguf"));
}

#[cfg(unix)]
#[test]
fn a_fifo_is_refused_without_waiting_for_its_other_end() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo.gguf");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert_all_refuse(&fifo);
    assert_all_refuse(Path::new("/dev/null"));
}

#[test]
fn a_model_cut_short_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    let whole = fs::read(fixture("models/llama.gguf")).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    assert_all_refuse(&path);
}

#[test]
fn an_adapter_is_no_model_and_a_model_no_adapter() {
    let adapter = arg(&fixture("lora/attn.gguf"));
    let model = arg(&fixture("models/llama.gguf"));
    let ran = lory(&["run", "-m", &adapter, "-p", "x"]);
    assert!(ran.one_line_error(1).contains("attn.gguf"));
    let ran = lory(&["run", "-m", &model, "-p", "x", "--lora", &model]);
    assert!(ran.one_line_error(1).contains("llama.gguf"));
}

#[test]
fn an_adapter_for_another_base_is_refused() {
    let adapter = arg(&fixture("lora/attn.gguf"));
    let ran = lory(&["run", "-m", &arg(&fixture("models/qwen2.gguf")), "-p", "x", "--lora", &adapter]);
    assert!(ran.one_line_error(1).contains("attn.gguf"), "{ran:?}");
}

#[test]
fn hostile_and_legacy_files_end_in_one_line() {
    let Some(root) = shared_data("malformed") else { return };
    let dir = tempfile::tempdir().unwrap();
    let out = arg(&dir.path().join("out.npy"));
    let mut folders = vec![root];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            seen += 1;
            for args in commands(&arg(&path), &out) {
                let ran = lory(&args);
                // Some are sound GGUF files, or vocabularies: those can be looked into. None is
                // a model or an adapter of the fixture.
                if ran.code == 0 && matches!(args[0].as_str(), "inspect" | "tokenize") {
                    continue;
                }
                ran.one_line_error(1);
            }
        }
    }
    assert!(seen > 40, "{seen} files");
}

#[test]
fn a_file_that_is_no_language_model_is_refused_by_its_architecture() {
    let Some(path) = shared_data("models/superpoint.gguf") else { return };
    let ran = lory(&["run", "-m", &arg(&path), "-p", "x"]);
    assert!(ran.one_line_error(1).contains("superpoint`"), "{ran:?}");
    let ran = lory(&["inspect", &arg(&path)]);
    assert!(ran.success().contains("neither a language model nor an adapter"));
}

#[test]
fn texts_that_cannot_be_read_are_refused_by_name() {
    let model = arg(&fixture("models/llama.gguf"));
    let dir = tempfile::tempdir().unwrap();
    let binary = dir.path().join("binary.txt");
    fs::write(&binary, b"ab\xff").unwrap();
    for path in [binary, dir.path().join("missing.txt"), dir.path().to_owned()] {
        let ran = lory(&["run", "-m", &model, "-f", &arg(&path)]);
        let name = path.file_name().unwrap().to_string_lossy();
        assert!(ran.one_line_error(1).contains(&*name), "{ran:?}");
    }
}

#[test]
fn weights_of_a_peft_adapter_are_told_for_what_they_are() {
    let weights = arg(&fixture("peft/all_linear/adapter_model.safetensors"));
    for args in [&["inspect", &weights][..], &["run", "-p", "x", "-m", &weights]] {
        assert!(lory(args).one_line_error(1).contains("safetensors"), "{args:?}");
    }
}
