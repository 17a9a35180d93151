//! The table of `compress/README.md`: synthetic collections of both kinds, compressed in several ways.
//!
//! `cargo run --release -p lory-compress --example table [-- N …]` with the numbers of adapters, by default 64 and 256.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use lory_compress::{Collection, Goal, Kind, Method, Options, Report, Silent, Source, Synthetic, compress};
use lory_models::adapter::synthetic_base;

static GO_ON: AtomicBool = AtomicBool::new(false);

/// LoRA rank of every adapter.
const RANK: usize = 16;

fn row(kind: Kind, what: &str, r: &Report) {
    let ranks: Vec<usize> = r.modules.iter().map(|m| m.rank).collect();
    let (low, high) = (ranks.iter().min().unwrap_or(&0), ranks.iter().max().unwrap_or(&0));
    let ranks = if low == high { low.to_string() } else { format!("{low}–{high}") };
    let own = match (r.own, r.left_out) {
        (0, 0) => "–".to_owned(),
        (own, 0) => own.to_string(),
        (own, left_out) => format!("{own}, {left_out} left out"),
    };
    println!(
        "| {} | {} | {RANK} | {what} | {ranks} | {} | {own} | {:.3} | {:.3} | {:.1} | {:.2} | {:.1} | {:.3} | {:.3} |",
        match kind {
            Kind::Shared => "shared A",
            Kind::Independent => "independent A",
        },
        r.adapters,
        r.clusters,
        r.err2.mean,
        r.err2.p95,
        r.bytes_before as f64 / 1e6,
        r.bytes_after as f64 / 1e6,
        r.seconds.plan + r.seconds.compress + r.seconds.write,
        r.svd_err2_at_equal_bytes,
        r.stored_svd_err2_at_equal_bytes,
    );
}

fn run(collection: &Collection, folder: &Path, options: Options) -> Report {
    let path = folder.join("pack.gguf");
    let report = compress(collection, &options, &path, &Silent, &GO_ON);
    report.unwrap_or_else(|e| panic!("{e}"))
}

fn rows(kind: Kind, n: usize) {
    // One layer of a small model: the seven projections, grouped-query attention.
    let base = synthetic_base(1, 1024, 256, 2816, 1000);
    let dir = tempfile::tempdir().expect("a folder");
    let adapters = dir.path().join("adapters");
    Synthetic::new(n, RANK, kind, 1).write(&base, &adapters, &Silent, &GO_ON).expect("adapters");
    let sources = Source::find(&[adapters]).expect("adapters");
    let collection = Collection::open(base, None, &sources, dir.path(), &Silent, &GO_ON);
    let collection = collection.expect("a collection");
    for (rank, clusters) in [(16, 1), (64, 1), (16, n / 16), (32, n / 32), (32, n / 16)] {
        let options = Options { rank: Some(rank), clusters: Some(clusters), ..Options::default() };
        let uniform = run(&collection, dir.path(), options.clone());
        row(kind, "full", &uniform);
        if clusters == n / 16 {
            let goal = Goal::Bytes(uniform.basis_bytes + uniform.core_bytes);
            let auto = run(&collection, dir.path(), Options { auto: Some(goal), ..Options::default() });
            row(kind, "full, --auto in the same bytes", &auto);
        }
        if rank == 32 && clusters == n / 16 {
            let shared = run(&collection, dir.path(), Options { share_v: true, ..options });
            row(kind, "full, --share-v", &shared);
        }
    }
    for clusters in [1, n / 16] {
        let (rank, clusters, method) = (Some(64), Some(clusters), Method::Diag);
        row(
            kind,
            "diag",
            &run(&collection, dir.path(), Options { rank, clusters, method, ..Options::default() }),
        );
    }
}

fn main() {
    let given: Vec<usize> =
        std::env::args().skip(1).map(|a| a.parse().expect("a number of adapters")).collect();
    println!(
        "| kind | n | LoRA rank | method | basis rank | clusters | own factors | err² mean | p95 | MB before | pack MB | \
         seconds | SVD, equal bytes | SVD as stored |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    for n in if given.is_empty() { vec![64, 256] } else { given } {
        for kind in [Kind::Independent, Kind::Shared] {
            rows(kind, n);
        }
    }
}
