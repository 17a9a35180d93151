//! The exponential function of many numbers: the compiler makes vectors of it, and every machine gets the same bits.

/// ln 2 in two parts: the first has so few bits that its products with small integers are exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// e^x is a normal number down to −87.3; from here on down it counts as nothing.
const LEAST: f32 = -87.0;

/// e^x for x ≤ 0, with a relative error of at most 2⁻²²; 0 below −87. No branches, no calls, no fused
/// operations. (Source: the reduction of Cody and Waite 1980; coefficients of Cephes `expf`.)
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2²³ rounds to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // NaN stays NaN.
    let kept = if x < LEAST { LEAST } else { x };
    let shifted = kept * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (kept - n * LN2_HIGH) - n * LN2_LOW;
    let mut y = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        y = y * r + c;
    }
    let y = y * (r * r) + r + 1.0;
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < LEAST { 0.0 } else { y * scale }
}

/// Numbers at a time.
pub(super) const LANES: usize = 16;

/// Σ e^(x − max), of which none is positive. In f64: 128k terms of f32 would lose the third digit.
pub(super) fn sum_of_exp(logits: &[f32], max: f32) -> f64 {
    let (whole, rest) = logits.as_chunks::<LANES>();
    let mut sums = [0.0f64; LANES];
    for logits in whole {
        for (sum, logit) in sums.iter_mut().zip(logits) {
            *sum += f64::from(exp(logit - max));
        }
    }
    sums.iter().sum::<f64>() + rest.iter().map(|l| f64::from(exp(l - max))).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_what_libm_computes() {
        let mut worst = 0.0f64;
        for i in 0..1_000_000 {
            let x = -87.0 * (i as f32 / 1e6).powi(3);
            let (got, want) = (f64::from(exp(x)), libm::exp(f64::from(x)));
            worst = worst.max((got / want - 1.0).abs());
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst}");
    }

    #[test]
    fn ends() {
        assert_eq!((exp(0.0), exp(-0.0)), (1.0, 1.0));
        for x in [-87.1, -1e3, f32::MIN, f32::NEG_INFINITY] {
            assert_eq!(exp(x), 0.0, "{x}");
        }
        assert!(exp(-87.0) > 0.0 && exp(f32::NAN).is_nan());
    }

    #[test]
    fn sums_of_any_length() {
        for n in [0, 1, 15, 16, 17, 100] {
            let logits: Vec<f32> = (0..n).map(|i| -(i as f32) / 7.0).collect();
            let want: f64 = logits.iter().map(|l| libm::exp(f64::from(l - 1.0))).sum();
            let got = sum_of_exp(&logits, 1.0);
            assert!((got - want).abs() <= 1e-6 * want, "{n}: {got} and not {want}");
        }
    }
}
