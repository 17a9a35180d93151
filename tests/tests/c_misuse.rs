//! What a C program can do wrong: sizes and constants that do not exist, handles in the wrong order or of
//! another model, callbacks that call back.
#![cfg(unix)]

use std::{
    ffi::{c_char, c_void},
    ptr::{self, null_mut},
};

use lory_tests::{
    c_api::{self as c, Handle, lory},
    fixtures::{self, fixture},
};

fn engine() -> Handle<c::lory_engine> {
    c::engine(&fixture("models/llama.gguf"), &c::options()).unwrap_or_else(|e| panic!("{e}"))
}

fn session(engine: &Handle<c::lory_engine>) -> Handle<c::lory_session> {
    c::session(engine.ptr, &[]).unwrap_or_else(|e| panic!("{e}"))
}

/// The status and the words for it.
fn fails(status: c::lory_status) -> (c::lory_status, String) {
    assert_ne!(status, c::LORY_OK, "accepted");
    (status, c::last_error())
}

#[test]
fn lengths_without_arrays_are_refused() {
    let e = engine();
    let s = session(&e);
    let sampler = c::greedy();
    let null = |status| assert_eq!(fails(status).0, c::LORY_E_NULL);
    let mut place: *mut c::lory_generation = null_mut();
    // SAFETY: pointers to what lives during the call; so everywhere below.
    let mut generate = |r: &c::lory_request| unsafe { lory().lory_session_generate(s.ptr, r, &mut place) };
    null(generate(&c::lory_request { tokens: ptr::null(), n_tokens: 3, ..c::request(&[], 1, &sampler) }));
    null(generate(&c::lory_request { n_stop: 1, ..c::request(&[1], 1, &sampler) }));
    let biased = c::lory_sampler_options { n_logit_bias: 1, ..sampler };
    null(generate(&c::request(&[1], 1, &biased)));
    let broken = c::lory_sampler_options { n_dry_breakers: 1, ..sampler };
    null(generate(&c::request(&[1], 1, &broken)));
    let stop = [c::lory_str { data: ptr::null(), len: 1 }];
    null(generate(&c::lory_request { stop: stop.as_ptr(), n_stop: 1, ..c::request(&[1], 1, &sampler) }));
    // Longer than memory can be.
    let (status, words) =
        fails(generate(&c::lory_request { n_tokens: usize::MAX / 2, ..c::request(&[1], 1, &sampler) }));
    assert_eq!(status, c::LORY_E_ARGUMENT, "{words}");
    // SAFETY: as above.
    unsafe {
        null(lory().lory_session_set_adapters(s.ptr, ptr::null(), 1, 0));
        let mut chat = c::init(|o, n| lory().lory_chat_options_init(o, n));
        chat.n_messages = 2;
        null(lory().lory_chat_render(e.ptr, &chat, &mut c::lory_text::default()));
        let spans = [c::lory_token_span { data: ptr::null(), len: 2 }];
        let floats = &mut c::lory_floats::default();
        null(lory().lory_session_score(s.ptr, [1].as_ptr(), 1, spans.as_ptr(), 1, floats));
        let generations = [null_mut()];
        let mut event = c::init(|o, n| lory().lory_event_init(o, n));
        null(lory().lory_generations_next(generations.as_ptr(), 1, &mut 0, &mut event));
    }
    assert!(place.is_null());
}

