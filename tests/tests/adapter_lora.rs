//! Plain GGUF LoRA files: what is read from them, and every class of malformed ones (A1 – A15).

use std::sync::Arc;

use lory_kernels::QuantType;
use lory_models::{
    Error, Result,
    adapter::{
        Adapter, AdapterSet, BaseInfo, Delta, Fingerprint, Projection, Site, gguf_lora, synthetic_base,
    },
    gguf::{Gguf, Value, Writer},
};

const Q: Site = Site::layer(0, Projection::AttnQ);

/// A LoRA under construction; [`Lora::default`] is a sound one for [`base`].
struct Lora {
    keys: Vec<(&'static str, Option<Value>)>,
    tensors: Vec<(String, QuantType, Vec<usize>, Vec<u8>)>,
}

fn floats(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| (i as f32 * 0.5 - 1.0).to_le_bytes()).collect()
}

impl Lora {
    fn empty() -> Lora {
        let keys = vec![
            ("general.type", Some("adapter".into())),
            ("general.architecture", Some("llama".into())),
            ("adapter.type", Some("lora".into())),
            ("adapter.lora.alpha", Some(8f32.into())),
        ];
        Lora { keys, tensors: vec![] }
    }

    fn sound() -> Lora {
        Lora::empty().pair("blk.0.attn_q.weight", 64, 64, 4)
    }

    fn key(mut self, key: &'static str, value: impl Into<Value>) -> Lora {
        self.keys.retain(|(k, _)| *k != key);
        self.keys.push((key, Some(value.into())));
        self
    }

    fn without(mut self, key: &str) -> Lora {
        self.keys.retain(|(k, _)| *k != key);
        self
    }

    fn tensor(mut self, name: &str, dims: &[usize]) -> Lora {
        let n = dims.iter().product();
        self.tensors.push((name.into(), QuantType::F32, dims.to_vec(), floats(n)));
        self
    }

    fn pair(self, target: &str, inputs: usize, outputs: usize, rank: usize) -> Lora {
        self.tensor(&format!("{target}.lora_a"), &[inputs, rank])
            .tensor(&format!("{target}.lora_b"), &[rank, outputs])
    }

    fn bytes(&self) -> Vec<u8> {
        let mut w = Writer::new();
        for (key, value) in &self.keys {
            w.set(key, value.clone().unwrap());
        }
        for (name, ty, dims, _) in &self.tensors {
            w.tensor(name, *ty, dims);
        }
        let mut data = w.start(Vec::new()).unwrap();
        for (name, _, _, bytes) in &self.tensors {
            data.tensor(name, bytes).unwrap();
        }
        data.finish().unwrap()
    }

    fn load_for(&self, base: &BaseInfo) -> Result<Adapter> {
        load(self.bytes(), base)
    }

    /// The error, which must name the file.
    fn refused(&self) -> String {
        let e = self.load_for(&base()).unwrap_err().to_string();
        assert!(e.contains("lora.gguf"), "{e}");
        e
    }
}

fn load(bytes: Vec<u8>, base: &BaseInfo) -> Result<Adapter> {
    gguf_lora::load("mine", &Gguf::parse(vec![("lora.gguf".into(), Arc::new(bytes))])?, base)
}

fn base() -> BaseInfo {
    BaseInfo { file: "base.gguf".into(), ..synthetic_base(2, 64, 32, 96, 100) }
}

fn scale(a: &Adapter, site: Site) -> f32 {
    a.core(site).unwrap().scale
}

