//! Conversations.

use std::sync::Mutex;

use lory_runtime::{AdapterId, OnSwitch, Pooling, Session, SessionOptions, normalize};

use crate::{
    args::{exclusive, free, handle, object, out, slice},
    engine::lory_engine,
    generation::lory_generation,
    log::Log,
    memory::{lory_floats, lory_tokens},
    options::unknown,
    request::lory_request,
    status::{Result, guard, guard_free, lory_status},
    structs::{init, read, versioned},
};

/// A conversation: its tokens, its adapters, its place in the KV cache. Exclusive: one thread at a
/// time. It keeps what it needs of its engine alive.
pub struct lory_session {
    pub(crate) session: Mutex<Session>,
    pub(crate) log: Log,
}

impl lory_session {
    pub(crate) fn new(session: Session, log: &Log) -> lory_session {
        lory_session { session: Mutex::new(session), log: log.clone() }
    }
}

/// One loading of one adapter; no two loadings of an engine share a number, and 0 is none. To another
/// engine it means nothing, or another adapter.
pub type lory_adapter = u64;

/// An adapter and its weight.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lory_adapter_scale {
    /// From `lory_adapter_load`, `lory_adapter_replace` or `lory_adapter_resolve`.
    pub id: lory_adapter,
    /// Multiplies what the adapter adds; 1 is as trained.
    pub scale: f32,
    /// Zero.
    pub reserved: u32,
}

/// # Safety
/// As for [`slice`].
unsafe fn adapters(ptr: *const lory_adapter_scale, len: usize) -> Result<Vec<(AdapterId, f32)>> {
    // SAFETY: the caller's word.
    let adapters = unsafe { slice(ptr, len, "adapters") }?;
    Ok(adapters.iter().map(|a| (AdapterId::from_u64(a.id), a.scale)).collect())
}

/// What a session starts with. Initialise it with `lory_session_options_init`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct lory_session_options {
    /// Set by `lory_session_options_init`.
    pub struct_size: usize,
    /// Adapters and their weights; none is the base alone.
    pub adapters: *const lory_adapter_scale,
    /// Elements of `adapters`.
    pub n_adapters: usize,
    /// Sessions with a higher number go first when a step has not room for all. Default 0.
    pub priority: i32,
    /// Zero.
    pub reserved: u32,
}

versioned!(lory_session_options, last_of_first = reserved);

/// Fills in the defaults; `struct_size` is `sizeof(lory_session_options)`.
///
/// # Safety
/// `struct_size` bytes at `options` are writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_options_init(
    options: *mut lory_session_options,
    struct_size: usize,
) -> lory_status {
    // SAFETY: the caller's word.
    guard(|| unsafe { init(options, struct_size) })
}

impl lory_session_options {
    /// # Safety
    /// The array that it points to is readable.
    pub(crate) unsafe fn to_rust(self) -> Result<SessionOptions> {
        // SAFETY: the caller's word.
        let adapters = unsafe { adapters(self.adapters, self.n_adapters) }?;
        Ok(SessionOptions { adapters, priority: self.priority, ..SessionOptions::default() })
    }
}

/// A new, empty conversation. `options` may be NULL.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_new(
    engine: *const lory_engine,
    options: *const lory_session_options,
    session: *mut *mut lory_session,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, session, options) =
            (object(engine, "engine")?, out(session, "session")?, read(options)?);
        let options = options.to_rust()?;
        let new = engine.log.within(|| engine.engine.session(&options))?;
        session.set(handle(lory_session::new(new, &engine.log)));
        Ok(())
    })
}

/// Frees a session and ends its generation; NULL is a no-op.
///
/// # Safety
/// `session` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_free(session: *mut lory_session) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(session) });
}

/// The conversation so far.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_tokens(
    session: *mut lory_session,
    tokens: *mut lory_tokens,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, tokens) = (object(session, "session")?, out(tokens, "tokens")?);
        tokens.set(lory_tokens::new(exclusive(&session.session, "session")?.tokens()));
        Ok(())
    })
}

/// How many of the conversation's tokens have their keys and values cached.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_cached_tokens(
    session: *mut lory_session,
    n_tokens: *mut usize,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, n_tokens) = (object(session, "session")?, out(n_tokens, "n_tokens")?);
        n_tokens.set(exclusive(&session.session, "session")?.cached_tokens());
        Ok(())
    })
}

/// `mixed` becomes 1 if part of the cache was computed under other adapters than the present ones
/// (`LORY_ON_SWITCH_KEEP`), otherwise 0.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_is_mixed(session: *mut lory_session, mixed: *mut i32) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, mixed) = (object(session, "session")?, out(mixed, "mixed")?);
        mixed.set(exclusive(&session.session, "session")?.is_mixed().into());
        Ok(())
    })
}

/// What happens to cached keys and values when a session's adapters change.
pub type lory_on_switch = u32;
/// They are computed again: the answers are those of a new session with the new adapters.
pub const LORY_ON_SWITCH_RECOMPUTE: lory_on_switch = 0;
/// They stay, computed by other adapters: instant, but answers differ from a new session's.
pub const LORY_ON_SWITCH_KEEP: lory_on_switch = 1;

