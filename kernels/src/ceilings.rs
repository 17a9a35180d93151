//! The most that this machine can do, measured: what every speed is held against.
//!
//! Loops that do nothing but the one instruction that a kernel lives on, with enough independent chains to hide its latency.
//! A ceiling belongs to a run: on a shared machine it moves, and so does what is measured beside it.

use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::QuantType;
use crate::cpu::ThreadPool;
#[cfg(target_arch = "x86_64")]
use crate::cpu::amx;
use crate::host::huge_pages;

/// What all threads of a pool reach together; 0 where the machine lacks the instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Ceilings {
    /// Reading memory beyond the caches for some milliseconds, GB/s.
    pub read: f64,
    /// int8 products and their sums, Gop/s; a product and a sum are two operations. In int32 where there is `vpdpbusd` (512 bits, else 256), in int16
    /// with AVX2 alone (`vpmaddubsw` and `vpaddw`).
    pub int8: f64,
    /// bf16 products summed in f32 (`tdpbf16ps` where there are tiles, else `vdpbf16ps` of 512 bits), Gop/s.
    pub bf16: f64,
    /// Fused multiplications and additions of f32 (512 bits, else 256), Gop/s.
    pub f32: f64,
}

impl Ceilings {
    /// Measures all of them, each for about `budget`.
    pub fn measure(pool: &ThreadPool, budget: Duration) -> Ceilings {
        let read = read_bandwidth(pool, budget);
        Ceilings { read, ..compute(pool, budget) }
    }

    /// Gop/s of the arithmetic that products with weights of this format run on.
    pub fn of(&self, ty: QuantType) -> f64 {
        match ty {
            QuantType::BF16 if self.bf16 > 0.0 => self.bf16,
            // Without the instruction BF16 is widened.
            QuantType::F32 | QuantType::F16 | QuantType::BF16 => self.f32,
            _ => self.int8,
        }
    }
}

