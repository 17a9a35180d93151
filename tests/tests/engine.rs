//! The engine as its users see it: sessions, streams, adapters, many at once.

use lory_kernels::backend::KvType;
use lory_models::synth;
use lory_runtime::{
    Engine, EngineOptions, Event, FinishReason, OnSwitch, Repacking, Request, SamplerOptions, Session,
    SessionOptions,
};
use lory_tests::fixtures::{self, fixture, shared_data};

fn options() -> EngineOptions {
    EngineOptions { threads: Some(2), n_ctx: Some(256), kv_type: KvType::F32, ..EngineOptions::default() }
}

fn llama(options: &EngineOptions) -> Engine {
    Engine::open(&fixture("models/llama.gguf"), options).unwrap_or_else(|e| panic!("{e}"))
}

fn greedy(tokens: &[u32], n: usize) -> Request {
    Request {
        tokens: tokens.to_vec(),
        max_new_tokens: n,
        sampler: SamplerOptions::greedy(),
        ignore_eos: true,
        ..Request::default()
    }
}

fn answer(session: &mut Session, tokens: &[u32], n: usize) -> Vec<u32> {
    let events = session.generate(greedy(tokens, n)).unwrap_or_else(|e| panic!("{e}"));
    events
        .filter_map(|event| match event.unwrap_or_else(|e| panic!("{e}")) {
            Event::Token { id, .. } => Some(id),
            _ => None,
        })
        .collect()
}

#[test]
fn published_stories_continuation() {
    let Some(path) = shared_data("models/stories260K.gguf") else { return };
    let want =
        std::fs::read_to_string(path.with_file_name("stories260K.expected-greedy-200.txt")).expect("beside");
    for (threads, n_batch) in [(1, 1), (2, 64)] {
        let options = EngineOptions { threads: Some(threads), n_batch, ..EngineOptions::default() };
        let engine = Engine::open(&path, &options).unwrap_or_else(|e| panic!("{e}"));
        let mut session = engine.session(&SessionOptions::default()).expect("a session");
        let tokens = engine.model().encode_prompt("");
        let text = session.generate(greedy(&tokens, 200)).and_then(|mut g| g.text()).expect("an answer");
        assert_eq!(text.trim_end(), want.trim_end(), "{threads} threads, batch {n_batch}");
    }
}

#[test]
fn repacked_weights_answer_the_same() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["Q4_0", "Q4_K_M"] {
        let path = dir.path().join(format!("{name}.gguf"));
        let shape = synth::shape("llama-tiny").expect("the tiny shape");
        let file_type = synth::FileType::from_name(name).expect("a type");
        std::fs::write(&path, synth::model(shape, file_type, 1, Vec::new(), |_| ()).expect("a model"))
            .unwrap();
        let run = |repacking| {
            let options = EngineOptions { repacking, ..options() };
            let engine = Engine::open(&path, &options).unwrap_or_else(|e| panic!("{e}"));
            let scores = engine.session(&SessionOptions::default()).and_then(|mut session| {
                let request = greedy(&[1, 5, 9, 70, 33, 8, 2, 4, 4, 11], 12);
                let events = session.generate(request)?.collect::<Result<Vec<_>, _>>()?;
                Ok(format!("{events:?}"))
            });
            (scores.unwrap_or_else(|e| panic!("{e}")), engine.repacked_bytes())
        };
        let (mapped, none) = run(Repacking::Off);
        let (repacked, bytes) = run(Repacking::On);
        assert_eq!(mapped, repacked, "{name}");
        assert_eq!(none, 0);
        assert!(bytes > std::fs::metadata(&path).unwrap().len() as usize / 3, "{name}: only {bytes} bytes");
    }
}

#[test]
fn sessions_answer_as_transformers_does() {
    let f = fixtures::model("llama");
    for n_batch in [1, 5, 64] {
        let engine = llama(&EngineOptions { n_batch, ..options() });
        let mut session = engine.session(&SessionOptions::default()).expect("a session");
        assert_eq!(answer(&mut session, &f.tokens, f.greedy.len()), f.greedy, "batch {n_batch}");
    }
}