#[test]
fn structs_of_other_sizes() {
    #[repr(C)]
    struct Longer {
        known: c::lory_engine_options,
        later: [u64; 2],
    }
    let path = fixture("models/llama.gguf");
    let open = |o: &Longer| c::engine(&path, &o.known).map(drop);
    let size = size_of::<Longer>();
    let longer =
        |later| Longer { known: c::lory_engine_options { struct_size: size, ..c::options() }, later };
    open(&longer([0, 0])).expect("a later header's struct with nothing set");
    let words = open(&longer([0, 5])).expect_err("a field that this library does not have");
    assert!(words.contains("lory_engine_options sets a field"), "{words}");

    // `lory_engine_options` ended before these fields once.
    let first = std::mem::offset_of!(c::lory_engine_options, gpu_layers);
    for struct_size in [first, std::mem::offset_of!(c::lory_engine_options, device_adapter_bytes)] {
        let later =
            c::lory_engine_options { gpu_layers: u32::MAX, device_adapter_bytes: u64::MAX, ..c::options() };
        let earlier = c::lory_engine_options { struct_size, ..later };
        c::engine(&path, &earlier).map(drop).expect("a program of an earlier header");
    }
    for wrong in [0, 1, 8, first - 1, 1 << 40, usize::MAX] {
        let options = c::lory_engine_options { struct_size: wrong, ..c::options() };
        let words = c::engine(&path, &options).err().expect("refused");
        assert!(words.contains(&format!("struct_size is {wrong}, expected")), "{words}");
    }
    for wrong in [0, 1, 8, size_of::<c::lory_event>() - 1, 1 << 40, usize::MAX] {
        // SAFETY: a pointer to what lives during the call; nothing is written.
        let (status, _) = fails(unsafe { lory().lory_event_init(&mut c::lory_event::default(), wrong) });
        assert_eq!(status, c::LORY_E_STRUCT_SIZE);
    }
    let e = engine();
    let mut metrics = c::lory_metrics::default();
    // SAFETY: as above.
    let (status, _) = fails(unsafe { lory().lory_engine_metrics(e.ptr, &mut metrics) });
    assert_eq!(status, c::LORY_E_STRUCT_SIZE, "not initialised");
}

#[test]
fn a_program_of_the_first_header_gets_what_it_knows() {
    // `lory_metrics` ended here once.
    let first = std::mem::offset_of!(c::lory_metrics, kv_bytes_dropped);
    let mut metrics = c::lory_metrics { kv_bytes_dropped: 77, ..Default::default() };
    let e = engine();
    // SAFETY: a pointer to what lives during the call.
    unsafe {
        c::ok(lory().lory_metrics_init(&mut metrics, first)).expect("a size of the past");
        c::ok(lory().lory_engine_metrics(e.ptr, &mut metrics)).expect("metrics");
    }
    assert_eq!((metrics.struct_size, metrics.kv_bytes_dropped), (first, 77), "written behind its end");
    assert!(metrics.kv_bytes > 0);
}

#[test]
fn constants_and_ranges() {
    let path = fixture("models/llama.gguf");
    let open = |o: c::lory_engine_options| c::engine(&path, &o).map(drop);
    let refused = |o, what: &str| {
        let words = open(o).expect_err(what);
        assert!(words.contains(what), "{words}");
    };
    refused(c::lory_engine_options { loading: 9, ..c::options() }, "loading is 9");
    refused(c::lory_engine_options { kv_type: 77, ..c::options() }, "kv_type is 77");
    refused(c::lory_engine_options { repacking: 7, ..c::options() }, "repacking is 7");
    refused(c::lory_engine_options { kv_policy: 3, ..c::options() }, "kv_policy is 3");
    refused(c::lory_engine_options { device: 66, ..c::options() }, "device is 66");
    refused(c::lory_engine_options { threads: 5000, ..c::options() }, "threads is 5000");
    refused(c::lory_engine_options { n_batch: 0, ..c::options() }, "a batch of 0 rows");
    refused(c::lory_engine_options { kv_tokens: u64::MAX / 2, ..c::options() }, "a cache of");
    open(c::lory_engine_options { n_ctx: 1, ..c::options() }).expect("a context of one token");

    let e = engine();
    let s = session(&e);
    // SAFETY: pointers to what lives during the call.
    unsafe {
        let l = lory();
        let status = |s: c::lory_status| fails(s).0;
        assert_eq!(status(l.lory_session_set_adapters(s.ptr, ptr::null(), 0, 5)), c::LORY_E_ARGUMENT);
        let tokens = &mut c::lory_tokens::default();
        assert_eq!(status(l.lory_tokenize(e.ptr, ptr::null(), 0, 64, tokens)), c::LORY_E_ARGUMENT);
        assert_eq!(status(l.lory_token_special(e.ptr, 99, &mut 0)), c::LORY_E_ARGUMENT);
        let text = &mut c::lory_text::default();
        assert_eq!(status(l.lory_token_bytes(e.ptr, u32::MAX, text)), c::LORY_E_NOT_FOUND);
        assert_eq!(status(l.lory_detokenize(e.ptr, [u32::MAX].as_ptr(), 1, 0, text)), c::LORY_E_REQUEST);
        let floats = &mut c::lory_floats::default();
        assert_eq!(status(l.lory_session_embed(s.ptr, [1].as_ptr(), 1, 7, 0, floats)), c::LORY_E_ARGUMENT);
        let make = |o: *mut *mut c::lory_adapter_list| l.lory_adapter_list_new(e.ptr, o);
        let list = Handle::new(make, |h| lory().lory_adapter_list_free(h)).expect("an empty list");
        let mut info = c::init(|o, n| l.lory_adapter_info_init(o, n));
        assert_eq!(status(l.lory_adapter_list_get(list.ptr, 0, &mut info)), c::LORY_E_ARGUMENT);
        assert_eq!(l.lory_session_rewind(s.ptr, usize::MAX), c::LORY_OK, "there is nothing there to forget");
        for known in 0..=20 {
            assert!(c::text_at(l.lory_status_name(known)).starts_with("LORY_"));
        }
        assert_eq!(c::text_at(l.lory_status_name(-1)), "unknown status");
        assert_eq!(l.lory_abi_version(), c::LORY_ABI_VERSION);
    }
}

