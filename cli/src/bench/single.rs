//! Prompts and generations of one sequence: llama-bench's tests.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use lory_kernels::Backend;
use lory_models::cost::Cost;
use lory_runtime::{Bare, BareOptions, random_tokens};
use serde_json::{Map, Value, json};

use crate::failure::Outcome;

use super::{
    Device, Run, Settings,
    adapters::{Pool, sides},
    opened::{Model, Opened, Reached},
    store,
    table::{Cell, Table},
    timing::{Samples, median_ratio},
};

/// The table in SQL.
const NAME: &str = "lory_bench";

/// One test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Test {
    /// Prompt tokens, run in batches.
    pub n_prompt: usize,
    /// Tokens run one by one after them.
    pub n_gen: usize,
    /// Tokens before the clock starts.
    pub n_depth: usize,
}

impl Test {
    fn name(&self, adapters: usize) -> String {
        let mut name = match (self.n_prompt, self.n_gen) {
            (p, 0) => format!("pp{p}"),
            (0, n) => format!("tg{n}"),
            (p, n) => format!("pp{p}+tg{n}"),
        };
        if adapters > 0 {
            name += &format!("@L{adapters}");
        }
        if self.n_depth > 0 {
            name += &format!(" @ d{}", self.n_depth);
        }
        name
    }

    fn tokens(&self) -> usize {
        self.n_prompt + self.n_gen
    }

    /// Bytes to read and operations of one sample; a prompt reads the weights once per step.
    fn work(&self, cost: &Cost, rows: usize) -> (f64, f64) {
        let cached = |before: usize, n: usize| before as f64 + (n as f64 + 1.0) / 2.0;
        let (p, n, d) = (self.n_prompt, self.n_gen, self.n_depth);
        let (of_prompt, of_gen) = (cached(d, p), cached(d + p, n));
        let steps = p.div_ceil(rows);
        let bytes = steps as f64 * cost.step_bytes(1, of_prompt) + n as f64 * cost.step_bytes(1, of_gen);
        (bytes, cost.ops(p, of_prompt, p.min(1)) + cost.ops(n, of_gen, n))
    }

    /// Runs once, from the context's depth back to it.
    fn sample(
        &self,
        bare: &mut Bare<'_, lory_kernels::Device>,
        run: Run,
        sequence: usize,
        vocab: usize,
    ) -> Outcome<Duration> {
        let tokens = random_tokens(3, self.tokens(), vocab);
        let (prompt, generated) = tokens.split_at(self.n_prompt);
        let start = Instant::now();
        if !prompt.is_empty() {
            run.append(bare, &[(sequence, prompt)])?;
        }
        for token in generated.chunks(1) {
            run.append(bare, &[(sequence, token)])?;
        }
        let time = start.elapsed();
        bare.truncate(sequence, self.n_depth);
        Ok(time)
    }
}

/// All tests on all models; with a pack also its own tests.
pub fn run(models: &[Model], settings: &Settings, runs: &[Run], tests: &[Test]) -> Outcome {
    let later = if settings.pack.is_some() { store::COLUMNS } else { &[] };
    let mut table = Table::new(settings.formats, later);
    let longest = tests.iter().map(|t| t.n_depth + t.tokens()).max().unwrap_or(1);
    let (mut n, all) = (0, models.len() * runs.len() * tests.len());
    for model in models {
        let opened = Opened::open(model, settings, longest)?;
        let pool = settings.pack.as_ref().map(|pack| Pool::open(pack, &opened)).transpose()?;
        let most = |run: &Run| BareOptions {
            sequences: sides(pool.as_ref()),
            tokens: longest,
            n_batch: runs.iter().map(|run| run.rows()).max().unwrap_or(1),
            kv_type: run.kv_type,
        };
        let mut device: Option<Device> = None;
        for run in runs {
            // The one before it gives its memory back first.
            device = device.filter(|device| device.is_for(*run));
            if device.is_none() {
                let bytes = most(run).bytes(&opened.loaded.decoder);
                device = Some(Device::new(*run, &opened, settings, bytes)?);
            }
            let Some(device) = &device else { continue };
            for test in tests {
                n += 1;
                table.progress.begin(format!("test {n}/{all} {}", test.name(0)));
                measure(&opened, device, *run, settings, pool.as_ref(), *test, &mut table)?;
            }
        }
        drop(device);
        if let (Some(pool), Some(run)) = (&pool, runs.last()) {
            store::measure(&opened, *run, settings, pool, &mut table)?;
        }
    }
    table.finish()
}

