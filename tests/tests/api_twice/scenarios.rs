//! What both must do alike.

use std::{fs, path::Path};

use lory_tests::{
    c_api as c, engines,
    fixtures::{self, fixture},
};

use crate::{About, Answer, Api, Ask, Result};

fn llama<A: Api>() -> A {
    A::open(&fixture("models/llama.gguf"), 64).unwrap_or_else(|e| panic!("{e}"))
}

fn greedy(tokens: &[u32], n: usize) -> Ask<'_> {
    Ask { tokens, n, ..Ask::default() }
}

pub fn answers_are_the_references<A: Api>() -> Vec<Answer> {
    let f = fixtures::model("llama");
    let run = |n_batch| {
        let engine = A::open(&fixture("models/llama.gguf"), n_batch).expect("opened");
        let mut session = engine.session(&[]).expect("a session");
        let answer = A::ask(&mut session, &greedy(&f.tokens, f.greedy.len())).expect("an answer");
        assert_eq!(answer.tokens, f.greedy);
        assert_eq!(answer.reason, c::LORY_FINISH_LENGTH);
        assert_eq!(engine.generated_tokens(), f.greedy.len() as u64);
        let (first, later) = engine.durations();
        assert_eq!((first.len(), first.iter().sum(), later), (17, 1, 1), "one request");
        answer
    };
    [1, 5, 64].map(run).into()
}

pub fn tokens_and_text<A: Api>() -> (Vec<u32>, String) {
    let engine = llama::<A>();
    let tokens = engine.tokenize("Once upon a tïme 🦙");
    assert_eq!(engine.detokenize(&tokens), "Once upon a tïme 🦙");
    assert_eq!(engine.detokenize(&[]), "");
    (tokens, engine.detokenize(&[1, 2, 3]))
}

pub fn chat_templates<A: Api>() -> Vec<Result<String>> {
    let open = |name: &str| A::open(&fixture(&format!("models/{name}.gguf")), 8).expect("opened");
    let all: Vec<_> = ["llama", "qwen3", "llama_tied"].map(|m| open(m).chat("user", "Hello")).into();
    assert!(all[0].as_ref().is_ok_and(|text| text.contains("Hello")), "{all:?}");
    all
}

pub fn conversations_continue_rewind_and_fork<A: Api>() {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let mut session = engine.session(&[]).expect("a session");
    let first = A::ask(&mut session, &greedy(&f.tokens, 10)).expect("an answer").tokens;
    let mut fork = A::fork(&mut session);
    for s in [&mut session, &mut fork] {
        let second = A::ask(s, &greedy(&[], 14)).expect("an answer").tokens;
        assert_eq!([&first[..], &second].concat(), f.greedy);
        assert_eq!(A::tokens(s), [&f.tokens[..], &f.greedy].concat());
        assert!(A::cached(s) >= f.tokens.len());
    }
    A::rewind(&mut session, f.tokens.len());
    assert_eq!(A::ask(&mut session, &greedy(&[], 24)).expect("an answer").tokens, f.greedy);
    let other: Vec<u32> = f.tokens[..3].iter().copied().chain([9, 9]).collect();
    assert_eq!(A::rewind_to_common(&mut session, &other), 3);
    assert_eq!(A::tokens(&mut session), f.tokens[..3]);
    drop(engine);
    assert_eq!(A::ask(&mut session, &greedy(&f.tokens[3..], 24)).expect("goes on").tokens, f.greedy);
}

