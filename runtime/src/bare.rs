//! A model without scheduler, sessions and sampler: forward passes over numbered sequences, for
//! measuring and for scoring texts.

use std::ops::Range;

use lory_kernels::{
    Backend, Device,
    backend::{AttentionRow, KvShape, KvType},
};
use lory_models::{
    adapter::{AdapterSet, BatchAdapters},
    config::Config,
    decoder::{Batch, Decoder, Scratch},
    kv_cache::{KvCache, Pages},
};

use crate::{Result, engine::PAGE_LEN};

/// What a [`Bare`] holds.
#[derive(Clone, Copy, Debug)]
pub struct BareOptions {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens of the longest of them.
    pub tokens: usize,
    /// Rows of one forward pass at most.
    pub n_batch: usize,
    /// Element type of cached keys and values.
    pub kv_type: KvType,
}

impl BareOptions {
    fn shape(&self, config: &Config) -> KvShape {
        KvShape {
            layers: config.n_layers(),
            kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            page_len: PAGE_LEN,
            ty: self.kv_type,
        }
    }

    fn pages(&self) -> usize {
        self.sequences * self.tokens.div_ceil(PAGE_LEN)
    }

    /// Rows of a pass, and rows of logits at a time, at most.
    fn rows(&self) -> (usize, usize) {
        let rows = self.n_batch.max(1);
        (rows, rows.min(64))
    }

    /// Bytes of a layer's keys and values, and of working memory, as [`crate::DeviceOptions`] asks for them.
    pub fn bytes(&self, decoder: &Decoder) -> (usize, usize) {
        let (rows, logits) = self.rows();
        let cache = self.pages().saturating_mul(self.shape(decoder.config()).page_bytes());
        (cache, Scratch::<Device>::bytes(decoder, rows, logits))
    }
}

/// A decoder, a cache, and the sequences in it.
pub struct Bare<'a, B: Backend> {
    backend: &'a B,
    decoder: &'a Decoder,
    cache: KvCache<B>,
    scratch: Scratch<B>,
    sequences: Vec<(Pages, AdapterSet)>,
    logits: Vec<f32>,
}

/// Some tokens of one piece of work in one forward pass.
struct Piece<'t> {
    entry: usize,
    sequence: usize,
    tokens: &'t [u32],
    /// Whether the work's last token is among them.
    last: bool,
}

/// What is computed of some outputs of a pass, into as many lines.
type Compute<'t, B> =
    dyn FnMut(&Decoder, &B, &mut Scratch<B>, &BatchAdapters, Range<usize>, &mut [f32]) -> Result<()> + 't;

/// What is done with some outputs of a pass: a range of its output rows, and the adapters of all.
type Take<'t, B> = dyn FnMut(&Decoder, &B, &mut Scratch<B>, &BatchAdapters, Range<usize>) -> Result<()> + 't;

impl<'a, B: Backend> Bare<'a, B> {
    /// Empty sequences without adapters. The cache touches its memory only as it is used.
    ///
    /// # Errors
    /// Those of allocation.
    pub fn new(backend: &'a B, decoder: &'a Decoder, options: BareOptions) -> Result<Self> {
        let (rows, logits) = options.rows();
        Ok(Bare {
            backend,
            decoder,
            cache: KvCache::new(backend, options.shape(decoder.config()), options.pages())?,
            scratch: Scratch::new(backend, decoder, rows, logits)?,
            sequences: (0..options.sequences).map(|_| Default::default()).collect(),
            logits: Vec::new(),
        })
    }

    /// Tokens of a sequence.
    pub fn len(&self, sequence: usize) -> usize {
        self.sequences[sequence].0.len()
    }

    /// Whether a sequence has no token.
    pub fn is_empty(&self, sequence: usize) -> bool {
        self.len(sequence) == 0
    }

    /// Forgets the tokens of a sequence from position `len` on.
    pub fn truncate(&mut self, sequence: usize, len: usize) {
        self.cache.truncate(&mut self.sequences[sequence].0, len);
    }

    /// What the last [`Bare::run`] returned.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Adapters of what is appended to a sequence from now on.
    pub fn set_adapters(&mut self, sequence: usize, adapters: AdapterSet) {
        self.sequences[sequence].1 = adapters;
    }

    /// Appends to each sequence its tokens, in as few forward passes as hold them, and returns
    /// the logits after the last token of each: `work.len()` × vocabulary.
    ///
    /// # Errors
    /// A full cache, an unknown token, or the device's.
    pub fn run(&mut self, work: &[(usize, &[u32])]) -> Result<&[f32]> {
        let mut logits = std::mem::take(&mut self.logits);
        logits.resize(work.len() * self.decoder.vocab_size(), 0.0);
        let done = self.append(work, &mut logits, &mut |decoder, backend, scratch, adapters, range, out| {
            Ok(decoder.logits(backend, scratch, adapters, range, out)?)
        });
        self.logits = logits;
        done.map(|()| &*self.logits)
    }

