//! `lory bench`: the tests of llama-bench and llama-batched-bench with their flags and columns, and
//! what they cannot measure: adapters.

mod adapters;
mod arrivals;
mod batched;
mod devices;
mod fixed;
mod opened;
mod ranges;
mod run;
mod single;
mod store;
mod table;
pub mod timing;
mod trace;

use std::{path::PathBuf, time::Duration};

use clap::Args;
use lory_kernels::{Backend, ceilings::Ceilings, cpu::ThreadPool};
use lory_runtime::{Bare, BareOptions, DeviceOptions, Repacking, mapping::Loading};

use crate::{
    failure::{Failure, Outcome},
    model_flags::{RepackArg, note},
};

use adapters::Distribution;
use fixed::FixedFlags;
use opened::Model;
use ranges::{Numbers, PromptAndGeneration};
use run::{Run, RunFlags, Shown, all, or};
use table::{Format, Formats};

/// Measure speed: prompts, generation, batches, and what adapters cost.
///
/// Tests and columns are those of llama-bench, and of llama-batched-bench with --npp, --ntg and --npl. Lists (1,2)
/// and ranges (8-64+8, 8-64*2) give every combination. Speeds are also given in bytes read and operations, and as
/// shares of what this machine reaches at all, measured before.
#[derive(Args)]
#[command(after_help = "Examples:
  lory bench -m model.gguf                                     pp512 and tg128
  lory bench -m model.gguf -p 0 -n 64 -d 0,4096 -t 1-4*2       deep contexts, numbers of threads
  lory bench -m model.gguf -ngl 0,16,99                        layers on the GPU
  lory bench -m model.gguf -npp 128 -ntg 32 -npl 1,8,32        sequences side by side
  lory bench -m model.gguf --pack styles.gguf                  what an adapter costs; arrive, load, swap, mem
  lory bench -m model.gguf --pack styles.gguf --adapter-dist distinct -npl 1,8,32 -o json
  lory bench -m model.gguf --pack styles.gguf --adapter-dist zipf --trace --rate 4 --requests 64")]
pub struct Bench {
    /// Models (GGUF); all tests run on each.
    #[arg(
        short = 'm',
        long,
        value_name = "FILE",
        required_unless_present = "list_devices",
        value_delimiter = ','
    )]
    model: Vec<PathBuf>,
    /// Tokens of a prompt; 0 leaves the test out.
    #[arg(short = 'p', long, value_name = "N,…", default_value = "512")]
    n_prompt: Vec<Numbers>,
    /// Tokens to generate; 0 leaves the test out.
    #[arg(short = 'n', long, value_name = "N,…", default_value = "128")]
    n_gen: Vec<Numbers>,
    /// A prompt and a generation after it, timed together (short: -pg). Repeatable.
    #[arg(long, value_name = "PP,TG")]
    pg: Vec<PromptAndGeneration>,
    /// Tokens in the context before the clock starts.
    #[arg(short = 'd', long, value_name = "N,…", default_value = "0")]
    n_depth: Vec<Numbers>,
    #[command(flatten)]
    run: RunFlags,
    /// Samples of each test.
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repetitions: u32,
    /// Seconds of rest before each test.
    #[arg(long, value_name = "S", default_value_t = 0)]
    delay: u32,
    /// No run before the samples that does not count.
    #[arg(long)]
    no_warmup: bool,
    /// A line on the standard error before each sample, also where that is no terminal.
    #[arg(long)]
    progress: bool,
    /// Say more on standard error: sizes, devices, what they reach.
    #[arg(short = 'v', long)]
    verbose: bool,
    /// List what there is to compute on, and end.
    #[arg(long)]
    list_devices: bool,
    /// How results are printed.
    #[arg(short = 'o', long, value_name = "FORMAT", value_enum, default_value = "md")]
    output: Format,
    /// Also print results on the standard error (short: -oe).
    #[arg(long, value_name = "FORMAT", value_enum)]
    output_err: Option<Format>,
    /// Read the files into memory instead of mapping them (also -mmp 0; -mmp 0,1 compares).
    #[arg(long)]
    no_mmap: bool,
    /// Whether files are mapped (short: -mmp), as llama-bench asks for it.
    #[arg(long, value_name = "0|1,…", hide = true, value_delimiter = ',', value_parser = mapped, conflicts_with = "no_mmap")]
    mmap: Vec<Loading>,
    /// How files are opened (short: -lm), as llama-bench asks for it.
    #[arg(long, value_name = "auto|none|mmap,…", hide = true, value_delimiter = ',', value_parser = load_mode, conflicts_with_all = ["no_mmap", "mmap"])]
    load_mode: Vec<Loading>,
    /// Copy the weights into an order that is faster to read, for their size in memory again.
    #[arg(long, value_name = "WHEN", value_enum, default_value = "off")]
    repack: RepackArg,
    #[command(flatten)]
    batched: BatchedFlags,
    #[command(flatten)]
    adapters: AdapterFlags,
    #[command(flatten)]
    trace: trace::TraceFlags,
    #[command(flatten)]
    fixed: FixedFlags,
}

