//! What the fuzz targets do with their input. The same functions run over the committed seeds
//! and findings in the ordinary test suite (`tests/tests/fuzz_seeds.rs`).

use std::{
    collections::HashSet,
    sync::{Arc, OnceLock},
};

use lory_kernels::{Backend, QuantType, backend::KvType, ops::Reference};
use lory_models::{
    Tensor,
    adapter::{
        BaseInfo, Site, gguf_lora,
        pack::Pack,
        peft::{PeftAdapter, PermutedHeads},
        synthetic_base,
    },
    chat::{ChatTemplate, Message, RenderOptions},
    decoder::Decoder,
    gguf::{Array, Gguf, Metadata, Value, Writer},
    tokenizer::{DecodeOptions, Detokenizer, EncodeOptions, Tokenizer},
};

#[allow(dead_code)]
#[path = "../../src/runner.rs"]
mod runner;
use runner::Runner;

/// One GGUF file: parsed, every tensor touched at both ends; what was accepted is written out,
/// and what was written reads back as the same.
pub fn gguf(data: &[u8]) {
    let Ok(file) = parse(data) else { return };
    for info in file.tensors() {
        let tensor = file.tensor(&info.name).expect("an accepted tensor is there");
        let bytes = tensor.matrix().bytes();
        assert_eq!(bytes.len(), info.byte_range().len());
        std::hint::black_box((bytes.first(), bytes.last()));
    }
    let again = rewrite(&file);
    let read = parse(&again).expect("what was written is sound");
    assert_eq!(file.tensors().len(), read.tensors().len());
    assert_eq!(again, rewrite(&read));
}

/// One GGUF file as a LoRA adapter of a small model, as a pack of adapters (whose hashes are not
/// looked at while fuzzing), and as a base model's description.
pub fn adapter(data: &[u8]) {
    let Ok(file) = parse(data) else { return };
    if let Ok(adapter) = gguf_lora::load("fuzz", &file, base()) {
        for (site, _) in adapter.cores() {
            assert!(adapter.core(*site).is_some());
        }
    }
    std::hint::black_box(BaseInfo::from_gguf(&file).is_ok());
    let Ok(pack) = Pack::parse(file, vec![]) else { return };
    for name in pack.names() {
        assert!(pack.contains(name));
        // What is known of a damaged record is an error too; neither may crash.
        std::hint::black_box((pack.info(name).is_ok(), pack.adapter(name).is_ok()));
    }
    std::hint::black_box(pack.verify().is_ok());
}

/// The two files of a PEFT folder ([`peft_of`]): what is accepted becomes an adapter of a small model, of finite numbers.
pub fn peft(data: &[u8]) {
    let Ok(adapter) = peft_of(data) else { return };
    let weights = |site: Site| {
        let shape = base().shapes.get(site)?;
        let (rows, cols) = match site {
            // A line for each token.
            Site::TOKEN_EMBD => (shape.in_features, shape.out_features),
            _ => (shape.out_features, shape.in_features),
        };
        let ones = 1f32.to_le_bytes().repeat(rows * cols);
        Some(Tensor::owned("ones", QuantType::F32, rows, cols, ones).expect("so many bytes"))
    };
    let Ok(adapter) = adapter.into_adapter(base(), weights) else { return };
    for (site, _) in adapter.cores() {
        assert!(adapter.core(*site).is_some());
    }
}

/// The small model that adapters are for.
pub fn base() -> &'static BaseInfo {
    static BASE: OnceLock<BaseInfo> = OnceLock::new();
    BASE.get_or_init(|| synthetic_base(2, 32, 16, 64, 40))
}

/// The PEFT target's input: the length of the configuration (2 bytes, little-endian; its highest bit says that the base keeps q and k for
/// interleaved rotation), the configuration, the weights.
pub fn peft_of(data: &[u8]) -> Result<PeftAdapter, String> {
    let (length, rest) = data.split_first_chunk::<2>().ok_or("too short")?;
    let length = u16::from_le_bytes(*length);
    let permuted = (length >> 15 == 1).then_some(PermutedHeads { n_heads: 4, n_kv_heads: 2 });
    let (config, weights) = rest.split_at_checked(usize::from(length & 0x7fff)).ok_or("too short")?;
    let weights = Arc::new(weights.to_vec());
    PeftAdapter::read("fuzz", config, weights, base(), permuted).map_err(|e| e.to_string())
}

