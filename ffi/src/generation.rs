//! Running requests and their events.

use std::{ffi::c_void, ptr, sync::Mutex, task::Poll};

use lory_runtime::{Canceller, Event, FinishReason, Generation};

use crate::{
    args::{exclusive, free, handle, object, out, slice},
    callbacks::lory_event_fn,
    log::Log,
    memory::{lory_str, lory_text},
    status::{Failure, Result, guard, guard_free, lory_status, lory_status::*},
    structs::{Place, Versioned, init, place, versioned},
};

/// A running request. Exclusive, except for `lory_generation_cancel`. Whichever thread asks for the
/// next event runs a step for all sessions of the engine if nobody else is doing so; there is no
/// thread in the background. It keeps what it needs of its engine alive.
pub struct lory_generation {
    reader: Mutex<Reader>,
    canceller: Canceller,
    log: Log,
}

/// A generation, and what its last event points to.
struct Reader {
    generation: Generation,
    event: Option<Event>,
    top: Vec<lory_token_logprob>,
}

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

versioned!(
    lory_event,
    last_of_first = n_values,
    lory_event {
        struct_size: size_of::<lory_event>(),
        kind: LORY_EVENT_NONE,
        token: 0,
        text: lory_str::EMPTY,
        logprob: f32::NAN,
        finish_reason: LORY_FINISH_NONE,
        top: ptr::null(),
        n_top: 0,
        position: 0,
        values: ptr::null(),
        n_values: 0,
    }
);

/// Empties an event; `struct_size` is `sizeof(lory_event)`.
///
/// # Safety
/// `struct_size` bytes at `event` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_event_init(event: *mut lory_event, struct_size: usize) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(event, struct_size) })
}

fn reason(reason: Option<FinishReason>) -> lory_finish_reason {
    match reason {
        None => LORY_FINISH_NONE,
        Some(FinishReason::Eos) => LORY_FINISH_EOS,
        Some(FinishReason::Stop) => LORY_FINISH_STOP,
        Some(FinishReason::Length) => LORY_FINISH_LENGTH,
        Some(FinishReason::ContextFull) => LORY_FINISH_CONTEXT_FULL,
        Some(FinishReason::Cancelled) => LORY_FINISH_CANCELLED,
    }
}

fn empty() -> lory_event {
    Versioned::defaults()
}

fn values_at(kind: lory_event_kind, position: usize, values: &[f32]) -> lory_event {
    lory_event { kind, position, values: values.as_ptr(), n_values: values.len(), ..empty() }
}

fn with_top(place: &mut Vec<lory_token_logprob>, top: &[(u32, f32)]) -> lory_event {
    place.clear();
    place.extend(top.iter().map(|&(token, logprob)| lory_token_logprob { token, logprob }));
    lory_event { top: place.as_ptr(), n_top: place.len(), ..empty() }
}

impl Reader {
    /// Keeps the event and describes it for C.
    fn take(&mut self, next: Option<lory_runtime::Result<Event>>) -> Result<lory_event> {
        self.event = next.transpose()?;
        Ok(match &self.event {
            None => lory_event { kind: LORY_EVENT_END, finish_reason: self.ended()?, ..empty() },
            Some(Event::Text(text)) => {
                lory_event { kind: LORY_EVENT_TEXT, text: lory_str::view(text), ..empty() }
            }
            Some(Event::Logits { position, values }) => values_at(LORY_EVENT_LOGITS, *position, values),
            Some(Event::Hidden { position, values }) => values_at(LORY_EVENT_HIDDEN, *position, values),
            Some(Event::Token { id, text, logprob, top }) => lory_event {
                kind: LORY_EVENT_TOKEN,
                token: *id,
                text: lory_str::view(text),
                logprob: logprob.unwrap_or(f32::NAN),
                ..with_top(&mut self.top, top)
            },
            Some(Event::Prompt { position, id, logprob, top }) => lory_event {
                kind: LORY_EVENT_PROMPT,
                position: *position,
                token: *id,
                logprob: *logprob,
                ..with_top(&mut self.top, top)
            },
            Some(_) => {
                let text = "an event that this version of the C interface has no kind for";
                return Err(Failure::new(LORY_E_UNSUPPORTED, text));
            }
        })
    }

