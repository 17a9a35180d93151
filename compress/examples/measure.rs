//! Times one module's joint compression at full size: `measure D_OUT D_IN N RANK CLUSTERS`.
use std::time::Instant;

use lory_compress::{Factors, FullOptions, Rng, Stack, jd_full};
use rayon::prelude::*;

fn random(rows: usize, cols: usize, rng: &mut Rng) -> faer::Mat<f32> {
    faer::Mat::from_fn(rows, cols, |_, _| rng.normal())
}

fn main() {
    let args: Vec<usize> = std::env::args().skip(1).map(|a| a.parse().expect("a number")).collect();
    let &[d_out, d_in, n, rank, clusters] = args.as_slice() else {
        eprintln!("usage: measure D_OUT D_IN N RANK CLUSTERS");
        std::process::exit(2);
    };
    let t = Instant::now();
    let items: Vec<(usize, Factors)> = (0..n)
        .into_par_iter()
        .map(|i| {
            let rng = &mut Rng::stream(1, i as u64);
            (i, Factors { b: random(d_out, rank, rng), a: random(rank, d_in, rng) })
        })
        .collect();
    println!("make {:.2?}", t.elapsed());
    let t = Instant::now();
    let stack = Stack::new(d_out, d_in, &items);
    drop(items);
    println!("stack {:.2?}", t.elapsed());
    let t = Instant::now();
    let full = jd_full(&stack, FullOptions { sweeps: 3, ..FullOptions::new(16, 1) });
    println!("one basis, {} sweeps: {:.2?}", full.objective.len() - 1, t.elapsed());
    let t = Instant::now();
    let sweeps: Vec<usize> = (0..clusters)
        .into_par_iter()
        .map(|c| {
            let positions: Vec<usize> = (c..n).step_by(clusters).collect();
            jd_full(&stack.select(&positions), FullOptions::new(16, 1)).objective.len() - 1
        })
        .collect();
    println!("{clusters} bases, sweeps {sweeps:?}: {:.2?}", t.elapsed());
    let t = Instant::now();
    let spectra = stack.spectra();
    println!("spectra of {}: {:.2?}", spectra.len(), t.elapsed());
}
