//! The products that define correct: one weight row with one activation row, in the canonical order.
//!
//! Every implementation — each instruction set, thread count and batch size — gives these
//! bits. Integer sums are exact, so only the floating-point chain over the groups has an order, and it
//! is that of the groups.

use super::Q8Block;
use super::block::{Block, IntBlock, Parts};
use crate::ops::sum;

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
/// [`super::exact_row`] gives the product of the dequantized weights with unquantized
/// activations, and derives the bound on the distance to it.
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

/// Float formats: the sum in the order of [`sum::dot`], 16 partial sums along the columns.
///
/// Error: at most `(n/16 + 5) · 2⁻²⁴ · Σ |w[k] · x[k]|`, n the length rounded up to 16, to first
/// order.
///
/// # Panics
/// If `x` has fewer than `w.len()` values.
pub fn dot_float<B: Block>(w: &[B], x: &[f32]) -> f32 {
    const { assert!(B::LEN == 1) };
    let x = &x[..w.len()];
    let mut lanes = [0f32; sum::LANES];
    for (w, x) in w.chunks(sum::LANES).zip(x.chunks(sum::LANES)) {
        for (lane, (w, x)) in lanes.iter_mut().zip(w.iter().zip(x)) {
            let mut weight = [0.0];
            w.dequantize(&mut weight);
            *lane = weight[0].mul_add(*x, *lane);
        }
    }
    sum::fold(lanes)
}
