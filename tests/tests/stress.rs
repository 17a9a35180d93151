//! Many threads on one engine, and a hundred thousand requests.
//!
//! The first is short by default; `LORY_STRESS_SECONDS` makes it as long as wanted, for example under
//! ThreadSanitizer, which needs a standard library that was built with it (`rustup component add rust-src`):
//!
//! ```text
//! LORY_STRESS_SECONDS=180 RUSTFLAGS='-Zsanitizer=thread -Cunsafe-allow-abi-mismatch=sanitizer' \
//!     cargo +nightly test -Zbuild-std --target x86_64-unknown-linux-gnu -p lory-tests --test stress -- \
//!     threads --nocapture
//! ```
//!
//! Last run so, with `LORY_STRESS_SECONDS=120` and the kernels at `opt-level = 1`: 2026-11-30, beside other builds, 7,775 requests, 2,531 of them cancelled, nothing reported.
//!
//! The second runs on demand: `cargo test --release -p lory-tests --test stress -- --ignored --nocapture`;
//! `LORY_SOAK_REQUESTS` changes how many requests it sends. Last run (development profile): 2026-11-30, 100,008 requests in 90 s on two cores of a Zen 3 machine, each
//! answer being that of the same request alone, 79,664 adapters evicted, 25.05 MB resident after the first tenth and 25.10 after the last.

