//! Matrix products of every format beside the ceilings of this machine, measured in the same run.
//!
//! `cargo bench -p lory-kernels [-- FORMAT …]`; `LORY_ISA` and `LORY_THREADS` as usual. Each figure is the fastest of many runs.
//! Before a shape is timed, some of its outputs are compared with the scalar product, bit for bit.

use std::time::Duration;

use lory_kernels::backend::{Backend, MatmulJob};
use lory_kernels::ceilings::{Ceilings, fastest};
use lory_kernels::cpu::{Cpu, Isa, ThreadPool};
use lory_kernels::quant::format::{FORMATS, dot_row, quantize_row};
use lory_kernels::{QMatrix, QuantType};

/// Inputs of each product.
const COLUMNS: usize = 2048;

fn noise(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let quick = std::env::args().any(|a| a == "--quick") || !std::env::args().any(|a| a == "--bench");
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
    let ceilings = Ceilings::measure(&pool, Duration::from_millis(if quick { 1 } else { 400 }));
    let Ceilings { read, int8, bf16, f32 } = ceilings;
    println!(
        "{}; ceilings: {read:.1} GB/s, int8 {int8:.0} Gop/s, bf16 {bf16:.0} Gop/s, f32 {f32:.0} Gop/s",
        cpu.label()
    );
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
                let got = out[row * n + i];
                // BF16 has a bound instead of these bits where the processor multiplies it.
                let same =
                    got.to_bits() == want.to_bits() || ty == QuantType::BF16 && (got - want).abs() < 1.0;
                assert!(same, "{ty}, row {row}, output {i}: {got} for {want}");
            }
            let time = fastest(Duration::from_millis(if quick { 1 } else { 500 }), || work(&mut out));
            let (gb, gop) = (size as f64 / time / 1e9, (2 * rows * n * COLUMNS) as f64 / time / 1e9);
            println!(
                "{:8} {rows:>5} {:>9.0} {gb:>8.2} {gop:>8.0} {:>8.0} {:>6.0}",
                ty.name(),
                time * 1e6,
                100.0 * gb / read,
                100.0 * gop / ceilings.of(ty)
            );
        }
    }
}
