//! A model's tensors, checked against its [`Config`] and with every irregularity removed:
//! fused tensors split, tied outputs pointed at the embedding, norms decoded.

use std::{collections::BTreeSet, ops::Range};

use lory_kernels::{
    QuantType,
    backend::{LoraWeight, Rope},
    quant::dequantize_row,
};

use crate::{
    Error, Result, Tensor,
    adapter::{Adapter, Projection, Site},
    config::{Config, QkNorm},
    gguf::Gguf,
    linear::Linear,
    rope::RopeScaling,
};

/// One transformer block. Fields are named as GGUF names tensors.
#[derive(Debug)]
#[allow(missing_docs)]
pub struct Layer {
    pub attn_norm: Option<Vec<f32>>,
    pub attn_q: Linear,
    pub attn_k: Linear,
    pub attn_v: Linear,
    pub attn_q_norm: Option<Vec<f32>>,
    pub attn_k_norm: Option<Vec<f32>>,
    pub attn_output: Linear,
    pub post_attention_norm: Option<Vec<f32>>,
    pub ffn_norm: Option<Vec<f32>>,
    pub ffn_gate: Linear,
    pub ffn_up: Linear,
    pub ffn_down: Linear,
    pub post_ffw_norm: Option<Vec<f32>>,
}

/// All weights of a model; matrices stay in the file's bytes.
#[derive(Debug)]
pub struct Weights {
    /// vocab × n_embd.
    pub token_embd: Tensor,
    /// The blocks in order.
    pub layers: Vec<Layer>,
    /// Norm before the output projection.
    pub output_norm: Vec<f32>,
    /// vocab × n_embd; the embedding itself where the file ties them.
    pub output: Linear,
    /// Whether `output` is the token embedding.
    pub tied: bool,
    /// One per [`Config::ropes`].
    pub ropes: Vec<Rope>,
}

impl Layer {
    /// The matrices that are multiplied with.
    pub fn factors(&self) -> impl Iterator<Item = &Tensor> {
        let Layer { attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down, .. } = self;
        [attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up, ffn_down].into_iter().map(Linear::weight)
    }
}

impl Weights {
    /// Finds every tensor that `config` asks for. A tensor that is missing, has another shape,
    /// or is not used by this architecture is an error: running without it would answer wrongly.
    pub fn load(gguf: &Gguf, config: &Config) -> Result<Weights> {
        let mut loader = Loader { gguf, used: BTreeSet::new() };
        let token_embd = loader.tensor("token_embd.weight")?;
        if token_embd.cols() != config.n_embd || token_embd.rows() == 0 {
            let message = format!(
                "is {} x {}, expected vocabulary x {}",
                token_embd.rows(),
                token_embd.cols(),
                config.n_embd
            );
            return Err(Error::tensor(token_embd.file(), "token_embd.weight", message));
        }
        let vocab = token_embd.rows();
        let (output, tied) = match loader.opt_tensor("output.weight")? {
            Some(_) => (loader.linear("output", Site::OUTPUT, vocab, config.n_embd)?, false),
            None if config.may_tie => (Linear::new(token_embd.clone(), None, Site::OUTPUT), true),
            None => return Err(loader.missing("output.weight")),
        };
        let output_norm = loader.vector("output_norm.weight", config.n_embd)?;
        let ropes = loader.ropes(config)?;
        let layers = (0..config.n_layers()).map(|il| loader.layer(il, config)).collect::<Result<_>>()?;
        loader.finish(config)?;
        Ok(Weights { token_embd, layers, output_norm, output, tied, ropes })
    }

    /// The matrix that adapters at `site` are added to.
    pub fn at(&self, site: Site) -> Option<&Tensor> {
        let (Some(layer), Some(projection)) = (site.layer_index(), site.projection()) else {
            return Some(if site == Site::OUTPUT { self.output.weight() } else { &self.token_embd });
        };
        let l = self.layers.get(layer)?;
        let linear = match projection {
            Projection::AttnQ => &l.attn_q,
            Projection::AttnK => &l.attn_k,
            Projection::AttnV => &l.attn_v,
            Projection::AttnOutput => &l.attn_output,
            Projection::FfnGate => &l.ffn_gate,
            Projection::FfnUp => &l.ffn_up,
            Projection::FfnDown => &l.ffn_down,
        };
        Some(linear.weight())
    }

