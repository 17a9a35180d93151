//! Which arithmetic, in which order, on which tensors of which file.
//!
//! Files come in as bytes ([`Bytes`]): this crate opens none to read, and has no unsafe code.

#![forbid(unsafe_code)]

pub mod adapter;
pub mod arch;
pub mod chat;
pub mod config;
pub mod cost;
pub mod decoder;
mod error;
pub mod gguf;
pub mod kv_cache;
pub mod linear;
pub mod rope;
pub mod synth;
mod tensor;
pub mod tokenizer;
pub mod weights;

pub use error::Error;
pub use tensor::{Bytes, Tensor};

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
