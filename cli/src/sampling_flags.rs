//! How the next token is chosen: flags shared by `chat` and `run`.

use clap::Args;
use lory_runtime::sampler::{
    DryOptions, MirostatOptions, SamplerError, SamplerOptions, XtcOptions, random_seed,
};

use crate::failure::{Failure, Outcome};

/// Names and defaults are llama.cpp's.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingFlags {
    /// Seed of the random numbers: the same seed gives the same text [default: random].
    #[arg(short = 's', long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<i64>,
    /// Temperature; 0 always takes the most likely token [default: 0.8].
    #[arg(long, alias = "temperature", value_name = "T", allow_negative_numbers = true)]
    pub temp: Option<f32>,
    /// Keep the K most likely tokens; 0 is off.
    #[arg(long, value_name = "K", default_value_t = 40, allow_negative_numbers = true)]
    pub top_k: i64,
    /// Keep the fewest tokens whose probabilities sum to P; 1 is off.
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Drop tokens less likely than P times the likeliest; 0 is off.
    #[arg(long, value_name = "P", default_value_t = 0.05, allow_negative_numbers = true)]
    pub min_p: f32,
    /// Locally typical sampling; 1 is off.
    #[arg(long, alias = "typical-p", value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub typical: f32,
    /// Penalty on recent tokens; 1 is off.
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repeat_penalty: f32,
    /// How many tokens are recent; -1 is all of them, 0 none.
    #[arg(long, value_name = "N", default_value_t = 64, allow_negative_numbers = true)]
    pub repeat_last_n: i32,
    /// Subtracted once for a recent token; 0 is off.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,
    /// Subtracted for each time a token is recent; 0 is off.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,
    /// DRY (penalty that grows with the length of a repeated passage): strength; 0 is off.
    #[arg(long, value_name = "X", default_value_t = 0.0, allow_negative_numbers = true)]
    pub dry_multiplier: f32,
    /// DRY: growth per token.
    #[arg(long, value_name = "X", default_value_t = 1.75, allow_negative_numbers = true)]
    pub dry_base: f32,
    /// DRY: repetitions up to this length are free.
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub dry_allowed_length: u32,
    /// DRY: how many tokens are searched; -1 is all of them, 0 is off.
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    pub dry_penalty_last_n: i32,
    /// DRY: text at which a repetition ends, in place of newline, : " and *; `none` is none. Repeatable.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub dry_sequence_breaker: Vec<String>,
    /// XTC (removes the top choices but one): how often; 0 is off.
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    pub xtc_probability: f32,
    /// XTC: what counts as a top choice.
    #[arg(long, value_name = "P", default_value_t = 0.1, allow_negative_numbers = true)]
    pub xtc_threshold: f32,
    /// Mirostat (holds the surprise per token): 2 is on, 0 is off.
    #[arg(long, value_name = "0|2", default_value_t = 0)]
    pub mirostat: u8,
    /// Mirostat: target surprise in bits (tau).
    #[arg(long, value_name = "X", default_value_t = 5.0, allow_negative_numbers = true)]
    pub mirostat_ent: f32,
    /// Mirostat: learning rate (eta).
    #[arg(long, value_name = "X", default_value_t = 0.1, allow_negative_numbers = true)]
    pub mirostat_lr: f32,
    /// Add to a token's logit: 15043+1, 15043-2.5, 15043-inf (never). Repeatable.
    #[arg(short = 'l', long, value_name = "TOKEN(+|-)BIAS")]
    pub logit_bias: Vec<String>,
    /// Go on past the model's end-of-text tokens.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Stop where this text appears (it is not printed). Repeatable.
    #[arg(short = 'r', long, alias = "stop", value_name = "TEXT", allow_hyphen_values = true)]
    pub reverse_prompt: Vec<String>,
}

impl SamplingFlags {
    /// The options, checked.
    pub fn options(&self) -> Outcome<SamplerOptions> {
        self.options_at(SamplerOptions::default().temp)
    }

    /// The options, checked, with this temperature where none is asked for.
    pub fn options_at(&self, temperature: f32) -> Outcome<SamplerOptions> {
        let mirostat = match self.mirostat {
            0 => None,
            2 => Some(MirostatOptions { tau: self.mirostat_ent, eta: self.mirostat_lr }),
            other => return Err(Failure::usage(format!("--mirostat {other}: 0 (off) or 2"))),
        };
        let sequence_breakers = match self.dry_sequence_breaker.as_slice() {
            [] => DryOptions::default().sequence_breakers,
            [none] if none == "none" => Vec::new(),
            given => given.to_vec(),
        };
        let options = SamplerOptions {
            temp: self.temp.unwrap_or(temperature),
            // llama.cpp takes every k below 1 as "off".
            top_k: u32::try_from(self.top_k.max(0)).unwrap_or(0),
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            dry: DryOptions {
                multiplier: self.dry_multiplier,
                base: self.dry_base,
                allowed_length: self.dry_allowed_length,
                penalty_last_n: self.dry_penalty_last_n,
                sequence_breakers,
            },
            xtc: XtcOptions { probability: self.xtc_probability, threshold: self.xtc_threshold },
            mirostat,
            logit_bias: self.logit_bias.iter().map(|b| bias(b)).collect::<Outcome<_>>()?,
            seed: Some(self.seed.and_then(|s| u64::try_from(s).ok()).unwrap_or_else(random_seed)),
            logprobs: None,
        };
        options.validate().map_err(|e| Failure::usage(in_flags(&e)))?;
        Ok(options)
    }
}

