//! What a caller may ask of the sampler, and what is refused.

/// Why no token could be drawn.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// An option outside its range.
    #[error("sampler option {name} = {value}: must be {expected}")]
    Option {
        /// The option's field in [`SamplerOptions`].
        name: &'static str,
        /// What was given.
        value: String,
        /// What would be accepted.
        expected: &'static str,
    },
    /// The model computed something that is not a number.
    #[error("the logit of token {token} is {value}: the model's weights or an adapter are damaged")]
    NotANumber {
        /// The first token concerned.
        token: u32,
        /// "NaN" or "inf".
        value: &'static str,
    },
    /// Every token is forbidden (logit −inf, or an empty vocabulary).
    #[error("every token has probability zero: nothing is left to choose from")]
    NothingLeft,
    /// The grammar cannot be followed any further.
    #[error("the grammar cannot be followed: {0}")]
    Grammar(String),
    /// A token that the vocabulary does not have.
    #[error("logit bias for token {token}, but the vocabulary has {vocab} tokens")]
    BiasOutOfRange {
        /// The token named in [`SamplerOptions::logit_bias`].
        token: u32,
        /// The size of the vocabulary.
        vocab: usize,
    },
}

/// DRY ("don't repeat yourself"): a penalty that grows with the length of the sequence that the
/// token would repeat (source: text-generation-webui pull request 5677).
#[derive(Debug, Clone, PartialEq)]
pub struct DryOptions {
    /// Strength; 0 is off.
    pub multiplier: f32,
    /// Growth of the penalty per repeated token beyond `allowed_length`.
    pub base: f32,
    /// Repetitions up to this length cost nothing.
    pub allowed_length: u32,
    /// How many of the last tokens are searched; −1 is all of them, 0 is off.
    pub penalty_last_n: i32,
    /// Repetitions do not extend across these strings.
    pub sequence_breakers: Vec<String>,
}

impl Default for DryOptions {
    fn default() -> Self {
        DryOptions {
            multiplier: 0.0,
            base: 1.75,
            allowed_length: 2,
            penalty_last_n: -1,
            sequence_breakers: ["\n", ":", "\"", "*"].map(String::from).to_vec(),
        }
    }
}

/// XTC ("exclude top choices"): sometimes removes every likely token but the least likely of them
/// (source: text-generation-webui pull request 6335).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct XtcOptions {
    /// How often it strikes; 0 is off.
    pub probability: f32,
    /// Tokens at least this probable count as top choices; above 0.5 nothing can happen.
    pub threshold: f32,
}

impl Default for XtcOptions {
    fn default() -> Self {
        XtcOptions { probability: 0.0, threshold: 0.1 }
    }
}

/// Mirostat 2: keeps the surprise per token near a target (source: Basu et al. 2021,
/// arXiv 2007.14966). Replaces top-k, typical, top-p, min-p and XTC.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MirostatOptions {
    /// Target surprise in bits per token.
    pub tau: f32,
    /// Learning rate.
    pub eta: f32,
}

impl Default for MirostatOptions {
    fn default() -> Self {
        MirostatOptions { tau: 5.0, eta: 0.1 }
    }
}

/// How the next token is drawn. Names, defaults and order are llama.cpp's: grammar → logit bias →
/// repetition, frequency and presence penalties → DRY → top-k → typical → top-p → min-p → XTC →
/// temperature → draw.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits; 0 always takes the most likely token left.
    pub temp: f32,
    /// Keep only the k most likely tokens; 0 is off.
    pub top_k: u32,
    /// Keep the fewest tokens whose probabilities sum to this; 1 is off.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 is off.
    pub min_p: f32,
    /// Locally typical sampling: keep the tokens of most usual surprise that sum to this; 1 is off.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1 is off.
    pub repeat_penalty: f32,
    /// How many of the last tokens count as recent; −1 is all of them, 0 is none.
    pub repeat_last_n: i32,
    /// Subtracted once from the logit of a recent token; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a recent token for each time it occurred; 0 is off.
    pub frequency_penalty: f32,
    /// See [`DryOptions`].
    pub dry: DryOptions,
    /// See [`XtcOptions`].
    pub xtc: XtcOptions,
    /// See [`MirostatOptions`]; `None` is off.
    pub mirostat: Option<MirostatOptions>,
    /// Added to single tokens' logits before anything else; −inf forbids a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the generator; `None` takes one from the system (see [`crate::Stats::seed`]).
    pub seed: Option<u64>,
    /// Log-probabilities to report with each token: of the token itself and of this many of the
    /// most likely ones. `None` computes none.
    pub logprobs: Option<usize>,
}

impl Default for SamplerOptions {
    fn default() -> Self {
        SamplerOptions {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical_p: 1.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            dry: DryOptions::default(),
            xtc: XtcOptions::default(),
            mirostat: None,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
        }
    }
}

