//! No memory for what grows with a request: that request gets an error, and the others go on.
//!
//! The allocator of this program refuses one allocation on demand: the n-th large one of the thread that asks for
//! it. Where a refusal would end the process, so would this test.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
};

use lory_runtime::{Engine, EngineOptions, Event, Request, SamplerOptions, Session, SessionOptions};
use lory_tests::engines;

/// Bytes from which on an allocation counts.
const LARGE: usize = 48 << 10;

thread_local! {
    /// Large allocations until one is refused; 0 refuses none.
    static LEFT: Cell<usize> = const { Cell::new(0) };
}

struct Refusing;

impl Refusing {
    fn refuses(bytes: usize) -> bool {
        bytes >= LARGE
            && LEFT.with(|left| {
                let now = left.get();
                left.set(now.saturating_sub(1));
                now == 1
            })
    }
}

// SAFETY: what is not refused is the system's, with the same layout; null is how an allocator refuses.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match Refusing::refuses(layout.size()) {
            true => std::ptr::null_mut(),
            // SAFETY: the caller's promise.
            false => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match Refusing::refuses(layout.size()) {
            true => std::ptr::null_mut(),
            // SAFETY: the caller's promise.
            false => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match Refusing::refuses(size) {
            true => std::ptr::null_mut(),
            // SAFETY: the caller's promise.
            false => unsafe { System.realloc(at, layout, size) },
        }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

/// Runs `f`, whose `n`-th large allocation (from 1 on) is refused; also whether it came to that.
fn refusing<T>(n: usize, f: impl FnOnce() -> T) -> (T, bool) {
    LEFT.set(n);
    let result = f();
    (result, LEFT.replace(0) == 0)
}

fn prompt(n: u32) -> Vec<u32> {
    (0..n).map(|i| (i * 11 + 5) % 250).collect()
}

fn request(tokens: Vec<u32>, n: usize) -> Request {
    // Penalties that look back on everything.
    let sampler = SamplerOptions { repeat_penalty: 1.1, repeat_last_n: -1, ..SamplerOptions::greedy() };
    Request { tokens, max_new_tokens: n, sampler, ignore_eos: true, ..Request::default() }
}

fn session(engine: &Engine) -> Session {
    engine.session(&SessionOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn tokens(events: impl Iterator<Item = lory_runtime::Result<Event>>) -> Result<Vec<u32>, String> {
    let mut tokens = Vec::new();
    for event in events {
        if let Event::Token { id, .. } = event.map_err(|e| e.to_string())? {
            tokens.push(id);
        }
    }
    Ok(tokens)
}

/// Asks again and again, each time refusing a later allocation, until nothing is refused any more. `ask` may fail only
/// with that; meanwhile another session goes on. How many were refused.
fn refuse_each(options: &EngineOptions, ask: impl Fn(&Engine) -> Result<Vec<u32>, String>) -> usize {
    let engine = engines::bare(options);
    let want = ask(&engine).unwrap_or_else(|e| panic!("{e}"));
    let alone = tokens(session(&engine).generate(request(prompt(20), 4)).expect("accepted")).expect("memory");
    for n in 1.. {
        // A new one, whose buffers have not grown yet.
        let engine = engines::bare(options);
        let mut other = session(&engine);
        let beside = other.generate(request(prompt(20), 4)).expect("accepted");
        let (got, refused) = refusing(n, || ask(&engine));
        match got {
            Ok(got) => assert_eq!(got, want, "allocation {n}"),
            Err(e) => assert!(refused && e.contains("out of memory"), "allocation {n}: {e}"),
        }
        assert_eq!(tokens(beside).as_ref(), Ok(&alone), "beside allocation {n}");
        drop(other);
        assert_eq!(engine.metrics().kv_pages_used, 0);
        if !refused {
            return n - 1;
        }
    }
    0
}

#[test]
fn r10_a_prompt_without_memory_ends_alone() {
    // Longer than the cache: it is taken, and refused when it is its turn.
    let options = EngineOptions { n_ctx: Some(40_000), kv_tokens: Some(256), ..engines::options() };
    let long = prompt(20_000);
    let refused = refuse_each(&options, |engine| {
        let mut session = session(engine);
        // The request's own copy of the prompt is the caller's business.
        let tokens = LEFT.replace(0);
        let request = request(long.clone(), 1);
        LEFT.set(tokens);
        match session.generate(request) {
            Ok(generation) => drop(generation),
            Err(e) => return Err(e.to_string()),
        }
        assert_eq!(session.rewind_to_common(&long), long.len());
        Ok(vec![])
    });
    assert!(refused >= 3, "history, penalties and tokens: {refused}");
}

#[test]
fn r10_logits_need_no_memory_of_their_own() {
    // 64 rows of logits at a time would be the one large buffer of a step; on the processor they are looked at where they were computed.
    let refused = refuse_each(&EngineOptions { prefix_sharing: false, ..engines::options() }, |engine| {
        let mut session = session(engine);
        let request = Request { prompt_logprobs: Some(0), ..request(prompt(64), 3) };
        tokens(session.generate(request).map_err(|e| e.to_string())?)
    });
    assert_eq!(refused, 0, "large allocations of a step");
}

#[test]
fn r10_a_saved_session_without_memory_is_refused_whole() {
    let options = EngineOptions { n_ctx: Some(40_000), kv_tokens: Some(40_000), ..engines::options() };
    let engine = engines::bare(&options);
    let mut saved = session(&engine);
    drop(saved.generate(request(prompt(20_000), 1)).expect("accepted"));
    let mut bytes = Vec::new();
    saved.save_to(&mut bytes).expect("memory");
    for n in 1.. {
        let sessions = engine.metrics().sessions;
        let (restored, refused) =
            refusing(n, || engine.restore_from(&mut &*bytes, "saved", &SessionOptions::default()));
        match restored {
            Ok(restored) => assert_eq!(restored.tokens(), saved.tokens()),
            Err(e) => assert!(refused && e.to_string().contains("out of memory"), "{e}"),
        }
        assert_eq!(engine.metrics().sessions, sessions, "nothing remains");
        if !refused {
            assert!(n > 1);
            break;
        }
    }
}