#[test]
fn texts_are_utf8_with_lengths() {
    let mut tokens = c::lory_tokens::default();
    let e = engine();
    // SAFETY: pointers to what lives during the call.
    unsafe {
        let l = lory();
        let bad = b"ok\xff\xfe";
        let (status, words) = fails(l.lory_tokenize(e.ptr, bad.as_ptr().cast(), 4, 0, &mut tokens));
        assert_eq!((status, words.as_str()), (c::LORY_E_UTF8, "text is not UTF-8 at byte 2"));
        let (status, _) = fails(l.lory_tokenize(e.ptr, ptr::null(), usize::MAX, 0, &mut tokens));
        assert_eq!(status, c::LORY_E_NULL, "LORY_NTS");
        c::ok(l.lory_tokenize(e.ptr, c"text".as_ptr(), usize::MAX, 0, &mut tokens)).expect("LORY_NTS");
        assert!(tokens.len > 0);
        l.lory_tokens_free(&mut tokens);
        c::ok(l.lory_tokenize(e.ptr, b"a\0b".as_ptr().cast(), 3, 0, &mut tokens))
            .expect("NUL is a character");
        l.lory_tokens_free(&mut tokens);
        let mut engine = null_mut();
        let (status, words) =
            fails(l.lory_engine_open(b"/a\0b".as_ptr().cast(), 4, ptr::null(), &mut engine));
        assert!(status == c::LORY_E_IO && engine.is_null(), "{words}");
    }
}

#[test]
fn handles_may_go_in_any_order() {
    let f = fixtures::model("llama");
    let sampler = c::greedy();
    let request = c::request(&f.tokens, 24, &sampler);
    let text = |g: &Handle<c::lory_generation>| {
        let mut text = c::lory_text::default();
        // SAFETY: pointers to what lives during the call.
        c::ok(unsafe { lory().lory_generation_text(g.ptr, &mut text) })?;
        // SAFETY: from lory.
        let words = unsafe { c::view(c::lory_str { data: text.data, len: text.len }) };
        // SAFETY: from lory.
        unsafe { lory().lory_text_free(&mut text) };
        Ok::<_, String>(words)
    };
    let e = engine();
    let s = session(&e);
    let g = c::generate(s.ptr, &request).expect("a generation");
    drop(e);
    let whole = text(&g).expect("goes on without its engine");
    assert!(!whole.is_empty());
    drop(s);

    let e = engine();
    let s = session(&e);
    let g = c::generate(s.ptr, &request).expect("a generation");
    drop(s);
    assert_eq!(text(&g).expect("ended by its session's end"), "");
    // SAFETY: as above.
    unsafe {
        let mut event = c::init(|o, n| lory().lory_event_init(o, n));
        c::ok(lory().lory_generation_next(g.ptr, &mut event)).expect("the end, again");
        assert_eq!((event.kind, event.finish_reason), (c::LORY_EVENT_END, c::LORY_FINISH_CANCELLED));
        let make = |o: *mut *mut c::lory_canceller| lory().lory_generation_canceller(g.ptr, o);
        let canceller = Handle::new(make, |h| lory().lory_canceller_free(h)).expect("a canceller");
        drop(g);
        c::ok(lory().lory_canceller_cancel(canceller.ptr)).expect("nothing to cancel");
    }
}