use std::{
    collections::HashMap,
    fs,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use lory_runtime::{
    AdapterId, Canceller, Engine, EngineOptions, Error, Event, FinishReason, Generation, OnSwitch, Request,
    SamplerOptions, Session, SessionOptions,
};
use lory_tests::{
    engines::{self, Random},
    fixtures::fixture,
};

fn prompt(i: usize) -> Vec<u32> {
    let len = [3, 8, 20, 35, 50, 70][i % 6];
    (0..len).map(|p| (p * 11 + (i as u32 % 2)) % 250).collect()
}

fn request(tokens: Vec<u32>, n: usize) -> Request {
    let sampler = SamplerOptions { logprobs: Some(0), ..SamplerOptions::greedy() };
    Request { tokens, max_new_tokens: n, sampler, ignore_eos: true, ..Request::default() }
}

type Tokens = Vec<(u32, u32)>;

fn read(generation: &mut Generation) -> Result<Tokens, Error> {
    let mut tokens = Vec::new();
    for event in generation {
        if let Event::Token { id, logprob, .. } = event? {
            tokens.push((id, logprob.expect("asked for").to_bits()));
        }
    }
    Ok(tokens)
}

fn session(engine: &Engine, adapters: Vec<(AdapterId, f32)>) -> Result<Session, Error> {
    engine.session(&SessionOptions { adapters, priority: 0 })
}

/// Refusals that are right while others load, replace and unload.
fn expected(e: &Error) -> bool {
    match e {
        Error::UnknownAdapter { .. } | Error::AdapterBudget { .. } => true,
        Error::Request(message) => message.contains("unloaded or replaced"),
        _ => false,
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What adapters can contain: nothing, two LoRAs, those of the pack.
const CONTENTS: usize = 7;
const NEW_TOKENS: usize = 5;

struct World {
    engine: Engine,
    golden: Vec<Vec<Tokens>>,
    /// What each loading of the name `swap` contains.
    swaps: Mutex<HashMap<AdapterId, usize>>,
    cancellers: Mutex<Vec<Canceller>>,
}

impl World {
    fn new(options: &EngineOptions) -> World {
        let alone = engines::bare(&EngineOptions { prefix_sharing: false, ..engines::options() });
        let store = alone.adapters();
        let attn = store.load_lora(&fixture("lora/attn.gguf"), None).expect("a LoRA");
        let all = store.load_lora(&fixture("lora/all.gguf"), None).expect("a LoRA");
        store.open_pack_files(engines::open(engines::pack(4), "pack.gguf"), vec![]).expect("a pack");
        let mut sets = vec![vec![], vec![(attn, 1.0)], vec![(all, 1.0)]];
        sets.extend((0..4).map(|i| vec![(store.resolve(&format!("synth-{i:05}")).expect("packed"), 1.0)]));
        let golden = sets.into_iter().map(|set| {
            let answer = |i| {
                let mut session = session(&alone, set.clone()).expect("loaded");
                let mut generation = session.generate(request(prompt(i), NEW_TOKENS)).expect("accepted");
                read(&mut generation).expect("room")
            };
            (0..12).map(answer).collect()
        });
        let golden: Vec<_> = golden.collect();
        assert_eq!(golden.len(), CONTENTS);

        let engine = engines::bare(options);
        let store = engine.adapters();
        store.open_pack_files(engines::open(engines::pack(4), "pack.gguf"), vec![]).expect("a pack");
        let one = store.prefetch(&["synth-00000"]).expect("packed");
        let lora = store.load_lora(&fixture("lora/all.gguf"), Some("swap")).expect("a LoRA");
        let big = store.info("swap").expect("loaded").bytes;
        store.set_budget(Some(3 * big + 2 * one));
        World { engine, golden, swaps: Mutex::new(HashMap::from([(lora, 2)])), cancellers: Mutex::default() }
    }

    fn swap(&self, content: usize) {
        let name = ["", "attn", "all"][content];
        // Held while loading, so that nobody can use what is not listed yet.
        let mut swaps = locked(&self.swaps);
        match self.engine.adapters().replace_lora(&fixture(&format!("lora/{name}.gguf")), Some("swap")) {
            Ok(id) => drop(swaps.insert(id, content)),
            Err(e) => assert!(expected(&e), "{e}"),
        }
    }

    /// The content of a session's adapter.
    fn content(&self, session: &Session) -> usize {
        match session.adapters().as_slice() {
            [] => 0,
            [one] if one.name == "swap" => locked(&self.swaps)[&one.id],
            [one] => 3 + one.name["synth-".len()..].parse::<usize>().expect("a number"),
            more => panic!("{more:?}"),
        }
    }

    fn pick(&self, random: &mut Random) -> Result<Vec<(AdapterId, f32)>, Error> {
        let name = match random.below(7) {
            0 | 1 => return Ok(vec![]),
            2 | 3 => "swap".to_owned(),
            _ => format!("synth-{:05}", random.below(4)),
        };
        Ok(vec![(self.engine.adapters().resolve(&name)?, 1.0)])
    }

    /// A session that runs a prompt of its own, checked if nobody cuts it off.
    fn talk(&self, session: &mut Session, random: &mut Random) {
        let i = random.below(12);
        session.clear();
        let content = self.content(session);
        let mut generation = match session.generate(request(prompt(i), NEW_TOKENS)) {
            Ok(generation) => generation,
            Err(e) => panic!("{e}"),
        };
        let cancellable = random.once_in(3);
        if cancellable {
            locked(&self.cancellers).push(generation.canceller());
        }
        if random.once_in(8) {
            return;
        }
        let got = read(&mut generation).unwrap_or_else(|e| panic!("{e}"));
        let want = &self.golden[content][i];
        if generation.finish_reason() == Some(FinishReason::Cancelled) {
            assert!(cancellable);
            assert_eq!(got, want[..got.len()]);
        } else {
            assert_eq!(got, *want, "content {content}, prompt {i}");
        }
    }

    fn act(&self, sessions: &mut Vec<Session>, random: &mut Random) -> Result<(), Error> {
        let store = self.engine.adapters();
        let i = random.below(sessions.len().max(1));
        match random.below(20) {
            0 | 1 if sessions.len() < 3 => sessions.push(session(&self.engine, self.pick(random)?)?),
            2 if !sessions.is_empty() => drop(sessions.swap_remove(i)),
            3 if !sessions.is_empty() && sessions.len() < 3 => sessions.push(sessions[i].fork()),
            4 if !sessions.is_empty() => {
                let len = random.below(sessions[i].tokens().len() + 1);
                sessions[i].rewind(len);
            }
            5 if !sessions.is_empty() => {
                sessions[i].set_adapters(&self.pick(random)?, OnSwitch::Recompute)?;
            }
            6 => self.swap(1 + random.below(2)),
            7 => store.unload(["swap", "synth-00001"][random.below(2)])?,
            8 => drop(store.prefetch(&["synth-00002", "synth-00003"])?),
            9 | 10 => locked(&self.cancellers).drain(..).for_each(|c| c.cancel()),
            11 => {
                let metrics = self.engine.metrics();
                assert!(metrics.kv_pages_used <= metrics.kv_pages && metrics.ended() <= metrics.requests);
                assert!(metrics.prometheus().len() > 100);
            }
            12 if !sessions.is_empty() && sessions.len() < 3 => {
                let mut bytes = Vec::new();
                sessions[i].save_to(&mut bytes)?;
                let adapters = sessions[i].adapters().iter().map(|a| (a.id, a.scale)).collect();
                let options = SessionOptions { adapters, priority: 0 };
                match self.engine.restore_from(&mut &*bytes, "saved", &options) {
                    Ok(restored) => sessions.push(restored),
                    // Others hold the cache.
                    Err(Error::Model(e)) => assert!(e.to_string().contains("KV cache is full"), "{e}"),
                    Err(e) => return Err(e),
                }
            }
            _ if !sessions.is_empty() => self.talk(&mut sessions[i], random),
            _ => {}
        }
        Ok(())
    }
}

#[test]
fn threads_load_replace_unload_cancel_fork_and_rewind() {
    let seconds = std::env::var("LORY_STRESS_SECONDS").ok().and_then(|s| s.parse().ok());
    let until = seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let seed = seconds.unwrap_or(1);
    let world = World::new(&EngineOptions {
        threads: Some(2),
        n_batch: 24,
        kv_tokens: Some(480),
        ..engines::options()
    });
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let world = &world;
            scope.spawn(move || {
                let mut random = Random(seed * 1000 + thread);
                let mut sessions = Vec::new();
                for i in 0.. {
                    let over = until.map_or(i >= 150, |until| Instant::now() >= until);
                    if over {
                        break;
                    }
                    if let Err(e) = world.act(&mut sessions, &mut random) {
                        assert!(expected(&e), "{e}");
                    }
                }
            });
        }
    });
    let metrics = world.engine.metrics();
    println!("{} requests, {:?}, {} put back", metrics.requests, metrics.endings, metrics.preemptions);
    assert_eq!((metrics.sessions, metrics.kv_pages_used), (0, 0), "nothing leaks");
    assert_eq!((metrics.ended(), metrics.endings.failed), (metrics.requests, 0));
    let store = world.engine.adapters();
    let users: usize = store.names().iter().map(|n| store.info(n).map_or(0, |i| i.sessions)).sum();
    assert_eq!(users, 0);
}

