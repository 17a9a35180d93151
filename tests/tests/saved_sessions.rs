//! Sessions saved and restored: the same answers, and refusals that leave nothing behind (R8 and R10
//! of the classes of malformed input).

use std::{
    io::{self, Write},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    task::Poll,
    time::{Duration, Instant},
};

use lory_kernels::backend::KvType;
use lory_runtime::{
    AdapterId, Engine, EngineOptions, Error, Event, FinishReason, OnSwitch, Request, RestoreProblem,
    SamplerOptions, Session, SessionOptions,
};
use lory_tests::{engines, fixtures::fixture};

fn prompt(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 11 + 3) % 250).collect()
}

fn with(adapters: &[(AdapterId, f32)]) -> SessionOptions {
    SessionOptions { adapters: adapters.to_vec(), priority: 0 }
}

fn answer(session: &mut Session, tokens: &[u32]) -> Vec<(u32, u32)> {
    let request = Request {
        tokens: tokens.into(),
        max_new_tokens: 5,
        sampler: SamplerOptions { logprobs: Some(0), ..SamplerOptions::greedy() },
        ignore_eos: true,
        ..Request::default()
    };
    let token = |event| match event {
        Ok(Event::Token { id, logprob, .. }) => Some((id, logprob.expect("asked for").to_bits())),
        Ok(_) => None,
        Err(e) => panic!("{e}"),
    };
    session.generate(request).unwrap_or_else(|e| panic!("{e}")).filter_map(token).collect()
}

fn saved(session: &Session) -> Vec<u8> {
    let mut bytes = Vec::new();
    session.save_to(&mut bytes).unwrap_or_else(|e| panic!("{e}"));
    bytes
}

fn problem(engine: &Engine, bytes: &[u8], options: &SessionOptions) -> RestoreProblem {
    match engine.restore_from(&mut &*bytes, "saved", options) {
        Err(Error::Restore { file, problem, .. }) => {
            assert_eq!(file, "saved");
            problem
        }
        Err(e) => panic!("{e}"),
        Ok(_) => panic!("restored"),
    }
}

#[test]
fn a_restored_session_goes_on_as_if_it_had_never_left() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("session.lory");
    for kv_type in [KvType::F32, KvType::F16, KvType::Q8_0] {
        let options = EngineOptions { kv_type, ..engines::options() };
        let (engine, ids) = engines::engine(&options);
        for set in [vec![], vec![(ids[0], 0.5), (ids[3], 1.0)], vec![(ids[2], 1.0)]] {
            let mut session = engine.session(&with(&set)).expect("known adapters");
            let text = [&prompt(45)[..], &engines::INVOCATION, &prompt(20)].concat();
            answer(&mut session, &text);
            session.save(&path).unwrap_or_else(|e| panic!("{e}"));
            let (tokens, cached) = (session.tokens(), session.cached_tokens());
            let want = answer(&mut session, &[7, 8]);

            // Also in another process: another engine, another order of the same adapters.
            let (other, other_ids) = engines::engine(&options);
            let at = |id| ids.iter().position(|i| *i == id).expect("known");
            let same: Vec<_> = set.iter().rev().map(|(id, s)| (other_ids[at(*id)], *s)).collect();
            let mut restored = other.restore(&path, &with(&same)).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!((restored.tokens(), restored.cached_tokens()), (tokens.clone(), cached));
            let from = |s: &Session| s.adapters().iter().map(|a| a.works_from).collect::<Vec<_>>();
            let mut works: Vec<_> = from(&session);
            works.reverse();
            assert_eq!(from(&restored), works);
            assert_eq!(answer(&mut restored, &[7, 8]), want);
            assert_eq!(other.metrics().prompt_tokens, 3, "only what was new was run");
        }
    }
}

