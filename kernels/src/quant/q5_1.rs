//! Q5_1: 32 codes of 5 bits, a scale and a minimum (source: ggml-common.h `block_q5_1`, ggml-quants.c
//! `dequantize_row_q5_1`).

use super::block::{dequantize_parts, finite};
use super::search::range_step;
use super::{Block, Half, IntBlock, QuantType, nibbles};

/// `w[k] = d · code[k] + m`. 6 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Q5_1 {
    /// Scale.
    pub d: Half,
    /// The weight of code 0.
    pub m: Half,
    /// Fifth bits, one per weight.
    pub qh: [u8; 4],
    /// Low four bits: weight `j` low, weight `j + 16` high.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Q5_1>() == 24);

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for Q5_1 {
    const TYPE: QuantType = QuantType::Q5_1;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// From the smallest value in equal steps to the largest; nearest codes: ggml's
    /// `quantize_row_q5_1_ref`.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 32] = finite(x);
        let (d, inverse, min) = range_step(&x, 31.0);
        let codes = x.map(|v| ((v - min) * inverse + 0.5).clamp(0.0, 31.0) as u8);
        Q5_1 { d, m: Half::saturating(min), qh: nibbles::fifth_bits(&codes), qs: nibbles::pack(&codes) }
    }
}

impl IntBlock for Q5_1 {
    const GROUP: usize = 32;
    const ZERO: i32 = 0;
    const HAS_MIN: bool = true;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]) {
        nibbles::unpack(&self.qs, codes);
        nibbles::add_fifth_bits(self.qh, codes);
        scales[0] = self.d.to_f32();
        mins[0] = -self.m.to_f32();
    }
}
