//! What every weight format is: a block that can be read out and written.

use super::QuantType;

/// One block of a weight format, as it lies in the file.
///
/// # Safety
/// The type is `repr(C)` or `repr(transparent)` with alignment 1 and without padding, and every
/// bit pattern is a valid value.
pub unsafe trait Block: Copy + Send + Sync + 'static {
    /// The format's entry in the table of types.
    const TYPE: QuantType;
    /// Weights per block.
    const LEN: usize;

    /// Writes the block's `LEN` weights to `out[..LEN]`, bit for bit as ggml's
    /// `dequantize_row_*` (no fused multiply-add).
    ///
    /// # Panics
    /// If `out` is shorter than `LEN`.
    fn dequantize(&self, out: &mut [f32]);

    /// The block nearest to `x[..LEN]` that the format's search finds.
    ///
    /// Integer formats have no word for what is not a number: NaN counts as 0 and values
    /// beyond the format's range, infinities among them, become its largest.
    ///
    /// # Panics
    /// If `x` is shorter than `LEN`.
    fn quantize(x: &[f32]) -> Self;
}

/// A block of small unsigned codes in groups that share a scale:
///
/// `weight[k] = scale[g] · (code[k] − ZERO) − min[g]`, `g = k / GROUP`.
///
/// Every product kernel of the project rests on this decomposition (see [`super::dot`]).
pub trait IntBlock: Block {
    /// Weights that share a scale: 32, or 16 in Q2_K, Q3_K and Q6_K.
    const GROUP: usize;
    /// The code that stands for weight 0 (before the minimum).
    const ZERO: i32;
    /// Whether groups have a minimum.
    const HAS_MIN: bool;

    /// Takes the block apart: `LEN` codes, `LEN / GROUP` scales and, only where `HAS_MIN`,
    /// as many minima.
    ///
    /// # Panics
    /// If a slice is shorter than that.
    fn codes(&self, codes: &mut [u8], scales: &mut [f32], mins: &mut [f32]);
}

/// Room for the codes of any block.
pub const MAX_LEN: usize = 256;
/// Room for the scales of any block.
pub const MAX_GROUPS: usize = 16;

/// A block taken apart, on the stack.
pub struct Parts {
    /// The first `LEN` are used.
    pub codes: [u8; MAX_LEN],
    /// The first `LEN / GROUP` are used.
    pub scales: [f32; MAX_GROUPS],
    /// The same number, zero in formats without minima.
    pub mins: [f32; MAX_GROUPS],
}

impl Parts {
    /// Takes `block` apart.
    pub fn of<B: IntBlock>(block: &B) -> Parts {
        const { assert!(B::LEN <= MAX_LEN && B::LEN / B::GROUP <= MAX_GROUPS && B::LEN % B::GROUP == 0) };
        let mut parts = Parts { codes: [0; MAX_LEN], scales: [0.0; MAX_GROUPS], mins: [0.0; MAX_GROUPS] };
        block.codes(&mut parts.codes, &mut parts.scales, &mut parts.mins);
        parts
    }
}

/// [`Block::dequantize`] by the decomposition. ggml's own loops compute the same expression
/// with the same roundings, so one body serves all integer formats.
pub(super) fn dequantize_parts<B: IntBlock>(block: &B, out: &mut [f32]) {
    let parts = Parts::of(block);
    let groups = out[..B::LEN].chunks_exact_mut(B::GROUP).zip(parts.codes.chunks_exact(B::GROUP));
    for (g, (out, codes)) in groups.enumerate() {
        let (scale, min) = (parts.scales[g], parts.mins[g]);
        for (out, code) in out.iter_mut().zip(codes) {
            let product = scale * (i32::from(*code) - B::ZERO) as f32;
            *out = if B::HAS_MIN { product - min } else { product };
        }
    }
}

/// A copy of `x[..N]` in which every value can be quantized: NaN is 0, and infinities are finite.
///
/// The bound lies beyond the range of every format (the widest, Q6_K and IQ4_XS, end below
/// 2²⁹), and its powers in a search stay finite.
pub(super) fn finite<const N: usize>(x: &[f32]) -> [f32; N] {
    const BOUND: f32 = (1u32 << 30) as f32;
    let x = &x[..N];
    std::array::from_fn(|i| if x[i].is_nan() { 0.0 } else { x[i].clamp(-BOUND, BOUND) })
}