#[test]
fn a_conversation_continues_from_its_cache() {
    let f = fixtures::model("llama");
    let engine = llama(&options());
    let mut session = engine.session(&SessionOptions::default()).expect("a session");
    let first = answer(&mut session, &f.tokens, 10);
    let second = answer(&mut session, &[], 14);
    assert_eq!([first, second].concat(), f.greedy);
    assert_eq!(session.tokens(), [f.tokens.clone(), f.greedy.clone()].concat());

    session.rewind(f.tokens.len());
    assert_eq!(answer(&mut session, &[], 24), f.greedy, "after rewinding");
}

#[test]
fn forks_share_a_beginning_and_go_their_own_ways() {
    let f = fixtures::model("llama");
    let engine = llama(&options());
    let mut session = engine.session(&SessionOptions::default()).expect("a session");
    answer(&mut session, &f.tokens, 3);
    let mut fork = session.fork();
    let other = answer(&mut fork, &[5, 6, 7], 8);
    assert_eq!(answer(&mut session, &[], 21), f.greedy[3..], "the original");

    let mut alone = engine.session(&SessionOptions::default()).expect("a session");
    let tokens = [&f.tokens[..], &f.greedy[..3], &[5, 6, 7]].concat();
    assert_eq!(answer(&mut alone, &tokens, 8), other, "the fork");
}

#[test]
fn threads_share_one_engine() {
    let f = fixtures::model("llama");
    let engine = llama(&EngineOptions { n_batch: 8, ..options() });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (engine, f) = (engine.clone(), &f);
            scope.spawn(move || {
                for _ in 0..3 {
                    let mut session = engine.session(&SessionOptions::default()).expect("a session");
                    assert_eq!(answer(&mut session, &f.tokens, f.greedy.len()), f.greedy);
                }
            });
        }
    });
    assert_eq!(engine.kv_usage().0, 0, "every page was given back");
}

#[test]
fn a_full_cache_evicts_idle_sessions_and_refuses_what_cannot_fit() {
    let f = fixtures::model("llama");
    let engine = llama(&EngineOptions { kv_tokens: Some(64), ..options() });
    let mut sessions: Vec<_> =
        (0..4).map(|_| engine.session(&SessionOptions::default()).expect("a session")).collect();
    for session in &mut sessions {
        assert_eq!(answer(session, &f.tokens, 10), f.greedy[..10]);
    }
    // The first was evicted for the others; it is run again, with the same result.
    assert_eq!(sessions[0].cached_tokens(), 0);
    assert_eq!(answer(&mut sessions[0], &[], 14), f.greedy[10..]);

    let long: Vec<u32> = (0..100).map(|i| i % 50).collect();
    let error = sessions[1].generate(greedy(&long, 4)).expect("accepted").find_map(Result::err);
    let text = error.expect("a refusal").to_string();
    assert!(text.contains("KV cache is full"), "{text}");
    assert_eq!(answer(&mut sessions[2], &[], 14), f.greedy[10..], "others go on");
}

