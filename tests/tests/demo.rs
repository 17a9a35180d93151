//! The whole path on trained weights: the built-in base and its skills, as they ship.

use std::fs;

use lory_demo::{BASE, PACK, Skill, skills};
use lory_kernels::backend::KvType;
use lory_models::tokenizer::EncodeOptions;
use lory_runtime::{
    AdapterId, Engine, EngineOptions, Event, FinishReason, Generation, OnSwitch, Request, SamplerOptions,
    Session, SessionOptions,
};
use lory_tests::demo::{self, in_memory, tokens};

fn options() -> EngineOptions {
    EngineOptions {
        threads: Some(2),
        n_ctx: Some(256),
        kv_type: KvType::F32,
        kv_tokens: Some(200 * 128),
        ..EngineOptions::default()
    }
}

fn engine() -> (Engine, Vec<AdapterId>) {
    demo::engine(&options())
}

fn session(engine: &Engine, adapters: &[(AdapterId, f32)]) -> Session {
    let options = SessionOptions { adapters: adapters.to_vec(), priority: 0 };
    engine.session(&options).unwrap_or_else(|e| panic!("{e}"))
}

fn request(tokens: Vec<u32>) -> Request {
    let sampler = SamplerOptions { logprobs: Some(0), ..SamplerOptions::greedy() };
    Request { tokens, max_new_tokens: 64, sampler, ..Request::default() }
}

/// An answer's text, its tokens with the bits of their log-probabilities, and whether the model ended it.
#[derive(Debug, PartialEq)]
struct Answer {
    text: String,
    tokens: Vec<(u32, u32)>,
    ended: bool,
}

fn read(mut generation: Generation) -> Answer {
    let (mut text, mut tokens) = (String::new(), Vec::new());
    for event in generation.by_ref() {
        match event.unwrap_or_else(|e| panic!("{e}")) {
            Event::Token { id, text: piece, logprob, .. } => {
                text += &piece;
                tokens.push((id, logprob.expect("asked for").to_bits()));
            }
            Event::Text(piece) => text += &piece,
            other => panic!("{other:?}"),
        }
    }
    Answer { text, tokens, ended: generation.finish_reason() == Some(FinishReason::Eos) }
}

fn ask(session: &mut Session, tokens: &[u32]) -> Answer {
    session.clear();
    read(session.generate(request(tokens.into())).unwrap_or_else(|e| panic!("{e}")))
}

/// Logits after each token of a session without adapters or with one, in requests of `step` tokens.
fn logits(engine: &Engine, adapters: &[(AdapterId, f32)], tokens: &[u32], step: usize) -> Vec<Vec<f32>> {
    let mut session = session(engine, adapters);
    let mut all = Vec::new();
    for part in tokens.chunks(step) {
        let request =
            Request { tokens: part.into(), max_new_tokens: 0, prompt_logits: true, ..Request::default() };
        for event in session.generate(request).unwrap_or_else(|e| panic!("{e}")) {
            match event.unwrap_or_else(|e| panic!("{e}")) {
                Event::Logits { values, .. } => all.push(values),
                other => panic!("{other:?}"),
            }
        }
    }
    all
}

/// The first test of a skill.
fn first(skill: &Skill) -> &str {
    &skill.tests[0].0
}

