//! Forms every step's batch from all sessions that have something to run.
//!
//! A step takes one row of every generating sequence, then chunks of prompts in the order in
//! which their requests came, up to the step's budget of rows: a long prompt delays nobody's
//! next token by more than one step, and every request gets its turn.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use lory_kernels::{Backend, backend::AttentionRow};
use lory_models::{
    adapter::{AdapterSet, BatchAdapters},
    decoder::{Batch, Decoder, Scratch},
    kv_cache::KvCache,
    tokenizer::Tokenizer,
};

use crate::{
    FinishReason, Result,
    generate::Stream,
    sequence::{Active, Sequence},
};

/// A sequence's number in its engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SequenceId(u64);

/// What a step needs besides the scheduler's own state.
pub(crate) struct Model<'a, B: Backend> {
    pub backend: &'a B,
    pub decoder: &'a Decoder,
    pub tokenizer: &'a Tokenizer,
}

/// All sequences of one engine, and the cache they share.
pub(crate) struct Scheduler<B: Backend> {
    cache: KvCache<B>,
    scratch: Scratch<B>,
    sequences: BTreeMap<SequenceId, Sequence>,
    next_id: u64,
    /// Counts requests and steps, so that "first come" and "least recently used" are defined.
    clock: u64,
    logits: Vec<f32>,
}

/// Rows of one sequence in the step being formed.
struct Chunk {
    id: SequenceId,
    /// Position of the first row.
    start: usize,
    len: usize,
    slots: Vec<u32>,
}

impl<B: Backend> Scheduler<B> {
    pub(crate) fn new(cache: KvCache<B>, scratch: Scratch<B>) -> Self {
        Scheduler { cache, scratch, sequences: BTreeMap::new(), next_id: 0, clock: 0, logits: Vec::new() }
    }

    pub(crate) fn cache(&self) -> &KvCache<B> {
        &self.cache
    }

