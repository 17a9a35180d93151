//! The fuzz targets' seeds, and every input that once broke something, run on stable Rust.
//!
//! `tests/fuzz/seeds` is generated here:
//! `cargo test -p lory-tests --test fuzz_seeds -- --ignored` writes it anew.

use std::{collections::BTreeMap, fs, path::PathBuf};

use lory_kernels::QuantType;
use lory_models::{
    adapter::{
        Projection, Site,
        pack::{AdapterMeta, BasisSite, NewAdapter, NewCore, NewMatrix, PackSpec, PackWriter, StorageTypes},
    },
    gguf::{Array, Value, Writer},
};
use lory_tests::gguf_bytes::{GgufBytes, array, string};
use serde_json::{Value as Json, json};

#[path = "../fuzz/src/lib.rs"]
mod targets;

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name)
}

/// Path under `seeds/` and contents.
fn seeds() -> BTreeMap<String, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut add = |name: &str, bytes: Vec<u8>| assert!(all.insert(name.into(), bytes).is_none());
    add("gguf/empty", GgufBytes::new().bytes());
    add("gguf/version2", GgufBytes::new().version(2).key("k", 7, &[1]).bytes());
    add("gguf/values", every_value());
    add("gguf/tensors", tensors(32));
    add("gguf/aligned", tensors(8));
    let shard = GgufBytes::new().key("split.no", 2, &[0, 0]).key("split.count", 2, &[1, 0]);
    add("gguf/shard", shard.key("split.tensors.count", 5, &[0; 4]).bytes());

    add("adapter/lora", lora("blk.0.attn_q", 32, 32, 1.0, QuantType::F32));
    add("adapter/half", lora("blk.1.ffn_down", 64, 32, 16.0, QuantType::F16));
    add("adapter/embedding", lora("token_embd", 32, 40, 0.0, QuantType::F32));
    add("adapter/quantized", lora("blk.0.ffn_up", 32, 64, 8.0, QuantType::Q8_0));
    add("adapter/pack", pack(QuantType::F32));
    add("adapter/pack-half", pack(QuantType::F16));
    add("adapter/base", model("llama", &[]));
    add("model/llama", model("llama", &[]));
    add("model/qwen2", model("qwen2", &[("attn_q.bias", 8), ("attn_k.bias", 4), ("attn_v.bias", 4)]));
    add(
        "model/gemma3",
        model(
            "gemma3",
            &[
                ("attn_q_norm.weight", 4),
                ("attn_k_norm.weight", 4),
                ("post_attention_norm.weight", 8),
                ("post_ffw_norm.weight", 8),
            ],
        ),
    );

    let q = "layers.0.self_attn.q_proj";
    let factors =
        [(&*format!("{q}.lora_A.weight"), [2, 32].as_slice()), (&*format!("{q}.lora_B.weight"), &[32, 2])];
    add("peft/lora", peft(false, json!({ "target_modules": ["q_proj"] }), &factors));
    add("peft/permuted", peft(true, json!({ "target_modules": "all-linear", "use_rslora": true }), &factors));
    let magnitude = format!("{q}.lora_magnitude_vector");
    let dora = [&factors[..], &[(&*magnitude, &[32])]].concat();
    add("peft/dora", peft(false, json!({ "target_modules": ["q_proj"], "use_dora": true }), &dora));
    let embeddings =
        [("embed_tokens.lora_embedding_A", [2, 40].as_slice()), ("embed_tokens.lora_embedding_B", &[32, 2])];
    let config = json!({ "target_modules": ["embed_tokens"], "alora_invocation_tokens": [3] });
    add("peft/embeddings", peft(false, config, &embeddings));

    for (i, source) in TEMPLATES.iter().enumerate() {
        add(&format!("template/{i}"), [&[0xff], source.as_bytes()].concat());
    }

    let tokens: &[(u8, &str)] =
        &[(3, "<s>"), (1, "he"), (1, "ll"), (1, "hell"), (1, "Ġw"), (4, "<user>"), (6, "<0x41>")];
    let merges = ["h e", "l l", "Ġ w", "he ll"];
    let text = "hello wörld's 123\n\n  <s>";
    add("tokenizer/bpe", vocabulary(12, 0, text, tokens, &merges));
    for i in 0..18u8 {
        add(&format!("pretokenizer/{i:02}"), [&[i], text.as_bytes()].concat());
    }
    add(
        "tokenizer/plain",
        vocabulary(4, 1, "hello 日本 🦙", &[(1, "he"), (1, "hell"), (1, "ll"), (1, "Ġw")], &merges),
    );
    add(
        "tokenizer/spm",
        vocabulary(6, 0, "hello  world <user>x", &[(2, "<unk>"), (1, "▁he"), (4, "<user>")], &[]),
    );
    add("tokenizer/spm-no-bytes", vocabulary(2, 0, "hello", &[(2, "<unk>"), (1, "l"), (1, "he")], &[]));
    let file = GgufBytes::new()
        .key("tokenizer.ggml.model", 8, &string("llama"))
        .key("tokenizer.ggml.tokens", 9, &array(8, 3, &["<unk>", "a", "b"].map(string).concat()))
        .key("tokenizer.ggml.scores", 9, &array(6, 3, &[0; 12]))
        .key("tokenizer.ggml.token_type", 9, &array(5, 3, &[2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]))
        .key("tokenizer.ggml.bos_token_id", 4, &[1, 0, 0, 0])
        .key("tokenizer.ggml.eos_token_id", 4, &[2, 0, 0, 0]);
    add("tokenizer/file", [&[1, 0, 4, 0][..], b"abba", &file.bytes()].concat());
    all
}