fn says(text: &str, all: &[&str]) {
    for part in all {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

#[test]
fn all_projections_embedding_and_output_are_read() {
    let mut lora = Lora::empty();
    for layer in 0..2 {
        for (name, inputs, outputs) in [
            ("attn_q", 64, 64),
            ("attn_k", 64, 32),
            ("attn_v", 64, 32),
            ("attn_output", 64, 64),
            ("ffn_gate", 64, 96),
            ("ffn_up", 64, 96),
            ("ffn_down", 96, 64),
        ] {
            lora = lora.pair(&format!("blk.{layer}.{name}.weight"), inputs, outputs, 2 + layer);
        }
    }
    let lora = lora
        .tensor("token_embd.weight.lora_a", &[5, 100])
        .tensor("token_embd.weight.lora_b", &[5, 64])
        .pair("output.weight", 64, 100, 16);
    let a = lora.load_for(&base()).unwrap();
    assert_eq!(a.cores().len(), 16);
    assert_eq!(scale(&a, Q), 4.0);
    assert_eq!(scale(&a, Site::layer(1, Projection::FfnDown)), 8.0 / 3.0);
    assert_eq!(scale(&a, Site::OUTPUT), 0.5);
    let f = a.factors(Site::TOKEN_EMBD).unwrap();
    assert_eq!((f.rank(), f.v().rows(), f.stored_u().rows()), (5, 100, 64));
    assert_eq!(a.bytes(), lora.tensors.iter().map(|t| t.3.len()).sum::<usize>());
}

#[test]
fn fused_tensors_become_their_parts() {
    let base = BaseInfo { fused_qkv: true, fused_gate_up: true, ..base() };
    let lora =
        Lora::empty().pair("blk.1.attn_qkv.weight", 64, 128, 4).pair("blk.1.ffn_up.weight", 64, 192, 2);
    let a = lora.load_for(&base).unwrap();
    let part = |p| {
        let f = a.factors(Site::layer(1, p)).unwrap();
        let whole = lora.tensors.iter().find(|t| t.0 == f.stored_u().name()).unwrap();
        let start = f.stored_u().matrix().bytes();
        let at = whole.3.windows(start.len()).position(|w| w == start).unwrap();
        (at / (4 * f.rank()), f.stored_u().rows())
    };
    assert_eq!(
        [Projection::AttnQ, Projection::AttnK, Projection::AttnV].map(part),
        [(0, 64), (64, 32), (96, 32)]
    );
    assert_eq!([Projection::FfnGate, Projection::FfnUp].map(part), [(0, 96), (96, 96)]);

    let short = Lora::empty().pair("blk.1.attn_qkv.weight", 64, 100, 4);
    says(
        &short.load_for(&base).unwrap_err().to_string(),
        &["attn_qkv.weight.lora_b", "100 outputs", "has 128"],
    );
}

#[test]
fn the_same_content_has_one_identity_under_any_name() {
    let bytes = Lora::sound().bytes();
    let one = load(bytes.clone(), &base()).unwrap();
    let gguf = Gguf::parse(vec![("copy.gguf".into(), Arc::new(bytes))]).unwrap();
    let two = gguf_lora::load("other", &gguf, &base()).unwrap();
    assert_eq!(one.identity(), two.identity());
    let scaled = Lora::sound().key("adapter.lora.alpha", 9f32).load_for(&base()).unwrap();
    assert_ne!(one.identity(), scaled.identity());
}

#[test]
fn a1_not_an_adapter_of_this_kind() {
    says(&Lora::sound().key("general.type", "model").refused(), &["general.type", "`model`", "`adapter`"]);
    says(&Lora::sound().without("general.type").refused(), &["general.type"]);
    says(&Lora::sound().key("adapter.type", "control_vector").refused(), &["adapter.type", "control_vector"]);
    says(&Lora::sound().key("adapter.type", "lora.basis").refused(), &["adapter.type", "pack"]);
    says(&Lora::sound().without("adapter.type").refused(), &["adapter.type", "missing"]);
    says(&Lora::sound().without("general.architecture").refused(), &["general.architecture", "missing"]);
    let wrong = Lora::sound().key("general.architecture", "qwen2");
    says(&wrong.refused(), &["`qwen2`", "`llama`", "base.gguf"]);
    assert!(matches!(wrong.load_for(&base()), Err(Error::WrongBase { .. })));
    says(&Lora::empty().refused(), &["without any tensor"]);
}

#[test]
fn a1_written_for_another_base() {
    let mine = base().fingerprint;
    let other = Fingerprint { weights: mine.weights ^ (1 << 60), ..mine };
    let key = gguf_lora::FINGERPRINT_KEY;
    Lora::sound().key(key, mine.to_hex()).load_for(&base()).unwrap();
    let e = Lora::sound().key(key, other.to_hex()).refused();
    says(&e, &[&mine.to_string(), &other.to_string(), "base.gguf"]);
    says(&Lora::sound().key(key, "abc").refused(), &[key, "32 hexadecimal digits"]);
}

#[test]
fn a2_alpha() {
    says(&Lora::sound().without("adapter.lora.alpha").refused(), &["adapter.lora.alpha", "missing"]);
    says(&Lora::sound().key("adapter.lora.alpha", "8").refused(), &["adapter.lora.alpha", "string"]);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        says(&Lora::sound().key("adapter.lora.alpha", bad).refused(), &["adapter.lora.alpha", "finite"]);
    }
    // 0 means no scale, as in llama.cpp.
    let a = Lora::sound().key("adapter.lora.alpha", 0f32).load_for(&base()).unwrap();
    assert_eq!(scale(&a, Q), 1.0);
}

#[test]
fn a3_half_a_pair() {
    let only =
        |part: &str| Lora::sound().tensor(&format!("blk.1.attn_q.weight.lora_{part}"), &[64, 4]).refused();
    says(&only("a"), &["blk.1.attn_q.weight.lora_a", "`blk.1.attn_q.weight.lora_b` is missing"]);
    says(&only("b"), &["blk.1.attn_q.weight.lora_b", "`blk.1.attn_q.weight.lora_a` is missing"]);
}

#[test]
fn a4_tensors_that_are_no_part_of_a_pair() {
    for name in [
        "rope_freqs.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_q.bias",
        "blk.0.attn_q.weight.lora_magnitude_vector",
        "blk.0.attn_q.weight.lora_c",
        "output.weight",
    ] {
        says(&Lora::sound().tensor(name, &[64, 1]).refused(), &[name]);
    }
    let on_bias = Lora::sound().pair("blk.0.attn_q.bias", 64, 64, 4);
    says(&on_bias.refused(), &["blk.0.attn_q.bias", "base.gguf"]);
}

#[test]
fn a5_the_base_has_no_such_tensor() {
    for target in
        ["blk.2.attn_q.weight", "blk.0.attn_qkv.weight", "blk.0.attn_rot.weight", "blk.00.attn_q.weight"]
    {
        says(&Lora::sound().pair(target, 64, 64, 4).refused(), &[target, "base.gguf", "llama"]);
    }
}

#[test]
fn a6_shapes_of_another_base() {
    let e = Lora::empty().pair("blk.0.attn_q.weight", 32, 64, 4).refused();
    says(&e, &["blk.0.attn_q.weight.lora_a", "32", "64"]);
    let e = Lora::empty().pair("blk.0.attn_q.weight", 64, 80, 4).refused();
    says(&e, &["blk.0.attn_q.weight.lora_b", "80", "64"]);
}

#[test]
fn a7_ranks() {
    let e = Lora::empty()
        .tensor("blk.0.attn_q.weight.lora_a", &[64, 4])
        .tensor("blk.0.attn_q.weight.lora_b", &[5, 64])
        .refused();
    says(&e, &["blk.0.attn_q.weight.lora_b", "rank 5", "rank 4"]);
    // No file can declare rank 0: a dimension of 0 is refused with the tensor's name.
    let mut bytes = Lora::sound().bytes();
    let name = b"blk.0.attn_q.weight.lora_a";
    let dims = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len() + 4;
    bytes[dims + 8] = 0;
    let e = load(bytes, &base()).unwrap_err().to_string();
    says(&e, &["lora.gguf", "blk.0.attn_q.weight.lora_a"]);
    // More than either side has.
    says(&Lora::empty().pair("blk.0.attn_q.weight", 64, 64, 65).refused(), &["rank 65", "1 to 64"]);
    // Above the narrow side only: wasteful, but what one rank for all sites gives.
    Lora::empty().pair("blk.0.attn_k.weight", 64, 32, 48).load_for(&base()).unwrap();
}

#[test]
fn a8_experts() {
    let e = Lora::empty()
        .tensor("blk.0.ffn_up.weight.lora_a", &[64, 4, 8])
        .tensor("blk.0.ffn_up.weight.lora_b", &[4, 96, 8])
        .refused();
    says(&e, &["blk.0.ffn_up.weight.lora_a", "3 dimensions", "experts"]);
}

#[test]
fn a9_embedding_turned_the_wrong_way() {
    // As any other pair would be: A is rank x tokens here.
    let e = Lora::empty().pair("token_embd.weight", 100, 64, 4).refused();
    says(&e, &["token_embd.weight.lora_a", "100"]);
}

#[test]
fn a10_formats_without_arithmetic() {
    for ty in [QuantType::I32, QuantType::F64, QuantType::I8] {
        let mut lora = Lora::sound();
        lora.tensors[0].1 = ty;
        lora.tensors[0].3 = vec![0; ty.bytes_for(64 * 4).unwrap()];
        says(&lora.refused(), &["blk.0.attn_q.weight.lora_a", ty.name()]);
    }
    // Rows of 4 are no whole block.
    let mut lora = Lora::sound();
    lora.tensors[0].1 = QuantType::Q8_0;
    lora.tensors[0].3 = vec![0; QuantType::Q8_0.bytes_for(64 * 4).unwrap()];
    lora.load_for(&base()).unwrap();
}

#[test]
fn a11_data_that_ends_early() {
    let bytes = Lora::sound().bytes();
    for len in 0..bytes.len() {
        let e = load(bytes[..len].to_vec(), &base()).map(drop).unwrap_err().to_string();
        assert!(e.contains("lora.gguf"), "cut at {len}: {e}");
    }
}

#[test]
fn a12_invocation_tokens() {
    const KEY: &str = "adapter.alora.invocation_tokens";
    let a = Lora::sound().key(KEY, vec![5u32, 99]).load_for(&base()).unwrap();
    assert_eq!(a.invocation(), [5, 99]);
    assert_eq!(Lora::sound().load_for(&base()).unwrap().invocation(), [0u32; 0]);
    says(&Lora::sound().key(KEY, vec![5u32, 100]).refused(), &[KEY, "token 100", "100"]);
    says(&Lora::sound().key(KEY, vec![5i32]).refused(), &[KEY, "uint32"]);
    says(&Lora::sound().key(KEY, 5u32).refused(), &[KEY, "uint32"]);
}

#[test]
fn a13_weights_that_are_no_numbers() {
    for (tensor, at, bad) in [(0, 4 * 70, f32::NAN), (1, 4 * 255, f32::NEG_INFINITY)] {
        let mut lora = Lora::sound();
        lora.tensors[tensor].3[at..at + 4].copy_from_slice(&bad.to_le_bytes());
        let (row, col) = (at / 4 / lora.tensors[tensor].2[0], at / 4 % lora.tensors[tensor].2[0]);
        says(&lora.refused(), &[&lora.tensors[tensor].0, &format!("weight {col} of row {row}")]);
    }
    let mut half = Lora::sound();
    half.tensors[0].1 = QuantType::F16;
    half.tensors[0].3 = vec![0; 512];
    half.tensors[0].3[511] = 0x7c;
    says(&half.refused(), &["lora_a", "weight 63 of row 3"]);
    let mut blocks = Lora::sound();
    blocks.tensors[0].1 = QuantType::Q8_0;
    blocks.tensors[0].3 = vec![0; 34 * 8];
    blocks.tensors[0].3[34 * 3..34 * 3 + 35].fill(0xff);
    says(&blocks.refused(), &["lora_a", "weight 32 of row 1"]);
}

#[test]
fn a14_what_is_loaded_is_not_what_the_file_becomes() {
    // The adapter holds the bytes it was made of; a file written anew is another content.
    let one = Lora::sound().load_for(&base()).unwrap();
    let kept = one.factors(Q).unwrap().v().matrix().bytes().to_vec();
    let mut changed = Lora::sound();
    changed.tensors[0].3[0] ^= 1;
    let two = changed.load_for(&base()).unwrap();
    assert_eq!(one.factors(Q).unwrap().v().matrix().bytes(), kept);
    assert_ne!(one.identity(), two.identity());
}

#[test]
fn a15_the_same_adapter_twice_in_one_set() {
    let one = Arc::new(Lora::sound().load_for(&base()).unwrap());
    let e = AdapterSet::new(vec![(one.clone(), 1.0), (one.clone(), 0.5)]).unwrap_err().to_string();
    says(&e, &["`mine`", "twice"]);
    let alias = load(Lora::sound().bytes(), &base()).map(Arc::new).unwrap();
    assert!(AdapterSet::new(vec![(one.clone(), 1.0), (alias, 0.5)]).is_err());
    for bad in [f32::NAN, f32::INFINITY] {
        let e = AdapterSet::new(vec![(one.clone(), bad)]).unwrap_err().to_string();
        says(&e, &["`mine`", "not finite"]);
    }
}

#[test]
fn cache_keys_tell_sets_apart() {
    let one = Arc::new(Lora::sound().load_for(&base()).unwrap());
    let two = Arc::new(Lora::sound().key("adapter.lora.alpha", 3f32).load_for(&base()).unwrap());
    let key = |entries: &[(&Arc<Adapter>, f32)]| {
        AdapterSet::new(entries.iter().map(|(a, s)| (Arc::clone(a), *s)).collect()).unwrap().key()
    };
    // K1 another adapter, K2 the same name with other weights, K3 another scale.
    assert_ne!(key(&[(&one, 1.0)]), key(&[]));
    assert_ne!(key(&[(&one, 1.0)]), key(&[(&two, 1.0)]));
    assert_ne!(key(&[(&one, 1.0)]), key(&[(&one, 0.5)]));
    assert_eq!(key(&[(&one, 1.0), (&two, 2.0)]), key(&[(&two, 2.0), (&one, 1.0)]));
    assert!(key(&[(&one, 0.0)]).is_base() && key(&[]).is_base());
    assert!(matches!(one.core(Q).unwrap().delta, Delta::Private(..)));
}
