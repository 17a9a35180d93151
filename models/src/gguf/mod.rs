//! GGUF files: typed metadata and a table of tensors, over bytes that stay where they are.

mod metadata;

pub use metadata::{Array, Metadata, Value};
