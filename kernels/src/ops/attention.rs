//! Attention of one query head, in two passes.

use super::glu::softcap;
use crate::backend::AttentionParams;

/// The first position that a row at `position` sees.
pub fn first_visible(position: u32, window: Option<u32>) -> u32 {
    window.map_or(0, |w| (position + 1).saturating_sub(w))
}

/// `out = softmax(scale · q · Kᵀ) V` over `n` positions, in double precision; `key(p)` and
/// `value(p)` give one head's line at position `p`.
pub fn head<'k>(
    q: &[f32],
    params: &AttentionParams,
    positions: std::ops::RangeInclusive<u32>,
    key: impl Fn(u32) -> &'k [f32],
    value: impl Fn(u32) -> &'k [f32],
    out: &mut [f32],
) {
    let score = |p: u32| {
        let dot: f64 = q.iter().zip(key(p)).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let score = (dot * f64::from(params.scale)) as f32;
        f64::from(params.softcap.map_or(score, |cap| softcap(score, cap)))
    };
    let scores: Vec<f64> = positions.clone().map(score).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut sums = vec![0f64; out.len()];
    for (p, weight) in positions.zip(&weights) {
        for (sum, v) in sums.iter_mut().zip(value(p)) {
            *sum += weight * f64::from(*v);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = (sum / total) as f32;
    }
}