/// Seconds of the fastest of many runs. On a shared machine the others measure who else was there.
pub fn fastest(budget: Duration, mut work: impl FnMut()) -> f64 {
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

/// One pass over more than the caches hold, in pages of 2 MiB as weights are mapped. Short passes will not do: on a shared machine
/// the fastest of many reaches up to twice what memory keeps up for the milliseconds of a token.
fn read_bandwidth(pool: &ThreadPool, budget: Duration) -> f64 {
    const WORDS: usize = 32 << 20;
    let mut data: Vec<u64> = Vec::with_capacity(WORDS);
    huge_pages(data.as_mut_ptr().cast(), WORDS * size_of::<u64>());
    data.resize(WORDS, 1);
    let parts = 16 * pool.threads();
    let each = WORDS / parts;
    let time = fastest(budget, || {
        pool.run(parts, &|part| {
            let sums = data[part * each..][..each].chunks_exact(64).fold([0u64; 64], |mut sums, chunk| {
                sums.iter_mut().zip(chunk).for_each(|(s, v)| *s ^= v);
                sums
            });
            black_box(sums);
        });
    });
    (parts * each * size_of::<u64>()) as f64 / time / 1e9
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    /// Rounds of [`CHAINS`] independent instructions.
    pub const STEPS: usize = 20_000;
    /// Accumulators: with a latency of 4 to 6 cycles and two units, a dozen would do.
    pub const CHAINS: usize = 24;

    /// [`CHAINS`] without 32 registers, in two turns.
    const FEW: usize = CHAINS / 2;

    #[target_feature(enable = "avx2")]
    pub fn int8_pairs() {
        let mut acc = [_mm256_setzero_si256(); FEW];
        let (a, b) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi8(-5)));
        for _ in 0..2 * STEPS {
            for acc in &mut acc {
                // The sum is the next factor, so that no product can be known beforehand.
                *acc = _mm256_add_epi16(a, _mm256_maddubs_epi16(*acc, b));
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx2,avxvnni")]
    pub fn int8_narrow() {
        let mut acc = [_mm256_setzero_si256(); FEW];
        let (a, b) = (black_box(_mm256_set1_epi8(3)), black_box(_mm256_set1_epi8(-5)));
        for _ in 0..2 * STEPS {
            for acc in &mut acc {
                *acc = _mm256_dpbusd_avx_epi32(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx2,fma")]
    pub fn f32_narrow() {
        let mut acc = [_mm256_setzero_ps(); FEW];
        let (a, b) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(1.5)));
        for _ in 0..2 * STEPS {
            for acc in &mut acc {
                *acc = _mm256_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn int8() {
        let mut acc = [_mm512_setzero_si512(); CHAINS];
        let (a, b) = (black_box(_mm512_set1_epi8(3)), black_box(_mm512_set1_epi8(-5)));
        for _ in 0..STEPS {
            for acc in &mut acc {
                *acc = _mm512_dpbusd_epi32(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub fn bf16() {
        let mut acc = [_mm512_setzero_ps(); CHAINS];
        let a = black_box(_mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.5)));
        let b = black_box(_mm512_cvtne2ps_pbh(_mm512_set1_ps(1.5), _mm512_set1_ps(1.5)));
        for _ in 0..STEPS {
            for acc in &mut acc {
                *acc = _mm512_dpbf16_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }

    #[target_feature(enable = "avx512f")]
    pub fn f32() {
        let mut acc = [_mm512_setzero_ps(); CHAINS];
        let (a, b) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(1.5)));
        for _ in 0..STEPS {
            for acc in &mut acc {
                *acc = _mm512_fmadd_ps(*acc, a, b);
            }
        }
        black_box(acc);
    }
}

#[cfg(target_arch = "x86_64")]
fn compute(pool: &ThreadPool, budget: Duration) -> Ceilings {
    use std::arch::is_x86_feature_detected as has;
    let n = pool.threads();
    let rate = |lanes: usize, work: &(dyn Fn() + Sync)| {
        let time = fastest(budget, || pool.run(n, &|_| work()));
        (n * x86::STEPS * x86::CHAINS * lanes * 2) as f64 / time / 1e9
    };
    let mut ceilings = Ceilings::default();
    if has!("avx512f") {
        // SAFETY: the feature was detected.
        ceilings.f32 = rate(16, &|| unsafe { x86::f32() });
    } else if has!("avx2") && has!("fma") {
        // SAFETY: the features were detected.
        ceilings.f32 = rate(8, &|| unsafe { x86::f32_narrow() });
    }
    if has!("avx512f") && has!("avx512vnni") {
        // SAFETY: the features were detected.
        ceilings.int8 = rate(64, &|| unsafe { x86::int8() });
    } else if has!("avx2") && has!("avxvnni") {
        // SAFETY: the features were detected.
        ceilings.int8 = rate(32, &|| unsafe { x86::int8_narrow() });
    } else if has!("avx2") {
        // SAFETY: the feature was detected.
        ceilings.int8 = rate(32, &|| unsafe { x86::int8_pairs() });
    }
    if has!("avx512f") {
        if has!("avx512bf16") {
            // SAFETY: the features were detected.
            ceilings.bf16 = rate(32, &|| unsafe { x86::bf16() });
        }
        if amx::multiply_only(0) {
            let time = fastest(budget, || pool.run(n, &|_| assert!(amx::multiply_only(x86::STEPS))));
            ceilings.bf16 = (n * x86::STEPS * amx::PRODUCTS * 16 * 32 * 16 * 2) as f64 / time / 1e9;
        }
    }
    ceilings
}

#[cfg(not(target_arch = "x86_64"))]
fn compute(_: &ThreadPool, _: Duration) -> Ceilings {
    Ceilings::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_are_there_where_the_instructions_are() {
        let c = Ceilings::measure(&ThreadPool::new(1), Duration::ZERO);
        assert!(c.read > 0.0);
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            assert_eq!(c.f32 > 0.0, has!("avx512f") || has!("avx2") && has!("fma"));
            assert_eq!(c.int8 > 0.0, has!("avx512f") && has!("avx512vnni") || has!("avx2"));
            assert_eq!(c.bf16 > 0.0, has!("avx512f") && has!("avx512bf16"));
        }
        assert_eq!(c.of(QuantType::Q4_K), c.int8);
        let c = Ceilings { bf16: 2.0, f32: 1.0, ..c };
        assert_eq!((c.of(QuantType::BF16), c.of(QuantType::F16)), (2.0, 1.0));
        assert_eq!(Ceilings { bf16: 0.0, ..c }.of(QuantType::BF16), 1.0);
    }
}
