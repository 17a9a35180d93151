//! Small vocabularies built by hand: conformance, special tokens, and every class of malformed vocabulary.

use std::sync::Arc;

use super::*;

const PLAIN: EncodeOptions = EncodeOptions { add_special: false, parse_special: false };
const SPECIAL: EncodeOptions = EncodeOptions { add_special: true, parse_special: true };

/// Keys of a vocabulary, changed by the tests and then read.
#[derive(Clone)]
struct Keys(Vec<(&'static str, Value)>);

impl Keys {
    fn set(mut self, key: &'static str, value: Value) -> Keys {
        self.0.retain(|(k, _)| *k != key);
        self.0.push((key, value));
        self
    }

    fn without(mut self, key: &str) -> Keys {
        self.0.retain(|(k, _)| *k != key);
        self
    }

    fn meta(&self) -> Metadata {
        let mut meta = Metadata::new("v.gguf".into());
        for (key, value) in &self.0 {
            meta.insert(key, value.clone()).unwrap();
        }
        meta
    }

    fn build(&self) -> Tokenizer {
        Tokenizer::from_metadata(&self.meta()).unwrap()
    }

    /// The error's text, which must name the file and this key.
    fn fault(&self, key: &str) -> String {
        let text = Tokenizer::from_metadata(&self.meta()).unwrap_err().to_string();
        assert!(text.starts_with(&format!("v.gguf: key `{key}`")), "{text}");
        text
    }
}

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const PRE: &str = "tokenizer.ggml.pre";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const EOS: &str = "tokenizer.ggml.eos_token_id";
const CHARSMAP: &str = "tokenizer.ggml.precompiled_charsmap";

fn text(s: &str) -> Value {
    Value::String(s.into())
}

fn strings(list: &[&str]) -> Value {
    Value::Array(Array::String(list.iter().map(|s| (*s).to_owned()).collect()))
}

fn ints(list: &[i32]) -> Value {
    Value::Array(Array::I32(list.to_vec()))
}

/// SentencePiece: `<unk> <s> </s>`, all bytes from 3, then words from 259.
fn spm() -> Keys {
    let words = ["▁", "a", "b", "▁a", "ab", "▁ab", "/", "s>", "</", "<|user|>", "▁▁"];
    let scores = [-5.0, -6.0, -7.0, -2.0, -1.0, -3.0, -8.0, -0.1, -0.1, 0.0, -4.0];
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    tokens.extend(words.map(String::from));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 1]);
    let mut all_scores = vec![0.0; 259];
    all_scores.extend(scores);
    Keys(vec![
        (MODEL, text("llama")),
        (TOKENS, Value::Array(Array::String(tokens))),
        (TYPES, ints(&types)),
        (SCORES, Value::Array(Array::F32(all_scores))),
    ])
}

/// Byte-level BPE: the 256 bytes in order of value, four merges, `<|endoftext|>` and `<|im_end|>`.
fn bpe() -> Keys {
    let mut tokens: Vec<String> = (0..=255).map(|b| bpe::byte_to_char(b).to_string()).collect();
    tokens.extend(["he", "ll", "hell", "Ġhe", "<|endoftext|>", "<|im_end|>"].map(String::from));
    let mut types = vec![1; 260];
    types.extend([3, 3]);
    Keys(vec![
        (MODEL, text("gpt2")),
        (PRE, text("gpt-2")),
        (TOKENS, Value::Array(Array::String(tokens))),
        (TYPES, ints(&types)),
        (MERGES, strings(&["h e", "l l", "he ll", "Ġ he"])),
        (EOS, Value::U32(260)),
    ])
}

