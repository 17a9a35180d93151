//! GGUF files: typed metadata and a table of tensors, over bytes that stay where they are.
//!
//! Format: the GGUF specification of ggml (`docs/gguf.md`), versions 2 and 3, little-endian.

mod metadata;
mod parser;
mod split;
mod table;
mod writer;

pub use metadata::{Array, Metadata, Value};
pub use split::{ShardName, shard_name};
pub use table::{Gguf, TensorInfo};
pub use writer::{DataWriter, Writer};

/// Where tensor data is aligned when `general.alignment` does not say otherwise.
pub const DEFAULT_ALIGNMENT: usize = 32;