/// A chat template: the first byte chooses what it is given, the rest is its source. What is accepted gives a text or an error, and the same twice.
pub fn template(data: &[u8]) {
    let Some((&given, source)) = data.split_first() else { return };
    let Ok(template) = ChatTemplate::new(&String::from_utf8_lossy(source), "fuzz") else { return };
    let template = template.with_tokens((given & 1 != 0).then_some("<s>"), Some("</s>"));
    let call =
        serde_json::json!([{ "type": "function", "function": { "name": "add", "arguments": { "a": 1 } } }]);
    let messages = [
        Message::new("system", "Be \"brief\".\n"),
        Message::new("user", "1 + 1? <s>"),
        Message::new("assistant", "").with("tool_calls", call),
        Message::new("tool", "2").with("name", "add"),
        Message::new("user", serde_json::json!([{ "type": "text", "text": "日本" }])),
    ];
    let messages = &messages[..messages.len().min(usize::from(given >> 5))];
    let options = RenderOptions {
        add_generation_prompt: given & 2 != 0,
        tools: (given & 4 != 0).then(|| serde_json::json!([{ "name": "add", "parameters": {} }])),
        now: (given & 8 != 0).then_some(1_700_000_000),
        ..RenderOptions::default()
    };
    let text = template.render(messages, &options).map_err(|e| e.to_string());
    assert_eq!(text, template.render(messages, &options).map_err(|e| e.to_string()));
}

/// One GGUF file as a model: what is accepted runs.
pub fn model(data: &[u8]) {
    let Ok(file) = parse(data) else { return };
    let Ok(decoder) = Decoder::load(&file, 64) else { return };
    // As the engine does when it opens a model.
    if !decoder.weights().matrices().all(|t| Reference.supports(t.ty())) {
        return;
    }
    let last = decoder.vocab_size() as u32 - 1;
    let logits = Runner::new(&Reference, &decoder, 2, KvType::F32).logits(&[0, last, 0]);
    assert_eq!(logits.len(), 3 * decoder.vocab_size());
}

/// A vocabulary and a text, see [`TokenizerInput`].
pub fn tokenizer(data: &[u8]) {
    let Some(input) = TokenizerInput::read(data) else { return };
    let Ok(tokenizer) = tokenizer_of(data) else { return };
    let tokenizer = Arc::new(tokenizer);
    encode_and_decode(&tokenizer, &input.text, input.lossless());
    // Ids that no encoder gave, past the end included.
    let ids: Vec<u32> = input.text.bytes().map(u32::from).chain([u32::MAX]).collect();
    std::hint::black_box(tokenizer.decode(&ids));
}

/// A text through one of the pre-tokenizers, which take too long to compile for every input:
/// the first byte chooses, the rest is the text.
pub fn pretokenizer(data: &[u8]) {
    static ALL: OnceLock<Vec<Arc<Tokenizer>>> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let build = |pre: &&'static str| {
            let vocab = b"\xfeh e\xff\xfehe l\xff\xfe\xc4\xa0 w\xff\xfe1 2\xff";
            let input =
                TokenizerInput { flags: ALL_BYTES | COMPLETE, ids: 0, pre, text: String::new(), vocab };
            Arc::new(Tokenizer::from_metadata(&input.metadata().expect("keys")).expect("a vocabulary"))
        };
        PRE.iter().map(build).collect()
    });
    let Some((&first, text)) = data.split_first() else { return };
    encode_and_decode(&all[usize::from(first) % all.len()], &String::from_utf8_lossy(text), true);
}

/// Ids are in range, streaming gives what decoding gives, and where nothing is special, the text.
fn encode_and_decode(tokenizer: &Arc<Tokenizer>, text: &str, lossless: bool) {
    for (add_special, parse_special) in [(false, false), (true, true)] {
        let ids = tokenizer.encode(text, EncodeOptions { add_special, parse_special });
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
        let options = DecodeOptions { special: parse_special, continuation: false };
        let whole = tokenizer.decode_with(&ids, options);
        let mut stream = Detokenizer::new(tokenizer.clone(), options);
        let mut pieces: String = ids.iter().map(|&id| stream.push(id)).collect();
        pieces += &stream.finish();
        assert_eq!(whole, pieces);
        if lossless && !add_special {
            assert_eq!(whole, text);
        }
    }
}

/// The tokenizer of an input's vocabulary, which a seed must have.
pub fn tokenizer_of(data: &[u8]) -> Result<Tokenizer, String> {
    let input = TokenizerInput::read(data).ok_or("too short")?;
    let metadata = input.metadata().ok_or("no vocabulary")?;
    Tokenizer::from_metadata(&metadata).map_err(|e| e.to_string())
}

fn parse(data: &[u8]) -> lory_models::Result<Gguf> {
    Gguf::parse(vec![("fuzz.gguf".into(), Arc::new(data.to_vec()))])
}

fn rewrite(file: &Gguf) -> Vec<u8> {
    let mut w = Writer::new();
    for (key, value) in file.metadata().iter() {
        match value {
            Value::U32(alignment) if key == "general.alignment" => w.set_alignment(*alignment),
            _ => w.set(key, value.clone()),
        };
    }
    for t in file.tensors() {
        w.tensor(&t.name, t.ty, &t.dims);
    }
    let mut out = w.start(Vec::new()).expect("accepted declarations can be written");
    for t in file.tensors() {
        let tensor = file.tensor(&t.name).expect("an accepted tensor is there");
        out.tensor(&t.name, tensor.matrix().bytes()).expect("its data has its size");
    }
    out.finish().expect("every tensor was written")
}