/// Takes bytes, and does something when the first ones come.
struct Meanwhile<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Write for Meanwhile<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(act) = self.0.take() {
            act();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is being saved gives up nothing; who waits for its room is woken when it is there.
#[test]
fn requests_without_room_wait_for_the_end_of_a_save() {
    let options = EngineOptions { kv_tokens: Some(96), prefix_sharing: false, ..engines::options() };
    let engine = engines::bare(&options);
    let mut full = engine.session(&with(&[])).expect("a session");
    let mut other = engine.session(&with(&[])).expect("a session");
    let request =
        || Request { tokens: prompt(40), max_new_tokens: 5, ignore_eos: true, ..Request::default() };
    let is_token = |event: &lory_runtime::Result<Event>| matches!(event, Ok(Event::Token { .. }));

    // A thread that runs the steps for all.
    answer(&mut full, &prompt(70));
    let (asked, go_on) = (AtomicUsize::new(0), AtomicBool::new(true));
    let mut waiting = None;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            engine.drive(|| {
                asked.fetch_add(1, Ordering::AcqRel);
                go_on.load(Ordering::Acquire)
            })
        });
        let act = || {
            let before = asked.load(Ordering::Acquire);
            waiting = Some(other.generate(request()).expect("accepted"));
            assert!(!engine.step().expect("a step"), "there is no room");
            while asked.load(Ordering::Acquire) == before {
                std::thread::yield_now();
            }
        };
        full.save_to(&mut Meanwhile(Some(act))).expect("saved");
        let mut generation = waiting.take().expect("started");
        // That it gives up some day lets a test fail instead of hanging.
        let (mut tokens, start) = (0, Instant::now());
        while tokens < 5 && start.elapsed() < Duration::from_secs(60) {
            match generation.poll_next() {
                Poll::Ready(Some(event)) => tokens += usize::from(is_token(&event)),
                _ => std::thread::yield_now(),
            }
        }
        go_on.store(false, Ordering::Release);
        engine.wake_drivers();
        assert_eq!(tokens, 5, "the driving thread slept on");
    });

    // Nobody but who waits; also for the end of its own request.
    other.clear();
    full.clear();
    answer(&mut full, &prompt(70));
    std::thread::scope(|scope| {
        let mut counting = None;
        let act = || {
            let mut cancelled = other.generate(request()).expect("accepted");
            let canceller = cancelled.canceller();
            let ended = scope.spawn(move || (cancelled.by_ref().count(), cancelled.finish_reason()));
            assert!(!engine.step().expect("a step"), "there is no room");
            canceller.cancel();
            assert_eq!(ended.join().expect("no panic"), (0, Some(FinishReason::Cancelled)));
            let mut generation = other.generate(request()).expect("accepted");
            counting = Some(scope.spawn(move || generation.by_ref().filter(is_token).count()));
        };
        full.save_to(&mut Meanwhile(Some(act))).expect("saved");
        assert_eq!(counting.expect("started").join().expect("no panic"), 5);
    });
}

#[test]
fn an_empty_and_a_mixed_session_are_saved_as_they_are() {
    let (engine, ids) = engines::engine(&engines::options());
    let empty = engine.session(&with(&[])).expect("a session");
    let restored = engine.restore_from(&mut &*saved(&empty), "saved", &with(&[])).expect("sound");
    assert!(restored.tokens().is_empty());
    let mut mixed = engine.session(&with(&[])).expect("a session");
    answer(&mut mixed, &prompt(40));
    mixed.set_adapters(&[(ids[1], 1.0)], OnSwitch::Keep).expect("known");
    let bytes = saved(&mixed);
    let mut restored = engine.restore_from(&mut &*bytes, "saved", &with(&[(ids[1], 1.0)])).expect("sound");
    assert!(restored.is_mixed());
    assert_eq!(answer(&mut restored, &[1]), answer(&mut mixed, &[1]));
}

#[test]
fn r8_damaged_files_are_refused_and_leave_nothing() {
    let (engine, ids) = engines::engine(&engines::options());
    let options = with(&[(ids[0], 1.0)]);
    let mut session = engine.session(&options).expect("known adapters");
    answer(&mut session, &prompt(40));
    let bytes = saved(&session);
    drop(session);
    let sessions = engine.metrics().sessions;
    for len in (0..300.min(bytes.len())).chain((300..bytes.len()).step_by(997)).chain([bytes.len() - 1]) {
        let found = problem(&engine, &bytes[..len], &options);
        assert_eq!(found, RestoreProblem::Damaged, "cut at {len}");
    }
    assert_eq!(problem(&engine, &[&bytes[..], &[0]].concat(), &options), RestoreProblem::Damaged);
    for at in (0..300).chain((300..bytes.len()).step_by(499)).chain(bytes.len() - 16..bytes.len()) {
        for bit in [0, 7] {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            // Which check finds it depends on what was hit; one always does.
            problem(&engine, &flipped, &options);
        }
    }
    let mut foreign = bytes.clone();
    foreign[..8].copy_from_slice(b"GGUF\x03\0\0\0");
    assert_eq!(problem(&engine, &foreign, &options), RestoreProblem::Foreign);
    let mut newer = bytes.clone();
    newer[8] = 2;
    assert_eq!(problem(&engine, &newer, &options), RestoreProblem::Version);
    assert_eq!(engine.metrics().sessions, sessions);
    assert_eq!(engine.kv_usage().0, 0, "nothing was left half written");
    let mut sound = engine.restore_from(&mut &*bytes, "saved", &options).expect("still sound");
    answer(&mut sound, &[3]);
}

