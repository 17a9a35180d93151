//! SentencePiece tokenization as llama.cpp does it (`llm_tokenizer_spm`): neighbours that together are a token are merged,
//! the best score first and the leftmost among equals; what is no token in the end becomes bytes.
//!
//! A priority queue over a linked list: n·log n in the text's length. Real vocabularies have no piece with a space behind
//! another character, so nothing merges across the beginning of a word, and words can be merged one by one.

use std::{
    cmp::Ordering,
    collections::{BinaryHeap, HashMap},
};

use super::vocab::{Attr, ByText, Vocab, byte_value};

/// The space of SentencePiece, U+2581.
pub(super) const SPACE: &str = "\u{2581}";

const NONE: usize = usize::MAX;

/// Lookup tables of one SentencePiece vocabulary.
#[derive(Debug)]
pub(super) struct Spm {
    pieces: HashMap<Box<str>, (u32, f32)>,
    longest: usize,
    /// No piece contains [`SPACE`] behind another character.
    by_word: bool,
    bytes: [Option<u32>; 256],
    unk: Option<u32>,
}

/// Working memory of one call.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Merge>,
}

#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    prev: usize,
    next: usize,
    /// Known from the merge that made it.
    id: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
    id: u32,
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Merge {}

impl Spm {
    pub(super) fn new(vocab: &Vocab, by_text: &ByText) -> Spm {
        let mut bytes = [None; 256];
        let mut pieces = HashMap::with_capacity(by_text.len());
        let (mut longest, mut by_word) = (0, true);
        // As in SentencePiece itself, control, unknown and byte tokens never come out of merging: otherwise a
        // text that spells `</s>` could end the conversation.
        let reserved = Attr::CONTROL | Attr::UNKNOWN | Attr::BYTE;
        for (&text, &id) in by_text {
            if let Some(byte) = byte_value(text) {
                let slot = &mut bytes[usize::from(byte)];
                // `<0x0A>` rather than `<0x0a>`, whatever the order of iteration.
                if slot.is_none() || !text.bytes().any(|b| b.is_ascii_lowercase() && b != b'x') {
                    *slot = Some(id);
                }
            }
            if !vocab.attr(id).has(reserved) {
                let score = vocab.scores.get(id as usize).copied().unwrap_or_default();
                // Adding zero turns -0.0 into 0.0, which `total_cmp` would tell apart.
                pieces.insert(text.into(), (id, score + 0.0));
                longest = longest.max(text.len());
                by_word &= first_word(text).len() == text.len();
            }
        }
        for (byte, slot) in (0u8..0x80).zip(&mut bytes) {
            if slot.is_none() {
                *slot = by_text.get(char::from(byte).encode_utf8(&mut [0; 4]) as &str).copied();
            }
        }
        Spm { pieces, longest, by_word, bytes, unk: vocab.roles.unk }
    }

    /// Appends the tokens of `text`, in which spaces are [`SPACE`] already.
    pub(super) fn encode(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        let mut rest = text;
        while !rest.is_empty() {
            let (word, after) = rest.split_at(if self.by_word { first_word(rest).len() } else { rest.len() });
            self.encode_word(word, scratch, out);
            rest = after;
        }
    }

    fn encode_word(&self, text: &str, scratch: &mut Scratch, out: &mut Vec<u32>) {
        let Scratch { symbols, queue } = scratch;
        fill(symbols, text);
        queue.clear();
        queue.extend((1..symbols.len()).filter_map(|right| self.merge(text, symbols, right - 1, right)));
        while let Some(best) = queue.pop() {
            let (left, right) = (symbols[best.left], symbols[best.right]);
            if left.len == 0 || right.len == 0 || left.len + right.len != best.len {
                continue; // one of them has been merged since
            }
            symbols[best.right].len = 0;
            symbols[best.left] = Symbol { len: best.len, next: right.next, id: Some(best.id), ..left };
            if right.next != NONE {
                symbols[right.next].prev = best.left;
            }
            queue.extend(self.merge(text, symbols, left.prev, best.left));
            queue.extend(self.merge(text, symbols, best.left, right.next));
        }
        for symbol in symbols.iter().filter(|s| s.len > 0) {
            self.emit(&text[symbol.start..symbol.start + symbol.len], symbol.id, out);
        }
    }

    fn merge(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Merge> {
        if left == NONE || right == NONE {
            return None;
        }
        let (l, r) = (symbols[left], symbols[right]);
        let len = l.len + r.len;
        if len > self.longest {
            return None;
        }
        let &(id, score) = self.pieces.get(&text[l.start..l.start + len])?;
        Some(Merge { score, left, right, len, id })
    }

    fn emit(&self, piece: &str, id: Option<u32>, out: &mut Vec<u32>) {
        if let Some(id) = id.or_else(|| self.pieces.get(piece).map(|p| p.0)) {
            out.push(id);
            return;
        }
        out.extend(piece.bytes().filter_map(|b| self.bytes[usize::from(b)].or(self.unk)));
    }
}

/// `text` up to where a space follows another character.
fn first_word(text: &str) -> &str {
    let spaces = text.len() - text.trim_start_matches(SPACE).len();
    match text[spaces..].find(SPACE) {
        Some(end) => &text[..spaces + end],
        None => text,
    }
}

/// One symbol per character, linked.
fn fill(symbols: &mut Vec<Symbol>, text: &str) {
    symbols.clear();
    symbols.extend(text.char_indices().enumerate().map(|(i, (start, c))| Symbol {
        start,
        len: c.len_utf8(),
        prev: i.checked_sub(1).unwrap_or(NONE),
        next: i + 1,
        id: None,
    }));
    if let Some(last) = symbols.last_mut() {
        last.next = NONE;
    }
}
