//! Functions of the host that lory calls.

use std::ffi::{c_char, c_void};

use crate::event::lory_event;

/// Severity of a log line; lower is more severe.
pub type lory_log_level = u32;
/// Something failed.
pub const LORY_LOG_ERROR: lory_log_level = 1;
/// Something is odd.
pub const LORY_LOG_WARN: lory_log_level = 2;
/// What was opened and loaded.
pub const LORY_LOG_INFO: lory_log_level = 3;
/// Details.
pub const LORY_LOG_DEBUG: lory_log_level = 4;

/// Takes a log line: NUL-terminated UTF-8 of `len` bytes, valid during the call. Called on the
/// thread that calls lory, possibly on several at once.
pub type lory_log_fn = Option<
    unsafe extern "C-unwind" fn(user: *mut c_void, level: lory_log_level, text: *const c_char, len: usize),
>;

/// Told how much of a model has been read; return something other than 0 to give up, and opening
/// ends with `LORY_E_ABORTED`.
pub type lory_progress_fn =
    Option<unsafe extern "C-unwind" fn(user: *mut c_void, done: u64, total: u64) -> i32>;

/// Puts up to `len` bytes from `offset` on into `buffer` and returns how many, at least 1 before
/// the end; or a negative number to give up, and opening ends with `LORY_E_IO`.
pub type lory_read_fn = Option<
    unsafe extern "C-unwind" fn(user: *mut c_void, offset: u64, buffer: *mut c_void, len: usize) -> i64,
>;

/// Told that lory no longer uses memory that was lent to it.
pub type lory_release_fn =
    Option<unsafe extern "C-unwind" fn(user: *mut c_void, data: *const c_void, size: usize)>;

/// Asked between steps; return 0 to end `lory_engine_drive`.
pub type lory_go_on_fn = Option<unsafe extern "C-unwind" fn(user: *mut c_void) -> i32>;

/// Takes an event, valid during the call; return something other than 0 to cancel the generation.
pub type lory_event_fn =
    Option<unsafe extern "C-unwind" fn(user: *mut c_void, event: *const lory_event) -> i32>;

/// The host's pointer, handed back to the host's functions and never looked at.
#[derive(Clone, Copy)]
pub(crate) struct User(pub(crate) *mut c_void);

// SAFETY: lory only carries the pointer; the header says on which threads functions are called.
unsafe impl Send for User {}
// SAFETY: as above.
unsafe impl Sync for User {}
