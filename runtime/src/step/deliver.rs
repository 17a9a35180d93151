//! What a forward pass gave, on its way to the host: logits, or the few tokens that can be drawn.
//!
//! A device selects those tokens where its logits lie, so that of a row of the vocabulary's size a few hundred bytes travel. Rows
//! that are looked at as a whole are read as they are; those of the processor lie where they can be looked at.

use std::ops::Range;

use lory_kernels::backend::{Backend, Likeliest};
use lory_models::adapter::BatchAdapters;

use crate::{
    Result, memory,
    scheduler::{Model, Scheduler, SequenceId},
};

/// A row whose final state is wanted.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub id: SequenceId,
    pub position: usize,
    pub logits: Wanted,
    pub hidden: bool,
}

/// What is wanted of a row's logits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Nothing,
    /// So many of the likeliest tokens.
    Likeliest(usize),
    Whole,
}

impl<B: Backend> Scheduler<B> {
    /// Hands out what the rows asked for. From here on nothing can be run again: an error ends the
    /// requests that it concerns.
    pub(super) fn deliver(&mut self, model: &Model<'_, B>, adapters: &BatchAdapters, outputs: &[Output]) {
        let mut first = 0;
        let any = |output: &Output| output.logits != Wanted::Nothing;
        for group in outputs.chunk_by(|a, b| any(a) == any(b)) {
            let at_once = if any(&group[0]) { self.scratch.max_logits().max(1) } else { usize::MAX };
            for part in group.chunks(at_once) {
                let range = first..first + part.len();
                first = range.end;
                match self.compute_logits(model, adapters, part, range.clone()) {
                    Ok(likeliest) => self.hand_out(model, part, range, &likeliest),
                    // Each row alone, so that the error finds its request.
                    Err(_) => {
                        for (row, output) in range.zip(part) {
                            let one = std::slice::from_ref(output);
                            match self.compute_logits(model, adapters, one, row..row + 1) {
                                Ok(likeliest) => self.hand_out(model, one, row..row + 1, &likeliest),
                                Err(e) => self.fail(output.id, usize::MAX, e),
                            }
                        }
                    }
                }
            }
        }
    }

    /// The likeliest tokens of the outputs for which they were found; the logits of the others, if they are wanted, one row after
    /// the other in `self.logits`, unless those of all are where they can be looked at.
    fn compute_logits(
        &mut self,
        model: &Model<'_, B>,
        adapters: &BatchAdapters,
        outputs: &[Output],
        range: Range<usize>,
    ) -> Result<Vec<Option<Likeliest>>> {
        if outputs.iter().all(|o| o.logits == Wanted::Nothing) {
            return Ok(vec![None; outputs.len()]);
        }
        model.decoder.compute_logits(model.backend, &mut self.scratch, adapters, range)?;
        let likeliest = self.select_likeliest(model, outputs)?;
        if model.decoder.logits_in_place(model.backend, &mut self.scratch).is_some() {
            return Ok(likeliest);
        }
        let whole: Vec<usize> = (0..).zip(&likeliest).filter(|(_, l)| l.is_none()).map(|(i, _)| i).collect();
        let vocab = model.decoder.vocab_size();
        let len = whole.len() * vocab;
        let more = len.saturating_sub(self.logits.len());
        memory::reserve(&mut self.logits, more, "logits")?;
        self.logits.resize(len, 0.0);
        let mut rest = &mut self.logits[..];
        // Neighbours in one copy.
        for lines in whole.chunk_by(|a, b| a + 1 == *b) {
            let (out, others) = rest.split_at_mut(lines.len() * vocab);
            model.decoder.read_logits(model.backend, &self.scratch, lines[0], out)?;
            rest = others;
        }
        Ok(likeliest)
    }

    /// The likeliest tokens of the outputs that need no more, if the device selects so many.
    fn select_likeliest(&self, model: &Model<'_, B>, outputs: &[Output]) -> Result<Vec<Option<Likeliest>>> {
        let mut likeliest = vec![None; outputs.len()];
        let mut wanted: Vec<(u32, usize)> = (0..)
            .zip(outputs)
            .filter_map(|(line, output)| match output.logits {
                Wanted::Likeliest(k) => Some((line, k)),
                _ => None,
            })
            .collect();
        // As many for all as the one that wants most: its own are the first of them.
        while let Some(most) = wanted.iter().map(|(_, k)| *k).max() {
            let lines: Vec<u32> = wanted.iter().map(|(line, _)| *line).collect();
            if let Some(found) =
                model.decoder.top_k(model.backend, &self.scratch, model.vocab(), &lines, most)?
            {
                for (line, tokens) in lines.into_iter().zip(found) {
                    likeliest[line as usize] = Some(tokens);
                }
                break;
            }
            wanted.retain(|(_, k)| *k < most);
        }
        Ok(likeliest)
    }
}
