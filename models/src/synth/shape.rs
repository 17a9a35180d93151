//! Shapes of published models: their keys and tensors.

use crate::gguf::Writer;

/// The dimensions of a published model; sources are the models' own configuration files.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The name to ask for.
    pub name: &'static str,
    /// The published model that has these dimensions.
    pub like: &'static str,
    /// `general.architecture`.
    pub arch: &'static str,
    /// Number of layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width inside the feed-forward part.
    pub d_ff: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens.
    pub vocab: usize,
    /// Longest context the model claims.
    pub context: u32,
    tied: bool,
    rms_eps: f32,
    rope_base: f32,
    /// Llama 3's frequency scaling, by this factor.
    llama3_rope: Option<f32>,
}

/// A common base for the table below; every row names what differs.
const LLAMA3: Shape = Shape {
    name: "",
    like: "",
    arch: "llama",
    layers: 16,
    d_model: 2048,
    d_ff: 8192,
    heads: 32,
    kv_heads: 8,
    head_dim: 64,
    vocab: 128_256,
    context: 131_072,
    tied: true,
    rms_eps: 1e-5,
    rope_base: 500_000.0,
    llama3_rope: Some(32.0),
};

const QWEN: Shape = Shape {
    vocab: 151_936,
    rms_eps: 1e-6,
    rope_base: 1_000_000.0,
    llama3_rope: None,
    context: 32_768,
    ..LLAMA3
};

static SHAPES: &[Shape] = &[
    Shape {
        name: "llama-tiny",
        like: "nothing published: 2 layers and 512 tokens, for tests",
        layers: 2,
        d_model: 256,
        d_ff: 512,
        heads: 4,
        kv_heads: 2,
        vocab: 512,
        context: 2048,
        llama3_rope: None,
        ..LLAMA3
    },
    Shape {
        name: "smollm2-135m",
        like: "SmolLM2-135M",
        layers: 30,
        d_model: 576,
        d_ff: 1536,
        heads: 9,
        kv_heads: 3,
        vocab: 49_152,
        context: 8192,
        rope_base: 100_000.0,
        llama3_rope: None,
        ..LLAMA3
    },
    Shape {
        name: "qwen2-0.5b",
        like: "Qwen2.5-0.5B",
        arch: "qwen2",
        layers: 24,
        d_model: 896,
        d_ff: 4864,
        heads: 14,
        kv_heads: 2,
        ..QWEN
    },
    Shape {
        name: "qwen3-0.6b",
        like: "Qwen3-0.6B",
        arch: "qwen3",
        layers: 28,
        d_model: 1024,
        d_ff: 3072,
        heads: 16,
        head_dim: 128,
        context: 40_960,
        ..QWEN
    },
    Shape {
        name: "gemma3-1b",
        like: "Gemma-3-1B",
        arch: "gemma3",
        layers: 26,
        d_model: 1152,
        d_ff: 6912,
        heads: 4,
        kv_heads: 1,
        head_dim: 256,
        vocab: 262_144,
        ..QWEN
    },
    Shape { name: "llama-1b", like: "Llama-3.2-1B", ..LLAMA3 },
    Shape {
        name: "tinyllama-1.1b",
        like: "TinyLlama-1.1B",
        layers: 22,
        d_ff: 5632,
        kv_heads: 4,
        vocab: 32_000,
        context: 2048,
        tied: false,
        rope_base: 10_000.0,
        llama3_rope: None,
        ..LLAMA3
    },
    Shape {
        name: "llama-3b",
        like: "Llama-3.2-3B",
        layers: 28,
        d_model: 3072,
        heads: 24,
        head_dim: 128,
        ..LLAMA3
    },
    Shape {
        name: "llama-8b",
        like: "Llama-3.1-8B",
        layers: 32,
        d_model: 4096,
        d_ff: 14_336,
        head_dim: 128,
        tied: false,
        llama3_rope: Some(8.0),
        ..LLAMA3
    },
];

/// Every shape, from small to large.
pub fn shapes() -> &'static [Shape] {
    SHAPES
}

/// The shape of this name.
pub fn shape(name: &str) -> Option<&'static Shape> {
    SHAPES.iter().find(|s| s.name == name)
}

/// What a tensor is, as far as its format depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Output,
    AttnV,
    AttnOutput,
    FfnDown,
    /// Any other matrix.
    Matrix,
    /// Norms, biases, frequencies: always F32.
    Small,
}

/// How a tensor's values are made.
#[derive(Debug, Clone)]
pub(super) enum Init {
    /// Mean 0 and this deviation.
    Normal(f32),
    /// Near 1.
    Norm,
    Exact(Vec<f32>),
}

/// A tensor to be written.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    pub name: String,
    pub dims: Vec<usize>,
    pub role: Role,
    pub layer: usize,
    pub init: Init,
}

