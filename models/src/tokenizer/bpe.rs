//! Byte-level byte pair encoding (GPT-2's): the pre-tokenizer cuts the text into words, each word starts as its bytes, and
//! the pair of neighbours with the lowest rank is merged until none is left.
//!
//! Merges are kept as pairs of ids, so no string is built or hashed while a word is merged. A priority queue over a linked
//! list makes it n·log n in the length of a word, which hostile text can make as long as the whole input.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, HashMap},
};

use crate::{Result, gguf::Metadata};

use super::{
    pre::{self, Splitter},
    vocab::{Attr, ByText, Vocab, quoted},
};

const NONE: usize = usize::MAX;
/// The id of a byte without a token, and of a symbol that was merged into its left neighbour.
const NO_ID: u32 = u32::MAX;

const KEY_PRE: &str = "tokenizer.ggml.pre";
const KEY_MERGES: &str = "tokenizer.ggml.merges";

/// Merges and words of one BPE vocabulary.
#[derive(Debug)]
pub(super) struct Bpe {
    splitter: Splitter,
    bytes: [u32; 256],
    /// Left and right id to rank and merged id.
    merges: HashMap<(u32, u32), (u32, u32)>,
    /// Whole words that are tokens, where the pre-tokenizer wants them unmerged.
    words: Option<HashMap<Box<[u8]>, u32>>,
    unk: Option<u32>,
    /// Default of `add_bos_token`.
    pub(super) add_bos: bool,
}

/// Working memory of one call.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Merge>>,
}

#[derive(Debug, Clone, Copy)]
struct Symbol {
    id: u32,
    prev: usize,
    next: usize,
}

/// Ordered by rank, then from left to right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Merge {
    rank: u32,
    left: usize,
    pair: (u32, u32),
    id: u32,
}

impl Bpe {
    pub(super) fn new(meta: &Metadata, vocab: &Vocab, by_text: &ByText) -> Result<Bpe> {
        let pre = read_pre(meta)?;
        let splitter = Splitter::new(pre).map_err(|e| meta.error(KEY_PRE, e))?;
        let mut bytes = [NO_ID; 256];
        for (byte, slot) in (0u8..=255).zip(&mut bytes) {
            let mut buffer = [0; 4];
            let text: &str = byte_to_char(byte).encode_utf8(&mut buffer);
            *slot = by_text.get(text).copied().unwrap_or(NO_ID);
        }
        let words = pre.ignore_merges.then(|| words(vocab, by_text));
        let merges = read_merges(meta, by_text)?;
        Ok(Bpe { splitter, bytes, merges, words, unk: vocab.roles.unk, add_bos: pre.add_bos })
    }

    /// Appends the tokens of `text`.
    pub(super) fn encode(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        self.splitter.split(text, &mut |word| self.word(word.as_bytes(), scratch, out));
    }

    fn word(&self, word: &[u8], scratch: &mut Scratch, out: &mut Vec<u32>) {
        if let Some(&id) = self.words.as_ref().and_then(|words| words.get(word)) {
            out.push(id);
            return;
        }
        let Scratch { symbols, queue } = scratch;
        symbols.clear();
        symbols.extend(word.iter().enumerate().map(|(i, &b)| Symbol {
            id: self.bytes[usize::from(b)],
            prev: i.checked_sub(1).unwrap_or(NONE),
            next: if i + 1 < word.len() { i + 1 } else { NONE },
        }));
        queue.clear();
        queue.extend((1..symbols.len()).filter_map(|right| self.merge(symbols, right - 1, right)));
        while let Some(Reverse(best)) = queue.pop() {
            let left = symbols[best.left];
            if left.id != best.pair.0 || left.next == NONE || symbols[left.next].id != best.pair.1 {
                continue; // one of them has been merged since
            }
            let next = symbols[left.next].next;
            symbols[left.next].id = NO_ID;
            symbols[left.next].prev = NONE;
            symbols[best.left] = Symbol { id: best.id, next, ..left };
            if next != NONE {
                symbols[next].prev = best.left;
            }
            queue.extend(self.merge(symbols, left.prev, best.left));
            queue.extend(self.merge(symbols, best.left, next));
        }
        let mut at = 0;
        while let Some(symbol) = symbols.get(at) {
            // A byte that the vocabulary lacks is its unknown token, or nothing: there is no id to stand for it.
            out.extend(Some(symbol.id).filter(|&id| id != NO_ID).or(self.unk));
            at = symbol.next;
        }
    }

