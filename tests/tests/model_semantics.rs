//! Files whose container is sound but whose model makes no sense (classes S1 to S9 of malformed
//! input): each is refused with the file, the key or tensor, and the number at fault.

use lory_kernels::QuantType;
use lory_models::{
    decoder::Decoder,
    gguf::{Array, Value},
};
use lory_tests::{edited::Edited, fixtures};

fn llama() -> Edited {
    Edited::of(&fixtures::model("llama").gguf)
}

fn refused(edited: Edited, words: &[&str]) {
    let error = Decoder::load(&edited.gguf(), 64).map(|_| ()).expect_err("refused").to_string();
    for word in ["edited.gguf"].iter().chain(words) {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
    assert_eq!(error.lines().count(), 1, "{error}");
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn the_unchanged_file_loads() {
    Decoder::load(&llama().gguf(), 64).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn s1_required_key_missing_or_of_the_wrong_type() {
    for name in [
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ] {
        let key = format!("llama.{name}");
        refused(llama().without_key(&key), &[&key, "missing"]);
        refused(llama().set(&key, Value::String("7".into())), &[&key, "string"]);
    }
    refused(llama().without_key("general.architecture"), &["general.architecture", "missing"]);
    let other = llama().set("general.architecture", Value::String("mamba".into()));
    refused(other, &["mamba", "not supported", "llama"]);
    refused(llama().set("general.type", Value::String("adapter".into())), &["adapter", "not a model"]);
}

#[test]
fn s2_layer_count_out_of_range() {
    for n in [0, 1025, u32::MAX] {
        refused(llama().set("llama.block_count", Value::U32(n)), &["block_count", &n.to_string()]);
    }
    refused(llama().set("llama.block_count", Value::I32(-1)), &["block_count"]);
    refused(llama().set("llama.block_count", Value::U32(4)), &["blk.3.", "missing"]);
}

#[test]
fn s3_heads_that_do_not_fit() {
    refused(llama().set("llama.attention.head_count", Value::U32(0)), &["head_count", "0"]);
    refused(llama().set("llama.attention.head_count_kv", Value::U32(3)), &["head_count_kv", "3"]);
    refused(llama().set("llama.attention.head_count_kv", Value::U32(0)), &["head_count_kv", "0"]);
    refused(llama().set("llama.rope.dimension_count", Value::U32(7)), &["rope.dimension_count", "7"]);
    refused(llama().set("llama.rope.dimension_count", Value::U32(4096)), &["rope.dimension_count", "4096"]);
    refused(llama().set("llama.attention.key_length", Value::U32(9)), &["attention."]);
    refused(llama().set("llama.attention.value_length", Value::U32(2)), &["value_length", "2"]);
    let odd = llama().set("llama.embedding_length", Value::U32(33));
    refused(odd, &["33"]);
}

#[test]
fn s4_per_layer_arrays_of_another_length() {
    let array = |values: &[u32]| Value::Array(Array::U32(values.to_vec()));
    let key = "llama.attention.head_count_kv";
    refused(llama().set(key, array(&[2])), &["head_count_kv", "1 entries"]);
    refused(llama().set(key, array(&[2, 1, 2])), &["head_count_kv", "differs"]);
    let gemma = Edited::of(&fixtures::model("gemma3").gguf);
    let pattern = Value::Array(Array::Bool(vec![true]));
    refused(
        gemma.set("gemma3.attention.sliding_window_pattern", pattern),
        &["sliding_window_pattern", "1 entries"],
    );
}

#[test]
fn s5_shapes_that_disagree_with_the_keys() {
    refused(llama().set("llama.feed_forward_length", Value::U32(96)), &["blk.0.ffn_gate.weight", "96"]);
    let narrow = llama().tensor("output_norm.weight", QuantType::F32, &[8], floats(&[1.0; 8]));
    refused(narrow, &["output_norm.weight", "8"]);
    let flat = llama().tensor("token_embd.weight", QuantType::F32, &[8, 4], floats(&[0.0; 32]));
    refused(flat, &["token_embd.weight", "4 x 8"]);
    let typed = llama().tensor("output_norm.weight", QuantType::Q8_0, &[32], vec![0; 34]);
    refused(typed, &["output_norm.weight"]);
}

#[test]
fn s6_tensors_missing_or_unknown() {
    for name in ["token_embd.weight", "output_norm.weight", "blk.1.attn_q.weight", "blk.2.ffn_norm.weight"] {
        refused(llama().without_tensor(name), &[name, "missing"]);
    }
    for name in ["blk.0.attn_sinks.weight", "blk.9.attn_q.weight", "mystery"] {
        let extra = llama().tensor(name, QuantType::F32, &[4], floats(&[0.0; 4]));
        refused(extra, &[name, "not used"]);
    }
    let olmo = Edited::of(&fixtures::model("olmo2").gguf);
    refused(olmo.without_tensor("output.weight"), &["output.weight", "missing"]);
}

#[test]
fn s7_numbers_that_are_none() {
    for eps in [f32::NAN, f32::INFINITY, 0.0, -1e-5] {
        refused(llama().set("llama.attention.layer_norm_rms_epsilon", Value::F32(eps)), &["rms_epsilon"]);
    }
    for base in [f32::NAN, f32::NEG_INFINITY, 0.0, -10000.0] {
        refused(llama().set("llama.rope.freq_base", Value::F32(base)), &["rope.freq_base"]);
    }
    refused(llama().set("llama.rope.scaling.factor", Value::F32(-2.0)), &["rope.scaling.factor", "-2"]);
    // Numbers that overflow only in the products they stand in.
    for (name, value) in
        [("rope.scaling.factor", 1e-40), ("rope.scale_linear", 1e30), ("attention.scale", 3e38)]
    {
        let key = format!("llama.{name}");
        refused(
            llama().set(&key, Value::F32(value)),
            &[&key, &format!("is {value:e}"), "from 1e-15 to 1e15"],
        );
    }
    let scaling = llama().set("llama.rope.scaling.type", Value::String("spiral".into()));
    refused(scaling, &["rope.scaling.type", "spiral"]);
    let n = fixtures::model("llama").gguf.info("rope_freqs.weight").expect("llama 3").cols();
    let mut freqs = vec![1.0; n];
    freqs[1] = 0.0;
    refused(
        llama().tensor("rope_freqs.weight", QuantType::F32, &[n], floats(&freqs)),
        &["rope_freqs.weight", "0"],
    );
    freqs[1] = f32::NAN;
    refused(
        llama().tensor("rope_freqs.weight", QuantType::F32, &[n], floats(&freqs)),
        &["rope_freqs.weight", "NaN"],
    );
}

#[test]
fn s8_a_vocabulary_that_the_embedding_cannot_hold() {
    use lory_runtime::{LoadedModel, OpenOptions, mapping};
    let gguf = fixtures::model("llama").gguf;
    let n_embd = gguf.info("token_embd.weight").expect("a model").cols();
    let short = |name| (name, vec![0.0f32; n_embd * 8]);
    let mut edited = llama();
    for (name, values) in [short("token_embd.weight"), short("output.weight")] {
        edited = edited.tensor(name, QuantType::F32, &[n_embd, 8], floats(&values));
    }
    let file = mapping::File::from_memory(edited.bytes(), "edited.gguf");
    let open = mapping::parse(vec![std::sync::Arc::new(file)]).expect("a sound container");
    let error =
        LoadedModel::from_gguf(open, &OpenOptions::default()).map(|_| ()).expect_err("refused").to_string();
    assert!(error.contains("token_embd.weight") && error.contains("8 rows"), "{error}");
}

#[test]
fn s9_experts_are_refused_by_name() {
    let experts =
        llama().set("llama.expert_count", Value::U32(8)).set("llama.expert_used_count", Value::U32(9));
    refused(experts, &["expert_count", "8", "mixture-of-experts"]);
}
