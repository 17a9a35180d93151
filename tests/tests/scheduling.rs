//! Whose turn it is, how fast a cancelled request ends, what a slow reader costs, what happens when
//! the cache is full, and what the metrics say about it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_core::Stream;
use lory_runtime::{
    Engine, EngineOptions, Event, FinishReason, Generation, Hidden, KvPolicy, Pooling, Request,
    SamplerOptions, Session, SessionOptions, normalize,
};
use lory_tests::engines;

fn prompt(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 11 + 3) % 250).collect()
}

fn greedy(tokens: &[u32], n: usize) -> Request {
    Request {
        tokens: tokens.into(),
        max_new_tokens: n,
        sampler: SamplerOptions { logprobs: Some(0), ..SamplerOptions::greedy() },
        ignore_eos: true,
        ..Request::default()
    }
}

fn session(engine: &Engine, priority: i32) -> Session {
    engine.session(&SessionOptions { adapters: vec![], priority }).expect("a session")
}

fn token(event: lory_runtime::Result<Event>) -> Option<(u32, u32)> {
    match event {
        Ok(Event::Token { id, logprob, .. }) => Some((id, logprob.expect("asked for").to_bits())),
        Ok(_) => None,
        Err(e) => panic!("{e}"),
    }
}

fn read(event: lory_runtime::Result<Event>) {
    token(event);
}

fn failure(generation: &mut Generation) -> String {
    let end = generation.by_ref().find_map(|e| e.err());
    end.expect("an error").to_string()
}

#[test]
fn higher_priorities_go_first_and_nobody_starves() {
    let engine = engines::bare(&EngineOptions { n_batch: 1, ..engines::options() });
    let (mut high, mut low) = (session(&engine, 2), session(&engine, 0));
    let mut low = low.generate(greedy(&[5], 150)).expect("accepted");
    let mut high = high.generate(greedy(&[5], 150)).expect("accepted");
    let mut turns = Vec::new();
    for _ in 0..120 {
        assert!(engine.step().expect("a step"));
        for (name, generation) in [('h', &mut high), ('l', &mut low)] {
            while let Poll::Ready(Some(event)) = generation.poll_next() {
                turns.extend(token(event).map(|_| name));
            }
        }
    }
    assert_eq!(turns.len(), 120, "a token per step");
    assert!(turns[..16].iter().all(|t| *t == 'h'), "{turns:?}");
    let mine: Vec<usize> = turns.iter().enumerate().filter(|(_, t)| **t == 'l').map(|(i, _)| i).collect();
    // Two levels of priority, 16 steps of waiting each.
    assert!(mine[0] <= 2 * 16 + 1 && mine.windows(2).all(|w| w[1] - w[0] <= 2 * 16 + 1), "{mine:?}");
    assert!(mine.len() <= 8, "{mine:?}");
}

#[test]
fn equals_take_turns_and_prompts_get_theirs() {
    let engine = engines::bare(&EngineOptions { n_batch: 2, ..engines::options() });
    let mut sessions: Vec<_> = (0..4).map(|_| session(&engine, 0)).collect();
    let mut talking: Vec<_> =
        sessions.iter_mut().map(|s| s.generate(greedy(&[5], 60)).expect("accepted")).collect();
    let mut late = session(&engine, 0);
    let mut late = late.generate(greedy(&prompt(20), 1)).expect("accepted");
    let mut counts = [0; 4];
    let mut first = None;
    for step in 0..200 {
        engine.step().expect("a step");
        for (i, generation) in talking.iter_mut().enumerate() {
            while let Poll::Ready(Some(event)) = generation.poll_next() {
                token(event);
                counts[i] += 1;
            }
        }
        let (low, high) = (counts.iter().min().expect("four"), counts.iter().max().expect("four"));
        assert!(high - low <= 2, "{counts:?}");
        if let Poll::Ready(Some(_)) = late.poll_next() {
            first = first.or(Some(step));
        }
    }
    // Ten steps of two rows, each after at most 16 of waiting.
    assert!(first.is_some_and(|step| step <= 170), "{first:?}");
}

