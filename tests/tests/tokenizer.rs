//! Tokenizers against llama.cpp's own vectors, on five real vocabularies. Skips where the data folder is absent.

use std::{path::Path, sync::Arc};

use lory_models::{
    gguf::Gguf,
    tokenizer::{DecodeOptions, Detokenizer, EncodeOptions, Tokenizer},
};
use lory_tests::fixtures::shared_data;

const PLAIN: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };

fn load(path: &Path) -> Tokenizer {
    let bytes = std::fs::read(path).unwrap();
    let name: Arc<str> = path.file_name().unwrap().to_string_lossy().into();
    let gguf = Gguf::parse(vec![(name, Arc::new(bytes))]).unwrap();
    Tokenizer::from_metadata(gguf.metadata()).unwrap()
}

/// Texts and ids of one vocabulary's vectors.
fn vectors(path: &Path) -> Vec<(String, Vec<u32>)> {
    let with = |suffix: &str| {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        std::fs::read_to_string(name).unwrap()
    };
    let (inp, out) = (with(".inp"), with(".out"));
    let texts: Vec<&str> = inp.split("\n__ggml_vocab_test__\n").collect();
    let ids: Vec<Vec<u32>> =
        out.lines().map(|l| l.split_whitespace().map(|id| id.parse().unwrap()).collect()).collect();
    assert_eq!(texts.len(), ids.len() + usize::from(texts.last() == Some(&"")));
    texts.into_iter().map(str::to_owned).zip(ids).collect()
}

fn conforms(name: &str) {
    let Some(path) = shared_data(&format!("vocab/ggml-vocab-{name}.gguf")) else { return };
    let tokenizer = Arc::new(load(&path));
    let vectors = vectors(&path);
    assert!(vectors.len() >= 46, "{} vectors", vectors.len());
    let mut wrong = Vec::new();
    for (text, expected) in &vectors {
        let ids = tokenizer.encode(text, PLAIN);
        if ids != *expected {
            wrong.push(format!("{text:?}\n  expected {expected:?}\n  got      {ids:?}"));
        }
        // The ids must also lead back to the text, and the stream to the same as the whole.
        let decoded = tokenizer.decode(expected);
        assert_eq!(decoded, *text, "decoded by {name}");
        let mut stream = Detokenizer::new(tokenizer.clone(), DecodeOptions::default());
        let mut streamed: String = expected.iter().map(|&id| stream.push(id)).collect();
        streamed += &stream.finish();
        assert_eq!(streamed, decoded);
    }
    assert!(wrong.is_empty(), "{name}: {} of {} differ\n{}", wrong.len(), vectors.len(), wrong.join("\n"));
    println!("{name}: {} of {}", vectors.len() - wrong.len(), vectors.len());
}

#[test]
fn vectors_llama_spm() {
    conforms("llama-spm");
}

#[test]
fn vectors_phi_3() {
    conforms("phi-3");
}

#[test]
fn vectors_llama_bpe() {
    conforms("llama-bpe");
}

#[test]
fn vectors_gpt_2() {
    conforms("gpt-2");
}

#[test]
fn vectors_qwen2() {
    conforms("qwen2");
}

#[test]
fn special_tokens_of_real_vocabularies() {
    let Some(path) = shared_data("vocab/ggml-vocab-llama-bpe.gguf") else { return };
    let llama = load(&path);
    let turn = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>";
    let parsed = llama.encode(turn, EncodeOptions { add_special: true, parse_special: true });
    assert_eq!(parsed, [128000, 128006, 882, 128007, 271, 13347, 128009]);
    assert!(llama.is_eog(128009) && llama.is_eog(128001) && !llama.is_eog(128006));
    assert_eq!(llama.eot(), Some(128009));
    assert_eq!(llama.decode(&parsed), "user\n\nHi");
    let shown = DecodeOptions { special: true, continuation: false };
    assert_eq!(llama.decode_with(&parsed, shown), format!("<|begin_of_text|>{turn}"));
    assert!(llama.encode(turn, PLAIN).iter().all(|&id| !llama.is_control(id)), "text forged a control token");
}

#[test]
fn phi_3_swallows_white_space_after_special_tokens() {
    let Some(path) = shared_data("vocab/ggml-vocab-phi-3.gguf") else { return };
    let phi = load(&path);
    let parse = EncodeOptions { add_special: false, parse_special: true };
    assert_eq!(phi.encode("<|user|>\nHi<|end|>\n", parse), phi.encode("<|user|>Hi<|end|>", parse));
    assert_ne!(phi.encode("<s>\nHi", parse), phi.encode("<s>Hi", parse));
}

#[test]
fn stories260k_reads_ids_of_minus_one_as_none() {
    let Some(path) = shared_data("models/stories260K.gguf") else { return };
    let stories = load(&path);
    assert_eq!((stories.vocab_size(), stories.bos(), stories.eos()), (512, Some(1), Some(2)));
    assert_eq!((stories.pad(), stories.sep()), (None, None));
    let text = "Once upon a time, there was a 狐 named Lily.\n";
    let ids = stories.encode(text, EncodeOptions { add_special: true, parse_special: false });
    assert_eq!(ids.first(), Some(&1));
    assert_eq!(stories.decode(&ids[1..]), text);
}

#[test]
fn long_inputs_take_no_quadratic_time() {
    // This test ending is the check: quadratic merges of the longest word, the worst case of both algorithms, would take
    // an hour. The other texts reach other loops (word splitting, white space, bytes, special tokens), at some seconds of
    // quadratic work each.
    const LONGEST: usize = 512 << 10;
    const LONG: usize = 64 << 10;
    for name in ["llama-spm", "llama-bpe", "gpt-2"] {
        let Some(path) = shared_data(&format!("vocab/ggml-vocab-{name}.gguf")) else { return };
        let tokenizer = load(&path);
        for unit in ["a", " ", "\n", "ab ", "🦙", "<|eot_id|"] {
            let worst = unit == "a" && name != "gpt-2";
            let text = unit.repeat(if worst { LONGEST } else { LONG } / unit.len());
            let ids = tokenizer.encode(&text, PLAIN);
            assert_eq!(tokenizer.decode(&ids), text, "{name} {unit:?}");
        }
    }
}
