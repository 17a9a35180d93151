//! What varies between the decoders of the supported families, as data.

use lory_kernels::backend::Activation;

use crate::{
    Result,
    arch::Arch,
    gguf::{Array, Metadata, Value},
    rope::RopeConfig,
};

/// Limits that no real model of these families comes near; they bound what a file can make us allocate.
const MAX_LAYERS: u32 = 1024;
const MAX_HEADS: u32 = 4096;
const MAX_HEAD_DIM: u32 = 1024;
const MAX_EMBD: u32 = 1 << 20;

/// Which part of q and k an RMS norm covers before the rotation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// No norm.
    None,
    /// Each head by itself, one weight of `head_dim` (Qwen 3, Gemma 3).
    PerHead,
    /// All heads together, a weight as wide as the projection (OLMo 2).
    Full,
}

/// Where the RMS norms of a layer stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// Before attention and before the feed-forward (Llama).
    Pre,
    /// After each, before the residual sum (OLMo 2).
    Post,
    /// Both (Gemma 2 and 3).
    PreAndPost,
}

impl NormPlacement {
    /// Whether a sublayer's input is normed.
    pub fn pre(self) -> bool {
        self != NormPlacement::Post
    }

    /// Whether a sublayer's output is normed.
    pub fn post(self) -> bool {
        self != NormPlacement::Pre
    }
}

/// What differs from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerConfig {
    /// Sliding window of the layer's attention; `None` attends to everything before.
    pub window: Option<u32>,
    /// Index into [`Config::ropes`]; `None` for a layer without position embedding.
    pub rope: Option<usize>,
}

/// A decoder-only transformer of the Llama family, in numbers.
#[derive(Clone, Debug)]
pub struct Config {
    /// The family.
    pub arch: Arch,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Width of the feed-forward.
    pub n_ff: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key-value heads.
    pub n_kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Longest sequence the model was trained on, as its file says.
    pub n_ctx_train: u32,
    /// ε of every RMS norm.
    pub rms_eps: f32,
    /// Factor on token embeddings.
    pub embed_scale: f32,
    /// Factor on q·k.
    pub attention_scale: f32,
    /// Soft cap on attention scores.
    pub attention_softcap: Option<f32>,
    /// Soft cap on logits.
    pub final_softcap: Option<f32>,
    /// Nonlinearity of the gated feed-forward.
    pub activation: Activation,
    /// Norms of q and k.
    pub qk_norm: QkNorm,
    /// Where norms stand.
    pub norms: NormPlacement,
    /// q, k, v in one tensor and gate, up in another; split when loaded.
    pub fused: bool,
    /// The output projection is the token embedding when the file has no `output.weight`.
    pub may_tie: bool,
    /// Position embeddings used by some layer.
    pub ropes: Vec<RopeConfig>,
    /// One entry per layer.
    pub layers: Vec<LayerConfig>,
}

/// Typed reading of `<arch>.<name>` keys.
pub struct Keys<'a> {
    meta: &'a Metadata,
    prefix: &'static str,
}

impl<'a> Keys<'a> {
    /// Keys of `prefix` in `meta`.
    pub fn new(meta: &'a Metadata, prefix: &'static str) -> Self {
        Keys { meta, prefix }
    }

    /// The whole key of `name`.
    pub fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    /// An optional count.
    pub fn opt_u32(&self, name: &str) -> Result<Option<u32>> {
        self.meta.opt_u32(&self.key(name))
    }

    /// An optional float.
    pub fn opt_f32(&self, name: &str) -> Result<Option<f32>> {
        self.meta.opt_f32(&self.key(name))
    }

    /// An optional string.
    pub fn opt_str(&self, name: &str) -> Result<Option<&'a str>> {
        self.meta.opt_str(&self.key(name))
    }

    /// An optional float that must be above zero, and far from both ends of what an f32 holds: two of them may meet in a
    /// product.
    pub fn opt_positive(&self, name: &str) -> Result<Option<f32>> {
        match self.opt_f32(name)? {
            Some(v) if v <= 0.0 => Err(self.error(name, format!("is {v}, must be above 0"))),
            Some(v) if !(1e-15..=1e15).contains(&v) => {
                Err(self.error(name, format!("is {v:e}, must be from 1e-15 to 1e15")))
            }
            other => Ok(other),
        }
    }

    /// A count from 1 to `max`.
    pub fn count(&self, name: &str, max: u32) -> Result<usize> {
        self.in_range(name, self.meta.u32(&self.key(name))?, max)
    }

    /// An optional count from 1 to `max`.
    pub fn opt_count(&self, name: &str, max: u32) -> Result<Option<usize>> {
        self.opt_u32(name)?.map(|v| self.in_range(name, v, max)).transpose()
    }

    fn in_range(&self, name: &str, v: u32, max: u32) -> Result<usize> {
        if v == 0 || v > max {
            return Err(self.error(name, format!("is {v}, must be from 1 to {max}")));
        }
        Ok(v as usize)
    }

    /// A count that may also be written as one number per layer, all equal.
    pub fn per_layer_count(&self, name: &str, n_layers: usize, max: u32) -> Result<Option<usize>> {
        let key = self.key(name);
        if !matches!(self.meta.get(&key), Some(Value::Array(_))) {
            return self.opt_count(name, max);
        }
        let values = self.meta.opt_ints(&key)?.unwrap_or_default();
        if values.len() != n_layers {
            return Err(self.error(name, format!("has {} entries for {n_layers} layers", values.len())));
        }
        let first = values.first().copied().unwrap_or(0);
        if let Some((i, v)) = values.iter().enumerate().find(|(_, v)| **v != first) {
            let message =
                format!("differs between layers ({first} in layer 0, {v} in layer {i}): not supported");
            return Err(self.error(name, message));
        }
        let v = u32::try_from(first).map_err(|_| self.error(name, format!("is {first}")))?;
        self.in_range(name, v, max).map(Some)
    }

    /// Which layers slide: an array of booleans, or a period `n` (every n-th layer attends to all).
    pub fn window_pattern(&self, n_layers: usize, default_period: u32) -> Result<Vec<bool>> {
        const NAME: &str = "attention.sliding_window_pattern";
        let key = self.key(NAME);
        if let Some(Value::Array(array)) = self.meta.get(&key) {
            let flags = match array {
                Array::Bool(a) => a.clone(),
                other => match other.to_i64() {
                    Some(a) => a.iter().map(|v| *v != 0).collect(),
                    None => return Err(self.error(NAME, "is an array of neither bools nor integers")),
                },
            };
            if flags.len() != n_layers {
                return Err(self.error(NAME, format!("has {} entries for {n_layers} layers", flags.len())));
            }
            return Ok(flags);
        }
        let period = self.opt_u32(NAME)?.unwrap_or(default_period) as usize;
        Ok((0..n_layers).map(|il| period == 0 || il % period < period - 1).collect())
    }

    /// An error about `name`.
    pub fn error(&self, name: &str, message: impl Into<String>) -> crate::Error {
        self.meta.error(&self.key(name), message)
    }
}