/// The sampler's error in terms of the command line.
fn in_flags(error: &SamplerError) -> String {
    let SamplerError::Option { name, value, expected } = error else { return error.to_string() };
    let flag = match *name {
        "typical_p" => "typical".into(),
        "mirostat.tau" => "mirostat-ent".into(),
        "mirostat.eta" => "mirostat-lr".into(),
        other => other.replace(['_', '.'], "-"),
    };
    format!("--{flag} {value}: must be {expected}")
}

/// `TOKEN+BIAS` or `TOKEN-BIAS`.
fn bias(text: &str) -> Outcome<(u32, f32)> {
    let parsed = text.find(['+', '-']).and_then(|at| {
        let (token, bias) = text.split_at(at);
        Some((token.parse().ok()?, bias.parse().ok()?))
    });
    parsed.ok_or_else(|| {
        Failure::usage(format!("--logit-bias {text}: write a token's id and a number, as in 15043+1"))
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        sampling: SamplingFlags,
    }

    fn parse(args: &[&str]) -> Outcome<SamplerOptions> {
        Flags::try_parse_from([&["x"], args].concat()).unwrap().sampling.options()
    }

    fn message(args: &[&str]) -> String {
        match parse(args) {
            Err(Failure::Usage(m)) => m,
            other => panic!("expected a usage error, got {other:?}"),
        }
    }

    #[test]
    fn defaults_are_the_samplers() {
        let options = parse(&[]).unwrap();
        assert!(options.seed.is_some(), "chosen here, so that -v can tell it");
        assert_eq!(SamplerOptions { seed: None, ..options }, SamplerOptions::default());
    }

    #[test]
    fn every_flag_reaches_its_option() {
        let o = parse(&[
            "-s",
            "7",
            "--temp",
            "0",
            "--top-k",
            "-1",
            "--top-p",
            "0.5",
            "--min-p",
            "0",
            "--typical",
            "0.9",
            "--repeat-penalty",
            "1.1",
            "--repeat-last-n",
            "-1",
            "--presence-penalty",
            "-0.5",
            "--frequency-penalty",
            "0.25",
            "--dry-multiplier",
            "0.8",
            "--dry-base",
            "2",
            "--dry-allowed-length",
            "3",
            "--dry-penalty-last-n",
            "100",
            "--dry-sequence-breaker",
            "-",
            "--xtc-probability",
            "0.5",
            "--xtc-threshold",
            "0.2",
            "--mirostat",
            "2",
            "--mirostat-ent",
            "3",
            "--mirostat-lr",
            "0.2",
            "-l",
            "5-inf",
            "--logit-bias",
            "6+1.5",
        ])
        .unwrap();
        let want = SamplerOptions {
            temp: 0.0,
            top_k: 0,
            top_p: 0.5,
            min_p: 0.0,
            typical_p: 0.9,
            repeat_penalty: 1.1,
            repeat_last_n: -1,
            presence_penalty: -0.5,
            frequency_penalty: 0.25,
            dry: DryOptions {
                multiplier: 0.8,
                base: 2.0,
                allowed_length: 3,
                penalty_last_n: 100,
                sequence_breakers: vec!["-".into()],
            },
            xtc: XtcOptions { probability: 0.5, threshold: 0.2 },
            mirostat: Some(MirostatOptions { tau: 3.0, eta: 0.2 }),
            logit_bias: vec![(5, f32::NEG_INFINITY), (6, 1.5)],
            seed: Some(7),
            logprobs: None,
        };
        assert_eq!(o, want);
        assert_ne!(parse(&["-s", "-1"]).unwrap().seed, parse(&["-s", "-1"]).unwrap().seed);
    }

    #[test]
    fn refusals_name_the_flag() {
        assert_eq!(message(&["--top-p", "1.5"]), "--top-p 1.5: must be between 0 and 1");
        assert!(message(&["--temp", "nan"]).starts_with("--temp NaN"));
        assert!(message(&["--mirostat", "1"]).starts_with("--mirostat 1"));
        assert!(message(&["--mirostat", "2", "--mirostat-ent", "0"]).starts_with("--mirostat-ent 0"));
        assert!(message(&["--logit-bias", "hello"]).starts_with("--logit-bias hello"));
    }
}
