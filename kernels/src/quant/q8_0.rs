//! Q8_0: 32 signed bytes and a scale (source: ggml-common.h `block_q8_0`, ggml-quants.c `dequantize_row_q8_0`).

use super::block::{dequantize_parts, finite};
use super::{Block, Half, IntBlock, QuantType};

/// `w[k] = d · qs[k]`. 8.5 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Q8_0 {
    /// Scale.
    pub d: Half,
    /// Two's complement.
    pub qs: [i8; 32],
}

const _: () = assert!(size_of::<Q8_0>() == 34);

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for Q8_0 {
    const TYPE: QuantType = QuantType::Q8_0;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// `d = max|x| / 127`, and the nearest code: ggml's `quantize_row_q8_0_ref`.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 32] = finite(x);
        let amax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
        let (d, inverse) = super::search::step(amax / 127.0);
        Q8_0 { d, qs: x.map(|v| (v * inverse).round().clamp(-127.0, 127.0) as i8) }
    }
}

impl IntBlock for Q8_0 {
    const GROUP: usize = 32;
    const ZERO: i32 = 128;
    const HAS_MIN: bool = false;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
        for (code, q) in codes[..32].iter_mut().zip(self.qs) {
            // q + 128 of a signed byte is its bits with the top one turned over.
            *code = q as u8 ^ 0x80;
        }
        scales[0] = self.d.to_f32();
    }
}
