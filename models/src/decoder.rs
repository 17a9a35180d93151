//! The forward pass, once for all families.

use std::ops::Range;

use lory_kernels::backend::{AttentionParams, AttentionRow, Backend, Likeliest, LoraGroup, LoraJob};

use crate::{
    Error, Result,
    adapter::{BatchAdapters, Site},
    config::{Config, QkNorm},
    gguf::Gguf,
    kv_cache::KvCache,
    linear::{self, Linear},
    weights::{Layer, Weights},
};

/// Rows to carry through the model in one step: prefill is many rows of one sequence, decode one
/// row of many, and a mixed batch is both.
pub struct Batch<'a> {
    /// Token of each row.
    pub tokens: &'a [u32],
    /// Where each row stands in its sequence, and the pages it looks back into. Rows of one
    /// sequence stand together in ascending order.
    pub rows: &'a [AttentionRow<'a>],
    /// Where each row's keys and values go (from [`KvCache::extend`]).
    pub slots: &'a [u32],
    /// What each row's adapters are.
    pub adapters: &'a BatchAdapters,
    /// Rows whose final state is wanted, ascending.
    pub outputs: &'a [u32],
}

/// Buffers of one thread of forward passes, for batches of at most `max_rows`.
pub struct Scratch<B: Backend> {
    max_rows: usize,
    max_logits: usize,
    x: B::Buffer,
    h: B::Buffer,
    q: B::Buffer,
    k: B::Buffer,
    v: B::Buffer,
    attn: B::Buffer,
    gate: B::Buffer,
    up: B::Buffer,
    hidden: B::Buffer,
    logits: B::Buffer,
}

impl<B: Backend> Scratch<B> {
    /// Buffers for `max_rows` rows, and for `max_logits` rows of logits at a time.
    pub fn new(backend: &B, decoder: &Decoder, max_rows: usize, max_logits: usize) -> Result<Self> {
        let alloc = |width: usize| -> Result<B::Buffer> { Ok(backend.alloc(max_rows * width)?) };
        let [x, h, q, k, v, attn, gate, up, hidden] = widths(&decoder.config);
        Ok(Scratch {
            max_rows,
            max_logits,
            x: alloc(x)?,
            h: alloc(h)?,
            q: alloc(q)?,
            k: alloc(k)?,
            v: alloc(v)?,
            attn: alloc(attn)?,
            gate: alloc(gate)?,
            up: alloc(up)?,
            hidden: alloc(hidden)?,
            logits: backend.alloc(max_logits * decoder.vocab_size())?,
        })
    }

    /// Bytes of such buffers.
    pub fn bytes(decoder: &Decoder, max_rows: usize, max_logits: usize) -> usize {
        let width = widths(&decoder.config).iter().sum();
        let logits = max_logits.saturating_mul(decoder.vocab_size());
        max_rows.saturating_mul(width).saturating_add(logits).saturating_mul(size_of::<f32>())
    }

    /// Rows of one batch at most.
    pub fn max_rows(&self) -> usize {
        self.max_rows
    }

    /// Rows of logits at a time at most.
    pub fn max_logits(&self) -> usize {
        self.max_logits
    }
}

/// Columns of the buffers of [`Scratch`] that have a line per row, in its order.
fn widths(c: &Config) -> [usize; 9] {
    // Now a state, now what the heads gave.
    let wide = c.n_embd.max(c.q_width());
    [c.n_embd, wide, c.q_width(), c.kv_width(), c.kv_width(), wide, c.n_ff, c.n_ff, c.n_embd]
}

/// A model ready to run on any device.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    weights: Weights,
}

impl Decoder {
    /// Reads configuration and weights; `n_ctx` is the longest sequence that will be run.
    pub fn load(gguf: &Gguf, n_ctx: u32) -> Result<Decoder> {
        let config = Config::from_metadata(gguf.metadata(), n_ctx)?;
        let weights = Weights::load(gguf, &config)?;
        Ok(Decoder { config, weights })
    }

    /// The model in numbers.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The tensors.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Number of token ids, and width of the logits.
    pub fn vocab_size(&self) -> usize {
        self.weights.token_embd.rows()
    }

