//! Drawing the next token from the model's logits.
//!
//! A [`Sampler`] belongs to one sequence: it remembers the tokens that penalties look back on, the
//! state of mirostat and of its generator. The same options, seed, tokens and logits give the same
//! draws on every platform: random numbers, exponentials and logarithms are computed in software,
//! and no result depends on the order in which an algorithm happens to leave equal elements.

mod candidates;
mod dry;
mod exp;
mod history;
mod logprobs;
mod options;
mod rng;
mod truncate;

use candidates::Candidates;
pub(crate) use dry::BreakerCache;
use dry::Dry;
pub use dry::DryBreakers;
use history::History;
use logprobs::Distribution;
pub(crate) use logprobs::token_logprob;
pub use options::{DryOptions, MirostatOptions, SamplerError, SamplerOptions, XtcOptions};
use rng::Rng;

use crate::{grammar::Constraint, memory};

/// A seed from the system, short enough to be typed again.
pub fn random_seed() -> u64 {
    Rng::system_seed()
}

/// Draws tokens for one sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    seed: u64,
    rng: Rng,
    history: History,
    candidates: Candidates,
    dry: Dry,
    /// Mirostat's μ: the surprise in bits above which a token is cut off.
    mu: f32,
    distribution: Distribution,
    constraint: Option<Constraint>,
}

/// What a model gave for the next token.
#[derive(Debug)]
pub(crate) enum Logits<'a> {
    /// Those of all tokens.
    Whole(&'a mut [f32]),
    /// The likeliest tokens and theirs, likeliest first: at least as many as [`Sampler::top_k`] says, if there are.
    Likeliest(&'a [(u32, f32)]),
}

/// A drawn token.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// Its id.
    pub token: u32,
    /// Its log-probability, where [`SamplerOptions::logprobs`] asks for it. Of the model itself:
    /// before penalties, truncation and temperature; natural logarithm.
    pub logprob: Option<f32>,
    /// The most likely tokens and their log-probabilities, likeliest first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler whose DRY stops at `breakers`; which tokens they are depends on the vocabulary.
    pub fn with_breakers(options: &SamplerOptions, breakers: DryBreakers) -> Result<Self, SamplerError> {
        options.validate()?;
        let options = options.clone();
        let seed = options.seed.unwrap_or_else(Rng::system_seed);
        Ok(Sampler {
            seed,
            rng: Rng::new(seed),
            history: History::new(&options),
            candidates: Candidates::default(),
            dry: Dry::new(breakers),
            mu: options.mirostat.map_or(0.0, |m| 2.0 * m.tau),
            distribution: Distribution::default(),
            constraint: None,
            options,
        })
    }

    /// The seed in use, also where the options left it open: given again, it gives the same draws.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The options it was made with.
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// From here on, tokens follow a grammar.
    pub fn constrain(&mut self, constraint: Constraint) {
        self.constraint = Some(constraint);
    }

    /// Whether the grammar, if there is one, allows nothing more.
    pub fn is_complete(&self) -> bool {
        self.constraint.as_ref().is_some_and(Constraint::is_complete)
    }

    /// Makes room for a text of `tokens`, as far as penalties look back on it.
    pub(crate) fn reserve(&mut self, tokens: usize) -> crate::Result<()> {
        match self.history.reserve(tokens) {
            true => Ok(()),
            false => Err(memory::exhausted::<u32>(tokens, "what penalties look back on")),
        }
    }

    /// Adds the tokens of a prompt to what penalties look back on; no grammar speaks of them.
    pub(crate) fn follow(&mut self, prompt: impl Iterator<Item = u32>) {
        prompt.for_each(|token| self.history.push(token));
    }

    /// Adds a token of the text, of the prompt or drawn, to what penalties look back on. With a
    /// grammar, only drawn ones may follow [`Sampler::constrain`].
    pub fn accept(&mut self, token: u32) {
        self.history.push(token);
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token);
        }
    }

    /// Back to the state after `new`: no history, the generator at its seed, the grammar at its
    /// beginning.
    pub fn reset(&mut self) {
        if let Some(constraint) = &mut self.constraint {
            constraint.reset();
        }
        self.rng = Rng::new(self.seed);
        self.history.clear();
        self.mu = self.options.mirostat.map_or(0.0, |m| 2.0 * m.tau);
    }

    /// How many of the likeliest tokens of a vocabulary the next draw looks at; `None` if it looks at whole rows.
    pub(crate) fn top_k(&self, vocab: usize) -> Option<usize> {
        let k = self.options.candidates();
        // All of them are no selection, and stay in the vocabulary's order.
        let some = 0 < k && k < vocab;
        (some && self.options.only_candidates() && self.constraint.is_none()).then_some(k)
    }

    /// Draws from the likeliest tokens what [`Sampler::sample`] draws from the logits of all; where [`Sampler::top_k`] allows it.
    pub(crate) fn sample_likeliest(&mut self, likeliest: &[(u32, f32)]) -> Result<Choice, SamplerError> {
        // What is no number comes first.
        if let Some(&(token, logit)) = likeliest.first() {
            check_number(token, logit)?;
        }
        self.candidates.take(likeliest.get(..self.options.candidates()).unwrap_or(likeliest))?;
        Ok(Choice { token: self.draw(), logprob: None, top: Vec::new() })
    }

    /// Draws a token; the caller accepts it. Changes `logits` (vocabulary long). On an error
    /// nothing was drawn, and the generator has not moved.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Choice, SamplerError> {
        check_numbers(logits)?;
        if let Some((token, _)) = self.options.logit_bias.iter().find(|(t, _)| *t as usize >= logits.len()) {
            return Err(SamplerError::BiasOutOfRange { token: *token, vocab: logits.len() });
        }
        // The drawn token is known only at the end, when its logit may have been changed.
        let untouched = self.options.logprobs.map(|n| {
            self.distribution.read(logits, n);
            Untouched::remember(logits, &self.options, &self.history)
        });
        if let Some(constraint) = &mut self.constraint {
            constraint.mask(logits)?;
        }
        for &(token, bias) in &self.options.logit_bias {
            logits[token as usize] += bias;
        }
        if self.options.penalties_are_on() {
            self.history.penalize(&self.options, logits);
        }
        if self.options.dry_is_on() {
            self.dry.penalize(&self.options.dry, &self.history, logits);
        }
        let token = match self.options.mirostat {
            Some(m) => self.draw_mirostat(logits, m)?,
            None => {
                self.candidates.fill(logits, self.options.candidates())?;
                self.draw()
            }
        };
        let Some(untouched) = untouched else {
            return Ok(Choice { token, logprob: None, top: Vec::new() });
        };
        let logit = untouched.logit(token).unwrap_or(logits[token as usize]);
        Ok(Choice {
            token,
            logprob: Some(self.distribution.log_probability(logit)),
            top: self.distribution.top().to_vec(),
        })
    }

    /// Draws one of the candidates.
    fn draw(&mut self) -> u32 {
        let o = &self.options;
        let c = &mut self.candidates;
        if o.is_greedy() {
            return c.best().id;
        }
        truncate::typical(c, o.typical_p);
        truncate::top_p(c, o.top_p);
        truncate::min_p(c, o.min_p);
        if o.xtc.probability > 0.0 {
            truncate::xtc(c, o.xtc, self.rng.uniform());
        }
        if o.temp == 0.0 {
            return c.best().id;
        }
        apply_temperature(c, o.temp);
        c.softmax();
        c.items[pick(c, self.rng.uniform())].id
    }

    fn draw_mirostat(&mut self, logits: &[f32], m: MirostatOptions) -> Result<u32, SamplerError> {
        let c = &mut self.candidates;
        c.fill(logits, if self.options.temp == 0.0 { 1 } else { 0 })?;
        if self.options.temp > 0.0 {
            apply_temperature(c, self.options.temp);
        }
        c.softmax();
        let best = c.best();
        // Whose surprise, −log₂ p, is at most mu.
        let least = libm::exp2f(-self.mu);
        c.retain(|i| i.id == best.id || i.p >= least);
        c.softmax();
        let i = pick(c, self.rng.uniform());
        let surprise = -libm::log2f(c.items[i].p);
        self.mu -= m.eta * (surprise - m.tau);
        Ok(c.items[i].id)
    }
}

