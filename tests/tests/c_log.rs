//! The log of an engine goes to its host and nowhere else, whatever other engines do. One test, so that its
//! order is certain: what `tracing` learns of a message when it is first reached is shared by all threads.
#![cfg(unix)]

use std::{
    collections::BTreeSet,
    ffi::{c_char, c_void},
    ptr,
    sync::{Barrier, Mutex},
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
        let log = &*user.cast::<Host>();
        log.lines.lock().expect("no panic").push((level, line));
        if let Some(engine) = log.engine {
            load(engine as *const _, "attn", "inside");
        }
    }
}

/// What the host of an engine has: its lines, and an engine that its log function loads an adapter into.
#[derive(Default)]
struct Host {
    lines: Mutex<Vec<(u32, String)>>,
    engine: Option<usize>,
}

impl Host {
    fn open(&self) -> c::Handle<c::lory_engine> {
        let user: *mut c_void = ptr::from_ref(self).cast_mut().cast();
        let options = c::lory_engine_options { log: Some(keep_line), log_user: user, ..c::options() };
        c::engine(&fixture("models/llama.gguf"), &options).expect("opened")
    }

    fn take(&self) -> Vec<String> {
        let lines = std::mem::take(&mut *self.lines.lock().expect("no panic"));
        let levels: BTreeSet<u32> = lines.iter().map(|(level, _)| *level).collect();
        assert_eq!(levels, [c::LORY_LOG_INFO].into(), "{lines:?}");
        lines.into_iter().map(|(_, line)| line).collect()
    }
}

fn load(engine: *const c::lory_engine, file: &str, name: &str) {
    let path = fixture(&format!("lora/{file}.gguf"));
    let (path, name) = (c::str_of(path.to_str().expect("UTF-8")), c::str_of(name));
    // SAFETY: pointers to what lives during the call.
    let status =
        unsafe { lory().lory_adapter_load(engine, path.data, path.len, name.data, name.len, &mut 0) };
    c::ok(status).expect("loaded");
}

fn with(lines: &[String], word: &str) -> usize {
    lines.iter().filter(|line| line.contains(word)).count()
}

#[test]
fn each_engine_has_its_own_log() {
    let host = Host::default();
    let loud = host.open();
    let silent = c::engine(&fixture("models/llama.gguf"), &c::options()).expect("opened");
    // The silent one comes first to the message of a loading.
    for e in [&silent, &loud] {
        load(e.ptr, "attn", "first");
    }
    let lines = host.take();
    assert_eq!((with(&lines, "llama.gguf"), with(&lines, "adapter `first`")), (1, 1), "{lines:?}");
    drop(loud);

    // A log function that calls lory; what is said inside of it is not heard.
    let host = Host { engine: Some(silent.ptr as usize), ..Host::default() };
    drop(host.open());
    let lines = host.take();
    assert_eq!((lines.len(), with(&lines, "llama.gguf")), (1, 1), "{lines:?}");

    // Opened, loaded and closed at the same moments, with silent ones among them.
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for n in 0..8 {
            let barrier = &barrier;
            scope.spawn(move || {
                for round in 0..10 {
                    let host = Host::default();
                    let name = format!("adapter-{n}-{round}");
                    barrier.wait();
                    match n % 2 {
                        0 => load(host.open().ptr, "all", &name),
                        _ => {
                            let silent = c::engine(&fixture("models/llama.gguf"), &c::options());
                            load(silent.expect("opened").ptr, "all", &name);
                            continue;
                        }
                    }
                    let lines = host.take();
                    assert_eq!((lines.len(), with(&lines, &name)), (2, 1), "{lines:?}");
                }
            });
        }
    });
}