#[test]
fn a_step_has_room_for_more_sessions_than_a_context_has_tokens() {
    let options = EngineOptions { n_ctx: Some(8), kv_tokens: Some(40 * 32), ..engines::options() };
    let engine = engines::bare(&options);
    let mut sessions: Vec<_> = (0..40).map(|_| session(&engine, 0)).collect();
    let mut talking: Vec<_> =
        sessions.iter_mut().map(|s| s.generate(greedy(&[5], 2)).expect("accepted")).collect();
    engine.step().expect("a step");
    assert!(talking.iter_mut().all(|g| matches!(g.poll_next(), Poll::Ready(Some(Ok(_))))), "all in one step");
}

#[test]
fn a_cancelled_request_ends_within_a_step() {
    let engine = engines::bare(&EngineOptions { n_batch: 8, ..engines::options() });
    let (mut a, mut b) = (session(&engine, 0), session(&engine, 0));
    let mut a = a.generate(greedy(&prompt(100), 10)).expect("accepted");
    let mut b = b.generate(greedy(&[1], 50)).expect("accepted");
    engine.step().expect("a step");
    engine.step().expect("a step");
    let ran = a.stats().prompt_tokens;
    assert!(ran > 0 && ran < 100, "{ran}");
    a.cancel();
    engine.step().expect("a step");
    assert!(matches!(a.poll_next(), Poll::Ready(None)));
    assert_eq!((a.finish_reason(), a.stats().prompt_tokens), (Some(FinishReason::Cancelled), ran));
    assert_eq!(b.by_ref().filter_map(token).count(), 50, "the other goes on");
}

#[test]
fn who_does_not_read_is_not_run() {
    let engine = engines::bare(&engines::options());
    let mut slow = session(&engine, 0);
    let mut generation = slow.generate(Request { max_queued: 3, ..greedy(&[5], 20) }).expect("accepted");
    let mut other = session(&engine, 0);
    let mut quick = other.generate(greedy(&[5], 20)).expect("accepted");
    for _ in 0..10 {
        engine.step().expect("a step");
    }
    assert_eq!(slow.tokens().len(), 1 + 3);
    let want: Vec<_> = quick.by_ref().filter_map(token).collect();
    assert_eq!(want.len(), 20);
    assert!(!engine.step().expect("a step"), "nothing to run");
    assert!(matches!(generation.poll_next(), Poll::Ready(Some(Ok(_)))));
    engine.step().expect("a step");
    assert_eq!(slow.tokens().len(), 1 + 4);
    assert_eq!(generation.filter_map(token).collect::<Vec<_>>(), want[1..]);
    // The outputs of a prompt wait in the same queue.
    let mut prompted = session(&engine, 0);
    let request = Request { prompt_logits: true, max_queued: 4, ..greedy(&prompt(30), 0) };
    let logits = prompted.generate(request).expect("accepted");
    engine.step().expect("a step");
    engine.step().expect("a step");
    assert_eq!(prompted.cached_tokens(), 4);
    assert_eq!(logits.filter(|e| matches!(e, Ok(Event::Logits { .. }))).count(), 30);
}

#[test]
fn a_full_cache_is_handled_as_the_policy_says() {
    let open = |kv_policy| {
        engines::bare(&EngineOptions { kv_policy, kv_tokens: Some(96), n_batch: 32, ..engines::options() })
    };
    let text = prompt(40);
    let want: Vec<_> = {
        let engine = open(KvPolicy::Evict);
        let mut s = session(&engine, 0);
        s.generate(greedy(&text, 40)).expect("accepted").filter_map(token).collect()
    };
    // Two requests of 80 tokens in a cache of 96: one waits, and both answer as alone.
    for policy in [KvPolicy::Evict, KvPolicy::Queue] {
        let engine = open(policy);
        let (mut a, mut b) = (session(&engine, 0), session(&engine, 0));
        let first = a.generate(greedy(&text, 40)).expect("accepted");
        let second = b.generate(greedy(&prompt(41)[1..], 40)).expect("accepted");
        assert_eq!(first.filter_map(token).collect::<Vec<_>>(), want, "{policy:?}");
        if policy == KvPolicy::Queue {
            drop(a);
        }
        assert_eq!(second.filter_map(token).count(), 40, "{policy:?}");
        assert!(engine.metrics().preemptions > 0);
    }
    // An idle session loses its cache, keeps it, or keeps it and lets the other fail at once.
    for policy in [KvPolicy::Evict, KvPolicy::Queue, KvPolicy::Refuse] {
        let engine = open(policy);
        let (mut idle, mut busy) = (session(&engine, 0), session(&engine, 0));
        idle.generate(greedy(&text, 1)).expect("accepted").for_each(read);
        let mut generation = busy.generate(greedy(&prompt(80)[1..], 10)).expect("accepted");
        if policy == KvPolicy::Evict {
            assert_eq!(generation.by_ref().filter_map(token).count(), 10);
            assert_eq!((idle.cached_tokens(), engine.metrics().evictions), (0, 1));
        } else {
            assert!(failure(&mut generation).contains("KV cache is full"));
            assert_eq!(idle.cached_tokens(), 40);
        }
        drop(busy);
        let rest: Vec<_> =
            idle.generate(greedy(&[], 39)).expect("accepted").map_while(|e| e.ok()).map(Ok).collect();
        assert_eq!(rest.into_iter().filter_map(token).collect::<Vec<_>>(), want[1..], "{policy:?}");
    }
    // What would not fit alone fails at nobody's cost.
    let engine = open(KvPolicy::Evict);
    let (mut small, mut big) = (session(&engine, 0), session(&engine, 0));
    small.generate(greedy(&text, 1)).expect("accepted").for_each(read);
    assert!(failure(&mut big.generate(greedy(&prompt(100), 1)).expect("accepted")).contains("full"));
    assert_eq!(small.cached_tokens(), 40);
}