/// The logits that the options may change, before they do.
struct Untouched {
    logits: Vec<(u32, f32)>,
}

impl Untouched {
    fn remember(logits: &[f32], options: &SamplerOptions, history: &History) -> Self {
        let recent = (0..history.len()).map(|i| history.back(i));
        let touched = options.logit_bias.iter().map(|b| b.0).chain(recent);
        let known = touched.filter_map(|t| logits.get(t as usize).map(|&l| (t, l))).collect();
        Untouched { logits: known }
    }

    fn logit(&self, token: u32) -> Option<f32> {
        self.logits.iter().find(|(t, _)| *t == token).map(|&(_, l)| l)
    }
}

/// NaN and +inf come from damaged weights and have no meaning as a distribution; −inf forbids.
fn check_numbers(logits: &[f32]) -> Result<(), SamplerError> {
    // Blockwise, so that the common case runs without a branch per element.
    for (block, chunk) in logits.chunks(1024).enumerate() {
        if chunk.iter().fold(true, |ok, &l| ok & (l < f32::INFINITY)) {
            continue;
        }
        for (i, logit) in chunk.iter().enumerate() {
            check_number((block * 1024 + i) as u32, *logit)?;
        }
    }
    Ok(())
}

fn check_number(token: u32, logit: f32) -> Result<(), SamplerError> {
    if logit < f32::INFINITY {
        return Ok(());
    }
    Err(SamplerError::NotANumber { token, value: if logit.is_nan() { "NaN" } else { "inf" } })
}

/// Divides by the temperature around the largest logit, so that even 1e-30 cannot overflow it.
fn apply_temperature(c: &mut Candidates, temp: f32) {
    let max = c.best().logit;
    for i in &mut c.items {
        i.logit = (i.logit - max) / temp;
    }
}

/// The item at which the cumulated probability passes `u`, uniform in [0, 1).
fn pick(c: &Candidates, u: f64) -> usize {
    let total: f64 = c.items.iter().map(|i| f64::from(i.p)).sum();
    let mut left = u * total;
    let mut last = 0;
    for (i, item) in c.items.iter().enumerate() {
        if item.p > 0.0 {
            last = i;
            left -= f64::from(item.p);
            if left < 0.0 {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests;
