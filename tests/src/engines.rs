//! Engines on the small Llama fixture, with adapters of every kind at hand.

use std::{
    io::Cursor,
    sync::{Arc, OnceLock},
};

use lory_kernels::{QuantType, backend::KvType};
use lory_models::{
    adapter::{
        BaseInfo,
        pack::{SynthSpec, synth_pack},
    },
    gguf::{Array, Value},
};
use lory_runtime::{
    AdapterId, Engine, EngineOptions,
    mapping::{self, File, OpenGguf},
};

use crate::{
    edited::Edited,
    fixtures::{fixture, gguf},
};

/// Plain LoRAs, an activated one, and adapters of a pack with two clusters.
pub const ADAPTERS: [&str; 7] =
    ["attn", "all", "activated", "synth-00000", "synth-00001", "synth-00002", "synth-00003"];

/// What switches `activated` on.
pub const INVOCATION: [u32; 2] = [40, 41];

/// Small, quick, and bit for bit comparable.
pub fn options() -> EngineOptions {
    EngineOptions {
        threads: Some(1),
        n_ctx: Some(160),
        n_batch: 64,
        kv_type: KvType::F32,
        ..EngineOptions::default()
    }
}

/// An engine without adapters.
pub fn bare(options: &EngineOptions) -> Engine {
    Engine::open(&fixture("models/llama.gguf"), options).unwrap_or_else(|e| panic!("{e}"))
}

/// An engine with [`ADAPTERS`], and their ids in the same order.
pub fn engine(options: &EngineOptions) -> (Engine, Vec<AdapterId>) {
    let engine = bare(options);
    let store = engine.adapters();
    for name in ["attn", "all"] {
        store.load_lora(&fixture(&format!("lora/{name}.gguf")), None).unwrap_or_else(|e| panic!("{e}"));
    }
    store.load_open_lora(activated("all"), "activated", false).unwrap_or_else(|e| panic!("{e}"));
    store.open_pack_files(open(pack(4), "pack.gguf"), vec![]).unwrap_or_else(|e| panic!("{e}"));
    let ids = ADAPTERS.map(|name| store.resolve(name).unwrap_or_else(|e| panic!("{e}")));
    (engine, ids.into())
}

/// The fixture LoRA `name`, made one that [`INVOCATION`] switches on.
pub fn activated(name: &str) -> OpenGguf {
    let lora = gguf(&fixture(&format!("lora/{name}.gguf")));
    let tokens = Value::Array(Array::U32(INVOCATION.into()));
    open(Edited::of(&lora).set("adapter.alora.invocation_tokens", tokens).bytes(), "activated.gguf")
}

/// A file that is only in memory.
pub fn open(bytes: Vec<u8>, name: &str) -> OpenGguf {
    mapping::parse(vec![Arc::new(File::from_memory(bytes, name))]).unwrap_or_else(|e| panic!("{e}"))
}

/// A pack of `n` random adapters (`synth-00000` …) in two clusters for the fixture model.
pub fn pack(n: usize) -> Vec<u8> {
    static BASE: OnceLock<BaseInfo> = OnceLock::new();
    let base = BASE.get_or_init(|| {
        BaseInfo::from_gguf(&gguf(&fixture("models/llama.gguf"))).unwrap_or_else(|e| panic!("{e}"))
    });
    let spec = SynthSpec {
        n_adapters: n,
        clusters: 2,
        rank: 4,
        diagonal: false,
        share_v: false,
        basis_type: QuantType::F32,
        core_type: QuantType::F32,
        seed: 5,
    };
    let out = synth_pack(base, &spec, Cursor::new(Vec::new())).unwrap_or_else(|e| panic!("{e}"));
    out.into_inner()
}

/// Reproducible choices (SplitMix64).
pub struct Random(pub u64);

impl Random {
    /// A number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.number() % n.max(1) as u64) as usize
    }

    /// True once in `n`.
    pub fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}
