//! Which adapters there are.

use lory_runtime::AdapterInfo;

use crate::{
    args::{free, handle, object, out},
    engine::lory_engine,
    memory::lory_str,
    session::{lory_adapter, lory_token_span},
    status::{Failure, guard, guard_free, lory_status, lory_status::*},
    structs::{init, place, versioned},
};

/// All adapters at one time, in alphabetical order. Shareable.
pub struct lory_adapter_list(Vec<(AdapterInfo, String)>);

/// What is known about an adapter. Initialise it with `lory_adapter_info_init`. Its texts and tokens
/// belong to the list.
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
    /// Tokens that switch it on; empty for an adapter that always works, and until it has been
    /// brought in.
    pub invocation: lory_token_span,
}

versioned!(lory_adapter_info, last_of_first = sessions);

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
        invocation: lory_token_span { data: info.invocation.as_ptr(), len: info.invocation.len() },
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
