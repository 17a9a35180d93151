//! F32, F16 and BF16: one number per block, in the file's byte order, without alignment.

use super::{Block, Half, QuantType};

/// IEEE binary32, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct F32(pub [u8; 4]);

/// IEEE binary16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16(pub Half);

/// The upper half of a binary32, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct BF16(pub [u8; 2]);

const _: () = assert!(size_of::<F32>() == 4 && size_of::<F16>() == 2 && size_of::<BF16>() == 2);

// SAFETY: `repr(transparent)` over bytes.
unsafe impl Block for F32 {
    const TYPE: QuantType = QuantType::F32;
    const LEN: usize = 1;

    fn dequantize(&self, out: &mut [f32]) {
        out[0] = f32::from_le_bytes(self.0);
    }

    /// Exact.
    fn quantize(x: &[f32]) -> Self {
        F32(x[0].to_le_bytes())
    }
}

// SAFETY: `repr(transparent)` over `Half`, which is two bytes.
unsafe impl Block for F16 {
    const TYPE: QuantType = QuantType::F16;
    const LEN: usize = 1;

    fn dequantize(&self, out: &mut [f32]) {
        out[0] = self.0.to_f32();
    }

    /// Round to nearest, ties to even; infinite beyond the range, NaN stays NaN.
    fn quantize(x: &[f32]) -> Self {
        F16(Half::from_f32(x[0]))
    }
}

// SAFETY: `repr(transparent)` over bytes.
unsafe impl Block for BF16 {
    const TYPE: QuantType = QuantType::BF16;
    const LEN: usize = 1;

    fn dequantize(&self, out: &mut [f32]) {
        out[0] = f32::from_bits(u32::from(u16::from_le_bytes(self.0)) << 16);
    }

    /// Round to nearest, ties to even; infinite beyond the range, NaN stays NaN.
    fn quantize(x: &[f32]) -> Self {
        BF16(half::bf16::from_f32(x[0]).to_bits().to_le_bytes())
    }
}
