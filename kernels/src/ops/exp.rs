//! The exponential and what is made of it, the same bits on every machine.

/// Above it [`exp`] is infinite: 2¹²⁸ / √2 rounded down, where the exponent field is full.
pub const HIGH: f32 = 88.376_25;
/// Below it [`exp`] is 0: the results would be denormal.
pub const LOW: f32 = -87.336_54;
/// ln 2 in two parts; the first has 9 trailing zero bits, so that its product with an integer
/// below 2⁹ is exact.
pub const LN2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
/// 1/k! for k = 7 down to 0.
pub const TAYLOR: [f32; 8] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

/// eˣ.
///
/// `n = round(x / ln 2)`, `r = x − n ln 2` with |r| ≤ ln 2 / 2 + 2⁻²², `eˣ = 2ⁿ Σ rᵏ/k!` for
/// k ≤ 7: the remainder is below 0.3466⁸/8! < 6·10⁻⁹, a twentieth of an ulp, and the rounding of
/// the last two steps of Horner's scheme adds at most one more, so the error is below 1.2 ulp. (source of the method:
/// Muller, *Elementary Functions*, ch. 11.) Beyond [`LOW`] and [`HIGH`] it is 0 and infinity;
/// NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    if x > HIGH {
        return f32::INFINITY;
    }
    if x < LOW {
        return 0.0;
    }
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2[1], n.mul_add(-LN2[0], x));
    let mut p = TAYLOR[0];
    for c in &TAYLOR[1..] {
        p = p.mul_add(r, *c);
    }
    // n is in −126 ..= 127 here, or the cast of NaN, whose product stays NaN.
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// σ(x) = 1 / (1 + e⁻ˣ).
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh x = 2σ(2x) − 1.
///
/// Near 0 the subtraction cancels: the error is at most 2⁻²³ absolute, not relative. Good for what it
/// serves, a soft cap on scores and logits.
pub fn tanh(x: f32) -> f32 {
    2f32.mul_add(sigmoid(x + x), -1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_is_below_the_bound() {
        let mut worst = 0f64;
        for i in 0..400_000u32 {
            let x = LOW + (HIGH - LOW) * (i as f32 / 400_000.0);
            let exact = f64::from(x).exp();
            let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
            worst = worst.max((f64::from(exp(x)) - exact).abs() / ulp);
        }
        assert!(worst < 1.2, "{worst} ulp");
    }

    #[test]
    fn ends() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(HIGH).is_finite() && exp(LOW) > 0.0);
        assert_eq!(sigmoid(-100.0), 0.0);
        assert_eq!(sigmoid(100.0), 1.0);
        for x in [-20.0f32, -1.0, -1e-3, 0.0, 0.3, 2.0, 50.0] {
            assert!((tanh(x) - x.tanh()).abs() <= 2f32.powi(-23), "{x}");
        }
    }
}
