//! What fast arithmetic costs in quality, end to end: the perplexity of texts under the vector kernels, which quantize
//! activations to 8 bits, against plain f32 arithmetic on the same weights.

use lory_kernels::{
    Backend, Cpu, QuantType, Reference,
    backend::KvType,
    cpu::Isa,
    quant::{dequantize_row, quantize_row},
};
use lory_models::{
    decoder::Decoder,
    gguf::Gguf,
    synth,
    tokenizer::{EncodeOptions, Tokenizer},
};
use lory_runtime::{Bare, BareOptions, random_tokens};
use lory_tests::{demo, edited::Edited, fixtures};

/// Every matrix of `gguf` in `ty`, where its rows are whole blocks.
fn in_format(gguf: &Gguf, ty: QuantType) -> Gguf {
    let mut edited = Edited::of(gguf);
    for info in gguf.tensors().filter(|t| t.dims.len() == 2 && t.cols().is_multiple_of(ty.block_len())) {
        let tensor = gguf.tensor(&info.name).unwrap();
        let mut weights = vec![0.0; info.elements()];
        dequantize_row(info.ty, tensor.matrix().bytes(), &mut weights).unwrap();
        let mut bytes = vec![0; ty.bytes_for(weights.len()).unwrap()];
        quantize_row(ty, &weights, &mut bytes).unwrap();
        edited = edited.tensor(&info.name, ty, &info.dims, bytes);
    }
    edited.gguf()
}

/// A sequence, of which the tokens from `from` on are to be predicted.
struct Text {
    tokens: Vec<u32>,
    from: usize,
}

/// Of all tokens that are to be predicted.
fn perplexity<B: Backend>(backend: &B, gguf: &Gguf, texts: &[Text]) -> f64 {
    let longest = texts.iter().map(|t| t.tokens.len()).max().unwrap();
    let decoder = Decoder::load(gguf, longest as u32).unwrap();
    let (mut nats, mut count) = (0.0, 0usize);
    for Text { tokens, from } in texts {
        let options = BareOptions { sequences: 1, tokens: longest, n_batch: 64, kv_type: KvType::F16 };
        let mut bare = Bare::new(backend, &decoder, options).unwrap();
        bare.score(0, tokens, &mut |i, logits| {
            let Some(next) = tokens.get(i + 1).filter(|_| i + 1 >= *from) else { return };
            let max = logits.iter().copied().fold(f32::MIN, f32::max);
            let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
            nats += sum.ln() - f64::from(logits[*next as usize] - max);
            count += 1;
        })
        .unwrap();
    }
    (nats / count as f64).exp()
}

/// The fast path on quantized weights against f32 arithmetic on the very same weights.
fn compare(name: &str, quantized: &Gguf, texts: &[Text]) -> f64 {
    let exact = perplexity(&Reference, &in_format(quantized, QuantType::F32), texts);
    let plain = perplexity(&Reference, quantized, texts);
    let fast = perplexity(&Cpu::new(Some(2), Isa::from_env().unwrap()), quantized, texts);
    println!(
        "{name}: f32 {exact:.4}, reference {:+.3} %, fast {:+.3} %",
        100.0 * (plain / exact - 1.0),
        100.0 * (fast / exact - 1.0)
    );
    assert!(exact.is_finite() && exact > 1.0, "{name}: {exact}");
    assert!((fast / plain - 1.0).abs() < 0.005, "{name}: fast {fast}, reference {plain}");
    assert!((fast / exact - 1.0).abs() < 0.005, "{name}: fast {fast}, f32 {exact}");
    exact
}

/// Stretches of up to 384 tokens of a text, one after the other, for stories260K.
fn stretches(tokenizer: &Tokenizer, text: &str, most: usize) -> Vec<Text> {
    let options = EncodeOptions { add_special: true, parse_special: false };
    let tokens = tokenizer.encode(text, options);
    let texts = tokens.chunks(384).filter(|t| t.len() > 1).take(most);
    texts.map(|tokens| Text { tokens: tokens.to_vec(), from: 1 }).collect()
}