/// Sequences side by side, as llama-batched-bench runs them.
#[derive(Args)]
#[command(next_help_heading = "Batched decoding")]
struct BatchedFlags {
    /// Prompt tokens of each sequence (short: -npp) [default: 128].
    #[arg(long, value_name = "N,…")]
    npp: Vec<Numbers>,
    /// Generated tokens of each sequence (short: -ntg) [default: 32].
    #[arg(long, value_name = "N,…")]
    ntg: Vec<Numbers>,
    /// Numbers of sequences (short: -npl) [default: 1,8,32].
    #[arg(long, value_name = "N,…")]
    npl: Vec<Numbers>,
}

#[derive(Args)]
#[command(next_help_heading = "Adapters")]
struct AdapterFlags {
    /// Also measure with the adapters of this pack; every test runs with and without, in turns.
    #[arg(long, value_name = "PACK")]
    pack: Option<PathBuf>,
    /// Which adapters the sequences have.
    #[arg(long, value_name = "DIST", value_enum, default_value = "one", requires = "pack")]
    adapter_dist: Distribution,
    /// The same seed draws the same adapters.
    #[arg(short = 's', long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// What all tests need to know.
struct Settings {
    repetitions: usize,
    delay: Duration,
    warm_up: bool,
    formats: Formats,
    repacking: Repacking,
    pack: Option<PathBuf>,
    distribution: Distribution,
    seed: u64,
    verbose: bool,
    shown: Shown,
}

/// What computes a run, and what it can reach.
struct Device {
    run: Run,
    backend: lory_kernels::Device,
    ceilings: Ceilings,
}

impl Bench {
    pub fn run(self) -> Outcome {
        if self.list_devices {
            return devices::list();
        }
        let runs = self.run.runs()?;
        let models = self.models();
        let settings = self.settings(&runs, &models)?;
        let batched = [&self.batched.npp, &self.batched.ntg, &self.batched.npl];
        if self.trace.trace {
            if settings.shown.embeddings {
                return Err(Failure::usage("-embd 1: the requests of --trace generate"));
            }
            let rows =
                trace::Workload { prompt: first(&self.n_prompt, 32), generate: first(&self.n_gen, 32) };
            return trace::run(&models, &settings, &runs, &self.trace, rows);
        }
        if batched.iter().any(|f| !f.is_empty()) {
            let cases = batched::Cases {
                prompt: or(&self.batched.npp, &[128]),
                generate: or(&self.batched.ntg, &[32]),
                sequences: or(&self.batched.npl, &[1, 8, 32]),
            };
            if !cases.measure_something() {
                return Err(nothing("-npp, -ntg and -npl"));
            }
            return batched::run(&models, &settings, &runs, &cases);
        }
        let tests = self.tests();
        // A pack has tests of its own.
        if tests.is_empty() && settings.pack.is_none() {
            return Err(nothing("-p, -n and -pg"));
        }
        single::run(&models, &settings, &runs, &tests)
    }

    fn settings(&self, runs: &[Run], models: &[Model]) -> Outcome<Settings> {
        let shown = Shown::of(runs, models);
        self.fixed.check(shown.gpu)?;
        Ok(Settings {
            repetitions: self.repetitions as usize,
            delay: Duration::from_secs(self.delay.into()),
            warm_up: !self.no_warmup,
            formats: Formats { output: self.output, errors: self.output_err, progress: self.progress },
            repacking: self.repack.repacking(),
            pack: self.adapters.pack.clone(),
            distribution: self.adapters.adapter_dist,
            seed: self.adapters.seed,
            verbose: self.verbose,
            shown,
        })
    }

