//! Q5_K: 256 codes of 5 bits, in 8 groups with a scale and a minimum of 6 bits each
//! (source: ggml-common.h `block_q5_K`, ggml-quants.c `dequantize_row_q5_K`).

use super::block::{dequantize_parts, finite};
use super::search::affine_super_block;
use super::{Block, Half, IntBlock, QuantType, k_scales};

/// `w[k] = d · sc[g] · code[k] − dmin · m[g]`, `g = k / 32`. 5.5 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Q5_K {
    /// Scale of the scales.
    pub d: Half,
    /// Scale of the minima.
    pub dmin: Half,
    /// Scales and minima, six bits each.
    pub scales: [u8; 12],
    /// Fifth bits: bit `g` of byte `j` belongs to weight `j` of group `g`.
    pub qh: [u8; 32],
    /// Low four bits, of 64 weights 32 bytes: weight `j` low, weight `j + 32` high.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<Q5_K>() == 176);

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for Q5_K {
    const TYPE: QuantType = QuantType::Q5_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// As [`super::Q4_K`], with 32 codes.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 256] = finite(x);
        let s = affine_super_block::<8>(&x, 31, 63);
        let qs = std::array::from_fn(|i| {
            let k = i / 32 * 64 + i % 32;
            s.codes[k] & 15 | s.codes[k + 32] << 4
        });
        let qh = std::array::from_fn(|j| (0..8).fold(0, |bits, g| bits | s.codes[g * 32 + j] >> 4 << g));
        Q5_K { d: s.d, dmin: s.dmin, scales: k_scales::pack(&s.scales, &s.mins), qh, qs }
    }
}

impl IntBlock for Q5_K {
    const GROUP: usize = 32;
    const ZERO: i32 = 0;
    const HAS_MIN: bool = true;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
        for (g, codes) in codes[..256].chunks_exact_mut(32).enumerate() {
            let qs = &self.qs[g / 2 * 32..][..32];
            for ((code, q), high) in codes.iter_mut().zip(qs).zip(self.qh) {
                *code = q >> (g % 2 * 4) & 15 | (high >> g & 1) << 4;
            }
        }
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (sc, m) = k_scales::unpack(&self.scales);
        for g in 0..8 {
            scales[g] = d * f32::from(sc[g]);
            mins[g] = dmin * f32::from(m[g]);
        }
    }
}
