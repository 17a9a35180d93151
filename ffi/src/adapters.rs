//! Adapters by name.

use std::{
    ffi::{c_char, c_void},
    path::Path,
    sync::Arc,
};

use lory_runtime::{
    AdapterStore,
    mapping::{self, File},
};

use crate::{
    args::{object, out, slice, text},
    engine::lory_engine,
    memory::lory_str,
    options::limit,
    sampler::strings,
    session::lory_adapter,
    status::{Result, guard, lory_status},
};

/// A name, or the stem of the path if it is NULL and its length 0.
///
/// # Safety
/// As for [`text`].
unsafe fn name_or_stem<'a>(name: *const c_char, len: usize) -> Result<Option<&'a str>> {
    match name.is_null() && len == 0 {
        true => Ok(None),
        // SAFETY: the caller's word.
        false => unsafe { text(name, len, "name") }.map(Some),
    }
}

/// Hands the engine's adapters to `work`, under its log, and writes what comes of it to a place.
///
/// # Safety
/// As for [`object`] and [`out`].
unsafe fn with_store<T>(
    engine: *const lory_engine,
    place: *mut T,
    name: &str,
    work: impl FnOnce(&AdapterStore) -> Result<T>,
) -> Result<()> {
    // SAFETY: the caller's word.
    let (engine, place) = unsafe { (object(engine, "engine")?, out(place, name)?) };
    place.set(engine.log.within(|| work(engine.engine.adapters()))?);
    Ok(())
}

/// Loads a LoRA, a GGUF file or a PEFT folder, under `name` (NULL: the stem of the path). A name
/// that is taken is refused. Adapters are loaded while sessions run.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_load(
    engine: *const lory_engine,
    path: *const c_char,
    path_len: usize,
    name: *const c_char,
    name_len: usize,
    adapter: *mut lory_adapter,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (path, name) = (text(path, path_len, "path")?, name_or_stem(name, name_len)?);
        with_store(engine, adapter, "adapter", |store| Ok(store.load_lora(Path::new(path), name)?.to_u64()))
    })
}

/// Loads a LoRA as `lory_adapter_load` does, in place of what had the name before. Sessions keep
/// the adapter that they have until they are given the new one.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_replace(
    engine: *const lory_engine,
    path: *const c_char,
    path_len: usize,
    name: *const c_char,
    name_len: usize,
    adapter: *mut lory_adapter,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (path, name) = (text(path, path_len, "path")?, name_or_stem(name, name_len)?);
        with_store(engine, adapter, "adapter", |store| {
            Ok(store.replace_lora(Path::new(path), name)?.to_u64())
        })
    })
}

/// Loads a GGUF LoRA that lies in memory, which is copied, under `name`; `replace` 1 takes the name
/// if it is there already.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_load_memory(
    engine: *const lory_engine,
    data: *const c_void,
    size: usize,
    name: *const c_char,
    name_len: usize,
    replace: i32,
    adapter: *mut lory_adapter,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (bytes, name) = (slice(data.cast::<u8>(), size, "data")?, text(name, name_len, "name")?);
        with_store(engine, adapter, "adapter", |store| {
            let file = File::from_reader(&mut &*bytes, name, size as u64, &mut |_, _| true)?;
            let open = mapping::parse(vec![Arc::new(file)])?;
            Ok(store.load_open_lora(open, name, replace != 0)?.to_u64())
        })
    })
}

/// The adapter with this name, brought in from its pack if need be.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_resolve(
    engine: *const lory_engine,
    name: *const c_char,
    name_len: usize,
    adapter: *mut lory_adapter,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let name = text(name, name_len, "name")?;
        with_store(engine, adapter, "adapter", |store| Ok(store.resolve(name)?.to_u64()))
    })
}

/// Takes a name out of the engine. Sessions that use the adapter keep it until they change; its
/// number is refused from now on.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_unload(
    engine: *const lory_engine,
    name: *const c_char,
    name_len: usize,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, name) = (object(engine, "engine")?, text(name, name_len, "name")?);
        Ok(engine.log.within(|| engine.engine.adapters().unload(name))?)
    })
}

/// Opens a pack of adapters of this model; each is brought in when it is first resolved.
/// `n_adapters` is how many it has.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_open_pack(
    engine: *const lory_engine,
    path: *const c_char,
    path_len: usize,
    n_adapters: *mut usize,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let path = Path::new(text(path, path_len, "path")?);
        with_store(engine, n_adapters, "n_adapters", |store| Ok(store.open_pack(path)?))
    })
}

/// Opens a pack again that was opened from the same path, with what was added, replaced and removed
/// since. Sessions keep the adapters that they have.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_reopen_pack(
    engine: *const lory_engine,
    path: *const c_char,
    path_len: usize,
    n_adapters: *mut usize,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let path = Path::new(text(path, path_len, "path")?);
        with_store(engine, n_adapters, "n_adapters", |store| Ok(store.reopen_pack(path)?))
    })
}

/// Takes a pack and all its names out of the engine. Sessions keep the adapters that they have.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_close_pack(
    engine: *const lory_engine,
    path: *const c_char,
    path_len: usize,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, path) = (object(engine, "engine")?, text(path, path_len, "path")?);
        Ok(engine.log.within(|| engine.engine.adapters().close_pack(Path::new(path)))?)
    })
}

/// Brings adapters of packs in ahead of their first use, with the bases that they share, so that no
/// request waits for the disk. `n_bytes` is what they have for themselves.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_prefetch(
    engine: *const lory_engine,
    names: *const lory_str,
    n_names: usize,
    n_bytes: *mut usize,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let names = strings(names, n_names, "names")?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        with_store(engine, n_bytes, "n_bytes", |store| Ok(store.prefetch(&names)?))
    })
}

/// Bytes that adapters may have for themselves; 0 sets no limit. When more are needed, adapters of
/// packs that no session uses are given up, the least recently used first.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_set_budget(engine: *const lory_engine, bytes: u64) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        object(engine, "engine")?.engine.adapters().set_budget(limit(bytes));
        Ok(())
    })
}
