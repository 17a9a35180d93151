//! What answers must match.

use std::ffi::c_char;

use lory_runtime::{Grammar, GrammarSource};

use crate::{
    args::{free, handle, object, out, text},
    engine::lory_engine,
    options::unknown,
    status::{guard, guard_free, lory_status},
};

/// How a grammar is written.
pub type lory_grammar_kind = u32;
/// llama.cpp's GBNF notation.
pub const LORY_GRAMMAR_GBNF: lory_grammar_kind = 0;
/// A JSON schema; `{}` is any JSON value.
pub const LORY_GRAMMAR_JSON_SCHEMA: lory_grammar_kind = 1;

/// A grammar, compiled for one model's vocabulary. Shareable between threads and requests.
pub struct lory_grammar(pub(crate) Grammar);

/// Compiles a grammar.
///
/// # Safety
/// See the rules at the top of the header.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_grammar_new(
    engine: *const lory_engine,
    kind: lory_grammar_kind,
    source: *const c_char,
    source_len: usize,
    grammar: *mut *mut lory_grammar,
) -> lory_status {
    // SAFETY: pointers are what the header asks for.
    guard(|| unsafe {
        let (engine, grammar) = (object(engine, "engine")?, out(grammar, "grammar")?);
        let source = text(source, source_len, "source")?.to_owned();
        let source = match kind {
            LORY_GRAMMAR_GBNF => GrammarSource::Gbnf(source),
            LORY_GRAMMAR_JSON_SCHEMA => GrammarSource::JsonSchema(source),
            other => return Err(unknown("kind", other)),
        };
        let new = engine.engine.model().grammar(&source).map_err(lory_runtime::Error::from)?;
        grammar.set(handle(lory_grammar(new)));
        Ok(())
    })
}

/// Frees a grammar; NULL is a no-op. Requests that use it go on.
///
/// # Safety
/// `grammar` is NULL or not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lory_grammar_free(grammar: *mut lory_grammar) {
    // SAFETY: the caller's word.
    guard_free(|| unsafe { free(grammar) });
}
