//! Q4_0: 32 codes of 4 bits and a scale (source: ggml-common.h `block_q4_0`, ggml-quants.c `dequantize_row_q4_0`).

use super::block::{dequantize_parts, finite};
use super::search::extreme_step;
use super::{Block, Half, IntBlock, QuantType, nibbles};

/// `w[k] = d · (code[k] − 8)`. 4.5 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Q4_0 {
    /// Scale.
    pub d: Half,
    /// Weight `j` low, weight `j + 16` high.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<Q4_0>() == 18);

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for Q4_0 {
    const TYPE: QuantType = QuantType::Q4_0;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// `d` takes the value of largest magnitude to code 0, whose range is wider by one than
    /// that above the zero; nearest codes: ggml's `quantize_row_q4_0_ref`.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 32] = finite(x);
        let (d, inverse) = extreme_step(&x, 8.0);
        let codes = x.map(|v| (v * inverse + 8.5).clamp(0.0, 15.0) as u8);
        Q4_0 { d, qs: nibbles::pack(&codes) }
    }
}

impl IntBlock for Q4_0 {
    const GROUP: usize = 32;
    const ZERO: i32 = 8;
    const HAS_MIN: bool = false;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
        nibbles::unpack(&self.qs, codes);
        scales[0] = self.d.to_f32();
    }
}
