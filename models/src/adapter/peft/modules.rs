//! From names in a PEFT file to sites of the base.

use std::ops::Range;

use crate::{
    Error, Result,
    adapter::{BaseInfo, Projection, Site},
    config::Config,
    gguf::Metadata,
};

/// Which tensor of a module's adapter it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    A,
    B,
    BBias,
    E,
    EmbeddingA,
    EmbeddingB,
    Magnitude,
    BaseWeight,
}

/// Suffixes of the keys that `save_pretrained` writes for LoRA and AdaLoRA.
const PARTS: [(&str, Part); 11] = [
    (".lora_A.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_B.bias", Part::BBias),
    // AdaLoRA's are parameters, not modules.
    (".lora_A", Part::A),
    (".lora_B", Part::B),
    (".lora_E", Part::E),
    (".lora_embedding_A", Part::EmbeddingA),
    (".lora_embedding_B", Part::EmbeddingB),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_magnitude_vector.weight", Part::Magnitude),
    (".base_layer.weight", Part::BaseWeight),
];

/// Takes `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` apart into the module's
/// path in the base and the tensor's role. A wrapped wrapper leaves the prefix twice.
///
/// # Errors
/// [`Error::Tensor`] for a tensor that would not be used.
pub(super) fn split_key<'k>(file: &str, key: &'k str) -> Result<(&'k str, Part)> {
    const PREFIX: &str = "base_model.model.";
    let Some(mut path) = key.strip_prefix(PREFIX) else {
        return Err(Error::tensor(file, key, format!("does not start with `{PREFIX}`: no PEFT adapter's")));
    };
    while let Some(rest) = path.strip_prefix(PREFIX) {
        path = rest;
    }
    match PARTS.iter().find_map(|(suffix, part)| Some((path.strip_suffix(suffix)?, *part))) {
        Some(found) => Ok(found),
        None => {
            let why = if path.contains("trainable_tokens") {
                "it replaces rows of the embedding (trainable_token_indices), which is not supported"
            } else if path.ends_with(".weight") || path.ends_with(".bias") {
                "it replaces a weight of the base (modules_to_save or bias), which is not supported"
            } else {
                "it is no tensor of a LoRA"
            };
            Err(Error::tensor(file, key, format!("would not be used: {why}")))
        }
    }
}

/// The sites that a module of the original model stands for, each with its share of the output
/// rows: one, or several for a fused projection.
///
/// # Errors
/// [`Error::WrongBase`] for a module that the base does not have.
pub(super) fn locate(file: &str, module: &str, base: &BaseInfo) -> Result<Vec<(Site, Range<usize>)>> {
    sites(module, base).ok_or_else(|| {
        let message = format!(
            "has weights for `{module}`, which the base {} ({}, {} layers) does not have",
            base.file,
            base.architecture,
            base.shapes.n_layers()
        );
        Error::WrongBase { file: file.into(), message }
    })
}

fn sites(module: &str, base: &BaseInfo) -> Option<Vec<(Site, Range<usize>)>> {
    use Projection::*;
    let whole = |site: Site| Some(vec![(site, 0..base.shapes.get(site)?.out_features)]);
    // The text half of a model with images keeps its layers one module deeper.
    let inner = ["model.language_model.", "language_model.model.", "language_model.", "model.", ""]
        .iter()
        .find_map(|p| module.strip_prefix(p))?;
    match inner {
        "embed_tokens" => return whole(Site::TOKEN_EMBD),
        "lm_head" => return whole(Site::OUTPUT),
        _ => {}
    }
    let (layer, projection) = inner.strip_prefix("layers.")?.split_once('.')?;
    let layer = Site::parse(&format!("blk.{layer}.attn_q"))?.layer_index()?;
    let projection = match projection {
        "self_attn.q_proj" => AttnQ,
        "self_attn.k_proj" => AttnK,
        "self_attn.v_proj" => AttnV,
        "self_attn.o_proj" => AttnOutput,
        "mlp.gate_proj" => FfnGate,
        "mlp.up_proj" => FfnUp,
        "mlp.down_proj" => FfnDown,
        "self_attn.qkv_proj" if base.fused_qkv => return base.targets(&format!("blk.{layer}.attn_qkv")),
        "mlp.gate_up_proj" if base.fused_gate_up => return base.targets(&format!("blk.{layer}.ffn_up")),
        _ => return None,
    };
    whole(Site::layer(layer, projection))
}

