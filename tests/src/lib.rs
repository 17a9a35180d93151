//! What the integration tests share.

pub mod fixtures;
pub mod gguf_bytes;
pub mod runner;
