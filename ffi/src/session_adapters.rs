//! Which adapters a session has.

use lory_runtime::SessionAdapter;

use crate::{
    args::{exclusive, free, handle, object, out},
    memory::lory_str,
    session::{lory_adapter, lory_session},
    status::{Failure, guard, guard_free, lory_status, lory_status::*},
    structs::{init, place, versioned},
};

/// The adapters of a session at one time, in the order in which it was given them. Shareable.
pub struct lory_session_adapters(Vec<SessionAdapter>);

/// An adapter of a session. Initialise it with `lory_session_adapter_init`. Its name belongs to the list.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_session_adapter {
    /// Set by `lory_session_adapter_init`.
    pub struct_size: usize,
    /// The loading that the session was given, which it keeps whatever happens to the name.
    pub id: lory_adapter,
    /// The name that it had then.
    pub name: lory_str,
    /// Multiplies what the adapter adds.
    pub scale: f32,
    /// 1 if it works: always, unless it has invocation tokens; these the session's last request must
    /// have found in it.
    pub works: u32,
    /// The position from which on it works; 0 unless it has invocation tokens.
    pub works_from: usize,
}

versioned!(lory_session_adapter, last_of_first = works_from);

/// Empties the struct; `struct_size` is `sizeof(lory_session_adapter)`.
///
/// # Safety
/// `struct_size` bytes at `adapter` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_adapter_init(
    adapter: *mut lory_session_adapter,
    struct_size: usize,
) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(adapter, struct_size) })
}

/// Lists the adapters that a session has.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_adapters_new(
    session: *mut lory_session,
    adapters: *mut *mut lory_session_adapters,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, adapters) = (object(session, "session")?, out(adapters, "adapters")?);
        let list = exclusive(&session.session, "session")?.adapters();
        adapters.set(handle(lory_session_adapters(list)));
        Ok(())
    })
}

/// How many adapters there are; 0 for NULL.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_adapters_len(adapters: *const lory_session_adapters) -> usize {
    // SAFETY: pointers are what the header asks for.
    unsafe { adapters.as_ref() }.map_or(0, |list| list.0.len())
}

/// One of the adapters; `index` is below their number. `adapter` must be initialised.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_adapters_get(
    adapters: *const lory_session_adapters,
    index: usize,
    adapter: *mut lory_session_adapter,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (list, place) = (object(adapters, "adapters")?, place(adapter)?);
        let missing = || format!("index {index} in a list of {}", list.0.len());
        let entry = list.0.get(index).ok_or_else(|| Failure::new(LORY_E_ARGUMENT, missing()))?;
        place.set(&lory_session_adapter {
            struct_size: 0,
            id: entry.id.to_u64(),
            name: lory_str::view(&entry.name),
            scale: entry.scale,
            works: entry.works_from.is_some().into(),
            works_from: entry.works_from.unwrap_or(0),
        });
        Ok(())
    })
}

/// Frees a list; NULL is a no-op.
///
/// # Safety
/// `adapters` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_adapters_free(adapters: *mut lory_session_adapters) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(adapters) });
}
