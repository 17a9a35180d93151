//! Memory that is not there: each of the large allocations of a call fails once, which is an error with
//! words, changes nothing, and leaves an engine that goes on serving.
#![cfg(unix)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    ffi::CStr,
    ptr::{null, null_mut},
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
};

use lory::{
    adapters::{lory_adapter_load, lory_adapter_load_memory, lory_adapter_unload},
    engine::{lory_engine, lory_engine_free},
    generation::{lory_generation, lory_generation_free, lory_generation_text},
    memory::{lory_text, lory_text_free},
    open::{lory_engine_open, lory_engine_open_memory},
    options::{LORY_KV_F32, LORY_LOADING_READ, lory_engine_options, lory_engine_options_init},
    request::{lory_request, lory_request_init},
    sampler::{lory_sampler_options, lory_sampler_options_init},
    saved::{lory_session_restore_memory, lory_session_save_memory},
    session::{lory_session, lory_session_free, lory_session_generate, lory_session_new},
    status::{lory_last_error, lory_status, lory_status::*},
};
use lory_tests::fixtures::fixture;

/// What counts as large: buffers of weights, caches, steps and states, when files are as long, the context
/// and the batch as wide as below; but not vocabularies and what their regular expressions compile to.
const LARGE: usize = 1 << 20;

/// Large allocations until one fails; 0 is none.
static LEFT: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, of which one large allocation fails.
struct Failing;

fn fails(size: usize) -> bool {
    size >= LARGE && LEFT.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) == Ok(1)
}