fn every_value() -> Vec<u8> {
    let mut w = Writer::new();
    w.set("a", 1u8).set("b", -1i8).set("c", 1u16).set("d", -1i16).set("e", 1u32).set("f", -1i32);
    w.set("g", 1u64).set("h", -1i64).set("i", 1.5f32).set("j", -1.5f64).set("k", true).set("l", "text");
    w.set("m", vec![1u32, 2]).set("n", vec![1.0f32]).set("o", vec![true]).set("p", vec!["x".to_string()]);
    w.set("q", Value::Array(Array::I64(vec![-1]))).set("r", Value::Array(Array::F64(vec![0.5])));
    w.start(Vec::new()).unwrap().finish().unwrap()
}

fn write(mut w: Writer, tensors: &[(&str, QuantType, &[usize])]) -> Vec<u8> {
    tensors.iter().for_each(|(name, ty, dims)| {
        w.tensor(name, *ty, dims);
    });
    let mut out = w.start(Vec::new()).unwrap();
    for (name, ty, dims) in tensors {
        let bytes = ty.bytes_for(dims.iter().product()).unwrap();
        out.tensor(name, &vec![0; bytes]).unwrap();
    }
    out.finish().unwrap()
}

fn tensors(alignment: u32) -> Vec<u8> {
    let mut w = Writer::new();
    w.set_alignment(alignment);
    write(
        w,
        &[
            ("a", QuantType::F32, &[3]),
            ("b", QuantType::Q4_0, &[32, 2]),
            ("c", QuantType::Q6_K, &[256]),
            ("d", QuantType::I8, &[1, 2, 3, 4]),
        ],
    )
}

fn lora(target: &str, inputs: usize, outputs: usize, alpha: f32, ty: QuantType) -> Vec<u8> {
    let mut w = Writer::new();
    w.set("general.architecture", "llama").set("general.type", "adapter").set("adapter.type", "lora");
    w.set("adapter.lora.alpha", alpha);
    let rank = if ty == QuantType::Q8_0 { 32 } else { 2 };
    // Embeddings keep A turned, as llama.cpp has it.
    let a: [usize; 2] = if target == "token_embd" { [rank, outputs] } else { [inputs, rank] };
    let b: [usize; 2] = if target == "token_embd" { [rank, inputs] } else { [rank, outputs] };
    write(w, &[(&format!("{target}.weight.lora_a"), ty, &a), (&format!("{target}.weight.lora_b"), ty, &b)])
}

