//! Matrix products of every format beside the ceilings of this machine.
//!
//! `cargo bench -p lory-kernels --bench kernels [-- FILTER]`, a filter is `Q4_0/` or `/512`; `LORY_ISA` and `LORY_THREADS` as usual.
//! Before a shape is timed, 32 of its outputs are compared with the scalar product, bit for bit.

mod measure;

use lory_kernels::backend::{Backend, MatmulJob};
use lory_kernels::quant::format::{FORMATS, dot_row, quantize_row};
use lory_kernels::{QMatrix, QuantType};

use measure::{Machine, Work, noise};

/// Inputs of each product.
const COLUMNS: usize = 2048;

/// Weight rows in more than the caches hold, in turns, so that none is still cached from its last use.
struct Weights {
    ty: QuantType,
    rows: usize,
    bytes: Vec<u8>,
    turns: usize,
}

impl Weights {
    fn new(ty: QuantType, rows: usize, turns_of: usize) -> Weights {
        let line = noise(COLUMNS * 64);
        let mut some = vec![0; ty.bytes_for(line.len()).expect("whole blocks")];
        quantize_row(ty, &line, &mut some).expect("a native format");
        let turns = (turns_of / (some.len() * rows / 64)).max(1);
        Weights { ty, rows, bytes: some.repeat(turns * rows / 64), turns }
    }

    fn size(&self) -> usize {
        self.bytes.len() / self.turns
    }

    fn matrix(&self, turn: usize) -> QMatrix<'_> {
        let bytes = &self.bytes[turn % self.turns * self.size()..][..self.size()];
        QMatrix::new(self.ty, self.rows, COLUMNS, bytes).expect("whole rows")
    }
}

fn main() {
    let machine = Machine::new();
    let mut criterion = measure::criterion();
    // Activation rows, weight rows.
    let sizes: &[(usize, usize)] = match machine.is_quick() {
        true => &[(1, 64), (8, 64), (33, 128), (100, 512)],
        false => &[(1, 8192), (2, 8192), (4, 8192), (8, 8192), (32, 8192), (128, 8192), (512, 8192)],
    };
    for format in FORMATS {
        let ty = format.ty;
        let mut group = criterion.benchmark_group(ty.name());
        for (rows, n) in sizes {
            let weights = Weights::new(ty, *n, if machine.is_quick() { 0 } else { 128 << 20 });
            let x = noise(rows * COLUMNS);
            let mut out = vec![0.0; rows * n];
            let product = |turn: usize, out: &mut Vec<f32>| {
                let mut job = [MatmulJob { weight: weights.matrix(turn), out }];
                machine.cpu.matmul(&x, *rows, &mut job).expect("a native format");
            };
            product(0, &mut out);
            for (row, i) in (0..32).map(|k| (k * (rows - 1) / 31, k * (n - 1) / 31)) {
                let (weight, x) = (weights.matrix(0), &x[row * COLUMNS..][..COLUMNS]);
                let want = dot_row(ty, weight.row(i), x).expect("a native format");
                let got = out[row * n + i];
                // BF16 has a bound instead of these bits where the processor multiplies it.
                let same =
                    got.to_bits() == want.to_bits() || ty == QuantType::BF16 && (got - want).abs() < 1.0;
                assert!(same, "{ty}, row {row}, output {i}: {got} for {want}");
            }
            let work = Work {
                bytes: weights.size(),
                ops: 2 * rows * n * COLUMNS,
                peak: match ty {
                    QuantType::BF16 => |c| c.of(QuantType::BF16),
                    QuantType::F16 | QuantType::F32 => |c| c.f32,
                    _ => |c| c.int8,
                },
            };
            let mut turn = 0;
            machine.time(&mut group, &rows.to_string(), work, || {
                turn += 1;
                product(turn, &mut out);
            });
        }
        group.finish();
    }
    criterion.final_summary();
}
