//! Q3_K: 256 codes of 3 bits, in 16 groups with a signed scale of 6 bits each
//! (source: ggml-common.h `block_q3_K`, ggml-quants.c `dequantize_row_q3_K`).

use super::block::{dequantize_parts, finite};
use super::q2_k::{pack_pairs, unpack_pairs};
use super::search::symmetric_super_block;
use super::{Block, Half, IntBlock, QuantType};

/// `w[k] = d · (sc[g] − 32) · (code[k] − 4)`, `g = k / 16`. 3.4375 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Q3_K {
    /// Third bits: bit `i` of byte `j` belongs to weight `j + 32 i`.
    pub hmask: [u8; 32],
    /// Low two bits, as in Q2_K.
    pub qs: [u8; 64],
    /// Of scale `g` the low four bits in byte `g % 8` (`g < 8` low), the top two in byte
    /// `8 + g % 4` at bit `g / 4 · 2`.
    pub scales: [u8; 12],
    /// Scale of the scales.
    pub d: Half,
}

const _: () = assert!(size_of::<Q3_K>() == 110);

impl Q3_K {
    /// The 16 scales with their bias of 32 taken off: −32 ..= 31.
    pub fn group_scales(&self) -> [i8; 16] {
        std::array::from_fn(|g| {
            let low = self.scales[g % 8] >> (g / 8 * 4) & 15;
            let high = self.scales[8 + g % 4] >> (g / 4 * 2) & 3;
            (low | high << 4) as i8 - 32
        })
    }
}

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for Q3_K {
    const TYPE: QuantType = QuantType::Q3_K;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// As [`super::Q6_K`], with scales of six bits and 8 codes.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 256] = finite(x);
        let s = symmetric_super_block(&x, 4, 32);
        let hmask = std::array::from_fn(|j| (0..8).fold(0, |bits, i| bits | s.codes[j + 32 * i] >> 2 << i));
        let biased = s.scales.map(|sc| (sc + 32) as u8);
        let scales = std::array::from_fn(|i| match i {
            0..8 => biased[i] & 15 | biased[i + 8] << 4,
            _ => (0..4).fold(0, |bits, part| bits | biased[i - 8 + 4 * part] >> 4 << (2 * part)),
        });
        Q3_K { hmask, qs: pack_pairs(&s.codes), scales, d: s.d }
    }
}

impl IntBlock for Q3_K {
    const GROUP: usize = 16;
    const ZERO: i32 = 4;
    const HAS_MIN: bool = false;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
        unpack_pairs(&self.qs, codes);
        for (i, codes) in codes[..256].chunks_exact_mut(32).enumerate() {
            for (code, high) in codes.iter_mut().zip(self.hmask) {
                *code |= (high >> i & 1) << 2;
            }
        }
        let d = self.d.to_f32();
        for (scale, sc) in scales[..16].iter_mut().zip(self.group_scales()) {
            *scale = d * f32::from(sc);
        }
    }
}
