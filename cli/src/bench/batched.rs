//! Sequences side by side: llama-batched-bench's tests and columns.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use lory_kernels::Backend;
use lory_runtime::{Bare, BareOptions, random_tokens};
use serde_json::{Map, Value, json};

use crate::failure::Outcome;

use super::{
    Device, Run, Settings,
    adapters::{Pool, sides},
    opened::{Model, Opened, Reached},
    table::{Cell, Table},
    timing::{mean, median_ratio},
};

/// Every combination of these is run.
pub struct Cases {
    /// Prompt tokens of each sequence.
    pub prompt: Vec<usize>,
    /// Generated tokens of each.
    pub generate: Vec<usize>,
    /// Numbers of sequences.
    pub sequences: Vec<usize>,
}

impl Cases {
    /// How many there are.
    fn count(&self) -> usize {
        self.prompt.len() * self.generate.len() * self.sequences.iter().filter(|pl| **pl > 0).count()
    }

    /// Whether any of them has a token.
    pub fn measure_something(&self) -> bool {
        let any = |numbers: &[usize]| numbers.iter().any(|n| *n > 0);
        any(&self.sequences) && (any(&self.prompt) || any(&self.generate))
    }
}

#[derive(Clone, Copy)]
struct Case {
    pp: usize,
    tg: usize,
    pl: usize,
}

/// Times of all samples of one case, with the same adapters.
#[derive(Default)]
struct Times {
    prompt: Vec<Duration>,
    generate: Vec<Duration>,
}

fn seconds(times: &[Duration]) -> f64 {
    mean(&times.iter().map(Duration::as_secs_f64).collect::<Vec<_>>())
}

/// All cases on all models.
pub fn run(models: &[Model], settings: &Settings, runs: &[Run], cases: &Cases) -> Outcome {
    let mut table = Table::new(settings.formats, &[]);
    let longest = cases.prompt.iter().max().unwrap_or(&0) + cases.generate.iter().max().unwrap_or(&0);
    let (mut n, all) = (0, models.len() * runs.len() * cases.count());
    for model in models {
        let opened = Opened::open(model, settings, longest)?;
        let pool = settings.pack.as_ref().map(|pack| Pool::open(pack, &opened)).transpose()?;
        let sides = sides(pool.as_ref());
        for run in runs {
            let most = BareOptions {
                sequences: cases.sequences.iter().copied().max().unwrap_or(1),
                tokens: longest,
                n_batch: run.rows(),
                kv_type: run.kv_type,
            };
            let (cache, working) = most.bytes(&opened.loaded.decoder);
            let bytes = (cache.saturating_mul(sides), working.saturating_mul(sides));
            let device = Device::new(*run, &opened, settings, bytes)?;
            for pp in &cases.prompt {
                for tg in &cases.generate {
                    for pl in cases.sequences.iter().filter(|pl| **pl > 0) {
                        n += 1;
                        table.progress.begin(format!("test {n}/{all} pp{pp} tg{tg} npl{pl}"));
                        let case = Case { pp: *pp, tg: *tg, pl: *pl };
                        let bed = Bed { opened: &opened, device: &device, run: *run, settings, case };
                        bed.measure(pool.as_ref(), &mut table)?;
                    }
                }
            }
        }
    }
    table.finish()
}

struct Bed<'a> {
    opened: &'a Opened,
    device: &'a Device,
    run: Run,
    settings: &'a Settings,
    case: Case,
}

