//! Opening models, and the time and memory of their engines.

use std::{
    ffi::{c_char, c_void},
    fs,
    io::{self, Read},
    path::Path,
    sync::Arc,
};

use lory_runtime::{
    Engine, LoadedModel, OpenOptions,
    mapping::{self, File, Loading, OpenGguf},
};

use crate::{
    args::{self, free, handle, object, out, slice, text},
    callbacks::{User, lory_go_on_fn, lory_read_fn, lory_release_fn},
    log::Log,
    memory::lory_text,
    options::lory_engine_options,
    status::{Failure, Result, guard, guard_free, lory_status, lory_status::*},
    structs::{init, place, read, versioned},
};

/// A model, its adapters and its KV cache. Shareable between threads; sessions and generations
/// keep what they need of it alive, so it may be freed first.
pub struct lory_engine {
    pub(crate) engine: Engine,
    pub(crate) log: Log,
}

/// Reads the options, and opens an engine over what `open` gives.
///
/// # Safety
/// As for [`read`].
unsafe fn open(
    options: *const lory_engine_options,
    out: args::Out<'_, *mut lory_engine>,
    open: impl FnOnce(&lory_engine_options, Loading) -> Result<OpenGguf>,
) -> Result<()> {
    // SAFETY: the caller's word.
    let c_options = unsafe { read(options) }?;
    let options = c_options.to_rust()?;
    let log = c_options.log();
    let engine = log.within(|| -> Result<Engine> {
        let gguf = open(&c_options, options.loading)?;
        let model =
            LoadedModel::from_gguf(gguf, &OpenOptions { n_ctx: options.n_ctx, loading: options.loading })?;
        Ok(Engine::with_model(model, &options)?)
    })?;
    out.set(handle(lory_engine { engine, log }));
    Ok(())
}

/// A file that is a model of its own.
fn single(file: lory_runtime::Result<File>) -> Result<OpenGguf> {
    Ok(mapping::parse(vec![Arc::new(file?)])?)
}

/// Opens a GGUF model; of one in several shards, any of them. `options` may be NULL.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_open(
    path: *const c_char,
    path_len: usize,
    options: *const lory_engine_options,
    engine: *mut *mut lory_engine,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (path, engine) = (text(path, path_len, "path")?, out(engine, "engine")?);
        open(options, engine, |options, loading| {
            let progress = &mut |done, total| options.report(done, total);
            Ok(mapping::open_gguf_with(Path::new(path), loading, progress)?)
        })
    })
}

/// Opens a GGUF model of one file from a descriptor, which stays the caller's and may be closed
/// after the call. `name` is what errors call it. Only on Unix.
///
/// # Safety
/// See the rules at the top of the header; `fd` is open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_open_fd(
    fd: i32,
    name: *const c_char,
    name_len: usize,
    options: *const lory_engine_options,
    engine: *mut *mut lory_engine,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (name, engine) = (text(name, name_len, "name")?, out(engine, "engine")?);
        open(options, engine, |options, loading| {
            let progress = &mut |done, total| options.report(done, total);
            single(File::from_handle(duplicate(fd, name)?, name, loading, progress))
        })
    })
}

#[cfg(unix)]
fn duplicate(fd: i32, name: &str) -> Result<fs::File> {
    use std::os::fd::BorrowedFd;
    if fd < 0 {
        return Err(Failure::new(LORY_E_ARGUMENT, format!("{name}: descriptor {fd} is negative")));
    }
    // SAFETY: not -1, and only borrowed for the call that duplicates it; a number that is no open
    // descriptor gives an error there.
    let own = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    Ok(own.map_err(|e| lory_runtime::Error::io(name, format!("descriptor {fd}: {e}")))?.into())
}

#[cfg(not(unix))]
fn duplicate(_: i32, name: &str) -> Result<fs::File> {
    Err(Failure::new(LORY_E_UNSUPPORTED, format!("{name}: there are no descriptors on this system")))
}

/// Memory of the host, given back when the last user is gone.
struct Lent {
    data: *const u8,
    size: usize,
    release: lory_release_fn,
    user: User,
}

// SAFETY: the bytes are read only; the header says that `release` may be called on any thread.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: checked before anybody reads; it stays as it is until `release`.
        unsafe { std::slice::from_raw_parts(self.data, self.size) }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            // SAFETY: the host's function with the host's pointers, once.
            unsafe { release(self.user.0, self.data.cast(), self.size) };
        }
    }
}

