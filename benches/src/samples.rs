//! Measured times, and what is said of them.

use std::time::Duration;

/// Times of one test on one side, in the order in which they were taken.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    /// Tokens that each sample processed.
    pub tokens: usize,
    /// What each took.
    pub times: Vec<Duration>,
}

impl Samples {
    /// Tokens per second of every sample.
    pub fn rates(&self) -> Vec<f64> {
        self.times.iter().map(|t| self.tokens as f64 / t.as_secs_f64()).collect()
    }

    /// Median of the rates, tokens per second.
    pub fn rate(&self) -> f64 {
        median(&self.rates())
    }
}

/// How much faster one side was in every pair of samples.
#[derive(Clone, Debug)]
pub struct Ratio {
    /// One for each pair.
    pub pairs: Vec<f64>,
    /// Their median.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Ratio {
    /// The speed of `ours` over that of `theirs`; samples of equal index were taken side by side.
    pub fn of(ours: &Samples, theirs: &Samples) -> Ratio {
        let pairs: Vec<f64> = ours.rates().iter().zip(theirs.rates()).map(|(a, b)| a / b).collect();
        Ratio {
            median: median(&pairs),
            min: pairs.iter().copied().fold(f64::INFINITY, f64::min),
            max: pairs.iter().copied().fold(0.0, f64::max),
            pairs,
        }
    }
}

/// The middle value, or the mean of the two in the middle; 0 of nothing.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(millis: &[u64]) -> Samples {
        Samples { tokens: 100, times: millis.iter().map(|ms| Duration::from_millis(*ms)).collect() }
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // A machine that was slow for one pair: both sides saw it, and the ratio stays.
        let r = Ratio::of(&samples(&[100, 1000, 100]), &samples(&[200, 2000, 300]));
        let close = |a: &[f64], b: &[f64]| {
            assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9), "{a:?}, {b:?}");
        };
        close(&r.pairs, &[2.0, 2.0, 3.0]);
        close(&[r.median, r.min, r.max], &[2.0, 2.0, 3.0]);
        close(&[samples(&[100, 200, 400]).rate()], &[500.0]);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }
}
