//! `--trace`: requests that arrive by chance, each with an adapter of its own, and what they wait for.

use std::{
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use lory_runtime::{
    AdapterId, Engine, EngineOptions, Event, Request, SamplerOptions, SessionOptions, random_tokens,
};
use serde_json::{Map, Value, json};

use crate::failure::{Failure, Outcome};

use super::{
    Run, Settings,
    adapters::{Pool, Random},
    opened::{Model, Opened},
    table::{Cell, Table},
    timing::{mean, quantile},
};

#[derive(Args)]
#[command(next_help_heading = "Trace")]
pub struct TraceFlags {
    /// Requests that arrive as a Poisson process (prompts of -p and answers of -n tokens; of lists, the first value)
    /// with adapters as --adapter-dist deals them: waiting times as vLLM's benchmark names them.
    #[arg(long)]
    pub trace: bool,
    /// Requests a second.
    #[arg(long, value_name = "R", default_value_t = 1.0, requires = "trace")]
    rate: f64,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 32, requires = "trace", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    requests: u32,
    /// Milliseconds to the first token that a good request takes at most.
    #[arg(long, value_name = "MS", default_value_t = 2000.0, requires = "trace")]
    slo_ttft: f64,
    /// Milliseconds per token after it that a good request takes at most.
    #[arg(long, value_name = "MS", default_value_t = 200.0, requires = "trace")]
    slo_tpot: f64,
}

/// Sizes of every request.
#[derive(Clone, Copy)]
pub struct Workload {
    /// Prompt tokens.
    pub prompt: usize,
    /// Tokens of an answer.
    pub generate: usize,
}

/// What became of one request.
struct Served {
    /// When its tokens came, in seconds after it arrived.
    times: Vec<f64>,
    /// Prompt tokens that nobody computed for it.
    cached: usize,
}

impl Served {
    fn ttft(&self) -> f64 {
        self.times.first().copied().unwrap_or(f64::INFINITY)
    }

    /// Time per token after the first.
    fn tpot(&self) -> Option<f64> {
        let (first, last) = (self.times.first()?, self.times.last()?);
        (self.times.len() > 1).then(|| (last - first) / (self.times.len() - 1) as f64)
    }

    fn gaps(&self) -> impl Iterator<Item = f64> {
        self.times.windows(2).map(|pair| pair[1] - pair[0])
    }
}

/// The trace without adapters, then, with a pack, the same arrivals with them.
pub fn run(
    models: &[Model],
    settings: &Settings,
    runs: &[Run],
    flags: &TraceFlags,
    work: Workload,
) -> Outcome {
    if !(flags.rate.is_finite() && flags.rate > 0.0) {
        return Err(Failure::usage(format!("--rate {}: expected requests a second", flags.rate)));
    }
    let mut table = Table::new(settings.formats, &[]);
    for model in models {
        let opened = Opened::open(model, settings, work.prompt + work.generate)?;
        let pool = settings.pack.as_ref().map(|pack| Pool::open(pack, &opened)).transpose()?;
        for run in runs {
            let trace = Trace { opened: &opened, run: *run, settings, flags, work };
            table.progress.begin("trace".into());
            trace.measure(None, &mut table)?;
            if let Some(pool) = &pool {
                table.progress.begin("trace with adapters".into());
                trace.measure(Some(pool), &mut table)?;
            }
        }
    }
    table.finish()
}

struct Trace<'a> {
    opened: &'a Opened,
    run: Run,
    settings: &'a Settings,
    flags: &'a TraceFlags,
    work: Workload,
}

