//! Q4_1: 32 codes of 4 bits, a scale and a minimum (source: ggml-common.h `block_q4_1`, ggml-quants.c
//! `dequantize_row_q4_1`).

use super::block::{dequantize_parts, finite};
use super::search::range_step;
use super::{Block, Half, IntBlock, QuantType, nibbles};

/// `w[k] = d · code[k] + m`. 5 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Q4_1 {
    /// Scale.
    pub d: Half,
    /// The weight of code 0.
    pub m: Half,
    /// Weight `j` low, weight `j + 16` high.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Q4_1>() == 20);

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for Q4_1 {
    const TYPE: QuantType = QuantType::Q4_1;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// From the smallest value in equal steps to the largest; nearest codes: ggml's
    /// `quantize_row_q4_1_ref`.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 32] = finite(x);
        let (d, inverse, min) = range_step(&x, 15.0);
        let codes = x.map(|v| ((v - min) * inverse + 0.5).clamp(0.0, 15.0) as u8);
        Q4_1 { d, m: Half::saturating(min), qs: nibbles::pack(&codes) }
    }
}

impl IntBlock for Q4_1 {
    const GROUP: usize = 32;
    const ZERO: i32 = 0;
    const HAS_MIN: bool = true;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
        nibbles::unpack(&self.qs, codes);
        scales[0] = self.d.to_f32();
        mins[0] = -self.m.to_f32();
    }
}
