//! A byte-level BPE vocabulary of any size, made up.
//!
//! All 256 bytes are tokens, every further token is the merge of two earlier ones, so any text
//! encodes and decodes to itself; the merged tokens are pronounceable made-up words.

use std::collections::HashSet;

use super::rng::Rng;
use crate::gguf::{Array, Value, Writer};

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

/// Names and order as Llama 3 has them; the rest of the special tokens are reserved ones.
const SPECIAL: [&str; 10] = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
];

const TEMPLATE: &str = "{{- bos_token }}\
{%- for message in messages %}\
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}";

/// Sets `tokenizer.*` for a vocabulary of `size` tokens (at least 256 + 16).
pub(super) fn keys(w: &mut Writer, size: usize, seed: u64) {
    // Llama 3 has 256 of them; small vocabularies keep room for words.
    let specials = ((size.saturating_sub(256)) / 16).clamp(16, 256);
    let (mut tokens, merges) = words(size.saturating_sub(specials), seed);
    let mut types = vec![NORMAL; tokens.len()];
    let first = tokens.len() as u32;
    tokens.extend(SPECIAL.iter().map(|s| s.to_string()));
    tokens.extend((SPECIAL.len()..specials).map(|i| format!("<|reserved_special_token_{}|>", i - 7)));
    types.resize(tokens.len(), CONTROL);

    w.set("tokenizer.ggml.model", "gpt2")
        .set("tokenizer.ggml.pre", "llama-bpe")
        .set("tokenizer.ggml.tokens", tokens)
        .set("tokenizer.ggml.token_type", Value::Array(Array::I32(types)))
        .set("tokenizer.ggml.merges", merges)
        .set("tokenizer.ggml.bos_token_id", first)
        .set("tokenizer.ggml.eos_token_id", first + 1)
        .set("tokenizer.ggml.eot_token_id", first + 9)
        .set("tokenizer.ggml.add_bos_token", true)
        .set("tokenizer.chat_template", TEMPLATE);
}

/// The alphabet, its letters about as frequent as in English.
const LETTERS: &str = "eeeeeettttaaaaooooiiinnnsssrrrhhhddllcumfpgwybvkxjqz";

/// `n` tokens and the merges that lead to those after the first 256.
fn words(n: usize, seed: u64) -> (Vec<String>, Vec<String>) {
    let mut tokens: Vec<String> = (0..=255u8).map(|b| byte_char(b).to_string()).collect();
    let mut merges = Vec::with_capacity(n.saturating_sub(256));
    let mut known: HashSet<String> = tokens.iter().cloned().collect();
    // What may stand on the left (a space may open a word) and on the right of a merge; both are
    // limited in length, so that words stay short and rarely repeat.
    let mut right: Vec<String> = LETTERS.chars().map(String::from).collect();
    let mut left = right.clone();
    left.extend([byte_char(b' '); 6].map(String::from));
    let mut rng = Rng::new(seed, 0);
    while tokens.len() < n {
        let (Some(l), Some(r)) = (left.get(rng.below(left.len())), right.get(rng.below(right.len()))) else {
            break;
        };
        let word = format!("{l}{r}");
        if !alternates(&word) || !known.insert(word.clone()) {
            continue;
        }
        merges.push(format!("{l} {r}"));
        if word.len() <= 4 && word.is_ascii() {
            right.push(word.clone());
        }
        if word.len() <= 8 {
            left.push(word.clone());
        }
        tokens.push(word);
    }
    (tokens, merges)
}

/// At most two vowels or two consonants in a row.
fn alternates(word: &str) -> bool {
    let vowel = |c: &char| matches!(c, 'a' | 'e' | 'i' | 'o' | 'u');
    let letters: Vec<bool> = word.chars().filter(char::is_ascii).map(|c| vowel(&c)).collect();
    !letters.windows(3).any(|w| w.iter().all(|&v| v) || w.iter().all(|&v| !v))
}

/// GPT-2's printable stand-in for a byte: printable bytes are themselves, the others follow from
/// U+0100 on in their order (source: `bytes_to_unicode` of the GPT-2 encoder).
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    char::from_u32(256 + before).unwrap_or('?')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_map_as_gpt2_maps_them() {
        assert_eq!(byte_char(b' '), 'Ġ');
        assert_eq!(byte_char(b'\n'), 'Ċ');
        assert_eq!(byte_char(b'a'), 'a');
        assert_eq!(byte_char(0), 'Ā');
        assert_eq!(byte_char(0xad), 'Ń');
        assert_eq!((0..=255).map(byte_char).collect::<HashSet<_>>().len(), 256);
    }

    #[test]
    fn every_merge_joins_earlier_tokens() {
        let (tokens, merges) = words(5000, 3);
        assert_eq!((tokens.len(), merges.len()), (5000, 5000 - 256));
        let mut known: HashSet<&str> = tokens[..256].iter().map(|s| s.as_str()).collect();
        for (merge, token) in merges.iter().zip(&tokens[256..]) {
            let (l, r) = merge.split_once(' ').unwrap();
            assert!(known.contains(l) && known.contains(r), "{merge}");
            assert_eq!(format!("{l}{r}"), *token);
            assert!(known.insert(token), "{token} twice");
        }
    }

    #[test]
    fn the_largest_vocabulary_in_use_can_be_made() {
        let (tokens, _) = words(262_144, 1);
        assert_eq!(tokens.len(), 262_144);
    }
}
