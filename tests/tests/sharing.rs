//! Keys and values that sessions share: only with the same tokens read by the same adapters, of the
//! same version and weight, and never with another result. Activated adapters keep the base's before
//! their invocation.

use lory_runtime::{
    AdapterId, Engine, EngineOptions, Event, OnSwitch, Request, SamplerOptions, Session, SessionOptions,
};
use lory_tests::{
    engines::{self, INVOCATION},
    fixtures::fixture,
};

fn prompt(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 11 + 3) % 250).collect()
}

fn session(engine: &Engine, adapters: &[(AdapterId, f32)]) -> Session {
    let options = SessionOptions { adapters: adapters.to_vec(), priority: 0 };
    engine.session(&options).unwrap_or_else(|e| panic!("{e}"))
}

/// Tokens generated, and how many prompt tokens were found in the cache.
fn answer(session: &mut Session, tokens: &[u32]) -> (Vec<(u32, u32)>, usize) {
    let request = Request {
        tokens: tokens.into(),
        max_new_tokens: 6,
        sampler: SamplerOptions { logprobs: Some(0), ..SamplerOptions::greedy() },
        ignore_eos: true,
        ..Request::default()
    };
    let mut generation = session.generate(request).unwrap_or_else(|e| panic!("{e}"));
    let token = |event| match event {
        Ok(Event::Token { id, logprob, .. }) => Some((id, logprob.expect("asked for").to_bits())),
        Ok(_) => None,
        Err(e) => panic!("{e}"),
    };
    let tokens = generation.by_ref().filter_map(token).collect();
    (tokens, generation.stats().cached_tokens)
}

/// Logits after each of `tokens`.
fn logits(session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    let request =
        Request { tokens: tokens.into(), max_new_tokens: 0, prompt_logits: true, ..Request::default() };
    let values = |event| match event {
        Ok(Event::Logits { values, .. }) => values,
        other => panic!("{other:?}"),
    };
    session.generate(request).unwrap_or_else(|e| panic!("{e}")).map(values).collect()
}

fn read(session: &mut Session, tokens: &[u32]) {
    let request = Request { tokens: tokens.into(), max_new_tokens: 0, ..Request::default() };
    session.generate(request).unwrap_or_else(|e| panic!("{e}")).for_each(|e| drop(e.expect("room")));
}

#[test]
fn sessions_with_the_same_beginning_share_it_and_answer_as_without() {
    let text = prompt(90);
    let (engine, ids) = engines::engine(&engines::options());
    let (unshared, other) = engines::engine(&EngineOptions { prefix_sharing: false, ..engines::options() });
    for set in [vec![], vec![(0, 1.0)], vec![(3, 1.0)], vec![(4, 0.5), (1, 0.25)]] {
        let bind = |ids: &[AdapterId]| set.iter().map(|(i, s)| (ids[*i], *s)).collect::<Vec<_>>();
        let want = answer(&mut session(&unshared, &bind(&other)), &text);
        assert_eq!(want.1, 0);
        let first = answer(&mut session(&engine, &bind(&ids)), &text);
        assert_eq!(first, want, "{set:?}");
        // The first session has gone; what it computed has not.
        let second = answer(&mut session(&engine, &bind(&ids)), &text);
        assert_eq!(second, (want.0, 64), "{set:?}");
    }
    assert_eq!(engine.kv_usage().0, 0);
    let metrics = engine.metrics();
    assert_eq!((metrics.shared_tokens, metrics.kv_pages_used), (4 * 64, 0));
    assert!(metrics.kv_pages_kept >= 4 * 2);
}

#[test]
fn k1_k2_k3_no_session_reads_what_another_adapter_version_or_scale_wrote() {
    let text = prompt(90);
    let (engine, ids) = engines::engine(&engines::options());
    let store = engine.adapters();
    let fresh = |adapters: &[(AdapterId, f32)]| answer(&mut session(&engine, adapters), &text);
    let base = fresh(&[]);
    // K1: each set for the first time finds nothing, whatever was run before.
    let sets = [vec![(ids[0], 1.0)], vec![(ids[1], 1.0)], vec![(ids[0], 1.0), (ids[1], 1.0)]];
    for set in &sets {
        let alone = engines::engine(&EngineOptions { prefix_sharing: false, ..engines::options() });
        let at = |id: AdapterId| ids.iter().position(|i| *i == id).expect("known");
        let same: Vec<_> = set.iter().map(|(id, s)| (alone.1[at(*id)], *s)).collect();
        let want = answer(&mut session(&alone.0, &same), &text);
        assert_eq!(fresh(set), want);
    }
    // Nor where there is room for little more than one, and what one leaves is taken by the next.
    let (small, own) = engines::engine(&EngineOptions { kv_tokens: Some(128), ..engines::options() });
    for (i, turn) in [0, 1, 2, 0, 1].into_iter().enumerate() {
        let same: Vec<_> = sets[turn]
            .iter()
            .map(|(id, s)| (own[ids.iter().position(|i| i == id).expect("known")], *s))
            .collect();
        let (tokens, cached) = answer(&mut session(&small, &same), &text);
        assert_eq!(tokens, fresh(&sets[turn]).0, "turn {i}");
        assert!(cached == 0 || i > 2, "turn {i}: {cached} tokens");
    }
    // K3: another scale is another key; back again it is found.
    assert_eq!(fresh(&[(ids[0], 0.5)]).1, 0);
    assert_eq!(fresh(&[(ids[0], 1.0)]).1, 64);
    // The order of adapters makes no difference, a weight of 0 is none.
    assert_eq!(fresh(&[(ids[1], 1.0), (ids[0], 1.0)]).1, 64);
    assert_eq!(fresh(&[(ids[0], 0.0)]), (base.0, 64));
    // K2: the same name with other weights.
    let before = fresh(&[(ids[0], 1.0)]);
    let id = store.replace_lora(&fixture("lora/all.gguf"), Some("attn")).unwrap_or_else(|e| panic!("{e}"));
    let after = fresh(&[(id, 1.0)]);
    assert_ne!(after.0, before.0);
    assert_eq!(after, fresh(&[(ids[1], 1.0)]), "the weights are those of `all`, and so is the cache");
}