/// Changes the adapters and ends the session's generation, unless the new ones answer as the old ones do
/// (other loadings of the same adapters with the same weights, or more of them with weight 0): then they
/// take their place and the generation goes on. None (`n_adapters` 0) is the base alone.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_set_adapters(
    session: *mut lory_session,
    adapters: *const lory_adapter_scale,
    n_adapters: usize,
    on_switch: lory_on_switch,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, set) = (object(session, "session")?, self::adapters(adapters, n_adapters)?);
        let on_switch = match on_switch {
            LORY_ON_SWITCH_RECOMPUTE => OnSwitch::Recompute,
            LORY_ON_SWITCH_KEEP => OnSwitch::Keep,
            other => return Err(unknown("on_switch", other)),
        };
        let mut guard = exclusive(&session.session, "session")?;
        Ok(session.log.within(|| guard.set_adapters(&set, on_switch))?)
    })
}

/// Forgets all tokens from position `n_tokens` on and ends the session's generation; 0 forgets
/// everything but the adapters.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_rewind(session: *mut lory_session, n_tokens: usize) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let session = object(session, "session")?;
        exclusive(&session.session, "session")?.rewind(n_tokens);
        Ok(())
    })
}

/// Rewinds to where the conversation and `tokens` part. `n_kept` is how many tokens they have in
/// common; the rest of `tokens` is for the next request.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_rewind_to_common(
    session: *mut lory_session,
    tokens: *const u32,
    n_tokens: usize,
    n_kept: *mut usize,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, n_kept) = (object(session, "session")?, out(n_kept, "n_kept")?);
        let tokens = slice(tokens, n_tokens, "tokens")?;
        n_kept.set(exclusive(&session.session, "session")?.rewind_to_common(tokens));
        Ok(())
    })
}

/// A second session with the same tokens and adapters; both share the cached keys and values until
/// one of them goes on.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_fork(
    session: *mut lory_session,
    fork: *mut *mut lory_session,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, fork) = (object(session, "session")?, out(fork, "fork")?);
        let new = exclusive(&session.session, "session")?.fork();
        fork.set(handle(lory_session::new(new, &session.log)));
        Ok(())
    })
}

/// Appends the request's tokens and starts to answer; nothing runs before the generation is asked
/// for events or `lory_engine_step` is called. One at a time: a running generation of this session
/// ends. Several sessions' generations run in the same steps, whatever their adapters.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_generate(
    session: *mut lory_session,
    request: *const lory_request,
    generation: *mut *mut lory_generation,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, generation) = (object(session, "session")?, out(generation, "generation")?);
        let request = read(request)?.to_rust()?;
        let new = exclusive(&session.session, "session")?.generate(request)?;
        generation.set(handle(lory_generation::new(new, session.log.clone())));
        Ok(())
    })
}

/// Sessions with a higher number go first when a step has not room for all.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_set_priority(session: *mut lory_session, priority: i32) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let session = object(session, "session")?;
        exclusive(&session.session, "session")?.set_priority(priority);
        Ok(())
    })
}

/// How the final states of a text become its embedding.
pub type lory_pooling = u32;
/// One vector per token.
pub const LORY_POOLING_NONE: lory_pooling = 0;
/// The mean over the tokens: one vector.
pub const LORY_POOLING_MEAN: lory_pooling = 1;
/// That of the last token, which has seen all others: one vector.
pub const LORY_POOLING_LAST: lory_pooling = 2;

/// Embeds tokens as they would be read after the session's own, which do not change. `vectors` gets
/// n_embd numbers per vector (`lory_model_info`), one vector after the other; with `unit_length` 1
/// each is scaled to length 1, as comparisons by cosine want.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_embed(
    session: *mut lory_session,
    tokens: *const u32,
    n_tokens: usize,
    pooling: lory_pooling,
    unit_length: i32,
    vectors: *mut lory_floats,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, vectors) = (object(session, "session")?, out(vectors, "vectors")?);
        let (tokens, pooling) = (slice(tokens, n_tokens, "tokens")?, pooling_of(pooling)?);
        let guard = exclusive(&session.session, "session")?;
        let mut embedded = session.log.within(|| guard.embed(tokens, pooling))?;
        if unit_length != 0 {
            embedded.iter_mut().for_each(|vector| normalize(vector));
        }
        vectors.set(lory_floats::new(embedded.concat()));
        Ok(())
    })
}

fn pooling_of(pooling: lory_pooling) -> Result<Pooling> {
    match pooling {
        LORY_POOLING_NONE => Ok(Pooling::None),
        LORY_POOLING_MEAN => Ok(Pooling::Mean),
        LORY_POOLING_LAST => Ok(Pooling::Last),
        other => Err(unknown("pooling", other)),
    }
}

/// Tokens that somebody else owns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lory_token_span {
    /// May be NULL if `len` is 0.
    pub data: *const u32,
    /// How many.
    pub len: usize,
}

/// Scores continuations of a prompt, which is read after the session's own tokens; the session does
/// not change. `logprobs` gets the natural log-probability of each token after all before it, the
/// continuations' one after the other. The prompt is run once, the continuations in one batch.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_session_score(
    session: *mut lory_session,
    prompt: *const u32,
    n_prompt: usize,
    continuations: *const lory_token_span,
    n_continuations: usize,
    logprobs: *mut lory_floats,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (session, logprobs) = (object(session, "session")?, out(logprobs, "logprobs")?);
        let prompt = slice(prompt, n_prompt, "prompt")?;
        let spans = slice(continuations, n_continuations, "continuations")?;
        let tokens = spans.iter().map(|s| Ok(slice(s.data, s.len, "a continuation")?.to_vec()));
        let tokens = tokens.collect::<Result<Vec<_>>>()?;
        let guard = exclusive(&session.session, "session")?;
        let scores = session.log.within(|| guard.score(prompt, &tokens))?;
        logprobs.set(lory_floats::new(scores.into_iter().flat_map(|s| s.logprobs).collect()));
        Ok(())
    })
}