    /// Appends as [`Bare::run`] does, and returns the normed final state of the last token of each sequence, from which its logits
    /// would have been computed: `work.len()` × n_embd.
    ///
    /// # Errors
    /// As there.
    pub fn embed(&mut self, work: &[(usize, &[u32])]) -> Result<Vec<f32>> {
        let width = self.decoder.config().n_embd;
        let mut states = vec![0.0; work.len() * width];
        self.append(work, &mut states, &mut |decoder, backend, scratch, _, range, out| {
            for (row, out) in range.zip(out.chunks_exact_mut(width)) {
                out.copy_from_slice(&decoder.hidden(backend, scratch, row)?);
            }
            Ok(())
        })?;
        Ok(states)
    }

    /// Appends, and has a line of `out` computed for each piece of work.
    fn append(
        &mut self,
        work: &[(usize, &[u32])],
        out: &mut [f32],
        compute: &mut Compute<'_, B>,
    ) -> Result<()> {
        let width = out.len() / work.len().max(1);
        let mut batch = Vec::new();
        let mut room = self.scratch.max_rows();
        let mut done = Ok(());
        for (entry, (sequence, tokens)) in work.iter().enumerate() {
            let mut rest = *tokens;
            while !rest.is_empty() && done.is_ok() {
                let (tokens, later) = rest.split_at(rest.len().min(room));
                batch.push(Piece { entry, sequence: *sequence, tokens, last: later.is_empty() });
                (rest, room) = (later, room - tokens.len());
                if room == 0 {
                    done = self.pass(&batch, width, out, compute);
                    batch.clear();
                    room = self.scratch.max_rows();
                }
            }
        }
        if !batch.is_empty() && done.is_ok() {
            done = self.pass(&batch, width, out, compute);
        }
        done
    }