#[test]
fn spm_merges_by_score_and_falls_back_to_bytes() {
    let t = spm().build();
    // "▁ab": `ab` (-1) before `▁a` (-2), then the whole.
    assert_eq!(t.encode("ab", PLAIN), [264]);
    assert_eq!(t.encode("ba", PLAIN), [259, 261, 260]);
    assert_eq!(t.encode("é", PLAIN), [259, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(t.encode("", SPECIAL), [1]);
    assert_eq!(t.encode("ab", SPECIAL), [1, 264]);
}

#[test]
fn spm_merges_across_words_where_a_piece_does() {
    let Value::Array(Array::String(mut tokens)) = spm().0[1].1.clone() else { panic!() };
    tokens.push("b▁a".into());
    let Value::Array(Array::F32(mut scores)) = spm().0[3].1.clone() else { panic!() };
    scores.push(-0.5);
    let across =
        spm().set(TOKENS, Value::Array(Array::String(tokens))).set(SCORES, Value::Array(Array::F32(scores)));
    let t = across.without(TYPES).set("tokenizer.ggml.add_space_prefix", Value::Bool(false)).build();
    // `▁a` (-2) first, then `b▁a` (-0.5): the piece spans two words.
    assert_eq!(t.encode("b a", PLAIN), [270]);
    let within = spm().set("tokenizer.ggml.add_space_prefix", Value::Bool(false)).build();
    assert_eq!(within.encode("b a  ab", PLAIN), [261, 262, 259, 264]);
}

#[test]
fn spm_prefixes_a_space_after_each_special_token() {
    let t = spm().build();
    // User-defined: found without `parse_special`.
    assert_eq!(t.encode("a<|user|>a", PLAIN), [262, 268, 262]);
    let bare = spm().set("tokenizer.ggml.add_space_prefix", Value::Bool(false)).build();
    assert_eq!(bare.encode("a<|user|>a", PLAIN), [260, 268, 260]);
    assert_eq!(bare.decode(&[262]), " a");
}

#[test]
fn text_cannot_spell_a_control_token() {
    let t = spm().build();
    // `</` + `s>` would be the best merge of all.
    assert_eq!(t.encode("</s>", PLAIN), [259, 267, 266]);
    assert_eq!(t.encode("</s>", SPECIAL), [1, 2]);
    let b = bpe().build();
    assert!(b.encode("<|im_end|>", PLAIN).iter().all(|&id| id < 260));
    assert_eq!(b.encode("<|im_end|>", SPECIAL), [261]);
}

#[test]
fn spm_decodes_as_llama_cpp_does() {
    let t = spm().build();
    assert_eq!(t.decode(&[262, 262]), "a a");
    assert_eq!(t.decode(&[269]), " ");
    // The first token takes the stripping, even if it is hidden.
    assert_eq!(t.decode(&[1, 262]), " a");
    assert_eq!(
        t.decode_with(&[1, 262, 2], DecodeOptions { special: true, continuation: false }),
        "<s> a</s>"
    );
    assert_eq!(t.decode_with(&[262], DecodeOptions { special: false, continuation: true }), " a");
    assert_eq!(t.decode(&[3 + 0xc3]), "\u{fffd}");
    assert_eq!(t.decode(&[9999]), "");
    assert_eq!(t.token_bytes(264).unwrap().as_ref(), b" ab");
    assert_eq!((t.token_text(264), t.token_bytes(9999)), (Some("▁ab"), None));
}

#[test]
fn bpe_merges_by_rank() {
    let t = bpe().build();
    assert_eq!(t.encode("hello", PLAIN), [258, u32::from(b'o')]);
    assert_eq!(t.encode(" hell", PLAIN), [u32::from(b' '), 258]);
    assert_eq!(t.encode(" he", PLAIN), [259]);
    assert_eq!(t.encode("é", PLAIN), [0xc3, 0xa9]);
    assert_eq!(t.decode(&[258, 259]), "hell he");
    assert_eq!((t.bos(), t.add_bos(), t.eos(), t.eot()), (None, false, Some(260), Some(261)));
    assert_eq!(t.eog().collect::<Vec<_>>(), [260, 261]);
}

#[test]
fn ignore_merges_takes_whole_words() {
    let words = bpe().set(PRE, text("llama-bpe")).set(BOS, Value::U32(260));
    let Value::Array(Array::String(mut tokens)) = words.0.iter().find(|k| k.0 == TOKENS).unwrap().1.clone()
    else {
        panic!()
    };
    tokens.push("Ġxyz".into());
    let t = words.set(TOKENS, Value::Array(Array::String(tokens.clone()))).without(TYPES).build();
    assert_eq!(t.encode(" xyz", SPECIAL), [260, 262]);
    let merged = bpe().set(TOKENS, Value::Array(Array::String(tokens))).without(TYPES).build();
    assert_eq!(merged.encode(" xyz", PLAIN), [0x20, 0x78, 0x79, 0x7a]);
}

#[test]
fn streams_hold_back_half_characters() {
    let t = Arc::new(spm().build());
    let mut stream = Detokenizer::new(Arc::clone(&t), DecodeOptions::default());
    let ids = t.encode("a🦙b", PLAIN);
    let parts: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(parts, ["a", "", "", "", "🦙", "b"]);
    stream.push(3 + 0xf0);
    assert_eq!(stream.finish(), "\u{fffd}");
}

#[test]
fn phi_3_strips_after_special_tokens() {
    let phi = spm().set("general.name", text("Phi-3 mini")).build();
    assert_eq!(phi.encode("<|user|> \n a", PLAIN), [268, 262]);
    let parse = EncodeOptions { add_special: false, parse_special: true };
    assert_eq!(phi.encode("<s> a", parse), [1, 259, 262]);
}

#[test]
fn harmony_keeps_end_and_shows_channels() {
    let Value::Array(Array::String(mut tokens)) = bpe().0[2].1.clone() else { panic!() };
    tokens.extend(["<|return|>", "<|call|>", "<|end|>", "<|channel|>"].map(String::from));
    let t = bpe().set(TOKENS, Value::Array(Array::String(tokens))).without(TYPES).build();
    assert!(t.is_eog(262) && t.is_eog(263) && !t.is_eog(264));
    assert!(!t.is_control(265));
}

#[test]
fn v1_token_texts() {
    let long = "x".repeat(70_000);
    assert!(spm().set(TOKENS, strings(&["a", &long])).fault(TOKENS).contains("token 1 has 70000 bytes"));
    assert!(spm().set(TOKENS, strings(&["a", ""])).fault(TOKENS).contains("token 1 is empty"));
    spm().set(TOKENS, strings(&[])).fault(TOKENS);
    spm().without(TOKENS).fault(TOKENS);
    // As a normal token it is long but sound.
    let long = [spm(), spm().set(TYPES, ints(&[vec![1; 270], vec![4]].concat()))].map(|keys| {
        let Value::Array(Array::String(mut tokens)) =
            keys.0.iter().find(|k| k.0 == TOKENS).unwrap().1.clone()
        else {
            panic!()
        };
        tokens.push("x".repeat(5000));
        keys.set(TOKENS, Value::Array(Array::String(tokens))).without(SCORES)
    });
    assert_eq!(long[0].clone().without(TYPES).build().vocab_size(), 271);
    assert!(long[1].fault(TOKENS).contains("special token 270 has 5000 bytes"));
}

#[test]
fn v2_element_types() {
    spm().set(TOKENS, ints(&[1])).fault(TOKENS);
    assert!(spm().set(SCORES, strings(&["0"])).fault(SCORES).contains("an array of strings"));
    spm().set(SCORES, Value::F32(0.0)).fault(SCORES);
    spm().set(TYPES, Value::Array(Array::F32(vec![0.0; 270]))).fault(TYPES);
    assert!(
        spm().set(SCORES, Value::Array(Array::F32(vec![f32::NAN; 270]))).fault(SCORES).contains("element 0")
    );
    bpe().set(MERGES, ints(&[1])).fault(MERGES);
    bpe().set("tokenizer.ggml.add_bos_token", Value::U32(1)).fault("tokenizer.ggml.add_bos_token");
}

#[test]
fn v3_short_arrays() {
    assert!(
        spm()
            .set(SCORES, Value::Array(Array::F32(vec![0.0; 5])))
            .fault(SCORES)
            .contains("5 elements for 270 tokens")
    );
    assert!(spm().set(TYPES, ints(&[1; 5])).fault(TYPES).contains("5 elements for 270 tokens"));
}

#[test]
fn v4_ids_out_of_range() {
    for role in ["bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "fim_pad"] {
        let key: &'static str = format!("tokenizer.ggml.{role}_token_id").leak();
        assert!(
            spm().set(key, Value::U32(270)).fault(key).contains("is 270, but the vocabulary has 270"),
            "{role}"
        );
        spm().set(key, Value::I32(-7)).fault(key);
        spm().set(key, text("1")).fault(key);
    }
    // -1 of either width means none.
    assert_eq!(spm().set("tokenizer.ggml.padding_token_id", Value::U32(u32::MAX)).build().pad(), None);
    assert_eq!(spm().set(EOS, Value::I32(-1)).build().eos(), None);
}

#[test]
fn v5_duplicate_tokens() {
    assert!(
        spm().set(TOKENS, strings(&["a", "b", "a"])).fault(TOKENS).contains("tokens 0 and 2 are both \"a\"")
    );
    // What the parser makes of bytes that are no UTF-8 is one text for many.
    let Value::Array(Array::String(mut tokens)) = spm().0[1].1.clone() else { panic!() };
    tokens[268] = "\u{fffd}".into();
    tokens[269] = "\u{fffd}".into();
    let t = spm().set(TOKENS, Value::Array(Array::String(tokens))).build();
    assert_eq!(t.encode("ab", PLAIN), [264]);
}

#[test]
fn v6_byte_tokens() {
    for bad in ["<0x-1>", "<0xZZ>", "<0x+1>", "<0x123>", "<0x>", "0x0A", "<0x0A"] {
        let keys = Keys(vec![
            (MODEL, text("llama")),
            (TOKENS, strings(&["<unk>", "<s>", "</s>", bad])),
            (TYPES, ints(&[2, 3, 3, 6])),
        ]);
        assert!(keys.fault(TOKENS).contains("token 3 is a byte"), "{bad}");
    }
}

#[test]
fn v7_merges() {
    let merges = |list: &[&str]| bpe().set(MERGES, strings(list)).fault(MERGES);
    assert!(merges(&["h e", "hello"]).contains("element 1, \"hello\": has no space"));
    assert!(merges(&[""]).contains("has no space"));
    assert!(merges(&[" "]).contains("has no space"));
    assert!(merges(&["h "]).contains("\"\" is not a token"));
    assert!(merges(&["h €"]).contains("is not a token"));
    assert!(merges(&["h o"]).contains("\"ho\" is not a token"));
    assert!(merges(&["h e", "l l", "h e"]).contains("is element 0 again"));
    bpe().without(MERGES).fault(MERGES);
}

#[test]
fn v8_charsmaps() {
    let map = |bytes: &[u8]| spm().set(CHARSMAP, Value::Array(Array::U8(bytes.to_vec())));
    assert!(map(&[1, 2]).fault(CHARSMAP).contains("has 2 bytes"));
    map(&[]).fault(CHARSMAP);
    assert!(map(&[0xff; 8]).fault(CHARSMAP).contains("states a table of 4294967295 bytes"));
    map(&[4, 0, 0, 0, 0, 0, 0, 0]).fault(CHARSMAP);
    spm().set(CHARSMAP, strings(&["x"])).fault(CHARSMAP);
    assert!(map(&[4, 0, 0, 0, 0, 0, 0, 0, 0]).fault(CHARSMAP).contains("not implemented"));
}

#[test]
fn v9_bos_wanted_but_missing() {
    let wants = bpe().set("tokenizer.ggml.add_bos_token", Value::Bool(true));
    assert!(wants.fault(BOS).contains("is missing, but `tokenizer.ggml.add_bos_token` is true"));
    bpe().without(EOS).set("tokenizer.ggml.add_eos_token", Value::Bool(true)).fault(EOS);
    // Llama 3 wants one by default.
    bpe().set(PRE, text("llama-bpe")).fault(BOS);
}

#[test]
fn v10_text_lengths_are_not_narrowed() {
    // Lengths are `usize` throughout, so there is no negative and no wrapped one; what is left is that work stays in
    // proportion for the longest word and for the longest run of special tokens.
    let (s, b) = (spm().build(), bpe().build());
    for unit in ["a", "ab", "h", "hell", "<|user|>", "<|im_end|>", "\u{2581}"] {
        let long = unit.repeat(200_000 / unit.len());
        for t in [&s, &b] {
            let ids = t.encode(&long, EncodeOptions { add_special: false, parse_special: true });
            let shown = t.decode_with(&ids, DecodeOptions { special: true, continuation: false });
            // U+2581 is the vocabulary's own space.
            if unit != "\u{2581}" {
                assert_eq!(shown.replace("> ", ">"), long);
            }
        }
    }
}

#[test]
fn v11_pre_tokenizers() {
    let unknown = bpe().set(PRE, text("no-such-pre")).fault(PRE);
    assert!(
        unknown.contains("unknown pre-tokenizer \"no-such-pre\"; known: ") && unknown.contains("qwen2"),
        "{unknown}"
    );
    let missing = bpe().without(PRE).fault(PRE);
    assert!(missing.contains("is missing") && missing.contains("llama-bpe"), "{missing}");
}

#[test]
fn other_kinds_are_refused_by_name() {
    for kind in ["t5", "bert", "rwkv", "none", "gemma4"] {
        let error = Tokenizer::from_metadata(&spm().set(MODEL, text(kind)).meta()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains(kind), "{error}");
    }
    spm().without(MODEL).fault(MODEL);
}

#[test]
fn random_text_survives_the_round_trip() {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let alphabet: Vec<char> = "ab hel\n\t'sd19<|/>é▁Ġ狐\u{301}\u{200d}🦙\u{0}\u{7f}\u{a0}".chars().collect();
    let (s, b) = (spm().build(), bpe().build());
    for _ in 0..2_000 {
        let n = next() % 24;
        let text: String = (0..n)
            .map(|_| match next() % 4 {
                0 => char::from_u32((next() % 0x11_0000) as u32).unwrap_or('x'),
                _ => alphabet[(next() % alphabet.len() as u64) as usize],
            })
            .collect();
        assert_eq!(b.decode(&b.encode(&text, PLAIN)), text);
        // SentencePiece cannot tell U+2581 from a space.
        assert_eq!(s.decode(&s.encode(&text, PLAIN)), text.replace('▁', " "));
    }
}
