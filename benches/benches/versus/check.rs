//! Whether both sides computed the same thing.

use lory_runtime::random_tokens;
use serde_json::{Value, json};

use crate::side::Side;

/// Steps of the comparison, each after the token that llama.cpp likes best.
const STEPS: usize = 24;

/// How close the logits are.
pub struct Check {
    /// Pearson's, over all steps.
    pub correlation: f64,
    /// Root mean square of the difference over the deviation of llama.cpp's logits.
    pub relative_error: f64,
    /// Steps at which both like the same token best.
    pub same_best: usize,
    /// Steps at which they do not, although llama.cpp's best is further ahead than the
    /// difference of the logits explains.
    pub disagreements: usize,
}

impl Check {
    /// A prompt of `n` tokens, then llama.cpp's greedy tokens on both sides.
    pub fn run(lory: &mut dyn Side, llama: &mut dyn Side, vocab: usize, n: usize) -> Result<Check, String> {
        let mut tokens = random_tokens(7, n, vocab);
        let mut sums = Sums::default();
        let (mut same_best, mut disagreements) = (0, 0);
        for _ in 0..STEPS {
            lory.run(&[(0, &tokens)])?;
            llama.run(&[(0, &tokens)])?;
            let (a, b) = (lory.logits(0)?, llama.logits(0)?);
            if a.len() != b.len() || a.iter().chain(b).any(|v| !v.is_finite()) {
                return Err(format!("logits: {} of Lory, {} of llama.cpp, or not finite", a.len(), b.len()));
            }
            let mut step = Sums::default();
            a.iter().zip(b).for_each(|(a, b)| step.add(f64::from(*a), f64::from(*b)));
            let (ours, theirs) = (best(a), best(b));
            if ours == theirs {
                same_best += 1;
            } else if f64::from(b[theirs] - b[ours]) > 8.0 * step.difference() {
                disagreements += 1;
            }
            sums.merge(&step);
            tokens = vec![theirs as u32];
        }
        let deviation = (sums.bb / sums.n - (sums.b / sums.n).powi(2)).sqrt();
        let check = Check {
            correlation: sums.correlation(),
            relative_error: sums.difference() / deviation,
            same_best,
            disagreements,
        };
        Ok(check)
    }

    /// Fails where the difference is more than two quantizations of the activations explain.
    pub fn verdict(&self) -> Result<(), String> {
        if self.correlation < 0.99 || self.disagreements > 0 {
            return Err(format!("the two sides did not compute the same: {}", self.text()));
        }
        Ok(())
    }

    pub fn text(&self) -> String {
        format!(
            "logits correlate with {:.6}, relative error {:.2e}, greedy tokens equal at {} of {STEPS} steps, {} unexplained",
            self.correlation, self.relative_error, self.same_best, self.disagreements
        )
    }

    pub fn json(&self) -> Value {
        json!({
            "correlation": self.correlation,
            "relative_error": self.relative_error,
            "greedy_equal": self.same_best,
            "greedy_steps": STEPS,
            "greedy_unexplained": self.disagreements,
        })
    }
}

fn best(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0)
}

#[derive(Default)]
struct Sums {
    n: f64,
    a: f64,
    b: f64,
    aa: f64,
    bb: f64,
    ab: f64,
}

impl Sums {
    fn add(&mut self, a: f64, b: f64) {
        self.merge(&Sums { n: 1.0, a, b, aa: a * a, bb: b * b, ab: a * b });
    }

    fn merge(&mut self, o: &Sums) {
        self.n += o.n;
        self.a += o.a;
        self.b += o.b;
        self.aa += o.aa;
        self.bb += o.bb;
        self.ab += o.ab;
    }

    /// Root mean square of a − b.
    fn difference(&self) -> f64 {
        ((self.aa - 2.0 * self.ab + self.bb).max(0.0) / self.n).sqrt()
    }

    fn correlation(&self) -> f64 {
        let covariance = self.ab / self.n - self.a * self.b / (self.n * self.n);
        let variance = |s: f64, ss: f64| ss / self.n - (s / self.n).powi(2);
        covariance / (variance(self.a, self.aa) * variance(self.b, self.bb)).sqrt()
    }
}
