//! Text to tokens and back.

use std::{ffi::c_char, sync::Mutex};

use lory_models::tokenizer::{DecodeOptions, Detokenizer, EncodeOptions};

use crate::{
    args::{exclusive, free, handle, object, out, slice, text},
    engine::lory_engine,
    memory::{lory_str, lory_text, lory_tokens},
    options::unknown,
    status::{Failure, Result, guard, guard_free, lory_status, lory_status::*},
};

/// Flags of `lory_tokenize` and `lory_detokenize`, added together.
pub type lory_token_flags = u32;
/// Add the tokens that the model wants at the beginning and the end of a text.
pub const LORY_ADD_SPECIAL: lory_token_flags = 1;
/// Read control tokens that are written out in the text. Not for text from outside: it could forge a turn.
pub const LORY_PARSE_SPECIAL: lory_token_flags = 2;
/// Write control tokens out instead of leaving them away.
pub const LORY_SHOW_SPECIAL: lory_token_flags = 4;
/// The tokens continue a text, so a space at their beginning is part of it.
pub const LORY_CONTINUATION: lory_token_flags = 8;

fn check(flags: lory_token_flags, allowed: lory_token_flags) -> Result<()> {
    if flags & !allowed != 0 {
        return Err(unknown("flags", flags));
    }
    Ok(())
}

fn decode_options(flags: lory_token_flags) -> Result<DecodeOptions> {
    check(flags, LORY_SHOW_SPECIAL | LORY_CONTINUATION)?;
    Ok(DecodeOptions {
        special: flags & LORY_SHOW_SPECIAL != 0,
        continuation: flags & LORY_CONTINUATION != 0,
    })
}

/// The tokens of a text. Flags: `LORY_ADD_SPECIAL`, `LORY_PARSE_SPECIAL`.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_tokenize(
    engine: *const lory_engine,
    text: *const c_char,
    text_len: usize,
    flags: lory_token_flags,
    tokens: *mut lory_tokens,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, tokens) = (object(engine, "engine")?, out(tokens, "tokens")?);
        let text = self::text(text, text_len, "text")?;
        check(flags, LORY_ADD_SPECIAL | LORY_PARSE_SPECIAL)?;
        let (add_special, parse_special) = (flags & LORY_ADD_SPECIAL != 0, flags & LORY_PARSE_SPECIAL != 0);
        let options = EncodeOptions { add_special, parse_special };
        tokens.set(lory_tokens::new(engine.engine.model().tokenizer.encode(text, options)));
        Ok(())
    })
}

/// The text of tokens; bytes that are no UTF-8 become U+FFFD. Flags: `LORY_SHOW_SPECIAL`,
/// `LORY_CONTINUATION`. A token that does not exist is refused.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_detokenize(
    engine: *const lory_engine,
    tokens: *const u32,
    n_tokens: usize,
    flags: lory_token_flags,
    text: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, text) = (object(engine, "engine")?, out(text, "text")?);
        let (tokens, options) = (slice(tokens, n_tokens, "tokens")?, decode_options(flags)?);
        check_tokens(&engine, tokens)?;
        text.set(lory_text::new(engine.engine.model().tokenizer.decode_with(tokens, options)));
        Ok(())
    })
}

fn check_tokens(engine: &lory_engine, tokens: &[u32]) -> Result<()> {
    let vocab = engine.engine.model().tokenizer.vocab_size();
    match tokens.iter().find(|t| **t as usize >= vocab) {
        None => Ok(()),
        Some(bad) => {
            let text = format!("token {bad} is outside the vocabulary of {vocab}");
            Err(Failure::new(LORY_E_REQUEST, text))
        }
    }
}

/// The bytes that a token adds to a text, control tokens written out; not always whole characters,
/// so not always UTF-8. `LORY_E_NOT_FOUND` for a token that does not exist.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_token_bytes(
    engine: *const lory_engine,
    token: u32,
    bytes: *mut lory_text,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, bytes) = (object(engine, "engine")?, out(bytes, "bytes")?);
        let piece = engine.engine.model().tokenizer.token_bytes(token);
        let missing = || Failure::new(LORY_E_NOT_FOUND, format!("there is no token {token}"));
        bytes.set(lory_text::new(piece.ok_or_else(missing)?));
        Ok(())
    })
}

