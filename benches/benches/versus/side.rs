//! What both programs can do, and Lory's way of doing it.

use lory_kernels::{Cpu, backend::KvType};
use lory_models::{adapter::AdapterSet, decoder::Decoder};
use lory_runtime::{Bare, BareOptions};

/// Sequences in a cache that tokens are appended to.
pub trait Side {
    /// Appends to each sequence its tokens.
    fn run(&mut self, work: &[(usize, &[u32])]) -> Result<(), String>;
    /// Logits after the last token of entry `entry` of the last [`Side::run`].
    fn logits(&mut self, entry: usize) -> Result<&[f32], String>;
    /// Forgets the tokens of a sequence from position `len` on.
    fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), String>;
}

/// Rows of one pass, the same on both sides (llama-bench's `-ub 512`).
pub const N_UBATCH: usize = 512;

/// Lory without its engine, as llama-bench runs llama.cpp without server and sampler.
pub struct Lory<'a> {
    bare: Bare<'a, Cpu>,
    vocab: usize,
}

impl<'a> Lory<'a> {
    /// `sequences` empty sequences of at most `tokens` tokens.
    pub fn new(cpu: &'a Cpu, decoder: &'a Decoder, sequences: usize, tokens: usize) -> Result<Self, String> {
        let options = BareOptions { sequences, tokens, n_batch: N_UBATCH, kv_type: KvType::F16 };
        let bare = Bare::new(cpu, decoder, options).map_err(|e| e.to_string())?;
        Ok(Lory { bare, vocab: decoder.vocab_size() })
    }

    /// Gives every sequence its adapter.
    pub fn with_adapters(mut self, adapters: &[AdapterSet]) -> Self {
        for (sequence, set) in adapters.iter().enumerate() {
            self.bare.set_adapters(sequence, set.clone());
        }
        self
    }
}

impl Side for Lory<'_> {
    fn run(&mut self, work: &[(usize, &[u32])]) -> Result<(), String> {
        self.bare.run(work).map(|_| ()).map_err(|e| e.to_string())
    }

    fn logits(&mut self, entry: usize) -> Result<&[f32], String> {
        self.bare
            .logits()
            .get(entry * self.vocab..(entry + 1) * self.vocab)
            .ok_or_else(|| format!("there are no logits of entry {entry}"))
    }

    fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), String> {
        self.bare.truncate(sequence, len);
        Ok(())
    }
}