#[test]
fn weights_are_used_where_they_lie_and_as_a_mapped_file() {
    let (engine, ids) = engine();
    for (name, bytes) in [("base", BASE), ("skills", PACK)] {
        let open = in_memory(bytes, name);
        let tensor = open.gguf.tensors().map(|t| &*t.name).max().expect("tensors");
        let place = open.gguf.tensor(tensor).expect("by its name").matrix().bytes().as_ptr_range();
        let whole = bytes.as_ptr_range();
        assert!(whole.start <= place.start && place.end <= whole.end, "{name} is copied");
    }
    let dir = tempfile::tempdir().unwrap();
    let (base, pack) = (dir.path().join("base.gguf"), dir.path().join("skills.gguf"));
    fs::write(&base, BASE).unwrap();
    fs::write(&pack, PACK).unwrap();
    let mapped = Engine::open(&base, &options()).unwrap_or_else(|e| panic!("{e}"));
    mapped.adapters().open_pack(&pack).unwrap_or_else(|e| panic!("{e}"));
    let skill = &skills().all[0];
    let id = mapped.adapters().resolve(&skill.name).unwrap_or_else(|e| panic!("{e}"));
    let prompt = tokens(&engine, first(skill));
    assert_eq!(
        ask(&mut session(&mapped, &[(id, 1.0)]), &prompt),
        ask(&mut session(&engine, &[(ids[0], 1.0)]), &prompt)
    );
}

#[test]
fn prompts_become_their_bytes_between_two_marks() {
    let (engine, _) = engine();
    let tokenizer = &engine.model().tokenizer;
    let plain = EncodeOptions { add_special: false, parse_special: false };
    for (prompt, answer) in skills().all.iter().flat_map(|s| s.tests.iter()) {
        for text in [prompt, answer] {
            let tokens = tokenizer.encode(text, plain);
            assert_eq!((tokens.len(), tokenizer.decode(&tokens).as_str()), (text.len(), text.as_str()));
        }
    }
    let prompt = "héllo </s>";
    let marked = tokens(&engine, prompt);
    let (bos, eos) = (tokenizer.bos().expect("one"), tokenizer.eos().expect("one"));
    assert_eq!(marked[0], bos);
    assert_eq!(tokenizer.token_text(*marked.last().expect("not empty")), Some("<|sep|>"));
    // Only the last message of the user counts; a mark in it is one.
    assert_eq!(tokenizer.decode(&marked[1..marked.len() - 2]), "héllo ");
    assert_eq!(marked[marked.len() - 2], eos);
}

#[test]
fn reading_at_once_is_reading_token_by_token() {
    let (engine, ids) = engine();
    for (i, skill) in skills().all.iter().enumerate().step_by(40) {
        let tokens = tokens(&engine, first(skill));
        for adapters in [vec![], vec![(ids[i], 1.0)]] {
            let at_once = logits(&engine, &adapters, &tokens, tokens.len());
            let one_by_one = logits(&engine, &adapters, &tokens, 1);
            assert_eq!(at_once.len(), tokens.len());
            assert!(at_once.iter().flatten().all(|l| l.is_finite()));
            assert_eq!(at_once, one_by_one, "{}", skill.name);
        }
    }
}

#[test]
fn a_mixed_batch_of_all_skills_answers_as_each_alone() {
    let (engine, ids) = engine();
    let prompts: Vec<Vec<u32>> = skills().all.iter().map(|s| tokens(&engine, first(s))).collect();
    let mut sessions: Vec<Session> = ids.iter().map(|id| session(&engine, &[(*id, 1.0)])).collect();
    let together: Vec<Generation> = sessions
        .iter_mut()
        .zip(&prompts)
        .map(|(s, p)| s.generate(request(p.clone())).unwrap_or_else(|e| panic!("{e}")))
        .collect();
    let together: Vec<Answer> = together.into_iter().map(read).collect();
    let mut different = 0;
    for (((skill, id), prompt), got) in skills().all.iter().zip(&ids).zip(&prompts).zip(&together) {
        let mut alone = session(&engine, &[(*id, 1.0)]);
        assert_eq!(*got, ask(&mut alone, prompt), "{}", skill.name);
        alone.set_adapters(&[], OnSwitch::Recompute).unwrap();
        // The base alone need not come to an end: its first tokens tell.
        let few = Request { max_new_tokens: 4, ..request(prompt.clone()) };
        alone.clear();
        let base = read(alone.generate(few).unwrap()).tokens;
        different += usize::from(!got.tokens.starts_with(&base));
    }
    assert_eq!(different, ids.len(), "every adapter changes what the base says");
}

