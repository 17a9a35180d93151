//! Weight formats of GGUF files: names, block sizes, and matrices of blocks.
//!
//! One file per format holds its block struct, pinned to ggml's layout by a size
//! assertion, with the scalar `dequantize` and `quantize`, and for integer formats the
//! decomposition ([`IntBlock::codes`]) on which all products rest. A new format is such a file
//! and one line in [`format::FORMATS`].

pub mod activation;
mod block;
mod bound;
mod cast;
pub mod dot;
mod float;
pub mod format;
#[cfg(feature = "ggml")]
mod ggml;
mod half;
mod iq4_nl;
mod iq4_xs;
mod k_scales;
mod matrix;
mod nibbles;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod search;
#[cfg(test)]
mod tests;
mod types;

pub use activation::{Q8Block, quantize_activations};
pub use block::{Block, IntBlock, MAX_GROUPS, MAX_LEN, Parts};
pub use bound::Exact;
pub use cast::{blocks_of, blocks_of_mut};
pub use dot::{dot_float, dot_int};
pub use float::{BF16, F16, F32};
pub use format::{Dot, FORMATS, Format, FormatError, dequantize_row, dot_row, exact_row, quantize_row};
pub use half::Half;
pub use iq4_nl::{IQ4_NL, VALUES as IQ4_VALUES};
pub use iq4_xs::IQ4_XS;
pub use matrix::{Keeper, QMatrix, ShapeError};
pub use q2_k::Q2_K;
pub use q3_k::Q3_K;
pub use q4_0::Q4_0;
pub use q4_1::Q4_1;
pub use q4_k::Q4_K;
pub use q5_0::Q5_0;
pub use q5_1::Q5_1;
pub use q5_k::Q5_K;
pub use q6_k::Q6_K;
pub use q8_0::Q8_0;
pub use types::QuantType;
