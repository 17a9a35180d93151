//! IQ4_NL: 32 indices of 4 bits into a table of 16 unequal steps, and a scale
//! (source: ggml-common.h `block_iq4_nl`, `kvalues_iq4nl`, ggml-quants.c `dequantize_row_iq4_nl`).

use super::block::{dequantize_parts, finite};
use super::search::table_scale;
use super::{Block, Half, IntBlock, QuantType, nibbles};

/// The steps: dense near zero, where most weights lie.
pub const VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// `w[k] = d · VALUES[index[k]]`. 4.5 bits per weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct IQ4_NL {
    /// Scale.
    pub d: Half,
    /// Weight `j` low, weight `j + 16` high.
    pub qs: [u8; 16],
}

const _: () = assert!(size_of::<IQ4_NL>() == 18);

// SAFETY: `repr(C)` of byte arrays only: align 1, no padding, all bits valid.
unsafe impl Block for IQ4_NL {
    const TYPE: QuantType = QuantType::IQ4_NL;
    const LEN: usize = 32;

    fn dequantize(&self, out: &mut [f32]) {
        dequantize_parts(self, out);
    }

    /// Least squares over a range of scales of both signs; nearest entries of the table.
    fn quantize(x: &[f32]) -> Self {
        let x: [f32; 32] = finite(x);
        let d = Half::saturating(table_scale(&x));
        IQ4_NL { d, qs: nibbles::pack(&indices(&x, d.to_f32())) }
    }
}

impl IntBlock for IQ4_NL {
    const GROUP: usize = 32;
    const ZERO: i32 = 128;
    const HAS_MIN: bool = false;

    fn codes(&self, codes: &mut [u8], scales: &mut [f32], _mins: &mut [f32]) {
        nibbles::unpack(&self.qs, codes);
        look_up(&mut codes[..32]);
        scales[0] = self.d.to_f32();
    }
}

/// Replaces indices by the table's values + 128.
pub(super) fn look_up(codes: &mut [u8]) {
    for code in codes {
        *code = VALUES[usize::from(*code & 15)] as u8 ^ 0x80;
    }
}

/// The index of the value nearest to `v`.
pub(super) fn nearest(v: f32) -> u8 {
    // Values whose midpoint with the next lies at or below v are passed.
    let passed = |pair: &&[i8]| 2.0 * v >= f32::from(pair[0]) + f32::from(pair[1]);
    VALUES.windows(2).take_while(passed).count() as u8
}

/// The nearest indices of a group with scale `d`; the one nearest to zero where `d` is 0.
pub(super) fn indices(x: &[f32], d: f32) -> [u8; 32] {
    let inverse = super::search::inverse(d);
    std::array::from_fn(|k| nearest(x[k] * inverse))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_is_nearest() {
        for i in -1400..1400 {
            let v = i as f32 / 10.0;
            let best = VALUES.iter().map(|t| (v - f32::from(*t)).abs()).fold(f32::MAX, f32::min);
            assert_eq!((v - f32::from(VALUES[usize::from(nearest(v))])).abs(), best);
        }
        assert_eq!((nearest(f32::NEG_INFINITY), nearest(f32::INFINITY)), (0, 15));
    }
}