/// In a queue, a reader that is slow keeps its place, which is no reason for others to lose theirs.
#[test]
fn a_slow_reader_costs_a_queue_no_more_than_its_place() {
    let open = |pages: usize| {
        let options = engines::options();
        engines::bare(&EngineOptions {
            kv_policy: KvPolicy::Queue,
            kv_tokens: Some(32 * pages),
            prefix_sharing: false,
            ..options
        })
    };
    let slow = |s: &mut Session| {
        let request = Request { max_queued: 1, ..greedy(&prompt(30), 50) };
        s.generate(request).expect("accepted")
    };
    // Three pages each for two requests, and one for who does not read.
    let engine = open(4);
    let (mut a, mut b, mut c) = (session(&engine, 0), session(&engine, 0), session(&engine, 0));
    let first = a.generate(greedy(&prompt(31)[1..], 50)).expect("accepted");
    let second = b.generate(greedy(&prompt(32)[2..], 50)).expect("accepted");
    let unread = slow(&mut c);
    assert_eq!(first.filter_map(token).count(), 50, "the first one waits for nobody");
    drop(a);
    assert_eq!(second.filter_map(token).count(), 50, "nor does the second now");
    assert_eq!((c.cached_tokens(), unread.finish_reason()), (30, None), "who does not read keeps its place");

    // A cache in which the first one finds no room beside the slow reader, and the next one does.
    let engine = open(3);
    let (mut c, mut a, mut b) = (session(&engine, 0), session(&engine, 0), session(&engine, 0));
    let unread = slow(&mut c);
    engine.step().expect("a step");
    let mut large = a.generate(greedy(&prompt(31)[1..], 50)).expect("accepted");
    let small = b.generate(greedy(&prompt(32)[2..], 20)).expect("accepted");
    assert!(failure(&mut large).contains("KV cache is full"));
    assert_eq!(small.filter_map(token).count(), 20, "what the first one left is the next one's");
    assert_eq!((c.cached_tokens(), unread.finish_reason()), (30, None));
}

#[test]
fn a_seed_from_the_system_can_be_given_again() {
    let engine = engines::bare(&engines::options());
    let mut s = session(&engine, 0);
    let draw = |s: &mut Session, seed| {
        let sampler = SamplerOptions { seed, temp: 2.0, logprobs: Some(0), ..SamplerOptions::default() };
        s.clear();
        let mut generation = s.generate(Request { sampler, ..greedy(&[5], 20) }).expect("accepted");
        let seed = generation.stats().seed;
        (generation.by_ref().filter_map(token).collect::<Vec<_>>(), seed, generation.stats().seed)
    };
    let first = draw(&mut s, None);
    assert_eq!(first.1, first.2, "from its beginning on");
    assert_eq!(draw(&mut s, Some(first.1)), first);
    assert_ne!(draw(&mut s, None).1, first.1);
}

