//! How far a share that was counted on a sample may be from the true one.

/// Standard deviations on either side that hold 95 % of a normal distribution.
const Z: f64 = 1.959964;

/// Wilson's 95 % interval of a share `p` that was counted on `n` samples; everything without samples.
///
/// With z = 1.96, ((p + z²/2n) ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n) (Wilson, "Probable inference, the law of succession,
/// and statistical inference", 1927).
pub fn wilson(p: f64, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let n = n as f64;
    let z2 = Z * Z;
    let centre = p + z2 / (2.0 * n);
    let half = Z * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).max(0.0).sqrt();
    let scale = 1.0 + z2 / n;
    (((centre - half) / scale).max(0.0), ((centre + half) / scale).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_where_the_sample_is_z_deviations_away() {
        for (correct, n) in [(8, 10), (0, 20), (15, 15), (3, 1000)] {
            let p = f64::from(correct) / n as f64;
            let (low, high) = wilson(p, n);
            assert!(low <= p && p <= high, "{low} {p} {high}");
            for bound in [low, high] {
                let deviation = (bound * (1.0 - bound) / n as f64).sqrt();
                assert!(((p - bound).abs() - Z * deviation).abs() < 1e-9, "{correct}/{n}: {bound}");
            }
        }
        assert_eq!(wilson(0.0, 0), (0.0, 1.0));
    }
}
