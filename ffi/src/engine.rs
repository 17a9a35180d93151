//! The engine's handle and its time: whose thread runs steps.

use std::ffi::c_void;

use lory_runtime::Engine;

use crate::{
    args::{free, object, out},
    callbacks::lory_go_on_fn,
    log::Log,
    status::{Failure, guard, guard_free, lory_status, lory_status::*},
};

/// A model, its adapters and its KV cache. Shareable between threads; sessions and generations
/// keep what they need of it alive, so it may be freed first.
pub struct lory_engine {
    pub(crate) engine: Engine,
    pub(crate) log: Log,
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
