//! What an adapter has to know of the base model it was trained on.

use std::{fmt, ops::Range, str::FromStr, sync::Arc};

use crate::{
    Error, Result,
    arch::check_is_model,
    gguf::{Gguf, TensorInfo},
};

use super::{Projection, Site, SiteShapes, hash::Hasher, site::MAX_LAYERS};

/// Tells base models apart: by the shapes of their tensors, and by the weights themselves.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint {
    /// Hash of architecture, tensor names and dimensions: the same for every quantization.
    pub shapes: u64,
    /// Hash of formats and of bytes sampled from every tensor.
    pub weights: u64,
}

/// Each tensor is sampled in this many places, spread evenly, first and last bytes included …
const SAMPLES: usize = 4;
/// … with this many bytes each: a few pages per tensor, so that 8 GB take milliseconds.
const SAMPLE_BYTES: usize = 256;

impl Fingerprint {
    /// Of an open file.
    pub fn of(gguf: &Gguf) -> Result<Fingerprint> {
        let mut tensors: Vec<&TensorInfo> = gguf.tensors().collect();
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let (mut shapes, mut weights) = (Hasher::new(), Hasher::new());
        let architecture = gguf.metadata().opt_str("general.architecture")?.unwrap_or_default();
        shapes.bytes(architecture.as_bytes());
        for info in tensors {
            shapes.bytes(info.name.as_bytes());
            shapes.number(info.dims.len() as u64);
            info.dims.iter().for_each(|d| {
                shapes.number(*d as u64);
            });
            weights.bytes(info.name.as_bytes()).number(u64::from(info.ty as u32));
            let tensor = gguf.tensor(&info.name)?;
            let bytes = tensor.matrix().bytes();
            for range in sample_ranges(bytes.len()) {
                weights.bytes(bytes.get(range).unwrap_or_default());
            }
        }
        Ok(Fingerprint { shapes: shapes.finish() as u64, weights: weights.finish() as u64 })
    }

    /// All 32 hexadecimal digits, as packs store it.
    pub fn to_hex(self) -> String {
        format!("{:016x}{:016x}", self.shapes, self.weights)
    }
}

fn sample_ranges(len: usize) -> impl Iterator<Item = Range<usize>> {
    let last = len.saturating_sub(SAMPLE_BYTES);
    (0..SAMPLES).map(move |i| {
        let start = (last as u128 * i as u128 / (SAMPLES as u128 - 1)) as usize;
        start..(start + SAMPLE_BYTES).min(len)
    })
}

impl FromStr for Fingerprint {
    type Err = ();

    fn from_str(s: &str) -> std::result::Result<Self, ()> {
        let hex = |s: Option<&str>| u64::from_str_radix(s.ok_or(())?, 16).map_err(|_| ());
        if s.len() != 32 || !s.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(());
        }
        Ok(Fingerprint { shapes: hex(s.get(..16))?, weights: hex(s.get(16..))? })
    }
}

/// Short: eight digits of each part.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}-{:08x}", self.shapes >> 32, self.weights >> 32)
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// How closely a base must resemble the one an adapter was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseCheck {
    /// The same weights in the same format.
    Exact,
    /// The same architecture and shapes; the caller answers for the weights, for example
    /// another quantization of the same model.
    Shapes,
}

/// A base model as adapters see it.
#[derive(Clone, Debug)]
pub struct BaseInfo {
    /// Its file.
    pub file: Arc<str>,
    /// `general.architecture`.
    pub architecture: String,
    /// `general.name`, if it has one.
    pub name: Option<String>,
    /// Number of token ids.
    pub n_vocab: usize,
    /// Its linear layers.
    pub shapes: SiteShapes,
    /// Whether the file keeps q, k and v in one tensor `attn_qkv`.
    pub fused_qkv: bool,
    /// Whether the file keeps gate and up in one tensor `ffn_up`.
    pub fused_gate_up: bool,
    /// Its fingerprint.
    pub fingerprint: Fingerprint,
}

