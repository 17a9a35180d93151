//! The store: versions of a name, budget and eviction, packs that change under running sessions.

use std::{
    fs,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::Poll,
    thread::ThreadId,
    time::Duration,
};

use lory_runtime::{
    AdapterId, Engine, EngineOptions, Error, Event, FinishReason, Generation, OnSwitch, Request,
    SamplerOptions, Session, SessionOptions,
    mapping::{self, File},
};
use lory_tests::{
    engines::{self, ADAPTERS},
    fixtures::fixture,
};

fn with(engine: &Engine, adapters: &[(AdapterId, f32)]) -> Session {
    let options = SessionOptions { adapters: adapters.to_vec(), priority: 0 };
    engine.session(&options).unwrap_or_else(|e| panic!("{e}"))
}

fn start(session: &mut Session, n: usize) -> Generation {
    let request = Request {
        tokens: (0..20).map(|i| i * 11 + 3).collect(),
        max_new_tokens: n,
        sampler: SamplerOptions { logprobs: Some(0), ..SamplerOptions::greedy() },
        ignore_eos: true,
        ..Request::default()
    };
    session.generate(request).unwrap_or_else(|e| panic!("{e}"))
}

fn token(event: lory_runtime::Result<Event>) -> Option<(u32, u32)> {
    match event {
        Ok(Event::Token { id, logprob, .. }) => Some((id, logprob.expect("asked for").to_bits())),
        Ok(_) => None,
        Err(e) => panic!("{e}"),
    }
}

fn answer(engine: &Engine, adapters: &[(AdapterId, f32)]) -> Vec<(u32, u32)> {
    start(&mut with(engine, adapters), 8).filter_map(token).collect()
}

/// P7, as for those who compress: a folder's files are its own.
#[cfg(unix)]
#[test]
fn folders_with_links_out_of_them_are_refused() {
    let (engine, _) = engines::engine(&engines::options());
    let sound = fixture("peft/lora");
    for linked in ["adapter_config.json", "adapter_model.safetensors"] {
        let dir = tempfile::tempdir().expect("a folder");
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            match name == linked {
                true => std::os::unix::fs::symlink(sound.join(name), dir.path().join(name)).expect("linked"),
                false => drop(fs::copy(sound.join(name), dir.path().join(name)).expect("copied")),
            }
        }
        let error = engine.adapters().load_lora(dir.path(), Some("linked")).expect_err("refused").to_string();
        assert!(error.contains(linked) && error.contains("link out of its folder"), "{error}");
    }
}

#[test]
fn r7_a_request_finishes_on_the_version_it_began_with() {
    let (engine, ids) = engines::engine(&engines::options());
    let store = engine.adapters();
    let (attn, all) = (answer(&engine, &[(ids[0], 1.0)]), answer(&engine, &[(ids[1], 1.0)]));
    assert_ne!(attn, all);

    let mut session = with(&engine, &[(ids[0], 1.0)]);
    let mut generation = start(&mut session, 8);
    let mut got: Vec<_> = generation.by_ref().take(3).filter_map(token).collect();
    let newer = store.replace_lora(&fixture("lora/all.gguf"), Some("attn")).expect("a LoRA");
    assert!(newer.to_u64() > ids[0].to_u64(), "later loadings have higher numbers");
    assert_eq!(store.info("attn").expect("known").generation, newer.to_u64());
    got.extend(generation.filter_map(token));
    assert_eq!(got, attn, "as it began");
    let mine = session.adapters();
    assert_eq!((mine[0].id, mine[0].name.as_str()), (ids[0], "attn"), "and the session says so");
    assert_eq!(answer(&engine, &[(newer, 1.0)]), all);
    // The old loading is nobody's any more, except the session's.
    let old = SessionOptions { adapters: vec![(ids[0], 1.0)], priority: 0 };
    let error = engine.session(&old).map(drop).expect_err("replaced");
    assert!(error.to_string().contains("unloaded or replaced"), "{error}");
    assert_eq!(session.fork().adapters(), mine);

    // Unloading while a request runs: it ends well, and then the bytes are free.
    let before = store.usage();
    let generation = start(&mut session, 8);
    store.unload("attn").expect("loaded");
    store.unload("all").expect("loaded");
    assert!(matches!(store.resolve("attn"), Err(Error::UnknownAdapter { name, .. }) if name == "attn"));
    let bytes = store.usage().bytes;
    assert_eq!(generation.finish_reason(), None);
    assert_eq!(generation.filter_map(token).count(), 8);
    drop(session);
    let after = store.usage();
    assert!(after.bytes < bytes && bytes < before.bytes, "{before:?} {bytes} {after:?}");
    assert_eq!(after.loaded, before.loaded - 3);
}

