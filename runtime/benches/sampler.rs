//! Drawing a token from the logits of 128,256, in each way that there is, beside what reading them once takes; and a step of an engine in which 32
//! sequences do so, of a model that is little else than its vocabulary.
//!
//! `cargo bench -p lory-runtime --bench sampler [-- FILTER]`, a filter is `flat`, `top-p` or `32 sequences`. Flat logits are those of random weights:
//! nearly all tokens are worth a thought. Peaked ones are as likely as words are by Zipf's law. One thread; steps with one, and with those of
//! all cores.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput};
use lory_kernels::{
    ceilings::Ceilings,
    cpu::{ThreadPool, physical_cores},
};
use lory_models::synth::{self, FileType};
use lory_runtime::{
    Engine, EngineOptions, Event, Request, SessionOptions, random_tokens,
    sampler::{DryBreakers, Sampler, SamplerOptions},
};

/// Llama 3's.
const VOCABULARY: usize = 128_256;

/// Numbers in 0..1, the same every time.
fn noise() -> impl Iterator<Item = f32> {
    random_tokens(1, VOCABULARY, 1 << 24).into_iter().map(|x| x as f32 / (1 << 24) as f32)
}

fn flat() -> Vec<f32> {
    noise().map(|x| 4.0 * x - 2.0).collect()
}

fn peaked() -> Vec<f32> {
    // The logarithm of 1/rank, with ranks dealt to tokens by the noise.
    noise().map(|x| -1.1 * (1.0 + x * VOCABULARY as f32).ln()).collect()
}

fn ways() -> Vec<(&'static str, SamplerOptions)> {
    let all = SamplerOptions { top_k: 0, top_p: 1.0, min_p: 0.0, seed: Some(1), ..Default::default() };
    let default = SamplerOptions { seed: Some(1), ..Default::default() };
    vec![
        ("greedy", SamplerOptions { temp: 0.0, ..all.clone() }),
        ("as lory run draws", default.clone()),
        ("log-probabilities of 5", SamplerOptions { logprobs: Some(5), ..default }),
        ("everything", all.clone()),
        ("min-p 0.05", SamplerOptions { min_p: 0.05, ..all.clone() }),
        ("top-p 0.95", SamplerOptions { top_p: 0.95, ..all.clone() }),
        ("typical 0.95", SamplerOptions { typical_p: 0.95, ..all.clone() }),
        ("mirostat 2", SamplerOptions { mirostat: Some(Default::default()), ..all }),
    ]
}

/// Sequences of the engine.
const SEQUENCES: usize = 32;

/// A model with one narrow layer.
fn engine(folder: &std::path::Path, threads: usize) -> Engine {
    let path = folder.join("narrow.gguf");
    if !path.exists() {
        let mut shape = synth::shape("llama-1b").expect("a shape").clone();
        (shape.layers, shape.d_model, shape.d_ff) = (1, 128, 128);
        (shape.heads, shape.kv_heads, shape.head_dim) = (2, 2, 64);
        assert_eq!(shape.vocab, VOCABULARY);
        let ty = FileType::from_name("Q8_0").expect("a type");
        let bytes = synth::model(&shape, ty, 1, Vec::new(), |_| ()).expect("a model in memory");
        std::fs::write(&path, bytes).expect("room for 20 MB");
    }
    let options = EngineOptions { threads: Some(threads), n_ctx: Some(512), ..EngineOptions::default() };
    Engine::open(&path, &options).expect("a model")
}

/// How long `steps` steps of all sequences take.
fn decode(engine: &Engine, options: &SamplerOptions, steps: usize) -> Duration {
    let mut sessions: Vec<_> =
        (0..SEQUENCES).map(|_| engine.session(&SessionOptions::default()).expect("a session")).collect();
    let mut answers: Vec<_> = (0..)
        .zip(&mut sessions)
        .map(|(i, session)| {
            let sampler = SamplerOptions { seed: Some(i.into()), ..options.clone() };
            let tokens = vec![1 + i];
            let max_new_tokens = steps + 1;
            let request = Request { tokens, max_new_tokens, sampler, ignore_eos: true, ..Request::default() };
            session.generate(request).expect("an answer")
        })
        .collect();
    let mut turn = || {
        for answer in &mut answers {
            while !matches!(answer.next().expect("a token").expect("no error"), Event::Token { .. }) {}
        }
    };
    turn();
    let start = Instant::now();
    (0..steps).for_each(|_| turn());
    start.elapsed()
}

fn steps(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder");
    let mut group = criterion.benchmark_group(format!("{SEQUENCES} sequences"));
    for threads in std::collections::BTreeSet::from([1, physical_cores()]) {
        let engine = engine(folder.path(), threads);
        for (name, options) in ways() {
            // A context is 512 tokens long.
            let steps = |n: u64| {
                let stretches = (0..n).step_by(256).map(|done| (n - done).min(256) as usize);
                stretches.map(|steps| decode(&engine, &options, steps)).sum()
            };
            group.bench_function(format!("{threads} threads, {name}"), |b| b.iter_custom(steps));
        }
    }
    group.finish();
}

fn main() {
    let read = Ceilings::measure(&ThreadPool::new(1), Duration::from_millis(300)).read;
    let once = (4 * VOCABULARY) as f64 / read / 1e3;
    println!("reading {VOCABULARY} logits once from memory: {once:.0} us at {read:.1} GB/s, one thread");
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    for (shape, logits) in [("flat", flat()), ("peaked", peaked())] {
        let mut group = criterion.benchmark_group(shape);
        group.throughput(Throughput::Bytes(4 * VOCABULARY as u64));
        for (name, options) in ways() {
            let mut sampler =
                Sampler::with_breakers(&options, DryBreakers::default()).expect("options in range");
            group.bench_function(name, |b| {
                b.iter_batched_ref(
                    || logits.clone(),
                    |logits| black_box(sampler.sample(logits).expect("finite logits")),
                    BatchSize::LargeInput,
                )
            });
        }
        group.finish();
    }
    steps(&mut criterion);
    criterion.final_summary();
}
