//! What a session gets does not depend on what else runs: 1,000 random schedules of sessions with
//! different adapters, priorities and readers, that begin, fork, rewind, change adapters, are
//! cancelled and evicted, against each request run alone. Equal bit for bit.

use std::{collections::HashMap, task::Poll};

use lory_runtime::{
    AdapterId, Engine, EngineOptions, Event, FinishReason, Generation, Hidden, KvPolicy, OnSwitch, Request,
    SamplerOptions, Session, SessionOptions,
};
use lory_tests::engines::{self, ADAPTERS, INVOCATION, Random};

/// Indices into [`ADAPTERS`] with weights.
type Set = Vec<(usize, f32)>;

/// An event as bits; what is long, as its hash.
#[derive(Clone, Debug, PartialEq)]
enum Seen {
    Token(u32, String, Option<u32>, Vec<(u32, u32)>),
    Text(String),
    Values(usize, u64),
    Prompt(usize, u32, u32),
    Failed(String),
}

fn seen(event: lory_runtime::Result<Event>) -> Seen {
    let hash = |values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect();
        xxhash_rust::xxh3::xxh3_64(&bytes)
    };
    match event {
        Ok(Event::Token { id, text, logprob, top }) => {
            let top = top.into_iter().map(|(t, p)| (t, p.to_bits())).collect();
            Seen::Token(id, text, logprob.map(f32::to_bits), top)
        }
        Ok(Event::Text(text)) => Seen::Text(text),
        Ok(Event::Logits { position, values }) => Seen::Values(position, hash(&values)),
        Ok(Event::Hidden { position, values }) => Seen::Values(position, hash(&values) ^ 1),
        Ok(Event::Prompt { position, id, logprob, .. }) => Seen::Prompt(position, id, logprob.to_bits()),
        Ok(other) => panic!("{other:?}"),
        Err(e) => Seen::Failed(e.to_string()),
    }
}

fn bind(ids: &[AdapterId], set: &Set) -> Vec<(AdapterId, f32)> {
    set.iter().map(|(i, scale)| (ids[*i], *scale)).collect()
}

/// What identifies an answer: adapters, tokens before, the request.
type Key = (Vec<(usize, u32)>, Vec<u32>, String);

/// Runs requests alone, in an engine where there is room for everything and nothing is shared.
struct Alone {
    engine: Engine,
    ids: Vec<AdapterId>,
    known: HashMap<Key, (Vec<Seen>, Option<FinishReason>)>,
}

impl Alone {
    fn new() -> Alone {
        let options = EngineOptions { prefix_sharing: false, n_batch: 160, ..engines::options() };
        let (engine, ids) = engines::engine(&options);
        Alone { engine, ids, known: HashMap::new() }
    }

    fn answer(&mut self, set: &Set, before: &[u32], request: &Request) -> (Vec<Seen>, Option<FinishReason>) {
        let exact = set.iter().map(|(i, s)| (*i, s.to_bits())).collect();
        let key = (exact, before.to_vec(), format!("{request:?}"));
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        let adapters = bind(&self.ids, set);
        let mut session =
            self.engine.session(&SessionOptions { adapters, priority: 0 }).expect("known adapters");
        if !before.is_empty() {
            let read = Request { tokens: before.into(), max_new_tokens: 0, ..Request::default() };
            session.generate(read).expect("accepted").for_each(|e| drop(e.expect("room")));
        }
        let mut generation = session.generate(request.clone()).expect("accepted");
        let events = generation.by_ref().map(seen).collect();
        let answer = (events, generation.finish_reason());
        self.known.insert(key, answer.clone());
        answer
    }
}

struct Running {
    generation: Generation,
    set: Set,
    before: Vec<u32>,
    request: Request,
    seen: Vec<Seen>,
    ended: bool,
}

struct Actor {
    session: Session,
    set: Set,
    running: Option<Running>,
}

/// One schedule's world.
struct World<'a> {
    engine: &'a Engine,
    ids: &'a [AdapterId],
    alone: &'a mut Alone,
    random: Random,
    actors: Vec<Actor>,
    /// Whether a request may find no room.
    may_fail: bool,
}