/// One cluster with factors at one site, an adapter that uses them and one with its own.
fn pack(ty: QuantType) -> Vec<u8> {
    const Q: Site = Site::layer(0, Projection::AttnQ);
    let spec = PackSpec::of(targets::base());
    let layout = [BasisSite { cluster: 0, site: Q, rank: 2, u_type: ty, v_type: ty, shared_v: false }];
    let mut w = PackWriter::new(std::io::Cursor::new(Vec::new()), spec, &layout).unwrap();
    w.factors(&[0.5; 64], &[0.25; 64]).unwrap();
    let mut full = NewCore::shared(NewMatrix::Full(vec![1.0; 4]), 2, 0.5, Some(0.25));
    full.bias = Some(vec![0.5; 32]);
    let own = NewCore {
        factors: Some((vec![0.5; 32], vec![0.25; 32])),
        ..NewCore::shared(NewMatrix::Diagonal(vec![1.0]), 1, 1.0, None)
    };
    let meta = AdapterMeta { description: "for fuzzing".into(), ..Default::default() };
    for (name, cluster, core) in [("shared", Some(0), full), ("own", None, own)] {
        let types = StorageTypes { core: ty, factors: ty, vectors: ty };
        let (meta, invocation, cores) = (meta.clone(), vec![3], vec![(Q, core)]);
        w.adapter(&NewAdapter { name: name.into(), cluster, meta, invocation, cores, types }).unwrap();
    }
    w.finish().unwrap().into_inner()
}

/// The PEFT target's input: a configuration of rank 2 with `more`, and tensors of small numbers.
fn peft(permuted: bool, more: Json, tensors: &[(&str, &[usize])]) -> Vec<u8> {
    let mut config = json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none" });
    let more = more.as_object().expect("an object").clone();
    config.as_object_mut().expect("an object").extend(more);
    let config = config.to_string();
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape) in tensors {
        let start = data.len();
        data.extend(0.25f32.to_le_bytes().repeat(shape.iter().product()));
        let info = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
        header.insert(format!("base_model.model.model.{name}"), info);
    }
    let header = Json::Object(header).to_string();
    let length = config.len() as u16 | u16::from(permuted) << 15;
    let header_length = (header.len() as u64).to_le_bytes();
    [&length.to_le_bytes(), config.as_bytes(), &header_length, header.as_bytes(), &data].concat()
}

/// Chat templates with what real ones have: loops, slices, tests, macros, namespaces, tools, dates, blocks of the answer.
const TEMPLATES: &[&str] = &[
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}\
     {% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{%- set ns = namespace(n=0, last=none) -%}{%- for m in messages[::-1] if m.role != 'tool' -%}\
     {%- set ns.n = ns.n + loop.index0 % 3 -%}{%- set ns.last = m.content -%}{%- endfor -%}\
     {{ ns.n ~ (ns.last if ns.last is string else ns.last | tojson(indent=2)) }}",
    "{%- macro part(c, deep=true) -%}{% if c is string %}{{ c.split('</think>')[-1].lstrip('\\n') }}{% elif c is iterable %}\
     {% for p in c %}{{ part(p.text or '') }}{% endfor %}{% endif %}{%- endmacro -%}\
     {% for m in messages %}{{ part(m.content) }}{% if m.tool_calls is defined %}\
     {% for call in m.tool_calls %}{{ call.function.arguments | items | list | tojson }}{% endfor %}{% endif %}{% endfor %}",
    "{% if tools %}{{ tools | map(attribute='name') | join(', ') | upper }}{% endif %}\
     {% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}\
     {% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}\
     {% generation %}{{ m.content[:3] * 2 }}{% endgeneration %}{% endfor %}",
];

/// A model of one layer and four tokens; `more` are further tensors of the layer.
fn model(arch: &str, more: &[(&str, usize)]) -> Vec<u8> {
    let mut w = Writer::new();
    w.set("general.architecture", arch);
    for (key, n) in [
        ("block_count", 1u32),
        ("context_length", 64),
        ("embedding_length", 8),
        ("feed_forward_length", 16),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 4),
        ("attention.value_length", 4),
        ("attention.sliding_window", 8),
    ] {
        w.set(&format!("{arch}.{key}"), n);
    }
    w.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5f32);
    let mut tensors: Vec<(String, Vec<usize>)> = [
        ("token_embd.weight", vec![8, 4]),
        ("output_norm.weight", vec![8]),
        ("blk.0.attn_norm.weight", vec![8]),
        ("blk.0.attn_q.weight", vec![8, 8]),
        ("blk.0.attn_k.weight", vec![8, 4]),
        ("blk.0.attn_v.weight", vec![8, 4]),
        ("blk.0.attn_output.weight", vec![8, 8]),
        ("blk.0.ffn_norm.weight", vec![8]),
        ("blk.0.ffn_gate.weight", vec![8, 16]),
        ("blk.0.ffn_up.weight", vec![8, 16]),
        ("blk.0.ffn_down.weight", vec![16, 8]),
    ]
    .map(|(name, dims)| (name.to_string(), dims))
    .into();
    tensors.extend(more.iter().map(|(name, n)| (format!("blk.0.{name}"), vec![*n])));
    let list: Vec<(&str, QuantType, &[usize])> =
        tensors.iter().map(|(name, dims)| (&**name, QuantType::F32, &**dims)).collect();
    write(w, &list)
}

