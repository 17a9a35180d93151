//! All sequences of one engine: what sessions do to them between steps.
//!
//! [`crate::order`] says whose turn it is, [`crate::room`] who gets the cache, [`crate::step`] runs
//! what they decided.

use std::{collections::BTreeMap, sync::Arc};

use lory_kernels::Backend;
use lory_models::{
    adapter::Phases,
    decoder::{Decoder, Scratch},
    kv_cache::KvCache,
    tokenizer::Tokenizer,
};

use crate::{
    Error, FinishReason, KvPolicy, Metrics, Result,
    adapters::Bound,
    memory,
    sequence::{Active, Sequence},
    stream::Stream,
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

impl<B: Backend> Model<'_, B> {
    /// Tokens that can be chosen: the vocabulary may be padded in the file.
    pub(crate) fn vocab(&self) -> usize {
        self.tokenizer.vocab_size().min(self.decoder.vocab_size())
    }
}

/// All sequences of one engine, and the cache they share.
pub(crate) struct Scheduler<B: Backend> {
    pub(crate) cache: KvCache<B>,
    pub(crate) scratch: Scratch<B>,
    pub(crate) policy: KvPolicy,
    pub(crate) sequences: BTreeMap<SequenceId, Sequence>,
    next_id: u64,
    /// Counts requests and steps, so that "first come" and "least recently used" are defined.
    pub(crate) clock: u64,
    /// Rows of logits that were read from a device.
    pub(crate) logits: Vec<f32>,
    pub(crate) metrics: Metrics,
}

impl<B: Backend> Scheduler<B> {
    pub(crate) fn new(cache: KvCache<B>, scratch: Scratch<B>, policy: KvPolicy) -> Self {
        Scheduler {
            cache,
            scratch,
            policy,
            sequences: BTreeMap::new(),
            next_id: 0,
            clock: 0,
            logits: Vec::new(),
            metrics: Metrics::default(),
        }
    }

    pub(crate) fn cache(&self) -> &KvCache<B> {
        &self.cache
    }

    /// The counters, and what is there now.
    pub(crate) fn metrics(&self) -> Metrics {
        let active = || self.sequences.values().filter_map(|s| s.active.as_ref());
        let running = active().filter(|a| a.turn.last_run > 0).count();
        Metrics {
            sessions: self.sequences.len(),
            running,
            queued: active().count() - running,
            kv_pages: self.cache.total_pages(),
            kv_pages_used: self.cache.total_pages() - self.cache.free_pages(),
            kv_pages_kept: self.cache.kept_pages(),
            kv_pages_dropped: self.cache.dropped_pages(),
            ..self.metrics.clone()
        }
    }

    pub(crate) fn add(&mut self, adapters: Arc<Bound>, priority: i32) -> SequenceId {
        self.insert(Sequence::new(adapters, priority))
    }