impl World<'_> {
    fn set(&mut self) -> Set {
        let r = &mut self.random;
        match r.below(6) {
            // The same ones often, so that there is something to share.
            0 | 1 => vec![],
            2 => vec![(2, 1.0)],
            3 | 4 => vec![(r.below(ADAPTERS.len()), [1.0, 0.5][r.below(2)])],
            _ => {
                let first = r.below(ADAPTERS.len());
                vec![(first, 0.75), ((first + 1 + r.below(ADAPTERS.len() - 1)) % ADAPTERS.len(), -0.5)]
            }
        }
    }

    /// Beginnings that are the same often, some of them with the invocation tokens somewhere.
    fn tokens(&mut self, fresh: bool) -> Vec<u32> {
        let r = &mut self.random;
        let (shortest, longest) = if fresh { (30, 80) } else { (1, 12) };
        let (text, len) = (r.below(2) as u32, shortest + r.below(longest - shortest));
        let mut tokens: Vec<u32> = (0..len as u32).map(|i| (i * 7 + text) % 250).collect();
        if r.once_in(4) {
            let at = tokens.len() - r.below(tokens.len().min(20));
            tokens.splice(at..at, INVOCATION);
        }
        tokens
    }

    fn request(&mut self, session: &Session) -> Request {
        let fresh = session.tokens().is_empty();
        let tokens = if !fresh && self.random.once_in(4) { vec![] } else { self.tokens(fresh) };
        let r = &mut self.random;
        let sampler = match r.below(3) {
            0 => SamplerOptions { seed: Some(r.below(3) as u64), logprobs: Some(2), ..Default::default() },
            _ => SamplerOptions { logprobs: Some(1), ..SamplerOptions::greedy() },
        };
        Request {
            tokens,
            max_new_tokens: r.below(6),
            sampler,
            ignore_eos: true,
            prompt_logits: r.once_in(8),
            prompt_logprobs: r.once_in(8).then_some(0),
            hidden: [Hidden::None, Hidden::None, Hidden::None, Hidden::Last, Hidden::All][r.below(5)],
            max_queued: [1, 4, 256][r.below(3)],
            ..Request::default()
        }
    }

    fn act(&mut self) {
        let n = self.actors.len();
        let i = self.random.below(n.max(1));
        match self.random.below(16) {
            0 | 1 if n < 5 => {
                let set = self.set();
                let adapters = bind(self.ids, &set);
                let priority = self.random.below(3) as i32;
                let session =
                    self.engine.session(&SessionOptions { adapters, priority }).expect("known adapters");
                self.actors.push(Actor { session, set, running: None });
            }
            2..=5 if n > 0 && self.actors[i].running.is_none() => self.start(i),
            6 if n > 0 && n < 5 => {
                let session = self.actors[i].session.fork();
                let set = self.actors[i].set.clone();
                self.actors.push(Actor { session, set, running: None });
            }
            7 if n > 0 => {
                let len = self.random.below(self.actors[i].session.tokens().len() + 1);
                self.actors[i].session.rewind(len);
                self.finish(i, true);
            }
            8 if n > 0 && self.random.once_in(2) => {
                let set = self.set();
                let adapters = bind(self.ids, &set);
                self.actors[i].session.set_adapters(&adapters, OnSwitch::Recompute).expect("known adapters");
                let same = |set: &Set| {
                    let mut set: Vec<_> = set.iter().map(|(i, s)| (*i, s.to_bits())).collect();
                    set.sort_unstable();
                    set
                };
                if same(&set) != same(&self.actors[i].set) {
                    self.finish(i, true);
                    self.actors[i].set = set;
                }
            }
            9 if n > 0 && self.actors[i].running.is_some() => {
                let running = self.actors[i].running.as_ref().expect("asked above");
                running.generation.cancel();
                self.finish(i, true);
            }
            10 if n > 0 && self.random.once_in(3) => {
                let mut actor = self.actors.swap_remove(i);
                let running = actor.running.take();
                drop(actor);
                if let Some(running) = running {
                    self.check(running, true);
                }
            }
            11 if n > 0 => {
                let priority = self.random.below(3) as i32;
                self.actors[i].session.set_priority(priority);
            }
            _ => {
                self.engine.step().expect("a step");
            }
        }
        if self.random.once_in(2) {
            self.engine.step().expect("a step");
        }
        for i in 0..self.actors.len() {
            if self.random.once_in(2) {
                self.read(i);
            }
        }
    }

    fn start(&mut self, i: usize) {
        let before = self.actors[i].session.tokens();
        let request = {
            // The session is asked for its length only.
            let actor = self.actors.swap_remove(i);
            let request = self.request(&actor.session);
            self.actors.push(actor);
            request
        };
        let actor = self.actors.last_mut().expect("pushed");
        match actor.session.generate(request.clone()) {
            Ok(generation) => {
                let set = actor.set.clone();
                actor.running =
                    Some(Running { generation, set, before, request, seen: vec![], ended: false });
            }
            Err(e) => {
                // The context is full.
                assert!(before.len() + request.tokens.len() > self.engine.n_ctx(), "{e}");
                actor.session.clear();
            }
        }
    }

    /// Takes what is there for actor `i`.
    fn read(&mut self, i: usize) {
        let Some(running) = self.actors.get_mut(i).and_then(|a| a.running.as_mut()) else { return };
        running.take();
        if running.ended {
            self.finish(i, false);
        }
    }

    /// Reads to the end.
    fn finish(&mut self, i: usize, cut_off: bool) {
        let Some(mut running) = self.actors.get_mut(i).and_then(|a| a.running.take()) else { return };
        if !running.ended {
            let rest: Vec<Seen> = running.generation.by_ref().map(seen).collect();
            running.seen.extend(rest);
        }
        self.check(running, cut_off);
    }

    fn check(&mut self, mut running: Running, cut_off: bool) {
        running.take();
        let Running { generation, set, before, request, mut seen, .. } = running;
        let (want, reason) = self.alone.answer(&set, &before, &request);
        let mut cut_off = cut_off;
        if let Some(Seen::Failed(e)) = seen.last() {
            assert!(self.may_fail && e.contains("KV cache is full"), "{e}");
            seen.pop();
            cut_off = true;
        } else if !cut_off {
            assert_eq!(generation.finish_reason(), reason);
            assert_eq!(seen.len(), want.len(), "{set:?} {before:?} {request:?}");
        }
        // Text that was held back comes out at the end, wherever that is.
        if cut_off && matches!(seen.last(), Some(Seen::Text(_))) {
            seen.pop();
        }
        assert_eq!(seen, want[..seen.len()], "{set:?} {before:?} {request:?}");
    }
}