pub fn adapters_come_change_and_go<A: Api>() -> (Vec<(String, u64)>, Vec<u32>, String) {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let attn = engine.load(&fixture("lora/attn.gguf"), "attn").expect("loaded");
    let all = engine.load(&fixture("lora/all.gguf"), "all").expect("loaded");
    assert_eq!(engine.resolve("attn"), Ok(attn));
    let listed = engine.adapters();
    assert_eq!(listed.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["all", "attn"]);

    let mut session = engine.session(&[(all, 1.0)]).expect("a session");
    let adapted = A::ask(&mut session, &greedy(&f.tokens, 16)).expect("an answer").tokens;
    assert_ne!(adapted, f.greedy[..16]);
    A::set_adapters(&mut session, &[], false).expect("switched");
    A::rewind(&mut session, 0);
    assert_eq!(A::ask(&mut session, &greedy(&f.tokens, 16)).expect("an answer").tokens, f.greedy[..16]);
    A::set_adapters(&mut session, &[(attn, 0.7), (all, -0.4)], true).expect("switched");
    assert!(A::is_mixed(&mut session));
    let mut own = A::session_adapters(&mut session);
    own.iter_mut().for_each(|a| a.3 = None);
    assert_eq!(own, [(attn, "attn".into(), 0.7, None), (all, "all".into(), -0.4, None)]);

    // In flight: the session keeps what it has, the number is refused to others.
    A::set_adapters(&mut session, &[(all, 1.0)], false).expect("switched");
    let newer = engine.replace(&fixture("lora/attn.gguf"), "all").expect("replaced");
    assert!(newer > all);
    A::rewind(&mut session, 0);
    assert_eq!(A::ask(&mut session, &greedy(&f.tokens, 16)).expect("an answer").tokens, adapted);
    let refused = engine.session(&[(all, 1.0)]).err().expect("it is gone");
    engine.unload("all").expect("unloaded");
    assert!(engine.resolve("all").is_err());
    (listed, adapted, refused)
}

pub fn sampling_repeats_with_its_seed<A: Api>() -> Answer {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let mut session = engine.session(&[]).expect("a session");
    let ask = Ask { temp: 1.3, top_p: Some(0.9), seed: 7, ..greedy(&f.tokens, 20) };
    let first = A::ask(&mut session, &ask).expect("an answer");
    A::rewind(&mut session, 0);
    assert_eq!(A::ask(&mut session, &ask).expect("an answer"), first);
    A::rewind(&mut session, 0);
    let other = A::ask(&mut session, &Ask { seed: 8, ..ask }).expect("an answer");
    assert_ne!(other.tokens, first.tokens);
    first
}

pub fn stop_texts_end_answers<A: Api>() -> Answer {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let mut session = engine.session(&[]).expect("a session");
    let whole = A::ask(&mut session, &greedy(&f.tokens, 24)).expect("an answer").text;
    let stop: String = whole.chars().skip(5).take(2).collect();
    A::rewind(&mut session, 0);
    let ask = Ask { stop: &["never in it", &stop], ..greedy(&f.tokens, 24) };
    let answer = A::ask(&mut session, &ask).expect("an answer");
    assert_eq!(answer.reason, c::LORY_FINISH_STOP);
    assert!(whole.starts_with(&answer.text) && !answer.text.contains(&stop));
    answer
}

pub fn logits_and_logprobs<A: Api>() -> Answer {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let mut session = engine.session(&[]).expect("a session");
    let ask = Ask { prompt_logits: true, logprobs: Some(3), ..greedy(&f.tokens, 4) };
    let answer = A::ask(&mut session, &ask).expect("an answer");
    assert!(fixtures::relative_error(&answer.logits, &f.logits) < 1e-3);
    assert_eq!(answer.logprobs.len(), 4);
    for ((p, top), id) in answer.logprobs.iter().zip(&f.greedy) {
        assert_eq!((top.len(), top[0]), (3, (*id, *p)), "greedy takes the likeliest");
    }
    answer
}

pub fn embeddings_and_scores<A: Api>() -> (Vec<f32>, Vec<f32>) {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let mut session = engine.session(&[]).expect("a session");
    let vector = A::embed(&mut session, &f.tokens).expect("a vector");
    let length: f32 = vector.iter().map(|v| v * v).sum();
    assert!((length - 1.0).abs() < 1e-5, "{length}");
    let scores = A::score(&mut session, &f.tokens, &[&f.greedy[..3], &[5, 6]]).expect("scores");
    assert_eq!(scores.len(), 5);
    assert!(scores.iter().all(|p| *p <= 0.0) && scores[0] > scores[3]);
    assert!(A::tokens(&mut session).is_empty(), "the session does not change");
    (vector, scores)
}