    pub(crate) fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        id
    }

    /// A second sequence with the same tokens, adapters and cache contents.
    pub(crate) fn fork(&mut self, id: SequenceId) -> SequenceId {
        let s = &self.sequences[&id];
        let copy = Sequence {
            tokens: s.tokens.clone(),
            pages: self.cache.fork(&s.pages, s.pages.len()),
            adapters: s.adapters.clone(),
            phases: s.phases.clone(),
            mixed: s.mixed,
            restored: s.restored,
            pinned: false,
            priority: s.priority,
            last_used: s.last_used,
            active: None,
        };
        self.insert(copy)
    }

    pub(crate) fn remove(&mut self, id: SequenceId) {
        if let Some(mut sequence) = self.sequences.remove(&id) {
            self.cache.release(&mut sequence.pages);
            sequence.end(Ok(FinishReason::Cancelled), &mut self.metrics);
        }
    }

    pub(crate) fn get(&self, id: SequenceId) -> &Sequence {
        &self.sequences[&id]
    }

    /// Keeps others from taking a sequence's pages.
    pub(crate) fn pin(&mut self, id: SequenceId, pinned: bool) {
        if let Some(s) = self.sequences.get_mut(&id) {
            s.pinned = pinned;
        }
    }

    /// Gives an empty sequence what a file says; its pages follow.
    pub(crate) fn start_restore(&mut self, id: SequenceId, tokens: Vec<u32>, phases: Phases, mixed: bool) {
        if let Some(s) = self.sequences.get_mut(&id) {
            (s.tokens, s.phases) = (tokens, phases);
            (s.mixed, s.restored) = (mixed, true);
        }
    }

    /// Fills a sequence's page from a file.
    pub(crate) fn write_page(
        &mut self,
        backend: &B,
        id: SequenceId,
        index: usize,
        bytes: &[u8],
    ) -> Result<()> {
        let page = self.sequences.get(&id).and_then(|s| s.pages.ids().get(index).copied());
        let page = page.ok_or_else(|| Error::Request(format!("page {index} was not reserved")))?;
        let written = backend.kv_write_page(self.cache.store_mut(), page, bytes);
        Ok(written.map_err(lory_models::Error::from)?)
    }

    pub(crate) fn set_priority(&mut self, id: SequenceId, priority: i32) {
        if let Some(s) = self.sequences.get_mut(&id) {
            s.priority = priority;
        }
    }

    /// Forgets all tokens of a sequence from `len` on, and ends its request.
    pub(crate) fn rewind(&mut self, id: SequenceId, len: usize) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        s.end(Ok(FinishReason::Cancelled), &mut self.metrics);
        s.tokens.truncate(len);
        self.cut(id, len);
    }

    /// Forgets the cached keys and values of a sequence from position `len` on.
    pub(crate) fn cut(&mut self, id: SequenceId, len: usize) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        self.cache.truncate(&mut s.pages, len);
        s.forget_origin();
    }

    /// Gives a sequence other adapters and ends its request. Its cached keys and values are
    /// forgotten as far as the new ones would have computed others, unless they are to be kept as
    /// a mixture. Those that compute the same take the place of the old ones, and nothing else changes.
    pub(crate) fn switch(&mut self, id: SequenceId, adapters: Arc<Bound>, keep: bool) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        if s.adapters.set == adapters.set {
            s.phases = s.phases_of(&adapters.set);
            s.adapters = adapters;
            return;
        }
        s.end(Ok(FinishReason::Cancelled), &mut self.metrics);
        let phases = Phases::new(&adapters.set, &s.tokens);
        let differs = s.phases.differs_at(&phases);
        s.adapters = adapters;
        s.phases = phases;
        match differs {
            Some(at) if keep => s.mixed |= s.pages.len() > at,
            // What was mixed before cannot be told apart from what was not.
            _ if s.mixed && !keep => self.cut(id, 0),
            Some(at) => self.cut(id, at),
            None => {}
        }
    }

    /// Takes a request; its tokens were checked by the caller.
    ///
    /// # Errors
    /// No memory for its tokens; nothing has changed then.
    pub(crate) fn submit(
        &mut self,
        id: SequenceId,
        tokens: &[u32],
        mut active: Active,
        tokenizer: &Arc<Tokenizer>,
    ) -> Result<()> {
        let Some(s) = self.sequences.get_mut(&id) else { return Ok(()) };
        memory::reserve(&mut s.tokens, tokens.len(), "a prompt")?;
        let before = s.tokens.len();
        s.tokens.extend_from_slice(tokens);
        if let Err(e) = active.follow(s.tokens.iter().copied(), tokenizer) {
            s.tokens.truncate(before);
            return Err(e);
        }
        self.clock += 1;
        self.metrics.requests += 1;
        active.turn.arrival = self.clock;
        s.end(Ok(FinishReason::Cancelled), &mut self.metrics);
        active.place(before, s.tokens.len());
        let phases = Phases::new(&s.adapters.set, &s.tokens);
        let mut keep = active.may_be_cached(s.tokens.len());
        if s.is_pure() {
            keep = keep.min(s.phases.differs_at(&phases).unwrap_or(usize::MAX));
        }
        s.phases = phases;
        s.adapters.count_use();
        self.cache.truncate(&mut s.pages, keep);
        s.forget_origin();
        active.found_cached(s.pages.len());
        self.metrics.cached_tokens += s.pages.len() as u64;
        s.active = Some(active);
        Ok(())
    }

    /// Ends the request that writes to `stream`, if the sequence still works on it.
    pub(crate) fn cancel(&mut self, id: SequenceId, stream: &Arc<Stream>) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        if s.active.as_ref().is_some_and(|a| Arc::ptr_eq(&a.stream, stream)) {
            s.end(Ok(FinishReason::Cancelled), &mut self.metrics);
        }
    }
}
