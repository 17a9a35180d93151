//! One sequence through the decoder on any backend, without the engine around it.

use lory_kernels::{
    Backend,
    backend::{AttentionRow, KvShape, KvType},
};
use lory_models::{
    adapter::{AdapterSet, BatchAdapters},
    decoder::{Batch, Decoder, Scratch},
    kv_cache::{KvCache, Pages},
};

/// A decoder with a cache and one sequence in it.
pub struct Runner<'a, B: Backend> {
    backend: &'a B,
    decoder: &'a Decoder,
    cache: KvCache<B>,
    scratch: Scratch<B>,
    pages: Pages,
    adapters: AdapterSet,
}

impl<'a, B: Backend> Runner<'a, B> {
    /// Batches of at most `max_rows`, a cache of `kv_type` for 512 tokens.
    pub fn new(backend: &'a B, decoder: &'a Decoder, max_rows: usize, kv_type: KvType) -> Self {
        let c = decoder.config();
        let shape = KvShape {
            layers: c.n_layers(),
            kv_heads: c.n_kv_heads,
            head_dim: c.head_dim,
            page_len: 16,
            ty: kv_type,
        };
        Runner {
            backend,
            decoder,
            cache: KvCache::new(backend, shape, 32).expect("a small cache"),
            scratch: Scratch::new(backend, decoder, max_rows, max_rows).expect("small buffers"),
            pages: Pages::default(),
            adapters: AdapterSet::default(),
        }
    }

    /// Every row from now on has these adapters.
    pub fn with_adapters(mut self, adapters: AdapterSet) -> Self {
        self.adapters = adapters;
        self
    }

    /// Appends `tokens` in batches of at most the runner's rows; logits of all of them.
    pub fn logits(&mut self, tokens: &[u32]) -> Vec<f32> {
        let mut out = Vec::new();
        for chunk in tokens.chunks(self.scratch.max_rows()) {
            out.extend(self.step(chunk));
        }
        out
    }

    fn step(&mut self, tokens: &[u32]) -> Vec<f32> {
        let n = tokens.len();
        let start = self.pages.len() as u32;
        let slots = self.cache.extend(self.backend, &mut self.pages, n).expect("room in the cache");
        let rows: Vec<_> =
            (0..n as u32).map(|i| AttentionRow { pages: self.pages.ids(), position: start + i }).collect();
        let outputs: Vec<u32> = (0..n as u32).collect();
        let adapters = BatchAdapters::new(&vec![Some(&self.adapters); n]);
        let batch = Batch { tokens, rows: &rows, slots: &slots, adapters: &adapters, outputs: &outputs };
        self.decoder
            .forward(self.backend, &mut self.cache, &mut self.scratch, &batch)
            .unwrap_or_else(|e| panic!("{e}"));
        let mut logits = vec![0.0; n * self.decoder.vocab_size()];
        self.decoder
            .logits(self.backend, &mut self.scratch, &adapters, 0..n, &mut logits)
            .unwrap_or_else(|e| panic!("{e}"));
        logits
    }

    /// The most likely continuation of `tokens`.
    pub fn greedy(&mut self, tokens: &[u32], n: usize) -> Vec<u32> {
        let vocab = self.decoder.vocab_size();
        let mut logits = self.logits(tokens);
        let mut out = Vec::new();
        while out.len() < n {
            let last = &logits[logits.len() - vocab..];
            let best = (0..vocab).max_by(|a, b| last[*a].total_cmp(&last[*b])).expect("a vocabulary");
            out.push(best as u32);
            logits = self.logits(&[best as u32]);
        }
        out
    }
}
