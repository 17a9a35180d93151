//! Plain LoRA files as llama.cpp reads them, written.

use std::io::{BufWriter, Write};
use std::path::Path;

use lory_kernels::QuantType;
use lory_models::adapter::pack::Pack;
use lory_models::adapter::{
    Adapter, BaseInfo, CoreMatrix, Delta, Existing, Projection, Site, gguf_lora::FINGERPRINT_KEY, publish,
};
use lory_models::gguf::Writer;

use crate::factors::Factors;
use crate::storage::{Stored, read_matrix, u_of};
use crate::{Error, Result, linalg};

/// Writes `deltas` (ascending by site, scale folded into B) as a GGUF LoRA for `base`.
///
/// Where the base keeps q, k and v (or gate and up) in one tensor, theirs become one pair of joined rank,
/// since that is the only name the base has.
///
/// # Errors
/// A site that the base lacks; the file cannot be written (nothing is left then).
pub fn write_gguf_lora(
    path: &Path,
    base: &BaseInfo,
    name: &str,
    ty: QuantType,
    invocation: &[u32],
    deltas: Vec<(Site, Factors)>,
) -> Result<()> {
    let deltas = join_fused(base, deltas)?;
    let mut writer = Writer::new();
    writer
        .set("general.type", "adapter")
        .set("general.architecture", base.architecture.as_str())
        .set("general.name", name)
        .set("adapter.type", "lora")
        .set(FINGERPRINT_KEY, base.fingerprint.to_hex());
    // llama.cpp scales by alpha / rank: with the scale in B, alpha is the rank. It is one number for all
    // tensors, so with several ranks it is 0, which stands for a scale of 1.
    let mut ranks: Vec<usize> = deltas.iter().map(|d| d.1.b.ncols()).collect();
    ranks.dedup();
    let alpha = if let [rank] = ranks.as_slice() { *rank as f32 } else { 0.0 };
    writer.set("adapter.lora.alpha", alpha);
    if !invocation.is_empty() {
        writer.set("adapter.alora.invocation_tokens", invocation.to_vec());
    }
    let mut data: Vec<(String, Stored)> = Vec::with_capacity(2 * deltas.len());
    for (target, f) in &deltas {
        let turned = target == "token_embd";
        let (r, d_in) = f.a.shape();
        let a = match turned {
            true => Stored::new(ty, d_in, r, |i, j| f.a[(j, i)])?,
            false => Stored::new(ty, r, d_in, |i, j| f.a[(i, j)])?,
        };
        let b = Stored::new(ty, f.b.nrows(), r, |i, j| f.b[(i, j)])?;
        for (part, stored) in [("a", a), ("b", b)] {
            let tensor = format!("{target}.weight.lora_{part}");
            writer.tensor(&tensor, stored.ty, &[stored.cols, stored.rows]);
            data.push((tensor, stored));
        }
    }
    publish(path, Existing::Replace, |file| {
        let mut out = writer.start(BufWriter::new(file))?;
        for (tensor, stored) in &data {
            out.tensor(tensor, &stored.bytes)?;
        }
        out.finish()?.flush()
    })
    .map_err(Error::io(path))
}

/// Tensor names (without `.weight`) and deltas, joined where the base has one tensor for several sites.
fn join_fused(base: &BaseInfo, deltas: Vec<(Site, Factors)>) -> Result<Vec<(String, Factors)>> {
    let mut joined: Vec<(String, Factors)> = Vec::new();
    for (site, f) in deltas {
        let target = fused_name(base, site);
        let parts = base.targets(&target).ok_or_else(|| {
            Error::Request(format!("{site} is not in the base {}, which cannot take the adapter", base.file))
        })?;
        let rows: usize = parts.iter().map(|p| p.1.len()).sum();
        let Some((_, own)) = parts.into_iter().find(|p| p.0 == site) else {
            return Err(Error::Request(format!("{site} is not part of {target} in {}", base.file)));
        };
        let b = faer::Mat::from_fn(rows, f.b.ncols(), |i, j| {
            if own.contains(&i) { f.b[(i - own.start, j)] } else { 0.0 }
        });
        match joined.last_mut() {
            Some((last, so_far)) if *last == target => {
                let rank = so_far.b.ncols();
                let (b0, a0) = (so_far.b.clone(), so_far.a.clone());
                let width = rank + b.ncols();
                let pick = |i: usize, j: usize| if j < rank { b0[(i, j)] } else { b[(i, j - rank)] };
                so_far.b = faer::Mat::from_fn(rows, width, pick);
                let pick = |i: usize, j: usize| if i < rank { a0[(i, j)] } else { f.a[(i - rank, j)] };
                so_far.a = faer::Mat::from_fn(width, a0.ncols(), pick);
            }
            _ => joined.push((target, Factors { b, a: f.a })),
        }
    }
    Ok(joined)
}