impl Bed<'_> {
    fn measure(&self, pool: Option<&Pool>, table: &mut Table) -> Outcome {
        let Bed { opened, device, run, settings, case } = self;
        sleep(settings.delay);
        let options = BareOptions {
            sequences: case.pl,
            tokens: case.pp + case.tg,
            n_batch: run.rows(),
            kv_type: run.kv_type,
        };
        let mut sides = vec![device.sequences(opened, options)?];
        if let Some(pool) = pool {
            let mut adapted = device.sequences(opened, options)?;
            let mut draw = pool.draw(settings);
            for sequence in 0..case.pl {
                adapted.set_adapters(sequence, draw.next(opened, device)?);
            }
            sides.push(adapted);
        }
        let mut times = [Times::default(), Times::default()];
        let first = if settings.warm_up { 0 } else { 1 };
        for repetition in first..=settings.repetitions {
            table.progress.step("sample", repetition.max(1), settings.repetitions);
            let order = if repetition % 2 == 0 { [0, 1] } else { [1, 0] };
            for side in order {
                let Some(bare) = sides.get_mut(side) else { continue };
                let (prompt, generate) = self.sample(bare)?;
                if repetition > 0 {
                    times[side].prompt.push(prompt);
                    times[side].generate.push(generate);
                }
            }
        }
        let [base, adapted] = times;
        self.print(table, &base, pool.map(|pool| (pool, &adapted)))
    }

    /// All prompts together, then all sequences token by token, then everything is forgotten.
    fn sample(&self, bare: &mut Bare<'_, lory_kernels::Device>) -> Outcome<(Duration, Duration)> {
        let Case { pp, tg, pl } = self.case;
        let vocab = self.opened.vocab();
        let tokens: Vec<_> = (0..pl).map(|s| random_tokens(s as u64, pp + tg, vocab)).collect();
        let start = Instant::now();
        if pp > 0 {
            self.run.append(bare, &tokens.iter().map(|t| &t[..pp]).enumerate().collect::<Vec<_>>())?;
        }
        let prompt = start.elapsed();
        let start = Instant::now();
        for i in pp..pp + tg {
            self.run.append(bare, &tokens.iter().map(|t| &t[i..=i]).enumerate().collect::<Vec<_>>())?;
        }
        let generate = start.elapsed();
        (0..pl).for_each(|sequence| bare.truncate(sequence, 0));
        Ok((prompt, generate))
    }

    /// llama-batched-bench's columns; `(name, value, decimals)`.
    fn columns(&self, times: &Times) -> [(&'static str, &'static str, f64, usize); 10] {
        let Case { pp, tg, pl } = self.case;
        let (t_pp, t_tg) = (seconds(&times.prompt), seconds(&times.generate));
        let rate = |tokens: usize, time: f64| if time > 0.0 { tokens as f64 / time } else { 0.0 };
        [
            ("pp", "PP", pp as f64, 0),
            ("tg", "TG", tg as f64, 0),
            ("pl", "B", pl as f64, 0),
            ("n_kv", "N_KV", (pl * (pp + tg)) as f64, 0),
            ("t_pp", "T_PP s", t_pp, 3),
            ("speed_pp", "S_PP t/s", rate(pl * pp, t_pp), 2),
            ("t_tg", "T_TG s", t_tg, 3),
            ("speed_tg", "S_TG t/s", rate(pl * tg, t_tg), 2),
            ("t", "T s", t_pp + t_tg, 3),
            ("speed", "S t/s", rate(pl * (pp + tg), t_pp + t_tg), 2),
        ]
    }

    fn insert(&self, fields: &mut Map<String, Value>, times: &Times, suffix: &str) {
        for (name, _, value, decimals) in self.columns(times) {
            let value = if decimals == 0 { json!(value as u64) } else { json!(value) };
            // What does not depend on adapters stands there once.
            if suffix.is_empty() || decimals > 0 {
                fields.insert(format!("{name}{suffix}"), value);
            }
        }
        let nanos = |times: &[Duration]| times.iter().map(|t| t.as_nanos() as u64).collect::<Vec<_>>();
        fields.insert(format!("samples_pp_ns{suffix}"), json!(nanos(&times.prompt)));
        fields.insert(format!("samples_tg_ns{suffix}"), json!(nanos(&times.generate)));
    }

    /// One row: with adapters, if there are any, and beside them the same without.
    fn print(&self, table: &mut Table, base: &Times, adapted: Option<(&Pool, &Times)>) -> Outcome {
        let Bed { opened, device, run, settings, case } = self;
        let times = adapted.map_or(base, |(_, times)| times);
        let cached = case.pp as f64 + (case.tg as f64 + 1.0) / 2.0;
        let cost = opened.cost(*run);
        let bytes = case.tg as f64 * cost.step_bytes(case.pl, cached);
        let ops = cost.ops(case.pl * case.tg, cached, case.pl * case.tg);
        let reached = Reached::new(&cost, &device.ceilings, bytes, ops, seconds(&times.generate).max(1e-9));

        let mut fields = opened.fields(&device.backend.label(), *run, settings);
        self.insert(&mut fields, times, "");
        reached.fields(&mut fields);
        let mut cells: Vec<Cell> = self
            .columns(times)
            .into_iter()
            .map(|(_, name, value, decimals)| {
                Cell::new(name, format!("{value:.decimals$}"), if decimals == 0 { 6 } else { 8 })
            })
            .collect();
        cells.extend(reached.cells());
        match adapted {
            None => Pool::no_fields(&mut fields),
            Some((pool, adapted)) => {
                let tg = median_ratio(&adapted.generate, &base.generate);
                let pp = median_ratio(&adapted.prompt, &base.prompt);
                pool.fields(&mut fields, settings, case.pl, Some(tg));
                fields.insert("ratio_pp_to_base".into(), json!(pp));
                self.insert(&mut fields, base, "_base");
                let [.., s_pp, _, s_tg, _, _] = self.columns(base);
                cells.push(Cell::new("base S_PP t/s", format!("{:.2}", s_pp.2), 8));
                cells.push(Cell::new("base S_TG t/s", format!("{:.2}", s_tg.2), 8));
                cells.push(Cell::new("PP of base", format!("{pp:.3}"), 6));
                cells.push(Cell::new("TG of base", format!("{tg:.3}"), 6));
            }
        }
        table.row("lory_batched_bench", &fields, &cells)
    }
}