    /// Runs `batch`, writes its keys and values, and leaves the normed final states of
    /// `batch.outputs` in `scratch` for [`Decoder::logits`] and [`Decoder::hidden`].
    pub fn forward<B: Backend>(
        &self,
        backend: &B,
        cache: &mut KvCache<B>,
        scratch: &mut Scratch<B>,
        batch: &Batch<'_>,
    ) -> Result<()> {
        self.check(scratch, batch)?;
        let c = &self.config;
        let w = &self.weights;
        let s = scratch;
        let positions: Vec<u32> = batch.rows.iter().map(|r| r.position).collect();
        let narrowed = batch.adapters.select(batch.outputs);

        // x: rows × n_embd, the residual stream
        backend.embed(w.token_embd.matrix(), batch.tokens, c.embed_scale, &mut s.x)?;
        self.adapt_embedding(backend, s, batch)?;

        let mut rows = batch.tokens.len();
        let mut adapters = batch.adapters;
        for (il, (layer, lc)) in w.layers.iter().zip(&c.layers).enumerate() {
            // h ← norm(x)
            norm_or_copy(backend, &s.x, rows, c, layer.attn_norm.as_deref(), &mut s.h)?;

            // q: rows × n_heads·head_dim; k, v: rows × n_kv_heads·head_dim
            let mut qkv: [(&Linear, &mut B::Buffer); 3] =
                [(&layer.attn_q, &mut s.q), (&layer.attn_k, &mut s.k), (&layer.attn_v, &mut s.v)];
            linear::forward(backend, &s.h, rows, &mut qkv, adapters)?;
            self.norm_qk(backend, layer, rows, &mut s.q, &mut s.k)?;
            if let Some(rope) = lc.rope.and_then(|i| w.ropes.get(i)) {
                backend.rope(&mut s.q, c.n_heads, c.head_dim, &positions, rope)?;
                backend.rope(&mut s.k, c.n_kv_heads, c.head_dim, &positions, rope)?;
            }

            // attn: rows × n_heads·head_dim
            backend.kv_write(cache.store_mut(), il, &s.k, &s.v, batch.slots)?;
            let params = AttentionParams {
                n_heads: c.n_heads,
                scale: c.attention_scale,
                softcap: c.attention_softcap,
                window: lc.window,
            };
            backend.attention(cache.store(), il, &s.q, batch.rows, &params, &mut s.attn)?;

            // Rows whose final state nobody asked for have left their keys and values: they end here.
            if il + 1 == c.n_layers() && batch.outputs.len() < rows {
                rows = batch.outputs.len();
                adapters = &narrowed;
                backend.gather(&s.x, c.n_embd, batch.outputs, &mut s.hidden)?;
                std::mem::swap(&mut s.x, &mut s.hidden);
                backend.gather(&s.attn, c.q_width(), batch.outputs, &mut s.h)?;
                std::mem::swap(&mut s.attn, &mut s.h);
                if rows == 0 {
                    return Ok(backend.flush()?);
                }
            }

            // x ← x + W_o · attn
            linear::forward(backend, &s.attn, rows, &mut [(&layer.attn_output, &mut s.h)], adapters)?;
            if let Some(weight) = &layer.post_attention_norm {
                backend.rms_norm_inplace(&mut s.h, rows, weight, c.rms_eps)?;
            }
            backend.add(&mut s.x, &s.h, rows * c.n_embd)?;

            // x ← x + W_down (act(W_gate h) ⊙ W_up h), gate and up: rows × n_ff
            norm_or_copy(backend, &s.x, rows, c, layer.ffn_norm.as_deref(), &mut s.h)?;
            let mut gate_up: [(&Linear, &mut B::Buffer); 2] =
                [(&layer.ffn_gate, &mut s.gate), (&layer.ffn_up, &mut s.up)];
            linear::forward(backend, &s.h, rows, &mut gate_up, adapters)?;
            backend.glu(c.activation, &mut s.gate, &s.up, rows * c.n_ff)?;
            linear::forward(backend, &s.gate, rows, &mut [(&layer.ffn_down, &mut s.h)], adapters)?;
            if let Some(weight) = &layer.post_ffw_norm {
                backend.rms_norm_inplace(&mut s.h, rows, weight, c.rms_eps)?;
            }
            backend.add(&mut s.x, &s.h, rows * c.n_embd)?;
        }
        backend.rms_norm(&s.x, rows, &w.output_norm, c.rms_eps, &mut s.hidden)?;
        // What a device could not begin is this pass's error: the caller relies on the keys and values from here on.
        Ok(backend.flush()?)
    }

