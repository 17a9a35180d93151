//! A tokenizer's vocabulary as the parser wants it: a tree of byte strings.

use std::sync::Arc;

use llguidance::{
    ParserFactory,
    toktrie::{ApproximateTokEnv, INVALID_TOKEN, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie},
};
use lory_models::tokenizer::Tokenizer;

use super::GrammarError;

/// Longest token that can take part, in bytes; the tree's nodes count their depth in ten bits.
const MAX_TOKEN: usize = 512;

/// Bytes that may follow each other in the tree, below the 22 bits in which it counts its nodes.
const MAX_BYTES: usize = 4_000_000;

/// Work for one mask in parser items. Generous: a character is a terminal here, and inside a string of JSON nearly all of
/// 256k tokens are possible (measured: 2 items per byte of the tree).
const MAX_ITEMS: usize = 20_000_000;

/// Alternatives alive at one place of the text. Long chains and deep nesting of optional parts have as many as they have
/// levels.
const MAX_ALIVE: usize = 200_000;

/// What makes parsers for one vocabulary.
pub(super) fn factory(tokenizer: &Tokenizer) -> Result<ParserFactory, GrammarError> {
    let size = u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX);
    let mut room = MAX_BYTES;
    let words: Vec<Vec<u8>> = (0..size)
        .map(|id| {
            let word = word(tokenizer, id);
            // Tokens that the tree cannot hold are never chosen under a grammar.
            match room.checked_sub(word.len()) {
                Some(left) if word.len() <= MAX_TOKEN => {
                    room = left;
                    word
                }
                _ => Vec::new(),
            }
        })
        .collect();
    let trie = TokTrie::from(&TokRxInfo::new(size, INVALID_TOKEN), &words);
    let ends: Vec<u32> = tokenizer.eog().filter(|id| *id < size).collect();
    let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) };
    let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
    let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &[]);
    let mut factory = factory.map_err(|e| GrammarError::TooComplex(super::first_line(&e)))?;
    factory.quiet();
    let limits = factory.limits_mut();
    limits.max_items_in_row = MAX_ALIVE;
    limits.step_max_items = MAX_ITEMS;
    limits.step_lexer_fuel = 2_000_000;
    limits.verbose_errors = false;
    Ok(factory)
}

/// The bytes that a token adds to the text. Control tokens add none, but can be named in a grammar: behind a byte that no
/// text contains.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let marker = TokTrie::SPECIAL_TOKEN_MARKER;
    if tokenizer.is_control(id) || tokenizer.is_eog(id) {
        let text = tokenizer.token_text(id).unwrap_or_default();
        return [&[marker], text.as_bytes()].concat();
    }
    let bytes = tokenizer.token_bytes(id).unwrap_or_default().into_owned();
    if bytes.contains(&marker) { Vec::new() } else { bytes }
}