#[test]
fn r6_sets_without_a_meaning_are_refused_and_hold_nothing() {
    let (engine, ids) = engines::engine(&engines::options());
    let mut session = with(&engine, &[]);
    for (set, word) in [
        (vec![(ids[0], f32::NAN)], "not finite"),
        (vec![(ids[0], f32::INFINITY)], "not finite"),
        (vec![(ids[0], 1.0), (ids[0], 0.5)], "stands twice"),
        (vec![(ids[0], 1.0), (AdapterId::from_u64(4_000), 1.0)], "adapter 4000"),
    ] {
        let options = SessionOptions { adapters: set.clone(), priority: 0 };
        let error = engine.session(&options).map(drop).expect_err("refused").to_string();
        assert!(error.contains(word), "{error}");
        let error = session.set_adapters(&set, OnSwitch::Recompute).expect_err("refused").to_string();
        assert!(error.contains(word), "{error}");
    }
    assert_eq!(engine.adapters().info("attn").expect("known").sessions, 0);
    assert!(session.adapters().is_empty(), "as it was");
    assert_eq!(engine.metrics().sessions, 1);
}

#[test]
fn uses_sessions_and_bytes_are_counted() {
    let (engine, ids) = engines::engine(&engines::options());
    let store = engine.adapters();
    let info = || store.info("synth-00001").expect("known");
    assert_eq!((info().uses, info().sessions, info().loaded, info().in_pack), (0, 0, true, true));
    assert!(info().bytes > 0 && info().generation > 0);
    let mut session = with(&engine, &[(ids[4], 1.0)]);
    let fork = session.fork();
    start(&mut session, 1).for_each(|e| drop(e.expect("no error")));
    start(&mut session, 1).for_each(|e| drop(e.expect("no error")));
    assert_eq!((info().uses, info().sessions), (2, 1));
    drop(session);
    assert_eq!(info().sessions, 1, "the fork has it still");
    drop(fork);
    assert_eq!(info().sessions, 0);
    assert_eq!(store.info("activated").expect("known").invocation, engines::INVOCATION);
    let sum: usize = ADAPTERS.iter().map(|n| store.info(n).expect("known").bytes).sum();
    assert_eq!(store.usage().bytes, sum);
}

#[test]
fn a_budget_gives_up_cold_adapters_and_refuses_what_cannot_fit() {
    let engine = engines::bare(&engines::options());
    let store = engine.adapters();
    store.open_pack_files(engines::open(engines::pack(6), "pack.gguf"), vec![]).expect("a pack");
    let first = store.resolve("synth-00000").expect("in the pack");
    let one = store.info("synth-00000").expect("known").bytes;
    store.set_budget(Some(2 * one + one / 2));
    let want = answer(&engine, &[(first, 1.0)]);
    store.resolve("synth-00001").expect("fits");
    store.resolve("synth-00000").expect("used again");
    store.resolve("synth-00002").expect("fits after an eviction");
    let loaded = |name: &str| store.info(name).expect("known").loaded;
    assert_eq!([0, 1, 2].map(|i| loaded(&format!("synth-{i:05}"))), [true, false, true], "the coldest went");
    assert_eq!((store.usage().loaded, store.usage().evictions), (2, 1));

    // Ids outlive eviction, and so do answers.
    let evicted = store.resolve("synth-00001").expect("read again");
    assert_eq!(store.info("synth-00001").expect("known").generation, evicted.to_u64());
    assert!(!loaded("synth-00000"));
    assert_eq!(answer(&engine, &[(first, 1.0)]), want);

    // What sessions hold cannot be given up.
    let held = [with(&engine, &[(first, 1.0)]), with(&engine, &[(evicted, 1.0)])];
    match store.resolve("synth-00003") {
        Err(Error::AdapterBudget { name, needed, used, budget }) => {
            assert_eq!((name.as_str(), needed, used), ("synth-00003", one, 2 * one));
            assert_eq!(budget, 2 * one + one / 2);
        }
        other => panic!("{other:?}"),
    }
    let third = store.resolve("synth-00002").map(drop).expect_err("nor can it be read again");
    assert!(matches!(third, Error::AdapterBudget { .. }));
    assert_eq!(answer(&engine, &[]).len(), 8, "others go on");
    drop(held);
    assert_eq!(store.prefetch(&["synth-00003", "synth-00004"]).expect("room again"), 2 * one);
    // A LoRA file cannot be read again by itself, so it is refused, not evicted.
    store.set_budget(Some(one));
    let big = store.load_lora(&fixture("lora/all.gguf"), None);
    assert!(matches!(big, Err(Error::AdapterBudget { .. })), "{big:?}");
    assert!(matches!(store.resolve("all"), Err(Error::UnknownAdapter { .. })));
    store.set_budget(None);
    store.load_lora(&fixture("lora/all.gguf"), None).expect("no limit");
}