    pub(crate) fn add(&mut self, adapters: Arc<AdapterSet>, priority: i32) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, Sequence::new(adapters, priority));
        id
    }

    /// A second sequence with the same tokens, adapters and cache contents.
    pub(crate) fn fork(&mut self, id: SequenceId) -> SequenceId {
        let (tokens, pages, adapters, mixed, priority) = {
            let s = &self.sequences[&id];
            let pages = self.cache.fork(&s.pages, s.pages.len());
            (s.tokens.clone(), pages, s.adapters.clone(), s.mixed, s.priority)
        };
        let copy = self.add(adapters, priority);
        if let Some(s) = self.sequences.get_mut(&copy) {
            (s.tokens, s.pages, s.mixed) = (tokens, pages, mixed);
        }
        copy
    }

    pub(crate) fn remove(&mut self, id: SequenceId) {
        if let Some(mut sequence) = self.sequences.remove(&id) {
            self.cache.release(&mut sequence.pages);
            if let Some(active) = sequence.active {
                active.stream.finish(Ok(FinishReason::Cancelled));
            }
        }
    }

    pub(crate) fn get(&self, id: SequenceId) -> &Sequence {
        &self.sequences[&id]
    }

    /// Forgets all tokens of a sequence from `len` on, and ends its request.
    pub(crate) fn rewind(&mut self, id: SequenceId, len: usize) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        s.end(Ok(FinishReason::Cancelled));
        s.tokens.truncate(len);
        self.cache.truncate(&mut s.pages, len);
        s.mixed &= len > 0;
    }

    /// Gives a sequence other adapters and ends its request. Its cached keys and values are
    /// forgotten, unless they are to be kept as a mixture.
    pub(crate) fn switch(&mut self, id: SequenceId, adapters: Arc<AdapterSet>, keep: bool) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        s.end(Ok(FinishReason::Cancelled));
        if !keep {
            self.cache.release(&mut s.pages);
        }
        s.mixed = !s.pages.is_empty();
        s.adapters = adapters;
    }

    /// Takes a request; its tokens were checked by the caller.
    pub(crate) fn submit(&mut self, id: SequenceId, tokens: &[u32], mut active: Active) {
        self.clock += 1;
        active.arrival = self.clock;
        let Some(s) = self.sequences.get_mut(&id) else { return };
        s.end(Ok(FinishReason::Cancelled));
        s.tokens.extend_from_slice(tokens);
        // The last token's logits are needed even if its keys and values are cached.
        if s.pages.len() >= s.tokens.len() {
            self.cache.truncate(&mut s.pages, s.tokens.len().saturating_sub(1));
        }
        active.stats.cached_tokens = s.pages.len();
        active.prompt_end = s.tokens.len();
        s.active = Some(active);
    }

    /// Ends the request that writes to `stream`, if the sequence still works on it.
    pub(crate) fn cancel(&mut self, id: SequenceId, stream: &Arc<Stream>) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        if s.active.as_ref().is_some_and(|a| Arc::ptr_eq(&a.stream, stream)) {
            s.end(Ok(FinishReason::Cancelled));
        }
    }

    /// Runs one step. `false` means that nothing was runnable.
    ///
    /// An error of the device reaches every request of the batch as its own error; the sequences
    /// keep their tokens and can be run again.
    pub(crate) fn step(&mut self, model: &Model<'_, B>) -> Result<bool> {
        self.clock += 1;
        self.end_cancelled();
        let chunks = self.form_chunks(model.backend)?;
        if chunks.is_empty() {
            return Ok(false);
        }
        let started = Instant::now();
        match self.run(model, &chunks) {
            Ok(()) => {
                let elapsed = started.elapsed();
                for chunk in &chunks {
                    if let Some(s) = self.sequences.get_mut(&chunk.id) {
                        s.account(chunk.start, chunk.len, elapsed);
                        s.retire_finished();
                    }
                }
                Ok(true)
            }
            Err(e) => {
                for chunk in &chunks {
                    if let Some(s) = self.sequences.get_mut(&chunk.id) {
                        self.cache.truncate(&mut s.pages, chunk.start);
                        s.end(Err(e.clone()));
                    }
                }
                Ok(true)
            }
        }
    }

    fn end_cancelled(&mut self) {
        for s in self.sequences.values_mut() {
            if s.active.as_ref().is_some_and(|a| a.stream.is_cancelled()) {
                s.end(Ok(FinishReason::Cancelled));
            }
        }
    }

    /// Runnable sequences: generating ones first, then prompts; by priority, then by arrival.
    fn runnable(&self) -> Vec<SequenceId> {
        let mut ids: Vec<_> = self
            .sequences
            .iter()
            .filter_map(|(id, s)| {
                let active = s.active.as_ref().filter(|a| !a.stream.is_full())?;
                Some((s.pending() > 1, -i64::from(s.priority), active.arrival, *id))
            })
            .collect();
        ids.sort_unstable();
        ids.into_iter().map(|(.., id)| id).collect()
    }

    fn form_chunks(&mut self, backend: &B) -> Result<Vec<Chunk>> {
        let mut budget = self.scratch.max_rows();
        let mut chunks: Vec<Chunk> = Vec::new();
        for id in self.runnable() {
            if budget == 0 {
                break;
            }
            let s = &self.sequences[&id];
            let (start, len) = (s.pages.len(), s.pending().min(budget));
            let needed = self.cache.pages_needed(&s.pages, len);
            self.make_room(needed, &chunks, id);
            let s = self.sequences.get_mut(&id).expect("listed above");
            match self.cache.extend(backend, &mut s.pages, len) {
                Ok(slots) => chunks.push(Chunk { id, start, len, slots }),
                // Others hold the cache and will finish: this one waits for them.
                Err(lory_models::Error::KvFull { .. }) if !chunks.is_empty() => {}
                Err(e) => s.end(Err(e.into())),
            }
            budget -= chunks.last().filter(|c| c.id == id).map_or(0, |c| c.len);
        }
        Ok(chunks)
    }

    /// Drops the cached keys and values of idle sequences, least recently used first, until
    /// `needed` pages are free. They keep their tokens and are run again when they continue.
    fn make_room(&mut self, needed: usize, chunks: &[Chunk], wanting: SequenceId) {
        while self.cache.free_pages() < needed {
            let busy = |id: &SequenceId| *id == wanting || chunks.iter().any(|c| c.id == *id);
            let idle = self
                .sequences
                .iter_mut()
                .filter(|(id, s)| s.active.is_none() && !s.mixed && !s.pages.is_empty() && !busy(id));
            let Some((_, victim)) = idle.min_by_key(|(_, s)| s.last_used) else { return };
            self.cache.release(&mut victim.pages);
        }
    }

    fn run(&mut self, model: &Model<'_, B>, chunks: &[Chunk]) -> Result<()> {
        let mut tokens = Vec::new();
        let mut rows = Vec::new();
        let mut slots = Vec::new();
        let mut sets: Vec<Option<&AdapterSet>> = Vec::new();
        // Output rows, and the sequence and position each belongs to.
        let mut outputs = Vec::new();
        let mut owners = Vec::new();
        for chunk in chunks {
            let s = &self.sequences[&chunk.id];
            for position in chunk.start..chunk.start + chunk.len {
                if s.wants_logits(position) {
                    outputs.push(tokens.len() as u32);
                    owners.push((chunk.id, position));
                }
                tokens.push(s.tokens[position]);
                rows.push(AttentionRow { pages: s.pages.ids(), position: position as u32 });
                sets.push(Some(&*s.adapters));
            }
            slots.extend_from_slice(&chunk.slots);
        }
        let adapters = BatchAdapters::new(&sets);
        let batch =
            Batch { tokens: &tokens, rows: &rows, slots: &slots, adapters: &adapters, outputs: &outputs };
        model.decoder.forward(model.backend, &mut self.cache, &mut self.scratch, &batch)?;

        // The vocabulary may be padded in the file: padding is never a choice.
        let vocab = model.decoder.vocab_size();
        let real = model.tokenizer.vocab_size().min(vocab);
        let adapters = adapters.select(&outputs);
        let at_once = self.scratch.max_logits();
        for start in (0..outputs.len()).step_by(at_once) {
            let range = start..(start + at_once).min(outputs.len());
            self.logits.resize(range.len() * vocab, 0.0);
            let (scratch, logits) = (&mut self.scratch, &mut self.logits);
            model.decoder.logits(model.backend, scratch, &adapters, range.clone(), logits)?;
            for (owner, logits) in owners[range].iter().zip(self.logits.chunks_exact_mut(vocab)) {
                if let Some(s) = self.sequences.get_mut(&owner.0) {
                    s.take_logits(owner.1, &mut logits[..real], model.tokenizer);
                }
            }
        }
        for chunk in chunks {
            if let Some(s) = self.sequences.get_mut(&chunk.id) {
                s.last_used = self.clock;
            }
        }
        Ok(())
    }
}
