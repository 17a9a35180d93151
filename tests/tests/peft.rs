//! PEFT folders against PEFT's own forward (`tests/fixtures/make_peft.py`), and everything that
//! must be refused with a reason.

use std::{fs, path::Path, sync::Arc};

use lory_kernels::{
    QuantType,
    backend::KvType,
    ops::Reference,
    quant::{dequantize_row, quantize_row},
};
use lory_models::{
    Bytes, Error, Result,
    adapter::{
        AdapterSet, BaseInfo, Projection, Site,
        peft::{Kind, PeftAdapter, PeftConfig, PermutedHeads},
    },
    decoder::Decoder,
    gguf,
};
use lory_tests::{
    fixtures::{self, ModelFixture, fixture, relative_error, shared_data},
    runner::Runner,
};
use serde_json::Value;

/// F32 on both sides; what differs is the order of sums.
const LOGITS_BOUND: f32 = 1e-4;

struct Base {
    fixture: ModelFixture,
    decoder: Decoder,
    info: BaseInfo,
    permuted: Option<PermutedHeads>,
}

impl Base {
    fn open(name: &str) -> Base {
        let fixture = fixtures::model(name);
        Base {
            decoder: Decoder::load(&fixture.gguf, fixture.n_ctx).expect("a model"),
            info: BaseInfo::from_gguf(&fixture.gguf).expect("a model"),
            permuted: PermutedHeads::from_metadata(fixture.gguf.metadata()).expect("heads"),
            fixture,
        }
    }

    fn read(&self, folder: &Path) -> Result<PeftAdapter> {
        let config = fs::read(folder.join("adapter_config.json")).expect("a configuration");
        let weights = fs::read(folder.join("adapter_model.safetensors")).expect("weights");
        self.parse(folder, &config, weights)
    }

    fn parse(&self, folder: &Path, config: &[u8], weights: Vec<u8>) -> Result<PeftAdapter> {
        let name = folder.file_name().expect("a name").to_string_lossy();
        PeftAdapter::read(&name, config, Arc::new(weights) as Bytes, &self.info, self.permuted)
    }

    fn logits(&self, adapter: PeftAdapter) -> Result<Vec<f32>> {
        let adapter = adapter.into_adapter(&self.info, |site| self.decoder.weights().at(site).cloned())?;
        let set = AdapterSet::new(vec![(Arc::new(adapter), 1.0)])?;
        let rows = self.fixture.tokens.len();
        let mut runner = Runner::new(&Reference, &self.decoder, rows, KvType::F32).with_adapters(set);
        Ok(runner.logits(&self.fixture.tokens))
    }
}

/// Folders that work on every position.
fn index() -> Vec<(String, String, Option<String>)> {
    let text = fs::read_to_string(fixture("peft/index.json")).expect("the fixtures are committed");
    let json: Value = serde_json::from_str(&text).expect("JSON");
    let entry = |(name, v): (&String, &Value)| {
        let base = v["base"].as_str().expect("a base").to_owned();
        (name.clone(), base, v["refused"].as_str().map(Into::into))
    };
    let everywhere = |(_, v): &(&String, &Value)| v["tokens"].is_null();
    json.as_object().expect("an object").iter().filter(everywhere).map(entry).collect()
}

#[test]
fn every_feature_gives_pefts_logits() {
    let mut worst: (f32, String) = (0.0, String::new());
    let mut n = 0;
    for (name, base, refused) in index() {
        if refused.is_some() {
            continue;
        }
        let base = Base::open(&base);
        let folder = fixture("peft").join(&name);
        let adapter = base.read(&folder).unwrap_or_else(|e| panic!("{e}"));
        let got = base.logits(adapter).unwrap_or_else(|e| panic!("{e}"));
        let want = fixtures::npy(&folder.join("logits.npy"));
        let error = relative_error(&got, &want);
        assert!(error <= LOGITS_BOUND, "{name}: error {error}");
        // The fixture would notice an adapter that is not applied.
        assert!(relative_error(&base.fixture.logits, &want) > 0.01, "{name}");
        if error > worst.0 {
            worst = (error, name);
        }
        n += 1;
    }
    eprintln!("{n} adapters, largest error {:.1e} ({})", worst.0, worst.1);
    assert!(n >= 37, "{n}");
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    let mut n = 0;
    for (name, base, refused) in index() {
        let Some(word) = refused else { continue };
        let error = Base::open(&base).read(&fixture("peft").join(&name)).expect_err(&name);
        assert!(matches!(error, Error::Unsupported { .. }), "{name}: {error:?}");
        assert!(error.to_string().contains(&word) && error.to_string().starts_with(&name), "{error}");
        n += 1;
    }
    assert!(n >= 7);
}

