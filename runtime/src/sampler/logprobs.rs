//! Log-probabilities of the model itself, before penalties, truncation and temperature.

use super::{candidates::Candidates, exp::sum_of_exp};

/// What must be computed before the sampler changes the logits.
#[derive(Debug, Clone, Default)]
pub(super) struct Distribution {
    log_sum: f64,
    top: Vec<(u32, f32)>,
    scratch: Candidates,
}

impl Distribution {
    /// Reads the normalisation and the `n` likeliest tokens off unchanged logits.
    pub fn read(&mut self, logits: &[f32], n: usize) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        self.log_sum = f64::from(max) + libm::log(sum_of_exp(logits, max));
        self.top.clear();
        if n > 0 && self.scratch.fill(logits, n).is_ok() {
            self.scratch.sort(n);
            self.top.extend(self.scratch.items.iter().take(n).map(|c| (c.id, 0.0)));
        }
        for (id, p) in &mut self.top {
            *p = (f64::from(logits[*id as usize]) - self.log_sum) as f32;
        }
    }

    /// The log-probability of a token whose unchanged logit was `logit`.
    pub fn log_probability(&self, logit: f32) -> f32 {
        (f64::from(logit) - self.log_sum) as f32
    }

    /// The likeliest tokens and their log-probabilities.
    pub fn top(&self) -> &[(u32, f32)] {
        &self.top
    }
}

/// The natural log-probability of `token` under `logits`, and the `n` likeliest tokens with theirs,
/// as [`SamplerOptions::logprobs`](super::SamplerOptions::logprobs) gives them for drawn tokens.
pub(crate) fn token_logprob(logits: &[f32], token: u32, n: usize) -> (f32, Vec<(u32, f32)>) {
    let mut distribution = Distribution::default();
    distribution.read(logits, n);
    let logit = logits.get(token as usize).copied().unwrap_or(f32::NEG_INFINITY);
    (distribution.log_probability(logit), distribution.top)
}
