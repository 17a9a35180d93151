//! Tokens back to text, one at a time, never half a character.

use std::sync::Arc;

use super::{DecodeOptions, Tokenizer};

/// Turns a stream of tokens into text. A token may end within a character; its bytes are held until the rest arrives.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    options: DecodeOptions,
    bytes: Vec<u8>,
    at_start: bool,
}

impl Detokenizer {
    /// Starts a stream.
    pub fn new(tokenizer: Arc<Tokenizer>, options: DecodeOptions) -> Self {
        Detokenizer { tokenizer, options, bytes: Vec::new(), at_start: true }
    }

    /// The text that `id` completes; empty while a character is incomplete, and for hidden or unknown ids.
    pub fn push(&mut self, id: u32) -> String {
        let strip = std::mem::take(&mut self.at_start) && self.tokenizer.strips_space(self.options);
        self.tokenizer.append_piece(id, self.options.special, strip, &mut self.bytes);
        let mut text = String::new();
        let used = take_text(&self.bytes, &mut text);
        self.bytes.drain(..used);
        text
    }

    /// Ends the stream; what is left of a character becomes U+FFFD.
    pub fn finish(mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned()
    }
}

/// Appends the characters of `bytes`, U+FFFD for what cannot become one, and returns how many bytes that took.
/// At most three are left: the beginning of a character.
fn take_text(bytes: &[u8], text: &mut String) -> usize {
    let mut used = 0;
    while let Some(rest) = bytes.get(used..) {
        let fault = match std::str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                return bytes.len();
            }
            Err(fault) => fault,
        };
        let valid = rest.get(..fault.valid_up_to()).unwrap_or_default();
        text.push_str(std::str::from_utf8(valid).unwrap_or_default());
        used += fault.valid_up_to();
        match fault.error_len() {
            None => return used,
            Some(bad) => {
                text.push(char::REPLACEMENT_CHARACTER);
                used += bad;
            }
        }
    }
    used
}

#[cfg(test)]
mod tests {
    use super::take_text;

    fn stream(chunks: &[&[u8]]) -> (Vec<String>, usize) {
        let (mut held, mut texts) = (Vec::new(), Vec::new());
        for chunk in chunks {
            held.extend_from_slice(chunk);
            let mut text = String::new();
            let used = take_text(&held, &mut text);
            held.drain(..used);
            texts.push(text);
        }
        (texts, held.len())
    }

    #[test]
    fn holds_an_incomplete_character() {
        let emoji = "🦙".as_bytes();
        let (texts, left) = stream(&[b"a", &emoji[..1], &emoji[1..3], &emoji[3..], b"b"]);
        assert_eq!(texts, ["a", "", "", "🦙", "b"]);
        assert_eq!(left, 0);
    }

    #[test]
    fn replaces_what_can_never_become_a_character() {
        let (texts, left) = stream(&[b"\xff", b"x", b"\xe2\x82", b"y", b"\xe2"]);
        assert_eq!(texts, ["\u{fffd}", "x", "", "\u{fffd}y", ""]);
        assert_eq!(left, 1);
    }
}
