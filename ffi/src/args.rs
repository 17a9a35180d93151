//! What C hands over becomes what Rust can trust, in one place.

use std::{
    ffi::{CStr, c_char},
    marker::PhantomData,
    ptr::NonNull,
    sync::{Arc, Mutex, MutexGuard, TryLockError},
};

use crate::status::{Failure, Result, lory_status::*};

/// A length of this says that the text ends with NUL.
const NUL_TERMINATED: usize = usize::MAX;

fn null(name: &str) -> Failure {
    Failure::new(LORY_E_NULL, format!("{name} is NULL"))
}

/// A new handle.
pub(crate) fn handle<T>(object: T) -> *mut T {
    Arc::into_raw(Arc::new(object)).cast_mut()
}

/// The object behind a handle, kept alive for the duration of the call.
///
/// # Safety
/// `ptr` is NULL or from [`handle`] and not freed.
pub(crate) unsafe fn object<T>(ptr: *const T, name: &str) -> Result<Arc<T>> {
    let ptr = NonNull::new(ptr.cast_mut()).ok_or_else(|| null(name))?.as_ptr();
    // SAFETY: from `Arc::into_raw`, and alive: the handle holds one count, the call adds its own.
    Ok(unsafe {
        Arc::increment_strong_count(ptr);
        Arc::from_raw(ptr)
    })
}

/// Gives up a handle; a call that still runs on it keeps the object until its end.
///
/// # Safety
/// As for [`object`].
pub(crate) unsafe fn free<T>(ptr: *mut T) {
    if let Some(ptr) = NonNull::new(ptr) {
        // SAFETY: from `Arc::into_raw`, whose count this takes back.
        drop(unsafe { Arc::from_raw(ptr.as_ptr()) });
    }
}

/// Exclusive use of a handle's object, refused instead of waited for.
pub(crate) fn exclusive<'a, T>(mutex: &'a Mutex<T>, name: &str) -> Result<MutexGuard<'a, T>> {
    match mutex.try_lock() {
        Ok(guard) => Ok(guard),
        // Its holder panicked; states are valid between calls.
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => {
            let text = format!("{name} is in use, by another thread or by the caller of this callback");
            Err(Failure::new(LORY_E_BUSY, text))
        }
    }
}

/// A text with its length.
///
/// # Safety
/// `len` bytes at `ptr` are readable and stay as they are for `'a`; with [`NUL_TERMINATED`], all up
/// to a NUL.
pub(crate) unsafe fn text<'a>(ptr: *const c_char, len: usize, name: &str) -> Result<&'a str> {
    let bytes = match len {
        NUL_TERMINATED if ptr.is_null() => return Err(null(name)),
        // SAFETY: the caller's word: there is a NUL.
        NUL_TERMINATED => unsafe { CStr::from_ptr(ptr) }.to_bytes(),
        // SAFETY: the caller's word.
        len => unsafe { slice(ptr.cast::<u8>(), len, name) }?,
    };
    std::str::from_utf8(bytes).map_err(|e| {
        let at = e.valid_up_to();
        Failure::new(LORY_E_UTF8, format!("{name} is not UTF-8 at byte {at}"))
    })
}

/// An array with its length; NULL is an empty one.
///
/// # Safety
/// `len` elements at `ptr` are readable, valid, and stay as they are for `'a`.
pub(crate) unsafe fn slice<'a, T>(ptr: *const T, len: usize, name: &str) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if ptr.is_null() {
        return Err(Failure::new(LORY_E_NULL, format!("{name} is NULL, but its length is {len}")));
    }
    if len > isize::MAX as usize / size_of::<T>().max(1) || !ptr.is_aligned() {
        let text = format!("{name}: {len} elements at {ptr:p} cannot be an array");
        return Err(Failure::new(LORY_E_ARGUMENT, text));
    }
    // SAFETY: not NULL, aligned, not longer than memory; the rest is the caller's word.
    Ok(unsafe { std::slice::from_raw_parts(ptr, len) })
}

/// A place for a result: checked before the work, written after it.
pub(crate) struct Out<'a, T> {
    place: NonNull<T>,
    lifetime: PhantomData<&'a mut T>,
}

/// The place for a result.
///
/// # Safety
/// `ptr` is NULL or writable for `'a` and aligned.
pub(crate) unsafe fn out<'a, T>(ptr: *mut T, name: &str) -> Result<Out<'a, T>> {
    let place = NonNull::new(ptr).ok_or_else(|| null(name))?;
    Ok(Out { place, lifetime: PhantomData })
}

impl<T> Out<'_, T> {
    /// Fills the place; what was there is not read.
    pub(crate) fn set(self, value: T) {
        // SAFETY: not NULL, and writable by the word given to `out`.
        unsafe { self.place.write(value) }
    }
}
