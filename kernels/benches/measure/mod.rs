//! Criterion's times beside the ceilings of this machine, measured in the same run.

// Every benchmark is a program of its own, and none uses all of this.
#![allow(dead_code)]

pub mod weights;

use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use lory_kernels::backend::Backend;
use lory_kernels::ceilings::Ceilings;
use lory_kernels::cpu::{Cpu, Isa, ThreadPool};

/// The processor, as `LORY_ISA` and `LORY_THREADS` want it.
pub struct Machine {
    pub cpu: Cpu,
    /// `None`: only results are checked.
    ceilings: Option<Ceilings>,
}

/// What one run of a kernel does.
pub struct Work {
    /// Read from memory.
    pub bytes: usize,
    /// Multiplications and additions.
    pub ops: usize,
    /// Which of the [`Ceilings`] bounds them.
    pub peak: fn(&Ceilings) -> f64,
}

impl Machine {
    pub fn new() -> Machine {
        let isa = Isa::from_env().unwrap_or_else(|error| panic!("{error}"));
        let cpu = Cpu::new(std::env::var("LORY_THREADS").ok().and_then(|n| n.parse().ok()), isa);
        // Cargo says so when it measures.
        let measured = std::env::args().any(|a| a == "--bench") && !std::env::args().any(|a| a == "--test");
        let ceilings =
            measured.then(|| Ceilings::measure(&ThreadPool::new(cpu.threads()), Duration::from_millis(400)));
        println!("{}", cpu.label());
        if let Some(Ceilings { read, int8, bf16, f32 }) = ceilings {
            println!(
                "ceilings: {read:.1} GB/s, int8 {int8:.0} Gop/s, bf16 {bf16:.0} Gop/s, f32 {f32:.0} Gop/s"
            );
        }
        Machine { cpu, ceilings }
    }

    /// Whether only results are checked, for which small shapes do.
    pub fn is_quick(&self) -> bool {
        self.ceilings.is_none()
    }

    /// Times `run`, and prints the fastest run's shares of the ceilings: on a shared machine the others measure who else was there.
    /// Gives its seconds, unless it was filtered out or nothing is measured.
    pub fn time(
        &self,
        group: &mut BenchmarkGroup<'_, WallTime>,
        name: &str,
        work: Work,
        mut run: impl FnMut(),
    ) -> Option<f64> {
        let (bytes, ops) = (work.bytes as u64, work.ops as u64);
        group.throughput(Throughput::ElementsAndBytes { elements: ops, bytes });
        let mut best = Duration::MAX;
        group.bench_function(name, |b| {
            b.iter_custom(|n| {
                let mut total = Duration::ZERO;
                for _ in 0..n {
                    let start = Instant::now();
                    run();
                    let time = start.elapsed();
                    best = best.min(time);
                    total += time;
                }
                total
            })
        });
        let ceilings = self.ceilings.filter(|_| best != Duration::MAX)?;
        let seconds = best.as_secs_f64().max(1e-9);
        let (gb, gop) = (bytes as f64 / seconds / 1e9, ops as f64 / seconds / 1e9);
        let share = |part: f64, whole: f64| match whole > 0.0 {
            true => format!("{:.0} %", 100.0 * part / whole),
            false => "-".into(),
        };
        println!(
            "{:24}fastest: {gb:.2} GB/s, {} of reading; {gop:.1} Gop/s, {} of the arithmetic",
            "",
            share(gb, ceilings.read),
            share(gop, (work.peak)(&ceilings)),
        );
        Some(seconds)
    }
}

/// Short runs: there are many benchmarks.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(700))
        .configure_from_args()
}

pub fn noise(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}