    fn ended(&self) -> Result<lory_finish_reason> {
        let text = "the generation has ended with an error, which was reported before";
        match reason(self.generation.finish_reason()) {
            LORY_FINISH_NONE => Err(Failure::new(LORY_E_REQUEST, text)),
            reason => Ok(reason),
        }
    }

    fn next(&mut self) -> Result<lory_event> {
        let next = self.generation.next();
        self.take(next)
    }
}

impl lory_generation {
    pub(crate) fn new(generation: Generation, log: Log) -> lory_generation {
        let canceller = generation.canceller();
        lory_generation {
            reader: Mutex::new(Reader { generation, event: None, top: Vec::new() }),
            canceller,
            log,
        }
    }
}

/// Waits for the next event, running steps as needed. After an error, the generation has ended.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_next(
    generation: *mut lory_generation,
    event: *mut lory_event,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, event) = (object(generation, "generation")?, place(event)?);
        let mut reader = exclusive(&generation.reader, "generation")?;
        event.set(&generation.log.within(|| reader.next())?);
        Ok(())
    })
}

/// The next event if it is there already, otherwise one of kind `LORY_EVENT_NONE`. Runs nothing.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_poll(
    generation: *mut lory_generation,
    event: *mut lory_event,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, event) = (object(generation, "generation")?, place(event)?);
        let mut reader = exclusive(&generation.reader, "generation")?;
        match reader.generation.poll_next() {
            Poll::Ready(next) => event.set(&reader.take(next)?),
            Poll::Pending => event.set(&empty()),
        }
        Ok(())
    })
}

/// Waits until one of several generations of one engine has an event, running steps as needed;
/// `index` says which. Generations that have ended are passed over; if all have, `index` becomes
/// `n_generations` and the event is of kind `LORY_EVENT_NONE`. On an error of one generation,
/// `index` is written too.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generations_next(
    generations: *const *mut lory_generation,
    n_generations: usize,
    index: *mut usize,
    event: *mut lory_event,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let handles = slice(generations, n_generations, "generations")?;
        let (index, event) = (out(index, "index")?, place(event)?);
        let objects = handles.iter().map(|g| object(*g, "a generation")).collect::<Result<Vec<_>>>()?;
        let readers = objects.iter().map(|g| exclusive(&g.reader, "a generation"));
        let mut readers = readers.collect::<Result<Vec<_>>>()?;
        next_of(&mut readers.iter_mut().map(|r| &mut **r).collect::<Vec<_>>(), index, &event)
    })
}

fn next_of(
    readers: &mut [&mut Reader],
    index: crate::args::Out<'_, usize>,
    event: &Place<'_, lory_event>,
) -> Result<()> {
    let mut generations: Vec<_> = readers.iter_mut().map(|r| &mut r.generation).collect();
    match Generation::next_of(&mut generations) {
        None => {
            index.set(readers.len());
            event.set(&empty());
        }
        Some((i, next)) => {
            index.set(i);
            event.set(&readers[i].take(next)?);
        }
    }
    Ok(())
}

/// Runs to the end and hands every event, the end included, to `on_event(user, event)`; if that
/// returns something other than 0, the generation is cancelled and no more events are handed out.
/// `finish_reason` may be NULL.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_run(
    generation: *mut lory_generation,
    on_event: lory_event_fn,
    user: *mut c_void,
    finish_reason: *mut lory_finish_reason,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let generation = object(generation, "generation")?;
        let on_event = on_event.ok_or_else(|| Failure::new(LORY_E_NULL, "on_event is NULL"))?;
        let mut reader = exclusive(&generation.reader, "generation")?;
        let reason = generation.log.within(|| run(&mut reader, |event| on_event(user, event) == 0))?;
        if let Ok(place) = out(finish_reason, "finish_reason") {
            place.set(reason);
        }
        Ok(())
    })
}

