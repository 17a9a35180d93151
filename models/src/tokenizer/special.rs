//! Finding special tokens in a text before it is tokenized.

use aho_corasick::{AhoCorasick, AhoCorasickKind, Input, MatchKind};

use super::vocab::{Attr, Vocab};

/// Longest special token in bytes. Whoever finds a short one looks this far ahead for a longer one.
pub(super) const MAX_SPECIAL_LEN: usize = 4096;

/// A stretch of text, or a special token that was written out in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    /// To be tokenized.
    Text(&'t str),
    /// Taken as it is.
    Token(u32),
}

/// The special tokens of one vocabulary. The leftmost, and there the longest, wins, as in Hugging Face's tokenizers.
#[derive(Debug)]
pub(super) struct Specials {
    /// User-defined tokens: always found.
    user: Option<Set>,
    /// Those and control tokens: found on request, because text from outside must not be able to forge a turn.
    all: Option<Set>,
}

#[derive(Debug)]
struct Set {
    finder: AhoCorasick,
    tokens: Vec<(u32, Attr)>,
}

impl Set {
    fn new(vocab: &Vocab, tokens: Vec<(u32, Attr)>) -> Result<Option<Set>, String> {
        if tokens.is_empty() {
            return Ok(None);
        }
        let text = |id: u32| vocab.text(id).unwrap_or_default();
        if let Some(&(id, _)) = tokens.iter().find(|&&(id, _)| text(id).len() > MAX_SPECIAL_LEN) {
            let len = text(id).len();
            return Err(format!("special token {id} has {len} bytes, more than {MAX_SPECIAL_LEN}"));
        }
        let texts = tokens.iter().map(|&(id, _)| text(id));
        let finder = AhoCorasick::builder()
            // A DFA, which is the default for few tokens, takes a kilobyte for each of their bytes.
            .kind(Some(AhoCorasickKind::ContiguousNFA))
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|e| e.to_string())?;
        Ok(Some(Set { finder, tokens }))
    }
}

impl Specials {
    pub(super) fn new(vocab: &Vocab) -> Result<Specials, String> {
        let hidden = Attr::CONTROL | Attr::UNKNOWN;
        let all: Vec<(u32, Attr)> = vocab.ids_with(hidden | Attr::USER_DEFINED).collect();
        // A token that is user-defined and control at once counts as control.
        let user = all.iter().copied().filter(|(_, attr)| !attr.has(hidden)).collect();
        Ok(Specials { user: Set::new(vocab, user)?, all: Set::new(vocab, all)? })
    }

    /// Calls `fragment` with the parts of `text`, in order.
    pub(super) fn split<'t>(
        &self,
        text: &'t str,
        parse_special: bool,
        mut fragment: impl FnMut(Fragment<'t>),
    ) {
        let set = if parse_special { &self.all } else { &self.user };
        let mut at = 0;
        if let Some(set) = set {
            while let Some(found) = set.finder.find(Input::new(text).range(at..)) {
                let Some(&(id, attr)) = set.tokens.get(found.pattern().as_usize()) else { break };
                let mut left = &text[at..found.start()];
                if attr.has(Attr::LSTRIP) {
                    left = left.trim_end_matches(is_c_space);
                }
                if !left.is_empty() {
                    fragment(Fragment::Text(left));
                }
                fragment(Fragment::Token(id));
                at = found.end();
                if attr.has(Attr::RSTRIP) {
                    at = text.len() - text[at..].trim_start_matches(is_c_space).len();
                }
            }
        }
        if at < text.len() {
            fragment(Fragment::Text(&text[at..]));
        }
    }
}

/// C's `isspace`: what llama.cpp strips.
fn is_c_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\u{b}' | '\u{c}' | '\r')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{Array, Metadata, Value};

    #[test]
    fn v1_long_special_tokens_take_memory_in_proportion() {
        let long = |i: u8| char::from(b'a' + i).to_string().repeat(MAX_SPECIAL_LEN);
        let tokens: Vec<String> = (0..24).map(long).collect();
        let bytes = tokens.len() * MAX_SPECIAL_LEN;
        let mut meta = Metadata::new("v.gguf".into());
        meta.insert("tokenizer.ggml.token_type", Value::Array(Array::I32(vec![4; tokens.len()]))).unwrap();
        meta.insert("tokenizer.ggml.tokens", Value::Array(Array::String(tokens))).unwrap();
        let (vocab, _) = Vocab::read(&meta, false).unwrap();
        let specials = Specials::new(&vocab).unwrap();
        for set in [specials.user, specials.all].into_iter().flatten() {
            let taken = set.finder.memory_usage();
            assert!(taken < 32 * bytes, "{taken} bytes for tokens of {bytes}");
        }
    }
}
