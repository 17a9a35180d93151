//! Q2_K: 256 codes of 2 bits, in 16 groups with a scale and a minimum of 4 bits each
//! (source: ggml-common.h `block_q2_K`, ggml-quants.c `dequantize_row_q2_K`).

use super::block::{dequantize_parts, finite};
use super::search::affine_super_block;
use super::{Block, Half, IntBlock, QuantType};

/// `w[k] = d · sc[g] · code[k] − dmin · m[g]`, `g = k / 16`. 2.625 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Q2_K {
    /// Of each group, the scale low and the minimum high.
    pub scales: [u8; 16],
    /// Of 128 weights 32 bytes: weight `j + 32 i` at bit `2 i` of byte `j`.
    pub qs: [u8; 64],
    /// Scale of the scales.
    pub d: Half,
    /// Scale of the minima.
    pub dmin: Half,
}

const _: () = assert!(size_of::<Q2_K>() == 84);

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for Q2_K {
    const TYPE: QuantType = QuantType::Q2_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// Least squares per group over a range of steps; then scales and minima rounded to four
    /// bits, and codes taken anew.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 256] = finite(x);
        let s = affine_super_block::<16>(&x, 3, 15);
        let scales = std::array::from_fn(|g| s.scales[g] | s.mins[g] << 4);
        Q2_K { scales, qs: pack_pairs(&s.codes), d: s.d, dmin: s.dmin }
    }
}

impl IntBlock for Q2_K {
    const GROUP: usize = 16;
    const ZERO: i32 = 0;
    const HAS_MIN: bool = true;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
        unpack_pairs(&self.qs, codes);
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        for (g, packed) in self.scales.iter().enumerate() {
            scales[g] = d * f32::from(packed & 15);
            mins[g] = dmin * f32::from(packed >> 4);
        }
    }
}

/// Writes the 256 codes of two bits in `qs`: 32 bytes hold 128, the first 32 in their lowest bits.
pub(super) fn unpack_pairs(qs: &[u8; 64], codes: &mut [u8]) {
    for (part, codes) in codes[..256].chunks_exact_mut(32).enumerate() {
        let qs = &qs[part / 4 * 32..][..32];
        for (code, q) in codes.iter_mut().zip(qs) {
            *code = q >> (part % 4 * 2) & 3;
        }
    }
}

/// The reverse of [`unpack_pairs`]; takes the two lowest bits of each code.
pub(super) fn pack_pairs(codes: &[u8; 256]) -> [u8; 64] {
    std::array::from_fn(|i| {
        let k = i / 32 * 128 + i % 32;
        (0..4).fold(0, |bits, part| bits | (codes[k + part * 32] & 3) << (2 * part))
    })
}