pub fn sessions_are_saved_and_restored<A: Api>() -> Vec<String> {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let attn = engine.load(&fixture("lora/attn.gguf"), "attn").expect("loaded");
    let mut session = engine.session(&[]).expect("a session");
    A::ask(&mut session, &greedy(&f.tokens, 10)).expect("an answer");
    let saved = A::save(&mut session).expect("saved");
    let other = llama::<A>();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("session");
    A::save_file(&mut session, &file).expect("saved");
    let mut restored = other.restore_file(&file).expect("restored");
    assert_eq!(A::ask(&mut restored, &greedy(&[], 14)).expect("an answer").tokens, f.greedy[10..]);
    let mut restored = other.restore(&saved, &[]).expect("restored");
    assert_eq!(A::tokens(&mut restored), A::tokens(&mut session));
    assert_eq!(A::cached(&mut restored), A::cached(&mut session));
    assert_eq!(A::ask(&mut restored, &greedy(&[], 14)).expect("an answer").tokens, f.greedy[10..]);

    let mut refusals = Vec::new();
    let mut refuse = |bytes: &[u8], adapters: &[(u64, f32)]| {
        refusals.push(engine.restore(bytes, adapters).err().expect("refused"));
    };
    refuse(&saved, &[(attn, 1.0)]);
    refuse(&[], &[]);
    for cut in [4, 40, saved.len() / 2, saved.len() - 1] {
        refuse(&saved[..cut], &[]);
    }
    let mut flipped = saved.clone();
    flipped[saved.len() / 2] ^= 16;
    refuse(&flipped, &[]);
    refusals
}

pub fn packs_open_change_and_close<A: Api>() -> (Vec<(String, u64)>, Answer, Vec<String>) {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pack.gguf");
    fs::write(&path, engines::pack(2)).expect("written");
    assert_eq!(engine.open_pack(&path), Ok(2));
    let waiting = engine.adapters();
    assert!(waiting.iter().all(|(_, bytes)| *bytes == 0), "{waiting:?}");
    let bytes = engine.prefetch(&["synth-00001"]).expect("brought in");
    let listed = engine.adapters();
    assert_eq!(listed, [("synth-00000".into(), 0), ("synth-00001".into(), bytes as u64)]);
    let id = engine.resolve("synth-00001").expect("brought in");
    let mut session = engine.session(&[(id, 1.0)]).expect("a session");
    let answer = A::ask(&mut session, &greedy(&f.tokens, 16)).expect("an answer");
    drop(session);

    let mut refusals = Vec::new();
    engine.set_budget(1);
    refusals.push(engine.prefetch(&["synth-00000"]).expect_err("no room"));
    engine.set_budget(0);
    assert_eq!(engine.prefetch(&["synth-00000"]), Ok(bytes), "as large as the other");
    refusals.push(engine.prefetch(&["nobody"]).expect_err("not there"));

    let beside = folder.path().join("beside.gguf");
    fs::write(&beside, engines::pack(4)).expect("written");
    fs::rename(&beside, &path).expect("replaced");
    assert_eq!(engine.reopen_pack(&path), Ok(4));
    assert_eq!(engine.adapters().len(), 4);
    engine.close_pack(&path).expect("open");
    assert!(engine.adapters().is_empty());
    assert!(engine.close_pack(&path).is_err() && engine.reopen_pack(&path).is_err());
    (listed, answer, refusals)
}

