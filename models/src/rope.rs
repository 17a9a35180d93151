//! Rotary position embedding: which frequencies a file asks for.
//!
//! Sources: RoPE (arXiv 2104.09864), YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753); the
//! keys are llama.cpp's.

use lory_kernels::backend::{Rope, RopeStyle};

use crate::{Result, config::Keys};

/// How frequencies are stretched beyond the trained context.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Every position divided by `factor` (1 for none).
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Interpolation of slow pairs, extrapolation of fast ones.
    Yarn {
        /// Context extension.
        factor: f32,
        /// Context the base was trained on.
        original: u32,
        /// Rotations above which a pair is only extrapolated.
        beta_fast: f32,
        /// Rotations below which a pair is only interpolated.
        beta_slow: f32,
    },
    /// A divisor per pair, which the file must bring as tensors.
    LongRope,
}

/// One position embedding of a model; frequencies follow once the file's factor tensors are read.
#[derive(Clone, Debug)]
pub struct RopeConfig {
    /// Which pairs rotate.
    pub style: RopeStyle,
    /// Rotated dimensions of each head.
    pub n_dims: usize,
    /// θ's base.
    pub base: f32,
    /// Stretching.
    pub scaling: RopeScaling,
    /// Factor on cosine and sine before YaRN's own.
    pub attn_factor: f32,
    /// Whether the context to be run exceeds the original one: `rope_factors_long` is taken, not
    /// `_short`. Phi-3 files carry these tensors without naming a scaling type.
    pub beyond_original: bool,
}

impl RopeConfig {
    /// Reads the `rope.*` keys.
    pub fn from_keys(keys: &Keys<'_>, style: RopeStyle, head_dim: usize, n_ctx: u32) -> Result<Self> {
        let n_dims = keys.opt_count("rope.dimension_count", u32::MAX)?.unwrap_or(head_dim);
        if n_dims % 2 != 0 || n_dims > head_dim {
            let message = format!("is {n_dims}, must be even and at most the head's {head_dim}");
            return Err(keys.error("rope.dimension_count", message));
        }
        let name = match keys.opt_f32("rope.scaling.factor")? {
            None => "rope.scale_linear",
            Some(_) => "rope.scaling.factor",
        };
        let factor = match keys.opt_f32(name)? {
            // Files write 0 for none.
            None | Some(0.0) => 1.0,
            Some(_) => keys.opt_positive(name)?.unwrap_or(1.0),
        };
        let original = keys.opt_u32("rope.scaling.original_context_length")?;
        let original = match original {
            Some(n @ 1..) => n,
            _ => keys.opt_u32("context_length")?.unwrap_or(2048).max(1),
        };
        let scaling = match keys.opt_str("rope.scaling.type")? {
            None | Some("linear") => RopeScaling::Linear { factor },
            Some("none") => RopeScaling::Linear { factor: 1.0 },
            Some("yarn") => RopeScaling::Yarn {
                factor,
                original,
                beta_fast: keys.opt_positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.opt_positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            },
            Some("longrope") => RopeScaling::LongRope,
            Some(other) => {
                let message = format!("is `{other}`; known are none, linear, yarn, longrope");
                return Err(keys.error("rope.scaling.type", message));
            }
        };
        Ok(RopeConfig {
            style,
            n_dims,
            base: keys.opt_positive("rope.freq_base")?.unwrap_or(10000.0),
            scaling,
            attn_factor: keys.opt_positive("rope.scaling.attn_factor")?.unwrap_or(1.0),
            beyond_original: n_ctx > original,
        })
    }

    /// The same rotation with another base and no stretching (layers with a sliding window).
    pub fn unscaled(&self, base: f32) -> Self {
        RopeConfig { base, scaling: RopeScaling::Linear { factor: 1.0 }, attn_factor: 1.0, ..self.clone() }
    }

    /// The angles per position. `factors` divides each pair's frequency (`rope_freqs`,
    /// `rope_factors_long`, `rope_factors_short`); its length must be `n_dims / 2`.
    pub fn resolve(&self, factors: Option<&[f32]>) -> Rope {
        let pairs = self.n_dims / 2;
        let factor = |i: usize| factors.and_then(|f| f.get(i)).copied().unwrap_or(1.0) as f64;
        let freq = |i: usize| (self.base as f64).powf(-2.0 * i as f64 / self.n_dims as f64) / factor(i);
        let (inv_freq, magnitude) = match self.scaling {
            RopeScaling::Linear { factor } => {
                ((0..pairs).map(|i| (freq(i) / factor as f64) as f32).collect(), self.attn_factor)
            }
            RopeScaling::LongRope => ((0..pairs).map(|i| freq(i) as f32).collect(), self.attn_factor),
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow } => {
                let ramp = self.yarn_ramp(original, beta_fast, beta_slow);
                let mix = |i: usize| {
                    let extrapolate = ramp(i);
                    (freq(i) * ((1.0 - extrapolate) / factor as f64 + extrapolate)) as f32
                };
                // Equation 22 of the paper; a file's own factor multiplies it.
                let magnitude = (1.0 + 0.1 * factor.ln()) * self.attn_factor;
                ((0..pairs).map(mix).collect(), magnitude)
            }
        };
        Rope { style: self.style, inv_freq, magnitude }
    }

    /// 1 where a pair turns often enough within the original context to be left alone, 0 where it
    /// is fully interpolated (equations 17 and 18 of the YaRN paper).
    fn yarn_ramp(&self, original: u32, beta_fast: f32, beta_slow: f32) -> impl Fn(usize) -> f64 {
        let dims = self.n_dims as f64;
        let base = self.base as f64;
        let dim_of = move |rotations: f32| {
            dims * (original as f64 / (rotations as f64 * std::f64::consts::TAU)).ln() / (2.0 * base.ln())
        };
        let low = dim_of(beta_fast).floor().max(0.0);
        let high = dim_of(beta_slow).ceil().min(dims - 1.0);
        move |i| 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(scaling: RopeScaling) -> RopeConfig {
        RopeConfig {
            style: RopeStyle::Neox,
            n_dims: 8,
            base: 10000.0,
            scaling,
            attn_factor: 1.0,
            beyond_original: false,
        }
    }

    #[test]
    fn plain_frequencies_are_powers_of_the_base() {
        let rope = plain(RopeScaling::Linear { factor: 1.0 }).resolve(None);
        for (got, want) in rope.inv_freq.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((got - want).abs() < 1e-7, "{got} for {want}");
        }
        assert_eq!(rope.magnitude, 1.0);
    }

    #[test]
    fn factors_and_linear_scaling_divide() {
        let rope = plain(RopeScaling::Linear { factor: 4.0 }).resolve(Some(&[1.0, 2.0, 1.0, 1.0]));
        assert!((rope.inv_freq[0] - 0.25).abs() < 1e-7);
        assert!((rope.inv_freq[1] - 0.0125).abs() < 1e-8);
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_divides_slow_ones() {
        let scaling = RopeScaling::Yarn { factor: 8.0, original: 256, beta_fast: 32.0, beta_slow: 1.0 };
        let config = RopeConfig { n_dims: 64, ..plain(scaling) };
        let rope = config.resolve(None);
        let base = config.unscaled(10000.0).resolve(None);
        assert_eq!(rope.inv_freq[0], base.inv_freq[0]);
        let (last, plain_last) = (rope.inv_freq[31], base.inv_freq[31]);
        assert!((last / plain_last - 0.125).abs() < 1e-5, "{last} of {plain_last}");
        assert!((rope.magnitude - (1.0 + 0.1 * 8f32.ln())).abs() < 1e-6);
    }
}
