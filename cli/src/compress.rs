//! `lory compress`: a folder of adapters becomes one pack.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use lory_compress::{
    Collection, Error, Goal, LITTLE_LEFT, Method, Options, Progress, Report, Source, Storage,
};
use lory_kernels::QuantType;
use lory_models::adapter::{BaseInfo, publish::folder_of};
use lory_runtime::mapping::{Loading, open_gguf};

use crate::{
    failure::{Failure, Outcome},
    inputs::Inputs,
    interrupt,
    mix::{NONE, NOT_A_NAME},
    output::{make_folder, place_of},
};

/// Compress LoRA adapters of one base into a pack that shares bases between them.
#[derive(Args)]
#[command(after_help = "Examples:
  lory compress -m model.gguf -o styles.gguf adapters/
  lory compress -m model.gguf -o styles.gguf --rank 16 --clusters 25 --report report adapters/
  lory compress -m model.gguf -o styles.gguf --auto --max-bytes 200M adapters/ more/poet.gguf
  lory chat -m model.gguf --pack styles.gguf --adapter poet       talk to one of them

Without --rank, --clusters or --auto: up to 100 adapters get one basis of rank n/2 + 7, more get bases of
rank 16, as few as keep the mean err² of one module in the middle below 0.6.
err² is the squared relative error of a delta, quantisation included.")]
pub struct Compress {
    /// The base model, a GGUF file (of a sharded one, any shard).
    #[arg(short = 'm', long, value_name = "FILE")]
    model: PathBuf,
    /// The pack to write.
    #[arg(short = 'o', long, value_name = "PACK")]
    output: PathBuf,
    /// Columns of every basis.
    #[arg(long, value_name = "R", value_parser = clap::value_parser!(u16).range(1..=4096))]
    rank: Option<u16>,
    /// Number of bases.
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u16).range(1..))]
    clusters: Option<u16>,
    /// Form of the cores: r × r numbers per adapter and module, or r.
    #[arg(long, value_enum, default_value = "full")]
    method: MethodArg,
    /// Choose the rank of each module and the number of bases, for --max-bytes or --max-error.
    #[arg(long, conflicts_with_all = ["rank", "clusters"])]
    auto: bool,
    /// With --auto: most bytes of bases and cores together, such as 200M or 1.5G.
    #[arg(long, value_name = "SIZE", requires = "auto", value_parser = size)]
    max_bytes: Option<u64>,
    /// Adapters with a larger mean err² keep their own factors; with --auto and no --max-bytes it is instead
    /// the mean err² to reach.
    #[arg(long, value_name = "E", value_parser = error_limit)]
    max_error: Option<f64>,
    /// Format of the bases: Q8_0, F16, F32, Q4_0 ….
    #[arg(long, value_name = "TYPE", default_value = "Q8_0", value_parser = storage_type)]
    basis_type: QuantType,
    /// Format of the cores.
    #[arg(long, value_name = "TYPE", default_value = "Q8_0", value_parser = storage_type)]
    core_type: QuantType,
    /// One input side for q, k and v, and one for gate and up: a smaller pack and less to read per token, for a larger
    /// error.
    #[arg(long)]
    share_v: bool,
    /// Write report.json, report.md and plots into this folder.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Seed; the same adapters, options and seed give the same bases.
    #[arg(short = 's', long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Threads [default: all].
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// PEFT folders, GGUF LoRA files, and folders of those.
    #[arg(value_name = "ADAPTER", required = true)]
    adapters: Vec<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum MethodArg {
    Full,
    Diag,
}

/// `200M`, `1.5G`, `4096`: decimal multiples.
fn size(text: &str) -> Result<u64, String> {
    let (number, factor) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1e3),
        Some((at, 'M')) => (&text[..at], 1e6),
        Some((at, 'G')) => (&text[..at], 1e9),
        _ => (text, 1.0),
    };
    match number.parse::<f64>() {
        Ok(n) if n.is_finite() && n > 0.0 && n * factor < 1e18 => Ok((n * factor) as u64),
        _ => Err("a size such as 200M or 1.5G is expected".into()),
    }
}

