//! Text to tokens and back, from the vocabulary in a GGUF file.
//!
//! Two kinds are implemented: SentencePiece (`tokenizer.ggml.model = "llama"`) and byte-level BPE (`"gpt2"`). Ids equal those
//! of llama.cpp on well-formed vocabularies, with one intended difference: merging plain text never yields a control
//! token.
//!
//! Merging is our own code rather than the `tokenizers` crate: it builds from ids in the GGUF file without a detour over
//! JSON, treats every inconsistency of a hostile file as an error, and stays n·log n on any text.

mod bpe;
mod detokenizer;
mod pre;
mod special;
mod spm;
#[cfg(test)]
mod tests;
mod vocab;

use std::borrow::Cow;

use crate::{
    Error, Result,
    gguf::{Array, Metadata, Value},
};

pub use detokenizer::Detokenizer;

use special::{Fragment, Specials};
use vocab::{Attr, Vocab, byte_value, quoted};

/// How to encode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct EncodeOptions {
    /// Add the tokens that the model wants at the beginning and the end of a text (bos, eos).
    pub add_special: bool,
    /// Read control tokens that are written out in the text. For text from outside this must be off: it could forge a turn.
    pub parse_special: bool,
}

/// How to decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DecodeOptions {
    /// Write control tokens out instead of leaving them away.
    pub special: bool,
    /// The tokens continue a text, so a space at their beginning is part of it. Otherwise the space that a SentencePiece
    /// vocabulary puts before the first word is removed from the first token.
    pub continuation: bool,
}

/// A vocabulary with its merging rules.
#[derive(Debug)]
pub struct Tokenizer {
    vocab: Vocab,
    pieces: Pieces,
    specials: Specials,
    model: Model,
    add_bos: bool,
    add_eos: bool,
    add_space_prefix: bool,
}

#[derive(Debug)]
enum Model {
    Spm(Box<spm::Spm>),
    Bpe(Box<bpe::Bpe>),
}

impl Tokenizer {
    /// Builds the tokenizer that the `tokenizer.ggml.*` keys describe.
    ///
    /// # Errors
    /// A key that is missing, of a wrong type, out of range or inconsistent with another; a kind of tokenizer or a
    /// pre-tokenizer that is not implemented.
    pub fn from_metadata(meta: &Metadata) -> Result<Tokenizer> {
        let key = "tokenizer.ggml.model";
        let sentencepiece = match meta.str(key)? {
            "llama" => true,
            "gpt2" => false,
            other => {
                let message = format!(
                    "key `{key}`: tokenizer {} is not implemented; known: llama (SentencePiece), gpt2 (byte-level BPE)",
                    quoted(other)
                );
                return Err(Error::unsupported(meta.file(), message));
            }
        };
        check_charsmap(meta)?;
        let (vocab, by_text) = Vocab::read(meta, sentencepiece)?;
        let model = if sentencepiece {
            Model::Spm(Box::new(spm::Spm::new(&vocab, &by_text)))
        } else {
            Model::Bpe(Box::new(bpe::Bpe::new(meta, &vocab, &by_text)?))
        };
        let add_bos = match &model {
            Model::Spm(_) => true,
            Model::Bpe(bpe) => bpe.add_bos,
        };
        let flag = |name: &str, default: bool| {
            Ok::<_, Error>(meta.opt_bool(&format!("tokenizer.ggml.{name}"))?.unwrap_or(default))
        };
        let tokenizer = Tokenizer {
            pieces: Pieces::new(&vocab, sentencepiece),
            specials: Specials::new(&vocab).map_err(|e| meta.error("tokenizer.ggml.tokens", e))?,
            add_bos: flag("add_bos_token", add_bos)?,
            add_eos: flag("add_eos_token", false)?,
            add_space_prefix: flag("add_space_prefix", sentencepiece)?,
            vocab,
            model,
        };
        tokenizer.check_added(meta)?;
        Ok(tokenizer)
    }

