//! The vocabulary as a GGUF file states it: texts, scores, attributes, special ids, and which tokens end a generation.

use std::{
    collections::{BTreeSet, HashMap, hash_map::Entry},
    ops::BitOr,
};

use crate::{
    Result,
    gguf::{Array, Metadata, Value},
};

/// Longest token text in bytes. Real vocabularies stay below 2 KiB; it bounds the work per character of input.
const MAX_TOKEN_LEN: usize = 65_535;

/// What a token is: GGUF's `token_type` as a bit set, with the strip rules that some models add.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Attr(u16);

impl Attr {
    pub(super) const UNKNOWN: Attr = Attr(1);
    pub(super) const UNUSED: Attr = Attr(2);
    pub(super) const NORMAL: Attr = Attr(4);
    pub(super) const CONTROL: Attr = Attr(8);
    pub(super) const USER_DEFINED: Attr = Attr(16);
    pub(super) const BYTE: Attr = Attr(32);
    /// White space before it belongs to it.
    pub(super) const LSTRIP: Attr = Attr(64);
    /// White space after it belongs to it.
    pub(super) const RSTRIP: Attr = Attr(128);

    /// Whether any bit of `other` is set.
    pub(super) fn has(self, other: Attr) -> bool {
        self.0 & other.0 != 0
    }

    fn set(&mut self, other: Attr, value: bool) {
        self.0 = if value { self.0 | other.0 } else { self.0 & !other.0 };
    }

    fn from_gguf(token_type: i64) -> Attr {
        match token_type {
            1 => Attr::NORMAL,
            2 => Attr::UNKNOWN,
            3 => Attr::CONTROL,
            4 => Attr::USER_DEFINED,
            5 => Attr::UNUSED,
            6 => Attr::BYTE,
            _ => Attr(0),
        }
    }
}

impl BitOr for Attr {
    type Output = Attr;

    fn bitor(self, other: Attr) -> Attr {
        Attr(self.0 | other.0)
    }
}

/// Ids of the tokens with a role.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Roles {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) eot: Option<u32>,
    pub(super) eom: Option<u32>,
    pub(super) unk: Option<u32>,
    pub(super) sep: Option<u32>,
    pub(super) pad: Option<u32>,
}

/// Names under which models spell their end-of-turn token, as llama.cpp collects them.
const EOT_NAMES: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<｜end▁of▁sentence｜>",
    "<end_of_utterance>",
];

/// Further names that end a generation.
const EOG_NAMES: &[&str] = &[
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "</s>",
    "<|eom_id|>",
    "[EOS]",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "[e~[",
];

