//! What a forward pass gave, on its way to the sequences: each is told what it wants to know of its prompt, and draws its token.
//!
//! Whoever looks at whole rows of logits does so on a thread of the backend, at the same time as others: with a vocabulary of 128k tokens that
//! takes up to milliseconds. What a sequence gets does not depend on it.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Mutex,
    time::Instant,
};

use lory_kernels::backend::{Backend, Likeliest};
use lory_models::tokenizer::Tokenizer;

use super::deliver::{Output, Wanted};
use crate::{
    Event, Result, lock,
    sampler::Logits,
    scheduler::{Model, Scheduler, SequenceId},
    sequence::Sequence,
};

/// What a row gave.
struct Row<'a> {
    output: &'a Output,
    hidden: Option<Vec<f32>>,
    report: Result<Vec<Event>>,
    logits: Option<Logits<'a>>,
}

/// A sequence and what its rows gave, in their order.
struct Turn<'a> {
    sequence: &'a mut Sequence,
    rows: Vec<Row<'a>>,
    /// When it chose a token, if it has.
    chosen: Option<Instant>,
}

impl<B: Backend> Scheduler<B> {
    /// Hands out what `outputs` asked for: rows `range` of what the last forward pass gave, whose logits were computed last.
    pub(super) fn hand_out(
        &mut self,
        model: &Model<'_, B>,
        outputs: &[Output],
        range: Range<usize>,
        likeliest: &[Option<Likeliest>],
    ) {
        let hidden = self.read_hidden(model, outputs, range);
        // Of all rows, or of those that were read.
        let in_place = model.decoder.logits_in_place(model.backend, &mut self.scratch);
        let of_all = in_place.is_some();
        let lines = in_place.unwrap_or(&mut self.logits);
        let mut lines = lines.chunks_exact_mut(model.decoder.vocab_size().max(1));
        let mut rows: Vec<Row<'_>> = Vec::with_capacity(outputs.len());
        for ((output, likeliest), hidden) in outputs.iter().zip(likeliest).zip(hidden) {
            let line = if of_all || likeliest.is_none() { lines.next() } else { None };
            let logits = match likeliest {
                _ if output.logits == Wanted::Nothing => None,
                Some(tokens) => Some(Logits::Likeliest(tokens)),
                None => line.map(|line| Logits::Whole(&mut line[..model.vocab()])),
            };
            rows.push(Row { output, hidden, report: Ok(Vec::new()), logits });
        }
        report(model.backend, &self.sequences, &mut rows);

        let whole = rows.iter().any(|row| matches!(row.logits, Some(Logits::Whole(_))));
        let mut of_each: HashMap<SequenceId, Vec<Row<'_>>> = HashMap::new();
        rows.into_iter().for_each(|row| of_each.entry(row.output.id).or_default().push(row));
        let turn = |(id, sequence)| Some(Turn { rows: of_each.remove(id)?, sequence, chosen: None });
        let turns: Vec<_> = self.sequences.iter_mut().filter_map(turn).map(Mutex::new).collect();
        let take = |i: usize| lock(&turns[i]).take(model.tokenizer);
        match whole {
            true => model.backend.on_host(turns.len(), &take),
            // Faster than a thread that sleeps comes to it.
            false => (0..turns.len()).for_each(take),
        }
        for turn in &turns {
            let turn = &mut *lock(turn);
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
}

/// Finds what is to be reported of each row.
fn report<B: Backend>(backend: &B, sequences: &BTreeMap<SequenceId, Sequence>, rows: &mut [Row<'_>]) {
    let reported = rows.iter_mut().filter_map(|row| {
        let sequence = sequences.get(&row.output.id)?;
        sequence.wants_report(row.output.position).then(|| Mutex::new((sequence, row)))
    });
    let reported: Vec<_> = reported.collect();
    backend.on_host(reported.len(), &|i| {
        let (sequence, row) = &mut *lock(&reported[i]);
        if let Some(Logits::Whole(logits)) = &row.logits {
            row.report = sequence.report(row.output.position, logits);
        }
    });
}

impl Turn<'_> {
    fn take(&mut self, tokenizer: &Tokenizer) {
        for Row { output, hidden, report, logits } in self.rows.drain(..) {
            let chosen = self.sequence.take_outputs(output.position, hidden, report, logits, tokenizer);
            self.chosen = self.chosen.or(chosen);
        }
    }
}