impl Running {
    fn take(&mut self) {
        while !self.ended {
            match self.generation.poll_next() {
                Poll::Ready(Some(event)) => self.seen.push(seen(event)),
                Poll::Ready(None) => self.ended = true,
                Poll::Pending => return,
            }
        }
    }
}

fn schedules(first: u64, n: u64) {
    let mut alone = Alone::new();
    let mut random = Random(first);
    let mut totals = (0, 0, 0);
    for chunk in 0..n / 25 {
        const POLICIES: [KvPolicy; 5] =
            [KvPolicy::Evict, KvPolicy::Evict, KvPolicy::Queue, KvPolicy::Evict, KvPolicy::Refuse];
        let policy = POLICIES[chunk as usize % 5];
        let options = EngineOptions {
            n_batch: [1, 3, 8, 64][random.below(4)],
            kv_tokens: Some([160, 192, 256, 1024][chunk as usize % 4]),
            kv_policy: policy,
            prefix_sharing: !random.once_in(4),
            threads: Some(1 + random.below(2)),
            ..engines::options()
        };
        let (engine, ids) = engines::engine(&options);
        for schedule in 0..25 {
            let seed = first + chunk * 25 + schedule;
            let mut world = World {
                engine: &engine,
                ids: &ids,
                alone: &mut alone,
                random: Random(seed),
                actors: vec![],
                may_fail: policy != KvPolicy::Evict,
            };
            for _ in 0..40 {
                world.act();
            }
            for i in 0..world.actors.len() {
                world.finish(i, false);
            }
            drop(world);
            assert_eq!(engine.kv_usage().0, 0, "schedule {seed} keeps pages");
        }
        let m = engine.metrics();
        totals = (totals.0 + m.shared_tokens, totals.1 + m.evictions, totals.2 + m.preemptions);
        assert_eq!(m.ended(), m.requests);
    }
    let (shared, evictions, preemptions) = totals;
    println!("{shared} tokens shared, {evictions} sessions evicted, {preemptions} requests put back");
    assert!(shared > 0 && evictions > 0 && preemptions > 0, "the schedules exercise all of it");
}

#[test]
fn schedules_1() {
    schedules(0, 250);
}

#[test]
fn schedules_2() {
    schedules(1000, 250);
}

#[test]
fn schedules_3() {
    schedules(2000, 250);
}

#[test]
fn schedules_4() {
    schedules(3000, 250);
}
