//! Opening models: from a path, a descriptor, memory, or a function of the host.

use std::{
    ffi::{c_char, c_void},
    path::Path,
    sync::Arc,
};

use lory_runtime::{
    Engine, LoadedModel, OpenOptions,
    mapping::{self, File, Loading, OpenGguf, Progress},
};

use crate::{
    args::{self, handle, out, slice, text},
    callbacks::{User, lory_read_fn, lory_release_fn},
    engine::lory_engine,
    options::lory_engine_options,
    source::{HostReader, Lent, duplicate},
    status::{Failure, Result, guard, lory_status, lory_status::*},
    structs::read,
};

/// Reads the options, and opens an engine over what `open` gives. It is told how files come into memory
/// and what wants to know how much has been read.
///
/// # Safety
/// As for [`read`].
unsafe fn open(
    options: *const lory_engine_options,
    out: args::Out<'_, *mut lory_engine>,
    open: impl FnOnce(Loading, Progress<'_>) -> Result<OpenGguf>,
) -> Result<()> {
    // SAFETY: the caller's word.
    let c_options = unsafe { read(options) }?;
    let options = c_options.to_rust()?;
    let log = c_options.log();
    let engine = log.within(|| -> Result<Engine> {
        let gguf = open(options.loading, &mut |done, total| c_options.report(done, total))?;
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
        open(options, engine, |loading, progress| {
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
        open(options, engine, |loading, progress| {
            single(File::from_handle(duplicate(fd, name)?, name, loading, progress))
        })
    })
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
        open(options, engine, |_, progress| match release {
            Some(_) => single(Ok(File::from_owner(Box::new(lent), name))),
            None => single(File::from_reader(&mut &*bytes, name, size as u64, progress)),
        })
    })
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
        open(options, engine, |_, progress| single(File::from_reader(&mut reader, name, size, progress)))
    })
}