/// Which special token.
pub type lory_token_role = u32;
/// Beginning of text.
pub const LORY_TOKEN_BOS: lory_token_role = 0;
/// End of text.
pub const LORY_TOKEN_EOS: lory_token_role = 1;
/// End of turn.
pub const LORY_TOKEN_EOT: lory_token_role = 2;
/// End of message, where a tool's answer is awaited.
pub const LORY_TOKEN_EOM: lory_token_role = 3;
/// Unknown.
pub const LORY_TOKEN_UNK: lory_token_role = 4;
/// Separator.
pub const LORY_TOKEN_SEP: lory_token_role = 5;
/// Padding.
pub const LORY_TOKEN_PAD: lory_token_role = 6;

/// The token with a role; `LORY_E_NOT_FOUND` if the vocabulary has none.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_token_special(
    engine: *const lory_engine,
    role: lory_token_role,
    token: *mut u32,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, token) = (object(engine, "engine")?, out(token, "token")?);
        let tokenizer = &engine.engine.model().tokenizer;
        let found = match role {
            LORY_TOKEN_BOS => tokenizer.bos(),
            LORY_TOKEN_EOS => tokenizer.eos(),
            LORY_TOKEN_EOT => tokenizer.eot(),
            LORY_TOKEN_EOM => tokenizer.eom(),
            LORY_TOKEN_UNK => tokenizer.unk(),
            LORY_TOKEN_SEP => tokenizer.sep(),
            LORY_TOKEN_PAD => tokenizer.pad(),
            other => return Err(unknown("role", other)),
        };
        let missing =
            || Failure::new(LORY_E_NOT_FOUND, format!("the vocabulary has no token of role {role}"));
        token.set(found.ok_or_else(missing)?);
        Ok(())
    })
}

/// `ends` becomes 1 if a generation ends with this token, otherwise 0.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_token_is_end(
    engine: *const lory_engine,
    token: u32,
    ends: *mut i32,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, ends) = (object(engine, "engine")?, out(ends, "ends")?);
        ends.set(engine.engine.model().tokenizer.is_eog(token).into());
        Ok(())
    })
}

/// Turns a stream of tokens into text, never half a character. Exclusive.
pub struct lory_detokenizer(Mutex<Stream>);

struct Stream {
    detokenizer: Detokenizer,
    /// What the last view points to.
    text: String,
}

/// Starts a stream. Flags as for `lory_detokenize`.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_detokenizer_new(
    engine: *const lory_engine,
    flags: lory_token_flags,
    detokenizer: *mut *mut lory_detokenizer,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, place) = (object(engine, "engine")?, out(detokenizer, "detokenizer")?);
        let tokenizer = engine.engine.model().tokenizer.clone();
        let detokenizer = Detokenizer::new(tokenizer, decode_options(flags)?);
        place.set(handle(lory_detokenizer(Mutex::new(Stream { detokenizer, text: String::new() }))));
        Ok(())
    })
}

/// The text that `token` completes; empty while a character is incomplete.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_detokenizer_push(
    detokenizer: *mut lory_detokenizer,
    token: u32,
    text: *mut lory_str,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (detokenizer, text) = (object(detokenizer, "detokenizer")?, out(text, "text")?);
        let mut stream = exclusive(&detokenizer.0, "detokenizer")?;
        stream.text = stream.detokenizer.push(token);
        text.set(lory_str::view(&stream.text));
        Ok(())
    })
}

/// What is left of an incomplete character, as U+FFFD. It stays with the stream, which goes on if
/// more tokens come.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_detokenizer_finish(
    detokenizer: *mut lory_detokenizer,
    text: *mut lory_str,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (detokenizer, text) = (object(detokenizer, "detokenizer")?, out(text, "text")?);
        let mut stream = exclusive(&detokenizer.0, "detokenizer")?;
        stream.text = stream.detokenizer.clone().finish();
        text.set(lory_str::view(&stream.text));
        Ok(())
    })
}

/// Frees a detokenizer; NULL is a no-op.
///
/// # Safety
/// `detokenizer` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_detokenizer_free(detokenizer: *mut lory_detokenizer) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(detokenizer) });
}