#[test]
fn metrics_count_what_was_done() {
    let engine = engines::bare(&EngineOptions { n_batch: 16, ..engines::options() });
    let mut s = session(&engine, 0);
    s.generate(greedy(&prompt(40), 5)).expect("accepted").for_each(read);
    let mut again = session(&engine, 0);
    again.generate(greedy(&prompt(40), 2)).expect("accepted").for_each(read);
    let m = engine.metrics();
    assert_eq!((m.requests, m.endings.length, m.ended()), (2, 2, 2));
    assert_eq!((m.prompt_tokens, m.cached_tokens, m.shared_tokens), (40 + 8, 32, 32));
    assert_eq!((m.generated_tokens, m.ttft.count, m.tpot.count), (7, 2, 2));
    // 16, 16 and 8 rows, then 4 tokens; 8 rows, then one token.
    assert_eq!((m.steps, m.rows, m.row_capacity), (9, 40 + 4 + 8 + 1, 9 * 16));
    assert_eq!((m.sessions, m.running, m.queued), (2, 0, 0));
    assert!(m.step_time > std::time::Duration::ZERO && m.tokens_per_second() > 0.0);
    assert!((m.batch_fill() - 53.0 / 144.0).abs() < 1e-9);
    // 44 and 41 cached tokens: two pages each, the first one shared.
    assert_eq!((m.kv_pages_used, m.kv_pages), (3, 20));
    assert!(m.prometheus().contains("lory_generated_tokens_total 7\n"));
}

#[test]
fn scores_are_the_log_probabilities_of_the_same_tokens_generated() {
    let engine = engines::bare(&engines::options());
    let text = prompt(40);
    let mut s = session(&engine, 0);
    let generated: Vec<_> = s.generate(greedy(&text, 8)).expect("accepted").filter_map(token).collect();
    let best: Vec<u32> = generated.iter().map(|(id, _)| *id).collect();
    let mut worse = best.clone();
    worse[0] = (worse[0] + 1) % 250;
    let reader = session(&engine, 0);
    let scores = reader.score(&text, &[best.clone(), worse, vec![]]).expect("scored");
    let bits: Vec<u32> = scores[0].logprobs.iter().map(|p| p.to_bits()).collect();
    assert_eq!(bits, generated.iter().map(|(_, p)| *p).collect::<Vec<_>>());
    assert!(scores[0].logprobs[0] > scores[1].logprobs[0], "the greedy choice is the likeliest");
    assert_eq!(scores[1].logprobs.len(), 8);
    assert_eq!((scores[2].logprobs.len(), scores[2].total), (0, 0.0));
    let sum: f64 = scores[0].logprobs.iter().map(|p| f64::from(*p)).sum();
    assert_eq!(scores[0].total, sum);
    assert!(reader.tokens().is_empty(), "the session does not change");
    // A session's own tokens count as prompt.
    s.rewind(40);
    assert_eq!(s.score(&[], &[best]).expect("scored")[0], scores[0]);
    assert!(reader.score(&[], &[vec![1]]).expect_err("nothing before").to_string().contains("prompt"));
}

#[test]
fn embeddings_are_the_states_that_the_logits_come_from() {
    let engine = engines::bare(&EngineOptions { n_batch: 9, ..engines::options() });
    let text = prompt(40);
    let s = session(&engine, 0);
    let rows = s.embed(&text, Pooling::None).expect("embedded");
    let width = engine.model().decoder.config().n_embd;
    assert!(rows.len() == 40 && rows.iter().all(|r| r.len() == width));
    assert_eq!(s.embed(&text, Pooling::Last).expect("embedded"), [rows[39].clone()]);
    let mean = s.embed(&text, Pooling::Mean).expect("embedded");
    for (i, v) in mean[0].iter().enumerate() {
        let want = rows.iter().map(|r| f64::from(r[i])).sum::<f64>() / 40.0;
        assert!((f64::from(*v) - want).abs() < 1e-6);
    }
    // The output layer on a state gives the logits.
    let mut logits = Vec::new();
    let mut reader = session(&engine, 0);
    let request = Request { prompt_logits: true, hidden: Hidden::All, ..greedy(&text, 0) };
    for event in reader.generate(request).expect("accepted") {
        match event.expect("no error") {
            Event::Logits { values, .. } => logits.push(values),
            Event::Hidden { position, values } => assert_eq!(values, rows[position]),
            other => panic!("{other:?}"),
        }
    }
    let output = engine
        .model()
        .gguf
        .tensor("output.weight")
        .or_else(|_| engine.model().gguf.tensor("token_embd.weight"));
    let output = output.expect("an output layer");
    let mut weights = vec![0.0; output.rows() * output.cols()];
    lory_kernels::quant::dequantize_row(output.ty(), output.matrix().bytes(), &mut weights).expect("floats");
    for (state, logits) in rows.iter().zip(&logits) {
        for (w, got) in weights.chunks_exact(width).zip(logits) {
            let want: f64 = w.iter().zip(state).map(|(w, x)| f64::from(w * x)).sum();
            assert!((want - f64::from(*got)).abs() < 1e-3 * want.abs().max(1.0), "{want} {got}");
        }
    }
    let mut unit = mean[0].clone();
    normalize(&mut unit);
    assert!((unit.iter().map(|v| f64::from(v * v)).sum::<f64>() - 1.0).abs() < 1e-5);
    assert!(s.embed(&[], Pooling::Mean).is_err());
}