/// Names of the fill-in-the-middle tokens after which nothing sensible follows: padding, repository, file separator.
const FIM_END_NAMES: &[(&str, &[&str])] = &[
    ("tokenizer.ggml.fim_pad_token_id", &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"]),
    (
        "tokenizer.ggml.fim_rep_token_id",
        &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    ),
    ("tokenizer.ggml.fim_sep_token_id", &["<|file_sep|>"]),
];

/// Channel marks of gpt-oss: part of the answer's form, never hidden.
const SHOWN_NAMES: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// Texts by id and everything known about each.
#[derive(Debug)]
pub(super) struct Vocab {
    texts: Vec<String>,
    attrs: Vec<Attr>,
    pub(super) scores: Vec<f32>,
    pub(super) roles: Roles,
    pub(super) eog: BTreeSet<u32>,
}

/// Texts to ids; borrows from the metadata.
pub(super) type ByText<'m> = HashMap<&'m str, u32>;

impl Vocab {
    /// Reads tokens, types, scores and roles. `sentencepiece` gives the default ids 1, 2, 0 for bos, eos, unk.
    pub(super) fn read(meta: &Metadata, sentencepiece: bool) -> Result<(Vocab, ByText<'_>)> {
        let key = "tokenizer.ggml.tokens";
        let tokens = meta.opt_strings(key)?.ok_or_else(|| meta.error(key, "is missing"))?;
        if tokens.is_empty() {
            return Err(meta.error(key, "has no element"));
        }
        if u32::try_from(tokens.len()).is_err() {
            return Err(meta.error(key, format!("has {} elements, more than ids", tokens.len())));
        }
        let by_text = index(meta, key, tokens)?;
        let attrs = read_types(meta, tokens)?;
        let scores = read_scores(meta, tokens.len())?;
        let mut vocab =
            Vocab { texts: tokens.to_vec(), attrs, scores, roles: Roles::default(), eog: BTreeSet::new() };
        vocab.roles = read_roles(meta, tokens.len(), sentencepiece)?;
        vocab.find_ends(meta, &by_text)?;
        vocab.strip_rules(meta, &by_text)?;
        Ok((vocab, by_text))
    }

    /// Number of tokens.
    pub(super) fn len(&self) -> usize {
        self.texts.len()
    }

    /// The text as the file has it.
    pub(super) fn text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(String::as_str)
    }

    /// The attributes; none for an id out of range.
    pub(super) fn attr(&self, id: u32) -> Attr {
        self.attrs.get(id as usize).copied().unwrap_or_default()
    }

    /// Ids with any of these attributes, ascending.
    pub(super) fn ids_with(&self, attr: Attr) -> impl Iterator<Item = (u32, Attr)> {
        (0..).zip(self.attrs.iter().copied()).filter(move |(_, a)| a.has(attr))
    }

    fn mark(&mut self, id: u32, attr: Attr, value: bool) {
        if let Some(a) = self.attrs.get_mut(id as usize) {
            a.set(attr, value);
        }
    }

    fn replace(&mut self, id: u32, attr: Attr) {
        if let Some(a) = self.attrs.get_mut(id as usize) {
            *a = attr;
        }
    }

    /// Collects the tokens that end a generation. Files seldom say, so names count too, as in llama.cpp.
    fn find_ends(&mut self, meta: &Metadata, by_text: &ByText) -> Result<()> {
        for &(key, names) in FIM_END_NAMES {
            let named = names.iter().find_map(|n| by_text.get(n).copied());
            if let Some(id) = read_id(meta, key, self.len())?.unwrap_or(named) {
                self.eog.insert(id);
                self.mark(id, Attr::CONTROL, true);
            }
        }
        if self.roles.eot.is_none() {
            self.roles.eot = EOT_NAMES.iter().find_map(|n| by_text.get(n).copied());
        }
        if self.roles.eom.is_none() {
            self.roles.eom = by_text.get("<|eom_id|>").copied();
        }
        for name in EOT_NAMES.iter().chain(EOG_NAMES) {
            if let Some(&id) = by_text.get(name) {
                self.eog.insert(id);
                // Some conversions left such a token a normal one; a user's text could then end the turn.
                self.mark(id, Attr::CONTROL, true);
            }
        }
        for name in SHOWN_NAMES {
            if let Some(&id) = by_text.get(name) {
                self.replace(id, Attr::USER_DEFINED);
            }
        }
        self.eog.extend([self.roles.eos, self.roles.eot, self.roles.eom].into_iter().flatten());
        self.unmark_ends(by_text);
        Ok(())
    }

    /// Two families use an ending's name for something else.
    fn unmark_ends(&mut self, by_text: &ByText) {
        let ends = |v: &Vocab, name: &str| by_text.get(name).copied().filter(|id| v.eog.contains(id));
        let call = ends(self, "<|call|>").or(ends(self, "<|calls|>")).is_some();
        let whole = ends(self, "<|return|>").or(ends(self, "<|flush|>")).is_some();
        if let (true, true, Some(end)) = (call, whole, ends(self, "<|end|>")) {
            self.eog.remove(&end);
            self.replace(end, Attr::USER_DEFINED);
        }
        let markup = ends(self, "<|tool_response>").or(ends(self, "<|plamo:eos|>")).is_some();
        if let (true, Some(s)) = (markup, ends(self, "</s>")) {
            self.eog.remove(&s);
            self.replace(s, Attr::NORMAL);
        }
    }

    /// Phi-3 swallows the white space after its special tokens; the file does not say so, only its name does.
    fn strip_rules(&mut self, meta: &Metadata, by_text: &ByText) -> Result<()> {
        let name = meta.opt_str("general.name")?.unwrap_or_default().to_lowercase();
        if !(name.contains("phi-3") || name.contains("phi3")) {
            return Ok(());
        }
        let special = Attr::CONTROL | Attr::USER_DEFINED | Attr::UNKNOWN;
        let ids: Vec<u32> =
            self.ids_with(special).map(|(id, _)| id).chain(by_text.get("</s>").copied()).collect();
        for id in ids {
            self.mark(id, Attr::RSTRIP, true);
        }
        for name in ["<unk>", "<s>", "<|endoftext|>"] {
            if let Some(&id) = by_text.get(name) {
                self.mark(id, Attr::RSTRIP, false);
            }
        }
        Ok(())
    }
}

