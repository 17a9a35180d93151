//! What was accepted so far, as far back as any penalty looks.

use std::collections::{HashMap, VecDeque};

use super::SamplerOptions;

/// How far a penalty looks back: −1 means everything.
fn window(last_n: i32) -> usize {
    usize::try_from(last_n).unwrap_or(usize::MAX)
}

/// The last tokens, and how often each occurs in the window of the repetition penalties.
#[derive(Debug, Clone, Default)]
pub(super) struct History {
    tokens: VecDeque<u32>,
    counts: HashMap<u32, u32>,
    counted: usize,
    keep: usize,
}

impl History {
    pub fn new(options: &SamplerOptions) -> Self {
        let counted = if options.penalties_are_on() { window(options.repeat_last_n) } else { 0 };
        let dry = if options.dry_is_on() { window(options.dry.penalty_last_n) } else { 0 };
        History { tokens: VecDeque::new(), counts: HashMap::new(), counted, keep: counted.max(dry) }
    }

    /// Makes room for `tokens` in all, as far as they are remembered; `false` if there is none.
    pub fn reserve(&mut self, tokens: usize) -> bool {
        let room = self.tokens.try_reserve(tokens.min(self.keep).saturating_sub(self.tokens.len()));
        let counts = tokens.min(self.counted).saturating_sub(self.counts.len());
        room.is_ok() && self.counts.try_reserve(counts).is_ok()
    }

    pub fn push(&mut self, token: u32) {
        if self.keep == 0 {
            return;
        }
        if self.counted > 0 {
            *self.counts.entry(token).or_default() += 1;
            if let Some(i) = self.tokens.len().checked_sub(self.counted) {
                self.forget(self.tokens[i]);
            }
        }
        if self.tokens.len() == self.keep {
            self.tokens.pop_front();
        }
        self.tokens.push_back(token);
    }

    fn forget(&mut self, token: u32) {
        if let Some(n) = self.counts.get_mut(&token) {
            *n -= 1;
            if *n == 0 {
                self.counts.remove(&token);
            }
        }
    }

    pub fn clear(&mut self) {
        self.tokens.clear();
        self.counts.clear();
    }

    /// Number of tokens remembered.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The token `i` steps back; 0 is the last one.
    pub fn back(&self, i: usize) -> u32 {
        self.tokens[self.tokens.len() - 1 - i]
    }

    /// Lowers the logits of recent tokens. A negative logit is multiplied by the repetition
    /// penalty where a positive one is divided by it: dividing would make the token likelier.
    pub fn penalize(&self, options: &SamplerOptions, logits: &mut [f32]) {
        for (&token, &count) in &self.counts {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            if *logit <= 0.0 {
                *logit *= options.repeat_penalty;
            } else {
                *logit /= options.repeat_penalty;
            }
            *logit -= count as f32 * options.frequency_penalty + options.presence_penalty;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn penalized(options: SamplerOptions, tokens: &[u32], logits: &[f32]) -> Vec<f32> {
        let mut history = History::new(&options);
        tokens.iter().for_each(|&t| history.push(t));
        let mut logits = logits.to_vec();
        history.penalize(&options, &mut logits);
        logits
    }

    #[test]
    fn repetition_divides_positive_and_multiplies_negative_logits() {
        let options = SamplerOptions { repeat_penalty: 2.0, ..Default::default() };
        assert_eq!(penalized(options, &[0, 1, 1], &[4.0, -4.0, 4.0]), [2.0, -8.0, 4.0]);
    }

    #[test]
    fn presence_counts_once_and_frequency_each_time() {
        let presence = SamplerOptions { presence_penalty: 0.5, ..Default::default() };
        assert_eq!(penalized(presence, &[1, 1, 1, 2], &[1.0; 4]), [1.0, 0.5, 0.5, 1.0]);
        let frequency = SamplerOptions { frequency_penalty: 0.5, ..Default::default() };
        assert_eq!(penalized(frequency, &[1, 1, 1, 2], &[1.0; 4]), [1.0, -0.5, 0.5, 1.0]);
    }

    #[test]
    fn the_window_slides() {
        let options = SamplerOptions { frequency_penalty: 1.0, repeat_last_n: 2, ..Default::default() };
        assert_eq!(penalized(options.clone(), &[0, 1, 1, 2], &[0.0; 3]), [0.0, -1.0, -1.0]);
        // A longer memory kept for DRY does not widen it.
        let mut with_dry = options.clone();
        with_dry.dry.multiplier = 1.0;
        assert_eq!(penalized(with_dry, &[0, 1, 1, 2], &[0.0; 3]), [0.0, -1.0, -1.0]);
        let none = SamplerOptions { repeat_last_n: 0, ..options.clone() };
        assert_eq!(penalized(none, &[0, 1, 1, 2], &[0.0; 3]), [0.0; 3]);
        let all = SamplerOptions { repeat_last_n: -1, ..options };
        assert_eq!(penalized(all, &[0, 1, 1, 2], &[0.0; 3]), [-1.0, -2.0, -1.0]);
    }
}
