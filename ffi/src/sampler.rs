//! How the next token is chosen.

use lory_runtime::{
    SamplerOptions,
    sampler::{DryOptions, MirostatOptions, XtcOptions},
};

use crate::{
    args::slice,
    memory::lory_str,
    status::{Result, guard, lory_status},
    structs::{init, versioned},
};

/// Added to one token's logit.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lory_logit_bias {
    /// The token.
    pub token: u32,
    /// What is added; `-INFINITY` forbids the token.
    pub bias: f32,
}

/// How the next token is chosen; names, defaults and order are llama.cpp's. Initialise it with
/// `lory_sampler_options_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_sampler_options {
    /// Set by `lory_sampler_options_init`.
    pub struct_size: usize,
    /// Divides the logits; 0 always takes the most likely token left. Default 0.8.
    pub temp: f32,
    /// Keep only the k most likely tokens; 0 is off. Default 40.
    pub top_k: u32,
    /// Keep the fewest tokens whose probabilities sum to this; 1 is off. Default 0.95.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the most likely one; 0 is off. Default 0.05.
    pub min_p: f32,
    /// Locally typical sampling; 1, the default, is off.
    pub typical_p: f32,
    /// Divides positive and multiplies negative logits of recent tokens; 1, the default, is off.
    pub repeat_penalty: f32,
    /// How many of the last tokens count as recent; -1 is all of them. Default 64.
    pub repeat_last_n: i32,
    /// Subtracted once from the logit of a recent token. Default 0.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a recent token for each occurrence. Default 0.
    pub frequency_penalty: f32,
    /// DRY: strength; 0, the default, is off.
    pub dry_multiplier: f32,
    /// DRY: growth per repeated token. Default 1.75.
    pub dry_base: f32,
    /// DRY: repetitions up to this length cost nothing. Default 2.
    pub dry_allowed_length: u32,
    /// DRY: how many of the last tokens are searched; -1, the default, is all of them.
    pub dry_penalty_last_n: i32,
    /// XTC: how often it strikes; 0, the default, is off.
    pub xtc_probability: f32,
    /// XTC: tokens at least this probable are top choices. Default 0.1.
    pub xtc_threshold: f32,
    /// 1 replaces top-k, typical, top-p, min-p and XTC by mirostat 2. Default 0.
    pub mirostat: u32,
    /// Mirostat: target surprise in bits. Default 5.
    pub mirostat_tau: f32,
    /// Mirostat: learning rate. Default 0.1.
    pub mirostat_eta: f32,
    /// Log-probabilities with each token: -1, the default, none; 0 of the token; n also of the n
    /// most likely ones.
    pub logprobs: i32,
    /// 1 takes `seed`; 0, the default, takes a seed from the system, which `lory_stats` tells.
    pub has_seed: u32,
    /// The generator's seed; the same seed gives the same answer.
    pub seed: u64,
    /// DRY: repetitions do not extend across these texts; NULL takes line break, `:`, `"` and `*`.
    pub dry_breakers: *const lory_str,
    /// Elements of `dry_breakers`.
    pub n_dry_breakers: usize,
    /// Added to single tokens' logits before anything else.
    pub logit_bias: *const lory_logit_bias,
    /// Elements of `logit_bias`.
    pub n_logit_bias: usize,
}

versioned!(lory_sampler_options, last_of_first = n_logit_bias, |zeroed| {
    let d = SamplerOptions::default();
    let m = MirostatOptions::default();
    lory_sampler_options {
        temp: d.temp,
        top_k: d.top_k,
        top_p: d.top_p,
        min_p: d.min_p,
        typical_p: d.typical_p,
        repeat_penalty: d.repeat_penalty,
        repeat_last_n: d.repeat_last_n,
        presence_penalty: d.presence_penalty,
        frequency_penalty: d.frequency_penalty,
        dry_multiplier: d.dry.multiplier,
        dry_base: d.dry.base,
        dry_allowed_length: d.dry.allowed_length,
        dry_penalty_last_n: d.dry.penalty_last_n,
        xtc_probability: d.xtc.probability,
        xtc_threshold: d.xtc.threshold,
        mirostat_tau: m.tau,
        mirostat_eta: m.eta,
        logprobs: -1,
        ..zeroed
    }
});

/// Fills in the defaults; `struct_size` is `sizeof(lory_sampler_options)`.
///
/// # Safety
/// `struct_size` bytes at `options` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_sampler_options_init(
    options: *mut lory_sampler_options,
    struct_size: usize,
) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(options, struct_size) })
}

impl lory_sampler_options {
    /// # Safety
    /// The arrays that it points to are readable.
    pub(crate) unsafe fn to_rust(self) -> Result<SamplerOptions> {
        // SAFETY: the caller's word.
        let bias = unsafe { slice(self.logit_bias, self.n_logit_bias, "logit_bias") }?;
        Ok(SamplerOptions {
            temp: self.temp,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: self.repeat_last_n,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            dry: DryOptions {
                multiplier: self.dry_multiplier,
                base: self.dry_base,
                allowed_length: self.dry_allowed_length,
                penalty_last_n: self.dry_penalty_last_n,
                // SAFETY: the caller's word.
                sequence_breakers: unsafe { self.breakers() }?,
            },
            xtc: XtcOptions { probability: self.xtc_probability, threshold: self.xtc_threshold },
            mirostat: (self.mirostat != 0)
                .then_some(MirostatOptions { tau: self.mirostat_tau, eta: self.mirostat_eta }),
            logit_bias: bias.iter().map(|b| (b.token, b.bias)).collect(),
            seed: (self.has_seed != 0).then_some(self.seed),
            logprobs: usize::try_from(self.logprobs).ok(),
            ..SamplerOptions::default()
        })
    }

    /// # Safety
    /// As for [`lory_sampler_options::to_rust`].
    unsafe fn breakers(&self) -> Result<Vec<String>> {
        if self.dry_breakers.is_null() && self.n_dry_breakers == 0 {
            return Ok(DryOptions::default().sequence_breakers);
        }
        // SAFETY: the caller's word.
        unsafe { strings(self.dry_breakers, self.n_dry_breakers, "dry_breakers") }
    }
}

/// An array of texts.
///
/// # Safety
/// The array and its texts are readable.
pub(crate) unsafe fn strings(ptr: *const lory_str, len: usize, name: &str) -> Result<Vec<String>> {
    // SAFETY: the caller's word.
    let strings = unsafe { slice(ptr, len, name) }?;
    // SAFETY: the caller's word.
    strings.iter().map(|s| unsafe { s.read(name) }.map(str::to_owned)).collect()
}