#[test]
fn r8_other_models_caches_and_adapters_are_refused() {
    let (engine, ids) = engines::engine(&engines::options());
    let options = with(&[(ids[0], 1.0)]);
    let mut session = engine.session(&options).expect("known adapters");
    answer(&mut session, &prompt(40));
    let bytes = saved(&session);

    for set in [vec![], vec![(ids[1], 1.0)], vec![(ids[0], 0.5)], vec![(ids[0], 1.0), (ids[1], 1.0)]] {
        assert_eq!(problem(&engine, &bytes, &with(&set)), RestoreProblem::OtherAdapters, "{set:?}");
    }
    // The name now means other weights.
    let newer = engine.adapters().replace_lora(&fixture("lora/all.gguf"), Some("attn"));
    let newer = with(&[(newer.unwrap_or_else(|e| panic!("{e}")), 1.0)]);
    assert_eq!(problem(&engine, &bytes, &newer), RestoreProblem::OtherAdapters);

    let base = {
        let mut session = engine.session(&with(&[])).expect("a session");
        answer(&mut session, &prompt(40));
        saved(&session)
    };
    let with_kv = |kv_type| engines::bare(&EngineOptions { kv_type, ..engines::options() });
    assert_eq!(problem(&with_kv(KvType::F16), &base, &with(&[])), RestoreProblem::OtherCache);
    let other = Engine::open(&fixture("models/mistral.gguf"), &engines::options()).expect("a model");
    assert_eq!(problem(&other, &base, &with(&[])), RestoreProblem::OtherModel);
    let short = engines::bare(&EngineOptions { n_ctx: Some(44), ..engines::options() });
    assert_eq!(problem(&short, &base, &with(&[])), RestoreProblem::TooLong);
    let narrow = engines::bare(&EngineOptions { kv_tokens: Some(32), ..engines::options() });
    assert_eq!(problem(&narrow, &base, &with(&[])), RestoreProblem::TooLong);
}

#[cfg(unix)]
#[test]
fn r8_what_is_no_file_is_refused_without_waiting() {
    let dir = tempfile::tempdir().expect("a folder");
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().expect("run").success());
    let engine = engines::bare(&engines::options());
    for (path, word) in [(fifo.as_path(), "is a FIFO"), (dir.path(), "is a directory")] {
        let error = engine.restore(path, &with(&[])).map(drop).expect_err("no saved session").to_string();
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn restored_pages_are_never_shared() {
    let (engine, _) = engines::engine(&engines::options());
    let mut session = engine.session(&with(&[])).expect("a session");
    let text = prompt(70);
    let want = answer(&mut session, &text);
    let bytes = saved(&session);

    // Whoever can write the file can write keys and values of their own, and a sound checksum.
    let mut forged = bytes.clone();
    let end = forged.len() - 16;
    let page = end - 5000;
    forged[page..page + 64].fill(0);
    let checksum = xxhash_rust::xxh3::xxh3_128(&forged[..end]);
    forged[end..].copy_from_slice(&checksum.to_le_bytes());
    let fresh = engines::bare(&engines::options());
    let mut restored = fresh.restore_from(&mut &*forged, "saved", &with(&[])).expect("it looks sound");
    answer(&mut restored, &[1, 2, 3]);
    let mut other = fresh.session(&with(&[])).expect("a session");
    assert_eq!(answer(&mut other, &text), want, "others are not concerned");
    assert_eq!(fresh.metrics().shared_tokens, 0);
    // Once its keys and values were computed here, it is a session like any other.
    restored.clear();
    assert_eq!(answer(&mut restored, &text), want);
    assert_eq!(fresh.metrics().shared_tokens, 64);
}