    fn check_added(&self, meta: &Metadata) -> Result<()> {
        let pairs = [("bos", self.add_bos, self.bos()), ("eos", self.add_eos, self.eos())];
        for (name, add, id) in pairs {
            if add && id.is_none() {
                let message = format!("is missing, but `tokenizer.ggml.add_{name}_token` is true");
                return Err(meta.error(&format!("tokenizer.ggml.{name}_token_id"), message));
            }
        }
        Ok(())
    }

    /// The tokens of `text`. A byte that the vocabulary has no token for becomes the unknown token, or nothing if it has
    /// none of those either.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Vec<u32> {
        let mut out = Vec::with_capacity(text.len() / 4 + 2);
        if options.add_special && self.add_bos {
            out.extend(self.bos());
        }
        match &self.model {
            Model::Spm(spm) => self.encode_spm(spm, text, options.parse_special, &mut out),
            Model::Bpe(bpe) => {
                let mut scratch = bpe::Scratch::default();
                self.specials.split(text, options.parse_special, |fragment| match fragment {
                    Fragment::Token(id) => out.push(id),
                    Fragment::Text(text) => bpe.encode(text, &mut scratch, &mut out),
                });
            }
        }
        if options.add_special && self.add_eos {
            out.extend(self.eos());
        }
        out
    }

    fn encode_spm(&self, spm: &spm::Spm, text: &str, parse_special: bool, out: &mut Vec<u32>) {
        let mut after_special = true;
        let mut scratch = spm::Scratch::default();
        self.specials.split(text, parse_special, |fragment| match fragment {
            Fragment::Token(id) => {
                out.push(id);
                after_special = true;
            }
            Fragment::Text(text) => {
                let prefix = if self.add_space_prefix && after_special { spm::SPACE } else { "" };
                let escaped = format!("{prefix}{}", text.replace(' ', spm::SPACE));
                spm.encode(&escaped, &mut scratch, out);
                after_special = false;
            }
        });
    }

    /// The text of `ids` without control tokens, as a text of its own; bytes that are no UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_with(ids, DecodeOptions::default())
    }

    /// The text of `ids`. Ids out of range have none.
    pub fn decode_with(&self, ids: &[u32], options: DecodeOptions) -> String {
        let mut bytes = Vec::new();
        let mut strip = self.strips_space(options);
        for &id in ids {
            self.append_piece(id, options.special, strip, &mut bytes);
            strip = false;
        }
        match String::from_utf8_lossy(&bytes) {
            Cow::Owned(text) => text,
            Cow::Borrowed(text) => text.to_owned(),
        }
    }

    fn strips_space(&self, options: DecodeOptions) -> bool {
        self.add_space_prefix && !options.continuation
    }

    fn append_piece(&self, id: u32, special: bool, strip: bool, out: &mut Vec<u8>) {
        if !special && self.is_control(id) {
            return;
        }
        let piece = self.pieces.get(id).unwrap_or_default();
        out.extend_from_slice(piece.strip_prefix(b" ").filter(|_| strip).unwrap_or(piece));
    }

    /// What the token adds to a text, control tokens written out; not always whole characters.
    pub fn token_bytes(&self, id: u32) -> Option<Cow<'_, [u8]>> {
        self.pieces.get(id).map(Cow::Borrowed)
    }

    /// The token's text as the file has it, with `▁` or `Ġ` for a space.
    pub fn token_text(&self, id: u32) -> Option<&str> {
        self.vocab.text(id)
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        self.vocab.len()
    }

    /// Beginning of text.
    pub fn bos(&self) -> Option<u32> {
        self.vocab.roles.bos
    }

    /// End of text.
    pub fn eos(&self) -> Option<u32> {
        self.vocab.roles.eos
    }

    /// End of turn.
    pub fn eot(&self) -> Option<u32> {
        self.vocab.roles.eot
    }

    /// End of message, where a tool's answer is awaited.
    pub fn eom(&self) -> Option<u32> {
        self.vocab.roles.eom
    }

    /// Stands for what the vocabulary cannot write.
    pub fn unk(&self) -> Option<u32> {
        self.vocab.roles.unk
    }

    /// Separator.
    pub fn sep(&self) -> Option<u32> {
        self.vocab.roles.sep
    }

    /// Padding.
    pub fn pad(&self) -> Option<u32> {
        self.vocab.roles.pad
    }

    /// Whether a generation ends with this token.
    pub fn is_eog(&self, id: u32) -> bool {
        self.vocab.eog.contains(&id)
    }

    /// All tokens that end a generation, ascending.
    pub fn eog(&self) -> impl Iterator<Item = u32> {
        self.vocab.eog.iter().copied()
    }

    /// Whether the token is hidden in decoded text: control and unknown tokens.
    pub fn is_control(&self, id: u32) -> bool {
        self.vocab.attr(id).has(Attr::CONTROL | Attr::UNKNOWN)
    }

    /// Whether `add_special` puts bos first.
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether `add_special` puts eos last.
    pub fn add_eos(&self) -> bool {
        self.add_eos
    }
}