    fn pass(
        &mut self,
        batch: &[Piece<'_>],
        width: usize,
        out: &mut [f32],
        compute: &mut Compute<'_, B>,
    ) -> Result<()> {
        let outputs: Vec<(u32, usize)> = batch
            .iter()
            .scan(0, |end, piece| {
                *end += piece.tokens.len() as u32;
                Some((*end - 1, piece))
            })
            .filter(|(_, piece)| piece.last)
            .map(|(row, piece)| (row, piece.entry))
            .collect();
        let rows: Vec<u32> = outputs.iter().map(|o| o.0).collect();
        // Entries that end in one pass are neighbours.
        let first = outputs.first().map_or(0, |o| o.1);
        let mut out =
            out[first * width..][..rows.len() * width].chunks_mut(self.scratch.max_logits() * width);
        self.forward(batch, &rows, &mut |decoder, backend, scratch, adapters, range| {
            compute(decoder, backend, scratch, adapters, range, out.next().unwrap_or_default())
        })
    }

    /// Appends `tokens` to a sequence and calls `each` with every token's position in `tokens` and
    /// the logits after it.
    ///
    /// # Errors
    /// As [`Bare::run`].
    pub fn score(
        &mut self,
        sequence: usize,
        tokens: &[u32],
        each: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<()> {
        let vocab = self.decoder.vocab_size();
        let mut logits = vec![0.0; self.scratch.max_logits() * vocab];
        let at_once = self.scratch.max_rows();
        for (i, tokens) in tokens.chunks(at_once).enumerate() {
            let rows: Vec<u32> = (0..tokens.len() as u32).collect();
            let piece = Piece { entry: 0, sequence, tokens, last: true };
            self.forward(&[piece], &rows, &mut |decoder, backend, scratch, adapters, range| {
                let logits = &mut logits[..range.len() * vocab];
                decoder.logits(backend, scratch, adapters, range.clone(), logits)?;
                for (row, logits) in range.zip(logits.chunks_exact(vocab)) {
                    each(i * at_once + row, logits);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    /// One forward pass; `take` gets the outputs, some at a time.
    fn forward(&mut self, batch: &[Piece<'_>], outputs: &[u32], take: &mut Take<'_, B>) -> Result<()> {
        let (mut tokens, mut slots, mut starts) = (Vec::new(), Vec::new(), Vec::new());
        for piece in batch {
            let pages = &mut self.sequences[piece.sequence].0;
            starts.push(pages.len() as u32);
            slots.extend(self.cache.extend(self.backend, pages, piece.tokens.len())?);
            tokens.extend_from_slice(piece.tokens);
        }
        let mut rows = Vec::with_capacity(tokens.len());
        let mut sets = Vec::with_capacity(tokens.len());
        for (piece, start) in batch.iter().zip(starts) {
            let (pages, set) = &self.sequences[piece.sequence];
            let positions = start..start + piece.tokens.len() as u32;
            rows.extend(positions.map(|position| AttentionRow { pages: pages.ids(), position }));
            sets.resize(rows.len(), Some(set));
        }
        let adapters = BatchAdapters::new(&sets);
        let batch = Batch { tokens: &tokens, rows: &rows, slots: &slots, adapters: &adapters, outputs };
        self.decoder.forward(self.backend, &mut self.cache, &mut self.scratch, &batch)?;
        let adapters = adapters.select(outputs);
        let at_once = self.scratch.max_logits();
        for start in (0..outputs.len()).step_by(at_once) {
            let range = start..(start + at_once).min(outputs.len());
            take(self.decoder, self.backend, &mut self.scratch, &adapters, range)?;
        }
        Ok(())
    }
}

/// Tokens below `vocab` in an order without meaning, the same for equal seeds.
pub fn random_tokens(seed: u64, n: usize, vocab: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 32) as usize % vocab.max(1)) as u32
    };
    (0..n).map(|_| next()).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use lory_kernels::{Reference, backend::MatmulJob};
    use lory_models::{gguf::Gguf, synth};

    use super::*;

    fn decoder() -> Decoder {
        let shape = synth::shape("llama-tiny").unwrap();
        let ty = synth::FileType::from_name("Q4_0").unwrap();
        let file = synth::model(shape, ty, 1, Vec::new(), |_| ()).unwrap();
        Decoder::load(&Gguf::parse(vec![("tiny.gguf".into(), Arc::new(file))]).unwrap(), 256).unwrap()
    }

    fn options(n_batch: usize) -> BareOptions {
        BareOptions { sequences: 3, tokens: 40, n_batch, kv_type: KvType::F16 }
    }

    /// Sequences run together, in passes of any size, give each the logits that it has alone.
    #[test]
    fn sequences_do_not_depend_on_their_batch() {
        let decoder = decoder();
        let prompts: [&[u32]; 3] = [&[5, 6, 7, 8, 9], &[100, 200], &[300, 1, 2, 3]];
        let vocab = decoder.vocab_size();
        let alone: Vec<Vec<f32>> = prompts
            .iter()
            .map(|p| Bare::new(&Reference, &decoder, options(16)).unwrap().run(&[(0, p)]).unwrap().to_vec())
            .collect();
        for n_batch in [1, 3, 4, 16] {
            let mut bare = Bare::new(&Reference, &decoder, options(n_batch)).unwrap();
            let work: Vec<_> = prompts.iter().copied().enumerate().collect();
            let together = bare.run(&work).unwrap();
            for (i, alone) in alone.iter().enumerate() {
                assert_eq!(&together[i * vocab..][..vocab], alone, "sequence {i}, batches of {n_batch}");
            }
        }
    }

    /// The output matrix times an embedding is the logits, whatever the passes.
    #[test]
    fn embeddings_are_what_logits_are_computed_from() {
        let decoder = decoder();
        let prompts: [&[u32]; 3] = [&[5, 6, 7, 8, 9], &[100, 200], &[300, 1, 2, 3]];
        let work: Vec<_> = prompts.iter().copied().enumerate().collect();
        let logits = Bare::new(&Reference, &decoder, options(16)).unwrap().run(&work).unwrap().to_vec();
        let (rows, width) = (prompts.len(), decoder.config().n_embd);
        for n_batch in [1, 3, 16] {
            let states = Bare::new(&Reference, &decoder, options(n_batch)).unwrap().embed(&work).unwrap();
            assert_eq!(states.len(), rows * width);
            let mut out = vec![0.0; logits.len()];
            let weight = decoder.weights().output.weight().matrix();
            Reference.matmul(&states, rows, &mut [MatmulJob { weight, out: &mut out }]).unwrap();
            assert_eq!(out, logits, "batches of {n_batch}");
        }
    }

    #[test]
    fn scoring_and_truncation_agree_with_running() {
        let decoder = decoder();
        let mut bare = Bare::new(&Reference, &decoder, options(3)).unwrap();
        let tokens = [9, 8, 7, 6, 5];
        let mut scored = Vec::new();
        bare.score(1, &tokens, &mut |i, logits| {
            assert_eq!(i, scored.len());
            scored.push(logits.to_vec());
        })
        .unwrap();
        assert_eq!((scored.len(), bare.len(1)), (5, 5));
        bare.truncate(1, 2);
        assert_eq!(bare.run(&[(1, &tokens[2..])]).unwrap(), scored[4]);
        // Three sequences of 40 tokens take two pages of 32 each.
        assert!(bare.run(&[(0, &[0; 193])]).is_err(), "more than the cache holds");
    }
}