#[test]
fn a_session_that_switches_answers_as_a_new_one() {
    let (engine, ids) = engine();
    let all = &skills().all;
    let mut talk = session(&engine, &[]);
    let turns = [0, 60, 0, 120, 30, 60];
    for at in turns {
        let prompt = tokens(&engine, first(&all[at]));
        talk.set_adapters(&[(ids[at], 1.0)], OnSwitch::Recompute).unwrap();
        let fresh = ask(&mut session(&engine, &[(ids[at], 1.0)]), &prompt);
        assert_eq!(ask(&mut talk, &prompt), fresh, "{}", all[at].name);
        // In the middle of a text: what was read is read again by the next adapter.
        let (before, after) = prompt.split_at(prompt.len() / 2);
        talk.clear();
        talk.generate(Request { max_new_tokens: 0, ..request(before.into()) }).unwrap().for_each(drop);
        let next = ids[(at + 1) % ids.len()];
        talk.set_adapters(&[(next, 1.0)], OnSwitch::Recompute).unwrap();
        let switched = read(talk.generate(request(after.into())).unwrap());
        assert_eq!(switched, ask(&mut session(&engine, &[(next, 1.0)]), &prompt));
    }
}

#[test]
fn mixes_are_weighted_sums() {
    let (engine, ids) = engine();
    let (a, b) = (ids[0], ids[70]);
    let prompt = tokens(&engine, first(&skills().all[0]));
    let of = |adapters: &[(AdapterId, f32)]| logits(&engine, adapters, &prompt, prompt.len());
    let far = |x: &[Vec<f32>], y: &[Vec<f32>]| {
        let pairs = x.iter().flatten().zip(y.iter().flatten());
        pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f32::max)
    };
    let (base, only_a, only_b) = (of(&[]), of(&[(a, 1.0)]), of(&[(b, 1.0)]));
    let range = base.iter().flatten().fold(0.0, |m: f32, l| m.max(l.abs()));
    let close = 1e-3 * range;
    assert!(far(&of(&[(a, 1.0), (b, 0.0)]), &only_a) < close, "a weight of 0 takes nothing");
    assert!(far(&of(&[(a, 0.0), (b, 0.0)]), &base) < close);
    assert!(far(&of(&[(a, 0.5), (b, 0.5)]), &of(&[(b, 0.5), (a, 0.5)])) < close, "in any order");
    let half = of(&[(a, 0.5), (b, 0.5)]);
    for other in [&base, &only_a, &only_b] {
        assert!(far(&half, other) > 10.0 * close, "a mix is something else");
    }
}

/// As `lory demo --check` does with all prompts; here three of each skill.
#[test]
fn skills_answer_as_well_as_was_recorded() {
    let (engine, ids) = engine();
    let (mut asked, mut right, mut expected, mut variance) = (0, 0, 0.0, 0.0);
    for sample in 0..3 {
        let tests: Vec<_> =
            skills().all.iter().zip(&ids).filter_map(|(s, id)| Some((s, id, s.tests.get(sample)?))).collect();
        let mut sessions: Vec<Session> =
            tests.iter().map(|(_, id, _)| session(&engine, &[(**id, 1.0)])).collect();
        let generations: Vec<Generation> = sessions
            .iter_mut()
            .zip(&tests)
            .map(|(s, (_, _, (prompt, _)))| {
                s.generate(request(tokens(&engine, prompt))).unwrap_or_else(|e| panic!("{e}"))
            })
            .collect();
        for (generation, (skill, _, (_, answer))) in generations.into_iter().zip(&tests) {
            let got = read(generation);
            asked += 1;
            right += usize::from(got.ended && got.text == *answer);
            expected += skill.pack;
            variance += skill.pack * (1.0 - skill.pack);
        }
    }
    // A sample of the prompts may be harder than all of them, by chance within three standard deviations.
    assert!(
        right as f64 >= expected - 3.0 * f64::sqrt(variance),
        "{right} of {asked} answers are right, {expected:.1} were to be expected"
    );
}