    /// Logits of some output rows of the last forward pass: `range` of its [`Batch::outputs`], as
    /// `range.len()` × vocab values. `adapters` are those of all its output rows
    /// ([`BatchAdapters::select`]).
    pub fn logits<B: Backend>(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        adapters: &BatchAdapters,
        range: Range<usize>,
        out: &mut [f32],
    ) -> Result<()> {
        let (n, vocab) = (range.len(), self.vocab_size());
        if out.len() != n * vocab {
            let message = format!("{n} rows of {vocab} logits as {} values", out.len());
            return Err(Error::Request(message));
        }
        self.compute_logits(backend, scratch, adapters, range)?;
        self.read_logits(backend, scratch, 0, out)
    }

    /// As [`Decoder::logits`], but leaves them in `scratch`, in lines from 0 on, for [`Decoder::read_logits`],
    /// [`Decoder::logits_in_place`] and [`Decoder::top_k`].
    pub fn compute_logits<B: Backend>(
        &self,
        backend: &B,
        scratch: &mut Scratch<B>,
        adapters: &BatchAdapters,
        range: Range<usize>,
    ) -> Result<()> {
        let n = range.len();
        if n > scratch.max_logits || range.end > adapters.rows() {
            let message = format!(
                "logits of output rows {range:?} of {} ({} at a time) cannot be given",
                adapters.rows(),
                scratch.max_logits,
            );
            return Err(Error::Request(message));
        }
        if n == 0 {
            return Ok(());
        }
        let wanted: Vec<u32> = range.map(|i| i as u32).collect();
        let adapters = adapters.select(&wanted);
        backend.gather(&scratch.hidden, self.config.n_embd, &wanted, &mut scratch.h)?;
        let mut jobs = [(&self.weights.output, &mut scratch.logits)];
        linear::forward(backend, &scratch.h, n, &mut jobs, &adapters)?;
        if let Some(cap) = self.config.final_softcap {
            backend.softcap(&mut scratch.logits, n * self.vocab_size(), cap)?;
        }
        Ok(())
    }

    /// Lines of the logits last computed, from `first` on: `out` is a multiple of vocab.
    pub fn read_logits<B: Backend>(
        &self,
        backend: &B,
        scratch: &Scratch<B>,
        first: usize,
        out: &mut [f32],
    ) -> Result<()> {
        let vocab = self.vocab_size();
        self.check_logits(scratch, first * vocab + out.len())?;
        backend.download(&scratch.logits, first * vocab, out)?;
        Ok(())
    }

