//! Which arithmetic, in which order, on which tensors of which file.
//!
//! Files come in as bytes ([`Bytes`]); this crate opens none itself and has no unsafe code.

#![forbid(unsafe_code)]

pub mod adapter;
mod error;
pub mod gguf;
pub mod synth;
mod tensor;
pub mod tokenizer;

pub use error::Error;
pub use tensor::{Bytes, Tensor};

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
