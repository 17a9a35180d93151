//! Every pointer of every function of the C interface, NULL where it must not be.
#![cfg(unix)]

use std::{collections::BTreeSet, ffi::c_void, ptr};

use libloading::Library;
use lory_tests::{
    c_api::{self as c, Handle, lory},
    fixtures::fixture,
};

/// An argument of a call.
#[derive(Clone, Copy)]
enum Arg {
    /// A pointer that must not be NULL.
    Must(usize),
    /// A pointer that may be NULL.
    May(usize),
    /// A number.
    Is(usize),
}
use Arg::{Is, May, Must};

impl Arg {
    fn value(self) -> usize {
        match self {
            Must(v) | May(v) | Is(v) => v,
        }
    }
}

fn at<T>(place: &T) -> usize {
    ptr::from_ref(place) as usize
}

fn texts(text: &'static str) -> [Arg; 2] {
    [Must(text.as_ptr() as usize), Is(text.len())]
}

unsafe extern "C" fn read_nothing(_: *mut c_void, _: u64, _: *mut c_void, _: usize) -> i64 {
    -1
}

unsafe extern "C" fn never(_: *mut c_void) -> i32 {
    0
}

unsafe extern "C" fn on_event(_: *mut c_void, _: *const c::lory_event) -> i32 {
    0
}

