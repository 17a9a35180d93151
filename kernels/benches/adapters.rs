//! What adapters cost in the linear layers of a transformer: the layers with and without them, in turns; and what is added alone, beside
//! the ceilings of this machine.
//!
//! The layers are those of Llama 3.2 1B in Q4_0, four of them, so that weights come from memory. Every row has an adapter of its
//! own. A pair is one turn with adapters and one without, milliseconds apart, so that a shared machine hits both alike.
//! Alone, gate and up get what `Backend::lora` adds to them, again and again, so that its weights come from the caches where they fit.
//! `cargo bench -p lory-kernels --bench adapters [-- FILTER]`, a filter is `clusters`, `8 rows` or `alone`; `LORY_ISA` and `LORY_THREADS` as
//! usual. Models are mapped in pages of 2 MiB; for the same here, on Linux, set `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`. Without
//! measuring, a small shape is compared with the reference.

mod measure;

use std::time::Instant;

use criterion::Criterion;
use lory_kernels::backend::{BAND, Backend, Core, Expand, LinearJob, LoraGroup, LoraJob, LoraTerm};
use lory_kernels::{QuantType, Reference};

use measure::weights::Weights;
use measure::{Machine, Work, noise};

/// Turns with and without.
const PAIRS: usize = 25;

/// What adapters are made of.
#[derive(Clone, Copy)]
struct Kind {
    name: &'static str,
    rank: usize,
    /// Bases; 0: every adapter has factors of its own.
    clusters: usize,
    factors: QuantType,
}

impl Kind {
    /// As packs have it: where the rank is not whole blocks.
    fn bands(&self) -> bool {
        !self.rank.is_multiple_of(self.factors.block_len())
    }

    /// The format of the cores.
    fn cores(&self) -> QuantType {
        if self.rank.is_multiple_of(QuantType::Q8_0.block_len()) { QuantType::Q8_0 } else { QuantType::F16 }
    }
}

const KINDS: [Kind; 4] = [
    Kind { name: "one basis of rank 64", rank: 64, clusters: 1, factors: QuantType::Q4_0 },
    Kind { name: "25 clusters of rank 16", rank: 16, clusters: 25, factors: QuantType::Q4_0 },
    Kind { name: "plain LoRAs of rank 16", rank: 16, clusters: 0, factors: QuantType::F16 },
    Kind { name: "plain LoRAs of rank 16 in Q8_0", rank: 16, clusters: 0, factors: QuantType::Q8_0 },
];

/// Layers with the same input, and what adapters have for them: one V for all, a U for each.
struct Call {
    input: usize,
    /// Whether U is in bands.
    bands: bool,
    weights: Vec<Weights>,
    /// Of each cluster or adapter.
    factors: Vec<(Weights, Vec<Weights>)>,
    /// Of each adapter, one core a layer; none: the factors are all there is.
    cores: Vec<Vec<Weights>>,
}

impl Call {
    fn new(kind: Kind, adapters: usize, input: usize, outputs: &[usize]) -> Call {
        let weights = outputs.iter().map(|rows| Weights::new(QuantType::Q4_0, *rows, input)).collect();
        let bases = if kind.clusters == 0 { adapters } else { kind.clusters.min(adapters) };
        let factors = (0..bases).map(|_| {
            let u = outputs.iter().map(|rows| match kind.bands() {
                false => Weights::new(kind.factors, *rows, kind.rank),
                true => Weights::new(kind.factors, *rows / BAND, kind.rank * BAND),
            });
            (Weights::new(kind.factors, kind.rank, input), u.collect())
        });
        let cores = (0..if kind.clusters == 0 { 0 } else { adapters })
            .map(|_| outputs.iter().map(|_| Weights::new(kind.cores(), kind.rank, kind.rank)).collect());
        Call { input, bands: kind.bands(), weights, factors: factors.collect(), cores: cores.collect() }
    }

    /// What the adapters with one of the bases add to a layer.
    fn group(&self, layer: usize, basis: usize, rows: usize) -> LoraGroup<'_> {
        let term = |core| LoraTerm { core, scale: 0.5, delta_scale: None, row_scale: None, bias: None };
        let rows = (basis..rows).step_by(self.factors.len()).map(|row| {
            let core = self.cores.get(row).map_or(Core::Identity, |c| Core::Full(c[layer].matrix()));
            (row as u32, vec![term(core)])
        });
        let (v, u) = &self.factors[basis];
        let u = u[layer].matrix();
        let u = if self.bands { Expand::Bands(u) } else { Expand::Rows(u) };
        LoraGroup { v: Some(v.matrix()), u: Some(u), rows: rows.collect() }
    }

    /// What the adapters of `rows` rows add to each layer.
    fn groups(&self, rows: usize) -> Vec<Vec<LoraGroup<'_>>> {
        let bases = self.factors.len().min(rows);
        let of = |layer| (0..bases).map(|basis| self.group(layer, basis, rows)).collect();
        (0..self.weights.len()).map(of).collect()
    }

    /// The outputs of all layers.
    fn run<B: Backend<Buffer = Vec<f32>>>(
        &self,
        b: &B,
        x: &Vec<f32>,
        rows: usize,
        adapters: bool,
        out: &mut [Vec<f32>],
    ) {
        let groups = if adapters { self.groups(rows) } else { vec![Vec::new(); self.weights.len()] };
        let jobs = self.weights.iter().zip(out).zip(&groups);
        let mut jobs: Vec<_> =
            jobs.map(|((w, out), groups)| LinearJob { weight: w.matrix(), out, groups }).collect();
        b.linear(x, rows, &mut jobs).expect("works");
    }
}