/// Opens a GGUF model of one file that lies in memory. With `release` the memory is lent: it must
/// stay as it is until `release(user, data, size)` is called, on the thread that frees the last
/// handle that needs it or, where opening fails, before this returns; it is called exactly once
/// whatever happens. Without `release` (NULL) the memory is copied. `name` is what errors call it.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_open_memory(
    data: *const c_void,
    size: usize,
    name: *const c_char,
    name_len: usize,
    release: lory_release_fn,
    user: *mut c_void,
    options: *const lory_engine_options,
    engine: *mut *mut lory_engine,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        // First, so that every failure gives back what was lent.
        let lent = Lent { data: data.cast(), size, release, user: User(user) };
        let (name, engine) = (text(name, name_len, "name")?, out(engine, "engine")?);
        let bytes = slice(lent.data, size, "data")?;
        open(options, engine, |options, _| {
            let progress = &mut |done, total| options.report(done, total);
            match release {
                Some(_) => single(Ok(File::from_owner(Box::new(lent), name))),
                None => single(File::from_reader(&mut &*bytes, name, size as u64, progress)),
            }
        })
    })
}

/// Reads through the host's function.
struct HostReader {
    function: unsafe extern "C-unwind" fn(*mut c_void, u64, *mut c_void, usize) -> i64,
    user: User,
    offset: u64,
    size: u64,
}

impl Read for HostReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = usize::try_from(self.size - self.offset).unwrap_or(usize::MAX).min(buffer.len());
        if want == 0 {
            return Ok(0);
        }
        // SAFETY: the host's function with the host's pointer; `want` bytes can be written.
        let got = unsafe { (self.function)(self.user.0, self.offset, buffer.as_mut_ptr().cast(), want) };
        match usize::try_from(got) {
            Ok(got) if got <= want => {
                self.offset += got as u64;
                Ok(got)
            }
            Ok(got) => Err(io::Error::other(format!("the read callback claims {got} of {want} bytes"))),
            Err(_) => Err(io::Error::other(format!("the read callback gave up with {got}"))),
        }
    }
}

/// Opens a GGUF model of one file of `size` bytes that `function` reads, in order, during this
/// call. `name` is what errors call it.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_open_callback(
    function: lory_read_fn,
    user: *mut c_void,
    size: u64,
    name: *const c_char,
    name_len: usize,
    options: *const lory_engine_options,
    engine: *mut *mut lory_engine,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (name, engine) = (text(name, name_len, "name")?, out(engine, "engine")?);
        let function = function.ok_or_else(|| Failure::new(LORY_E_NULL, "function is NULL"))?;
        let mut reader = HostReader { function, user: User(user), offset: 0, size };
        open(options, engine, |options, _| {
            let progress = &mut |done, total| options.report(done, total);
            single(File::from_reader(&mut reader, name, size, progress))
        })
    })
}

/// Frees an engine; NULL is a no-op. Sessions and generations of it go on.
///
/// # Safety
/// `engine` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_free(engine: *mut lory_engine) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(engine) });
}

/// Numbers of a model. Initialise it with `lory_model_info_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_model_info {
    /// Set by `lory_model_info_init`.
    pub struct_size: usize,
    /// Longest sequence of a session, in tokens.
    pub n_ctx: u32,
    /// Longest sequence that the model was trained on.
    pub n_ctx_train: u32,
    /// Entries of the vocabulary.
    pub n_vocab: u32,
    /// Layers.
    pub n_layers: u32,
    /// Width of a layer.
    pub n_embd: u32,
    /// Attention heads.
    pub n_heads: u32,
    /// Heads of keys and values.
    pub n_kv_heads: u32,
    /// Zero.
    pub reserved: u32,
    /// Bytes of the model's files.
    pub file_bytes: u64,
}

versioned!(
    lory_model_info,
    last_of_first = file_bytes,
    lory_model_info {
        struct_size: size_of::<lory_model_info>(),
        n_ctx: 0,
        n_ctx_train: 0,
        n_vocab: 0,
        n_layers: 0,
        n_embd: 0,
        n_heads: 0,
        n_kv_heads: 0,
        reserved: 0,
        file_bytes: 0,
    }
);

/// Empties the struct; `struct_size` is `sizeof(lory_model_info)`.
///
/// # Safety
/// `struct_size` bytes at `place` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_model_info_init(
    place: *mut lory_model_info,
    struct_size: usize,
) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(place, struct_size) })
}

