//! Whether both sides computed the same thing.

use lory_benches::Sums;
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
        let check = Check {
            correlation: sums.correlation(),
            relative_error: sums.difference() / sums.deviation(),
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
