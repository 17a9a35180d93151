//! What a forward pass gave, on its way to the sequences: final states, logits, or the few tokens that can be drawn.
//!
//! A device selects those tokens where its logits lie, so that of a row of the vocabulary's size a few hundred bytes travel. Rows
//! that are looked at as a whole, and all on the processor, are read as they are.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use lory_kernels::backend::{Backend, Likeliest};
use lory_models::{adapter::BatchAdapters, tokenizer::Tokenizer};

use crate::{
    Event, Result, lock, memory,
    sampler::Logits,
    scheduler::{Model, Scheduler, SequenceId},
    sequence::Sequence,
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
    /// the other in `self.logits`.
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

    /// Gives every sequence what its rows asked for. Who looks at whole rows of logits does so at the same time as others, since that takes up to
    /// milliseconds with a vocabulary of 128k tokens: first what is reported of each row, then what each sequence makes of its rows.
    fn hand_out(
        &mut self,
        model: &Model<'_, B>,
        outputs: &[Output],
        range: Range<usize>,
        likeliest: &[Option<Likeliest>],
    ) {
        let hidden = self.read_hidden(model, outputs, range);
        let reports = self.report(model, outputs, likeliest);
        let mut whole = self.logits.chunks_exact_mut(model.decoder.vocab_size().max(1));
        let mut given: HashMap<SequenceId, Vec<Given<'_>>> = HashMap::new();
        for (((output, likeliest), hidden), report) in outputs.iter().zip(likeliest).zip(hidden).zip(reports)
        {
            let logits = match likeliest {
                _ if output.logits == Wanted::Nothing => None,
                Some(tokens) => Some(Logits::Likeliest(tokens)),
                None => whole.next().map(|line| Logits::Whole(&mut line[..model.vocab()])),
            };
            let position = output.position;
            given.entry(output.id).or_default().push(Given { position, hidden, report, logits });
        }
        let sequences = self.sequences.iter_mut();
        let (long, short): (Vec<Turn<'_>>, Vec<_>) = sequences
            .filter_map(|(id, sequence)| Some(Turn { given: given.remove(id)?, sequence, chosen: None }))
            .partition(Turn::is_long);
        let long: Vec<_> = long.into_iter().map(Mutex::new).collect();
        model.backend.on_host(long.len(), &|i| lock(&long[i]).take(model.tokenizer));
        let long = long.into_iter().map(|turn| turn.into_inner().unwrap_or_else(PoisonError::into_inner));
        let short = short.into_iter().map(|mut turn| {
            turn.take(model.tokenizer);
            turn
        });
        for turn in long.chain(short) {
            if let Some(at) = turn.chosen {
                turn.sequence.count_token(at, &mut self.metrics);
            }
        }
    }

    /// The final states of the rows that want theirs. What cannot be read ends its request.
    fn read_hidden(
        &mut self,
        model: &Model<'_, B>,
        outputs: &[Output],
        range: Range<usize>,
    ) -> Vec<Option<Vec<f32>>> {
        let mut read = |row, id| {
            let values = model.decoder.hidden(model.backend, &self.scratch, row);
            values.map_err(|e| self.fail(id, usize::MAX, e.into())).ok()
        };
        range.zip(outputs).map(|(row, o)| o.hidden.then(|| read(row, o.id)).flatten()).collect()
    }

    /// What is reported of each row.
    fn report(
        &self,
        model: &Model<'_, B>,
        outputs: &[Output],
        likeliest: &[Option<Likeliest>],
    ) -> Vec<Result<Vec<Event>>> {
        let mut reports: Vec<Result<Vec<Event>>> = Vec::new();
        reports.resize_with(outputs.len(), || Ok(Vec::new()));
        let lines = self.logits.chunks_exact(model.decoder.vocab_size().max(1));
        let read = outputs.iter().zip(likeliest).zip(&mut reports);
        let read = read.filter(|((output, found), _)| output.logits != Wanted::Nothing && found.is_none());
        let rows: Vec<_> = read
            .zip(lines)
            .filter_map(|(((output, _), report), line)| {
                let sequence = self.sequences.get(&output.id).filter(|s| s.reports(output.position))?;
                Some(Mutex::new((sequence, output.position, line, report)))
            })
            .collect();
        model.backend.on_host(rows.len(), &|i| {
            let (sequence, position, line, report) = &mut *lock(&rows[i]);
            **report = sequence.report(*position, &line[..model.vocab()]);
        });
        drop(rows);
        reports
    }
}

/// What a row gave.
struct Given<'a> {
    position: usize,
    hidden: Option<Vec<f32>>,
    report: Result<Vec<Event>>,
    logits: Option<Logits<'a>>,
}

/// A sequence and what its rows gave, in their order.
struct Turn<'a> {
    sequence: &'a mut Sequence,
    given: Vec<Given<'a>>,
    /// When it chose a token, if it has.
    chosen: Option<Instant>,
}

impl Turn<'_> {
    fn is_long(&self) -> bool {
        self.given.iter().any(|given| matches!(given.logits, Some(Logits::Whole(_))))
    }

    fn take(&mut self, tokenizer: &Tokenizer) {
        for Given { position, hidden, report, logits } in self.given.drain(..) {
            let chosen = self.sequence.take_outputs(position, hidden, report, logits, tokenizer);
            self.chosen = self.chosen.or(chosen);
        }
    }
}