#[test]
fn pruned_modules_and_ranks_are_left_out() {
    let base = Base::open("llama");
    let adapter = base.read(&fixture("peft/adalora_pruned")).expect("an adapter");
    let q0 = Site::layer(0, Projection::AttnQ);
    assert!(!adapter.sites().contains_key(&q0), "kept no rank");
    let down = &adapter.sites()[&Site::layer(0, Projection::FfnDown)];
    assert_eq!((down.a.rows, down.b.cols), (4, 4));
}

/// One setting of a good configuration changed at a time.
#[test]
fn a_configuration_that_disagrees_is_an_error() {
    let base = Base::open("llama");
    let folder = fixture("peft/lora");
    let config = fs::read_to_string(folder.join("adapter_config.json")).expect("a configuration");
    let weights = fs::read(folder.join("adapter_model.safetensors")).expect("weights");
    let with = |key: &str, value: Value| {
        let mut json: Value = serde_json::from_str(&config).expect("JSON");
        match value {
            Value::String(s) if s == "(absent)" => json.as_object_mut().and_then(|o| o.remove(key)),
            other => json.as_object_mut().and_then(|o| o.insert(key.into(), other)),
        };
        base.parse(&folder, json.to_string().as_bytes(), weights.clone()).map(|_| ())
    };
    let json = |text: &str| serde_json::from_str::<Value>(text).expect(text);
    for (key, value, word) in [
        ("r", "0", "at least 1"),
        ("r", "-3", "at least 1"),
        ("r", "1.5", "at least 1"),
        ("r", "8", "configuration says 8"),
        ("r", "\"(absent)\"", "is missing"),
        ("lora_alpha", "\"(absent)\"", "is missing"),
        ("lora_alpha", "\"8\"", "expected a number"),
        ("lora_alpha", "1e300", "expected a number"),
        ("peft_type", "\"(absent)\"", "is missing"),
        ("peft_type", "\"LOHA\"", "`LOHA` is not supported"),
        ("use_dora", "true", "lora_magnitude_vector"),
        ("lora_bias", "true", "lora_B.bias"),
        ("use_rslora", "3", "true or false"),
        ("bias", "\"lora_only\"", "`bias`"),
        ("rank_pattern", r#"{"q_proj": 7}"#, "configuration says 7"),
        ("rank_pattern", r#"{"q_(": 4}"#, "not a usable pattern"),
        ("alpha_pattern", r#"{"q_proj": "x"}"#, "expected a number"),
        ("target_modules", r#"["k_proj"]"#, "leave out"),
        ("target_modules", "3", "list of strings"),
        ("exclude_modules", r#"["q_proj"]"#, "leave out"),
        ("layers_to_transform", "[1, 2]", "leave out"),
        ("layer_replication", "[[0, 2]]", "layer_replication"),
        ("use_qalora", "true", "use_qalora"),
        ("target_parameters", r#"["experts"]"#, "target_parameters"),
        ("init_lora_weights", "\"corda\"", "corda"),
        ("init_lora_weights", "\"loftq\"", "loftq"),
        ("init_lora_weights", "\"pissa_niter_16\"", "pissa_niter_16"),
        ("init_lora_weights", "\"surprise\"", "surprise"),
        ("alora_invocation_tokens", "[1, 100000]", "token 100000"),
        ("a_switch_of_next_year", "true", "a_switch_of_next_year"),
    ] {
        let text = with(key, json(value)).expect_err(key).to_string();
        assert!(text.contains(word) && text.starts_with("lora/adapter_"), "{key} {value}: {text}");
    }
    // What does not change the result is let through.
    for (key, value) in [
        ("lora_dropout", "0.3"),
        ("fan_in_fan_out", "true"),
        ("a_switch_of_next_year", "false"),
        ("a_setting_of_next_year", "null"),
        ("target_modules", r#""(?!.*vision).*_proj""#),
        ("layers_to_transform", "[0, 1, 2]"),
        ("eva_config", r#"{"rho": 2.0}"#),
    ] {
        with(key, json(value)).unwrap_or_else(|e| panic!("{key} {value}: {e}"));
    }
}

/// P4: what stands in the place of a configuration.
#[test]
fn a_configuration_that_is_none_is_an_error() {
    let base = Base::open("llama");
    let folder = fixture("peft/lora");
    let weights = fs::read(folder.join("adapter_model.safetensors")).expect("weights");
    let deep = "[".repeat(100_000);
    let nan = br#"{"peft_type": "LORA", "r": 4, "lora_alpha": NaN}"#;
    for text in [&b""[..], b"\xff\xfe{}", b"null", b"[]", b"{", nan, deep.as_bytes(), &[0; 4096]] {
        let error = base.parse(&folder, text, weights.clone()).map(|_| ()).expect_err("no configuration");
        assert!(error.to_string().starts_with("lora/adapter_config.json"), "{error}");
    }
}

#[test]
fn an_activated_lora_keeps_its_invocation_tokens() {
    let base = Base::open("llama");
    let folder = fixture("peft/lora");
    let config = fs::read_to_string(folder.join("adapter_config.json")).expect("a configuration");
    let config = config.replace("\"alora_invocation_tokens\": null", "\"alora_invocation_tokens\": [5, 6]");
    let weights = fs::read(folder.join("adapter_model.safetensors")).expect("weights");
    let adapter = base.parse(&folder, config.as_bytes(), weights).expect("reads");
    assert_eq!(adapter.invocation(), [5, 6]);
}

#[test]
fn another_base_is_refused() {
    let qwen = Base::open("qwen2");
    // The same sizes of layers, but another vocabulary.
    let error = qwen.read(&fixture("peft/embeddings")).expect_err("another vocabulary");
    assert!(matches!(error, Error::WrongBase { .. }), "{error}");
    let error = qwen.read(&fixture("peft/phi3")).expect_err("fused modules");
    assert!(error.to_string().contains("gate_up_proj"), "{error}");
    let error = Base::open("gemma3").read(&fixture("peft/lora")).expect_err("other sizes");
    assert!(matches!(error, Error::WrongBase { .. }), "{error}");
}

#[test]
fn a_changed_copy_of_the_embedding_is_refused() {
    let base = Base::open("llama");
    let folder = fixture("peft/embeddings_with_base");
    let config = fs::read(folder.join("adapter_config.json")).expect("a configuration");
    let mut weights = fs::read(folder.join("adapter_model.safetensors")).expect("weights");
    // The copies come first, in the order of names: lm_head's.
    let data = 8 + u64::from_le_bytes(weights[..8].try_into().expect("eight")) as usize;
    for row in weights[data..data + 281 * 32 * 4].chunks_mut(32 * 4).step_by(5) {
        row.fill(0);
    }
    let adapter = base.parse(&folder, &config, weights).expect("reads");
    let error = base.logits(adapter).expect_err("changed").to_string();
    assert!(error.contains("lm_head.base_layer.weight") && error.contains("differs by 0.4"), "{error}");
}

#[test]
fn every_published_configuration_is_parsed_or_refused_by_name() {
    let Some(folder) = shared_data("adapters/peft-configs") else { return };
    let (mut parsed, mut refused) = (0, 0);
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        let text = fs::read(&path).expect("a file");
        let json: Value = serde_json::from_slice(&text).expect("JSON");
        let name = path.file_name().expect("a name").to_string_lossy();
        let plain = json["kasa_config"].is_null() && json["use_bdlora"].is_null();
        match PeftConfig::parse(&name, &text) {
            Ok(config) => {
                let ada = matches!(config.kind(), Kind::AdaLora { .. });
                assert_eq!(json["peft_type"], if ada { "ADALORA" } else { "LORA" }, "{name}");
                assert!(plain, "{name} is no plain LoRA");
                parsed += 1;
            }
            Err(error) => {
                assert!(matches!(error, Error::Unsupported { .. }), "{error}");
                let text = error.to_string();
                let kind = json["peft_type"].as_str().expect("a type");
                let named = text.contains(&format!("`{kind}`"));
                assert!(named || (!plain && (text.contains("kasa") || text.contains("bdlora"))), "{text}");
                refused += 1;
            }
        }
    }
    eprintln!("{parsed} parsed, {refused} refused by name");
    assert!(parsed >= 13 && parsed + refused == 103, "{parsed} + {refused}");
}

#[test]
fn real_adapters_are_read_or_refused() {
    let Some(folder) = shared_data("adapters") else { return };
    // Gemma 2B: head 256, 8 query heads and 1 key head. Its keys carry the prefix twice.
    let gemma = gemma_2b();
    let read = |name: &str, base: &BaseInfo| {
        let at = folder.join(name);
        let config = fs::read(at.join("adapter_config.json")).expect("a configuration");
        let bin = at.join("adapter_model.bin");
        let file = if bin.exists() { bin } else { at.join("adapter_model.safetensors") };
        let weights: Bytes = Arc::new(fs::read(file).expect("weights"));
        PeftAdapter::read(name, &config, weights, base, None)
    };
    let adapter = read("gemma-2b-it-r8-qkvo", &gemma).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(adapter.sites().len(), 4 * 18);
    let k = &adapter.sites()[&Site::layer(17, Projection::AttnK)];
    assert_eq!((k.a.rows, k.a.cols, k.b.rows, k.b.cols, k.scale), (8, 2048, 256, 8, 4.0));
    assert!(adapter.into_adapter(&gemma, |_| None).is_ok(), "a plain LoRA needs no weights");
    for (name, word) in [
        ("gpt-oss-20b-r4-qv", "2880 inputs"),
        ("gpt2-r8-cattn-cproj", "transformer.h.0.attn.c_attn"),
        ("peft-tests_regression_ia3_opt-350m_0.6.1", "`IA3`"),
        ("peft-tests_regression_lora_opt-350m_0.6.1", "pickle"),
        ("peft-tests_regression_adalora_mlp_0.6.1", "pickle"),
        ("peft-tests_regression_lora_mlp_modules_to_save_0.6.1", "modules_to_save"),
    ] {
        let text = read(name, &gemma).expect_err(name).to_string();
        assert!(text.contains(word), "{text}");
    }
}

fn gemma_2b() -> BaseInfo {
    let mut base = lory_models::adapter::synthetic_base(18, 2048, 256, 16384, 256_000);
    base.architecture = "gemma".into();
    base
}

#[test]
fn hostile_containers_are_errors() {
    let Some(folder) = shared_data("malformed") else { return };
    let base = Base::open("llama");
    let config = fs::read(fixture("peft/lora/adapter_config.json")).expect("a configuration");
    let mut n = 0;
    for part in ["safetensors-repo-samples", "vectors", "legacy"] {
        for entry in fs::read_dir(folder.join(part)).expect("a folder") {
            let path = entry.expect("an entry").path();
            let bytes = fs::read(&path).expect("a file");
            assert!(base.parse(&path, &config, bytes).is_err(), "{}", path.display());
            n += 1;
        }
    }
    assert!(n >= 20);
}

/// Every bit of the header flipped, every cut: an error or the same shapes, never a panic.
#[test]
fn damaged_headers_never_panic() {
    let base = Base::open("llama");
    let folder = fixture("peft/regex_target");
    let config = fs::read(folder.join("adapter_config.json")).expect("a configuration");
    let weights = fs::read(folder.join("adapter_model.safetensors")).expect("weights");
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().expect("eight")) as usize;
    for i in 0..header {
        let mut damaged = weights.clone();
        damaged[i] ^= 1 << (i % 8);
        drop(base.parse(&folder, &config, damaged));
    }
    for end in (0..weights.len()).step_by(97) {
        assert!(base.parse(&folder, &config, weights[..end].to_vec()).is_err(), "cut at {end}");
    }
}

/// Head counts are those of the model that runs, also where its file writes one per layer.
#[test]
fn heads_may_be_written_per_layer() {
    let f = fixtures::model("llama");
    let want = PermutedHeads::from_metadata(f.gguf.metadata()).expect("heads").expect("permuted");
    let layers = f.gguf.metadata().u32("llama.block_count").expect("there") as usize;
    let each = |n: usize| gguf::Value::Array(gguf::Array::I32(vec![n as i32; layers]));
    let gguf = lory_tests::edited::Edited::of(&f.gguf)
        .set("llama.attention.head_count", each(want.n_heads))
        .set("llama.attention.head_count_kv", each(want.n_kv_heads))
        .gguf();
    assert_eq!(PermutedHeads::from_metadata(gguf.metadata()).expect("heads"), Some(want));
}

/// DoRA divides by the norms of the rows that run, which are the quantized ones.
#[test]
fn dora_takes_its_norms_from_a_quantized_base() {
    let f = fixtures::model("llama");
    let mut edited = lory_tests::edited::Edited::of(&f.gguf);
    for info in f.gguf.tensors().filter(|t| t.dims.len() == 2 && t.cols() % 32 == 0) {
        let mut values = vec![0.0; info.dims.iter().product()];
        let tensor = f.gguf.tensor(&info.name).expect("listed");
        dequantize_row(tensor.ty(), tensor.matrix().bytes(), &mut values).expect("F32");
        let mut bytes = vec![0; QuantType::Q4_0.bytes_for(values.len()).expect("whole blocks")];
        quantize_row(QuantType::Q4_0, &values, &mut bytes).expect("finite");
        edited = edited.tensor(&info.name, QuantType::Q4_0, &info.dims, bytes);
    }
    let gguf = edited.gguf();
    let info = BaseInfo::from_gguf(&gguf).expect("a base");
    let permuted = PermutedHeads::from_metadata(gguf.metadata()).expect("heads");
    let folder = fixture("peft/dora");
    let config = fs::read(folder.join("adapter_config.json")).expect("a configuration");
    let weights = Arc::new(fs::read(folder.join("adapter_model.safetensors")).expect("weights")) as Bytes;
    let peft = PeftAdapter::read("dora", &config, weights, &info, permuted).expect("an adapter");
    let sites = peft.sites().clone();
    let tensor = |site: Site| gguf.tensor(&format!("{site}.weight")).ok();
    let adapter = peft.into_adapter(&info, tensor).expect("an adapter");
    let mut quantized = 0;
    for (site, factors) in &sites {
        let w = tensor(*site).expect("there");
        quantized += usize::from(w.ty() == QuantType::Q4_0);
        let (rows, cols) = (w.rows(), w.cols());
        let mut dense = vec![0.0f32; rows * cols];
        dequantize_row(w.ty(), w.matrix().bytes(), &mut dense).expect("readable");
        let magnitude = factors.magnitude.as_ref().expect("DoRA");
        let core = adapter.core(*site).expect("there");
        let scales = core.row_scale.as_ref().expect("DoRA");
        let mut got = vec![0.0f32; rows];
        dequantize_row(scales.ty(), scales.matrix().bytes(), &mut got).expect("F32");
        for r in 0..rows {
            let at = |c: usize| {
                let change: f64 = (0..factors.a.rows)
                    .map(|k| f64::from(factors.b.row(r)[k]) * f64::from(factors.a.row(k)[c]))
                    .sum();
                f64::from(dense[r * cols + c]) + f64::from(factors.scale) * change
            };
            let norm = (0..cols).map(|c| at(c).powi(2)).sum::<f64>().sqrt();
            let want = f64::from(magnitude[r]) / norm;
            assert!((f64::from(got[r]) - want).abs() < 1e-5 * want, "{site}, row {r}: {} {want}", got[r]);
        }
    }
    assert!(quantized > 10, "{quantized} quantized layers");
}
