//! One step: rows of many sequences through the model together.
//!
//! A step takes rows in the order of [`crate::order`] up to the batch's size: one of every generating
//! sequence, chunks of prompts. What one sequence gets does not depend on the others, bit for bit.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    time::Instant,
};

use lory_kernels::{Backend, backend::AttentionRow};
use lory_models::{
    adapter::{AdapterSet, BatchAdapters},
    decoder::Batch,
};

use crate::{
    Error, FinishReason, Result,
    scheduler::{Model, Scheduler, SequenceId},
};

mod deliver;
mod hand_out;

use deliver::{Output, Wanted};

/// Rows of one sequence in a step.
struct Chunk {
    id: SequenceId,
    /// Position of the first row.
    start: usize,
    len: usize,
    slots: Vec<u32>,
}

impl<B: Backend> Scheduler<B> {
    /// Runs one step. `false` means that there was nothing to do.
    ///
    /// An error of the device ends the requests that cannot be run without it; the sequences keep
    /// their tokens and can be run again.
    pub(crate) fn step(&mut self, model: &Model<'_, B>) -> bool {
        self.clock += 1;
        let before = self.metrics.ended();
        self.end_cancelled();
        self.end_where_files_changed();
        let chunks = self.form_chunks(model.backend);
        if !chunks.is_empty() {
            self.run_chunks(model, &chunks);
        }
        !chunks.is_empty() || self.metrics.ended() > before
    }

    fn end_cancelled(&mut self) {
        for s in self.sequences.values_mut() {
            if s.active.as_ref().is_some_and(|a| a.stream.is_cancelled()) {
                s.end(Ok(FinishReason::Cancelled), &mut self.metrics);
            }
        }
    }

    /// Ends requests whose adapters lie in a mapped file that was cut or written to: its pages must
    /// not be touched any more. Costs a system call per file in use.
    fn end_where_files_changed(&mut self) {
        let mut known: Vec<(*const crate::mapping::File, Option<Error>)> = Vec::new();
        for s in self.sequences.values_mut().filter(|s| s.active.is_some()) {
            let mut changed = None;
            for file in s.adapters.files() {
                let address: *const crate::mapping::File = file;
                let seen = known.iter().find(|(a, _)| *a == address).map(|(_, e)| e.clone());
                let state = seen.unwrap_or_else(|| {
                    let state = file.check_unchanged().err();
                    known.push((address, state.clone()));
                    state
                });
                changed = changed.or(state);
            }
            if let Some(error) = changed {
                s.end(Err(error), &mut self.metrics);
            }
        }
    }

    fn form_chunks(&mut self, backend: &B) -> Vec<Chunk> {
        let runnable = self.runnable();
        let mut budget = self.scratch.max_rows();
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut waiting: Vec<(SequenceId, Error)> = Vec::new();
        for id in &runnable {
            if budget == 0 {
                break;
            }
            self.adopt_shared(*id);
            let s = &self.sequences[id];
            let (start, len) = (s.pages.len(), s.rows(budget));
            match self.reserve(backend, *id, len, |other| chunks.iter().any(|c| c.id == other)) {
                Ok(slots) => {
                    budget -= len;
                    chunks.push(Chunk { id: *id, start, len, slots });
                }
                Err(e) if self.must_wait(*id, &e) => waiting.push((*id, e)),
                Err(e) => self.fail(*id, start, e),
            }
        }
        // If nobody runs and nobody is being saved or restored, nobody will make room.
        let hopeless = chunks.is_empty() && !self.sequences.values().any(|s| s.pinned);
        if hopeless {
            self.fail_first(waiting);
        }
        self.count_turns(&runnable, |id| chunks.iter().any(|c| c.id == id));
        chunks
    }

    /// Whether a request that found no room may hope for some.
    fn must_wait(&mut self, id: SequenceId, e: &Error) -> bool {
        let full = matches!(e, Error::Model(lory_models::Error::KvFull { .. }));
        if !full || self.policy == crate::KvPolicy::Refuse || self.can_never_fit(id) {
            return false;
        }
        if let Some(active) = self.sequences.get_mut(&id).and_then(|s| s.active.as_mut()) {
            active.turn.starved = active.turn.starved.saturating_add(1);
        }
        true
    }

    /// Ends the first of the requests that wait, which could take from the others whatever they had:
    /// the end of any other would help nobody. Its own pages are what the next one needs.
    fn fail_first(&mut self, waiting: Vec<(SequenceId, Error)>) {
        let first = waiting.into_iter().min_by_key(|(id, _)| self.get(*id).rank());
        if let Some((id, e)) = first {
            let kept = if self.get(id).is_pure() { 0 } else { usize::MAX };
            self.fail(id, kept, e);
        }
    }

