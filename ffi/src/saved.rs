//! Sessions that outlive their process.

use std::{
    ffi::{c_char, c_void},
    io::{self, Write},
    path::Path,
};

use crate::{
    args::{exclusive, handle, object, out, slice, text},
    engine::lory_engine,
    memory::lory_text,
    session::{lory_session, lory_session_options},
    status::{guard, lory_status},
    structs::read,
};

/// Bytes that grow while there is memory for them.
struct Growing(Vec<u8>);

impl Write for Growing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.0.len() + bytes.len();
        // One more for the NUL of a text.
        let grown = self.0.try_reserve(bytes.len() + 1);
        grown.map_err(|_| io::Error::other(format!("no memory for {len} bytes")))?;
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Saves a session, running or not: its tokens and what is cached of them. The file appears whole or
/// not at all.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_save(
    session: *mut lory_session,
    path: *const c_char,
    path_len: usize,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, path) = (object(session, "session")?, text(path, path_len, "path")?);
        let guard = exclusive(&session.session, "session")?;
        Ok(session.log.within(|| guard.save(Path::new(path)))?)
    })
}

/// Saves a session into memory; `bytes` are no text.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_save_memory(
    session: *mut lory_session,
    bytes: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, place) = (object(session, "session")?, out(bytes, "bytes")?);
        let mut bytes = Growing(Vec::new());
        exclusive(&session.session, "session")?.save_to(&mut bytes)?;
        place.set(lory_text::new(bytes.0));
        Ok(())
    })
}

/// A session from a file that `lory_session_save` wrote, of the same model, with the same adapters
/// and weights, which `options` give (NULL: none). If it fails, nothing of the file remains.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_restore(
    engine: *const lory_engine,
    path: *const c_char,
    path_len: usize,
    options: *const lory_session_options,
    session: *mut *mut lory_session,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, session) = (object(engine, "engine")?, out(session, "session")?);
        let (path, options) = (text(path, path_len, "path")?, read(options)?.to_rust()?);
        let new = engine.log.within(|| engine.engine.restore(Path::new(path), &options))?;
        session.set(handle(lory_session::new(new, &engine.log)));
        Ok(())
    })
}

/// A session from bytes that `lory_session_save_memory` gave, as `lory_session_restore` does.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_restore_memory(
    engine: *const lory_engine,
    data: *const c_void,
    size: usize,
    options: *const lory_session_options,
    session: *mut *mut lory_session,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, session) = (object(engine, "engine")?, out(session, "session")?);
        let (mut data, options) = (slice(data.cast::<u8>(), size, "data")?, read(options)?.to_rust()?);
        let restore = || engine.engine.restore_from(&mut data, "the saved session", &options);
        let new = engine.log.within(restore)?;
        session.set(handle(lory_session::new(new, &engine.log)));
        Ok(())
    })
}