pub fn grammars_bind_answers<A: Api>() -> (Vec<Answer>, Vec<String>) {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let mut s = engine.session(&[]).expect("a session");
    let mut ask = |n, kind, grammar: &str| {
        A::rewind(&mut s, 0);
        engine.constrained(&mut s, &greedy(&f.tokens, n), kind, grammar)
    };
    let either = ask(64, c::LORY_GRAMMAR_GBNF, r#"root ::= "yes" | "no""#).expect("an answer");
    assert!(["yes", "no"].contains(&&*either.text), "{}", either.text);
    assert_eq!(either.reason, c::LORY_FINISH_STOP);
    let schema = r#"{"enum": ["left", "right"]}"#;
    let json = ask(64, c::LORY_GRAMMAR_JSON_SCHEMA, schema).expect("an answer");
    assert!([r#""left""#, r#""right""#].contains(&&*json.text), "{}", json.text);
    let refused = [
        ask(4, c::LORY_GRAMMAR_GBNF, "root ::= other"),
        ask(4, c::LORY_GRAMMAR_GBNF, "other ::= \"a\""),
        ask(4, c::LORY_GRAMMAR_GBNF, "root ::= ("),
        ask(4, c::LORY_GRAMMAR_JSON_SCHEMA, "{"),
        ask(4, c::LORY_GRAMMAR_JSON_SCHEMA, r#"{"enum": []}"#),
    ];
    (vec![either, json], refused.map(|r| r.expect_err("refused")).into())
}

pub fn sessions_run_in_the_same_steps<A: Api>() -> Vec<Answer> {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let attn = engine.load(&fixture("lora/attn.gguf"), "attn").expect("loaded");
    let all = engine.load(&fixture("lora/all.gguf"), "all").expect("loaded");
    let sets: [&[(u64, f32)]; 4] = [&[], &[(attn, 1.0)], &[(all, 0.5)], &[(attn, 0.7), (all, -0.4)]];
    let sessions = || sets.map(|set| engine.session(set).expect("a session"));
    let asks = [24, 20, 16, 1].map(|n| greedy(&f.tokens, n));
    let together = A::together(&mut sessions(), &asks).expect("answers");
    let alone = sessions()
        .iter_mut()
        .zip(&asks)
        .map(|(s, ask)| A::ask(s, ask).expect("an answer").tokens)
        .collect::<Vec<_>>();
    assert_eq!(together.iter().map(|a| &a.tokens).collect::<Vec<_>>(), alone.iter().collect::<Vec<_>>());
    assert_eq!(alone[0], f.greedy);
    together
}

pub fn a_thread_may_be_lent<A: Api>() -> Answer {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let mut session = engine.session(&[]).expect("a session");
    let answer = engine.driven(&mut session, &greedy(&f.tokens, 24)).expect("an answer");
    assert_eq!(answer.tokens, f.greedy);
    answer
}

pub fn prompts_are_looked_at<A: Api>() -> Answer {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let mut session = engine.session(&[]).expect("a session");
    let ask = Ask { prompt_logprobs: Some(2), hidden: true, ..greedy(&f.tokens, 1) };
    let answer = A::ask(&mut session, &ask).expect("an answer");
    let seen: Vec<_> = answer.prompt.iter().map(|(position, token, _)| (*position, *token)).collect();
    assert_eq!(seen, f.tokens.iter().copied().enumerate().skip(1).collect::<Vec<_>>());
    assert_eq!(answer.hidden.len(), f.tokens.len() * engine.about().n_embd as usize);
    assert_eq!(answer.counts, [0, f.tokens.len() as u64, 1]);
    answer
}

pub fn answers_are_cancelled<A: Api>() -> Answer {
    let f = fixtures::model("llama");
    let engine = llama::<A>();
    let mut session = engine.session(&[]).expect("a session");
    let ask = Ask { cancel_after: Some(3), ..greedy(&f.tokens, 24) };
    let answer = A::ask(&mut session, &ask).expect("an answer");
    assert_eq!((answer.reason, &answer.tokens[..]), (c::LORY_FINISH_CANCELLED, &f.greedy[..3]));
    let rest = A::ask(&mut session, &greedy(&[], 21)).expect("it goes on").tokens;
    assert_eq!(rest, f.greedy[3..]);
    answer
}

pub fn models_are_known<A: Api>() -> About {
    let about = llama::<A>().about();
    assert_eq!(about.architecture.as_deref(), Some("llama"));
    assert_eq!(about.file_bytes, fs::metadata(fixture("models/llama.gguf")).expect("a fixture").len());
    assert_eq!(about.missing, None);
    assert!(!about.device.is_empty() && about.metrics.len() > 10, "{about:?}");
    about
}

pub fn streams_give_whole_characters<A: Api>() -> Vec<String> {
    let engine = llama::<A>();
    let text = "Once upon a tïme 🦙";
    let tokens = engine.tokenize(text);
    let pieces = engine.stream(&tokens);
    assert_eq!((pieces.concat().as_str(), pieces.last().map(String::as_str)), (text, Some("")));
    let (_, cut) = tokens.split_last().expect("tokens");
    let pieces = engine.stream(cut);
    assert!(pieces.last().is_some_and(|rest| rest.starts_with('\u{fffd}')), "{pieces:?}");
    pieces
}

pub fn errors_have_the_same_words<A: Api>() -> Vec<String> {
    let engine = llama::<A>();
    let attn = engine.load(&fixture("lora/attn.gguf"), "attn").expect("loaded");
    let mut s = engine.session(&[]).expect("a session");
    let mut words = Vec::new();
    let mut note = |what: &str, error: Option<String>| {
        words.push(format!("{what}: {}", error.unwrap_or_else(|| panic!("{what} is accepted"))));
    };
    note("no file", A::open(Path::new("/nowhere/model.gguf"), 8).err());
    note("a folder", A::open(&fixture("models"), 8).err());
    note("no model", A::open(&fixture("lora/all.gguf"), 8).err());
    note("text for a model", A::open(&fixture("README.md"), 8).err());
    note("batch of 0", A::open(&fixture("models/llama.gguf"), 0).err());
    note("a model for an adapter", engine.load(&fixture("models/llama.gguf"), "x").err());
    note("no adapter there", engine.load(&fixture("peft/missing"), "x").err());
    note("name taken", engine.load(&fixture("lora/attn.gguf"), "attn").err());
    note("empty name", engine.load(&fixture("lora/attn.gguf"), "").err());
    note("unknown name", engine.resolve("nobody").err());
    note("unknown unloaded", engine.unload("nobody").err());
    note("no prompt", A::ask(&mut s, &greedy(&[], 4)).err());
    note("token out of range", A::ask(&mut s, &greedy(&[1, 1 << 30], 4)).err());
    note("last token", A::ask(&mut s, &greedy(&[u32::MAX], 4)).err());
    note("prompt too long", A::ask(&mut s, &greedy(&[1; 300], 4)).err());
    note("temp NaN", A::ask(&mut s, &Ask { temp: f32::NAN, ..greedy(&[1], 4) }).err());
    note("top_p 2", A::ask(&mut s, &Ask { top_p: Some(2.0), ..greedy(&[1], 4) }).err());
    note("scale NaN", A::set_adapters(&mut s, &[(attn, f32::NAN)], false).err());
    note("scale inf", A::set_adapters(&mut s, &[(attn, f32::INFINITY)], false).err());
    note("twice", A::set_adapters(&mut s, &[(attn, 1.0), (attn, 2.0)], false).err());
    note("adapter 0", A::set_adapters(&mut s, &[(0, 1.0)], false).err());
    note("adapter out of nowhere", A::set_adapters(&mut s, &[(u64::MAX, 1.0)], false).err());
    note("nothing to embed", A::embed(&mut s, &[]).err());
    note("nothing to score after", A::score(&mut s, &[], &[&[1]]).err());
    // And afterwards everything works.
    let f = fixtures::model("llama");
    assert_eq!(A::ask(&mut s, &greedy(&f.tokens, 24)).expect("an answer").tokens, f.greedy);
    words
}