/// What each token adds to a text, back to back.
#[derive(Debug, Default)]
struct Pieces {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Pieces {
    fn new(vocab: &Vocab, sentencepiece: bool) -> Pieces {
        let mut pieces = Pieces::default();
        for id in 0..vocab.len() as u32 {
            let text = vocab.text(id).unwrap_or_default();
            let attr = vocab.attr(id);
            let shown = Attr::CONTROL | Attr::UNKNOWN | Attr::USER_DEFINED;
            match byte_value(text) {
                _ if attr.has(shown) => pieces.bytes.extend_from_slice(text.as_bytes()),
                Some(byte) if attr.has(Attr::BYTE) => pieces.bytes.push(byte),
                _ if !attr.has(Attr::NORMAL) => {} // unused: no model emits it
                _ if sentencepiece => {
                    pieces.bytes.extend_from_slice(text.replace(spm::SPACE, " ").as_bytes())
                }
                _ => text.chars().for_each(|c| match bpe::char_to_byte(c) {
                    Some(byte) => pieces.bytes.push(byte),
                    None => pieces.bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
                }),
            }
            pieces.ends.push(pieces.bytes.len());
        }
        pieces
    }

    fn get(&self, id: u32) -> Option<&[u8]> {
        let id = id as usize;
        let end = *self.ends.get(id)?;
        let start = id.checked_sub(1).and_then(|i| self.ends.get(i)).copied().unwrap_or(0);
        self.bytes.get(start..end)
    }
}

/// A normalization table belongs to Unigram tokenizers. A broken one is an error of its own, a sound one cannot be
/// honoured here, and to ignore it would give wrong tokens.
fn check_charsmap(meta: &Metadata) -> Result<()> {
    let key = "tokenizer.ggml.precompiled_charsmap";
    let head: Vec<u8> = match meta.get(key) {
        None => return Ok(()),
        Some(Value::Array(Array::U8(a))) => a.iter().copied().take(4).collect(),
        Some(Value::Array(Array::I8(a))) => a.iter().take(4).map(|&b| b as u8).collect(),
        Some(other) => {
            return Err(meta.error(key, format!("is {}, expected an array of bytes", other.type_name())));
        }
    };
    let len = match meta.get(key) {
        Some(Value::Array(a)) => a.len(),
        _ => 0,
    };
    let Ok(head) = <[u8; 4]>::try_from(head.as_slice()) else {
        return Err(meta.error(key, format!("has {len} bytes, less than its 4-byte header")));
    };
    let trie = u32::from_le_bytes(head);
    if trie as usize >= len - 4 || trie % 4 != 0 {
        return Err(meta.error(key, format!("states a table of {trie} bytes, but has {len} in all")));
    }
    Err(Error::unsupported(meta.file(), format!("key `{key}`: normalization tables are not implemented")))
}
