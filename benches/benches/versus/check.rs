//! Whether both sides computed the same thing.

use lory_benches::Sums;
use lory_runtime::random_tokens;
use serde_json::{Value, json};

use crate::side::Side;

/// What is compared: prompts side by side, then steps of one token each, the one that llama.cpp likes best.
#[derive(Clone, Copy)]
pub struct Extent {
    pub sequences: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    pub steps: usize,
}

impl Extent {
    /// One sequence, so long that its keys are read from several pages.
    pub const ONE: Extent = Extent { sequences: 1, prompt: 64, steps: 24 };

    /// So many sequences in one batch, each with a prompt of its own.
    pub fn batch(sequences: usize) -> Extent {
        Extent { sequences, prompt: 4, steps: 4 }
    }

    /// Tokens of a sequence.
    pub fn tokens(&self) -> usize {
        self.prompt + self.steps
    }
}

/// How close the logits are.
pub struct Check {
    extent: Extent,
    /// Pearson's, over all steps of all sequences.
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
    /// Random prompts, then llama.cpp's greedy tokens, on both sides, whose sequences are empty.
    pub fn run(
        lory: &mut dyn Side,
        llama: &mut dyn Side,
        vocab: usize,
        extent: Extent,
    ) -> Result<Check, String> {
        let prompt = |sequence| random_tokens(7 + sequence as u64, extent.prompt, vocab);
        let mut tokens: Vec<Vec<u32>> = (0..extent.sequences).map(prompt).collect();
        let mut sums = Sums::default();
        let (mut same_best, mut disagreements) = (0, 0);
        for _ in 0..extent.steps {
            let work: Vec<(usize, &[u32])> = tokens.iter().map(Vec::as_slice).enumerate().collect();
            lory.run(&work)?;
            llama.run(&work)?;
            for (sequence, tokens) in tokens.iter_mut().enumerate() {
                let (a, b) = (lory.logits(sequence)?, llama.logits(sequence)?);
                if a.len() != b.len() || a.iter().chain(b).any(|v| !v.is_finite()) {
                    return Err(format!(
                        "logits: {} of Lory, {} of llama.cpp, or not finite",
                        a.len(),
                        b.len()
                    ));
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
                *tokens = vec![theirs as u32];
            }
        }
        let check = Check {
            extent,
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
        let Extent { sequences, steps, .. } = self.extent;
        format!(
            "{sequences} sequence{}: logits correlate with {:.6}, relative error {:.2e}, greedy tokens equal at {} of {} steps, {} unexplained",
            if sequences == 1 { "" } else { "s" },
            self.correlation,
            self.relative_error,
            self.same_best,
            sequences * steps,
            self.disagreements
        )
    }

    pub fn json(&self) -> Value {
        json!({
            "sequences": self.extent.sequences,
            "correlation": self.correlation,
            "relative_error": self.relative_error,
            "greedy_equal": self.same_best,
            "greedy_steps": self.extent.sequences * self.extent.steps,
            "greedy_unexplained": self.disagreements,
        })
    }
}

fn best(logits: &[f32]) -> usize {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap_or(0)
}
