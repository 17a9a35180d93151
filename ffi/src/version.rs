//! What is linked.

use std::ffi::{CStr, c_char};

/// Changes whenever a function or a struct of this header changes in a way that a program built
/// before would notice. It is the number at the end of the shared library's soname.
pub const LORY_ABI_VERSION: u32 = 1;

const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => panic!("a version without NUL"),
};

/// `LORY_ABI_VERSION` of the library that is loaded; compare it with the header's.
#[unsafe(no_mangle)]
pub extern "C" fn lory_abi_version() -> u32 {
    LORY_ABI_VERSION
}

/// The version of the library that is loaded, such as `"0.1.0"`. Never freed.
#[unsafe(no_mangle)]
pub extern "C" fn lory_version() -> *const c_char {
    VERSION.as_ptr()
}
