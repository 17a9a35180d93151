//! Matrix products of every format beside the ceilings of this machine, measured in the same run.
//!
//! `cargo bench -p lory-kernels [-- FORMAT …]`; `LORY_ISA` and `LORY_THREADS` as usual. Each figure is the fastest of many runs.
//! Before a shape is timed, some of its outputs are compared with the scalar product, bit for bit.

use std::hint::black_box;
use std::time::{Duration, Instant};

use lory_kernels::backend::{Backend, MatmulJob};
use lory_kernels::cpu::{Cpu, Isa, ThreadPool};
use lory_kernels::quant::format::{FORMATS, dot_row, quantize_row};
use lory_kernels::{QMatrix, QuantType};

/// Inputs of each product.
const COLUMNS: usize = 2048;

/// Seconds of the fastest of many short runs. On a shared machine the others measure who else was there; ceilings are taken
/// the same way.
fn fastest(budget: Duration, mut work: impl FnMut()) -> f64 {
    work();
    let (start, mut best, mut samples) = (Instant::now(), f64::INFINITY, 0);
    while samples < 5 || start.elapsed() < budget {
        let before = Instant::now();
        work();
        best = best.min(before.elapsed().as_secs_f64());
        samples += 1;
    }
    best
}

/// GB/s of reading memory with all threads, in turns through more than the caches hold.
fn read_bandwidth(pool: &ThreadPool) -> f64 {
    let data = vec![1u64; 32 << 20];
    let (parts, turns) = (4 * pool.threads(), 32);
    let each = data.len() / turns / parts;
    let mut turn = 0;
    let time = fastest(Duration::from_millis(400), || {
        turn += 1;
        pool.run(parts, &|part| {
            let part = &data[(turn % turns * parts + part) * each..][..each];
            let sums = part.chunks_exact(64).fold([0u64; 64], |mut sums, chunk| {
                sums.iter_mut().zip(chunk).for_each(|(s, v)| *s ^= v);
                sums
            });
            black_box(sums);
        });
    });
    (parts * each * 8) as f64 / time / 1e9
}

#[cfg(target_arch = "x86_64")]
mod ceilings {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    pub const STEPS: usize = 20_000;

    /// Operations (multiplications and additions) of one call.
    pub const DOT_OPS: usize = STEPS * 24 * 64 * 2;
    pub const FMA_OPS: usize = STEPS * 24 * 16 * 2;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn dot() {
        let mut acc = [_mm512_setzero_si512(); 24];
        let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(-5)));
        for _ in 0..STEPS {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f")]
    pub fn fma() {
        let mut acc = [_mm512_setzero_ps(); 24];
        let (a, b) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(1.5)));
        for _ in 0..STEPS {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }
}

/// (int8, f32) Gop/s of all threads; 0 where there is no AVX-512.
#[cfg(target_arch = "x86_64")]
fn compute_ceilings(pool: &ThreadPool) -> (f64, f64) {
    if !(std::arch::is_x86_feature_detected!("avx512f") && std::arch::is_x86_feature_detected!("avx512vnni"))
    {
        return (0.0, 0.0);
    }
    let n = pool.threads();
    let budget = Duration::from_millis(400);
    // SAFETY: the features were detected.
    let dot = fastest(budget, || pool.run(n, &|_| unsafe { ceilings::dot() }));
    // SAFETY: as above.
    let fma = fastest(budget, || pool.run(n, &|_| unsafe { ceilings::fma() }));
    ((n * ceilings::DOT_OPS) as f64 / dot / 1e9, (n * ceilings::FMA_OPS) as f64 / fma / 1e9)
}

#[cfg(not(target_arch = "x86_64"))]
fn compute_ceilings(_: &ThreadPool) -> (f64, f64) {
    (0.0, 0.0)
}

fn noise(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let quick = std::env::args().any(|a| a == "--quick" || a == "--test");
    let isa = match Isa::from_env() {
        Ok(isa) => isa,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    };
    let threads = std::env::var("LORY_THREADS").ok().and_then(|n| n.parse().ok());
    let cpu = Cpu::new(threads, isa);
    let pool = ThreadPool::new(cpu.threads());
    let cached = std::env::var("CACHED").is_ok();
    let (dot, fma) = compute_ceilings(&pool);
    let read = read_bandwidth(&pool);
    println!("{}; ceilings: {read:.1} GB/s, int8 {dot:.0} Gop/s, f32 {fma:.0} Gop/s", cpu.label());
    println!(
        "{:8} {:>5} {:>9} {:>8} {:>8} {:>8} {:>6}",
        "format", "rows", "us", "GB/s", "Gop/s", "% read", "% ops"
    );
    let sizes: &[(usize, usize)] = if cached {
        &[(1, 256), (2, 256), (4, 256), (8, 256)]
    } else if quick {
        &[(1, 64), (8, 64)]
    } else {
        &[(1, 8192), (2, 8192), (4, 8192), (8, 8192), (32, 2048), (128, 512), (512, 128)]
    };
    for format in FORMATS {
        let ty = format.ty;
        if !wanted.is_empty() && !wanted.iter().any(|w| QuantType::from_name(w) == Some(ty)) {
            continue;
        }
        let line = noise(COLUMNS * 64);
        let mut bytes = vec![0; ty.bytes_for(line.len()).unwrap_or(0)];
        quantize_row(ty, &line, &mut bytes).expect("a native format");
        for (rows, n) in sizes {
            // Weights in turns, so that none is still cached from its last use.
            let turns = if quick || std::env::var("CACHED").is_ok() {
                1
            } else {
                (128 << 20) / (bytes.len() * n / 64)
            };
            let weights = bytes.repeat(turns * n / 64);
            let size = weights.len() / turns;
            let x = noise(rows * COLUMNS);
            let mut out = vec![0.0; rows * n];
            let mut turn = 0;
            let mut work = |out: &mut Vec<f32>| {
                turn += 1;
                let weight = QMatrix::new(ty, *n, COLUMNS, &weights[turn % turns * size..][..size])
                    .expect("whole rows");
                cpu.matmul(&x, *rows, &mut [MatmulJob { weight, out }]).expect("a native format");
            };
            work(&mut out);
            for (row, i) in [(0, 0), (rows - 1, 17), (rows / 2, n - 1)] {
                let weight = QMatrix::new(ty, *n, COLUMNS, &weights[..size]).expect("whole rows").row(i);
                let want = dot_row(ty, weight, &x[row * COLUMNS..][..COLUMNS]).expect("a native format");
                assert_eq!(out[row * n + i].to_bits(), want.to_bits(), "{ty}, row {row}, output {i}");
            }
            let time = fastest(Duration::from_millis(if quick { 1 } else { 500 }), || work(&mut out));
            let (gb, gop) = (size as f64 / time / 1e9, (2 * rows * n * COLUMNS) as f64 / time / 1e9);
            let ceiling = if ty.block_len() == 1 { fma } else { dot };
            println!(
                "{:8} {rows:>5} {:>9.0} {gb:>8.2} {gop:>8.0} {:>8.0} {:>6.0}",
                ty.name(),
                time * 1e6,
                100.0 * gb / read,
                100.0 * gop / ceiling
            );
        }
    }
}