#[test]
fn what_belongs_to_another_model_is_refused() {
    let (e, other) = (engine(), c::engine(&fixture("models/qwen2.gguf"), &c::options()).expect("opened"));
    let f = fixtures::model("llama");
    let (s, sampler) = (session(&e), c::greedy());
    let lora = fixture("lora/all.gguf");
    let lora = c::str_of(lora.to_str().expect("UTF-8"));
    let mut place: *mut c::lory_session = null_mut();
    let mut generation: *mut c::lory_generation = null_mut();
    let mut bytes = c::lory_text::default();
    let mut id = 0;
    // SAFETY: pointers to what lives during the call; so everywhere below.
    unsafe {
        let l = lory();
        let load = |e: &Handle<c::lory_engine>, id| {
            l.lory_adapter_load(e.ptr, lora.data, lora.len, ptr::null(), 0, id)
        };
        assert_eq!(fails(load(&other, &mut id)).0, c::LORY_E_WRONG_BASE);
        c::ok(load(&e, &mut id)).expect("its own");
        let scale = [c::lory_adapter_scale { id, scale: 1.0, reserved: 0 }];
        let foreign = session(&other);
        let (status, words) = fails(l.lory_session_set_adapters(foreign.ptr, scale.as_ptr(), 1, 0));
        assert_eq!(status, c::LORY_E_REQUEST, "{words}");

        let request = c::request(&f.tokens, 4, &sampler);
        let g = c::generate(s.ptr, &request).expect("a generation");
        c::ok(l.lory_generation_text(g.ptr, &mut bytes)).expect("an answer");
        l.lory_text_free(&mut bytes);
        c::ok(l.lory_session_save_memory(s.ptr, &mut bytes)).expect("saved");
        let restore = |e: &Handle<c::lory_engine>, place| {
            l.lory_session_restore_memory(e.ptr, bytes.data.cast(), bytes.len, ptr::null(), place)
        };
        let (status, words) = fails(restore(&other, &mut place));
        assert!(status == c::LORY_E_RESTORE && place.is_null(), "{words}");
        let smaller = c::lory_engine_options { kv_type: c::LORY_KV_F16, ..c::options() };
        let smaller = c::engine(&fixture("models/llama.gguf"), &smaller).expect("opened");
        let (status, words) = fails(restore(&smaller, &mut place));
        assert!(status == c::LORY_E_RESTORE && place.is_null(), "another cache: {words}");
        l.lory_text_free(&mut bytes);

        let make = |o: *mut *mut c::lory_grammar| {
            l.lory_grammar_new(e.ptr, c::LORY_GRAMMAR_JSON_SCHEMA, c"{}".as_ptr(), 2, o)
        };
        let grammar = Handle::new(make, |g| lory().lory_grammar_free(g)).expect("compiled");
        let request = c::lory_request { grammar: grammar.ptr, ..request };
        let (status, words) = fails(l.lory_session_generate(foreign.ptr, &request, &mut generation));
        assert!(status == c::LORY_E_REQUEST && generation.is_null(), "{status}: {words}");
        c::generate(s.ptr, &request).expect("its own");
    }
}