#[test]
fn the_least_recently_used_adapter_goes_first() {
    let engine = engines::bare(&engines::options());
    let store = engine.adapters();
    store.open_pack_files(engines::open(engines::pack(4), "pack.gguf"), vec![]).expect("a pack");
    let loaded = |i: usize| store.info(&format!("synth-{i:05}")).expect("known").loaded;
    let used = store.resolve("synth-00000").expect("in the pack");
    let one = store.info("synth-00000").expect("known").bytes;
    store.set_budget(Some(2 * one));

    // Requests use an adapter, not only the choice of it.
    let mut session = with(&engine, &[(used, 1.0)]);
    store.resolve("synth-00001").expect("fits");
    start(&mut session, 1).for_each(|e| drop(e.expect("no error")));
    drop(session);
    store.resolve("synth-00002").expect("fits after an eviction");
    assert_eq!([0, 1, 2].map(loaded), [true, false, true]);

    // A session uses its adapter until it ends.
    let session = with(&engine, &[(used, 1.0)]);
    store.resolve("synth-00002").expect("in memory");
    drop(session);
    store.resolve("synth-00003").expect("fits after an eviction");
    assert_eq!([0, 2, 3].map(loaded), [true, false, true]);
}

#[test]
fn what_is_replaced_makes_room_once() {
    let engine = engines::bare(&engines::options());
    let store = engine.adapters();
    store.open_pack_files(engines::open(engines::pack(2), "pack.gguf"), vec![]).expect("a pack");
    store.resolve("synth-00000").expect("in the pack");
    let one = store.info("synth-00000").expect("known").bytes;
    let kept = store.resolve("synth-00001").expect("in the pack");
    let _session = with(&engine, &[(kept, 1.0)]);
    let lora = || store.replace_lora(&fixture("lora/all.gguf"), Some("synth-00000"));
    let needed = {
        let other = engines::bare(&engines::options());
        other.adapters().load_lora(&fixture("lora/all.gguf"), None).expect("a LoRA");
        other.adapters().usage().bytes
    };
    assert!(needed > one, "so that what is there fits the budget");
    store.set_budget(Some(one + needed - 1));
    match lora() {
        Err(Error::AdapterBudget { used, budget, .. }) => assert!(used + needed > budget, "{used}"),
        other => panic!("{other:?}"),
    }
    store.set_budget(Some(one + needed));
    lora().expect("room for both");
    assert_eq!(store.usage().bytes, one + needed);
}

/// A session can leave a file that was changed: what was loaded in its place answers the same, so its cache
/// and its request go on.
#[test]
fn other_loadings_of_the_same_adapters_take_their_place() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("x.gguf");
    fs::copy(fixture("lora/attn.gguf"), &path).expect("a copy");
    let engine = engines::bare(&engines::options());
    let store = engine.adapters();
    let old = store.load_lora(&path, None).expect("a LoRA");
    let want = answer(&engine, &[(old, 1.0)]);
    let mut session = with(&engine, &[(old, 1.0)]);
    let mut generation = start(&mut session, 8);
    let mut got: Vec<_> = generation.by_ref().take(3).filter_map(token).collect();

    fs::File::options()
        .write(true)
        .open(&path)
        .and_then(|f| f.set_modified(std::time::UNIX_EPOCH))
        .expect("ours");
    let new = store.replace_lora(&path, None).expect("the same bytes");
    let other = store.load_lora(&fixture("lora/all.gguf"), None).expect("a LoRA");
    session.set_adapters(&[(new, 1.0), (other, 0.0)], OnSwitch::Recompute).expect("known");
    let mine: Vec<_> = session.adapters().iter().map(|a| (a.id, a.scale, a.works_from)).collect();
    assert_eq!(mine, [(new, 1.0, Some(0)), (other, 0.0, Some(0))]);
    got.extend(generation.by_ref().filter_map(token));
    assert_eq!((got, generation.finish_reason()), (want.clone(), Some(FinishReason::Length)));
    let cached = session.cached_tokens();
    session.set_adapters(&[(new, 1.0)], OnSwitch::Recompute).expect("known");
    assert_eq!((session.adapters().len(), session.cached_tokens()), (1, cached));
    session.clear();
    assert_eq!(start(&mut session, 8).filter_map(token).collect::<Vec<_>>(), want);

    // As long as it has the old one, every request ends with the error, however it is read.
    let held = fs::File::options().write(true).open(&path).expect("ours");
    held.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(9)).expect("ours");
    let mut generation = start(&mut session, 8);
    for _ in 0..2 {
        let error = generation.text().expect_err("its file was changed").to_string();
        assert!(error.contains("was written to"), "{error}");
    }
    assert!(generation.next().is_none());
}