/// Heads of q and k, where the base's file keeps their rows in another order than the model that
/// the adapter was trained on: adjacent pairs instead of halves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PermutedHeads {
    /// Query heads.
    pub n_heads: usize,
    /// Key heads.
    pub n_kv_heads: usize,
}

impl PermutedHeads {
    /// Reads it off a model's metadata; `None` for the families that keep the order. llama.cpp's
    /// converter permutes for `llama` and `smollm3` (`conversion/llama.py`, `undo_permute`).
    ///
    /// # Errors
    /// A model that [`Config::from_metadata`] refuses.
    pub fn from_metadata(m: &Metadata) -> Result<Option<PermutedHeads>> {
        let arch = m.str("general.architecture")?;
        if !matches!(arch, "llama" | "smollm3") {
            return Ok(None);
        }
        // As the model that runs counts them, however its file writes the numbers.
        let Config { n_heads, n_kv_heads, .. } = Config::from_metadata(m, 1)?;
        Ok(Some(PermutedHeads { n_heads, n_kv_heads }))
    }

    /// Heads of the rows of `site`, if those are permuted.
    pub(super) fn of(self, site: Site) -> Option<usize> {
        match site.projection() {
            Some(Projection::AttnQ) => Some(self.n_heads),
            Some(Projection::AttnK) => Some(self.n_kv_heads),
            _ => None,
        }
    }
}

/// Where row `row` of the file's order comes from in the original order; `rows` is a multiple of
/// 2 · `heads`.
pub(super) fn original_row(row: usize, rows: usize, heads: usize) -> usize {
    let width = rows / heads;
    let (head, i) = (row / width, row % width);
    head * width + (i % 2) * (width / 2) + i / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::synthetic_base;

    #[test]
    fn keys_come_apart() {
        let key = "base_model.model.base_model.model.model.layers.3.mlp.up_proj.lora_B.bias";
        assert_eq!(split_key("f", key), Ok(("model.layers.3.mlp.up_proj", Part::BBias)));
        let ada = "base_model.model.model.layers.3.mlp.up_proj.lora_A";
        assert_eq!(split_key("f", ada), Ok(("model.layers.3.mlp.up_proj", Part::A)));
        for (key, word) in [
            ("model.layers.0.mlp.up_proj.lora_A.weight", "does not start"),
            ("base_model.model.lm_head.weight", "modules_to_save"),
            ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token"),
            ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", "modules_to_save or bias"),
            ("base_model.model.model.layers.0.mlp.down_proj.ia3_l", "no tensor of a LoRA"),
        ] {
            let text = split_key("f", key).expect_err(key).to_string();
            assert!(text.contains(word), "{text}");
        }
    }

    #[test]
    fn modules_find_their_sites() {
        let base = synthetic_base(2, 8, 4, 16, 10);
        let found = |m: &str| locate("f", m, &base).map(|s| s[0].0.to_string());
        assert_eq!(found("model.layers.1.self_attn.o_proj").as_deref(), Ok("blk.1.attn_output"));
        assert_eq!(found("model.language_model.layers.0.mlp.gate_proj").as_deref(), Ok("blk.0.ffn_gate"));
        assert_eq!(found("lm_head").as_deref(), Ok("output"));
        for module in
            ["model.layers.2.mlp.up_proj", "model.layers.0.mlp.gate_up_proj", "transformer.h.0.attn.c_attn"]
        {
            assert!(matches!(found(module), Err(Error::WrongBase { .. })), "{module}");
        }
    }

    #[test]
    fn rows_go_from_halves_to_pairs() {
        let order: Vec<_> = (0..12).map(|r| original_row(r, 12, 2)).collect();
        assert_eq!(order, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
    }
}