/// What a callback of the test does.
struct Inside<'a> {
    generation: *mut c::lory_generation,
    session: *mut c::lory_session,
    what: &'a mut dyn FnMut(*mut c::lory_generation, *mut c::lory_session),
}

unsafe extern "C" fn inside(user: *mut c_void, _: *const c::lory_event) -> i32 {
    // SAFETY: the test's own pointer.
    let inside = unsafe { &mut *user.cast::<Inside>() };
    (inside.what)(inside.generation, inside.session);
    0
}

#[test]
fn callbacks_may_call_and_free() {
    let f = fixtures::model("llama");
    let sampler = c::greedy();
    let request = c::request(&f.tokens, 6, &sampler);
    let e = engine();
    let start = || {
        let mut s = null_mut();
        let mut g = null_mut();
        // SAFETY: pointers to what lives during the call; so below.
        unsafe {
            c::ok(lory().lory_session_new(e.ptr, ptr::null(), &mut s)).expect("a session");
            c::ok(lory().lory_session_generate(s, &request, &mut g)).expect("a generation");
        }
        (s, g)
    };
    let run = |what: &mut dyn FnMut(*mut c::lory_generation, *mut c::lory_session)| {
        let (session, generation) = start();
        let mut user = Inside { generation, session, what };
        let mut reason = 0;
        // SAFETY: as above.
        let status = unsafe {
            lory().lory_generation_run(generation, Some(inside), (&raw mut user).cast(), &mut reason)
        };
        c::ok(status).expect("runs to an end");
        (session, generation, reason)
    };

    let mut seen = 0;
    let (s, g, reason) = run(&mut |g, s| {
        seen += 1;
        // SAFETY: as above.
        unsafe {
            let mut event = c::init(|o, n| lory().lory_event_init(o, n));
            assert_eq!(fails(lory().lory_generation_next(g, &mut event)).0, c::LORY_E_BUSY);
            let (generation, other) = (g as usize, || c::last_error());
            let elsewhere = std::thread::spawn(move || {
                let mut event = c::init(|o, n| lory().lory_event_init(o, n));
                fails(lory().lory_generation_poll(generation as *mut _, &mut event))
            });
            let (status, words) = elsewhere.join().expect("no panic");
            assert_eq!((status, words), (c::LORY_E_BUSY, other()));
            let mut n = 0;
            c::ok(lory().lory_session_cached_tokens(s, &mut n)).expect("a number");
            assert!(n >= f.tokens.len());
            c::ok(lory().lory_engine_step(e.ptr, &mut 0)).expect("a step");
        }
    });
    assert_eq!((seen, reason), (7, c::LORY_FINISH_LENGTH), "six tokens and the end");
    // SAFETY: as above.
    unsafe {
        lory().lory_generation_free(g);
        lory().lory_session_free(s);
    }

    let mut freed = false;
    let (_, _, reason) = run(&mut |g, s| {
        if !std::mem::replace(&mut freed, true) {
            // SAFETY: freed once.
            unsafe {
                lory().lory_generation_free(g);
                lory().lory_session_free(s);
            }
        }
    });
    assert_eq!(reason, c::LORY_FINISH_CANCELLED, "its session is gone");
}

struct Source {
    bytes: Vec<u8>,
    released: usize,
    /// Bytes after which it gives up, or what it claims to have read.
    stop_at: u64,
    claim: Option<i64>,
}

unsafe extern "C" fn release(user: *mut c_void, _: *const c_void, _: usize) {
    // SAFETY: the test's own pointer.
    unsafe { (*user.cast::<Source>()).released += 1 };
}

unsafe extern "C" fn read_source(user: *mut c_void, offset: u64, buffer: *mut c_void, len: usize) -> i64 {
    // SAFETY: the test's own pointer.
    let source = unsafe { &*user.cast::<Source>() };
    if offset >= source.stop_at {
        return -1;
    }
    // An odd number at a time: readers must not rely on full buffers.
    let n = len.min(12_345).min(source.bytes.len() - offset as usize);
    // SAFETY: `n` bytes are there on both sides.
    unsafe { ptr::copy_nonoverlapping(source.bytes.as_ptr().add(offset as usize), buffer.cast(), n) };
    source.claim.unwrap_or(n as i64)
}

