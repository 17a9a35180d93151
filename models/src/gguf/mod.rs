//! GGUF files: typed metadata and a table of tensors, over bytes that stay where they are.
//!
//! Format: the GGUF specification of ggml (`docs/gguf.md`), versions 2 and 3, little-endian.
//!
//! Where specification and files leave room, this reader decides:
//!
//! - Keys, tensor names and string values are UTF-8; keys and names hold no control characters.
//!   In `tokenizer.ggml.tokens` and `.merges` alone, bytes that are not UTF-8 become U+FFFD: some
//!   vocabularies have such tokens, and refusing the file for one of them helps nobody, while
//!   dropping it would shift the ids of all that follow.
//! - Tensors lie in the order of their descriptions, aligned, without gaps: so they cannot
//!   overlap. llama.cpp asks the same. Padding after the last one may be missing.
//! - A bool is 0 or 1, an array's elements are no arrays, a tensor has 1 to 4 dimensions, none 0.
//! - All values of a file together may take 256 MiB of memory, ten times the largest in use.

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
