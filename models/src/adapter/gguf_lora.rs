//! Plain LoRA adapters as llama.cpp writes them.
//!
//! A GGUF file with `general.type = "adapter"`, `adapter.type = "lora"`, `adapter.lora.alpha`, and
//! per weight of the base a pair `NAME.lora_a` (r × in) and `NAME.lora_b` (out × r). The delta is
//! `scale · B · A` with scale = alpha / r, or 1 where alpha is 0; r is read off each pair.
//! `token_embd.weight.lora_a` is turned (in × r), since its rows are looked up by token.
//! Source: llama.cpp `src/llama-adapter.cpp`, `src/llama-graph.cpp` and `convert_lora_to_gguf.py`.
//!
//! llama.cpp skips norm weights that some adapters carry; here they are an error, because the
//! answers would be others than the adapter's author had.

use std::collections::BTreeMap;

use crate::{
    Error, Result, Tensor,
    gguf::{Array, Gguf, Metadata, Value},
};

use super::{
    Adapter, AdapterBuilder, BaseCheck, BaseInfo, Core, CoreMatrix, Delta, Factors, Site,
    finite::{check_finite, check_type},
};

/// Optional key of files that this program writes: the base's [`Fingerprint`](super::Fingerprint).
pub const FINGERPRINT_KEY: &str = "lory.base.fingerprint";

/// Reads an adapter for `base`; its factors stay in the file's bytes.
///
/// # Errors
/// A file that is no LoRA adapter, [`Error::WrongBase`] for another architecture, and an error
/// that names tensor and sizes for everything in it that does not fit the base or is not used.
pub fn load(name: &str, gguf: &Gguf, base: &BaseInfo) -> Result<Adapter> {
    let m = gguf.metadata();
    check_kind(m)?;
    base.check_architecture(m.file(), m.str("general.architecture")?)?;
    if let Some(text) = m.opt_str(FINGERPRINT_KEY)? {
        let fingerprint =
            text.parse().map_err(|()| m.error(FINGERPRINT_KEY, "is not 32 hexadecimal digits"))?;
        base.check(m.file(), &base.architecture, fingerprint, BaseCheck::Exact)?;
    }
    let alpha = m.f32("adapter.lora.alpha")?;
    let mut builder = AdapterBuilder::new(name).invocation(invocation(m, base.n_vocab)?);
    let pairs = pairs(gguf)?;
    if pairs.is_empty() {
        return Err(Error::container(gguf.file(), "is a LoRA adapter without any tensor"));
    }
    for (target, pair) in pairs {
        let (a, b) = pair.complete(gguf, &target)?;
        let sites = target.strip_suffix(".weight").and_then(|t| base.targets(t));
        let sites = sites.ok_or_else(|| {
            let m = format!("the base {} ({}) has no tensor `{target}`", base.file, base.architecture);
            Error::tensor(gguf.file(), a.name(), m)
        })?;
        check_type(&a)?;
        check_type(&b)?;
        for (site, core) in split(&sites, &a, &b, alpha, base)? {
            builder.core(site, core);
        }
        check_finite(&a)?;
        check_finite(&b)?;
    }
    builder.build(&base.shapes)
}

/// One core per site of a (possibly fused) target.
fn split(
    sites: &[(Site, std::ops::Range<usize>)],
    a: &Tensor,
    b: &Tensor,
    alpha: f32,
    base: &BaseInfo,
) -> Result<Vec<(Site, Core)>> {
    let rows: usize = sites.iter().map(|(_, range)| range.len()).sum();
    let fused = sites.len() > 1;
    if fused && b.rows() != rows {
        let m = format!("gives {} outputs, the fused tensor of {} has {rows}", b.rows(), base.file);
        return Err(Error::tensor(b.file(), b.name(), m));
    }
    let one = |(site, range): &(Site, std::ops::Range<usize>)| {
        let shape = base.shapes.get(*site).ok_or_else(|| {
            Error::tensor(b.file(), b.name(), format!("the base {} has no {site}", base.file))
        })?;
        let u = if fused { b.slice_rows(range.clone())? } else { b.clone() };
        let factors = Factors::new(*site, shape, u, a.clone())?;
        // llama.cpp's rule, which also defines what an alpha of 0 means.
        let scale = if alpha == 0.0 { 1.0 } else { alpha / factors.rank() as f32 };
        Ok((*site, Core::new(Delta::Private(factors, CoreMatrix::Identity), scale)))
    };
    sites.iter().map(one).collect()
}

fn check_kind(m: &Metadata) -> Result<()> {
    let kind = m.opt_str("general.type")?.unwrap_or("model");
    if kind != "adapter" {
        return Err(m.error("general.type", format!("is `{kind}`, expected `adapter`: this is no adapter")));
    }
    match m.str("adapter.type")? {
        "lora" => Ok(()),
        super::pack::ADAPTER_TYPE => {
            Err(m.error("adapter.type", "is a pack of many adapters: open it as a pack and name one of them"))
        }
        other => Err(m.error("adapter.type", format!("is `{other}`, expected `lora`"))),
    }
}

fn invocation(m: &Metadata, n_vocab: usize) -> Result<Vec<u32>> {
    const KEY: &str = "adapter.alora.invocation_tokens";
    let tokens = match m.get(KEY) {
        None => return Ok(Vec::new()),
        Some(Value::Array(Array::U32(tokens))) => tokens,
        Some(other) => {
            return Err(m.error(KEY, format!("is {}, expected an array of uint32", other.type_name())));
        }
    };
    match tokens.iter().find(|t| **t as usize >= n_vocab) {
        Some(t) => Err(m.error(KEY, format!("holds token {t}, the base has {n_vocab}"))),
        None => Ok(tokens.clone()),
    }
}

#[derive(Default)]
struct Pair {
    a: Option<Tensor>,
    b: Option<Tensor>,
}

impl Pair {
    fn complete(self, gguf: &Gguf, target: &str) -> Result<(Tensor, Tensor)> {
        match (self.a, self.b) {
            (Some(a), Some(b)) => Ok((a, b)),
            (Some(a), None) => {
                Err(Error::tensor(gguf.file(), a.name(), format!("`{target}.lora_b` is missing")))
            }
            (None, b) => {
                let name = b.map_or(target.into(), |b| b.name().to_owned());
                Err(Error::tensor(gguf.file(), &name, format!("`{target}.lora_a` is missing")))
            }
        }
    }
}

fn pairs(gguf: &Gguf) -> Result<BTreeMap<String, Pair>> {
    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    for info in gguf.tensors() {
        let file = &info.file;
        let Some((target, part)) = info.name.rsplit_once(".lora_") else {
            let m = "is neither `.lora_a` nor `.lora_b`: adapters that replace norms, biases or whole weights \
                     are not supported in this format; convert the original with PEFT";
            return Err(Error::tensor(file, &info.name, m));
        };
        if info.dims.len() != 2 {
            let m = format!("has {} dimensions, expected 2: experts are not supported", info.dims.len());
            return Err(Error::tensor(file, &info.name, m));
        }
        let pair = pairs.entry(target.into()).or_default();
        match part {
            "a" => pair.a = Some(gguf.tensor(&info.name)?),
            "b" => pair.b = Some(gguf.tensor(&info.name)?),
            _ => {
                let m = format!("ends in `.lora_{part}`, expected `.lora_a` or `.lora_b`");
                return Err(Error::tensor(file, &info.name, m));
            }
        }
    }
    Ok(pairs)
}