impl SamplerOptions {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        SamplerOptions { temp: 0.0, ..Default::default() }
    }

    /// Whether DRY can have any effect.
    pub(super) fn dry_is_on(&self) -> bool {
        self.dry.multiplier != 0.0 && self.dry.penalty_last_n != 0
    }

    /// Whether the repetition, presence or frequency penalty can have any effect.
    pub(super) fn penalties_are_on(&self) -> bool {
        self.repeat_last_n != 0
            && (self.repeat_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0)
    }

    /// Whether the likeliest candidate is drawn, whatever top-k, top-p and min-p leave.
    pub(super) fn is_greedy(&self) -> bool {
        self.temp == 0.0 && self.typical_p >= 1.0 && self.xtc.probability == 0.0
    }

    /// How many of the likeliest tokens are candidates; 0 is all.
    pub(super) fn candidates(&self) -> usize {
        if self.is_greedy() { 1 } else { self.top_k as usize }
    }

    /// Whether nothing but the candidates' logits is looked at, and those as the model gave them.
    pub(super) fn only_candidates(&self) -> bool {
        let changes = !self.logit_bias.is_empty() || self.penalties_are_on() || self.dry_is_on();
        !changes && self.mirostat.is_none() && self.logprobs.is_none()
    }

    /// Refuses values without a meaning; the error names the field and what it accepts.
    pub fn validate(&self) -> Result<(), SamplerError> {
        let float = |name, value: f32, ok: fn(f32) -> bool, expected| {
            if ok(value) {
                Ok(())
            } else {
                Err(SamplerError::Option { name, value: value.to_string(), expected })
            }
        };
        let last_n = |name, value: i32| {
            if value >= -1 {
                Ok(())
            } else {
                let expected = "-1 (all tokens), 0 (off) or a number of tokens";
                Err(SamplerError::Option { name, value: value.to_string(), expected })
            }
        };
        let not_negative = |v: f32| v.is_finite() && v >= 0.0;
        let share = |v: f32| (0.0..=1.0).contains(&v);
        float("temp", self.temp, not_negative, "a finite number of at least 0")?;
        float("top_p", self.top_p, share, "between 0 and 1")?;
        float("min_p", self.min_p, share, "between 0 and 1")?;
        float("typical_p", self.typical_p, share, "between 0 and 1")?;
        // The reciprocal must be finite too: a denormal penalty would turn logits into inf.
        let penalty = |v: f32| v.is_finite() && v > 0.0 && (1.0 / v).is_finite();
        float("repeat_penalty", self.repeat_penalty, penalty, "a finite number above 0")?;
        last_n("repeat_last_n", self.repeat_last_n)?;
        float("presence_penalty", self.presence_penalty, f32::is_finite, "a finite number")?;
        float("frequency_penalty", self.frequency_penalty, f32::is_finite, "a finite number")?;
        float("dry.multiplier", self.dry.multiplier, not_negative, "a finite number of at least 0")?;
        float("dry.base", self.dry.base, |v| v.is_finite() && v >= 1.0, "a finite number of at least 1")?;
        last_n("dry.penalty_last_n", self.dry.penalty_last_n)?;
        float("xtc.probability", self.xtc.probability, share, "between 0 and 1")?;
        float("xtc.threshold", self.xtc.threshold, share, "between 0 and 1")?;
        if let Some(m) = &self.mirostat {
            float("mirostat.tau", m.tau, |v| v.is_finite() && v > 0.0, "a finite number above 0")?;
            float("mirostat.eta", m.eta, |v| v.is_finite() && v > 0.0, "a finite number above 0")?;
        }
        for (_, bias) in &self.logit_bias {
            float("logit_bias", *bias, |v| !v.is_nan() && v != f32::INFINITY, "a number or -inf")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl Fn(&mut SamplerOptions)) -> String {
        let mut options = SamplerOptions::default();
        change(&mut options);
        match options.validate() {
            Err(SamplerError::Option { name, .. }) => name.into(),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn defaults_are_valid() {
        SamplerOptions::default().validate().unwrap();
        SamplerOptions::greedy().validate().unwrap();
    }

    #[test]
    fn values_without_a_meaning_are_refused_by_name() {
        assert_eq!(refused(|o| o.temp = f32::NAN), "temp");
        assert_eq!(refused(|o| o.temp = -0.1), "temp");
        assert_eq!(refused(|o| o.temp = f32::INFINITY), "temp");
        assert_eq!(refused(|o| o.top_p = 1.01), "top_p");
        assert_eq!(refused(|o| o.top_p = f32::NAN), "top_p");
        assert_eq!(refused(|o| o.min_p = -0.5), "min_p");
        assert_eq!(refused(|o| o.typical_p = 2.0), "typical_p");
        assert_eq!(refused(|o| o.repeat_penalty = 0.0), "repeat_penalty");
        assert_eq!(refused(|o| o.repeat_penalty = 1e-45), "repeat_penalty");
        assert_eq!(refused(|o| o.repeat_last_n = -2), "repeat_last_n");
        assert_eq!(refused(|o| o.presence_penalty = f32::NAN), "presence_penalty");
        assert_eq!(refused(|o| o.frequency_penalty = f32::NEG_INFINITY), "frequency_penalty");
        assert_eq!(refused(|o| o.dry.multiplier = -1.0), "dry.multiplier");
        assert_eq!(refused(|o| o.dry.base = 0.5), "dry.base");
        assert_eq!(refused(|o| o.dry.penalty_last_n = -7), "dry.penalty_last_n");
        assert_eq!(refused(|o| o.xtc.probability = 1.5), "xtc.probability");
        assert_eq!(refused(|o| o.xtc.threshold = -0.1), "xtc.threshold");
        assert_eq!(refused(|o| o.mirostat = Some(MirostatOptions { tau: 0.0, eta: 0.1 })), "mirostat.tau");
        assert_eq!(
            refused(|o| o.mirostat = Some(MirostatOptions { tau: 5.0, eta: f32::NAN })),
            "mirostat.eta"
        );
        assert_eq!(refused(|o| o.logit_bias = vec![(3, f32::NAN)]), "logit_bias");
        assert_eq!(refused(|o| o.logit_bias = vec![(3, f32::INFINITY)]), "logit_bias");
    }

    #[test]
    fn a_refusal_reads_like_advice() {
        let options = SamplerOptions { top_p: 1.5, ..Default::default() };
        let text = options.validate().unwrap_err().to_string();
        assert_eq!(text, "sampler option top_p = 1.5: must be between 0 and 1");
    }
}