impl Config {
    /// Reads the numbers of a model from its metadata.
    ///
    /// `n_ctx` is the longest sequence that will be run: LongRoPE chooses its factors by it.
    pub fn from_metadata(meta: &Metadata, n_ctx: u32) -> Result<Config> {
        let arch = Arch::from_metadata(meta)?;
        let keys = Keys::new(meta, arch.prefix());
        let n_layers = keys.count("block_count", MAX_LAYERS)?;
        if let Some(n @ 1..) = keys.opt_u32("expert_count")? {
            return Err(
                keys.error("expert_count", format!("is {n}: mixture-of-experts models are not supported"))
            );
        }
        let n_embd = keys.count("embedding_length", MAX_EMBD)?;
        let n_heads = keys.per_layer_count("attention.head_count", n_layers, MAX_HEADS)?;
        let n_heads = n_heads.ok_or_else(|| keys.error("attention.head_count", "is missing"))?;
        let n_kv_heads =
            keys.per_layer_count("attention.head_count_kv", n_layers, MAX_HEADS)?.unwrap_or(n_heads);
        if n_heads % n_kv_heads != 0 {
            let message = format!("is {n_kv_heads}, which does not divide the {n_heads} query heads");
            return Err(keys.error("attention.head_count_kv", message));
        }
        let head_dim = match keys.opt_count("attention.key_length", MAX_HEAD_DIM)? {
            Some(n) => n,
            None if n_embd % n_heads == 0 => n_embd / n_heads,
            None => {
                let message =
                    format!("is {n_embd}, not a multiple of the {n_heads} heads, and no key_length is given");
                return Err(keys.error("embedding_length", message));
            }
        };
        let value_len = keys.opt_count("attention.value_length", MAX_HEAD_DIM)?.unwrap_or(head_dim);
        if value_len != head_dim {
            let message = format!("is {value_len}, but keys have {head_dim}: not supported");
            return Err(keys.error("attention.value_length", message));
        }
        if head_dim % 2 != 0 || head_dim > MAX_HEAD_DIM as usize {
            let message = format!("gives heads of {head_dim}, which must be even and at most {MAX_HEAD_DIM}");
            return Err(keys.error("attention.key_length", message));
        }
        let n_ff = keys.per_layer_count("feed_forward_length", n_layers, MAX_EMBD * 4)?;
        let n_ff = n_ff.ok_or_else(|| keys.error("feed_forward_length", "is missing"))?;
        let rms_eps = keys.opt_positive("attention.layer_norm_rms_epsilon")?;
        let rms_eps = rms_eps.ok_or_else(|| keys.error("attention.layer_norm_rms_epsilon", "is missing"))?;
        let attention_scale =
            keys.opt_positive("attention.scale")?.unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt());
        let mut config = Config {
            arch,
            n_embd,
            n_ff,
            n_heads,
            n_kv_heads,
            head_dim,
            n_ctx_train: keys.opt_u32("context_length")?.unwrap_or(2048),
            rms_eps,
            embed_scale: 1.0,
            attention_scale,
            attention_softcap: None,
            final_softcap: None,
            activation: Activation::Silu,
            qk_norm: QkNorm::None,
            norms: NormPlacement::Pre,
            fused: false,
            may_tie: true,
            ropes: vec![RopeConfig::from_keys(&keys, arch.rope_style(), head_dim, n_ctx)?],
            layers: vec![LayerConfig { window: None, rope: Some(0) }; n_layers],
        };
        arch.refine(&keys, &mut config)?;
        Ok(config)
    }

    /// Width of the query projection.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of the key and the value projection.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Number of layers.
    pub fn n_layers(&self) -> usize {
        self.layers.len()
    }
}
