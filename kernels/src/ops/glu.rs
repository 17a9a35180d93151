//! Activations of gated units.

use super::exp::{sigmoid, tanh};
use crate::backend::Activation;

/// sqrt(2/π) · 2, for [`gelu_tanh`] as a sigmoid.
pub const GELU_A: f32 = 1.595_769;
/// The cubic coefficient of the approximation (source: Hendrycks and Gimpel, arXiv 1606.08415).
pub const GELU_B: f32 = 0.044_715;

/// x · σ(x).
pub fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

/// `x/2 · (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`, written as `x · σ(2 sqrt(2/π) (…))`, which is the
/// same function without a cancellation.
pub fn gelu_tanh(x: f32) -> f32 {
    let inner = (GELU_B * x * x).mul_add(x, x);
    x * sigmoid(GELU_A * inner)
}

/// One activation.
pub fn activate(act: Activation, x: f32) -> f32 {
    match act {
        Activation::Silu => silu(x),
        Activation::GeluTanh => gelu_tanh(x),
    }
}

/// `cap · tanh(x / cap)`.
pub fn softcap(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values() {
        for i in -200..=200 {
            let x = i as f32 * 0.1;
            let d = f64::from(x);
            let silu64 = d / (1.0 + (-d).exp());
            assert!((f64::from(silu(x)) - silu64).abs() <= 4e-7 * silu64.abs() + 1e-12, "silu {x}");
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (d + 0.044715 * d * d * d);
            let gelu64 = 0.5 * d * (1.0 + inner.tanh());
            assert!((f64::from(gelu_tanh(x)) - gelu64).abs() <= 2e-6 * d.abs() + 1e-12, "gelu {x}");
        }
    }
}