    /// Takes what other sequences have computed already.
    fn adopt_shared(&mut self, id: SequenceId) {
        let Some(s) = self.sequences.get_mut(&id) else { return };
        let (Some(active), false, true) = (&mut s.active, s.restored, !s.mixed) else { return };
        let most = active.may_be_cached(s.tokens.len());
        let Some(tokens) = s.tokens.get(..most) else { return };
        let found = self.cache.adopt(&mut s.pages, tokens, &s.phases);
        if found > 0 {
            active.found_cached(s.pages.len());
            self.metrics.cached_tokens += found as u64;
            self.metrics.shared_tokens += found as u64;
        }
    }

    /// Ends a request with an error; its sequence keeps what was cached before this step.
    fn fail(&mut self, id: SequenceId, start: usize, e: Error) {
        self.cut(id, start);
        if let Some(s) = self.sequences.get_mut(&id) {
            s.end(Err(e), &mut self.metrics);
        }
    }

    fn run_chunks(&mut self, model: &Model<'_, B>, chunks: &[Chunk]) {
        let started = Instant::now();
        let ran = catch_unwind(AssertUnwindSafe(|| self.run_or_name_failed(model, chunks)));
        let failed = ran.unwrap_or_else(|panic| {
            // What was not computed must not count as cached when others go on.
            chunks.iter().for_each(|chunk| self.cut(chunk.id, chunk.start));
            resume_unwind(panic)
        });
        for chunk in chunks {
            if let Some((id, e)) = failed.iter().find(|(id, _)| *id == chunk.id) {
                self.fail(*id, chunk.start, e.clone());
            }
        }
        let elapsed = started.elapsed();
        self.metrics.steps += 1;
        self.metrics.step_time += elapsed;
        self.metrics.row_capacity += self.scratch.max_rows() as u64;
        for chunk in chunks {
            self.metrics.rows += chunk.len as u64;
            let Some(s) = self.sequences.get_mut(&chunk.id) else { continue };
            s.last_used = self.clock;
            s.account(chunk.start, chunk.len, elapsed, &mut self.metrics);
            if !s.mixed && !s.restored {
                self.cache.publish(&mut s.pages, &s.tokens, &s.phases);
            }
            s.retire_finished(&mut self.metrics);
        }
    }

    fn run_or_name_failed(&mut self, model: &Model<'_, B>, chunks: &[Chunk]) -> Vec<(SequenceId, Error)> {
        match self.run(model, chunks) {
            Ok(()) => Vec::new(),
            Err(e) if chunks.len() == 1 => vec![(chunks[0].id, e)],
            // One request may be at fault (out of memory for its adapters): each runs alone.
            Err(_) => {
                let alone =
                    |chunk| Some((Chunk::id(chunk), self.run(model, std::slice::from_ref(chunk)).err()?));
                chunks.iter().filter_map(alone).collect()
            }
        }
    }

    fn run(&mut self, model: &Model<'_, B>, chunks: &[Chunk]) -> Result<()> {
        let mut tokens = Vec::new();
        let mut rows = Vec::new();
        let mut slots = Vec::new();
        let mut sets: Vec<Option<&AdapterSet>> = Vec::new();
        let mut output_rows = Vec::new();
        let mut outputs = Vec::new();
        for chunk in chunks {
            let s = &self.sequences[&chunk.id];
            for position in chunk.start..chunk.start + chunk.len {
                let hidden = s.wants_hidden(position);
                let logits = match s.wants_logits(position) {
                    true => s.wants_top_k(position, model.vocab()).map_or(Wanted::Whole, Wanted::Likeliest),
                    false => Wanted::Nothing,
                };
                if hidden || logits != Wanted::Nothing {
                    output_rows.push(tokens.len() as u32);
                    outputs.push(Output { id: chunk.id, position, logits, hidden });
                }
                tokens.push(s.tokens[position]);
                rows.push(AttentionRow { pages: s.pages.ids(), position: position as u32 });
                sets.push(Some(&*s.phases.at(position).set));
            }
            slots.extend_from_slice(&chunk.slots);
        }
        let adapters = BatchAdapters::new(&sets);
        let batch =
            Batch { tokens: &tokens, rows: &rows, slots: &slots, adapters: &adapters, outputs: &output_rows };
        model.decoder.forward(model.backend, &mut self.cache, &mut self.scratch, &batch)?;
        let adapters = adapters.select(&output_rows);
        self.deliver(model, &adapters, &outputs);
        Ok(())
    }
}

impl Chunk {
    fn id(&self) -> SequenceId {
        self.id
    }
}

#[cfg(test)]
pub(crate) mod tests;