impl lory_model_info {
    fn of(engine: &Engine) -> lory_model_info {
        let model = engine.model();
        let config = model.decoder.config();
        lory_model_info {
            n_ctx: engine.n_ctx() as u32,
            n_ctx_train: config.n_ctx_train,
            n_vocab: model.tokenizer.vocab_size() as u32,
            n_layers: config.n_layers() as u32,
            n_embd: config.n_embd as u32,
            n_heads: config.n_heads as u32,
            n_kv_heads: config.n_kv_heads as u32,
            file_bytes: model.files.iter().map(|f| (**f).as_ref().len() as u64).sum(),
            ..crate::structs::Versioned::defaults()
        }
    }
}

/// The model's numbers. `info` must be initialised.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_model_info(
    engine: *const lory_engine,
    info: *mut lory_model_info,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, info) = (object(engine, "engine")?, place(info)?);
        info.set(&lory_model_info::of(&engine.engine));
        Ok(())
    })
}

/// The value of a key of the model file, such as `general.name`, as text; `LORY_E_NOT_FOUND` if it
/// has none, `LORY_E_ARGUMENT` if it is an array.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_metadata(
    engine: *const lory_engine,
    key: *const c_char,
    key_len: usize,
    value: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, value) = (object(engine, "engine")?, out(value, "value")?);
        value.set(lory_text::new(metadata(&engine.engine, text(key, key_len, "key")?)?));
        Ok(())
    })
}

fn metadata(engine: &Engine, key: &str) -> Result<String> {
    use lory_models::gguf::Value as V;
    let metadata = engine.model().gguf.metadata();
    let missing = || Failure::new(LORY_E_NOT_FOUND, format!("{}: has no key `{key}`", metadata.file()));
    Ok(match metadata.get(key).ok_or_else(missing)? {
        V::String(s) => s.clone(),
        V::Bool(v) => v.to_string(),
        V::F32(v) => v.to_string(),
        V::F64(v) => v.to_string(),
        V::U64(v) => v.to_string(),
        V::Array(_) => {
            let text = format!("{}: key `{key}` is an array", metadata.file());
            return Err(Failure::new(LORY_E_ARGUMENT, text));
        }
        integer => integer.as_i64().ok_or_else(missing)?.to_string(),
    })
}

/// The device in words.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_device(
    engine: *const lory_engine,
    device: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, device) = (object(engine, "engine")?, out(device, "device")?);
        device.set(lory_text::new(engine.engine.device()));
        Ok(())
    })
}

/// Runs one step for all sessions that have something to run. `ran` becomes 1, or 0 if there was
/// nothing to run or another thread is running a step. For hosts that schedule their own time;
/// `lory_generation_next` runs steps by itself.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_step(engine: *const lory_engine, ran: *mut i32) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, ran) = (object(engine, "engine")?, out(ran, "ran")?);
        ran.set(engine.log.within(|| engine.engine.step())?.into());
        Ok(())
    })
}

/// What an engine has done since it was opened and what it holds. Initialise it with
/// `lory_metrics_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_metrics {
    /// Set by `lory_metrics_init`.
    pub struct_size: usize,
    /// Steps that ran something.
    pub steps: u64,
    /// Nanoseconds that they took.
    pub step_ns: u64,
    /// Rows that they carried; over `row_capacity` it is how full batches were.
    pub rows: u64,
    /// Rows that they could have carried.
    pub row_capacity: u64,
    /// Requests that were accepted.
    pub requests: u64,
    /// Ended by an end-of-generation token.
    pub ended_eos: u64,
    /// Ended by a stop text.
    pub ended_stop: u64,
    /// Ended by their length.
    pub ended_length: u64,
    /// Ended by a full context.
    pub ended_context_full: u64,
    /// Cancelled.
    pub ended_cancelled: u64,
    /// Ended by an error.
    pub ended_failed: u64,
    /// Prompt tokens that were run.
    pub prompt_tokens: u64,
    /// Prompt tokens that were in the KV cache already.
    pub cached_tokens: u64,
    /// Those of them that other sessions had computed.
    pub shared_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Idle sessions that lost their keys and values for room.
    pub evictions: u64,
    /// Requests that had to give theirs to others.
    pub preemptions: u64,
    /// Sessions now.
    pub sessions: u64,
    /// Requests that have run at least once and go on.
    pub running: u64,
    /// Requests that wait for their first step.
    pub queued: u64,
    /// Bytes of the KV cache.
    pub kv_bytes: u64,
    /// Bytes of it that sessions hold.
    pub kv_bytes_used: u64,
    /// Bytes of it kept for sessions with the same beginning.
    pub kv_bytes_kept: u64,
    /// Adapters in memory.
    pub adapters_loaded: u64,
    /// Bytes that they have for themselves.
    pub adapter_bytes: u64,
    /// How often one was brought in.
    pub adapter_loads: u64,
    /// How often one was given up for room.
    pub adapter_evictions: u64,
}

