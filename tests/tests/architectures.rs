//! Every architecture against an independent implementation: tiny random models, logits and
//! greedy continuations from transformers (`tests/fixtures/make_models.py`).

use lory_kernels::{
    Backend,
    backend::KvType,
    cpu::{Cpu, Isa},
    ops::Reference,
};
use lory_models::{arch::Arch, config::Config, decoder::Decoder};
use lory_tests::{
    fixtures::{self, relative_error},
    runner::Runner,
};

/// F32 weights and cache on both sides; what differs is the order of sums.
const LOGITS_BOUND: f32 = 1e-3;

fn matches_transformers<B: Backend>(backend: &B) {
    for name in fixtures::model_names() {
        let f = fixtures::model(&name);
        let decoder = Decoder::load(&f.gguf, f.n_ctx).unwrap_or_else(|e| panic!("{e}"));
        let vocab = decoder.vocab_size();
        for batch in [f.tokens.len(), 7, 1] {
            let got = Runner::new(backend, &decoder, batch, KvType::F32).logits(&f.tokens);
            for (i, (got, want)) in got.chunks(vocab).zip(f.logits.chunks(vocab)).enumerate() {
                let error = relative_error(got, want);
                assert!(error <= LOGITS_BOUND, "{name}, batch {batch}, position {i}: error {error}");
            }
            assert_eq!(got.len(), f.logits.len(), "{name}");
        }
        let greedy = Runner::new(backend, &decoder, 64, KvType::F32).greedy(&f.tokens, f.greedy.len());
        assert_eq!(greedy, f.greedy, "{name}");
    }
}

#[test]
fn reference_matches_transformers() {
    matches_transformers(&Reference);
}

#[test]
fn cpu_matches_transformers_at_every_level() {
    for isa in Isa::available() {
        matches_transformers(&Cpu::new(Some(2), isa));
    }
}

#[test]
fn every_architecture_has_a_fixture() {
    let covered: Vec<Arch> = fixtures::model_names()
        .iter()
        .map(|name| Config::from_metadata(fixtures::model(name).gguf.metadata(), 64).expect("a model").arch)
        .collect();
    for arch in Arch::ALL {
        assert!(covered.contains(&arch), "{arch} has no fixture");
    }
}