    /// Every file, opened in every way.
    fn models(&self) -> Vec<Model> {
        let ways = match () {
            () if self.no_mmap => vec![Loading::Read],
            () if self.mmap.is_empty() && self.load_mode.is_empty() => vec![Loading::Map],
            () => self.mmap.iter().chain(&self.load_mode).copied().collect(),
        };
        let all = self.model.iter().flat_map(|path| ways.iter().map(move |loading| (path.clone(), *loading)));
        all.map(|(path, loading)| Model { path, loading }).collect()
    }

    /// Prompts, generations, and both, at every depth.
    fn tests(&self) -> Vec<single::Test> {
        let prompts = all(&self.n_prompt).into_iter().map(|n| (n, 0));
        let generations = all(&self.n_gen).into_iter().map(|n| (0, n));
        let both = self.pg.iter().map(|pg| (pg.0, pg.1));
        let kinds: Vec<_> = prompts.chain(generations).chain(both).filter(|t| *t != (0, 0)).collect();
        let at =
            |depth| kinds.iter().map(move |(p, n)| single::Test { n_prompt: *p, n_gen: *n, n_depth: depth });
        all(&self.n_depth).into_iter().flat_map(at).collect()
    }
}

fn mapped(wanted: &str) -> Result<Loading, String> {
    match wanted {
        "0" => Ok(Loading::Read),
        "1" => Ok(Loading::Map),
        _ => Err("expected 0 or 1".into()),
    }
}

/// As llama-bench names the ways to open a file; two of them are here.
fn load_mode(wanted: &str) -> Result<Loading, String> {
    match wanted {
        "auto" | "mmap" => Ok(Loading::Map),
        "none" => Ok(Loading::Read),
        "mlock" | "mmap+mlock" | "dio" => {
            Err("files are mapped or read here, neither locked in memory nor read past the page cache".into())
        }
        _ => Err("expected auto, none or mmap".into()),
    }
}

fn nothing(flags: &str) -> Failure {
    Failure::usage(format!("nothing to measure: {flags} leave no test; give one of them a number above 0"))
}

fn first(flags: &[Numbers], default: usize) -> usize {
    all(flags).into_iter().find(|n| *n > 0).unwrap_or(default)
}

impl Device {
    /// What computes a run; the bytes are those of a layer's keys and values and of working memory.
    fn new(
        run: Run,
        opened: &opened::Opened,
        settings: &Settings,
        (cache_bytes, working_bytes): (usize, usize),
    ) -> Outcome<Device> {
        run.settle()?;
        let backend = opened.loaded.device(&DeviceOptions {
            choice: run.device,
            gpu_layers: run.gpu_layers,
            threads: Some(run.threads),
            thread_options: run.thread_options,
            repacking: settings.repacking,
            cache_bytes,
            working_bytes,
            adapter_bytes: None,
        })?;
        let ceilings = if run.on_gpu() {
            // A GPU's are not measured.
            Ceilings::default()
        } else {
            let pool = ThreadPool::with_options(run.threads, &run.thread_options);
            Ceilings::measure(&pool, Duration::from_millis(100))
        };
        if settings.verbose {
            note(&format!("device   {}", backend.label()));
            let Ceilings { read, .. } = ceilings;
            if read > 0.0 {
                let ty = opened.cost(run).ty;
                let peak = ceilings.of(ty);
                note(&format!("ceilings {read:.1} GB/s read, {peak:.0} Gop/s with weights of {ty}"));
            }
        }
        Ok(Device { run, backend, ceilings })
    }

    /// Sequences of a test on it; where there is no memory for them, what to take less of.
    fn sequences<'a>(
        &'a self,
        opened: &'a opened::Opened,
        options: BareOptions,
    ) -> Outcome<Bare<'a, lory_kernels::Device>> {
        Bare::new(&self.backend, &opened.loaded.decoder, options).map_err(|e| {
            let BareOptions { sequences, tokens, .. } = options;
            Failure::runtime(format!(
                "{e}: {sequences} x {tokens} tokens are too many; take less of -p, -n, -d, or of -npp, -ntg, -npl"
            ))
        })
    }

    /// Whether it also computes this run.
    fn is_for(&self, run: Run) -> bool {
        self.run.shares_a_device_with(run)
    }
}