fn index<'m>(meta: &Metadata, key: &str, tokens: &'m [String]) -> Result<ByText<'m>> {
    let mut by_text = HashMap::with_capacity(tokens.len());
    for (id, text) in (0u32..).zip(tokens) {
        if text.is_empty() {
            return Err(meta.error(key, format!("token {id} is empty")));
        }
        if text.len() > MAX_TOKEN_LEN {
            let message = format!("token {id} has {} bytes, more than {MAX_TOKEN_LEN}", text.len());
            return Err(meta.error(key, message));
        }
        match by_text.entry(text.as_str()) {
            Entry::Vacant(free) => {
                free.insert(id);
            }
            // Texts that were no UTF-8, and different perhaps, look alike.
            Entry::Occupied(_) if text.contains(char::REPLACEMENT_CHARACTER) => {}
            Entry::Occupied(first) => {
                let message = format!("tokens {} and {id} are both {}", first.get(), quoted(text));
                return Err(meta.error(key, message));
            }
        }
    }
    Ok(by_text)
}

fn read_types(meta: &Metadata, tokens: &[String]) -> Result<Vec<Attr>> {
    let key = "tokenizer.ggml.token_type";
    let Some(types) = meta.opt_ints(key)? else { return Ok(vec![Attr::NORMAL; tokens.len()]) };
    if types.len() < tokens.len() {
        return Err(meta.error(key, shorter(types.len(), tokens.len())));
    }
    let attrs: Vec<Attr> = types.iter().take(tokens.len()).map(|&t| Attr::from_gguf(t)).collect();
    for ((id, attr), text) in (0u32..).zip(&attrs).zip(tokens) {
        if attr.has(Attr::BYTE) && byte_value(text).is_none() {
            let message =
                format!("token {id} is a byte, but its text {} is not `<0x00>` to `<0xFF>`", quoted(text));
            return Err(meta.error("tokenizer.ggml.tokens", message));
        }
    }
    Ok(attrs)
}

fn read_scores(meta: &Metadata, n: usize) -> Result<Vec<f32>> {
    let key = "tokenizer.ggml.scores";
    let scores: Vec<f32> = match meta.get(key) {
        None => return Ok(vec![0.0; n]),
        Some(Value::Array(Array::F32(a))) => a.clone(),
        Some(Value::Array(Array::I32(a))) => a.iter().map(|&s| s as f32).collect(),
        Some(other) => {
            let message = format!("is {}, expected an array of float32 or int32", type_of(other));
            return Err(meta.error(key, message));
        }
    };
    if scores.len() < n {
        return Err(meta.error(key, shorter(scores.len(), n)));
    }
    match scores.iter().position(|s| s.is_nan()) {
        Some(i) => Err(meta.error(key, format!("element {i} is not a number"))),
        None => Ok(scores),
    }
}

fn shorter(has: usize, n: usize) -> String {
    format!("has {has} elements for {n} tokens")
}

fn type_of(value: &Value) -> String {
    match value {
        Value::Array(Array::String(_)) => "an array of strings".into(),
        Value::Array(_) => "an array of another type".into(),
        other => other.type_name().into(),
    }
}

fn read_roles(meta: &Metadata, n: usize, sentencepiece: bool) -> Result<Roles> {
    let role = |name: &str, default: Option<u32>| {
        let default = default.filter(|&id| sentencepiece && (id as usize) < n);
        Ok::<_, crate::Error>(
            read_id(meta, &format!("tokenizer.ggml.{name}_token_id"), n)?.unwrap_or(default),
        )
    };
    Ok(Roles {
        bos: role("bos", Some(1))?,
        eos: role("eos", Some(2))?,
        eot: role("eot", None)?,
        eom: role("eom", None)?,
        unk: role("unknown", Some(0))?,
        // The key is misspelt in the format.
        sep: role("seperator", None)?,
        pad: role("padding", None)?,
    })
}

/// An id that must lie in the vocabulary. Outer `None`: no such key; inner `None`: -1, which files write for "none".
fn read_id(meta: &Metadata, key: &str, n: usize) -> Result<Option<Option<u32>>> {
    let Some(value) = meta.get(key) else { return Ok(None) };
    let Some(id) = value.as_i64() else {
        return Err(meta.error(key, format!("is {}, expected an integer", value.type_name())));
    };
    if id == -1 || id == i64::from(u32::MAX) {
        return Ok(Some(None));
    }
    match u32::try_from(id) {
        Ok(id) if (id as usize) < n => Ok(Some(Some(id))),
        _ => Err(meta.error(key, format!("is {id}, but the vocabulary has {n} tokens"))),
    }
}

/// The byte that `<0xHH>` stands for.
pub(super) fn byte_value(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // `from_str_radix` alone would take a sign.
    let digits = hex.len() == 2 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    if digits { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// A token's text for an error message: escaped, and not longer than a line.
pub(super) fn quoted(text: &str) -> String {
    let short: String = text.chars().take(40).collect();
    let dots = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{dots}")
}