impl Shape {
    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(|t| t.dims.iter().product::<usize>() as u64).sum()
    }

    pub(super) fn keys(&self, w: &mut Writer) {
        let arch = self.arch;
        w.set("general.architecture", arch)
            .set("general.type", "model")
            .set("general.name", format!("synthetic {} (random weights, shape of {})", self.name, self.like));
        let mut int = |key: &str, v: usize| {
            w.set(&format!("{arch}.{key}"), v as u32);
        };
        int("block_count", self.layers);
        int("context_length", self.context as usize);
        int("embedding_length", self.d_model);
        int("feed_forward_length", self.d_ff);
        int("attention.head_count", self.heads);
        int("attention.head_count_kv", self.kv_heads);
        int("attention.key_length", self.head_dim);
        int("attention.value_length", self.head_dim);
        int("rope.dimension_count", self.head_dim);
        int("vocab_size", self.vocab);
        if arch == "gemma3" {
            int("attention.sliding_window", 512);
        }
        w.set(&format!("{arch}.attention.layer_norm_rms_epsilon"), self.rms_eps);
        w.set(&format!("{arch}.rope.freq_base"), self.rope_base);
    }

    /// All tensors in the order of the file.
    pub(super) fn tensors(&self) -> Vec<Spec> {
        let mut all = Vec::new();
        let (d, q, kv) = (self.d_model, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let embd = if self.tied { Role::Output } else { Role::Matrix };
        all.push(matrix("token_embd.weight".into(), [d, self.vocab], embd, 0));
        if !self.tied {
            all.push(matrix("output.weight".into(), [d, self.vocab], Role::Output, 0));
        }
        all.push(small("output_norm.weight".into(), d, Init::Norm));
        if let Some(factor) = self.llama3_rope {
            let values = self.llama3_factors(factor);
            all.push(small("rope_freqs.weight".into(), values.len(), Init::Exact(values)));
        }
        for layer in 0..self.layers {
            let at = |name: &str| format!("blk.{layer}.{name}");
            let weight = |name: &str, shape, role| matrix(at(&format!("{name}.weight")), shape, role, layer);
            let norm = |name: &str, n| small(at(&format!("{name}.weight")), n, Init::Norm);
            all.push(norm("attn_norm", d));
            all.push(weight("attn_q", [d, q], Role::Matrix));
            all.push(weight("attn_k", [d, kv], Role::Matrix));
            all.push(weight("attn_v", [d, kv], Role::AttnV));
            if self.arch == "qwen2" {
                for (name, n) in [("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)] {
                    all.push(small(at(name), n, Init::Normal(0.1)));
                }
            }
            if matches!(self.arch, "qwen3" | "gemma3") {
                all.push(norm("attn_q_norm", self.head_dim));
                all.push(norm("attn_k_norm", self.head_dim));
            }
            all.push(weight("attn_output", [q, d], Role::AttnOutput));
            if self.arch == "gemma3" {
                all.push(norm("post_attention_norm", d));
                all.push(norm("post_ffw_norm", d));
            }
            all.push(norm("ffn_norm", d));
            all.push(weight("ffn_gate", [d, self.d_ff], Role::Matrix));
            all.push(weight("ffn_up", [d, self.d_ff], Role::Matrix));
            all.push(weight("ffn_down", [self.d_ff, d], Role::FfnDown));
        }
        all
    }

    /// Llama 3.1's `rope_freqs`: divisors of each frequency, 1 for short waves, `factor` for long
    /// ones, in between a blend (source: the reference code that Meta published with 3.1).
    fn llama3_factors(&self, factor: f32) -> Vec<f32> {
        const OLD_CONTEXT: f32 = 8192.0;
        let (low, high) = (1.0f32, 4.0f32);
        let frequency = |i: usize| self.rope_base.powf(-((2 * i) as f32) / self.head_dim as f32);
        (0..self.head_dim / 2)
            .map(|i| {
                let wavelength = 2.0 * std::f32::consts::PI / frequency(i);
                if wavelength < OLD_CONTEXT / high {
                    1.0
                } else if wavelength > OLD_CONTEXT / low {
                    factor
                } else {
                    let smooth = (OLD_CONTEXT / wavelength - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            })
            .collect()
    }
}

/// A matrix whose product with a vector of unit size has unit size.
fn matrix(name: String, shape: [usize; 2], role: Role, layer: usize) -> Spec {
    let sigma = (shape[0] as f32).sqrt().recip();
    Spec { name, dims: shape.into(), role, layer, init: Init::Normal(sigma) }
}

fn small(name: String, n: usize, init: Init) -> Spec {
    Spec { name, dims: vec![n], role: Role::Small, layer: 0, init }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_the_published_ones() {
        // As the model cards and papers state them, in millions.
        for (name, millions) in [
            ("smollm2-135m", 134.5),
            ("qwen2-0.5b", 494.0),
            ("qwen3-0.6b", 596.0),
            ("gemma3-1b", 999.9),
            ("llama-1b", 1235.8),
            ("tinyllama-1.1b", 1100.0),
            ("llama-3b", 3212.7),
            ("llama-8b", 8030.3),
        ] {
            let got = shape(name).unwrap().parameters() as f64 / 1e6;
            assert!((got / millions - 1.0).abs() < 0.001, "{name}: {got}");
        }
    }

    #[test]
    fn rope_factors_run_from_one_to_the_factor() {
        let f = shape("llama-1b").unwrap().llama3_factors(32.0);
        assert_eq!(f.len(), 32);
        assert_eq!((f[0], f[31]), (1.0, 32.0));
        assert!(f.is_sorted());
        assert!(f.iter().any(|&x| x > 1.0 && x < 32.0));
    }
}
