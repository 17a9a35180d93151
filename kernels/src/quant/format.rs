//! The table of formats with code of their own, and rows of bytes by it.

use super::bound::{Exact, exact_float, exact_int};
use super::cast::{blocks_of, blocks_of_mut};
use super::{
    BF16, Block, F16, F32, IQ4_NL, IQ4_XS, IntBlock, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K,
    Q8_0, Q8Block, QuantType, dot_float, dot_int, quantize_activations,
};
use crate::ops::sum;

/// A row that does not fit its format, or a format without code here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Bytes and weights do not belong together.
    #[error("{weights} weights of {ty} do not fill {bytes} bytes")]
    Length {
        /// The weight format.
        ty: QuantType,
        /// Weights given, or asked for.
        weights: usize,
        /// Bytes given, or asked for.
        bytes: usize,
    },
    /// A format that this build cannot read or write.
    #[error("no code for {ty} in this build: {}", hint(*ty))]
    Unsupported {
        /// The weight format.
        ty: QuantType,
    },
}

fn hint(ty: QuantType) -> &'static str {
    if ty.ggml_reads() {
        "build with the feature `ggml`, or convert the file to another type"
    } else {
        "it is not a format of weights; convert the tensor to another type"
    }
}

/// A product of one weight row with one activation row, by what it wants of the activations.
#[derive(Clone, Copy, Debug)]
pub enum Dot {
    /// Activations in blocks of signed bytes.
    Int(fn(&[u8], &[Q8Block]) -> f32),
    /// Activations as they are.
    Float(fn(&[u8], &[f32]) -> f32),
}

/// One line of the table. The functions work on whole rows, whose lengths the caller has checked.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// The format.
    pub ty: QuantType,
    /// Bytes of a row → its weights.
    pub dequantize: fn(&[u8], &mut [f32]),
    /// Weights of a row → its bytes.
    pub quantize: fn(&[f32], &mut [u8]),
    /// The canonical product (see [`super::dot`]).
    pub dot: Dot,
    /// The product in 64 bits, with the error bound of `dot`.
    pub exact: fn(&[u8], &[f32]) -> Exact,
}

/// All formats with code of their own.
pub const FORMATS: &[Format] = &[
    Format::float::<F32>(),
    Format::float::<F16>(),
    Format::float::<BF16>(),
    Format::int::<Q8_0>(),
    Format::int::<Q4_0>(),
    Format::int::<Q4_1>(),
    Format::int::<Q5_0>(),
    Format::int::<Q5_1>(),
    Format::int::<Q2_K>(),
    Format::int::<Q3_K>(),
    Format::int::<Q4_K>(),
    Format::int::<Q5_K>(),
    Format::int::<Q6_K>(),
    Format::int::<IQ4_NL>(),
    Format::int::<IQ4_XS>(),
];

impl Format {
    const fn int<B: IntBlock>() -> Format {
        Format {
            ty: B::TYPE,
            dequantize: dequantize::<B>,
            quantize: quantize::<B>,
            dot: Dot::Int(|bytes, x| dot_int(blocks_of::<B>(bytes).unwrap_or_default(), x)),
            exact: |bytes, x| exact_int(blocks_of::<B>(bytes).unwrap_or_default(), x),
        }
    }

    const fn float<B: Block>() -> Format {
        Format {
            ty: B::TYPE,
            dequantize: dequantize::<B>,
            quantize: quantize::<B>,
            dot: Dot::Float(|bytes, x| dot_float(blocks_of::<B>(bytes).unwrap_or_default(), x)),
            exact: |bytes, x| exact_float(blocks_of::<B>(bytes).unwrap_or_default(), x),
        }
    }
}

fn dequantize<B: Block>(bytes: &[u8], out: &mut [f32]) {
    let blocks = blocks_of::<B>(bytes).unwrap_or_default();
    for (block, out) in blocks.iter().zip(out.chunks_exact_mut(B::LEN)) {
        block.dequantize(out);
    }
}

fn quantize<B: Block>(x: &[f32], bytes: &mut [u8]) {
    let blocks = blocks_of_mut::<B>(bytes).unwrap_or_default();
    for (block, x) in blocks.iter_mut().zip(x.chunks_exact(B::LEN)) {
        *block = B::quantize(x);
    }
}

impl QuantType {
    /// The table's line; `None` for formats without code of their own.
    pub fn format(self) -> Option<&'static Format> {
        FORMATS.iter().find(|format| format.ty == self)
    }

    /// Whether the format has code of its own here, without ggml.
    pub fn is_native(self) -> bool {
        self.format().is_some()
    }

    /// Whether this build can read rows of the format: with code of its own, or through ggml.
    pub fn is_readable(self) -> bool {
        self.is_native() || cfg!(feature = "ggml") && self.ggml_reads()
    }
}

fn check(ty: QuantType, weights: usize, bytes: usize) -> Result<(), FormatError> {
    if ty.bytes_for(weights) == Some(bytes) {
        Ok(())
    } else {
        Err(FormatError::Length { ty, weights, bytes })
    }
}

/// Writes the weights of one row, or of several whole ones, to `out`.
///
/// # Errors
/// If `bytes` and `out` do not hold the same number of weights, or for a format that is not
/// [`QuantType::is_readable`].
pub fn dequantize_row(ty: QuantType, bytes: &[u8], out: &mut [f32]) -> Result<(), FormatError> {
    check(ty, out.len(), bytes.len())?;
    if let Some(format) = ty.format() {
        (format.dequantize)(bytes, out);
        return Ok(());
    }
    #[cfg(feature = "ggml")]
    if super::ggml::dequantize(ty, bytes, out) {
        return Ok(());
    }
    Err(FormatError::Unsupported { ty })
}

/// Quantizes one row, or several whole ones, to `out`.
///
/// # Errors
/// As [`dequantize_row`].
pub fn quantize_row(ty: QuantType, x: &[f32], out: &mut [u8]) -> Result<(), FormatError> {
    check(ty, x.len(), out.len())?;
    if let Some(format) = ty.format() {
        (format.quantize)(x, out);
        return Ok(());
    }
    #[cfg(feature = "ggml")]
    if super::ggml::quantize(ty, x, out) {
        return Ok(());
    }
    Err(FormatError::Unsupported { ty })
}

/// The canonical product of one weight row with `x`, which integer formats quantize on the way.
///
/// A format that is read through ggml is dequantized and multiplied as floats.
///
/// # Errors
/// As [`dequantize_row`].
pub fn dot_row(ty: QuantType, bytes: &[u8], x: &[f32]) -> Result<f32, FormatError> {
    check(ty, x.len(), bytes.len())?;
    match ty.format().map(|format| format.dot) {
        Some(Dot::Float(dot)) => Ok(dot(bytes, x)),
        Some(Dot::Int(dot)) => {
            let mut blocks = vec![Q8Block::default(); x.len() / Q8Block::LEN];
            quantize_activations(x, &mut blocks);
            Ok(dot(bytes, &blocks))
        }
        None => {
            let mut weights = vec![0.0; x.len()];
            dequantize_row(ty, bytes, &mut weights)?;
            Ok(sum::dot(&weights, x))
        }
    }
}

/// What [`dot_row`] approximates, and the bound on its error; native formats only.
///
/// # Errors
/// As [`dequantize_row`].
pub fn exact_row(ty: QuantType, bytes: &[u8], x: &[f32]) -> Result<Exact, FormatError> {
    check(ty, x.len(), bytes.len())?;
    let format = ty.format().ok_or(FormatError::Unsupported { ty })?;
    Ok((format.exact)(bytes, x))
}