/// The tokenizer target's input: flags (1 byte), special ids (1), length of the text (2,
/// little-endian), the text, and the vocabulary: a GGUF file, or records that end with 0xff.
///
/// A record is a merge (first byte 0xfe) or a token (first byte its type, second its score).
/// Mutations of records reach deeper than those of a GGUF file, where most break the container.
struct TokenizerInput<'a> {
    flags: u8,
    ids: u8,
    pre: &'static str,
    text: String,
    vocab: &'a [u8],
}

const GGUF_FILE: u8 = 1;
const SENTENCEPIECE: u8 = 2;
const ALL_BYTES: u8 = 4;
/// Tokens that merges need and the records lack are added, so that mutated merges are accepted.
const COMPLETE: u8 = 8;
const PRE: [&str; 18] = [
    "default",
    "llama-bpe",
    "dbrx",
    "glm4",
    "qwen2",
    "qwen35",
    "gpt-2",
    "smollm",
    "tekken",
    "gpt-4o",
    "deepseek-v3",
    "deepseek-coder",
    "deepseek-llm",
    "falcon",
    "bloom",
    "viking",
    "bailingmoe",
    "seed-coder",
];

impl<'a> TokenizerInput<'a> {
    fn read(data: &'a [u8]) -> Option<Self> {
        let (&[flags, ids, a, b], rest) = data.split_first_chunk::<4>()?;
        let (text, vocab) = rest.split_at_checked(u16::from_le_bytes([a, b]).into())?;
        Some(TokenizerInput { flags, ids, pre: "bloom", text: String::from_utf8_lossy(text).into(), vocab })
    }

    fn is(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Whether decoding must give the text back: byte-level, every byte a token, nothing special.
    fn lossless(&self) -> bool {
        let normal = |r: &[u8]| r.first().is_none_or(|&t| t == 1 || t == 0xfe);
        self.is(ALL_BYTES)
            && !self.is(GGUF_FILE | SENTENCEPIECE)
            && self.vocab.split(|&b| b == 0xff).all(normal)
    }

    fn metadata(&self) -> Option<Metadata> {
        if self.is(GGUF_FILE) {
            return parse(self.vocab).ok().map(|g| g.metadata().clone());
        }
        let (mut tokens, mut types, mut scores, mut merges) = (vec![], vec![], vec![], vec![]);
        if self.is(ALL_BYTES) {
            for byte in 0..=255u8 {
                tokens.push(if self.is(SENTENCEPIECE) {
                    format!("<0x{byte:02X}>")
                } else {
                    byte_char(byte).into()
                });
                types.push(if self.is(SENTENCEPIECE) { 6 } else { 1 });
                scores.push(0.0);
            }
        }
        for record in self.vocab.split(|&b| b == 0xff) {
            match record {
                [0xfe, merge @ ..] => merges.push(String::from_utf8_lossy(merge).into_owned()),
                [ty, score, token @ ..] => {
                    tokens.push(String::from_utf8_lossy(token).into_owned());
                    types.push(i32::from(*ty));
                    scores.push(f32::from(*score as i8) / 4.0);
                }
                _ => {}
            }
        }
        if self.is(COMPLETE) {
            let mut known: HashSet<String> = tokens.iter().cloned().collect();
            for (left, right) in merges.iter().filter_map(|m| m.split_once(' ')) {
                for token in [left.to_string(), right.to_string(), format!("{left}{right}")] {
                    if known.insert(token.clone()) {
                        tokens.push(token);
                        types.push(1);
                        scores.push(0.0);
                    }
                }
            }
        }
        let mut m = Metadata::new("fuzz.gguf".into());
        let mut set = |key: &str, value: Value| m.insert(&format!("tokenizer.ggml.{key}"), value).ok();
        set("model", if self.is(SENTENCEPIECE) { "llama" } else { "gpt2" }.into())?;
        set("pre", self.pre.into())?;
        set("bos_token_id", u32::from(self.ids >> 4).into())?;
        set("eos_token_id", u32::from(self.ids & 7).into())?;
        set("unknown_token_id", u32::from(self.flags >> 5).into())?;
        set("tokens", tokens.into())?;
        set("token_type", Value::Array(Array::I32(types)))?;
        set("scores", scores.into())?;
        set("merges", merges.into())?;
        Some(m)
    }
}

/// GPT-2's printable stand-in for a byte.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let before = (0..byte).filter(|&b| !printable(b)).count() as u32;
    if printable(byte) { byte.into() } else { char::from_u32(256 + before).unwrap_or('?') }
}