#[test]
fn every_pointer_of_every_function_may_be_null() {
    const FILLED: [u64; 8] = [0xA5A5_A5A5_A5A5_A5A5; 8];
    let out = Box::new(FILLED);
    let e = c::engine(&fixture("models/llama.gguf"), &c::options()).expect("opened");
    let s = c::session(e.ptr, &[]).expect("a session");
    let sampler = c::greedy();
    let tokens = [1u32, 2, 3];
    let request = c::request(&tokens, 2, &sampler);
    let g = c::generate(s.ptr, &request).expect("a generation");
    // SAFETY: pointers to what lives during the call; so everywhere below.
    let (list, canceller, detokenizer, event) = unsafe {
        let l = lory();
        let list = Handle::new(|o| l.lory_adapter_list_new(e.ptr, o), |h| lory().lory_adapter_list_free(h));
        let canceller =
            Handle::new(|o| l.lory_generation_canceller(g.ptr, o), |h| lory().lory_canceller_free(h));
        let detokenizer =
            Handle::new(|o| l.lory_detokenizer_new(e.ptr, 0, o), |h| lory().lory_detokenizer_free(h));
        (list.unwrap(), canceller.unwrap(), detokenizer.unwrap(), c::init(|o, n| l.lory_event_init(o, n)))
    };
    // SAFETY: as above.
    let (info, metrics, model, stats) = unsafe {
        let l = lory();
        (
            c::init(|o, n| l.lory_adapter_info_init(o, n)),
            c::init(|o, n| l.lory_metrics_init(o, n)),
            c::init(|o, n| l.lory_model_info_init(o, n)),
            c::init(|o, n| l.lory_stats_init(o, n)),
        )
    };
    // SAFETY: as above.
    let (own, own_info) = unsafe {
        let l = lory();
        let make = |o: *mut *mut c::lory_session_adapters| l.lory_session_adapters_new(s.ptr, o);
        let own = Handle::new(make, |h| lory().lory_session_adapters_free(h)).expect("an empty list");
        (own, c::init(|o, n| l.lory_session_adapter_init(o, n)))
    };
    let generations = [g.ptr];
    let spans = [c::lory_token_span { data: tokens.as_ptr(), len: 3 }];
    let names = [c::str_of("nobody")];
    let scale = [c::lory_adapter_scale::default()];
    let (engine, session, generation) = (Must(e.ptr as usize), Must(s.ptr as usize), Must(g.ptr as usize));
    let (to, nothing) = (Must(at(&*out)), May(0));
    let [path, path_len] = texts("/nowhere");
    let [text, text_len] = texts("text");
    let [data, data_len] = [Must(tokens.as_ptr() as usize), Is(3)];
    let scratch = Box::new([0u8; 1024]);
    let place = Must(at(&*scratch));
    let table: Vec<(&str, Vec<Arg>)> = vec![
        ("lory_adapter_close_pack", vec![engine, path, path_len]),
        ("lory_adapter_info_init", vec![place, Is(size_of::<c::lory_adapter_info>())]),
        ("lory_adapter_list_get", vec![Must(list.ptr as usize), Is(0), Must(at(&info))]),
        ("lory_adapter_list_new", vec![engine, to]),
        ("lory_adapter_load", vec![engine, path, path_len, May(text.value()), Is(0), to]),
        ("lory_adapter_load_memory", vec![engine, data, data_len, text, text_len, Is(0), to]),
        ("lory_adapter_open_pack", vec![engine, path, path_len, to]),
        ("lory_adapter_prefetch", vec![engine, Must(at(&names)), Is(1), to]),
        ("lory_adapter_reopen_pack", vec![engine, path, path_len, to]),
        ("lory_adapter_replace", vec![engine, path, path_len, text, text_len, to]),
        ("lory_adapter_resolve", vec![engine, text, text_len, to]),
        ("lory_adapter_set_budget", vec![engine, Is(0)]),
        ("lory_adapter_unload", vec![engine, text, text_len]),
        ("lory_canceller_cancel", vec![Must(canceller.ptr as usize)]),
        ("lory_chat_options_init", vec![place, Is(size_of::<c::lory_chat_options>())]),
        ("lory_chat_render", vec![engine, nothing, to]),
        ("lory_detokenize", vec![engine, data, data_len, Is(0), to]),
        ("lory_detokenizer_finish", vec![Must(detokenizer.ptr as usize), to]),
        ("lory_detokenizer_new", vec![engine, Is(0), to]),
        ("lory_detokenizer_push", vec![Must(detokenizer.ptr as usize), Is(1), to]),
        ("lory_engine_device", vec![engine, to]),
        ("lory_engine_drive", vec![engine, Must(never as *const () as usize), nothing]),
        ("lory_engine_metadata", vec![engine, text, text_len, to]),
        ("lory_engine_metrics", vec![engine, Must(at(&metrics))]),
        ("lory_engine_model_info", vec![engine, Must(at(&model))]),
        ("lory_engine_open", vec![path, path_len, nothing, to]),
        (
            "lory_engine_open_callback",
            vec![Must(read_nothing as *const () as usize), nothing, Is(9), text, text_len, nothing, to],
        ),
        ("lory_engine_open_fd", vec![Is(0), text, text_len, nothing, to]),
        ("lory_engine_open_memory", vec![data, data_len, text, text_len, nothing, nothing, nothing, to]),
        ("lory_engine_options_init", vec![place, Is(size_of::<c::lory_engine_options>())]),
        ("lory_engine_prometheus", vec![engine, to]),
        ("lory_engine_step", vec![engine, to]),
        ("lory_engine_wake_drivers", vec![engine]),
        ("lory_event_init", vec![place, Is(size_of::<c::lory_event>())]),
        ("lory_generation_cancel", vec![generation]),
        ("lory_generation_canceller", vec![generation, to]),
        ("lory_generation_next", vec![generation, Must(at(&event))]),
        ("lory_generation_poll", vec![generation, Must(at(&event))]),
        ("lory_generation_run", vec![generation, Must(on_event as *const () as usize), nothing, nothing]),
        ("lory_generation_stats", vec![generation, Must(at(&stats))]),
        ("lory_generation_text", vec![generation, to]),
        ("lory_generations_next", vec![Must(at(&generations)), Is(1), to, Must(at(&event))]),
        ("lory_grammar_new", vec![engine, Is(0), text, text_len, to]),
        ("lory_metrics_init", vec![place, Is(size_of::<c::lory_metrics>())]),
        ("lory_model_info_init", vec![place, Is(size_of::<c::lory_model_info>())]),
        ("lory_request_init", vec![place, Is(size_of::<c::lory_request>())]),
        ("lory_sampler_options_init", vec![place, Is(size_of::<c::lory_sampler_options>())]),
        ("lory_session_adapter_init", vec![place, Is(size_of::<c::lory_session_adapter>())]),
        ("lory_session_adapters_get", vec![Must(own.ptr as usize), Is(0), Must(at(&own_info))]),
        ("lory_session_adapters_new", vec![session, to]),
        ("lory_session_cached_tokens", vec![session, to]),
        ("lory_session_embed", vec![session, data, data_len, Is(1), Is(1), to]),
        ("lory_session_fork", vec![session, to]),
        ("lory_session_generate", vec![session, nothing, to]),
        ("lory_session_is_mixed", vec![session, to]),
        ("lory_session_new", vec![engine, nothing, to]),
        ("lory_session_options_init", vec![place, Is(size_of::<c::lory_session_options>())]),
        ("lory_session_restore", vec![engine, path, path_len, nothing, to]),
        ("lory_session_restore_memory", vec![engine, data, data_len, nothing, to]),
        ("lory_session_save", vec![session, path, path_len]),
        ("lory_session_save_memory", vec![session, to]),
        ("lory_session_rewind", vec![session, Is(0)]),
        ("lory_session_rewind_to_common", vec![session, data, data_len, to]),
        ("lory_session_score", vec![session, data, data_len, Must(at(&spans)), Is(1), to]),
        ("lory_session_set_adapters", vec![session, Must(at(&scale)), Is(1), Is(0)]),
        ("lory_session_set_priority", vec![session, Is(0)]),
        ("lory_session_tokens", vec![session, to]),
        ("lory_stats_init", vec![place, Is(size_of::<c::lory_stats>())]),
        ("lory_token_bytes", vec![engine, Is(1), to]),
        ("lory_token_is_end", vec![engine, Is(1), to]),
        ("lory_token_special", vec![engine, Is(0), to]),
        ("lory_tokenize", vec![engine, text, text_len, Is(0), to]),
    ];

    // The table knows every function of the header.
    let header = include_str!("../src/lory_h.rs");
    let functions = header.split("pub unsafe fn lory_").skip(1).filter_map(|f| f.split('(').next());
    let functions: BTreeSet<String> = functions.map(|name| format!("lory_{name}")).collect();
    let cannot_fail = [
        "lory_abi_version",
        "lory_version",
        "lory_last_error",
        "lory_status_name",
        "lory_adapter_list_len",
        "lory_session_adapters_len",
    ];
    let (frees, others): (BTreeSet<_>, BTreeSet<_>) = functions
        .into_iter()
        .filter(|f| !cannot_fail.contains(&f.as_str()))
        .partition(|f| f.ends_with("_free"));
    let known: BTreeSet<String> = table.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(others, known);

    // SAFETY: the library is the one that `lory()` has loaded. All arguments are integers and
    // pointers, which travel alike; a function takes those that it knows of.
    let library = unsafe { Library::new(c::library_path()) }.expect("loaded before");
    type Call = unsafe extern "C" fn(usize, usize, usize, usize, usize, usize, usize, usize) -> i32;
    for (name, args) in &table {
        // SAFETY: as above.
        let call = unsafe { library.get::<Call>(name.as_bytes()) }.expect("exported");
        for (i, arg) in args.iter().enumerate().filter(|(_, arg)| matches!(arg, Must(_))) {
            let mut a = [0; 8];
            a.iter_mut().zip(args).for_each(|(a, arg)| *a = arg.value());
            a[i] = 0;
            // SAFETY: as above.
            let status = unsafe { call(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]) };
            assert_eq!(status, c::LORY_E_NULL, "{name}, argument {i} of value {:#x}", arg.value());
            assert!(c::last_error().contains("NULL"), "{name}, argument {i}: {}", c::last_error());
            assert_eq!(*out, FILLED, "{name}, argument {i}: written without success");
        }
    }
    for name in frees {
        // SAFETY: as above.
        let free = unsafe { library.get::<unsafe extern "C" fn(usize)>(name.as_bytes()) }.expect("exported");
        // SAFETY: NULL is allowed.
        unsafe { free(0) };
    }
    // SAFETY: as above.
    let lengths =
        unsafe { (lory().lory_adapter_list_len(ptr::null()), lory().lory_session_adapters_len(ptr::null())) };
    assert_eq!(lengths, (0, 0));
}
