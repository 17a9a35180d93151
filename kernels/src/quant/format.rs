//! The table of formats with code of their own, and rows of bytes by it.

use super::cast::{blocks_of, blocks_of_mut};
use super::{
    BF16, Block, F16, F32, IQ4_NL, IQ4_XS, IntBlock, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K,
    Q8_0, Q8Block, QuantType, dot_float, dot_int, quantize_activations,
};

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
    #[error(
        "no code for {ty} in this build; convert the file to another type, or build with the feature `ggml`"
    )]
    Unsupported {
        /// The weight format.
        ty: QuantType,
    },
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
        }
    }

    const fn float<B: Block>() -> Format {
        Format {
            ty: B::TYPE,
            dequantize: dequantize::<B>,
            quantize: quantize::<B>,
            dot: Dot::Float(|bytes, x| dot_float(blocks_of::<B>(bytes).unwrap_or_default(), x)),
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
}

fn check(ty: QuantType, weights: usize, bytes: usize) -> Result<(), FormatError> {
    if ty.bytes_for(weights) == Some(bytes) {
        Ok(())
    } else {
        Err(FormatError::Length { ty, weights, bytes })
    }
}

/// Writes the weights of one row, or of several whole ones, to `out`.
pub fn dequantize_row(ty: QuantType, bytes: &[u8], out: &mut [f32]) -> Result<(), FormatError> {
    check(ty, out.len(), bytes.len())?;
    let format = ty.format().ok_or(FormatError::Unsupported { ty })?;
    (format.dequantize)(bytes, out);
    Ok(())
}

/// Quantizes one row, or several whole ones, to `out`.
pub fn quantize_row(ty: QuantType, x: &[f32], out: &mut [u8]) -> Result<(), FormatError> {
    check(ty, x.len(), out.len())?;
    let format = ty.format().ok_or(FormatError::Unsupported { ty })?;
    (format.quantize)(x, out);
    Ok(())
}

/// The canonical product of one weight row with `x`, which integer formats quantize on the way.
pub fn dot_row(ty: QuantType, bytes: &[u8], x: &[f32]) -> Result<f32, FormatError> {
    check(ty, x.len(), bytes.len())?;
    let format = ty.format().ok_or(FormatError::Unsupported { ty })?;
    match format.dot {
        Dot::Float(dot) => Ok(dot(bytes, x)),
        Dot::Int(dot) => {
            let mut blocks = vec![Q8Block::default(); x.len() / Q8Block::LEN];
            quantize_activations(x, &mut blocks);
            Ok(dot(bytes, &blocks))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values in −1 .. 1 from a xorshift generator.
    fn noise(seed: u64, n: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn rows_survive_quantization() {
        // Root mean square error of the format on uniform noise, relative to the noise's own: about
        // one step over √12, and a step is 2 / 2^bits.
        let bits = |ty| match ty {
            QuantType::F32 => 24.0,
            QuantType::F16 => 11.0,
            QuantType::BF16 => 8.0,
            QuantType::Q2_K => 2.0,
            QuantType::Q3_K => 3.0,
            QuantType::Q5_0 | QuantType::Q5_1 | QuantType::Q5_K => 5.0,
            QuantType::Q6_K => 6.0,
            QuantType::Q8_0 => 8.0,
            _ => 4.0,
        };
        let x = noise(1, 1024);
        for format in FORMATS {
            let mut bytes = vec![0; format.ty.bytes_for(x.len()).unwrap()];
            quantize_row(format.ty, &x, &mut bytes).unwrap();
            let mut back = vec![0.0; x.len()];
            dequantize_row(format.ty, &bytes, &mut back).unwrap();
            let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let error =
                squares(&mut x.iter().zip(&back).map(|(a, b)| a - b)) / squares(&mut x.iter().copied());
            let step = 2f64.powf(-bits(format.ty));
            assert!(error.sqrt() < 1.3 * step, "{}: {} of {step}", format.ty, error.sqrt());
        }
    }
}
