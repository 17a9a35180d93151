//! Root-mean-square normalisation.

use super::sum::dot;

/// `1 / sqrt(mean(x²) + eps)`, with the sum in the order of [`dot`].
pub fn rms_scale(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// `x = x · rms_scale(x) · weight` (source: Zhang and Sennrich, arXiv 1910.07467).
///
/// Error of the scale: that of the sum, halved by the root, and three roundings.
pub fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = rms_scale(x, eps);
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * scale * w;
    }
}
