//! The products that define correct: one weight row with one activation row, in the canonical order.
//!
//! Every implementation — each instruction set, thread count and batch size — gives these
//! bits. Integer sums are exact, so only the floating-point chain over the groups has an order, and it
//! is that of the groups.

use super::block::{Block, IntBlock, Parts};
use super::{MAX_LEN, Q8Block};

/// Integer formats, `w` · `x` with `x` in [`Q8Block`]s:
///
/// ```text
/// acc = 0
/// for each group g in order:
///     i   = Σ (code[k] − ZERO) · q[k]                     exact, 32-bit
///     acc = fma(i, scale[g] · act_scale, acc)
///     if HAS_MIN: acc = fma(min[g], −(act_scale · Σ q[k]), acc)
/// ```
///
/// A group of 16 takes one half of an activation block, one of 32 a whole one.
///
/// Error against the product of the dequantized weights with the unquantized `x`, in exact arithmetic:
/// at most `Σ |w[k]| · act_scale · (½ + 2⁻¹⁶)` from the activations, and
/// `(3 · groups + 4) · 2⁻²⁴ · Σ (|scale[g] · act_scale · i| + |min[g] · act_scale · Σ q|)` and
/// `2⁻²³ · Σ |x[k]| · (|scale · (code − ZERO)| + |min|)` from rounding in the sum and in the weights.
///
/// # Panics
/// If `x` has fewer than `w.len() · LEN / 32` blocks.
pub fn dot_int<B: IntBlock>(w: &[B], x: &[Q8Block]) -> f32 {
    const { assert!(B::GROUP == 16 || B::GROUP == 32) };
    let per_block = B::LEN / Q8Block::LEN;
    let mut acc = 0f32;
    for (b, block) in w.iter().enumerate() {
        let parts = Parts::of(block);
        let x = &x[b * per_block..(b + 1) * per_block];
        for g in 0..B::LEN / B::GROUP {
            let start = g * B::GROUP;
            let act = &x[start / Q8Block::LEN];
            let offset = start % Q8Block::LEN;
            let qs = &act.qs[offset..offset + B::GROUP];
            let products = parts.codes[start..start + B::GROUP].iter().zip(qs);
            let i: i32 = products.map(|(code, q)| (i32::from(*code) - B::ZERO) * i32::from(*q)).sum();
            acc = (i as f32).mul_add(parts.scales[g] * act.scale, acc);
            if B::HAS_MIN {
                let sum = if B::GROUP == 16 { i32::from(act.sums[offset / 16]) } else { act.sum() };
                acc = parts.mins[g].mul_add(-(act.scale * sum as f32), acc);
            }
        }
    }
    acc
}

/// Float formats: `acc = fma(w[k], x[k], acc)` from the first to the last.
///
/// Error: at most `n · 2⁻²⁴ / (1 − n · 2⁻²⁴) · Σ |w[k] · x[k]|` (one rounding per step).
///
/// # Panics
/// If `x` has fewer than `w.len() · LEN` values.
pub fn dot_float<B: Block>(w: &[B], x: &[f32]) -> f32 {
    const { assert!(B::LEN <= MAX_LEN) };
    let mut buffer = [0f32; MAX_LEN];
    let weights = &mut buffer[..B::LEN];
    let x = &x[..w.len() * B::LEN];
    let mut acc = 0f32;
    for (block, x) in w.iter().zip(x.chunks_exact(B::LEN)) {
        block.dequantize(weights);
        acc = dot_f32(weights, x, acc);
    }
    acc
}

/// Continues a sequential sum: `acc + Σ w[k] · x[k]`.
pub(super) fn dot_f32(w: &[f32], x: &[f32], acc: f32) -> f32 {
    w.iter().zip(x).fold(acc, |acc, (w, x)| w.mul_add(*x, acc))
}
