//! Status codes, the thread's error text, and the guard around every call.

use std::{
    any::Any,
    cell::RefCell,
    ffi::{CStr, CString, c_char},
    panic::{AssertUnwindSafe, catch_unwind},
};

/// What a call came to. The numbers never change; new ones may come: treat an unknown one as an error.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum lory_status {
    /// Done.
    LORY_OK = 0,
    /// A pointer that must not be NULL is NULL.
    LORY_E_NULL = 1,
    /// A value is out of its range: a length, an unknown constant, a field that is not a number.
    LORY_E_ARGUMENT = 2,
    /// A text is not UTF-8.
    LORY_E_UTF8 = 3,
    /// A struct's `struct_size` is not one of any version of this struct: was it initialised?
    LORY_E_STRUCT_SIZE = 4,
    /// An exclusive handle is in use: by another thread, or by the function that made this callback.
    LORY_E_BUSY = 5,
    /// Nothing there has this name, key or role.
    LORY_E_NOT_FOUND = 6,
    /// The operating system refused, or what a path names is no ordinary file.
    LORY_E_IO = 7,
    /// The contents of a file are broken: container, key or tensor.
    LORY_E_FORMAT = 8,
    /// The file or the request is sound, but asks for what this library does not do.
    LORY_E_UNSUPPORTED = 9,
    /// An adapter does not belong to the model it is loaded for.
    LORY_E_WRONG_BASE = 10,
    /// A chat template failed to parse or to render, or the model has none.
    LORY_E_TEMPLATE = 11,
    /// A sampler option is out of its range, or the logits leave nothing to choose.
    LORY_E_SAMPLER = 12,
    /// The KV cache has no room left for this request.
    LORY_E_KV_FULL = 13,
    /// A request that cannot be carried out as it is: too long, a token that does not exist, an
    /// adapter that was unloaded or replaced.
    LORY_E_REQUEST = 14,
    /// The device failed, or has no memory for the buffers asked for.
    LORY_E_DEVICE = 15,
    /// A callback asked for the end.
    LORY_E_ABORTED = 16,
    /// A defect of this library, whose words also went to standard error. The call had no effect that
    /// can be relied on; free the engine.
    LORY_E_INTERNAL = 17,
    /// An adapter does not fit into the bytes that adapters may have.
    LORY_E_ADAPTER_BUDGET = 18,
    /// A saved session that cannot be restored here: damaged, or of another model, cache or adapters.
    LORY_E_RESTORE = 19,
    /// A grammar that cannot be used.
    LORY_E_GRAMMAR = 20,
}

use lory_status::*;

/// A status and the words for it.
pub(crate) struct Failure {
    status: lory_status,
    text: String,
}

pub(crate) type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub(crate) fn new(status: lory_status, text: impl Into<String>) -> Failure {
        Failure { status, text: text.into() }
    }
}

impl From<lory_models::Error> for Failure {
    fn from(e: lory_models::Error) -> Failure {
        use lory_models::Error as E;
        let status = match &e {
            E::Unsupported { .. } => LORY_E_UNSUPPORTED,
            E::WrongBase { .. } => LORY_E_WRONG_BASE,
            E::Template { .. } => LORY_E_TEMPLATE,
            E::Backend(_) => LORY_E_DEVICE,
            E::KvFull { .. } => LORY_E_KV_FULL,
            E::Request(_) => LORY_E_REQUEST,
            _ => LORY_E_FORMAT,
        };
        Failure::new(status, e.to_string())
    }
}

impl From<lory_runtime::Error> for Failure {
    fn from(e: lory_runtime::Error) -> Failure {
        use lory_runtime::Error as E;
        let status = match e {
            E::Model(e) => return e.into(),
            E::Io { .. } => LORY_E_IO,
            E::Sampler(_) => LORY_E_SAMPLER,
            E::Aborted { .. } => LORY_E_ABORTED,
            E::UnknownAdapter { .. } => LORY_E_NOT_FOUND,
            E::Restore { .. } => LORY_E_RESTORE,
            E::Grammar(_) => LORY_E_GRAMMAR,
            E::AdapterBudget { .. } => LORY_E_ADAPTER_BUDGET,
            E::ContextTooLong { .. } => LORY_E_DEVICE,
            _ => LORY_E_REQUEST,
        };
        Failure::new(status, e.to_string())
    }
}

thread_local! {
    /// The one state outside of handles.
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// Runs the body of a C function: no panic passes, and a failure is remembered for the thread.
pub(crate) fn guard(body: impl FnOnce() -> Result<()>) -> lory_status {
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return LORY_OK,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::new(LORY_E_INTERNAL, format!("a defect of liblory: {}", words(&*panic))),
    };
    // NUL would end the text early for C.
    let text = CString::new(failure.text.replace('\0', "\u{fffd}")).unwrap_or_default();
    // A thread that is ending has no place for it any more.
    let _ = LAST_ERROR.try_with(|last| last.replace(text));
    failure.status
}

/// For functions that cannot fail and return nothing.
pub(crate) fn guard_free(body: impl FnOnce()) {
    guard(|| {
        body();
        Ok(())
    });
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or(panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words")
}

/// The text of the last failure of a lory function on the calling thread: file, key and numbers.
/// NUL-terminated, empty if there was none, valid until the next failure on this thread.
/// A call that succeeds leaves it as it is.
#[unsafe(no_mangle)]
pub extern "C" fn lory_last_error() -> *const c_char {
    LAST_ERROR.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// The name of a status, such as `"LORY_E_IO"`. Never freed.
#[unsafe(no_mangle)]
pub extern "C" fn lory_status_name(status: i32) -> *const c_char {
    let name: &'static CStr = match status {
        0 => c"LORY_OK",
        1 => c"LORY_E_NULL",
        2 => c"LORY_E_ARGUMENT",
        3 => c"LORY_E_UTF8",
        4 => c"LORY_E_STRUCT_SIZE",
        5 => c"LORY_E_BUSY",
        6 => c"LORY_E_NOT_FOUND",
        7 => c"LORY_E_IO",
        8 => c"LORY_E_FORMAT",
        9 => c"LORY_E_UNSUPPORTED",
        10 => c"LORY_E_WRONG_BASE",
        11 => c"LORY_E_TEMPLATE",
        12 => c"LORY_E_SAMPLER",
        13 => c"LORY_E_KV_FULL",
        14 => c"LORY_E_REQUEST",
        15 => c"LORY_E_DEVICE",
        16 => c"LORY_E_ABORTED",
        17 => c"LORY_E_INTERNAL",
        18 => c"LORY_E_ADAPTER_BUDGET",
        19 => c"LORY_E_RESTORE",
        20 => c"LORY_E_GRAMMAR",
        _ => c"unknown status",
    };
    name.as_ptr()
}