fn vocabulary(flags: u8, pre: u8, text: &str, tokens: &[(u8, &str)], merges: &[&str]) -> Vec<u8> {
    let mut out = vec![flags, pre];
    out.extend((text.len() as u16).to_le_bytes());
    out.extend(text.as_bytes());
    for (i, (ty, token)) in tokens.iter().enumerate() {
        out.extend([&[*ty, i as u8], token.as_bytes(), &[0xff]].concat());
    }
    merges.iter().for_each(|m| out.extend([&[0xfe], m.as_bytes(), &[0xff]].concat()));
    out
}

fn run(target: &str, data: &[u8]) {
    match target {
        "gguf" => targets::gguf(data),
        "adapter" => targets::adapter(data),
        "model" => targets::model(data),
        "tokenizer" => targets::tokenizer(data),
        "pretokenizer" => targets::pretokenizer(data),
        "peft" => targets::peft(data),
        "template" => targets::template(data),
        other => panic!("no target {other}"),
    }
}

#[test]
fn committed_seeds_are_the_generated_ones_and_run() {
    for (path, bytes) in seeds() {
        let committed = fs::read(folder("seeds").join(&path)).unwrap_or_default();
        assert!(committed == bytes, "tests/fuzz/seeds/{path} is out of date");
        run(path.split('/').next().unwrap(), &bytes);
    }
}

/// Seeds that are broken by mistake would fuzz nothing but the first check.
#[test]
fn seeds_reach_what_they_are_meant_for() {
    use lory_models::{adapter, gguf::Gguf};
    let all = seeds();
    let open = |path: &str| {
        let bytes = std::sync::Arc::new(all[path].clone());
        Gguf::parse(vec![(path.into(), bytes)]).unwrap_or_else(|e| panic!("{e}"))
    };
    let gguf = |path: &&String| ["gguf/", "adapter/", "model/"].iter().any(|start| path.starts_with(start));
    for path in all.keys().filter(gguf) {
        open(path);
    }
    for (path, bytes) in all.iter().filter(|(p, _)| p.starts_with("peft/")) {
        targets::peft_of(bytes).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
    for source in TEMPLATES {
        let template = lory_models::chat::ChatTemplate::new(source, "seed").unwrap_or_else(|e| panic!("{e}"));
        let text =
            template.render(&[lory_models::chat::Message::new("user", "a </think> b")], &Default::default());
        assert!(!text.unwrap_or_else(|e| panic!("{source}: {e}")).is_empty());
    }
    for name in ["lora", "half", "embedding", "quantized"] {
        let path = format!("adapter/{name}");
        adapter::gguf_lora::load(name, &open(&path), targets::base()).unwrap_or_else(|e| panic!("{e}"));
    }
    adapter::BaseInfo::from_gguf(&open("adapter/base")).unwrap();
    for path in ["adapter/pack", "adapter/pack-half"] {
        adapter::pack::Pack::parse(open(path), vec![]).unwrap().verify().unwrap();
    }
    for path in all.keys().filter(|p| p.starts_with("model/")) {
        lory_models::decoder::Decoder::load(&open(path), 64).unwrap_or_else(|e| panic!("{e}"));
    }
    for (path, bytes) in all.iter().filter(|(p, _)| p.starts_with("tokenizer/")) {
        targets::tokenizer_of(bytes).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
}

/// Inputs that once crashed a target: `findings/<target>/<what it was>`.
#[test]
fn findings_stay_fixed() {
    for target in ["gguf", "adapter", "model", "tokenizer", "pretokenizer", "peft", "template"] {
        let Ok(entries) = fs::read_dir(folder("findings").join(target)) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            run(target, &fs::read(path).unwrap());
        }
    }
}

#[test]
#[ignore = "writes tests/fuzz/seeds"]
fn write_seeds() {
    for (path, bytes) in seeds() {
        let path = folder("seeds").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}
