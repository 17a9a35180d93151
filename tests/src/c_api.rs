//! liblory as a C program sees it: the shared library, loaded, through bindgen's reading of `lory.h`.

// Tests hand in handles that are alive.
#![allow(clippy::not_unsafe_ptr_arg_deref)]

use std::{
    ffi::{CStr, c_char},
    path::PathBuf,
    sync::OnceLock,
};

pub use crate::lory_h::*;

/// Where cargo puts the shared library: beside the test, which depends on it.
pub fn library_path() -> PathBuf {
    let test = std::env::current_exe().expect("a path");
    let name = if cfg!(target_os = "macos") { "liblory.dylib" } else { "liblory.so" };
    let folders = test.ancestors().skip(1).take(2);
    folders.map(|f| f.join(name)).find(|p| p.exists()).unwrap_or_else(|| panic!("no {name} beside {test:?}"))
}

/// The functions of the library.
pub fn lory() -> &'static Lory {
    static LIBRARY: OnceLock<Lory> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        // SAFETY: the library has no initialisers; the header is the one it was built with.
        unsafe { Lory::new(library_path()) }.unwrap_or_else(|e| panic!("{e}"))
    })
}

/// The thread's error text.
pub fn last_error() -> String {
    // SAFETY: a NUL-terminated text until the next failure.
    unsafe { text_at(lory().lory_last_error()) }
}

/// # Safety
/// `text` is NUL-terminated.
pub unsafe fn text_at(text: *const c_char) -> String {
    // SAFETY: the caller's word.
    unsafe { CStr::from_ptr(text) }.to_str().expect("UTF-8").to_owned()
}

/// The text of a view.
///
/// # Safety
/// It is one that lory gave, and still valid.
pub unsafe fn view(s: lory_str) -> String {
    // SAFETY: the caller's word.
    let bytes = unsafe { std::slice::from_raw_parts(s.data.cast::<u8>(), s.len) };
    std::str::from_utf8(bytes).expect("UTF-8").to_owned()
}

/// A view of a text that outlives it.
pub fn str_of(text: &str) -> lory_str {
    lory_str { data: text.as_ptr().cast(), len: text.len() }
}

/// An error of the thread, unless the status is `LORY_OK`.
pub fn ok(status: lory_status) -> Result<(), String> {
    if status == LORY_OK { Ok(()) } else { Err(last_error()) }
}

/// A struct as its `_init` function leaves it.
pub fn init<T: Default>(f: impl FnOnce(*mut T, usize) -> lory_status) -> T {
    let mut value = T::default();
    assert_eq!(f(&mut value, size_of::<T>()), LORY_OK);
    value
}

/// A handle that frees itself.
pub struct Handle<T> {
    /// What lory gave.
    pub ptr: *mut T,
    free: unsafe fn(*mut T),
}

impl<T> Handle<T> {
    /// Takes what `make` writes; `free` gives it back.
    pub fn new(
        make: impl FnOnce(*mut *mut T) -> lory_status,
        free: unsafe fn(*mut T),
    ) -> Result<Self, String> {
        let mut ptr = std::ptr::null_mut();
        ok(make(&mut ptr))?;
        assert!(!ptr.is_null());
        Ok(Handle { ptr, free })
    }
}

impl<T> Drop for Handle<T> {
    fn drop(&mut self) {
        // SAFETY: from lory, and freed once.
        unsafe { (self.free)(self.ptr) }
    }
}

/// An engine over a file.
pub fn engine(path: &std::path::Path, options: &lory_engine_options) -> Result<Handle<lory_engine>, String> {
    let path = path.to_str().expect("UTF-8");
    // SAFETY: pointers to what lives during the call.
    let open = |out| unsafe { lory().lory_engine_open(path.as_ptr().cast(), path.len(), options, out) };
    // SAFETY: called by `Handle` alone.
    Handle::new(open, |e| unsafe { lory().lory_engine_free(e) })
}

/// A session; `options` NULL takes the defaults.
pub fn session(
    engine: *const lory_engine,
    adapters: &[lory_adapter_scale],
) -> Result<Handle<lory_session>, String> {
    // SAFETY: pointers to what lives during the call.
    let mut options = init(|o, n| unsafe { lory().lory_session_options_init(o, n) });
    (options.adapters, options.n_adapters) = (adapters.as_ptr(), adapters.len());
    // SAFETY: as above.
    let new = |out| unsafe { lory().lory_session_new(engine, &options, out) };
    // SAFETY: called by `Handle` alone.
    Handle::new(new, |s| unsafe { lory().lory_session_free(s) })
}

/// A generation.
pub fn generate(
    session: *mut lory_session,
    request: &lory_request,
) -> Result<Handle<lory_generation>, String> {
    // SAFETY: pointers to what lives during the call.
    let generate = |out| unsafe { lory().lory_session_generate(session, request, out) };
    // SAFETY: called by `Handle` alone.
    Handle::new(generate, |g| unsafe { lory().lory_generation_free(g) })
}

/// A greedy sampler.
pub fn greedy() -> lory_sampler_options {
    // SAFETY: a pointer to what lives during the call.
    let mut sampler = init(|o, n| unsafe { lory().lory_sampler_options_init(o, n) });
    sampler.temp = 0.0;
    sampler
}

/// A request for `n` tokens after `tokens`, which must live as long as it.
pub fn request(tokens: &[u32], n: usize, sampler: &lory_sampler_options) -> lory_request {
    // SAFETY: a pointer to what lives during the call.
    let mut request = init(|o, n| unsafe { lory().lory_request_init(o, n) });
    (request.tokens, request.n_tokens) = (tokens.as_ptr(), tokens.len());
    (request.max_new_tokens, request.sampler, request.ignore_eos) = (n, sampler, 1);
    request
}

/// Engine options for fixtures.
pub fn options() -> lory_engine_options {
    // SAFETY: a pointer to what lives during the call.
    let mut options = init(|o, n| unsafe { lory().lory_engine_options_init(o, n) });
    (options.threads, options.n_ctx, options.kv_type) = (2, 256, LORY_KV_F32);
    options
}