fn run(reader: &mut Reader, mut go_on: impl FnMut(&lory_event) -> bool) -> Result<lory_finish_reason> {
    let mut listening = true;
    loop {
        let event = reader.next()?;
        if listening && !go_on(&event) {
            listening = false;
            reader.generation.cancel();
        }
        if event.kind == LORY_EVENT_END {
            return Ok(event.finish_reason);
        }
    }
}

/// Runs to the end and gives the whole text.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_text(
    generation: *mut lory_generation,
    text: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, text) = (object(generation, "generation")?, out(text, "text")?);
        let mut reader = exclusive(&generation.reader, "generation")?;
        text.set(lory_text::new(generation.log.within(|| reader.generation.text())?));
        Ok(())
    })
}

/// Ends a generation before its next step. From any thread, also while another one waits for an
/// event; the generation must not have been freed (`lory_canceller` has no such condition).
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_cancel(generation: *const lory_generation) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        object(generation, "generation")?.canceller.cancel();
        Ok(())
    })
}

/// Frees a generation and ends it; NULL is a no-op.
///
/// # Safety
/// `generation` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_free(generation: *mut lory_generation) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(generation) });
}

/// Ends a generation from anywhere, whether it has been freed or not. Shareable.
pub struct lory_canceller(Canceller);

/// A handle that ends the generation.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_canceller(
    generation: *const lory_generation,
    canceller: *mut *mut lory_canceller,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, canceller) = (object(generation, "generation")?, out(canceller, "canceller")?);
        canceller.set(handle(lory_canceller(generation.canceller.clone())));
        Ok(())
    })
}

/// Ends the generation before its next step; a no-op if it has ended or was freed.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_canceller_cancel(canceller: *const lory_canceller) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        object(canceller, "canceller")?.0.cancel();
        Ok(())
    })
}

/// Frees a canceller, not the generation; NULL is a no-op.
///
/// # Safety
/// `canceller` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_canceller_free(canceller: *mut lory_canceller) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(canceller) });
}

/// What a request cost so far. Initialise it with `lory_stats_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_stats {
    /// Set by `lory_stats_init`.
    pub struct_size: usize,
    /// Prompt tokens that were already in the KV cache.
    pub cached_tokens: u64,
    /// Prompt tokens that were run.
    pub prompt_tokens: u64,
    /// Nanoseconds of the steps that ran prompt tokens.
    pub prompt_ns: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Nanoseconds of the steps that ran generated tokens.
    pub generated_ns: u64,
}

versioned!(
    lory_stats,
    last_of_first = generated_ns,
    lory_stats {
        struct_size: size_of::<lory_stats>(),
        cached_tokens: 0,
        prompt_tokens: 0,
        prompt_ns: 0,
        generated_tokens: 0,
        generated_ns: 0,
    }
);

/// Empties the struct; `struct_size` is `sizeof(lory_stats)`.
///
/// # Safety
/// `struct_size` bytes at `stats` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_stats_init(stats: *mut lory_stats, struct_size: usize) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(stats, struct_size) })
}

/// What the request has cost so far. `stats` must be initialised.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_generation_stats(
    generation: *mut lory_generation,
    stats: *mut lory_stats,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (generation, stats) = (object(generation, "generation")?, place(stats)?);
        let s = exclusive(&generation.reader, "generation")?.generation.stats();
        stats.set(&lory_stats {
            struct_size: 0,
            cached_tokens: s.cached_tokens as u64,
            prompt_tokens: s.prompt_tokens as u64,
            prompt_ns: s.prompt_time.as_nanos() as u64,
            generated_tokens: s.generated_tokens as u64,
            generated_ns: s.generated_time.as_nanos() as u64,
        });
        Ok(())
    })
}
