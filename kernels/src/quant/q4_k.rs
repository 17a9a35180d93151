//! Q4_K: 256 codes of 4 bits, in 8 groups with a scale and a minimum of 6 bits each
//! (source: ggml-common.h `block_q4_K`, ggml-quants.c `dequantize_row_q4_K`).

use super::block::{dequantize_parts, finite};
use super::search::affine_super_block;
use super::{Block, Half, IntBlock, QuantType, k_scales};

/// `w[k] = d · sc[g] · code[k] − dmin · m[g]`, `g = k / 32`. 4.5 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Q4_K {
    /// Scale of the scales.
    pub d: Half,
    /// Scale of the minima.
    pub dmin: Half,
    /// Scales and minima, six bits each.
    pub scales: [u8; 12],
    /// Of 64 weights, 32 bytes: weight `j` low, weight `j + 32` high.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<Q4_K>() == 144);

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for Q4_K {
    const TYPE: QuantType = QuantType::Q4_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// Least squares per group over a range of steps; then scales and minima rounded to six
    /// bits, and codes taken anew.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 256] = finite(x);
        let s = affine_super_block::<8>(&x, 15, 63);
        let qs = std::array::from_fn(|i| {
            let k = i / 32 * 64 + i % 32;
            s.codes[k] | s.codes[k + 32] << 4
        });
        Q4_K { d: s.d, dmin: s.dmin, scales: k_scales::pack(&s.scales, &s.mins), qs }
    }
}

impl IntBlock for Q4_K {
    const GROUP: usize = 32;
    const ZERO: i32 = 0;
    const HAS_MIN: bool = true;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
        for (codes, qs) in codes[..256].chunks_exact_mut(64).zip(self.qs.chunks_exact(32)) {
            let (low, high) = codes.split_at_mut(32);
            for ((low, high), q) in low.iter_mut().zip(high).zip(qs) {
                *low = q & 15;
                *high = q >> 4;
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
