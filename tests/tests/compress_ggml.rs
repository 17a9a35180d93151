//! A compressed collection, its adapters extracted again, and llama.cpp running what was extracted.
#![cfg(feature = "ggml")]

use std::{path::Path, sync::Arc, sync::atomic::AtomicBool};

use lory_compress::{
    Collection, Kind, Options, Silent, Source, Storage, Synthetic, compress, extract, open_pack, read_file,
};
use lory_kernels::{QuantType, backend::KvType, ops::Reference};
use lory_models::{
    adapter::{Adapter, AdapterSet, BaseInfo, gguf_lora},
    decoder::Decoder,
};
use lory_runtime::{Engine, EngineOptions, Event, Request, SamplerOptions, SessionOptions};
use lory_tests::{
    fixtures::{self, fixture, gguf, relative_error},
    llama_cpp::LlamaCpp,
    runner::Runner,
};

static GO_ON: AtomicBool = AtomicBool::new(false);

const ADAPTERS: usize = 200;
const NEW_TOKENS: usize = 8;

/// Packs 200 adapters of a fixture model; names and extracted files of some of them.
fn packed(model: &str, storage: Storage, dir: &Path) -> Vec<(String, std::path::PathBuf)> {
    let f = fixtures::model(model);
    let base = BaseInfo::from_gguf(&f.gguf).expect("a base");
    let adapters = dir.join("adapters");
    let synthetic = Synthetic::new(ADAPTERS, 4, Kind::Shared, 1);
    synthetic.write(&base, &adapters, &Silent, &GO_ON).expect("adapters");
    let sources = Source::find(&[adapters]).expect("adapters");
    let collection =
        Collection::open(base.clone(), Some(&f.gguf), &sources, dir, &Silent, &GO_ON).expect("a collection");
    let options = Options { rank: Some(8), clusters: Some(4), storage, ..Options::default() };
    let path = dir.join("pack.gguf");
    let report = compress(&collection, &options, &path, &Silent, &GO_ON).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(report.adapters, ADAPTERS);
    let pack = open_pack(&path, &read_file).unwrap_or_else(|e| panic!("{e}"));
    let one = |i: usize| {
        let name = Synthetic::name(i);
        let file = dir.join(format!("{name}.extracted.gguf"));
        extract(&pack, &name, &base, QuantType::F32, &file).unwrap_or_else(|e| panic!("{e}"));
        (name, file)
    };
    [0, 57, 121, 199].map(one).to_vec()
}

/// Logits of the plain implementation, in f32 throughout.
fn reference(model: &str, adapter: Arc<Adapter>) -> Vec<f32> {
    let f = fixtures::model(model);
    let decoder = Decoder::load(&f.gguf, f.n_ctx).expect("a decoder");
    let set = AdapterSet::new(vec![(adapter, 1.0)]).expect("a set");
    Runner::new(&Reference, &decoder, 64, KvType::F32).with_adapters(set).logits(&f.tokens)
}

#[test]
fn llama_cpp_runs_the_extracted_adapter_as_we_run_the_pack() {
    // A fused base too: there q, k and v of the extracted file are one pair of joined rank.
    for model in ["llama", "qwen2", "phi3"] {
        let dir = tempfile::tempdir().expect("a folder");
        // Halves keep the arithmetic in floats on both sides; integer bases round the activations too.
        let storage = Storage { basis: QuantType::F16, core: QuantType::F16 };
        let f = fixtures::model(model);
        let base = BaseInfo::from_gguf(&f.gguf).expect("a base");
        let mut oracle = LlamaCpp::load(&fixture(&format!("models/{model}.gguf")), 256);
        let plain = oracle.logits(&f.tokens);
        assert!(relative_error(&f.logits, &plain) < 1e-5, "{model}: the oracle itself");
        let chosen = packed(model, storage, dir.path());
        let pack = open_pack(&dir.path().join("pack.gguf"), &read_file).unwrap_or_else(|e| panic!("{e}"));
        for (name, file) in chosen {
            oracle.set_lora(&file);
            let want = oracle.logits(&f.tokens);
            let moved = relative_error(&plain, &want);
            assert!(moved > 0.01, "{model}, {name}: an adapter that does nothing proves nothing: {moved}");
            let lora = gguf_lora::load(&name, &gguf(&file), &base).unwrap_or_else(|e| panic!("{e}"));
            let extracted = relative_error(&reference(model, Arc::new(lora)), &want);
            assert!(extracted < 1e-5, "{model}, {name}: extracted {extracted}");
            let shared = reference(model, pack.adapter(&name).expect("packed"));
            let shared = relative_error(&shared, &want);
            assert!(shared < 1e-5, "{model}, {name}: from the pack {shared}");
            println!("{model}, {name}: extracted {extracted:.1e}, pack {shared:.1e}, moved {moved:.2}");
        }
    }
}

#[test]
fn the_engine_says_from_the_pack_what_llama_cpp_says_with_the_extracted_file() {
    for (storage, bound) in [
        (Storage { basis: QuantType::F16, core: QuantType::F16 }, 2e-5),
        // The default format: the shrink's input is rounded to eight bits on our side alone.
        (Storage::default(), 2e-2),
    ] {
        let dir = tempfile::tempdir().expect("a folder");
        let f = fixtures::model("llama");
        let model = fixture("models/llama.gguf");
        let mut oracle = LlamaCpp::load(&model, 256);
        let settings = EngineOptions {
            threads: Some(2),
            n_ctx: Some(256),
            kv_type: KvType::F32,
            ..EngineOptions::default()
        };
        let engine = Engine::open(&model, &settings).unwrap_or_else(|e| panic!("{e}"));
        let chosen = packed("llama", storage, dir.path());
        engine.adapters().open_pack(&dir.path().join("pack.gguf")).unwrap_or_else(|e| panic!("{e}"));
        for (name, file) in chosen {
            oracle.set_lora(&file);
            let id = engine.adapters().resolve(&name).unwrap_or_else(|e| panic!("{e}"));
            let options = SessionOptions { adapters: vec![(id, 1.0)], ..SessionOptions::default() };
            let mut session = engine.session(&options).unwrap_or_else(|e| panic!("{e}"));
            let request = Request {
                tokens: f.tokens.clone(),
                max_new_tokens: NEW_TOKENS,
                prompt_logits: true,
                sampler: SamplerOptions::greedy(),
                ignore_eos: true,
                ..Request::default()
            };
            let (mut logits, mut said) = (Vec::new(), Vec::new());
            let mut generation = session.generate(request).unwrap_or_else(|e| panic!("{e}"));
            while let Some(event) = generation.next() {
                match event.unwrap_or_else(|e| panic!("{e}")) {
                    Event::Logits { values, .. } => logits.extend_from_slice(&values),
                    Event::Token { id, .. } => said.push(id),
                    _ => {}
                }
            }
            let error = relative_error(&logits, &oracle.logits(&f.tokens));
            assert!(error < bound, "{name}: {error}");
            println!("{storage:?}, {name}: {error:.1e}");
            if bound < 1e-3 {
                assert_eq!(said, oracle.greedy(&f.tokens, NEW_TOKENS), "{name}");
            }
        }
    }
}
