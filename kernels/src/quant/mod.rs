//! Weight formats of GGUF files: names, block sizes, and matrices of blocks.
//!
//! One file per format holds its block struct, pinned to ggml's layout by a size
//! assertion, with the scalar `dequantize`, `quantize` and `dot`.

mod matrix;
mod types;

pub use matrix::{QMatrix, ShapeError};
pub use types::QuantType;