impl Call {
    /// What the adapters add, to outputs that stay as they are otherwise.
    fn add<B: Backend<Buffer = Vec<f32>>>(&self, b: &B, x: &Vec<f32>, rows: usize, out: &mut [Vec<f32>]) {
        let groups = self.groups(rows);
        let jobs = self.weights.iter().zip(out).zip(&groups);
        let mut jobs: Vec<_> =
            jobs.map(|((w, out), groups)| LoraJob { out, width: w.matrix().rows(), groups }).collect();
        b.lora(x, self.input, &mut jobs).expect("works");
    }

    /// Bytes that [`Call::add`] reads at least, and its operations.
    fn work(&self, kind: Kind, rows: usize) -> Work {
        let used = self.factors.iter().take(rows);
        let factors = used.flat_map(|(v, u)| std::iter::once(v).chain(u));
        let cores = self.cores.iter().take(rows).flatten();
        let (v, u) = &self.factors[0];
        let of_row = v.numbers() + u.iter().map(Weights::numbers).sum::<usize>();
        let of_cores: usize = self.cores.first().map_or(0, |cores| cores.iter().map(Weights::numbers).sum());
        Work {
            bytes: factors.chain(cores).map(Weights::bytes).sum(),
            ops: 2 * rows * (of_row + of_cores),
            peak: if kind.factors == QuantType::F16 { |c| c.f32 } else { |c| c.int8 },
        }
    }
}

/// The linear layers of `n` transformer layers.
fn calls(kind: Kind, adapters: usize, n: usize, [width, kv, inner]: [usize; 3]) -> Vec<Call> {
    let shapes: [(usize, &[usize]); 4] =
        [(width, &[width, kv, kv]), (width, &[width]), (width, &[inner, inner]), (inner, &[width])];
    let layer = |_| shapes.map(|(input, outputs)| Call::new(kind, adapters, input, outputs));
    (0..n).flat_map(layer).collect()
}

/// Room for the outputs of any call.
fn outputs(calls: &[Call], rows: usize) -> Vec<Vec<f32>> {
    let widest = |i: usize| calls.iter().filter_map(|c| c.weights.get(i)).map(|w| w.matrix().rows()).max();
    (0..3).map(|i| vec![0.0; rows * widest(i).unwrap_or(0)]).collect()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn measure(machine: &Machine, kind: Kind, rows: usize) {
    let calls = calls(kind, rows, 4, [2048, 512, 8192]);
    let (x, mut out) = (noise(rows * 8192), outputs(&calls, rows));
    let mut turn = |adapters: bool| {
        let start = Instant::now();
        for call in &calls {
            call.run(&machine.cpu, &x, rows, adapters, &mut out);
        }
        start.elapsed().as_secs_f64()
    };
    let (mut with, mut without, mut shares) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..=PAIRS {
        // Each goes first in half of the pairs; the first pair warms up.
        let [a, b] = if pair % 2 == 0 { [true, false].map(&mut turn) } else { [false, true].map(&mut turn) };
        let (w, wo) = if pair % 2 == 0 { (a, b) } else { (b, a) };
        if pair > 0 {
            with.push(w);
            without.push(wo);
            shares.push(wo / w);
        }
    }
    let share = median(&mut shares);
    println!(
        "{}, {rows} rows: {:.2} ms without, {:.2} ms with: {share:.3} ({:.3} - {:.3} in half of the pairs)",
        kind.name,
        1e3 * median(&mut without),
        1e3 * median(&mut with),
        shares[PAIRS / 4],
        shares[PAIRS - 1 - PAIRS / 4],
    );
}

fn measure_alone(machine: &Machine, criterion: &mut Criterion, kind: Kind, rows: usize) {
    let call = Call::new(kind, rows, 2048, &[8192, 8192]);
    let (x, mut out) = (noise(rows * call.input), outputs(std::slice::from_ref(&call), rows));
    let mut group = criterion.benchmark_group(kind.name);
    machine.time(&mut group, &format!("{rows} rows alone"), call.work(kind, rows), || {
        call.add(&machine.cpu, &x, rows, &mut out);
    });
    group.finish();
}

fn check(machine: &Machine, kind: Kind, rows: usize) {
    for call in calls(kind, rows, 1, [256, 64, 512]) {
        let (x, calls) = (noise(rows * call.input), std::slice::from_ref(&call));
        let (mut got, mut want) = (outputs(calls, rows), outputs(calls, rows));
        call.run(&machine.cpu, &x, rows, true, &mut got);
        call.run(&Reference, &x, rows, true, &mut want);
        call.add(&machine.cpu, &x, rows, &mut got);
        call.add(&Reference, &x, rows, &mut want);
        let largest = want.iter().flatten().fold(0f32, |m, v| m.max(v.abs()));
        for (a, b) in got.iter().flatten().zip(want.iter().flatten()) {
            // So that NaN fails too.
            assert!((a - b).abs() <= 1e-4 * largest, "{}: {a} and not {b} of {largest}", kind.name);
        }
    }
}

fn main() {
    let machine = Machine::new();
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let mut criterion = measure::criterion();
    for kind in KINDS {
        for rows in [1, 8, 32] {
            if machine.is_quick() {
                check(&machine, kind, rows);
                continue;
            }
            if format!("{}, {rows} rows", kind.name).contains(&filter) {
                measure(&machine, kind, rows);
            }
            measure_alone(&machine, &mut criterion, kind, rows);
        }
    }
    criterion.final_summary();
}