fn fused_name(base: &BaseInfo, site: Site) -> String {
    let layer = site.layer_index().unwrap_or(0);
    match site.projection() {
        Some(Projection::AttnQ | Projection::AttnK | Projection::AttnV) if base.fused_qkv => {
            format!("blk.{layer}.attn_qkv")
        }
        Some(Projection::FfnGate | Projection::FfnUp) if base.fused_gate_up => format!("blk.{layer}.ffn_up"),
        _ => site.to_string(),
    }
}

/// The base as a pack remembers it. Whether its file keeps q, k and v in one tensor is not remembered: a
/// LoRA for such a base needs the base itself.
pub fn base_of(pack: &Pack) -> BaseInfo {
    let spec = pack.spec();
    BaseInfo {
        file: spec.base_name.as_str().into(),
        architecture: spec.architecture.clone(),
        name: Some(spec.base_name.clone()),
        n_vocab: spec.shapes.get(Site::TOKEN_EMBD).map_or(0, |s| s.in_features),
        shapes: spec.shapes.clone(),
        fused_qkv: false,
        fused_gate_up: false,
        fingerprint: spec.fingerprint,
    }
}

/// The deltas of a packed adapter as plain factors: B = scale · U C, A = Vᵀ, in f32.
///
/// # Errors
/// An adapter with row scales or biases (DoRA, `lora_bias`), which plain LoRA files have no place for.
pub fn plain_factors(adapter: &Adapter) -> Result<Vec<(Site, Factors)>> {
    let mut deltas = Vec::with_capacity(adapter.cores().len());
    for (site, core) in adapter.cores() {
        if core.delta_scale.is_some() || core.row_scale.is_some() || core.bias.is_some() {
            return Err(Error::Request(format!(
                "adapter `{}` has row scales or a bias at {site}, which a plain LoRA file cannot hold",
                adapter.name()
            )));
        }
        let matrix = match &core.delta {
            Delta::Shared(m) | Delta::Private(_, m) => m,
            Delta::None => continue,
        };
        let Some(factors) = adapter.factors(*site) else { continue };
        let matrix_of = |t: &lory_models::Tensor| {
            let m = t.matrix();
            read_matrix(m.ty(), m.rows(), m.cols(), m.bytes())
        };
        let (u, v) = (u_of(factors)?, matrix_of(factors.v())?);
        let a = if *site == Site::TOKEN_EMBD { v.transpose().to_owned() } else { v };
        let b = match matrix {
            CoreMatrix::Identity => u,
            CoreMatrix::Full(c) => linalg::mul(u.as_ref(), matrix_of(c)?.as_ref()),
            CoreMatrix::Diagonal(c) => {
                let c = matrix_of(c)?;
                faer::Mat::from_fn(u.nrows(), u.ncols(), |i, j| u[(i, j)] * c[(0, j)])
            }
        };
        let b = faer::Mat::from_fn(b.nrows(), b.ncols(), |i, j| b[(i, j)] * core.scale);
        deltas.push((*site, Factors { b, a }));
    }
    Ok(deltas)
}

/// Writes one adapter of a pack as a plain GGUF LoRA in `ty` (F32 keeps every number).
///
/// # Errors
/// A name that is not in the pack, an adapter that plain LoRA cannot express, a file that cannot be written.
pub fn extract(pack: &Pack, name: &str, base: &BaseInfo, ty: QuantType, path: &Path) -> Result<()> {
    let adapter = pack.adapter(name)?;
    let deltas = plain_factors(&adapter)?;
    write_gguf_lora(path, base, name, ty, adapter.invocation(), deltas)
}
