//! The order in which floats are summed.

/// How many partial sums: one vector register of AVX-512, two of AVX, four of NEON.
pub const LANES: usize = 16;

/// Σ `a_k · b_k`: lane `l` takes the products at `k ≡ l (mod 16)` in order, each by one fused
/// multiply-add; then [`fold`].
///
/// A vector unit of any width computes this order without shuffles, and short chains keep
/// the error small: at most `(n/16 + 5) · 2⁻²⁴ · Σ |a[k] · b[k]|`, n the length rounded up
/// to 16 (first order).
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane = a.mul_add(*b, *lane);
        }
    }
    fold(lanes)
}

/// Adds the upper half of the lanes to the lower until one is left.
pub fn fold(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            lanes[l] += lanes[l + half];
        }
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_what_it_should() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&a, &[2.0; 37]), 36.0 * 37.0);
        assert_eq!(dot(&[], &[]), 0.0);
    }
}
