//! The other way: plain factors as the two files that PEFT loads.

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::json;

use crate::{
    Error, Result,
    adapter::{BaseInfo, Projection, Site},
};

use super::{
    factors::{Factors, Matrix},
    modules::{PermutedHeads, original_row},
};

/// The contents of a PEFT folder.
#[derive(Clone, Debug)]
pub struct PeftFiles {
    /// `adapter_config.json`.
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`, in F32.
    pub weights: Vec<u8>,
}

impl PeftFiles {
    /// A plain LoRA of these deltas, ascending by site, for the model that `base` was converted from; `permuted`
    /// says how the base's file keeps q and k ([`PermutedHeads::from_metadata`]).
    ///
    /// Scales go into B, and alpha is the rank everywhere. Where the original model has one module for several sites
    /// (`qkv_proj`, `gate_up_proj`), their factors become one pair of joined rank.
    ///
    /// # Errors
    /// [`Error::Request`] for a site or a number of rows that the base does not have, and for row norms and biases,
    /// which a plain LoRA has no place for.
    pub fn new(
        base: &BaseInfo,
        permuted: Option<PermutedHeads>,
        deltas: &[(Site, Factors)],
    ) -> Result<PeftFiles> {
        let mut modules: BTreeMap<String, Factors> = BTreeMap::new();
        for (site, f) in deltas {
            let (module, rows, start) = place(base, *site)?;
            let own = original_order(base, *site, f, permuted)?;
            let mut data = vec![0.0; rows * own.a.rows];
            let at = start * own.a.rows;
            data.get_mut(at..at + own.b.data.len())
                .ok_or_else(|| Error::Request(format!("{site} does not fit `{module}`")))?
                .copy_from_slice(&own.b.data);
            let b = Matrix { rows, cols: own.a.rows, data };
            let joined = match modules.remove(&module) {
                None => Factors { b, ..own },
                Some(before) => join(before, own.a, b),
            };
            modules.insert(module, joined);
        }
        let config = config(base, &modules);
        Ok(PeftFiles { config, weights: weights(&modules)? })
    }
}

/// The module of a site in the original model, its outputs, and where the site's begin.
fn place(base: &BaseInfo, site: Site) -> Result<(String, usize, usize)> {
    let lacks = || Error::Request(format!("the base {} has no {site}", base.file));
    let rows = base.shapes.get(site).ok_or_else(lacks)?.out_features;
    let (Some(layer), Some(projection)) = (site.layer_index(), site.projection()) else {
        let name = if site == Site::TOKEN_EMBD { "model.embed_tokens" } else { "lm_head" };
        return Ok((name.into(), rows, 0));
    };
    use Projection::*;
    let fused = match projection {
        AttnQ | AttnK | AttnV if base.fused_qkv => Some(("attn_qkv", "self_attn.qkv_proj")),
        FfnGate | FfnUp if base.fused_gate_up => Some(("ffn_up", "mlp.gate_up_proj")),
        _ => None,
    };
    if let Some((target, module)) = fused {
        let parts = base.targets(&format!("blk.{layer}.{target}")).ok_or_else(lacks)?;
        let own = parts.iter().find(|(s, _)| *s == site).ok_or_else(lacks)?.1.start;
        let all = parts.iter().map(|(_, range)| range.len()).sum();
        return Ok((format!("model.layers.{layer}.{module}"), all, own));
    }
    let module = match projection {
        AttnQ => "self_attn.q_proj",
        AttnK => "self_attn.k_proj",
        AttnV => "self_attn.v_proj",
        AttnOutput => "self_attn.o_proj",
        FfnGate => "mlp.gate_proj",
        FfnUp => "mlp.up_proj",
        FfnDown => "mlp.down_proj",
    };
    Ok((format!("model.layers.{layer}.{module}"), rows, 0))
}

/// With the scale in B, and B's rows as the original model has them.
fn original_order(
    base: &BaseInfo,
    site: Site,
    f: &Factors,
    permuted: Option<PermutedHeads>,
) -> Result<Factors> {
    if f.bias.is_some() || f.magnitude.is_some() {
        return Err(Error::Request(format!(
            "{site} has row norms or a bias, which a plain LoRA cannot hold"
        )));
    }
    let (rows, cols) = (f.b.rows, f.b.cols);
    let shape = base.shapes.get(site).map(|s| (s.out_features, s.in_features));
    if shape != Some((rows, f.a.cols)) || cols != f.a.rows || f.b.data.len() != rows * cols {
        let m = format!("{site} has factors of {rows} x {cols} and {} x {}", f.a.rows, f.a.cols);
        return Err(Error::Request(m));
    }
    let heads = permuted.and_then(|p| p.of(site));
    if let Some(heads) = heads.filter(|h| *h == 0 || !rows.is_multiple_of(2 * h)) {
        return Err(Error::Request(format!("{site} has {rows} rows, which are not {heads} even heads")));
    }
    let mut data = vec![0.0; rows * cols];
    for r in 0..rows {
        let to = heads.map_or(r, |heads| original_row(r, rows, heads)) * cols;
        let row = data.get_mut(to..to + cols).unwrap_or_default();
        row.iter_mut().zip(f.b.row(r)).for_each(|(to, from)| *to = from * f.scale);
    }
    let b = Matrix { rows, cols, data };
    Ok(Factors { a: f.a.clone(), b, scale: 1.0, bias: None, magnitude: None })
}

/// `[B₁ B₂] [A₁; A₂]`.
fn join(first: Factors, a: Matrix, b: Matrix) -> Factors {
    let mut wide = Vec::with_capacity(first.b.data.len() + b.data.len());
    for r in 0..b.rows {
        wide.extend_from_slice(first.b.row(r));
        wide.extend_from_slice(b.row(r));
    }
    let mut tall = first.a.data;
    tall.extend_from_slice(&a.data);
    let rank = first.a.rows + a.rows;
    Factors {
        a: Matrix { rows: rank, cols: a.cols, data: tall },
        b: Matrix { rows: b.rows, cols: rank, data: wide },
        ..first
    }
}

fn config(base: &BaseInfo, modules: &BTreeMap<String, Factors>) -> Vec<u8> {
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    modules.values().for_each(|f| *counts.entry(f.a.rows).or_default() += 1);
    let rank = counts.iter().max_by_key(|(_, n)| **n).map_or(1, |(rank, _)| *rank);
    let others: BTreeMap<&String, usize> =
        modules.iter().filter(|(_, f)| f.a.rows != rank).map(|(m, f)| (m, f.a.rows)).collect();
    let config = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": modules.keys().collect::<Vec<_>>(),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
    });
    let mut text = serde_json::to_vec_pretty(&config).unwrap_or_default();
    text.push(b'\n');
    text
}

fn weights(modules: &BTreeMap<String, Factors>) -> Result<Vec<u8>> {
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::with_capacity(2 * modules.len());
    for (module, f) in modules {
        let names = match module.ends_with("embed_tokens") {
            true => ["lora_embedding_A", "lora_embedding_B"],
            false => ["lora_A.weight", "lora_B.weight"],
        };
        for (part, m) in names.into_iter().zip([&f.a, &f.b]) {
            let bytes = m.data.iter().flat_map(|v| v.to_le_bytes()).collect();
            tensors.push((format!("base_model.model.{module}.{part}"), vec![m.rows, m.cols], bytes));
        }
    }
    let fail = |e: safetensors::SafeTensorError| Error::Request(format!("adapter_model.safetensors: {e}"));
    let views = tensors.iter().map(|(name, shape, bytes)| {
        Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(fail)?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    // What PEFT itself says of its tensors.
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize(views, Some(about)).map_err(fail)
}
