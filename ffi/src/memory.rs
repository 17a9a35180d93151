//! Texts and arrays that cross the boundary.

use std::{ffi::c_char, ptr};

use crate::{
    args::text,
    status::{Result, guard_free},
};

/// An array that is C's from now on.
fn give<T>(values: Vec<T>) -> *mut T {
    Box::into_raw(values.into_boxed_slice()).cast()
}

/// Frees what [`give`] gave and empties its place; NULL is nothing.
///
/// # Safety
/// `data` is NULL, or [`give`] gave it with `len` elements of the size and alignment of `T`.
unsafe fn take_back<T>(data: &mut *mut T, len: usize) {
    let data = std::mem::replace(data, ptr::null_mut());
    if !data.is_null() {
        // SAFETY: the caller's word; its place no longer has it.
        drop(unsafe { Box::from_raw(ptr::slice_from_raw_parts_mut(data, len)) });
    }
}

/// A text that somebody else owns: UTF-8, not NUL-terminated. One that lory gives belongs to the
/// handle it came from and is valid until the next call with that handle.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lory_str {
    /// May be NULL if `len` is 0.
    pub data: *const c_char,
    /// In bytes, or `LORY_NTS` for a NUL-terminated text given to lory.
    pub len: usize,
}

impl lory_str {
    pub(crate) fn view(text: &str) -> lory_str {
        lory_str { data: text.as_ptr().cast(), len: text.len() }
    }

    /// # Safety
    /// As for [`text`].
    pub(crate) unsafe fn read<'a>(self, name: &str) -> Result<&'a str> {
        // SAFETY: the caller's word.
        unsafe { text(self.data, self.len, name) }
    }
}

/// A text that the caller owns: UTF-8, with a NUL behind it. Free it with `lory_text_free`, do not
/// change it.
#[repr(C)]
#[derive(Debug)]
pub struct lory_text {
    /// Never NULL in a result.
    pub data: *mut c_char,
    /// In bytes, without the NUL.
    pub len: usize,
}

impl lory_text {
    pub(crate) fn new(text: impl Into<Vec<u8>>) -> lory_text {
        let mut bytes: Vec<u8> = text.into();
        let len = bytes.len();
        bytes.push(0);
        lory_text { data: give(bytes).cast(), len }
    }
}

/// Frees a text and empties the struct; NULL and empty structs are no-ops.
///
/// # Safety
/// `text` is NULL or a struct that is zeroed or from lory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_text_free(text: *mut lory_text) {
    guard_free(|| {
        // SAFETY: NULL or the caller's struct.
        let Some(text) = (unsafe { text.as_mut() }) else { return };
        // SAFETY: from `lory_text::new`, which added a NUL, or NULL.
        unsafe { take_back(&mut text.data, std::mem::take(&mut text.len) + 1) };
    });
}

/// Tokens that the caller owns. Free them with `lory_tokens_free`, do not change the struct.
#[repr(C)]
#[derive(Debug)]
pub struct lory_tokens {
    /// Never NULL in a result.
    pub data: *mut u32,
    /// How many.
    pub len: usize,
}

impl lory_tokens {
    pub(crate) fn new(tokens: Vec<u32>) -> lory_tokens {
        lory_tokens { len: tokens.len(), data: give(tokens) }
    }
}

/// Frees tokens and empties the struct; NULL and empty structs are no-ops.
///
/// # Safety
/// `tokens` is NULL or a struct that is zeroed or from lory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_tokens_free(tokens: *mut lory_tokens) {
    guard_free(|| {
        // SAFETY: NULL or the caller's struct.
        let Some(tokens) = (unsafe { tokens.as_mut() }) else { return };
        // SAFETY: from `lory_tokens::new`, or NULL.
        unsafe { take_back(&mut tokens.data, std::mem::take(&mut tokens.len)) };
    });
}

/// Numbers that the caller owns. Free them with `lory_floats_free`, do not change the struct.
#[repr(C)]
#[derive(Debug)]
pub struct lory_floats {
    /// Never NULL in a result.
    pub data: *mut f32,
    /// How many.
    pub len: usize,
}

impl lory_floats {
    pub(crate) fn new(floats: Vec<f32>) -> lory_floats {
        lory_floats { len: floats.len(), data: give(floats) }
    }
}

/// Frees numbers and empties the struct; NULL and empty structs are no-ops.
///
/// # Safety
/// `floats` is NULL or a struct that is zeroed or from lory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_floats_free(floats: *mut lory_floats) {
    guard_free(|| {
        // SAFETY: NULL or the caller's struct.
        let Some(floats) = (unsafe { floats.as_mut() }) else { return };
        // SAFETY: from `lory_floats::new`, or NULL.
        unsafe { take_back(&mut floats.data, std::mem::take(&mut floats.len)) };
    });
}
