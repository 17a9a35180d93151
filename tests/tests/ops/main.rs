//! Every operation of every backend against the reference.

mod attention;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod inlined;
mod linear;
mod lora;
mod matmul;
mod pointwise;

use std::sync::OnceLock;

use lory_kernels::QuantType;
use lory_kernels::cpu::{Cpu, Isa, Level};
use lory_kernels::quant::format::quantize_row;

/// Deterministic noise (a multiplicative generator, the upper bits of each state).
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, n: usize) -> usize {
        self.bits() as usize % n
    }

    /// In −1 .. 1.
    fn value(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

/// The levels of this machine; one that is missing is printed, and an error if `LORY_REQUIRE_ISA` names it.
fn levels() -> Vec<Isa> {
    static LEVELS: OnceLock<Vec<Isa>> = OnceLock::new();
    LEVELS.get_or_init(find_levels).clone()
}

fn find_levels() -> Vec<Isa> {
    let required = std::env::var("LORY_REQUIRE_ISA").unwrap_or_default();
    let required: Vec<_> = required.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    for name in &required {
        assert!(Level::ALL.iter().any(|l| l.name() == *name), "LORY_REQUIRE_ISA names no level: {name}");
    }
    let at = |level: Level| {
        let isa = Isa::at(level);
        if isa.is_none() {
            println!("skipped: this machine has no {level}");
            assert!(!required.contains(&level.name()), "LORY_REQUIRE_ISA asks for {level}");
        }
        isa
    };
    Level::ALL.into_iter().filter_map(at).collect()
}

/// Equal bits, or both not a number.
fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let same = g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan();
        assert!(same, "{what}: at {i} of {}: got {g:e}, want {w:e}", got.len());
    }
}

fn quantized(ty: QuantType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; ty.bytes_for(values.len()).unwrap()];
    quantize_row(ty, values, &mut bytes).unwrap();
    bytes
}

/// Every level, with one thread and with more.
fn cpus() -> Vec<Cpu> {
    levels().into_iter().flat_map(|isa| [1, 3].map(|n| Cpu::new(Some(n), isa))).collect()
}
