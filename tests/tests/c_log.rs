//! The log of an engine goes to its host and nowhere else, whatever other engines do. One test, so that its
//! order is certain: what `tracing` learns of a message when it is first reached is shared by all threads.
#![cfg(unix)]

use std::{
    collections::BTreeSet,
    ffi::{c_char, c_void},
    ptr,
    sync::{
        Barrier, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use lory_tests::{
    c_api::{self as c, lory},
    engines,
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
        match log.own.load(SeqCst) {
            0 => {}
            own => *log.seen.lock().expect("no panic") = names(own as *const _),
        }
    }
}

/// What the host of an engine has: its lines, an engine that its log function loads an adapter into, and
/// its own engine, whose adapters the function lists.
#[derive(Default)]
struct Host {
    lines: Mutex<Vec<(u32, String)>>,
    engine: Option<usize>,
    own: AtomicUsize,
    seen: Mutex<Vec<String>>,
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

fn names(engine: *const c::lory_engine) -> Vec<String> {
    // SAFETY: pointers to what lives during the call; so below.
    let make = |out: *mut *mut c::lory_adapter_list| unsafe { lory().lory_adapter_list_new(engine, out) };
    // SAFETY: called once.
    let list = c::Handle::new(make, |l| unsafe { lory().lory_adapter_list_free(l) }).expect("a list");
    // SAFETY: as above.
    let len = unsafe { lory().lory_adapter_list_len(list.ptr) };
    let name = |i| {
        // SAFETY: as above.
        let mut info = c::init(|o, n| unsafe { lory().lory_adapter_info_init(o, n) });
        // SAFETY: as above.
        c::ok(unsafe { lory().lory_adapter_list_get(list.ptr, i, &mut info) }).expect("in the list");
        // SAFETY: the list lives.
        unsafe { c::view(info.name) }
    };
    (0..len).map(name).collect()
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

    // A log function that looks at the engine whose log it takes.
    let host = Host::default();
    let own = host.open();
    host.own.store(own.ptr as usize, SeqCst);
    load(own.ptr, "attn", "looked-at");
    assert_eq!(
        (with(&host.take(), "looked-at"), &**host.seen.lock().expect("no panic")),
        (1, &["looked-at".to_string()][..])
    );
    let folder = tempfile::tempdir().expect("a folder");
    let pack = folder.path().join("pack.gguf");
    std::fs::write(&pack, engines::pack(2)).expect("written");
    let (path, name) = (c::str_of(pack.to_str().expect("UTF-8")), c::str_of("synth-00001"));
    // SAFETY: pointers to what lives during the call.
    unsafe {
        let l = lory();
        c::ok(l.lory_adapter_open_pack(own.ptr, path.data, path.len, &mut 0)).expect("opened");
        c::ok(l.lory_adapter_resolve(own.ptr, name.data, name.len, &mut 0)).expect("brought in");
    }
    let lines = host.take();
    assert_eq!((with(&lines, "synth-00001"), host.seen.lock().expect("no panic").len()), (1, 3), "{lines:?}");
    drop(own);

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