impl BaseInfo {
    /// Reads it off an open model file; a few pages per tensor are touched.
    ///
    /// # Errors
    /// Keys that are missing or of the wrong type; tensors whose shapes cannot be those of a
    /// decoder.
    pub fn from_gguf(gguf: &Gguf) -> Result<BaseInfo> {
        let m = gguf.metadata();
        check_is_model(m)?;
        let architecture = m.str("general.architecture")?.to_owned();
        let layers_key = format!("{architecture}.block_count");
        let n_layers = m.u32(&layers_key)?;
        if n_layers > MAX_LAYERS {
            return Err(m.error(&layers_key, format!("is {n_layers}, at most {MAX_LAYERS} make sense")));
        }
        let embd = matrix(gguf, "token_embd.weight")?;
        let (n_vocab, n_embd) = embd.ok_or_else(|| missing(gguf, "token_embd.weight"))?;
        let mut shapes = SiteShapes::new(n_layers as usize);
        shapes.set(Site::TOKEN_EMBD, n_embd, n_vocab);
        shapes.set(Site::OUTPUT, n_vocab, n_embd);
        let (mut fused_qkv, mut fused_gate_up) = (false, false);
        for layer in 0..n_layers as usize {
            for p in Projection::ALL {
                let site = Site::layer(layer, p);
                if let Some((rows, cols)) = matrix(gguf, &format!("{site}.weight"))? {
                    shapes.set(site, rows, cols);
                }
            }
            fused_qkv |= split_qkv(gguf, layer, &mut shapes)?;
            fused_gate_up |= split_gate_up(layer, &mut shapes);
        }
        Ok(BaseInfo {
            file: gguf.file().into(),
            architecture,
            name: m.opt_str("general.name")?.map(Into::into),
            n_vocab,
            shapes,
            fused_qkv,
            fused_gate_up,
            fingerprint: Fingerprint::of(gguf)?,
        })
    }

    /// The sites that the tensor `name` (without `.weight`) of an adapter stands for, each with
    /// its share of the rows; `None` if the base has no such tensor.
    pub fn targets(&self, name: &str) -> Option<Vec<(Site, Range<usize>)>> {
        let parts = match name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((layer, "attn_qkv")) if self.fused_qkv => {
                Some((layer, &[Projection::AttnQ, Projection::AttnK, Projection::AttnV][..]))
            }
            Some((layer, "ffn_up")) if self.fused_gate_up => {
                Some((layer, &[Projection::FfnGate, Projection::FfnUp][..]))
            }
            _ => None,
        };
        let Some((layer, parts)) = parts else {
            let site = Site::parse(name)?;
            return Some(vec![(site, 0..self.shapes.get(site)?.out_features)]);
        };
        let layer = Site::parse(&format!("blk.{layer}.attn_q"))?.layer_index()?;
        let mut start = 0;
        let share = |p: &Projection| {
            let site = Site::layer(layer, *p);
            let range = start..start + self.shapes.get(site)?.out_features;
            start = range.end;
            Some((site, range))
        };
        parts.iter().map(share).collect()
    }

    /// Compares with what an adapter file says about its base.
    ///
    /// # Errors
    /// [`Error::WrongBase`] naming both.
    pub fn check(
        &self,
        file: &str,
        architecture: &str,
        fingerprint: Fingerprint,
        check: BaseCheck,
    ) -> Result<()> {
        let wrong = |message: String| Err(Error::WrongBase { file: file.into(), message });
        self.check_architecture(file, architecture)?;
        let mine = self.fingerprint;
        if fingerprint.shapes != mine.shapes {
            return wrong(format!(
                "was made for another base: {architecture} {fingerprint}; {} is {mine}, with other tensors \
                 or sizes",
                self.file
            ));
        }
        if check == BaseCheck::Exact && fingerprint.weights != mine.weights {
            return wrong(format!(
                "was made for a base with other weights or another quantization: {fingerprint}; {} is {mine}",
                self.file
            ));
        }
        Ok(())
    }

    pub(super) fn check_architecture(&self, file: &str, architecture: &str) -> Result<()> {
        if architecture == self.architecture {
            return Ok(());
        }
        let message = format!(
            "is an adapter for architecture `{architecture}`, the base {} is `{}`",
            self.file, self.architecture
        );
        Err(Error::WrongBase { file: file.into(), message })
    }
}

