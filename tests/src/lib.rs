//! What the integration tests share: where fixtures and optional test data lie.

pub mod gguf_bytes;