    /// The lines of the logits last computed, and of others behind them, where they need not be read ([`Backend::in_place`]).
    pub fn logits_in_place<'a, B: Backend>(
        &self,
        backend: &B,
        scratch: &'a mut Scratch<B>,
    ) -> Option<&'a mut [f32]> {
        let values = scratch.max_logits * self.vocab_size();
        backend.in_place(&mut scratch.logits)?.get_mut(..values)
    }

    /// The `k` likeliest of the first `real` tokens in some lines of the logits last computed; `None` where it is
    /// better to read the lines ([`Backend::top_k`]).
    pub fn top_k<B: Backend>(
        &self,
        backend: &B,
        scratch: &Scratch<B>,
        real: usize,
        lines: &[u32],
        k: usize,
    ) -> Result<Option<Vec<Likeliest>>> {
        let vocab = self.vocab_size();
        self.check_logits(scratch, lines.iter().max().map_or(0, |line| *line as usize + 1) * vocab)?;
        Ok(backend.top_k(&scratch.logits, vocab, real.min(vocab), lines, k)?)
    }

    fn check_logits<B: Backend>(&self, scratch: &Scratch<B>, values: usize) -> Result<()> {
        let (rows, vocab) = (scratch.max_logits, self.vocab_size());
        if values > rows * vocab {
            return Err(Error::Request(format!("{values} logits of {rows} rows of {vocab}")));
        }
        Ok(())
    }

    /// The normed final state of output row `index` of the last forward pass, n_embd values.
    pub fn hidden<B: Backend>(&self, backend: &B, scratch: &Scratch<B>, index: usize) -> Result<Vec<f32>> {
        let d = self.config.n_embd;
        let mut out = vec![0.0; d];
        backend.download(&scratch.hidden, index * d, &mut out)?;
        Ok(out)
    }

    fn check<B: Backend>(&self, scratch: &Scratch<B>, batch: &Batch<'_>) -> Result<()> {
        let n = batch.tokens.len();
        if n == 0 || n > scratch.max_rows {
            return Err(Error::Request(format!("a batch of {n} rows, expected 1 to {}", scratch.max_rows)));
        }
        if batch.rows.len() != n || batch.slots.len() != n || batch.adapters.rows() != n {
            let message = format!(
                "a batch of {n} tokens with {} positions, {} slots and adapters for {} rows",
                batch.rows.len(),
                batch.slots.len(),
                batch.adapters.rows()
            );
            return Err(Error::Request(message));
        }
        let vocab = self.vocab_size();
        if let Some(token) = batch.tokens.iter().find(|t| **t as usize >= vocab) {
            return Err(Error::Request(format!("token {token} is outside the vocabulary of {vocab}")));
        }
        if let Some(row) = batch.outputs.iter().find(|r| **r as usize >= n) {
            return Err(Error::Request(format!("output row {row} of a batch of {n}")));
        }
        Ok(())
    }

    /// Embedding adapters: the shrink is a look-up in V, which has one row per token.
    fn adapt_embedding<B: Backend>(&self, backend: &B, s: &mut Scratch<B>, batch: &Batch<'_>) -> Result<()> {
        for group in batch.adapters.groups(Site::TOKEN_EMBD) {
            let Some(table) = group.v else { continue };
            let rank = table.cols();
            let mut z = backend.alloc(batch.tokens.len() * rank)?;
            backend.embed(table, batch.tokens, 1.0, &mut z)?;
            // The embedding's own factor (Gemma) covers what is added to it, as in llama.cpp.
            let mut group = LoraGroup { v: None, ..group };
            for term in group.rows.iter_mut().flat_map(|(_, terms)| terms) {
                term.scale *= self.config.embed_scale;
            }
            let job =
                LoraJob { out: &mut s.x, width: self.config.n_embd, groups: std::slice::from_ref(&group) };
            backend.lora(&z, rank, &mut [job])?;
        }
        Ok(())
    }

    fn norm_qk<B: Backend>(
        &self,
        backend: &B,
        layer: &Layer,
        rows: usize,
        q: &mut B::Buffer,
        k: &mut B::Buffer,
    ) -> Result<()> {
        let c = &self.config;
        let lines = |heads: usize| if c.qk_norm == QkNorm::PerHead { rows * heads } else { rows };
        if let Some(weight) = &layer.attn_q_norm {
            backend.rms_norm_inplace(q, lines(c.n_heads), weight, c.rms_eps)?;
        }
        if let Some(weight) = &layer.attn_k_norm {
            backend.rms_norm_inplace(k, lines(c.n_kv_heads), weight, c.rms_eps)?;
        }
        Ok(())
    }
}

/// `h ← norm(x)`, or `h ← x` in families that norm only after a sublayer.
fn norm_or_copy<B: Backend>(
    backend: &B,
    x: &B::Buffer,
    rows: usize,
    config: &Config,
    weight: Option<&[f32]>,
    h: &mut B::Buffer,
) -> Result<()> {
    match weight {
        Some(weight) => backend.rms_norm(x, rows, weight, config.rms_eps, h)?,
        None => {
            let all: Vec<u32> = (0..rows as u32).collect();
            backend.gather(x, config.n_embd, &all, h)?;
        }
    }
    Ok(())
}