fn matrix(gguf: &Gguf, name: &str) -> Result<Option<(usize, usize)>> {
    let Some(info) = gguf.info(name) else { return Ok(None) };
    match *info.dims.as_slice() {
        [cols, rows] => Ok(Some((rows, cols))),
        ref d => Err(Error::tensor(&info.file, name, format!("has {} dimensions, expected 2", d.len()))),
    }
}

fn missing(gguf: &Gguf, name: &str) -> Error {
    Error::tensor(gguf.file(), name, "is missing")
}

/// q's width is what `attn_output` takes; k and v share the rest of the fused rows.
fn split_qkv(gguf: &Gguf, layer: usize, shapes: &mut SiteShapes) -> Result<bool> {
    let name = format!("blk.{layer}.attn_qkv.weight");
    let Some((rows, cols)) = matrix(gguf, &name)? else { return Ok(false) };
    let q = shapes.get(Site::layer(layer, Projection::AttnOutput)).map(|s| s.in_features);
    let q = q.ok_or_else(|| missing(gguf, &format!("blk.{layer}.attn_output.weight")))?;
    let kv = rows.checked_sub(q).filter(|kv| kv % 2 == 0).map(|kv| kv / 2);
    let kv = kv.ok_or_else(|| {
        Error::tensor(
            gguf.file(),
            &name,
            format!("has {rows} rows, {q} of them for q: no even rest for k and v"),
        )
    })?;
    shapes.set(Site::layer(layer, Projection::AttnQ), q, cols);
    shapes.set(Site::layer(layer, Projection::AttnK), kv, cols);
    shapes.set(Site::layer(layer, Projection::AttnV), kv, cols);
    Ok(true)
}

/// Without a gate of its own and with twice the rows that `ffn_down` takes, `ffn_up` holds both,
/// the gate first.
fn split_gate_up(layer: usize, shapes: &mut SiteShapes) -> bool {
    let [gate, up, down] = [Projection::FfnGate, Projection::FfnUp, Projection::FfnDown]
        .map(|p| (Site::layer(layer, p), shapes.get(Site::layer(layer, p))));
    let (None, Some(both), Some(down)) = (gate.1, up.1, down.1) else { return false };
    if both.out_features != 2 * down.in_features {
        return false;
    }
    shapes.set(gate.0, down.in_features, both.in_features);
    shapes.set(up.0, down.in_features, both.in_features);
    true
}

/// A base without weights, for tests and measurements: `llama` with these sizes.
pub fn synthetic_base(n_layers: usize, n_embd: usize, n_kv: usize, n_ff: usize, n_vocab: usize) -> BaseInfo {
    let mut shapes = SiteShapes::new(n_layers);
    shapes.set(Site::TOKEN_EMBD, n_embd, n_vocab);
    shapes.set(Site::OUTPUT, n_vocab, n_embd);
    for layer in 0..n_layers {
        use Projection::*;
        let sizes = [
            (AttnQ, n_embd, n_embd),
            (AttnK, n_kv, n_embd),
            (AttnV, n_kv, n_embd),
            (AttnOutput, n_embd, n_embd),
            (FfnGate, n_ff, n_embd),
            (FfnUp, n_ff, n_embd),
            (FfnDown, n_embd, n_ff),
        ];
        for (p, rows, cols) in sizes {
            shapes.set(Site::layer(layer, p), rows, cols);
        }
    }
    let mut h = Hasher::new();
    shapes.iter().for_each(|(site, s)| {
        h.number(site.index() as u64).number(s.out_features as u64).number(s.in_features as u64);
    });
    BaseInfo {
        file: "(synthetic)".into(),
        architecture: "llama".into(),
        name: None,
        n_vocab,
        shapes,
        fused_qkv: false,
        fused_gate_up: false,
        fingerprint: Fingerprint { shapes: h.finish() as u64, weights: 0 },
    }
}