// SAFETY: the system's allocator, which may return NULL at any time.
unsafe impl GlobalAlloc for Failing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's word.
        if fails(layout.size()) { null_mut() } else { unsafe { System.alloc(layout) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's word.
        if fails(layout.size()) { null_mut() } else { unsafe { System.alloc_zeroed(layout) } }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Only what grows can fail.
        let fails = size > layout.size() && fails(size);
        // SAFETY: the caller's word.
        if fails { null_mut() } else { unsafe { System.realloc(old, layout, size) } }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: the caller's word.
        unsafe { System.dealloc(old, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Failing = Failing;

fn words() -> String {
    // SAFETY: NUL-terminated until the next failure.
    unsafe { CStr::from_ptr(lory_last_error()) }.to_str().expect("UTF-8").to_owned()
}

fn ok(status: lory_status) {
    assert_eq!(status, LORY_OK, "{}", words());
}

fn init<T>(f: impl FnOnce(*mut T, usize) -> lory_status) -> T {
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    ok(f(value.as_mut_ptr(), size_of::<T>()));
    // SAFETY: every struct of the header may be zero, and this one has been initialised.
    unsafe { value.assume_init() }
}

fn options() -> lory_engine_options {
    // SAFETY: a pointer to what lives during the call; so everywhere below.
    let mut options: lory_engine_options = init(|o, n| unsafe { lory_engine_options_init(o, n) });
    (options.threads, options.n_ctx, options.n_batch) = (1, 4096, 4096);
    (options.kv_type, options.loading) = (LORY_KV_F32, LORY_LOADING_READ);
    options
}

/// Tokens whose keys and values are large.
const LONG: [u32; 2500] = [1; 2500];

fn session(engine: *const lory_engine) -> *mut lory_session {
    let mut session = null_mut();
    // SAFETY: as above.
    ok(unsafe { lory_session_new(engine, null(), &mut session) });
    session
}

/// A session's greedy answer.
fn answer(session: *mut lory_session, tokens: &[u32]) -> Vec<u8> {
    // SAFETY: as above.
    unsafe {
        let mut sampler: lory_sampler_options = init(|o, n| lory_sampler_options_init(o, n));
        sampler.temp = 0.0;
        let mut request: lory_request = init(|o, n| lory_request_init(o, n));
        (request.tokens, request.n_tokens, request.sampler) = (tokens.as_ptr(), tokens.len(), &sampler);
        (request.max_new_tokens, request.ignore_eos) = (8, 1);
        let mut generation: *mut lory_generation = null_mut();
        ok(lory_session_generate(session, &request, &mut generation));
        let mut text = lory_text { data: null_mut(), len: 0 };
        ok(lory_generation_text(generation, &mut text));
        lory_generation_free(generation);
        take(text)
    }
}

/// The answer of a new session.
fn first_answer(engine: *const lory_engine) -> Vec<u8> {
    let session = session(engine);
    let answer = answer(session, &LONG);
    // SAFETY: freed once.
    unsafe { lory_session_free(session) };
    answer
}

fn take(mut text: lory_text) -> Vec<u8> {
    // SAFETY: lory gave it; freed once.
    unsafe {
        let bytes = std::slice::from_raw_parts(text.data.cast::<u8>(), text.len).to_vec();
        lory_text_free(&mut text);
        bytes
    }
}

/// Calls `call` again and again while its first, second, third … large allocation fails, until it has as
/// many as it wants. How many those are.
fn each_failure(what: &str, mut call: impl FnMut() -> lory_status) -> usize {
    for n in 0.. {
        LEFT.store(n + 1, SeqCst);
        let status = call();
        let fired = LEFT.swap(0, SeqCst) == 0;
        if !fired {
            ok(status);
            return n;
        }
        assert!([LORY_E_IO, LORY_E_DEVICE].contains(&status), "{what}, allocation {n}: {status:?}");
        assert!(words().contains("memory"), "{what}, allocation {n}: {}", words());
    }
    unreachable!("it ends when nothing fails any more")
}

#[test]
fn r10_large_allocations_may_fail() {
    let folder = tempfile::tempdir().expect("a folder");
    // Files as long as those of larger models.
    let long = |name: &str| {
        let mut bytes = std::fs::read(fixture(name)).expect("a fixture");
        bytes.resize(LARGE, 0);
        let path = folder.path().join(name.replace('/', "-"));
        std::fs::write(&path, &bytes).expect("written");
        (bytes, path.to_str().expect("UTF-8").to_owned())
    };
    let (model, model_path) = long("models/llama.gguf");
    let (lora, lora_path) = long("lora/all.gguf");
    let (options, mut e) = (options(), null_mut());
    // SAFETY: as above.
    ok(unsafe { lory_engine_open(model_path.as_ptr().cast(), model_path.len(), &options, &mut e) });
    let session = session(e);
    let want = answer(session, &LONG);

    let mut opened = null_mut();
    // SAFETY: pointers to what lives during the call; so everywhere below.
    unsafe {
        let n = each_failure("a model from a path", || {
            lory_engine_open(model_path.as_ptr().cast(), model_path.len(), &options, &mut opened)
        });
        assert!(n >= 3, "file, cache, buffers: {n}");
        assert_eq!(first_answer(opened), want);
        lory_engine_free(opened);
        opened = null_mut();
        let (data, len) = (model.as_ptr().cast(), model.len());
        let n = each_failure("a model from memory", || {
            lory_engine_open_memory(data, len, c"m".as_ptr(), 1, None, null_mut(), &options, &mut opened)
        });
        assert!(n >= 3, "{n}");
        lory_engine_free(opened);

        let mut id = 0;
        let n = each_failure("an adapter from memory", || {
            let (data, len) = (lora.as_ptr().cast(), lora.len());
            lory_adapter_load_memory(e, data, len, c"m".as_ptr(), 1, 0, &mut id)
        });
        assert!(n >= 1 && id > 0, "{n}");
        let n = each_failure("an adapter from a path", || {
            lory_adapter_load(e, lora_path.as_ptr().cast(), lora_path.len(), c"p".as_ptr(), 1, &mut id)
        });
        assert!(n >= 1, "{n}");
        for name in [c"m", c"p"] {
            ok(lory_adapter_unload(e, name.as_ptr(), 1));
        }

        let mut bytes = lory_text { data: null_mut(), len: 0 };
        let n = each_failure("a saved session", || lory_session_save_memory(session, &mut bytes));
        assert!(n >= 1, "{n}");
        let saved = take(bytes);
        let mut restored = null_mut();
        each_failure("a restored session", || {
            lory_session_restore_memory(e, saved.as_ptr().cast(), saved.len(), null(), &mut restored)
        });
        assert_eq!(answer(session, &[2, 3]), answer(restored, &[2, 3]));
        lory_session_free(restored);
        lory_session_free(session);
        assert_eq!(first_answer(e), want, "after all that");
        lory_engine_free(e);
    }
}
