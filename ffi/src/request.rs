//! What a session is asked for.

use lory_runtime::{Hidden, Request};

use crate::{
    args::{object, slice},
    grammar::lory_grammar,
    memory::lory_str,
    options::unknown,
    sampler::{lory_sampler_options, strings},
    status::{Result, guard, lory_status},
    structs::{init, read, versioned},
};

/// Final states that a request asks for, normed as the output layer takes them.
pub type lory_hidden = u32;
/// None.
pub const LORY_HIDDEN_NONE: lory_hidden = 0;
/// That of the last of the request's tokens.
pub const LORY_HIDDEN_LAST: lory_hidden = 1;
/// Those of all of the request's tokens.
pub const LORY_HIDDEN_ALL: lory_hidden = 2;

/// One request to a session. Initialise it with `lory_request_init`. Nothing of it is needed after
/// `lory_session_generate`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_request {
    /// Set by `lory_request_init`.
    pub struct_size: usize,
    /// Appended to the session's tokens.
    pub tokens: *const u32,
    /// Elements of `tokens`; 0 if the session has some.
    pub n_tokens: usize,
    /// Tokens to generate at most; 0 only runs the prompt. Default 256.
    pub max_new_tokens: usize,
    /// How the next token is chosen; NULL takes the defaults.
    pub sampler: *const lory_sampler_options,
    /// Generation ends where one of these texts appears; it is not part of the answer.
    pub stop: *const lory_str,
    /// Elements of `stop`.
    pub n_stop: usize,
    /// 1 goes on past end-of-generation tokens. Default 0.
    pub ignore_eos: u32,
    /// 1 also gives the logits after every one of `tokens`: `LORY_EVENT_LOGITS`. Default 0.
    pub prompt_logits: u32,
    /// Log-probabilities of every one of `tokens` behind what is before it (`LORY_EVENT_PROMPT`): -1,
    /// the default, none; 0 of the token; n also of the n most likely ones.
    pub prompt_logprobs: i32,
    /// Final states: `LORY_EVENT_HIDDEN`. Default `LORY_HIDDEN_NONE`.
    pub hidden: lory_hidden,
    /// Events that may wait for their reader: a request whose queue is full is not run until somebody
    /// reads. Default 256.
    pub max_queued: usize,
    /// What the answer must match; NULL, the default, is anything.
    pub grammar: *const lory_grammar,
}

versioned!(lory_request, last_of_first = grammar, |zeroed| lory_request {
    max_new_tokens: Request::default().max_new_tokens,
    prompt_logprobs: -1,
    max_queued: Request::default().max_queued,
    ..zeroed
});

/// Fills in the defaults; `struct_size` is `sizeof(lory_request)`.
///
/// # Safety
/// `struct_size` bytes at `request` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_request_init(request: *mut lory_request, struct_size: usize) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(request, struct_size) })
}

impl lory_request {
    /// # Safety
    /// What it points to is readable.
    pub(crate) unsafe fn to_rust(self) -> Result<Request> {
        // SAFETY: the caller's word.
        let (tokens, stop) = unsafe {
            (slice(self.tokens, self.n_tokens, "tokens")?, strings(self.stop, self.n_stop, "stop")?)
        };
        Ok(Request {
            tokens: tokens.to_vec(),
            max_new_tokens: self.max_new_tokens,
            // SAFETY: the caller's word.
            sampler: unsafe { read(self.sampler)?.to_rust()? },
            stop,
            ignore_eos: self.ignore_eos != 0,
            prompt_logits: self.prompt_logits != 0,
            prompt_logprobs: usize::try_from(self.prompt_logprobs).ok(),
            hidden: match self.hidden {
                LORY_HIDDEN_NONE => Hidden::None,
                LORY_HIDDEN_LAST => Hidden::Last,
                LORY_HIDDEN_ALL => Hidden::All,
                other => return Err(unknown("hidden", other)),
            },
            max_queued: self.max_queued.max(1),
            grammar: match self.grammar.is_null() {
                true => None,
                // SAFETY: the caller's word.
                false => Some(unsafe { object(self.grammar, "grammar") }?.0.clone()),
            },
            ..Request::default()
        })
    }
}
