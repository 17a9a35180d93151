//! The committed fixtures (`tests/fixtures`) and the optional data folder beside the checkout.

use std::{fs, path::Path, sync::Arc};

use lory_models::{Bytes, gguf::Gguf};
use serde_json::Value;

pub use crate::data::{fixture, shared_data};

/// Parses a GGUF file of a single shard.
pub fn gguf(path: &Path) -> Gguf {
    let bytes: Bytes = Arc::new(fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())));
    let name = path.to_string_lossy().into_owned();
    Gguf::parse(vec![(name.into(), bytes)]).unwrap_or_else(|e| panic!("{e}"))
}

/// What a model fixture says beside its file.
pub struct ModelFixture {
    /// The parsed file.
    pub gguf: Gguf,
    /// Context to run it at.
    pub n_ctx: u32,
    /// The prompt.
    pub tokens: Vec<u32>,
    /// Its greedy continuation.
    pub greedy: Vec<u32>,
    /// Reference logits, tokens × vocab.
    pub logits: Vec<f32>,
}

/// Every model of `tests/fixtures/models`.
pub fn model_names() -> Vec<String> {
    let entries = fs::read_dir(fixture("models")).expect("the fixtures are committed");
    let mut names: Vec<_> = entries
        .map(|e| e.expect("a readable folder").path())
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"))
        .filter_map(|p| Some(p.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    names
}

/// The fixture `name` of `tests/fixtures/models`.
pub fn model(name: &str) -> ModelFixture {
    let json = fs::read_to_string(fixture(&format!("models/{name}.json"))).expect("beside the model");
    let json: Value = serde_json::from_str(&json).expect("JSON");
    let ids = |key: &str| -> Vec<u32> {
        let list = json[key].as_array().unwrap_or_else(|| panic!("{name}.json has no {key}"));
        list.iter().map(|v| v.as_u64().expect("an id") as u32).collect()
    };
    ModelFixture {
        gguf: gguf(&fixture(&format!("models/{name}.gguf"))),
        n_ctx: json["n_ctx"].as_u64().expect("a context size") as u32,
        tokens: ids("tokens"),
        greedy: ids("greedy"),
        logits: npy(&fixture(&format!("models/{name}.npy"))),
    }
}

/// The values of a little-endian f32 array in NumPy's format 1.0, C order.
pub fn npy(path: &Path) -> Vec<f32> {
    let bytes = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00", "{}", path.display());
    let header_len = u16::from_le_bytes([bytes[8], bytes[9]]) as usize;
    let header = std::str::from_utf8(&bytes[10..10 + header_len]).expect("ASCII");
    assert!(header.contains("'<f4'") && header.contains("'fortran_order': False"), "{header}");
    bytes[10 + header_len..].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// The largest difference between two sets of logits, relative to the range of `want`.
pub fn relative_error(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let (low, high) = want.iter().fold((f32::MAX, f32::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(got.iter().all(|v| v.is_finite()), "logits that are not finite");
    worst / (high - low)
}
