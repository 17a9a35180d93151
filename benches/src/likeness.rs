//! How much two rows of numbers are alike.

/// Sums over pairs (a, b).
#[derive(Clone, Debug, Default)]
pub struct Sums {
    n: f64,
    a: f64,
    b: f64,
    aa: f64,
    bb: f64,
    ab: f64,
}

impl Sums {
    /// One more pair.
    pub fn add(&mut self, a: f64, b: f64) {
        self.merge(&Sums { n: 1.0, a, b, aa: a * a, bb: b * b, ab: a * b });
    }

    /// All pairs of another.
    pub fn merge(&mut self, o: &Sums) {
        self.n += o.n;
        self.a += o.a;
        self.b += o.b;
        self.aa += o.aa;
        self.bb += o.bb;
        self.ab += o.ab;
    }

    /// Root mean square of a − b.
    pub fn difference(&self) -> f64 {
        ((self.aa - 2.0 * self.ab + self.bb).max(0.0) / self.n).sqrt()
    }

    /// Standard deviation of b.
    pub fn deviation(&self) -> f64 {
        (self.bb / self.n - (self.b / self.n).powi(2)).max(0.0).sqrt()
    }

    /// Pearson's correlation.
    pub fn correlation(&self) -> f64 {
        let covariance = self.ab / self.n - self.a * self.b / (self.n * self.n);
        let variance = |s: f64, ss: f64| ss / self.n - (s / self.n).powi(2);
        covariance / (variance(self.a, self.aa) * variance(self.b, self.bb)).sqrt()
    }
}

/// Pearson's correlation of two rows.
pub fn pearson(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = Sums::default();
    a.iter().zip(b).for_each(|(a, b)| sums.add(f64::from(*a), f64::from(*b)));
    sums.correlation()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn likeness() {
        let a = [1.0, 2.0, 3.0, 4.0];
        assert!((pearson(&a, &[3.0, 5.0, 7.0, 9.0]) - 1.0).abs() < 1e-12);
        assert!((pearson(&a, &[4.0, 3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        let mut sums = Sums::default();
        [(1.0, 2.0), (5.0, 4.0)].into_iter().for_each(|(a, b)| sums.add(a, b));
        assert!((sums.difference() - 1.0).abs() < 1e-12 && (sums.deviation() - 1.0).abs() < 1e-12);
    }
}