    fn merge(&self, symbols: &[Symbol], left: usize, right: usize) -> Option<Reverse<Merge>> {
        let pair = (symbols.get(left)?.id, symbols.get(right)?.id);
        let &(rank, id) = self.merges.get(&pair)?;
        Some(Reverse(Merge { rank, left, pair, id }))
    }
}

fn read_pre(meta: &Metadata) -> Result<&'static pre::Pre> {
    let name = meta.opt_str(KEY_PRE)?.ok_or_else(|| {
        let message = format!(
            "is missing; without it the text would be split as no model was trained. Convert the model again, or set the key to one of: {}",
            pre::known()
        );
        meta.error(KEY_PRE, message)
    })?;
    pre::find(name).ok_or_else(|| {
        meta.error(KEY_PRE, format!("unknown pre-tokenizer {}; known: {}", quoted(name), pre::known()))
    })
}

fn words(vocab: &Vocab, by_text: &ByText) -> HashMap<Box<[u8]>, u32> {
    let mut words = HashMap::with_capacity(by_text.len());
    for (&text, &id) in by_text {
        // A control token must not come out of plain text, even if a word spells it.
        if vocab.attr(id).has(Attr::CONTROL | Attr::UNKNOWN) {
            continue;
        }
        if let Some(bytes) = decode_text(text) {
            words.insert(bytes.into(), id);
        }
    }
    words
}

fn read_merges(meta: &Metadata, by_text: &ByText) -> Result<HashMap<(u32, u32), (u32, u32)>> {
    let list = meta.opt_strings(KEY_MERGES)?.ok_or_else(|| meta.error(KEY_MERGES, "is missing"))?;
    let mut merges = HashMap::with_capacity(list.len());
    let mut merged = String::new();
    for (rank, line) in (0u32..).zip(list) {
        let fault = |what: &str| meta.error(KEY_MERGES, format!("element {rank}, {}: {what}", quoted(line)));
        // From the second character on: the first half is never empty, but may begin with anything.
        let from = line.chars().next().map_or(0, char::len_utf8);
        let space = line[from..].find(' ').ok_or_else(|| fault("has no space between its halves"))? + from;
        let (left, right) = (&line[..space], &line[space + 1..]);
        let id = |text: &str| {
            by_text.get(text).copied().ok_or_else(|| fault(&format!("{} is not a token", quoted(text))))
        };
        merged.clear();
        merged.push_str(left);
        merged.push_str(right);
        let entry = (rank, id(&merged)?);
        if let Some((first, _)) = merges.insert((id(left)?, id(right)?), entry) {
            return Err(fault(&format!("is element {first} again")));
        }
    }
    Ok(merges)
}

/// GPT-2's alphabet: printable Latin-1 bytes are themselves, the other 68 are U+0100 onwards.
pub(super) fn byte_to_char(byte: u8) -> char {
    let code = match byte {
        0..=0x20 => 0x100 + u32::from(byte),
        0x7f..=0xa0 => 0x121 + u32::from(byte - 0x7f),
        0xad => 0x143,
        _ => u32::from(byte),
    };
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The inverse of [`byte_to_char`].
pub(super) fn char_to_byte(c: char) -> Option<u8> {
    let code = u32::from(c);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7f,
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The bytes that a token's text spells in GPT-2's alphabet.
pub(super) fn decode_text(text: &str) -> Option<Vec<u8>> {
    text.chars().map(char_to_byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alphabet_is_a_bijection_with_gpt2s_anchors() {
        for byte in 0..=255 {
            assert_eq!(char_to_byte(byte_to_char(byte)), Some(byte));
        }
        assert_eq!(byte_to_char(b' '), 'Ġ');
        assert_eq!(byte_to_char(b'\n'), 'Ċ');
        assert_eq!(byte_to_char(b'\t'), 'ĉ');
        assert_eq!(byte_to_char(0xad), 'Ń');
        assert_eq!(byte_to_char(b'a'), 'a');
        assert_eq!(char_to_byte('▁'), None);
    }
}
