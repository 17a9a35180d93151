//! The log of an engine goes to its host and nowhere else. A process of its own: what `tracing` knows of
//! a message when it is first reached is shared by all threads.
#![cfg(unix)]

use std::{
    collections::BTreeSet,
    ffi::{c_char, c_void},
    ptr,
};

use lory_tests::{
    c_api::{self as c, lory},
    fixtures::fixture,
};

unsafe extern "C" fn keep_line(user: *mut c_void, level: c::lory_log_level, text: *const c_char, len: usize) {
    // SAFETY: the test's own pointer; the text ends with NUL.
    unsafe {
        let line = c::text_at(text);
        assert_eq!(line.len(), len);
        (*user.cast::<Vec<(u32, String)>>()).push((level, line));
    }
}

#[test]
fn each_engine_has_its_own_log() {
    let mut lines: Vec<(u32, String)> = Vec::new();
    let user: *mut c_void = (&raw mut lines).cast();
    let options = c::lory_engine_options { log: Some(keep_line), log_user: user, ..c::options() };
    let loud = c::engine(&fixture("models/llama.gguf"), &options).expect("opened");
    let silent = c::engine(&fixture("models/llama.gguf"), &c::options()).expect("opened");
    let path = fixture("lora/attn.gguf");
    let path = c::str_of(path.to_str().expect("UTF-8"));
    for e in [&loud, &silent] {
        // SAFETY: pointers to what lives during the call.
        let status = unsafe { lory().lory_adapter_load(e.ptr, path.data, path.len, ptr::null(), 0, &mut 0) };
        c::ok(status).expect("loaded");
    }
    drop((loud, silent));
    let levels: BTreeSet<u32> = lines.iter().map(|(level, _)| *level).collect();
    assert_eq!(levels, [c::LORY_LOG_INFO].into(), "{lines:?}");
    let with = |word: &str| lines.iter().filter(|(_, line)| line.contains(word)).count();
    assert_eq!((with("llama.gguf"), with("adapter `attn`")), (1, 1), "{lines:?}");
}