/// An err² that is not to be exceeded.
pub fn error_limit(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(e) if e > 0.0 && e.is_finite() => Ok(e),
        _ => Err("a number above 0 is expected".into()),
    }
}

/// A format that packs can be written in.
pub fn storage_type(text: &str) -> Result<QuantType, String> {
    const KNOWN: [QuantType; 5] =
        [QuantType::F32, QuantType::F16, QuantType::Q8_0, QuantType::Q5_0, QuantType::Q4_0];
    let found = QuantType::from_name(text).filter(|t| KNOWN.contains(t));
    found.ok_or_else(|| format!("known: {}", KNOWN.map(QuantType::name).join(" ")))
}

impl Compress {
    fn options(&self) -> Options {
        let (auto, max_error) = match (self.auto, self.max_bytes, self.max_error) {
            (false, _, limit) => (None, limit),
            (true, Some(bytes), limit) => (Some(Goal::Bytes(bytes)), limit),
            (true, None, goal) => (goal.map(Goal::Error), None),
        };
        Options {
            rank: self.rank.map(usize::from),
            clusters: self.clusters.map(usize::from),
            method: match self.method {
                MethodArg::Full => Method::Full,
                MethodArg::Diag => Method::Diag,
            },
            auto,
            max_error,
            share_v: self.share_v,
            storage: Storage { basis: self.basis_type, core: self.core_type },
            seed: self.seed,
        }
    }

    pub fn run(self) -> Outcome {
        if self.auto && self.max_bytes.is_none() && self.max_error.is_none() {
            return Err(Failure::usage("--auto needs a goal: --max-bytes SIZE or --max-error E"));
        }
        let options = self.options();
        options.check().map_err(failure)?;
        let sources = Source::find(&self.adapters).map_err(failure)?;
        let inputs = Inputs::default().model(&self.model);
        sources.iter().fold(inputs, |inputs, s| inputs.adapter(&s.path)).refuse("-o", &self.output)?;
        place_of(&self.output)?;
        // What cannot be written is known before the long work.
        self.report.as_deref().map_or(Ok(()), make_folder)?;
        let threads = usize::from(self.threads.unwrap_or(0));
        let report = in_pool(threads, |bar, cancel| {
            let collection = open_collection(&self.model, &sources, &self.output, bar, cancel)?;
            lory_compress::compress(&collection, &options, &self.output, bar, cancel)
        })?;
        summary(&report, &self.output);
        match &self.report {
            Some(folder) => report.write(folder).map_err(failure),
            None => Ok(()),
        }
    }
}

fn summary(r: &Report, output: &Path) {
    let saved = 100.0 * (1.0 - r.bytes_after as f64 / r.bytes_before.max(1) as f64);
    eprintln!(
        "{}: {} adapters, {} bases, {:.2} MB ({saved:.1} % saved), err² mean {:.4} p95 {:.4} worst {:.4}",
        output.display(),
        r.adapters,
        r.clusters,
        r.bytes_after as f64 / 1e6,
        r.err2.mean,
        r.err2.p95,
        r.err2.worst
    );
    if r.own + r.left_out > 0 {
        eprintln!(
            "of {} pairs of adapter and module, {} have factors of their own and {} were left out",
            r.by_adapter.iter().flat_map(|a| &a.module_err2).filter(|e| **e >= 0.0).count(),
            r.own,
            r.left_out
        );
    }
    if r.err2.mean > LITTLE_LEFT {
        eprintln!("little is left of the adapters: allow more bytes (--max-bytes, or --rank and --clusters)");
    }
    eprintln!(
        "per-adapter SVD in the same bytes: err² {:.4}; own factors: {}; {:.1} s{}",
        r.svd_err2_at_equal_bytes,
        r.private,
        r.seconds.total(),
        r.peak_memory.map_or(String::new(), |b| format!(", peak memory {:.0} MB", b as f64 / 1e6))
    );
}

