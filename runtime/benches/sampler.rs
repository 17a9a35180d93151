//! Drawing a token from the logits of 128,256, in each way that there is, beside what reading them once takes.
//!
//! `cargo bench -p lory-runtime --bench sampler [-- FILTER]`, a filter is `flat` or `top-p`. Flat logits are those of random weights: nearly all
//! tokens are worth a thought. Peaked ones are as likely as words are by Zipf's law. One thread, as in the engine.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput};
use lory_kernels::{ceilings::Ceilings, cpu::ThreadPool};
use lory_runtime::{
    random_tokens,
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
    criterion.final_summary();
}