#[test]
fn a_pack_is_opened_again_with_what_has_changed() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("pack.gguf");
    fs::write(&path, engines::pack(2)).expect("written");
    let engine = engines::bare(&engines::options());
    let store = engine.adapters();
    assert_eq!(store.open_pack(&path).expect("a pack"), 2);
    let old = store.resolve("synth-00000").expect("in the pack");
    let want = answer(&engine, &[(old, 1.0)]);
    let mut session = with(&engine, &[(old, 1.0)]);
    let generation = start(&mut session, 8);

    // Replaced by renaming, as writers of packs do: the mapping keeps the old file.
    let beside = dir.path().join("beside");
    fs::write(&beside, engines::pack(4)).expect("written");
    fs::rename(&beside, &path).expect("renamed");
    assert_eq!(generation.filter_map(token).collect::<Vec<_>>(), want);
    assert!(store.resolve("synth-00003").is_err(), "the old file had two");
    assert_eq!(store.reopen_pack(&path).expect("the new pack"), 4);
    assert!(store.resolve("synth-00003").is_ok());
    let new = store.resolve("synth-00000").expect("there too");
    assert!(new > old);
    assert_eq!(start(&mut session, 8).filter_map(token).count(), 8, "the session goes on with the old one");
    store.close_pack(&path).expect("open");
    assert!(store.names().is_empty());
    assert!(store.close_pack(&path).is_err());
}

/// A name in the list of segments that leads nowhere is an error, not a merge that is waited for.
#[cfg(unix)]
#[test]
fn a_segment_that_cannot_be_opened_is_named() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("pack.gguf");
    fs::write(&path, engines::pack(2)).expect("written");
    let segment = dir.path().join("pack.seg-0001.gguf");
    std::os::unix::fs::symlink(dir.path().join("nowhere"), &segment).expect("a link");
    let engine = engines::bare(&engines::options());
    let error = engine.adapters().open_pack(&path).expect_err("a segment is missing").to_string();
    assert!(error.contains("pack.seg-0001.gguf"), "{error}");
    fs::remove_file(&segment).expect("ours");
    assert_eq!(engine.adapters().open_pack(&path).expect("a pack"), 2);
}

#[test]
fn a_pack_cut_under_its_mapping_fails_its_sessions_and_nobody_else() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("pack.gguf");
    let bytes = engines::pack(4);
    fs::write(&path, &bytes).expect("written");
    let engine = engines::bare(&engines::options());
    let store = engine.adapters();
    store.open_pack(&path).expect("a pack");
    let id = store.resolve("synth-00000").expect("in the pack");
    let base = answer(&engine, &[]);
    let (mut packed, mut plain) = (with(&engine, &[(id, 1.0)]), with(&engine, &[]));
    let (mut doomed, mut sound) = (start(&mut packed, 8), start(&mut plain, 8));
    engine.step().expect("a step");
    engine.step().expect("a step");
    let file = fs::File::options().write(true).open(&path).expect("ours");
    file.set_len(bytes.len() as u64 / 2).expect("cut");
    engine.step().expect("a step");
    let got = std::iter::from_fn(|| match doomed.poll_next() {
        Poll::Ready(event) => event,
        Poll::Pending => panic!("it should have ended"),
    });
    let error = got.filter_map(Result::err).last().expect("an error").to_string();
    assert!(error.contains("pack.gguf") && error.contains("when it was opened"), "{error}");
    assert_eq!(sound.by_ref().filter_map(token).collect::<Vec<_>>(), base);
    assert_eq!(sound.finish_reason(), Some(FinishReason::Length));
    // Neither a new session nor another adapter of the pack touches the file.
    let options = SessionOptions { adapters: vec![(id, 1.0)], priority: 0 };
    assert!(engine.session(&options).is_err());
    assert!(store.resolve("synth-00001").is_err());
    assert_eq!(answer(&engine, &[]), base);
}

