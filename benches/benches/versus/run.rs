//! What is asked for, and the order of everything.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Parser, ValueEnum};
use lory_kernels::Cpu;
use lory_kernels::backend::KvType;
use lory_kernels::ceilings::Ceilings;
use lory_kernels::cpu::{Isa, ThreadPool, physical_cores};
use lory_models::{cost::Cost, synth};
use lory_runtime::{LoadedModel, OpenOptions, Repacking};
use serde_json::{Value, json};

use crate::adapters::{self, Adapted};
use crate::check::{Check, Extent};
use crate::llama::{self, Llama};
use crate::report::{self, Row};
use crate::side::Lory;
use crate::test::Test;

/// Compares the speed of Lory and llama.cpp on the same model.
#[derive(Parser)]
#[command(after_help = "Models of real shape and random weights:
  cargo run --release -p lory -- synth model llama-1b --type Q4_0 -o llama-1b.gguf")]
struct Args {
    /// Models, one table for each.
    #[arg(short, long, value_name = "FILE", value_delimiter = ',')]
    model: Vec<PathBuf>,
    /// Threads of each side; without, the physical cores.
    #[arg(short, long)]
    threads: Option<usize>,
    /// Tokens of a prompt.
    #[arg(short = 'p', long, default_value_t = 512)]
    n_prompt: usize,
    /// Tokens to generate.
    #[arg(short = 'n', long, default_value_t = 128)]
    n_gen: usize,
    /// Pairs of samples.
    #[arg(short, long, default_value_t = 5)]
    repetitions: usize,
    /// No pair before them that does not count: for adapters, which llama.cpp runs one after the other.
    #[arg(long)]
    no_warmup: bool,
    /// What is measured.
    #[arg(long, value_delimiter = ',', default_value = "pp,tg,batched,depth")]
    tests: Vec<Kind>,
    /// Cached tokens before the tests at depth.
    #[arg(short = 'd', long, default_value_t = 4096)]
    n_depth: usize,
    /// Numbers of sequences in the batched tests.
    #[arg(long, value_delimiter = ',', default_value = "8,32")]
    npl: Vec<usize>,
    /// Prompt of each sequence in the batched tests.
    #[arg(long, default_value_t = 64)]
    npp: usize,
    /// Tokens of each sequence in the batched tests.
    #[arg(long, default_value_t = 32)]
    ntg: usize,
    /// A pack of the model's, for the tests with adapters.
    #[arg(long, value_name = "PACK")]
    pack: Option<PathBuf>,
    /// Lory copies the weights into an order of its own, too, as llama.cpp does where it can.
    #[arg(long)]
    repack: bool,
    /// Also writes every sample as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// A tiny model and one short sample of everything: checks results, its times say nothing.
    #[arg(long)]
    quick: bool,
    /// Cargo says so when it measures; without, the run is a quick one.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A prompt.
    Pp,
    /// One sequence, token by token.
    Tg,
    /// Many sequences, token by token.
    Batched,
    /// Both of the first behind a long context.
    Depth,
    /// Many sequences, each under an adapter of its own; needs --pack. Alone with few samples:
    /// `--tests adapters --npl 8,32 --npp 16 --ntg 8 -r 2 --no-warmup`.
    Adapters,
}

