//! What the integration tests share.

pub mod edited;
pub mod engines;
pub mod fixtures;
pub mod gguf_bytes;
#[cfg(feature = "ggml")]
pub mod llama_cpp;
pub mod runner;
