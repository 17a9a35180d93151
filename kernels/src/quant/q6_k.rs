//! Q6_K: 256 codes of 6 bits, in 16 groups with a signed scale of 8 bits each
//! (source: ggml-common.h `block_q6_K`, ggml-quants.c `dequantize_row_q6_K`).

use super::block::{dequantize_parts, finite};
use super::search::symmetric_super_block;
use super::{Block, Half, IntBlock, QuantType};

/// `w[k] = d · scales[g] · (code[k] − 32)`, `g = k / 16`. 6.5625 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Q6_K {
    /// Low four bits: of 128 weights 64 bytes, weight `j` low, weight `j + 64` high.
    pub ql: [u8; 128],
    /// Top two bits: of 128 weights 32 bytes, weight `j + 32 i` at bit `2 i` of byte `j`.
    pub qh: [u8; 64],
    /// Scale of each group.
    pub scales: [i8; 16],
    /// Scale of the scales.
    pub d: Half,
}

const _: () = assert!(size_of::<Q6_K>() == 210);

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for Q6_K {
    const TYPE: QuantType = QuantType::Q6_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// Least squares per group over a range of steps; then scales rounded to eight bits, and
    /// codes taken anew.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 256] = finite(x);
        let s = symmetric_super_block(&x, 32, 128);
        let ql = std::array::from_fn(|i| {
            let k = i / 64 * 128 + i % 64;
            s.codes[k] & 15 | s.codes[k + 64] << 4
        });
        let qh = std::array::from_fn(|i| {
            let k = i / 32 * 128 + i % 32;
            (0..4).fold(0, |bits, part| bits | s.codes[k + part * 32] >> 4 << (2 * part))
        });
        Q6_K { ql, qh, scales: s.scales, d: s.d }
    }
}

impl IntBlock for Q6_K {
    const GROUP: usize = 16;
    const ZERO: i32 = 32;
    const HAS_MIN: bool = false;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
        for (part, codes) in codes[..256].chunks_exact_mut(32).enumerate() {
            let (half, part) = (part / 4, part % 4);
            let ql = &self.ql[half * 64 + part % 2 * 32..][..32];
            let qh = &self.qh[half * 32..][..32];
            for ((code, low), high) in codes.iter_mut().zip(ql).zip(qh) {
                *code = low >> (part / 2 * 4) & 15 | (high >> (2 * part) & 3) << 4;
            }
        }
        let d = self.d.to_f32();
        for (scale, sc) in scales[..16].iter_mut().zip(self.scales) {
            *scale = d * f32::from(sc);
        }
    }
}
