//! Adapters by name.

use std::{
    ffi::{c_char, c_void},
    path::Path,
    sync::Arc,
};

use lory_runtime::{
    AdapterInfo,
    mapping::{self, File},
};

use crate::{
    args::{free, handle, object, out, slice, text},
    engine::lory_engine,
    memory::lory_str,
    options::limit,
    sampler::strings,
    session::lory_adapter,
    status::{Failure, Result, guard, guard_free, lory_status, lory_status::*},
    structs::{init, place, versioned},
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
        let (engine, adapter) = (object(engine, "engine")?, out(adapter, "adapter")?);
        let (path, name) = (text(path, path_len, "path")?, name_or_stem(name, name_len)?);
        let load = || engine.engine.adapters().load_lora(Path::new(path), name);
        adapter.set(engine.log.within(load)?.to_u64());
        Ok(())
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
        let (engine, adapter) = (object(engine, "engine")?, out(adapter, "adapter")?);
        let (path, name) = (text(path, path_len, "path")?, name_or_stem(name, name_len)?);
        let load = || engine.engine.adapters().replace_lora(Path::new(path), name);
        adapter.set(engine.log.within(load)?.to_u64());
        Ok(())
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
        let (engine, n_adapters) = (object(engine, "engine")?, out(n_adapters, "n_adapters")?);
        let path = Path::new(text(path, path_len, "path")?);
        n_adapters.set(engine.log.within(|| engine.engine.adapters().open_pack(path))?);
        Ok(())
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
        let (engine, adapter) = (object(engine, "engine")?, out(adapter, "adapter")?);
        let name = text(name, name_len, "name")?;
        adapter.set(engine.log.within(|| engine.engine.adapters().resolve(name))?.to_u64());
        Ok(())
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
        let (engine, adapter) = (object(engine, "engine")?, out(adapter, "adapter")?);
        let (bytes, name) = (slice(data.cast::<u8>(), size, "data")?, text(name, name_len, "name")?);
        let file = File::from_reader(&mut &*bytes, name, size as u64, &mut |_, _| true)?;
        let open = mapping::parse(vec![Arc::new(file)])?;
        let load = || engine.engine.adapters().load_open_lora(open, name, replace != 0);
        adapter.set(engine.log.within(load)?.to_u64());
        Ok(())
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
        let (engine, n_adapters) = (object(engine, "engine")?, out(n_adapters, "n_adapters")?);
        let path = Path::new(text(path, path_len, "path")?);
        n_adapters.set(engine.log.within(|| engine.engine.adapters().reopen_pack(path))?);
        Ok(())
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
        let (engine, n_bytes) = (object(engine, "engine")?, out(n_bytes, "n_bytes")?);
        let names = strings(names, n_names, "names")?;
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        n_bytes.set(engine.log.within(|| engine.engine.adapters().prefetch(&names))?);
        Ok(())
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

/// All adapters at one time, in alphabetical order. Shareable.
pub struct lory_adapter_list(Vec<(AdapterInfo, String)>);

/// What is known about an adapter. Initialise it with `lory_adapter_info_init`. Its texts belong to
/// the list.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_adapter_info {
    /// Set by `lory_adapter_info_init`.
    pub struct_size: usize,
    /// The name it answers to.
    pub name: lory_str,
    /// The file or folder it came from.
    pub origin: lory_str,
    /// Bytes that belong to it alone; 0 until it has been brought in.
    pub bytes: u64,
    /// 1 if it can be brought in again from a pack.
    pub in_pack: u32,
    /// 1 if it has been brought in.
    pub loaded: u32,
    /// Which loading the name means now; 0 if it was never asked for.
    pub id: lory_adapter,
    /// Requests that used this loading.
    pub uses: u64,
    /// Sessions that have it now.
    pub sessions: u64,
}

versioned!(
    lory_adapter_info,
    last_of_first = sessions,
    lory_adapter_info {
        struct_size: size_of::<lory_adapter_info>(),
        name: lory_str::EMPTY,
        origin: lory_str::EMPTY,
        bytes: 0,
        in_pack: 0,
        loaded: 0,
        id: 0,
        uses: 0,
        sessions: 0,
    }
);

/// Empties the struct; `struct_size` is `sizeof(lory_adapter_info)`.
///
/// # Safety
/// `struct_size` bytes at `info` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_info_init(
    info: *mut lory_adapter_info,
    struct_size: usize,
) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(info, struct_size) })
}

/// Lists all adapters, loaded or waiting in a pack.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_list_new(
    engine: *const lory_engine,
    list: *mut *mut lory_adapter_list,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, list) = (object(engine, "engine")?, out(list, "list")?);
        let store = engine.engine.adapters();
        // A name may go between the two calls; then it is not in the list.
        let infos = store.names().into_iter().filter_map(|name| store.info(&name).ok());
        let entries = infos.map(|info| (info.origin.to_string_lossy().into_owned(), info));
        list.set(handle(lory_adapter_list(entries.map(|(origin, info)| (info, origin)).collect())));
        Ok(())
    })
}

/// How many adapters a list has; 0 for NULL.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_list_len(list: *const lory_adapter_list) -> usize {
    // SAFETY: pointers are what the header asks for.
    unsafe { list.as_ref() }.map_or(0, |list| list.0.len())
}

/// One adapter of a list; `index` is below its length. `info` must be initialised.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_list_get(
    list: *const lory_adapter_list,
    index: usize,
    info: *mut lory_adapter_info,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (list, place) = (object(list, "list")?, place(info)?);
        let missing = || format!("index {index} in a list of {}", list.0.len());
        let entry = list.0.get(index).ok_or_else(|| Failure::new(LORY_E_ARGUMENT, missing()))?;
        place.set(&describe(&entry.0, &entry.1));
        Ok(())
    })
}

fn describe(info: &AdapterInfo, origin: &str) -> lory_adapter_info {
    lory_adapter_info {
        struct_size: 0,
        name: lory_str::view(&info.name),
        origin: lory_str::view(origin),
        bytes: info.bytes as u64,
        in_pack: info.in_pack.into(),
        loaded: info.loaded.into(),
        id: info.generation,
        uses: info.uses,
        sessions: info.sessions as u64,
    }
}

/// Frees a list; NULL is a no-op.
///
/// # Safety
/// `list` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_adapter_list_free(list: *mut lory_adapter_list) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(list) });
}
