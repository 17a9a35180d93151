//! Half precision as it lies in a file: two little-endian bytes, align 1.

use half::f16;

/// An IEEE binary16 number without alignment, so that a block which holds one has align 1 too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Half([u8; 2]);

/// The largest finite half: 65504.
const MAX: f32 = 65504.0;

impl Half {
    /// The number with these bits.
    pub fn from_bits(bits: u16) -> Half {
        Half(bits.to_le_bytes())
    }

    /// Sign, exponent and mantissa.
    pub fn to_bits(self) -> u16 {
        u16::from_le_bytes(self.0)
    }

    /// Exact.
    pub fn to_f32(self) -> f32 {
        f16::from_bits(self.to_bits()).to_f32()
    }

    /// Round to nearest, ties to even; beyond ±65520 infinite.
    pub fn from_f32(x: f32) -> Half {
        Half::from_bits(f16::from_f32(x).to_bits())
    }

    /// Like [`Half::from_f32`], but ±65504 at most: a block's scale must stay finite.
    pub fn saturating(x: f32) -> Half {
        Half::from_f32(x.clamp(-MAX, MAX))
    }
}
