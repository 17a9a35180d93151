//! What the integration tests share.

pub mod edited;
pub mod fixtures;
pub mod gguf_bytes;
pub mod runner;