impl Trace<'_> {
    fn measure(&self, pool: Option<&Pool>, table: &mut Table) -> Outcome {
        let engine = self.engine()?;
        let mut draw = pool.map(|pool| pool.draw(self.settings));
        let mut names = Vec::new();
        if let (Some(draw), Some(pack)) = (&mut draw, &self.settings.pack) {
            engine.adapters().open_pack(pack)?;
            names.extend((0..self.flags.requests).map(|_| draw.name()));
        }
        // The first request of an engine pays for pages that are touched for the first time.
        serve(&engine, None, self.work, 0, Instant::now())?;
        let mut random = Random::new(self.settings.seed);
        let mut at = 0.0;
        let start = Instant::now();
        let served: Vec<Served> = thread::scope(|scope| {
            let mut requests = Vec::new();
            for i in 0..self.flags.requests as usize {
                at -= (1.0 - random.uniform()).ln() / self.flags.rate;
                table.progress.step("request", i + 1, self.flags.requests as usize);
                let arrival = start + Duration::from_secs_f64(at);
                thread::sleep(arrival.saturating_duration_since(Instant::now()));
                let (engine, work, name) = (&engine, self.work, names.get(i).copied());
                // Prompts that begin alike would be read from the cache.
                let seed = 1 + i as u64;
                requests.push(scope.spawn(move || serve(engine, name, work, seed, arrival)));
            }
            let join = |request: thread::ScopedJoinHandle<'_, Outcome<Served>>| match request.join() {
                Ok(served) => served,
                Err(_) => Err(Failure::runtime("a request panicked")),
            };
            requests.into_iter().map(join).collect::<Outcome<_>>()
        })?;
        self.print(table, &engine.device(), &served, start.elapsed().as_secs_f64(), pool)
    }

    fn engine(&self) -> Outcome<Engine> {
        let tokens = self.work.prompt + self.work.generate;
        self.run.settle()?;
        let options = EngineOptions {
            n_ctx: Some(u32::try_from(tokens).unwrap_or(u32::MAX)),
            n_batch: self.run.rows(),
            kv_tokens: Some((self.flags.requests as usize).min(256) * tokens.next_multiple_of(32)),
            ..self.opened.engine_options(self.run, self.settings)
        };
        Ok(Engine::open(&self.opened.model.path, &options)?)
    }

    fn print(
        &self,
        table: &mut Table,
        device: &str,
        served: &[Served],
        seconds: f64,
        pool: Option<&Pool>,
    ) -> Outcome {
        let Trace { opened, run, settings, flags, work } = self;
        let ms = |values: Vec<f64>| values.into_iter().map(|s| s * 1e3).collect::<Vec<_>>();
        let ttft = ms(served.iter().map(Served::ttft).collect());
        let tpot = ms(served.iter().filter_map(Served::tpot).collect());
        let itl = ms(served.iter().flat_map(Served::gaps).collect());
        let good = served.iter().filter(|s| {
            s.ttft() * 1e3 <= flags.slo_ttft && s.tpot().is_none_or(|t| t * 1e3 <= flags.slo_tpot)
        });
        let goodput = good.count() as f64 / seconds;
        let tokens: usize = served.iter().map(|s| s.times.len()).sum();
        let cached: usize = served.iter().map(|s| s.cached).sum();

        let mut fields: Map<String, Value> = opened.fields(device, *run, settings);
        let adapters = pool.map_or(0, Pool::len);
        let name = format!("trace{}", if adapters > 0 { format!("@L{adapters}") } else { String::new() });
        fields.insert("test".into(), json!(name));
        fields.insert("n_prompt".into(), json!(work.prompt));
        fields.insert("n_gen".into(), json!(work.generate));
        fields.insert("cached_tokens".into(), json!(cached));
        match pool {
            Some(pool) => pool.fields(&mut fields, settings, served.len(), None),
            None => Pool::no_fields(&mut fields),
        }
        for (name, value) in [
            ("request_rate", flags.rate),
            ("completed", served.len() as f64),
            ("duration", seconds),
            ("request_throughput", served.len() as f64 / seconds),
            ("request_goodput", goodput),
            ("output_throughput", tokens as f64 / seconds),
        ] {
            fields.insert(name.into(), json!(value));
        }
        let mut cells = opened.cells(*run, settings);
        cells.push(Cell::new("test", name, 11));
        for (columns, times) in [
            (["mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms"], &ttft),
            (["mean_tpot_ms", "median_tpot_ms", "p99_tpot_ms"], &tpot),
            (["mean_itl_ms", "median_itl_ms", "p99_itl_ms"], &itl),
        ] {
            let values = [mean(times), quantile(times, 0.5), quantile(times, 0.99)];
            for (column, value) in columns.into_iter().zip(values) {
                fields.insert(column.into(), json!(value));
            }
        }
        for (column, times) in
            [("TTFT ms p50/p99", &ttft), ("TPOT ms p50/p99", &tpot), ("ITL ms p50/p99", &itl)]
        {
            let text = format!("{:.0} / {:.0}", quantile(times, 0.5), quantile(times, 0.99));
            cells.push(Cell::new(column, text, 15));
        }
        cells.push(Cell::new("goodput req/s", format!("{goodput:.2}"), 13));
        cells.push(Cell::new("t/s", format!("{:.1}", tokens as f64 / seconds), 7));
        table.row("lory_trace", &fields, &cells)
    }
}

/// One request from its arrival to its last token; the clock starts when it should have arrived. The seed is the prompt's.
fn serve(
    engine: &Engine,
    adapter: Option<&str>,
    work: Workload,
    seed: u64,
    arrival: Instant,
) -> Outcome<Served> {
    let adapters: Vec<(AdapterId, f32)> = match adapter {
        Some(name) => vec![(engine.adapters().resolve(name)?, 1.0)],
        None => Vec::new(),
    };
    let mut session = engine.session(&SessionOptions { adapters, ..SessionOptions::default() })?;
    let vocab = engine.model().decoder.vocab_size();
    let mut times = Vec::new();
    let request = Request {
        tokens: random_tokens(seed, work.prompt.max(1), vocab),
        max_new_tokens: work.generate,
        sampler: SamplerOptions { temp: 0.0, ..SamplerOptions::default() },
        ignore_eos: true,
        ..Request::default()
    };
    let mut generation = session.generate(request)?;
    for event in &mut generation {
        if let Event::Token { .. } = event? {
            times.push(arrival.elapsed().as_secs_f64());
        }
    }
    Ok(Served { times, cached: generation.stats().cached_tokens })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_times_follow_from_token_times() {
        let served = |times: &[f64]| Served { times: times.to_vec(), cached: 0 };
        let three = served(&[0.5, 0.6, 0.9]);
        assert_eq!(three.ttft(), 0.5);
        assert!((three.tpot().unwrap() - 0.2).abs() < 1e-12);
        assert_eq!(three.gaps().count(), 2);
        assert_eq!(served(&[0.1]).tpot(), None);
        assert!(served(&[]).ttft().is_infinite());
    }
}
