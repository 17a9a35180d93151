//! IQ4_XS: 8 groups of 32 indices into the table of IQ4_NL, with a signed scale of 6 bits each
//! (source: ggml-common.h `block_iq4_xs`, ggml-quants.c `dequantize_row_iq4_xs`).

use super::block::{dequantize_parts, finite};
use super::iq4_nl::{indices, look_up};
use super::search::{signed_scales, table_scale};
use super::{Block, Half, IntBlock, QuantType, nibbles};

/// `w[k] = d · (ls[g] − 32) · VALUES[index[k]]`, `g = k / 32`. 4.25 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct IQ4_XS {
    /// Scale of the scales.
    pub d: Half,
    /// Top two bits of the scales, little-endian: scale `g` at bit `2 g`.
    pub scales_h: [u8; 2],
    /// Low four bits: scale `g` in byte `g / 2`, even ones low.
    pub scales_l: [u8; 4],
    /// Of each group 16 bytes: weight `j` low, weight `j + 16` high.
    pub qs: [u8; 128],
}

const _: () = assert!(size_of::<IQ4_XS>() == 136);

impl IQ4_XS {
    /// The 8 scales with their bias of 32 taken off: −32 ..= 31.
    pub fn group_scales(&self) -> [i8; 8] {
        std::array::from_fn(|g| {
            let low = self.scales_l[g / 2] >> (g % 2 * 4) & 15;
            let high = self.scales_h[g / 4] >> (g % 4 * 2) & 3;
            (low | high << 4) as i8 - 32
        })
    }
}

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for IQ4_XS {
    const TYPE: QuantType = QuantType::IQ4_XS;
    const LEN: usize = 256;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// The scales of [`super::IQ4_NL`] per group, rounded to six bits; nearest entries of the
    /// table.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 256] = finite(x);
        let wanted: [f32; 8] = std::array::from_fn(|g| table_scale(&x[g * 32..][..32]));
        let (d, scales) = signed_scales(&wanted, 32);
        let mut block = IQ4_XS { d, scales_h: [0; 2], scales_l: [0; 4], qs: [0; 128] };
        for (g, qs) in block.qs.chunks_exact_mut(16).enumerate() {
            let biased = (scales[g] + 32) as u8;
            block.scales_l[g / 2] |= (biased & 15) << (g % 2 * 4);
            block.scales_h[g / 4] |= biased >> 4 << (g % 4 * 2);
            let scale = d.to_f32() * f32::from(scales[g]);
            qs.copy_from_slice(&nibbles::pack(&indices(&x[g * 32..][..32], scale)));
        }
        block
    }
}

impl IntBlock for IQ4_XS {
    const GROUP: usize = 32;
    const ZERO: i32 = 128;
    const HAS_MIN: bool = false;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
        let codes = &mut codes[..256];
        for (codes, qs) in codes.chunks_exact_mut(32).zip(self.qs.as_chunks::<16>().0) {
            nibbles::unpack(qs, codes);
        }
        look_up(codes);
        let d = self.d.to_f32();
        for (scale, sc) in scales[..8].iter_mut().zip(self.group_scales()) {
            *scale = d * f32::from(sc);
        }
    }
}