#[test]
fn many_threads_bring_one_adapter_in_once() {
    let engine = engines::bare(&EngineOptions { threads: Some(1), ..engines::options() });
    let store = engine.adapters();
    store.open_pack_files(engines::open(engines::pack(3), "pack.gguf"), vec![]).expect("a pack");
    let ids: Vec<AdapterId> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| store.resolve("synth-00002").expect("in the pack"))).collect();
        threads.into_iter().map(|t| t.join().expect("no panic")).collect()
    });
    assert!(ids.iter().all(|id| *id == ids[0]), "every thread got an id that stays valid");
    assert_eq!((store.usage().loads, store.usage().loaded), (1, 1));
}

/// Bytes of a pack that one thread can read only when it is let.
struct Gate {
    bytes: Vec<u8>,
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    /// Whom to hold up.
    reader: Option<ThreadId>,
    waiting: bool,
    open: bool,
    gave_up: bool,
}

impl Gate {
    fn new(bytes: Vec<u8>) -> Arc<Gate> {
        Arc::new(Gate { bytes, state: Mutex::default(), changed: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut GateState)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    /// Waits for a state. That it gives up some day lets a test fail instead of hanging.
    fn wait(&self, until: impl Fn(&GateState) -> bool) {
        let wait = self.changed.wait_timeout_while(self.state(), Duration::from_secs(60), |s| !until(s));
        let (mut state, timeout) = wait.unwrap_or_else(PoisonError::into_inner);
        state.gave_up |= timeout.timed_out();
    }
}

/// What a file is made of.
struct Gated(Arc<Gate>);

impl AsRef<[u8]> for Gated {
    fn as_ref(&self) -> &[u8] {
        let gate = &*self.0;
        if gate.state().reader == Some(std::thread::current().id()) {
            gate.set(|s| s.waiting = true);
            gate.wait(|s| s.open);
        }
        &gate.bytes
    }
}

/// A cold adapter keeps nobody waiting but who asks for it: while its record is being read, others run steps, switch
/// and bring in other adapters.
#[test]
fn a_cold_adapter_holds_up_nobody_else() {
    let gate = Gate::new(engines::pack(4));
    let file = File::from_owner(Box::new(Gated(gate.clone())), "pack.gguf");
    let engine = engines::bare(&engines::options());
    let store = engine.adapters();
    store.open_pack_files(mapping::parse(vec![Arc::new(file)]).expect("a pack"), vec![]).expect("a pack");
    let hot = store.resolve("synth-00000").expect("in the pack");
    let want = {
        let (golden, ids) = engines::engine(&engines::options());
        [answer(&golden, &[]), answer(&golden, &[(ids[3], 1.0)]), answer(&golden, &[(ids[4], 1.0)])]
    };

    std::thread::scope(|scope| {
        let cold = scope.spawn(|| {
            gate.set(|s| s.reader = Some(std::thread::current().id()));
            let id = store.resolve("synth-00001").expect("in the pack");
            gate.set(|s| s.reader = None);
            answer(&engine, &[(id, 1.0)])
        });
        gate.wait(|s| s.waiting);
        let steps = engine.metrics().steps;
        assert_eq!(answer(&engine, &[(hot, 1.0)]), want[1]);
        let mut session = with(&engine, &[]);
        assert_eq!(start(&mut session, 8).filter_map(token).collect::<Vec<_>>(), want[0]);
        session.set_adapters(&[(hot, 1.0)], OnSwitch::Recompute).expect("in memory");
        store.prefetch(&["synth-00002"]).expect("another record");
        let other = store.resolve("synth-00003").expect("another record");
        drop(with(&engine, &[(other, 0.5)]));
        assert!(!store.info("synth-00001").expect("known").loaded, "it is still being read");
        assert_eq!((store.usage().loaded, store.names().len()), (3, 4));
        assert!(engine.metrics().steps > steps && !cold.is_finished());
        gate.set(|s| s.open = true);
        assert_eq!(cold.join().expect("no panic"), want[2]);
    });
    assert!(!gate.state().gave_up, "somebody waited for the cold adapter");
    assert!(store.info("synth-00001").expect("known").loaded);
}