/// The adapters that were found, on the base at `model`, checked; what must be buffered goes beside `output`.
pub fn open_collection(
    model: &Path,
    sources: &[Source],
    output: &Path,
    bar: &Bar,
    cancel: &AtomicBool,
) -> lory_compress::Result<Collection> {
    if let Some(source) = sources.iter().find(|s| s.name == NONE) {
        return Err(Error::Request(format!("{}: {NOT_A_NAME}", source.path.display())));
    }
    let runtime = |e: lory_runtime::Error| Error::Request(e.to_string());
    let open = open_gguf(model, Loading::Map).map_err(runtime)?;
    let base = BaseInfo::from_gguf(&open.gguf)?;
    Collection::open(base, Some(&open.gguf), sources, folder_of(output), bar, cancel)
}

/// Runs long work on `threads` threads (0: all) with a progress bar; Ctrl+C stops it cleanly.
pub fn in_pool<T: Send>(
    threads: usize,
    work: impl FnOnce(&Bar, &AtomicBool) -> lory_compress::Result<T> + Send,
) -> Outcome<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|e| Failure::runtime(format!("no threads: {e}")))?;
    let cancel = Arc::new(AtomicBool::new(false));
    let stop = cancel.clone();
    let guard = interrupt::catch(move || stop.store(true, Ordering::Relaxed));
    let bar = Bar::new();
    let result = pool.install(|| work(&bar, &cancel));
    bar.0.finish_and_clear();
    drop(guard);
    result.map_err(failure)
}

/// An error of the compressing crate as the program's.
pub fn failure(e: Error) -> Failure {
    match e {
        Error::Interrupted => Failure::Interrupted,
        other => Failure::runtime(other.to_string()),
    }
}

/// A bar on standard error with the time left; nothing where that is no terminal.
pub struct Bar(ProgressBar);

impl Bar {
    fn new() -> Bar {
        let bar = ProgressBar::new(0);
        if let Ok(style) =
            ProgressStyle::with_template("{msg:34} {bar:30} {pos}/{len} {elapsed} ({eta} left)")
        {
            bar.set_style(style);
        }
        Bar(bar)
    }
}

impl Progress for Bar {
    fn stage(&self, name: &str, steps: usize) {
        self.0.reset();
        self.0.set_length(steps as u64);
        self.0.set_message(name.to_owned());
        // Only now is there something to show.
        self.0.enable_steady_tick(Duration::from_millis(500));
    }

    fn step(&self) {
        self.0.inc(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_to_reach_is_no_limit_for_each_adapter() {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            compress: Compress,
        }
        let options = |more: &str| {
            let line = format!("compress -m m.gguf -o p.gguf adapters --max-error 0.3 {more}");
            <Line as clap::Parser>::try_parse_from(line.split_whitespace()).expect("sound").compress.options()
        };
        assert!(matches!(options("--auto").auto, Some(Goal::Error(0.3))));
        assert_eq!(options("--auto").max_error, None);
        assert!(matches!(options("--auto --max-bytes 1M").auto, Some(Goal::Bytes(1_000_000))));
        assert_eq!(options("--auto --max-bytes 1M").max_error, Some(0.3));
        assert_eq!(options("").max_error, Some(0.3));
    }

    #[test]
    fn sizes_are_decimal() {
        assert_eq!(size("200M"), Ok(200_000_000));
        assert_eq!(size("1.5G"), Ok(1_500_000_000));
        assert_eq!(size("4096"), Ok(4096));
        for bad in ["", "M", "-1", "1T", "nan", "1e30"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        assert!(storage_type("q8_0").is_ok() && storage_type("IQ1_S").is_err());
    }
}