#[test]
fn requests_that_cannot_run_are_refused() {
    let engine = llama(&options());
    let mut session = engine.session(&SessionOptions::default()).expect("a session");
    let mut refusal = |request| session.generate(request).map(|_| ()).expect_err("a refusal").to_string();
    assert!(refusal(greedy(&[], 1)).contains("no token"));
    assert!(refusal(greedy(&[4_000_000], 1)).contains("4000000"));
    assert!(refusal(greedy(&[1; 257], 1)).contains("257"));
    assert!(session.tokens().is_empty(), "a refused request leaves nothing");
    for (n_ctx, n_batch, word) in [(0, 8, "context"), (8, 0, "batch")] {
        let options = EngineOptions { n_ctx: Some(n_ctx), n_batch, ..options() };
        let error = Engine::open(&fixture("models/llama.gguf"), &options).map(|_| ()).expect_err("refused");
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[test]
fn the_context_ends_a_generation() {
    let engine = llama(&EngineOptions { n_ctx: Some(24), ..options() });
    let f = fixtures::model("llama");
    let mut session = engine.session(&SessionOptions::default()).expect("a session");
    let mut generation = session.generate(greedy(&f.tokens, 100)).expect("accepted");
    let n = generation.by_ref().count();
    assert_eq!(generation.finish_reason(), Some(FinishReason::ContextFull));
    assert_eq!(n, 24 - f.tokens.len());
}

#[test]
fn a_cancelled_generation_ends_and_the_session_lives_on() {
    let f = fixtures::model("llama");
    let engine = llama(&options());
    let mut session = engine.session(&SessionOptions::default()).expect("a session");
    let mut generation = session.generate(greedy(&f.tokens, 100)).expect("accepted");
    let canceller = generation.canceller();
    generation.next().expect("a token").expect("no error");
    canceller.cancel();
    assert_eq!(generation.by_ref().filter(|e| matches!(e, Ok(Event::Token { .. }))).count(), 0);
    assert_eq!(generation.finish_reason(), Some(FinishReason::Cancelled));
    drop(generation);
    session.rewind(f.tokens.len());
    assert_eq!(answer(&mut session, &[], 24), f.greedy);
}

#[test]
fn prompt_logits_are_the_references() {
    let f = fixtures::model("llama");
    let engine = llama(&EngineOptions { n_batch: 9, ..options() });
    let mut session = engine.session(&SessionOptions::default()).expect("a session");
    let request = Request { prompt_logits: true, ..greedy(&f.tokens, 0) };
    let mut got = Vec::new();
    for event in session.generate(request).expect("accepted") {
        if let Event::Logits { position, values } = event.expect("no error") {
            assert_eq!(position * values.len(), got.len(), "in order");
            got.extend(values);
        }
    }
    assert!(fixtures::relative_error(&got, &f.logits) < 1e-3);
}

/// Logits of every one of `tokens` in a new session.
fn logits(engine: &Engine, adapters: Vec<(lory_runtime::AdapterId, f32)>, tokens: &[u32]) -> Vec<f32> {
    let mut session = engine.session(&SessionOptions { adapters, priority: 0 }).expect("a session");
    let request = Request { prompt_logits: true, ..greedy(tokens, 0) };
    let mut got = Vec::new();
    for event in session.generate(request).expect("accepted") {
        if let Event::Logits { values, .. } = event.expect("no error") {
            got.extend(values);
        }
    }
    got
}

/// An activated LoRA works from the last of two invocations on, as PEFT computes it.
#[test]
fn activated_lora_logits_are_pefts() {
    let folder = fixture("peft/activated");
    let index = std::fs::read_to_string(fixture("peft/index.json")).expect("the fixtures are committed");
    let index: serde_json::Value = serde_json::from_str(&index).expect("JSON");
    let token = |v: &serde_json::Value| v.as_u64().and_then(|t| u32::try_from(t).ok()).expect("a token");
    let tokens: Vec<u32> =
        index["activated"]["tokens"].as_array().expect("tokens").iter().map(token).collect();
    let want = fixtures::npy(&folder.join("logits.npy"));

    let engine = llama(&EngineOptions { n_batch: 11, ..options() });
    let id = engine.adapters().load_lora(&folder, None).expect("a PEFT folder");
    let got = logits(&engine, vec![(id, 1.0)], &tokens);
    let error = fixtures::relative_error(&got, &want);
    assert!(error < 1e-3, "{error}");
    let invocation = engine.adapters().info("activated").expect("loaded").invocation;
    let last = tokens.windows(invocation.len()).rposition(|w| w == invocation).expect("invoked");
    let first = tokens.windows(invocation.len()).position(|w| w == invocation).expect("invoked");
    assert!(first < last);
    // Before it the base, bit for bit; behind it something else.
    let (plain, vocab) = (logits(&engine, vec![], &tokens), want.len() / tokens.len());
    assert_eq!(got[..last * vocab], plain[..last * vocab]);
    assert!(fixtures::relative_error(&got[last * vocab..], &plain[last * vocab..]) > 0.02);
}

fn with_lora(engine: &Engine, adapters: &[(&str, f32)]) -> Vec<(lory_runtime::AdapterId, f32)> {
    let id = |name: &str| {
        let store = engine.adapters();
        store.resolve(name).or_else(|_| store.load_lora(&fixture(&format!("lora/{name}.gguf")), None))
    };
    adapters.iter().map(|(name, scale)| (id(name).unwrap_or_else(|e| panic!("{e}")), *scale)).collect()
}

#[test]
fn lora_logits_are_the_references() {
    let f = fixtures::model("llama");
    let engine = llama(&options());
    let sets: [(&str, &[(&str, f32)]); 3] =
        [("attn", &[("attn", 1.0)]), ("all", &[("all", 1.0)]), ("both", &[("attn", 0.7), ("all", -0.4)])];
    for (name, set) in sets {
        let got = logits(&engine, with_lora(&engine, set), &f.tokens);
        let error = fixtures::relative_error(&got, &fixtures::npy(&fixture(&format!("lora/{name}.npy"))));
        assert!(error < 1e-3, "{name}: {error}");
    }
}

#[test]
fn switching_an_adapter_back_restores_the_answer() {
    let f = fixtures::model("llama");
    let engine = llama(&options());
    let all = with_lora(&engine, &[("all", 1.0)]);
    let fresh = |adapters: &[(lory_runtime::AdapterId, f32)]| {
        let options = SessionOptions { adapters: adapters.to_vec(), priority: 0 };
        answer(&mut engine.session(&options).expect("a session"), &f.tokens, 16)
    };
    let adapted = fresh(&all);
    assert_ne!(adapted, f.greedy[..16], "the adapter changes the answer");

    let mut session = engine.session(&SessionOptions::default()).expect("a session");
    assert_eq!(answer(&mut session, &f.tokens, 16), f.greedy[..16]);
    session.set_adapters(&all, OnSwitch::Recompute).expect("switched");
    session.rewind(f.tokens.len());
    assert_eq!(answer(&mut session, &[], 16), adapted, "as a fresh session with the adapter");
    session.set_adapters(&[], OnSwitch::Recompute).expect("switched back");
    session.rewind(f.tokens.len());
    assert_eq!(answer(&mut session, &[], 16), f.greedy[..16], "as before");

    session.set_adapters(&all, OnSwitch::Keep).expect("switched");
    assert!(session.is_mixed());
    let half = with_lora(&engine, &[("all", 0.5)]);
    session.set_adapters(&half, OnSwitch::Recompute).expect("another scale");
    assert!(!session.is_mixed());
    session.rewind(f.tokens.len());
    assert_eq!(session.cached_tokens(), 0, "a scale is part of the key");
    assert_eq!(answer(&mut session, &[], 16), fresh(&half));

    // Nothing is mixed where all of it is computed again, as a request's last token always is.
    session.rewind(1);
    session.set_adapters(&all, OnSwitch::Keep).expect("switched");
    assert!(session.is_mixed());
    answer(&mut session, &[], 1);
    assert!(!session.is_mixed());
}

#[test]
fn different_adapters_in_one_batch_answer_as_alone() {
    let f = fixtures::model("llama");
    let engine = llama(&EngineOptions { n_batch: 48, ..options() });
    let sets = [
        vec![],
        with_lora(&engine, &[("attn", 1.0)]),
        with_lora(&engine, &[("all", 1.0)]),
        with_lora(&engine, &[("attn", 0.7), ("all", -0.4)]),
    ];
    let session = |adapters: &Vec<_>| {
        engine.session(&SessionOptions { adapters: adapters.clone(), priority: 0 }).expect("a session")
    };
    let alone: Vec<_> = sets.iter().map(|set| answer(&mut session(set), &f.tokens, 12)).collect();

    let mut together: Vec<_> = sets.iter().map(session).collect();
    let mut streams: Vec<_> =
        together.iter_mut().map(|s| s.generate(greedy(&f.tokens, 12)).expect("accepted")).collect();
    for (stream, alone) in streams.iter_mut().zip(&alone) {
        let ids: Vec<u32> = stream
            .filter_map(|e| match e.expect("no error") {
                Event::Token { id, .. } => Some(id),
                _ => None,
            })
            .collect();
        assert_eq!(&ids, alone);
    }
}
