//! What an answer is made of.

use lory_runtime::{Event, FinishReason};

use crate::{
    memory::lory_str,
    status::{Failure, Result, guard, lory_status, lory_status::*},
    structs::{Versioned, init, versioned},
};

/// A token and its natural log-probability.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lory_token_logprob {
    /// The token.
    pub token: u32,
    /// Before any sampler changed the distribution.
    pub logprob: f32,
}

/// What an event is.
pub type lory_event_kind = u32;
/// Nothing yet (only from `lory_generation_poll`).
pub const LORY_EVENT_NONE: lory_event_kind = 0;
/// A token was chosen: `token`, `text`, `logprob`, `top`.
pub const LORY_EVENT_TOKEN: lory_event_kind = 1;
/// Text that was held back until the end: `text`.
pub const LORY_EVENT_TEXT: lory_event_kind = 2;
/// Logits after a prompt token: `position`, `values`, one per vocabulary entry.
pub const LORY_EVENT_LOGITS: lory_event_kind = 3;
/// The end: `finish_reason`. It comes again if asked again.
pub const LORY_EVENT_END: lory_event_kind = 4;
/// What the model thought of a prompt token: `position`, `token`, `logprob`, `top`.
pub const LORY_EVENT_PROMPT: lory_event_kind = 5;
/// The final state of a prompt token: `position`, `values`, n_embd of them.
pub const LORY_EVENT_HIDDEN: lory_event_kind = 6;

/// Why a generation ended.
pub type lory_finish_reason = u32;
/// It has not.
pub const LORY_FINISH_NONE: lory_finish_reason = 0;
/// The model chose an end-of-generation token.
pub const LORY_FINISH_EOS: lory_finish_reason = 1;
/// A stop text appeared.
pub const LORY_FINISH_STOP: lory_finish_reason = 2;
/// `max_new_tokens` were generated.
pub const LORY_FINISH_LENGTH: lory_finish_reason = 3;
/// The session's context is full.
pub const LORY_FINISH_CONTEXT_FULL: lory_finish_reason = 4;
/// It was cancelled, or its session changed or was freed.
pub const LORY_FINISH_CANCELLED: lory_finish_reason = 5;

/// One step of an answer. Initialise it with `lory_event_init`, once. Its pointers are valid until
/// the next call with the generation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_event {
    /// Set by `lory_event_init`.
    pub struct_size: usize,
    /// Which fields count.
    pub kind: lory_event_kind,
    /// The token's id.
    pub token: u32,
    /// Whole characters, nothing that could still turn out to be part of a stop text. May be empty.
    pub text: lory_str,
    /// The token's natural log-probability; NaN if it was not asked for.
    pub logprob: f32,
    /// Of `LORY_EVENT_END`.
    pub finish_reason: lory_finish_reason,
    /// The most likely tokens, likeliest first, if asked for.
    pub top: *const lory_token_logprob,
    /// Elements of `top`.
    pub n_top: usize,
    /// The prompt token's position in the session.
    pub position: usize,
    /// Logits or a final state.
    pub values: *const f32,
    /// Elements of `values`.
    pub n_values: usize,
}

versioned!(lory_event, last_of_first = n_values, |zeroed| lory_event { logprob: f32::NAN, ..zeroed });

/// Empties an event; `struct_size` is `sizeof(lory_event)`.
///
/// # Safety
/// `struct_size` bytes at `event` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_event_init(event: *mut lory_event, struct_size: usize) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(event, struct_size) })
}

impl lory_event {
    pub(crate) fn none() -> lory_event {
        Versioned::defaults()
    }

    pub(crate) fn end(reason: FinishReason) -> lory_event {
        let finish_reason = match reason {
            FinishReason::Eos => LORY_FINISH_EOS,
            FinishReason::Stop => LORY_FINISH_STOP,
            FinishReason::Length => LORY_FINISH_LENGTH,
            FinishReason::ContextFull => LORY_FINISH_CONTEXT_FULL,
            FinishReason::Cancelled => LORY_FINISH_CANCELLED,
        };
        lory_event { kind: LORY_EVENT_END, finish_reason, ..Self::none() }
    }

    fn values_at(kind: lory_event_kind, position: usize, values: &[f32]) -> lory_event {
        lory_event { kind, position, values: values.as_ptr(), n_values: values.len(), ..Self::none() }
    }
}

/// The event that C looks at, for as long as it may.
#[derive(Default)]
pub(crate) struct Shown {
    event: Option<Event>,
    top: Vec<lory_token_logprob>,
}

impl Shown {
    /// Keeps an event and describes it for C.
    pub(crate) fn show(&mut self, event: Event) -> Result<lory_event> {
        Ok(match self.event.insert(event) {
            Event::Text(text) => {
                lory_event { kind: LORY_EVENT_TEXT, text: lory_str::view(text), ..lory_event::none() }
            }
            Event::Logits { position, values } => lory_event::values_at(LORY_EVENT_LOGITS, *position, values),
            Event::Hidden { position, values } => lory_event::values_at(LORY_EVENT_HIDDEN, *position, values),
            Event::Token { id, text, logprob, top } => lory_event {
                kind: LORY_EVENT_TOKEN,
                token: *id,
                text: lory_str::view(text),
                logprob: logprob.unwrap_or(f32::NAN),
                ..with_top(&mut self.top, top)
            },
            Event::Prompt { position, id, logprob, top } => lory_event {
                kind: LORY_EVENT_PROMPT,
                position: *position,
                token: *id,
                logprob: *logprob,
                ..with_top(&mut self.top, top)
            },
            _ => {
                let text = "an event that this version of the C interface has no kind for";
                return Err(Failure::new(LORY_E_UNSUPPORTED, text));
            }
        })
    }
}

fn with_top(place: &mut Vec<lory_token_logprob>, top: &[(u32, f32)]) -> lory_event {
    place.clear();
    place.extend(top.iter().map(|&(token, logprob)| lory_token_logprob { token, logprob }));
    lory_event { top: place.as_ptr(), n_top: place.len(), ..lory_event::none() }
}
