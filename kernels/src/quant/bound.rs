//! What a product should be, and how far from it the canonical one may lie.

use super::block::{Block, IntBlock, Parts};
use super::{MAX_LEN, Q8Block};
use crate::ops::sum;

/// The product of a row's dequantized weights with unquantized activations, summed in 64 bits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exact {
    /// `Σ w[k] · x[k]`.
    pub value: f64,
    /// Derived bound on the error of [`super::dot_int`] or [`super::dot_float`].
    pub bound: f64,
}

/// Half an ulp of 1: the relative error of one rounding.
const U: f64 = 1.0 / (1u64 << 24) as f64;
/// More than the absolute error that underflow adds in one group: a lost product of two
/// scales (2⁻¹⁵⁰) times an integer sum below 2²⁰, and the roundings after it.
const UNDERFLOW: f64 = f64::from_bits((1023 - 125) << 52);

/// For [`super::dot_int`]; the sum of
///
/// * what quantizing the activations loses: per weight, `|w| · act_scale · (½ + 2⁻¹⁶)`, or
///   `|w · x|` in blocks whose scale is 0;
/// * rounding in the chain of at most `3 · groups + 4` operations, relative to the sum of the
///   terms' magnitudes;
/// * rounding in the dequantized weights, which the integer product does not share: two per weight,
///   relative to `|scale · (code − ZERO)| + |min|`.
pub(super) fn exact_int<B: IntBlock>(w: &[B], x: &[f32]) -> Exact {
    let mut weights = [0f32; MAX_LEN];
    let (mut value, mut activations, mut terms, mut roundings) = (0f64, 0f64, 0f64, 0f64);
    for (block, x) in w.iter().zip(x.chunks_exact(B::LEN)) {
        let parts = Parts::of(block);
        block.dequantize(&mut weights);
        for g in 0..B::LEN / B::GROUP {
            let group = g * B::GROUP..(g + 1) * B::GROUP;
            let act_start = group.start / Q8Block::LEN * Q8Block::LEN;
            let act = Q8Block::quantize(&x[act_start..][..Q8Block::LEN]);
            let (act_scale, scale, min) =
                (f64::from(act.scale), f64::from(parts.scales[g]), f64::from(parts.mins[g]).abs());
            let (mut i, mut sum) = (0, 0);
            for k in group {
                let code = i32::from(parts.codes[k]) - B::ZERO;
                let q = i32::from(act.qs[k - act_start]);
                let (w, x) = (f64::from(weights[k]), f64::from(x[k]));
                i += code * q;
                sum += q;
                value += w * x;
                let step = act_scale * (0.5 + 2f64.powi(-16));
                activations += w.abs() * if act_scale == 0.0 { x.abs() } else { step };
                roundings += x.abs() * ((scale * f64::from(code)).abs() + min);
            }
            terms += (scale * act_scale * f64::from(i)).abs() + (min * act_scale * f64::from(sum)).abs();
        }
    }
    let groups = (w.len() * (B::LEN / B::GROUP)) as f64;
    let bound = activations + (3.0 * groups + 4.0) * U * terms + 2.0 * U * roundings + groups * UNDERFLOW;
    Exact { value, bound }
}

/// For [`super::dot_float`]: each product passes through at most `⌈n / 16⌉` fused steps of its lane
/// and four additions of lanes, one rounding each.
pub(super) fn exact_float<B: Block>(w: &[B], x: &[f32]) -> Exact {
    const { assert!(B::LEN == 1) };
    let mut weight = [0f32];
    let (mut value, mut magnitude) = (0f64, 0f64);
    for (block, x) in w.iter().zip(x) {
        block.dequantize(&mut weight);
        let product = f64::from(weight[0]) * f64::from(*x);
        value += product;
        magnitude += product.abs();
    }
    let roundings = (w.len().div_ceil(sum::LANES) + 4) as f64;
    let relative = roundings * U / (1.0 - roundings * U);
    Exact { value, bound: relative * magnitude + w.len() as f64 * UNDERFLOW }
}