pub fn main() -> ExitCode {
    match Args::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

impl Args {
    fn tests(&self) -> Vec<Test> {
        let mut tests = Vec::new();
        for kind in &self.tests {
            let (p, n, d) = (self.n_prompt, self.n_gen, self.n_depth);
            match kind {
                Kind::Pp => tests.push(Test::Prompt { n: p, depth: 0 }),
                Kind::Tg => tests.push(Test::Generate { n, depth: 0 }),
                Kind::Batched | Kind::Adapters => {
                    tests.extend(self.npl.iter().map(|sequences| Test::Batched {
                        sequences: *sequences,
                        prompt: self.npp,
                        n: self.ntg,
                        adapters: *kind == Kind::Adapters,
                    }))
                }
                Kind::Depth => {
                    tests.push(Test::Prompt { n: p, depth: d });
                    tests.push(Test::Generate { n, depth: d });
                }
            }
        }
        tests
    }

    fn run(mut self) -> Result<(), String> {
        if self.tests.contains(&Kind::Adapters) && self.pack.is_none() && self.bench {
            return Err("no adapters: give --pack FILE. Some to measure with:\n  \
                 cargo run --release -p lory -- synth pack -m MODEL --adapters 32 --rank 64 -o PACK"
                .into());
        }
        let mut temporary = None;
        if self.quick || !self.bench {
            self.quick = true;
            (self.n_prompt, self.n_gen, self.repetitions, self.n_depth) = (24, 6, 1, 40);
            (self.npl, self.npp, self.ntg) = (vec![3], 5, 4);
            if self.model.is_empty() {
                let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
                self.model = ["Q4_0", "Q8_0", "Q4_K_M", "BF16", "F16"]
                    .map(|ty| tiny_model(folder.path(), ty))
                    .into_iter()
                    .collect::<Result<_, _>>()?;
                self.tests.push(Kind::Adapters);
                temporary = Some(folder);
            }
        }
        if self.model.is_empty() {
            return Err("no model: give -m FILE. One to measure with, in any format:\n  \
                 cargo run --release -p lory -- synth model llama-1b --type Q4_0 -o llama-1b.gguf"
                .into());
        }
        let cpu = Cpu::new(self.threads.or(Some(physical_cores())), Isa::from_env()?);
        let budget = Duration::from_millis(if self.quick { 1 } else { 300 });
        let before = Ceilings::measure(&ThreadPool::new(cpu.threads()), budget);
        println!("Lory:      {}", lory_kernels::Backend::label(&cpu));
        println!("llama.cpp: {}", llama::system_info());
        warn_if_crippled(&llama::system_info());
        let mut models = Vec::new();
        for model in &self.model {
            models.push(self.compare(model, &cpu, &before)?);
        }
        drop(temporary);
        let after = Ceilings::measure(&ThreadPool::new(cpu.threads()), budget);
        println!("\nceilings before: {}\nceilings after:  {}", ceilings_text(&before), ceilings_text(&after));
        if let Some(path) = &self.json {
            let all = json!({
                "unix_time": SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
                "lory_version": env!("CARGO_PKG_VERSION"),
                "lory": lory_kernels::Backend::label(&cpu),
                "lory_isa": cpu.isa().level().name(),
                "llama.cpp": llama::system_info(),
                "n_threads": cpu.threads(),
                "ceilings": [ceilings_json(&before), ceilings_json(&after)],
                "models": models,
            });
            std::fs::write(path, format!("{all:#}\n")).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(())
    }

    fn compare(&self, path: &Path, cpu: &Cpu, ceilings: &Ceilings) -> Result<Value, String> {
        let tests = self.tests();
        let longest = tests.iter().map(|t| t.before() + t.length()).max().unwrap_or(0).max(256);
        let options = OpenOptions { n_ctx: Some(longest as u32), ..Default::default() };
        let loaded = LoadedModel::open(path, &options).map_err(|e| e.to_string())?;
        let repacking = if self.repack { Repacking::On } else { Repacking::Off };
        let cpu = &loaded.cpu(Some(cpu.threads()), repacking).map_err(|e| e.to_string())?;
        let (decoder, vocab) = (&loaded.decoder, loaded.decoder.vocab_size());
        let theirs = Llama::open(path)?;
        let cost = Cost::of(decoder, KvType::F16);
        let repacked = cpu.repacked_bytes() >> 20;
        println!(
            "\n## {}, {} threads; {repacked} MiB repacked by Lory\n",
            theirs.description(),
            cpu.threads()
        );
        let mut checks = Vec::new();
        for extent in extents(&tests) {
            let (sequences, tokens) = (extent.sequences, extent.tokens());
            let check = Check::run(
                &mut Lory::new(cpu, decoder, sequences, tokens)?,
                &mut theirs.context(cpu.threads(), sequences, tokens)?,
                vocab,
                extent,
            )?;
            println!("{}", check.text());
            check.verdict()?;
            checks.push(check.json());
        }
        println!("\n{}", report::header());
        let mut rows = Vec::new();
        let most = tests.iter().filter(|t| t.adapters()).map(Test::sequences).max();
        let adapted = most.map(|n| self.adapted(path, &loaded, n)).transpose()?;
        for test in &tests {
            let tokens = test.before() + test.length();
            let mut ours = Lory::new(cpu, decoder, test.sequences(), tokens)?;
            let mut llama = theirs.context(cpu.threads(), test.sequences(), tokens)?;
            let mut likeness = None;
            if let Some(adapted) = adapted.as_ref().filter(|_| test.adapters()) {
                let n = test.sequences();
                ours = ours.with_adapters(&adapted.sets[..n]);
                llama = llama.with_loras(adapted.loras(&theirs, n)?);
                likeness = Some(adapters::check(&mut ours, &mut llama, n, vocab)?);
            }
            test.prepare(&mut ours, vocab)?;
            test.prepare(&mut llama, vocab)?;
            let warm_up = !self.quick && !self.no_warmup;
            let [lory, llama] = test.measure([&mut ours, &mut llama], vocab, self.repetitions, warm_up)?;
            let row = Row { test, cost: &cost, ceilings, llama: &llama, lory: &lory };
            println!("{}", row.line());
            let mut json = row.json();
            if let Some((lowest, between)) = likeness {
                json["adapter_check"] =
                    json!({ "lowest_correlation": lowest, "highest_between_adapters": between });
            }
            rows.push(json);
        }
        Ok(json!({
            "model_filename": path.to_string_lossy(),
            "model_type": theirs.description(),
            "lory_repacked_bytes": cpu.repacked_bytes(),
            "checks": checks,
            "rows": rows,
        }))
    }
}

impl Args {
    fn adapted(&self, path: &Path, loaded: &LoadedModel, n: usize) -> Result<Adapted, String> {
        match &self.pack {
            Some(pack) => Adapted::open(pack, loaded, n),
            None => Adapted::open(&adapters::tiny_pack(path, loaded, n)?, loaded, n),
        }
    }
}

/// One sequence, and every number of them that is timed side by side.
fn extents(tests: &[Test]) -> Vec<Extent> {
    let mut counts: Vec<usize> = tests.iter().map(Test::sequences).filter(|n| *n > 1).collect();
    counts.sort_unstable();
    counts.dedup();
    std::iter::once(Extent::ONE).chain(counts.into_iter().map(Extent::batch)).collect()
}

/// Says so when llama.cpp was built for less than this processor has.
fn warn_if_crippled(info: &str) {
    #[cfg(target_arch = "x86_64")]
    for (has, name) in [
        (std::arch::is_x86_feature_detected!("avx2"), "AVX2 = 1"),
        (std::arch::is_x86_feature_detected!("avx512f"), "AVX512 = 1"),
        (std::arch::is_x86_feature_detected!("avx512vnni"), "AVX512_VNNI = 1"),
        (std::arch::is_x86_feature_detected!("avx512bf16"), "AVX512_BF16 = 1"),
    ] {
        if has && !info.contains(name) {
            println!("NOTE: llama.cpp was built without {name}, which this processor has.");
        }
    }
    if info.is_empty() {
        println!("NOTE: llama.cpp does not say what it was built for.");
    }
}

fn tiny_model(folder: &Path, ty: &str) -> Result<PathBuf, String> {
    let path = folder.join(format!("tiny-{ty}.gguf"));
    let shape = synth::shape("llama-tiny").ok_or("there is no tiny shape")?;
    let file_type = synth::FileType::from_name(ty).ok_or("there is no such type")?;
    let file = std::fs::File::create(&path).map_err(|e| e.to_string())?;
    synth::model(shape, file_type, 1, std::io::BufWriter::new(file), |_| ()).map_err(|e| e.to_string())?;
    Ok(path)
}

fn ceilings_text(c: &Ceilings) -> String {
    let Ceilings { read, int8, bf16, f32 } = c;
    format!("read {read:.1} GB/s, int8 {int8:.0} Gop/s, bf16 {bf16:.0} Gop/s, f32 {f32:.0} Gop/s")
}

fn ceilings_json(c: &Ceilings) -> Value {
    json!({ "read_gb_per_s": c.read, "int8_gop_per_s": c.int8, "bf16_gop_per_s": c.bf16, "f32_gop_per_s": c.f32 })
}
