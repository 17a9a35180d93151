//! What the integration tests share.

#[cfg(unix)]
pub mod c_api;
#[cfg(target_os = "linux")]
pub mod cpp;
mod data;
pub mod demo;
pub mod edited;
pub mod engines;
pub mod fixtures;
pub mod gguf_bytes;
#[cfg(feature = "ggml")]
pub mod llama_cpp;
pub mod runner;

// Generated; the file says how and why it is committed.
#[allow(missing_docs, unsafe_op_in_unsafe_fn, non_camel_case_types, non_upper_case_globals, non_snake_case)]
#[allow(clippy::all, clippy::undocumented_unsafe_blocks)]
#[rustfmt::skip]
pub mod lory_h;