/// Polls like an executor of one thread: only who was woken.
struct Flag(AtomicBool, AtomicUsize);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
        self.1.fetch_add(1, Ordering::Relaxed);
    }
}

fn drain(generations: &mut [Generation], park: impl Fn()) -> Vec<Vec<(u32, u32)>> {
    let flags: Vec<_> =
        generations.iter().map(|_| Arc::new(Flag(AtomicBool::new(true), AtomicUsize::new(0)))).collect();
    let mut out = vec![Vec::new(); generations.len()];
    let mut open = generations.len();
    let mut ended = vec![false; generations.len()];
    while open > 0 {
        let mut polled = false;
        for (i, generation) in generations.iter_mut().enumerate() {
            if ended[i] || !flags[i].0.swap(false, Ordering::AcqRel) {
                continue;
            }
            polled = true;
            let waker = Waker::from(flags[i].clone());
            match Stream::poll_next(Pin::new(generation), &mut Context::from_waker(&waker)) {
                Poll::Ready(Some(event)) => {
                    out[i].extend(token(event));
                    flags[i].0.store(true, Ordering::Release);
                }
                Poll::Ready(None) => {
                    ended[i] = true;
                    open -= 1;
                }
                Poll::Pending => {}
            }
        }
        if !polled {
            park();
        }
    }
    out
}

#[test]
fn streams_run_on_an_executor_alone_and_with_a_driving_thread() {
    let engine = engines::bare(&engines::options());
    let start = |sessions: &mut [Session]| -> Vec<Generation> {
        let starts = sessions.iter_mut().enumerate();
        starts.map(|(i, s)| s.generate(greedy(&prompt(30 + i as u32), 12)).expect("accepted")).collect()
    };
    let mut sessions: Vec<_> = (0..3).map(|_| session(&engine, 0)).collect();
    let want: Vec<Vec<_>> = start(&mut sessions).into_iter().map(|g| g.filter_map(token).collect()).collect();
    sessions.iter_mut().for_each(Session::clear);
    let got = drain(&mut start(&mut sessions), || panic!("nobody was woken, and nobody has ended"));
    assert_eq!(got, want);

    sessions.iter_mut().for_each(Session::clear);
    let go_on = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| engine.drive(|| go_on.load(Ordering::Acquire)));
        let got = drain(&mut start(&mut sessions), std::thread::yield_now);
        assert_eq!(got, want);
        go_on.store(false, Ordering::Release);
        engine.wake_drivers();
    });
}

#[test]
fn a_driver_that_is_woken_while_it_asks_does_not_sleep() {
    let engine = engines::bare(&engines::options());
    let asked = AtomicUsize::new(0);
    engine.drive(|| {
        // As another thread might, after its answer and before the driver sleeps.
        engine.wake_drivers();
        asked.fetch_add(1, Ordering::Relaxed) < 2
    });
    assert_eq!(asked.into_inner(), 3);
}

#[test]
fn asking_a_session_something_never_stops_those_who_wait() {
    let engine = engines::bare(&engines::options());
    let asked = session(&engine, 0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Acquire) {
                asked.tokens();
            }
        });
        for _ in 0..20 {
            let mut s = session(&engine, 0);
            let got = s.generate(greedy(&prompt(20), 20)).expect("accepted").filter_map(token).count();
            assert_eq!(got, 20);
        }
        stop.store(true, Ordering::Release);
    });
}
