//! What commands write is never what they read.

mod program;

use std::{fs, path::Path};

use program::{arg, fixture, lory, lory_with_input};

/// A model, three adapters and a pack of two that may be destroyed.
fn files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (model, adapters) = (at(&dir, "model.gguf"), at(&dir, "adapters"));
    fs::copy(fixture("models/llama.gguf"), &model).unwrap();
    lory(&["synth", "adapters", "-m", &model, "--n", "3", "--rank", "4", "-o", &adapters]).success();
    let pack = at(&dir, "pack.gguf");
    lory(&["synth", "pack", "-m", &model, "--adapters", "2", "--rank", "4", "-o", &pack]).success();
    fs::write(at(&dir, "text.txt"), "hello").unwrap();
    dir
}

fn at(dir: &tempfile::TempDir, name: &str) -> String {
    arg(&dir.path().join(name))
}

/// Every file with its content.
fn contents(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => all.extend(contents(&path)),
            false => all.push((arg(&path), fs::read(&path).unwrap())),
        }
    }
    all.sort();
    all
}

#[test]
fn an_output_that_is_an_input_is_refused_and_everything_stays() {
    let dir = files();
    let [model, pack, adapters, text] =
        ["model.gguf", "pack.gguf", "adapters", "text.txt"].map(|n| at(&dir, n));
    let adapter = at(&dir, "adapters/adapter-00001.gguf");
    let peft = at(&dir, "peft/");
    lory(&["pack", "extract", &pack, "synth-00000", "-m", &model, "-o", &peft]).success();
    lory(&["pack", "rename", &pack, "synth-00001", "poet"]).success();
    let (weights, segment) = (at(&dir, "peft/adapter_model.safetensors"), at(&dir, "pack.seg-0001.gguf"));
    // Another way to the same file.
    let detour = at(&dir, "adapters/../model.gguf");
    let before = contents(dir.path());
    let cases: &[(&[&str], &str)] = &[
        (&["compress", "-m", &model, &adapters, "-o", &model], "the model itself"),
        (&["compress", "-m", &model, &adapters, "-o", &detour], "the model itself"),
        (&["compress", "-m", &model, &adapters, "-o", &adapter], "an adapter"),
        (&["compress", "-m", &model, &peft, "-o", &weights], "part of an adapter"),
        (&["synth", "pack", "-m", &model, "-o", &model], "the model itself"),
        (&["logits", "-m", &model, "-p", "x", "-o", &model], "the model itself"),
        (&["logits", "-m", &model, "-f", &text, "-o", &text], "a text"),
        (&["logits", "-m", &model, "-p", "x", "--lora", &adapter, "-o", &adapter], "an adapter"),
        (&["pack", "extract", &pack, "poet", "-o", &pack], "the pack itself"),
        (&["pack", "extract", &pack, "poet", "-o", &segment], "a segment of the pack"),
        (&["pack", "extract", &pack, "poet", "-m", &model, "-o", &model], "the model itself"),
        (&["run", "-m", &model, "-p", "x", "--metrics", &model], "the model itself"),
        (&["run", "-m", &model, "-p", "x", "--pack", &pack, "--metrics", &pack], "the pack itself"),
    ];
    for (args, what) in cases {
        let ran = lory(args);
        let flag = if args[0] == "run" { "--metrics" } else { "-o" };
        let line = ran.one_line_error(2);
        assert!(line.contains(&format!("{flag} {}: is {what}", args.last().unwrap())), "{args:?}: {line}");
        assert!(contents(dir.path()) == before, "{args:?} changed a file");
    }
}

#[test]
fn places_where_nothing_can_stand_are_told_before_the_work() {
    let dir = files();
    let [model, pack, adapters, text] =
        ["model.gguf", "pack.gguf", "adapters", "text.txt"].map(|n| at(&dir, n));
    let [lost, file, folder] = ["none/x.gguf", "x.gguf", "poet/"].map(|n| at(&dir, n));
    lory(&["pack", "extract", &pack, "synth-00000", "-m", &model, "-o", &folder]).success();
    let before = contents(dir.path());
    let no_folder = format!("{lost}: there is no folder {}; make it first", at(&dir, "none"));
    let is_file = format!("{text}: is a file; name a folder");
    let cases: &[(&[&str], &str)] = &[
        (&["synth", "model", "llama-tiny", "-o", &lost], &no_folder),
        (&["synth", "pack", "-m", &model, "-o", &lost], &no_folder),
        (&["logits", "-m", &model, "-p", "x", "-o", &lost], &no_folder),
        (&["run", "-m", &model, "-p", "x", "--metrics", &lost], &no_folder),
        (&["compress", "-m", &model, &adapters, "-o", &lost], &no_folder),
        (&["pack", "extract", &pack, "synth-00000", "-o", &lost], &no_folder),
        (
            &["pack", "extract", &pack, "synth-00000", "-m", &model, "-o", &folder],
            "is there and is not empty",
        ),
        (&["synth", "adapters", "-m", &model, "--n", "1", "-o", &text], &is_file),
        (&["compress", "-m", &model, &adapters, "-o", &file, "--report", &text], &is_file),
        #[cfg(feature = "demo")]
        (&["demo", "--export", &text], &is_file),
    ];
    for (args, told) in cases {
        let ran = lory(args);
        assert!(ran.one_line_error(1).contains(told), "{args:?}: {ran:?}");
        assert!(contents(dir.path()) == before, "{args:?} changed a file");
    }
}

#[test]
fn a_shard_of_the_model_is_the_model() {
    let dir = files();
    let shards = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"].map(|n| at(&dir, n));
    for shard in &shards {
        fs::copy(at(&dir, "model.gguf"), shard).unwrap();
    }
    let ran = lory(&["logits", "-m", &shards[0], "-p", "x", "-o", &shards[1]]);
    assert!(ran.one_line_error(2).contains("a shard of the model"), "{ran:?}");
}

#[test]
fn only_a_saved_conversation_is_replaced_by_another() {
    let dir = files();
    let [model, talk, text] = ["model.gguf", "talk.json", "text.txt"].map(|n| at(&dir, n));
    let other = at(&dir, "other.json");
    fs::write(&other, "{\"format\": \"of something else\"}").unwrap();
    let before = [&model, &text, &other].map(|path| fs::read(path).unwrap());
    let typed =
        format!("hello\n/save {talk}\n/save {model}\n/save {text}\n/save {other}\n/clear\n/save {talk}\n");
    let ran = lory_with_input(&["chat", "-m", &model, "-n", "2"], &typed);
    assert_eq!(ran.stderr.matches("is no saved conversation; name another file").count(), 3, "{ran:?}");
    assert!([&model, &text, &other].map(|path| fs::read(path).unwrap()) == before);
    assert!(ran.stderr.contains("0 messages saved"), "{ran:?}");
}