versioned!(
    lory_metrics,
    last_of_first = adapter_evictions,
    lory_metrics {
        struct_size: size_of::<lory_metrics>(),
        steps: 0,
        step_ns: 0,
        rows: 0,
        row_capacity: 0,
        requests: 0,
        ended_eos: 0,
        ended_stop: 0,
        ended_length: 0,
        ended_context_full: 0,
        ended_cancelled: 0,
        ended_failed: 0,
        prompt_tokens: 0,
        cached_tokens: 0,
        shared_tokens: 0,
        generated_tokens: 0,
        evictions: 0,
        preemptions: 0,
        sessions: 0,
        running: 0,
        queued: 0,
        kv_bytes: 0,
        kv_bytes_used: 0,
        kv_bytes_kept: 0,
        adapters_loaded: 0,
        adapter_bytes: 0,
        adapter_loads: 0,
        adapter_evictions: 0,
    }
);

impl lory_metrics {
    fn of(m: &lory_runtime::Metrics) -> lory_metrics {
        lory_metrics {
            struct_size: 0,
            steps: m.steps,
            step_ns: m.step_time.as_nanos() as u64,
            rows: m.rows,
            row_capacity: m.row_capacity,
            requests: m.requests,
            ended_eos: m.endings.eos,
            ended_stop: m.endings.stop,
            ended_length: m.endings.length,
            ended_context_full: m.endings.context_full,
            ended_cancelled: m.endings.cancelled,
            ended_failed: m.endings.failed,
            prompt_tokens: m.prompt_tokens,
            cached_tokens: m.cached_tokens,
            shared_tokens: m.shared_tokens,
            generated_tokens: m.generated_tokens,
            evictions: m.evictions,
            preemptions: m.preemptions,
            sessions: m.sessions as u64,
            running: m.running as u64,
            queued: m.queued as u64,
            kv_bytes: (m.kv_pages * m.kv_page_bytes) as u64,
            kv_bytes_used: (m.kv_pages_used * m.kv_page_bytes) as u64,
            kv_bytes_kept: (m.kv_pages_kept * m.kv_page_bytes) as u64,
            adapters_loaded: m.adapters.loaded as u64,
            adapter_bytes: m.adapters.bytes as u64,
            adapter_loads: m.adapters.loads,
            adapter_evictions: m.adapters.evictions,
        }
    }
}

/// Empties the struct; `struct_size` is `sizeof(lory_metrics)`.
///
/// # Safety
/// `struct_size` bytes at `place` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_metrics_init(place: *mut lory_metrics, struct_size: usize) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(place, struct_size) })
}

/// What the engine has done and holds. `metrics` must be initialised. Waits for a step that is running.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_metrics(
    engine: *const lory_engine,
    metrics: *mut lory_metrics,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, metrics) = (object(engine, "engine")?, place(metrics)?);
        metrics.set(&lory_metrics::of(&engine.engine.metrics()));
        Ok(())
    })
}

/// The same and more, as histograms, in Prometheus' text format 0.0.4.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_prometheus(
    engine: *const lory_engine,
    text: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, text) = (object(engine, "engine")?, out(text, "text")?);
        text.set(lory_text::new(engine.engine.metrics().prometheus()));
        Ok(())
    })
}

/// Runs steps on the calling thread, and sleeps while there are none, until `go_on(user)` returns 0;
/// it is asked between steps. Others may then only poll.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_drive(
    engine: *const lory_engine,
    go_on: lory_go_on_fn,
    user: *mut c_void,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let engine = object(engine, "engine")?;
        let go_on = go_on.ok_or_else(|| Failure::new(LORY_E_NULL, "go_on is NULL"))?;
        engine.log.within(|| engine.engine.drive(|| go_on(user) != 0));
        Ok(())
    })
}

/// Wakes threads in `lory_engine_drive`, so that they ask their `go_on`.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_engine_wake_drivers(engine: *const lory_engine) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        object(engine, "engine")?.engine.wake_drivers();
        Ok(())
    })
}
