//! The parser on files that others made. Skipped, in words, where the test data is absent.

use std::sync::Arc;

use lory_models::gguf::Gguf;
use lory_tests::fixtures::shared_data;

fn parse(path: &std::path::Path) -> lory_models::Result<Gguf> {
    let bytes = std::fs::read(path).unwrap();
    let name = path.file_name().unwrap().to_string_lossy();
    Gguf::parse(vec![(Arc::from(&*name), Arc::new(bytes))])
}

#[test]
fn stories_opens_with_its_keys_and_tensors() {
    let Some(path) = shared_data("models/stories260K.gguf") else { return };
    let g = parse(&path).unwrap();
    assert_eq!(g.metadata().str("general.architecture").unwrap(), "llama");
    assert_eq!(g.metadata().u32("llama.block_count").unwrap(), 5);
    assert_eq!(g.metadata().opt_strings("tokenizer.ggml.tokens").unwrap().unwrap().len(), 512);
    let t = g.tensor("token_embd.weight").unwrap();
    assert_eq!((t.rows(), t.cols()), (512, 64));
    assert!(t.matrix().bytes().iter().any(|&b| b != 0));
}

#[test]
fn a_file_that_is_no_language_model_opens_as_a_container() {
    let Some(path) = shared_data("models/superpoint.gguf") else { return };
    let g = parse(&path).unwrap();
    assert!(g.tensors().len() > 0);
    for t in g.tensors() {
        assert_eq!(g.tensor(&t.name).unwrap().rows(), t.rows());
    }
}

#[test]
fn vocabularies_open_without_tensors() {
    for (name, tokens) in [("llama-bpe", 128256), ("qwen2", 151936), ("gpt-2", 50257), ("phi-3", 32064)] {
        let Some(path) = shared_data(&format!("vocab/ggml-vocab-{name}.gguf")) else { return };
        let g = parse(&path).unwrap();
        assert_eq!(g.tensors().len(), 0);
        assert_eq!(
            g.metadata().opt_strings("tokenizer.ggml.tokens").unwrap().unwrap().len(),
            tokens,
            "{name}"
        );
    }
}

/// Files of `malformed/` that break no rule of the container: (path, keys, tensors).
const SOUND: [(&str, usize, usize); 5] = [
    ("v3-empty.bin", 0, 0),
    ("valid-small.gguf", 9, 0),
    ("ggml-vocab-llama.v3.724549.gguf", 27, 0),
    ("gguf-v2-f32.bin", 0, 1),
    ("gguf-v3-q4-0.bin", 0, 1),
];

#[test]
fn every_malformed_file_is_refused_with_its_name() {
    let mut seen = 0;
    for folder in ["corpus/gguf_open", "legacy", "vectors"] {
        let Some(path) = shared_data(&format!("malformed/{folder}")) else { return };
        for entry in std::fs::read_dir(path).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            let result = parse(&path);
            match SOUND.iter().find(|(n, _, _)| *n == name) {
                Some((_, keys, tensors)) => {
                    let g = result.unwrap();
                    assert_eq!((g.metadata().iter().count(), g.tensors().len()), (*keys, *tensors), "{name}");
                }
                None => assert!(result.unwrap_err().to_string().starts_with(&name), "{name}"),
            }
            seen += 1;
        }
    }
    assert!(seen > 20, "only {seen} files");
}