/// Resident memory of this process in bytes; `None` where the system does not tell.
fn resident() -> Option<usize> {
    let pages: usize = fs::read_to_string("/proc/self/statm").ok()?.split(' ').nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

#[test]
#[ignore = "takes minutes; run it with: cargo test --release -p lory-tests --test stress -- --ignored --nocapture"]
fn soak_of_many_short_requests_over_a_thousand_adapters() {
    const ADAPTERS: usize = 1000;
    const AT_ONCE: usize = 24;
    let requests: usize =
        std::env::var("LORY_SOAK_REQUESTS").ok().and_then(|s| s.parse().ok()).unwrap_or(100_000);
    let open = |options: &EngineOptions| {
        let engine = engines::bare(options);
        engine
            .adapters()
            .open_pack_files(engines::open(engines::pack(ADAPTERS), "pack.gguf"), vec![])
            .expect("a pack");
        engine
    };
    let alone = open(&EngineOptions { prefix_sharing: false, ..engines::options() });
    let engine = open(&EngineOptions { threads: Some(2), kv_tokens: Some(1600), ..engines::options() });
    let store = engine.adapters();
    let one = store.prefetch(&["synth-00000"]).expect("packed");
    store.set_budget(Some(200 * one));
    let mut golden: HashMap<(usize, usize), Tokens> = HashMap::new();
    let mut random = Random(77);
    let (mut done, mut checked, mut samples) = (0, 0, Vec::new());
    while done < requests {
        let mut wanted = Vec::new();
        let mut sessions = Vec::new();
        for _ in 0..AT_ONCE {
            let key = (random.below(ADAPTERS), random.below(3));
            let id = store.resolve(&format!("synth-{:05}", key.0)).expect("packed");
            sessions.push(session(&engine, vec![(id, 1.0)]).expect("loaded"));
            wanted.push(key);
        }
        let mut running: Vec<_> = sessions
            .iter_mut()
            .zip(&wanted)
            .map(|(s, (_, i))| s.generate(request(prompt(*i), 3)).expect("accepted"))
            .collect();
        for (generation, key) in running.iter_mut().zip(&wanted) {
            let got = read(generation).expect("room");
            let want = golden.entry(*key).or_insert_with(|| {
                let id = alone.adapters().resolve(&format!("synth-{:05}", key.0)).expect("packed");
                let mut session = session(&alone, vec![(id, 1.0)]).expect("loaded");
                read(&mut session.generate(request(prompt(key.1), 3)).expect("accepted")).expect("room")
            });
            assert_eq!(got, *want, "{key:?}");
            checked += 1;
        }
        done += AT_ONCE;
        if done % (requests / 10).max(1) < AT_ONCE {
            samples.extend(resident());
            println!("{done} requests, {:?} bytes resident", samples.last());
        }
    }
    let metrics = engine.metrics();
    println!("{} steps, {} tokens, {:?}", metrics.steps, metrics.generated_tokens, metrics.adapters);
    assert_eq!((checked, metrics.endings.length), (done, done as u64));
    assert!(metrics.adapters.evictions > 0 && metrics.adapters.bytes <= 200 * one);
    assert_eq!((metrics.kv_pages_used, metrics.sessions), (0, 0));
    // After the first tenths everything that is ever needed has been touched.
    if let [.., before, _, _, _, _, _] = samples[..] {
        let after = samples[samples.len() - 1];
        let growth = after as f64 / before as f64 - 1.0;
        assert!(growth < 0.02, "resident memory grew by {:.1} %: {samples:?}", growth * 100.0);
    }
}