#[test]
fn a_fork_and_a_rewound_session_do_not_disturb_what_others_share() {
    let text = prompt(80);
    let (engine, ids) = engines::engine(&engines::options());
    let set = [(ids[4], 1.0)];
    let want = answer(&mut session(&engine, &set), &text);
    let mut first = session(&engine, &set);
    read(&mut first, &text);
    let mut fork = first.fork();
    fork.rewind(40);
    read(&mut fork, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24]);
    first.rewind(50);
    read(&mut first, &[9; 14]);
    let again = answer(&mut session(&engine, &set), &text);
    assert_eq!(again.0, want.0);
    assert_eq!(again.1, 32, "the page that was written over is found no more");
}

#[test]
fn an_activated_adapter_reads_on_from_the_bases_cache() {
    let (engine, ids) = engines::engine(&engines::options());
    let (all, activated) = (ids[1], ids[2]);
    let (before, after) = (prompt(70), prompt(9));
    read(&mut session(&engine, &[]), &before);

    let tail = [&INVOCATION[..], &after].concat();
    let mut invoked = session(&engine, &[(activated, 1.0)]);
    let whole = [&before[..], &tail].concat();
    let found = {
        let request = Request { tokens: whole.clone(), max_new_tokens: 0, ..Request::default() };
        let mut generation = invoked.generate(request).expect("accepted");
        generation.by_ref().for_each(|e| drop(e.expect("room")));
        generation.stats().cached_tokens
    };
    assert_eq!(found, 64, "the base's two full pages");
    assert_eq!(invoked.adapters()[0].works_from, Some(70));

    // Rows before by the base, rows after by the same weights as a plain adapter.
    let mut by_hand = session(&engine, &[]);
    read(&mut by_hand, &before);
    by_hand.set_adapters(&[(all, 1.0)], OnSwitch::Keep).expect("known");
    let want = logits(&mut by_hand, &tail);
    let mut fresh = session(&engine, &[(activated, 1.0)]);
    read(&mut fresh, &before);
    // Read alone, nothing invokes it; with the rest, its cache is still good.
    assert_eq!(fresh.adapters()[0].works_from, None);
    assert_eq!(fresh.cached_tokens(), 70);
    assert_eq!(logits(&mut fresh, &tail), want);
    let plain = logits(&mut session(&engine, &[(all, 1.0)]), &whole);
    assert_ne!(plain[70..], want, "a plain adapter would have read everything");

    // Behind the invocation, and with the page that holds it, nothing is the base's any more.
    let base = logits(&mut session(&engine, &[]), &whole);
    assert_eq!(base.len(), plain.len());
    assert_ne!(base[70..], want);
    let both = logits(&mut session(&engine, &[(activated, 1.0)]), &whole);
    assert_eq!(both[..70], base[..70], "before it, it is the base");
    assert_eq!(both[70..], want);
}

#[test]
fn without_its_invocation_an_activated_adapter_is_the_base() {
    let (engine, ids) = engines::engine(&engines::options());
    let text = prompt(40);
    let base = answer(&mut session(&engine, &[]), &text);
    let idle = answer(&mut session(&engine, &[(ids[2], 1.0)]), &text);
    assert_eq!(idle, (base.0, 32), "and shares its cache");
    // Half of the invocation is none.
    let half = [&text[..], &INVOCATION[..1]].concat();
    let base = answer(&mut session(&engine, &[]), &half);
    assert_eq!(answer(&mut session(&engine, &[(ids[2], 1.0)]), &half).0, base.0);
}

#[test]
fn the_last_invocation_counts_also_in_a_later_turn() {
    let (engine, ids) = engines::engine(&engines::options());
    let set = [(ids[2], 1.0)];
    let turn = [&prompt(10)[..], &INVOCATION, &prompt(5)].concat();
    let mut talk = session(&engine, &set);
    read(&mut talk, &turn);
    assert_eq!(talk.adapters()[0].works_from, Some(10));
    let talked = logits(&mut talk, &turn);
    let at = turn.len() + 10;
    assert_eq!(talk.adapters()[0].works_from, Some(at));
    let twice = [&turn[..], &turn].concat();
    let fresh = logits(&mut session(&engine, &set), &twice);
    assert_eq!(talked, fresh[turn.len()..], "as a new session with the whole conversation");
    // What the first invocation had adapted was read again by the base.
    let base = logits(&mut session(&engine, &[]), &twice);
    assert_eq!(fresh[..at], base[..at]);
}
