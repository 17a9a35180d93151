//! What a call through C costs beside the same call in Rust, and that it gives the same. `cargo bench -p lory-ffi`.

use std::{hint::black_box, path::Path, ptr::null};

use criterion::{Criterion, criterion_group, criterion_main};
use lory::{
    engine::lory_engine_free,
    memory::{lory_text, lory_text_free, lory_tokens, lory_tokens_free},
    open::lory_engine_open,
    session::{lory_session_free, lory_session_is_mixed, lory_session_new},
    tokenizer::{lory_detokenize, lory_token_is_end, lory_tokenize},
};
use lory_models::tokenizer::EncodeOptions;
use lory_runtime::{Engine, EngineOptions, SessionOptions};

fn overhead(bench: &mut Criterion) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models/llama.gguf");
    let rust = Engine::open(&path, &EngineOptions::default()).expect("a fixture");
    let tokenizer = rust.model().tokenizer.clone();
    let session = rust.session(&SessionOptions::default()).expect("a session");
    let path = path.to_str().expect("UTF-8");
    let (mut c, mut s) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: pointers to what lives during the call; handles are alive; so everywhere below.
    unsafe {
        assert_eq!(lory_engine_open(path.as_ptr().cast(), path.len(), null(), &mut c) as i32, 0);
        assert_eq!(lory_session_new(c, null(), &mut s) as i32, 0);
    }

    let mut group = bench.benchmark_group("token_is_end");
    group.bench_function("rust", |b| b.iter(|| tokenizer.is_eog(black_box(3))));
    let mut ends = -1;
    // SAFETY: as above.
    group.bench_function("c", |b| b.iter(|| unsafe { lory_token_is_end(c, black_box(3), &mut ends) }));
    group.finish();
    assert_eq!(ends, i32::from(tokenizer.is_eog(3)));

    let mut group = bench.benchmark_group("session_is_mixed");
    group.bench_function("rust", |b| b.iter(|| session.is_mixed()));
    let mut mixed = -1;
    // SAFETY: as above.
    group.bench_function("c", |b| b.iter(|| unsafe { lory_session_is_mixed(s, &mut mixed) }));
    group.finish();
    assert_eq!(mixed, i32::from(session.is_mixed()));

    let text = "Once upon a time there was a small cat";
    let tokens = tokenizer.encode(text, EncodeOptions::default());
    let mut out = lory_tokens { data: std::ptr::null_mut(), len: 0 };
    let mut words = lory_text { data: std::ptr::null_mut(), len: 0 };
    // SAFETY: as above; what a call gave has its length until it is freed.
    unsafe {
        assert_eq!(lory_tokenize(c, text.as_ptr().cast(), text.len(), 0, &mut out) as i32, 0);
        assert_eq!(std::slice::from_raw_parts(out.data, out.len), tokens);
        assert_eq!(lory_detokenize(c, out.data, out.len, 0, &mut words) as i32, 0);
        let bytes = std::slice::from_raw_parts(words.data.cast::<u8>(), words.len);
        assert_eq!(bytes, tokenizer.decode(&tokens).as_bytes());
        lory_tokens_free(&mut out);
        lory_text_free(&mut words);
    }
    let mut group = bench.benchmark_group("tokenize");
    group.bench_function("rust", |b| b.iter(|| tokenizer.encode(black_box(text), EncodeOptions::default())));
    group.bench_function("c", |b| {
        b.iter(|| {
            let mut out = lory_tokens { data: std::ptr::null_mut(), len: 0 };
            // SAFETY: as above.
            unsafe {
                lory_tokenize(c, black_box(text).as_ptr().cast(), text.len(), 0, &mut out);
                lory_tokens_free(&mut out);
            }
        })
    });
    group.finish();

    let mut group = bench.benchmark_group("detokenize");
    group.bench_function("rust", |b| b.iter(|| tokenizer.decode(black_box(&tokens))));
    group.bench_function("c", |b| {
        b.iter(|| {
            let mut out = lory_text { data: std::ptr::null_mut(), len: 0 };
            // SAFETY: as above.
            unsafe {
                lory_detokenize(c, black_box(&tokens).as_ptr(), tokens.len(), 0, &mut out);
                lory_text_free(&mut out);
            }
        })
    });
    group.finish();
    // SAFETY: freed once.
    unsafe {
        lory_session_free(s);
        lory_engine_free(c);
    }
}

criterion_group!(benches, overhead);
criterion_main!(benches);