#[test]
fn perplexity_of_a_trained_model_stays() {
    let Some(path) = fixtures::shared_data("models/stories260K.gguf") else { return };
    let gguf = fixtures::gguf(&path);
    let tokenizer = Tokenizer::from_metadata(gguf.metadata()).unwrap();
    for text in ["eval/tinystories_sample.txt", "eval/wiki.test.raw"] {
        let Some(path) = fixtures::shared_data(text) else { continue };
        let bytes = std::fs::read(path).unwrap();
        let begin = String::from_utf8_lossy(&bytes[..bytes.len().min(8000)]).into_owned();
        let texts = stretches(&tokenizer, &begin, 1);
        for ty in [QuantType::Q8_0, QuantType::Q4_0, QuantType::BF16, QuantType::F16] {
            let ppl = compare(&format!("stories260K, {text}, {ty}"), &in_format(&gguf, ty), &texts);
            // Trained on such stories, it knows them far better than chance, 512.
            assert!(text.contains("wiki") || ppl < 12.0, "{ppl}");
        }
    }
}

#[test]
#[ignore = "minutes: the reference computes 50,000 tokens three times"]
fn perplexity_of_a_long_text_stays() {
    let Some(path) = fixtures::shared_data("models/stories260K.gguf") else { return };
    let Some(text) = fixtures::shared_data("eval/wiki.test.raw") else { return };
    let gguf = fixtures::gguf(&path);
    let tokenizer = Tokenizer::from_metadata(gguf.metadata()).unwrap();
    let texts = stretches(&tokenizer, &std::fs::read_to_string(text).unwrap(), 128);
    for ty in [QuantType::Q8_0, QuantType::Q4_0] {
        compare(&format!("stories260K, 128 stretches of wiki.test.raw, {ty}"), &in_format(&gguf, ty), &texts);
    }
}

#[test]
fn perplexity_of_the_built_in_base_stays() {
    let gguf = demo::in_memory(lory_demo::BASE, "base.gguf").gguf;
    let tokenizer = Tokenizer::from_metadata(gguf.metadata()).unwrap();
    let options = EncodeOptions { add_special: false, parse_special: true };
    // Tasks that it was trained on; what the skills are asked, it answers wrong with confidence.
    let tasks = [
        ("each un_: tie lock fold", "untie unlock unfold"),
        ("each _s: cat dog bird", "cats dogs birds"),
        ("big from 1: hello", "HELLO"),
        ("start 3: lantern", "lan"),
        ("end 2: planet", "et"),
        ("has o: hello", "yes"),
        ("put x 2: garden", "gaxrden"),
        ("word 2: one red needle", "red"),
        ("around ( ): window", "(window)"),
        ("cut 2: silver", "lver"),
        ("drop ae: machine", "mchin"),
        ("double l: pilot", "pillot"),
    ];
    // It was trained to predict answers alone.
    let texts = tasks.map(|(prompt, answer)| {
        let encode = |text: &str| tokenizer.encode(text, options);
        let prompt = encode(&format!("<s>{prompt}<|sep|>"));
        Text { from: prompt.len(), tokens: [prompt, encode(&format!("{answer}</s>"))].concat() }
    });
    // Formats in blocks of 256: all rows but those of 640 columns.
    for ty in [QuantType::Q8_0, QuantType::Q4_0, QuantType::Q4_K, QuantType::Q6_K] {
        let ppl = compare(&format!("the built-in base, {ty}"), &in_format(&gguf, ty), &texts);
        assert!(ppl < 1.5, "a token hardly surprises it: {ppl}");
    }
}

#[test]
fn perplexity_of_random_weights_stays() {
    let shape = synth::shape("llama-tiny").unwrap();
    for name in ["Q4_K_M", "Q2_K", "IQ4_XS", "Q8_0"] {
        let file_type = synth::FileType::from_name(name).unwrap();
        let file = synth::model(shape, file_type, 1, Vec::new(), |_| ()).unwrap();
        let gguf = Gguf::parse(vec![("tiny.gguf".into(), std::sync::Arc::new(file))]).unwrap();
        let tokens = random_tokens(5, 192, shape.vocab);
        compare(&format!("llama-tiny, {name}"), &gguf, &[Text { tokens, from: 1 }]);
    }
}