#[test]
fn sources_give_back_what_was_lent_and_may_fail() {
    let bytes = std::fs::read(fixture("models/llama.gguf")).expect("a fixture");
    let size = bytes.len();
    let mut source = Source { bytes, released: 0, stop_at: u64::MAX, claim: None };
    let user: *mut c_void = (&raw mut source).cast();
    let (name, name_len) = (c"lent".as_ptr(), 4);
    let data: *const c_void = source.bytes.as_ptr().cast();
    let options = c::options();
    let lend = |data, size, name: *const c_char, len, options: *const c::lory_engine_options| {
        let mut engine = null_mut();
        // SAFETY: pointers to what lives during the call; the memory lives until it is released.
        let status = unsafe {
            lory().lory_engine_open_memory(data, size, name, len, Some(release), user, options, &mut engine)
        };
        (status, engine)
    };
    let released = || {
        // SAFETY: nobody else looks now.
        unsafe { (*user.cast::<Source>()).released }
    };
    let (status, engine) = lend(data, size, name, name_len, &options);
    assert_eq!((status, released()), (c::LORY_OK, 0));
    let s = c::session(engine, &[]).expect("a session");
    // SAFETY: freed once.
    unsafe { lory().lory_engine_free(engine) };
    assert_eq!(released(), 0, "the session needs it");
    drop(s);
    assert_eq!(released(), 1);

    assert_eq!(lend(data, size / 2, name, name_len, &options).0, c::LORY_E_FORMAT, "half of it");
    assert_eq!(lend(ptr::null(), size, name, name_len, &options).0, c::LORY_E_NULL);
    assert_eq!(lend(data, size, ptr::null(), 4, &options).0, c::LORY_E_NULL);
    let unknown = c::lory_engine_options { device: 77, ..options };
    assert_eq!(lend(data, size, name, name_len, &unknown).0, c::LORY_E_ARGUMENT);
    for nothing in [data, ptr::null()] {
        let (status, words) = fails(lend(nothing, 0, name, name_len, &options).0);
        assert!(status == c::LORY_E_IO && words.contains("empty"), "{words}");
    }
    assert_eq!(released(), 7, "once each");

    let read = |size: u64| {
        let mut engine = null_mut();
        // SAFETY: as above.
        let status = unsafe {
            lory().lory_engine_open_callback(
                Some(read_source),
                user,
                size,
                name,
                name_len,
                &options,
                &mut engine,
            )
        };
        // SAFETY: NULL or from lory.
        unsafe { lory().lory_engine_free(engine) };
        if status == c::LORY_OK { Ok(()) } else { Err(fails(status)) }
    };
    read(size as u64).expect("read in pieces");
    assert_eq!(read(0).expect_err("empty").0, c::LORY_E_IO);
    let (status, words) = read(u64::MAX / 2).expect_err("no such memory");
    assert!(status == c::LORY_E_IO && words.contains("no memory"), "{words}");
    source.stop_at = 50_000;
    let (status, words) = read(size as u64).expect_err("given up");
    assert!(status == c::LORY_E_IO && words.contains("gave up with -1"), "{words}");
    source.stop_at = u64::MAX;
    source.claim = Some(i64::MAX);
    let (status, words) = read(size as u64).expect_err("a lie");
    assert!(status == c::LORY_E_IO && words.contains("claims"), "{words}");
    source.claim = Some(0);
    let (status, words) = read(size as u64).expect_err("an early end");
    assert!(status == c::LORY_E_IO && words.contains("has 0 now"), "{words}");

    let mut engine = null_mut();
    for fd in [-1, 1_000_000] {
        // SAFETY: as above.
        let status = unsafe { lory().lory_engine_open_fd(fd, name, name_len, &options, &mut engine) };
        assert!([c::LORY_E_ARGUMENT, c::LORY_E_IO].contains(&fails(status).0));
    }
}