    /// Every matrix that a batch with an adapter may need, with the layer that it is for.
    pub fn lora<'a>(&'a self, adapter: &'a Adapter) -> impl Iterator<Item = LoraWeight<'a>> {
        let at = |(site, weight)| Some(LoraWeight { layer: self.at(site)?.matrix(), weight });
        adapter.matrices().filter_map(at)
    }

    /// Every matrix, once: for asking a device whether it can run them all.
    pub fn matrices(&self) -> impl Iterator<Item = &Tensor> {
        let table = (!self.tied).then_some(&self.token_embd);
        table.into_iter().chain(self.factors())
    }

    /// Every matrix that is multiplied with, once: all but a table of embeddings that is only looked up.
    pub fn factors(&self) -> impl Iterator<Item = &Tensor> {
        let layers = self.layers.iter().flat_map(Layer::factors);
        layers.chain(std::iter::once(self.output_factor()))
    }

    /// What the last state is multiplied with.
    pub fn output_factor(&self) -> &Tensor {
        if self.tied { &self.token_embd } else { self.output.weight() }
    }
}

struct Loader<'a> {
    gguf: &'a Gguf,
    used: BTreeSet<String>,
}

impl Loader<'_> {
    fn missing(&self, name: &str) -> Error {
        Error::tensor(self.gguf.metadata().file(), name, "is missing")
    }

    fn opt_tensor(&mut self, name: &str) -> Result<Option<Tensor>> {
        let tensor = self.gguf.opt_tensor(name)?;
        if tensor.is_some() {
            self.used.insert(name.into());
        }
        Ok(tensor)
    }

    fn tensor(&mut self, name: &str) -> Result<Tensor> {
        self.opt_tensor(name)?.ok_or_else(|| self.missing(name))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Tensor> {
        let tensor = self.tensor(name)?;
        if (tensor.rows(), tensor.cols()) != (rows, cols) {
            let message = format!("is {} x {}, expected {rows} x {cols}", tensor.rows(), tensor.cols());
            return Err(Error::tensor(tensor.file(), name, message));
        }
        Ok(tensor)
    }

    fn opt_vector(&mut self, name: &str, len: usize) -> Result<Option<Vec<f32>>> {
        let Some(tensor) = self.opt_tensor(name)? else { return Ok(None) };
        if tensor.rows() != 1 || tensor.cols() != len {
            let message = format!("is {} x {}, expected a vector of {len}", tensor.rows(), tensor.cols());
            return Err(Error::tensor(tensor.file(), name, message));
        }
        if !matches!(tensor.ty(), QuantType::F32 | QuantType::F16 | QuantType::BF16) {
            let message = format!("is {}, expected F32, F16 or BF16", tensor.ty());
            return Err(Error::tensor(tensor.file(), name, message));
        }
        let mut values = vec![0.0; len];
        dequantize_row(tensor.ty(), tensor.matrix().bytes(), &mut values)
            .map_err(|e| Error::tensor(tensor.file(), name, e.to_string()))?;
        if let Some(i) = values.iter().position(|v| !v.is_finite()) {
            return Err(Error::tensor(tensor.file(), name, format!("has {} at index {i}", values[i])));
        }
        Ok(Some(values))
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.opt_vector(name, len)?.ok_or_else(|| self.missing(name))
    }

    /// `<prefix>.weight` and, where the file has one, `<prefix>.bias`.
    fn linear(&mut self, prefix: &str, site: Site, rows: usize, cols: usize) -> Result<Linear> {
        let weight = self.matrix(&format!("{prefix}.weight"), rows, cols)?;
        let bias = self.opt_vector(&format!("{prefix}.bias"), rows)?;
        Ok(Linear::new(weight, bias, site))
    }

    /// Consecutive rows of one fused tensor as linears of their own.
    fn split<const N: usize>(
        &mut self,
        prefix: &str,
        sites: [Site; N],
        rows: [usize; N],
        cols: usize,
    ) -> Result<[Linear; N]> {
        let total = rows.iter().sum();
        let fused = self.linear(prefix, sites[0], total, cols)?;
        let mut start = 0;
        let mut part = |i: usize| -> Result<Linear> {
            let range: Range<usize> = start..start + rows[i];
            start = range.end;
            let bias = fused.bias().map(|b| b[range.clone()].to_vec());
            Ok(Linear::new(fused.weight().slice_rows(range)?, bias, sites[i]))
        };
        let parts: Vec<Linear> = (0..N).map(&mut part).collect::<Result<_>>()?;
        parts.try_into().map_err(|_| self.missing(prefix))
    }

    fn layer(&mut self, il: usize, c: &Config) -> Result<Layer> {
        let name = |part: &str| format!("blk.{il}.{part}");
        let site = |projection| Site::layer(il, projection);
        let (d, q, kv) = (c.n_embd, c.q_width(), c.kv_width());
        let pre = |loader: &mut Self, part: &str| -> Result<Option<Vec<f32>>> {
            c.norms.pre().then(|| loader.vector(&name(part), d)).transpose()
        };
        let post = |loader: &mut Self, part: &str| -> Result<Option<Vec<f32>>> {
            c.norms.post().then(|| loader.vector(&name(part), d)).transpose()
        };
        let (q_norm, k_norm) = match c.qk_norm {
            QkNorm::None => (None, None),
            QkNorm::PerHead => (Some(c.head_dim), Some(c.head_dim)),
            QkNorm::Full => (Some(q), Some(kv)),
        };
        let qkv_sites = [Projection::AttnQ, Projection::AttnK, Projection::AttnV].map(site);
        let ffn_sites = [Projection::FfnGate, Projection::FfnUp].map(site);
        let [attn_q, attn_k, attn_v] = if c.fused {
            self.split(&name("attn_qkv"), qkv_sites, [q, kv, kv], d)?
        } else {
            [
                self.linear(&name("attn_q"), qkv_sites[0], q, d)?,
                self.linear(&name("attn_k"), qkv_sites[1], kv, d)?,
                self.linear(&name("attn_v"), qkv_sites[2], kv, d)?,
            ]
        };
        let [ffn_gate, ffn_up] = if c.fused {
            self.split(&name("ffn_up"), ffn_sites, [c.n_ff, c.n_ff], d)?
        } else {
            [
                self.linear(&name("ffn_gate"), ffn_sites[0], c.n_ff, d)?,
                self.linear(&name("ffn_up"), ffn_sites[1], c.n_ff, d)?,
            ]
        };
        Ok(Layer {
            attn_norm: pre(self, "attn_norm.weight")?,
            attn_q,
            attn_k,
            attn_v,
            attn_q_norm: q_norm.map(|n| self.vector(&name("attn_q_norm.weight"), n)).transpose()?,
            attn_k_norm: k_norm.map(|n| self.vector(&name("attn_k_norm.weight"), n)).transpose()?,
            attn_output: self.linear(&name("attn_output"), site(Projection::AttnOutput), d, q)?,
            post_attention_norm: post(self, "post_attention_norm.weight")?,
            ffn_norm: pre(self, "ffn_norm.weight")?,
            ffn_gate,
            ffn_up,
            ffn_down: self.linear(&name("ffn_down"), site(Projection::FfnDown), d, c.n_ff)?,
            post_ffw_norm: post(self, "post_ffw_norm.weight")?,
        })
    }

    fn ropes(&mut self, c: &Config) -> Result<Vec<Rope>> {
        let rope = &c.ropes[0];
        let pairs = rope.n_dims / 2;
        let long = self.opt_vector("rope_factors_long.weight", pairs)?;
        let short = self.opt_vector("rope_factors_short.weight", pairs)?;
        let freqs = self.opt_vector("rope_freqs.weight", pairs)?;
        let longrope = rope.scaling == RopeScaling::LongRope || long.is_some() || short.is_some();
        let (name, factors) = match (longrope, rope.beyond_original) {
            (false, _) => ("rope_freqs.weight", freqs),
            (true, true) => ("rope_factors_long.weight", long),
            (true, false) => ("rope_factors_short.weight", short),
        };
        if longrope && factors.is_none() {
            return Err(self.missing(name));
        }
        if let Some(bad) = factors.iter().flatten().find(|f| **f <= 0.0) {
            let message = format!("has the factor {bad}, must be above 0");
            return Err(Error::tensor(self.gguf.metadata().file(), name, message));
        }
        Ok(c.ropes
            .iter()
            .enumerate()
            .map(|(i, rope)| rope.resolve(if i == 0 { factors.as_deref() } else { None }))
            .collect())
    }

    fn finish(self, config: &Config) -> Result<()> {
        match self.gguf.tensors().find(|t| !self.used.contains(&*t.name)) {
            None => Ok(()),
            Some(extra) => {
                let message = format!(
                    "is not used by architecture `{}`; answers without it would be wrong",
                    config.arch
                );
                Err(Error::tensor(self.gguf.metadata().file(), &extra.name, message))
            }
        }
    }
}