fn measure(
    opened: &Opened,
    device: &Device,
    run: Run,
    settings: &Settings,
    pool: Option<&Pool>,
    test: Test,
    table: &mut Table,
) -> Outcome {
    sleep(settings.delay);
    let sequences = sides(pool);
    let tokens = test.n_depth + test.tokens();
    let options = BareOptions { sequences, tokens, n_batch: run.rows(), kv_type: run.kv_type };
    let mut bare = device.sequences(opened, options)?;
    let mut draw = pool.map(|pool| pool.draw(settings));
    let vocab = opened.vocab();
    for sequence in 0..sequences {
        if let (1, Some(draw)) = (sequence, &mut draw) {
            bare.set_adapters(1, draw.next(opened, device)?);
        }
        if test.n_depth > 0 {
            bare.run(&[(sequence, &random_tokens(2, test.n_depth, vocab))])?;
        }
        if settings.warm_up {
            // As llama-bench: a whole prompt, one generated token.
            let warm = Test { n_gen: test.n_gen.min(1), ..test };
            warm.sample(&mut bare, run, sequence, vocab)?;
        }
    }
    let mut samples = [(); 2].map(|()| Samples { tokens: test.tokens(), times: Vec::new() });
    for repetition in 0..settings.repetitions {
        table.progress.step("sample", repetition + 1, settings.repetitions);
        if let Some(draw) = &mut draw {
            bare.set_adapters(1, draw.next(opened, device)?);
        }
        // Who begins changes, so that what drifts hits both.
        let order = if repetition % 2 == 0 { [0, 1] } else { [1, 0] };
        for sequence in order.into_iter().filter(|s| *s < sequences) {
            samples[sequence].times.push(test.sample(&mut bare, run, sequence, vocab)?);
        }
    }
    let [base, adapted] = samples;
    let row = Row { opened, device, run, settings, test };
    row.print(table, &base, None)?;
    match pool {
        Some(pool) => row.print(table, &adapted, Some((pool, median_ratio(&adapted.times, &base.times)))),
        None => Ok(()),
    }
}

struct Row<'a> {
    opened: &'a Opened,
    device: &'a Device,
    run: Run,
    settings: &'a Settings,
    test: Test,
}

impl Row<'_> {
    /// One result; with adapters also how it compares to the base.
    fn print(&self, table: &mut Table, samples: &Samples, adapters: Option<(&Pool, f64)>) -> Outcome {
        let Row { opened, device, run, settings, test } = self;
        let cost = opened.cost(*run);
        let (bytes, ops) = test.work(&cost, run.rows());
        let seconds = samples.tokens as f64 / samples.rate().max(1e-9);
        let reached = Reached::new(&cost, &device.ceilings, bytes, ops, seconds);
        let name = test.name(adapters.map_or(0, |(pool, _)| pool.len()));

        let mut fields: Map<String, Value> = opened.fields(&device.backend.label(), *run, settings);
        fields.insert("test".into(), json!(name));
        fields.insert("n_prompt".into(), json!(test.n_prompt));
        fields.insert("n_gen".into(), json!(test.n_gen));
        fields.insert("n_depth".into(), json!(test.n_depth));
        match adapters {
            Some((pool, ratio)) => pool.fields(&mut fields, settings, 1, Some(ratio)),
            None => Pool::no_fields(&mut fields),
        }
        reached.fields(&mut fields);
        samples.fields(&mut fields);

        let mut cells = opened.cells(*run, settings);
        if settings.shown.rows {
            cells.push(Cell::new("n_batch", run.n_batch.to_string(), 7));
            cells.push(Cell::new("n_ubatch", run.n_ubatch.to_string(), 8));
        }
        cells.push(Cell::new("test", name, 15));
        cells.push(Cell::new("t/s", samples.text(), 16));
        cells.extend(reached.cells());
        if settings.pack.is_some() {
            let ratio = adapters.map_or("-".into(), |(_, ratio)| format!("{ratio:.3}"));
            cells.push(Cell::new("of base", ratio, 7));
        }
        table.row(NAME, &fields, &cells)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_llama_bench() {
        let name = |n_prompt, n_gen, n_depth, l| Test { n_prompt, n_gen, n_depth }.name(l);
        assert_eq!(name(512, 0, 0, 0), "pp512");
        assert_eq!(name(0, 128, 4096, 0), "tg128 @ d4096");
        assert_eq!(name(512, 128, 0, 0), "pp512+tg128");
        assert_eq!(name(0, 128, 0, 1000), "tg128@L1000");
    }
}
