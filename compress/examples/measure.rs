//! Time and memory of a large collection: `measure LAYERS N [EMBD KV FF RANK BASIS_RANK CLUSTERS]`.
//!
//! Writes synthetic adapters into a temporary folder beside the current one, compresses them as
//! `lory compress` does, and prints seconds and peak memory.

use std::sync::atomic::AtomicBool;
use std::time::Instant;

use lory_compress::{Collection, Kind, Options, Progress, Source, Synthetic, compress, peak_memory};
use lory_models::adapter::synthetic_base;

static GO_ON: AtomicBool = AtomicBool::new(false);

struct Stages(Instant);

/// Processor time of this process in seconds, where the system tells: what a shared machine leaves comparable.
fn processor() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    // utime and stime, in hundredths of a second.
    fields.skip(11).take(2).filter_map(|f| f.parse::<f64>().ok()).sum::<f64>() / 100.0
}

impl Progress for Stages {
    fn stage(&self, name: &str, steps: usize) {
        let memory = peak_memory().unwrap_or(0) / 1_000_000;
        let wall = self.0.elapsed().as_secs_f64();
        println!("{wall:8.1} s  {:8.1} s CPU  {memory:6} MB  {name} ({steps})", processor());
    }
    fn step(&self) {}
}

fn main() {
    let given: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().expect("a number")).collect();
    let at = |i: usize, default: usize| given.get(i).copied().unwrap_or(default);
    let (layers, n) = (at(0, 1), at(1, 1000));
    let base = synthetic_base(layers, at(2, 2048), at(3, 512), at(4, 8192), 1000);
    let dir = tempfile::tempdir_in(".").expect("a folder");
    let adapters = dir.path().join("adapters");
    let stages = Stages(Instant::now());
    let synthetic = Synthetic::new(n, at(5, 16), Kind::Independent, 1);
    synthetic.write(&base, &adapters, &stages, &GO_ON).expect("adapters");
    let start = Instant::now();
    let sources = Source::find(&[adapters]).expect("adapters");
    let collection =
        Collection::open(base, None, &sources, dir.path(), &stages, &GO_ON).expect("a collection");
    let options = Options { rank: Some(at(6, 16)), clusters: Some(at(7, 25)), ..Options::default() };
    let report = compress(&collection, &options, &dir.path().join("pack.gguf"), &stages, &GO_ON);
    let report = report.unwrap_or_else(|e| panic!("{e}"));
    println!("{:?}, {:.1} s CPU in all", report.seconds, processor());
    println!("err² {:?}, clusters {:?}", report.err2, report.cluster_sizes);
    println!(
        "{:.1} s for {:.2} GB of adapters, pack {:.1} MB, peak memory {} MB",
        start.elapsed().as_secs_f64(),
        report.bytes_before as f64 / 1e9,
        report.bytes_after as f64 / 1e6,
        peak_memory().unwrap_or(0) / 1_000_000
    );
}
