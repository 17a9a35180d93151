//! Layers together with what adapters add: the bits of the two operations one after the other.

use lory_kernels::backend::{Backend, Core, Expand, LinearJob, LoraGroup, LoraTerm, linear_in_two};
use lory_kernels::cpu::{Cpu, Isa};
use lory_kernels::{QMatrix, QuantType, Reference};

use super::lora::Store;
use super::{Noise, assert_same, cpus};

/// One call: layers by number of weight, and their groups.
struct Call<'a> {
    x: Vec<f32>,
    rows: usize,
    layers: Vec<(QMatrix<'a>, Vec<LoraGroup<'a>>)>,
}

impl Call<'_> {
    fn run<B: Backend<Buffer = Vec<f32>>>(&self, b: &B, in_two: bool) -> Vec<Vec<f32>> {
        let mut out: Vec<_> = self.layers.iter().map(|(w, _)| vec![f32::NAN; self.rows * w.rows()]).collect();
        let mut jobs: Vec<_> = self
            .layers
            .iter()
            .zip(&mut out)
            .map(|((weight, groups), out)| LinearJob { weight: *weight, out, groups })
            .collect();
        let done = match in_two {
            true => linear_in_two(b, &self.x, self.rows, &mut jobs),
            false => b.linear(&self.x, self.rows, &mut jobs),
        };
        done.unwrap();
        out
    }

    fn check(&self, cpu: &Cpu, want: &[Vec<f32>], what: &str) {
        for (i, (got, want)) in self.run(cpu, false).iter().zip(want).enumerate() {
            assert_same(got, want, &format!("{what}, layer {i}, {} rows, {}", self.rows, cpu.label()));
        }
    }
}

fn plain(core: Core<'_>, scale: f32) -> LoraTerm<'_> {
    LoraTerm { core, scale, delta_scale: None, row_scale: None, bias: None }
}

/// Three layers with one V, a core of its own for every row but the last few, for every kernel by its number of rows.
#[test]
fn one_basis_for_all_rows() {
    let mut noise = Noise(41);
    let cpus = cpus();
    // (base, V and U, cores, rank)
    for (base, basis, core, rank) in [
        (QuantType::Q4_0, QuantType::Q4_0, QuantType::Q8_0, 64),
        (QuantType::Q4_K, QuantType::Q8_0, QuantType::F16, 96),
        (QuantType::Q6_K, QuantType::F16, QuantType::F32, 7),
        (QuantType::F16, QuantType::Q4_1, QuantType::Q4_0, 32),
    ] {
        let mut store = Store(Vec::new());
        let (in_width, widths) = (512, [200, 33, 1]);
        let w: Vec<_> = widths.iter().map(|n| store.add(base, *n, in_width, &mut noise)).collect();
        let v = store.add(basis, rank, in_width, &mut noise);
        let u: Vec<_> = widths.iter().map(|n| store.add(basis, *n, rank, &mut noise)).collect();
        let cores: Vec<_> = (0..40).map(|_| store.add(core, rank, rank, &mut noise)).collect();
        for rows in [1, 2, 8, 9, 33, 257, 517] {
            let group = |layer: usize| {
                let term = |row: usize| {
                    let scale = if row.is_multiple_of(3) { 0.7 } else { 1.0 };
                    plain(Core::Full(store.get(cores[(row + layer).min(39)])), scale)
                };
                // Rows come sorted by adapter, in whatever order.
                let rows = (0..rows).rev().map(|row| (row as u32, vec![term(row)]));
                LoraGroup {
                    v: Some(store.get(v)),
                    u: Some(Expand::Rows(store.get(u[layer]))),
                    rows: rows.collect(),
                }
            };
            let layers = (0..3).map(|i| (store.get(w[i]), vec![group(i)])).collect();
            let call = Call { x: noise.values(rows * in_width), rows, layers };
            let want = call.run(&Reference, false);
            for cpu in &cpus {
                call.check(cpu, &want, &format!("{base}, {basis} rank {rank}"));
            }
        }
    }
}

/// Groups for some rows, overlapping ones, mixtures, layers with none, and one whose bias keeps it out of the turn.
#[test]
fn groups_of_some_rows() {
    let mut noise = Noise(42);
    let mut store = Store(Vec::new());
    // The second so wide that a task puts it together in several pieces.
    let (in_width, widths, rank) = (256, [72, 2000, 96, 16], 32);
    let w: Vec<_> = widths.iter().map(|n| store.add(QuantType::Q4_0, *n, in_width, &mut noise)).collect();
    let types = [QuantType::Q4_0, QuantType::F16, QuantType::BF16, QuantType::Q8_0];
    let bases: Vec<Vec<_>> = widths
        .iter()
        .map(|n| {
            let basis = |ty: &QuantType| {
                (store.add(*ty, rank, in_width, &mut noise), store.add(*ty, *n, rank, &mut noise))
            };
            types.iter().map(basis).collect()
        })
        .collect();
    let full = store.add(QuantType::Q8_0, rank, rank, &mut noise);
    let diagonal = store.add(QuantType::F16, 1, rank, &mut noise);
    let bias = store.add(QuantType::F32, 1, widths[2], &mut noise);
    for rows in [1usize, 5, 13, 70, 530] {
        let group = |layer: usize, basis: usize| {
            let terms = |row: usize| {
                let core = [Core::Full(store.get(full)), Core::Diagonal(store.get(diagonal)), Core::Identity];
                match row % 3 {
                    0 => vec![plain(core[basis % 3], 1.0)],
                    1 => vec![plain(core[0], 0.5), plain(core[1], -0.25), plain(core[2], 2.0)],
                    _ => vec![plain(core[0], 0.3)],
                }
            };
            // In one layer rows come for the first time in a group of which others have come before.
            let first = |row: usize| basis == 0 && (layer != 1 || !row.is_multiple_of(5));
            let later = |row: usize| basis > 0 && row % 4 != basis && row < 100 * basis;
            let members = (0..rows).filter(|row| first(*row) || later(*row)).rev();
            let mut rows: Vec<_> = members.map(|row| (row as u32, terms(row))).collect();
            if (layer, basis) == (2, 1) {
                rows.iter_mut().for_each(|(_, terms)| terms[0].bias = Some(store.get(bias)));
            }
            let (v, u) = bases[layer][basis];
            LoraGroup { v: Some(store.get(v)), u: Some(Expand::Rows(store.get(u))), rows }
        };
        let groups = |layer: usize| match layer {
            3 => vec![],
            _ => (0..4).map(|basis| group(layer, basis)).collect(),
        };
        let layers = (0..4).map(|i| (store.get(w[i]), groups(i))).collect();
        let call = Call { x: noise.values(rows * in_width), rows, layers };
        let reference = call.run(&Reference, false);
        let bare = call.layers.iter().map(|(weight, _)| (*weight, vec![])).collect();
        let bare = Call { x: call.x.clone(), rows, layers: bare }.run(&Reference, false);
        assert!(reference[0] != bare[0] && reference[3] == bare[3]);
        for cpu in cpus() {
            // BF16 has other bits where there are instructions for it, but the same ones either way.
            let want = call.run(&cpu, true);
            call.check(&cpu, &want, "some rows");
            if cpu.isa().level() < lory_kernels::cpu::Level::Avx512Bf16 {
                call.check(&cpu, &reference, "some rows");
            }
        }
    }
}

/// U in bands, of formats that are decoded as they are used and of others: one basis for many rows, and one for each.
#[test]
fn u_in_bands() {
    let mut noise = Noise(45);
    for (ty, rank) in [
        (QuantType::Q4_0, 16),
        (QuantType::Q8_0, 5),
        (QuantType::Q4_K, 8),
        (QuantType::F16, 16),
        (QuantType::F32, 1),
        (QuantType::Q8_0, 64),
    ] {
        let mut store = Store(Vec::new());
        // Whole bands, of which strips may have halves; and so many that tasks have pieces.
        let (in_width, widths) = (256, [96, 2080, 32]);
        let w: Vec<_> = widths.iter().map(|n| store.add(QuantType::Q4_0, *n, in_width, &mut noise)).collect();
        let bases: Vec<(usize, Vec<usize>)> = (0..10)
            .map(|_| {
                let u = widths.iter().map(|n| store.add(ty, n / 32, 32 * rank, &mut noise)).collect();
                (store.add(ty, rank, in_width, &mut noise), u)
            })
            .collect();
        let full = store.add(QuantType::F16, rank, rank, &mut noise);
        let g = store.add(QuantType::F32, 1, widths[2], &mut noise);
        for (rows, scaled) in
            [(1, false), (2, true), (4, false), (9, false), (9, true), (70, false), (300, false)]
        {
            let group = |layer: usize, basis: usize| {
                let term = |row: usize| {
                    let core =
                        if row.is_multiple_of(2) { Core::Full(store.get(full)) } else { Core::Identity };
                    // A scale of its own keeps a group out of the turn.
                    let delta_scale = (scaled && layer == 2).then(|| store.get(g));
                    LoraTerm { delta_scale, ..plain(core, 0.7) }
                };
                // The first basis has every row, and each of the others every ninth.
                let members = (0..rows).filter(|row| basis == 0 || row % 9 == basis - 1);
                let (v, u) = &bases[basis];
                LoraGroup {
                    v: Some(store.get(*v)),
                    u: Some(Expand::Bands(store.get(u[layer]))),
                    rows: members.map(|row| (row as u32, vec![term(row)])).collect(),
                }
            };
            let groups =
                |layer| (0..10).map(|basis| group(layer, basis)).filter(|g| !g.rows.is_empty()).collect();
            let layers = (0..3).map(|i| (store.get(w[i]), groups(i))).collect();
            let call = Call { x: noise.values(rows * in_width), rows, layers };
            let want = call.run(&Reference, false);
            for cpu in cpus() {
                call.check(&cpu, &want, &format!("{ty} rank {rank}, scaled {scaled}"));
            }
        }
    }
}

/// A repacked weight, and more threads than there are strips.
#[test]
fn repacked_and_narrow() {
    let mut noise = Noise(43);
    let mut store = Store(Vec::new());
    let (in_width, rank) = (512, 64);
    let w: Vec<_> = [100, 7].iter().map(|n| store.add(QuantType::Q8_0, *n, in_width, &mut noise)).collect();
    let v = store.add(QuantType::Q4_0, rank, in_width, &mut noise);
    let u: Vec<_> = [100, 7].iter().map(|n| store.add(QuantType::Q4_0, *n, rank, &mut noise)).collect();
    for (threads, rows) in [(2, 1), (2, 20), (9, 3), (9, 50)] {
        let cpu = Cpu::new(Some(threads), Isa::detect()).with_repacking();
        w.iter().for_each(|w| cpu.load(store.get(*w)).unwrap());
        for layer in 0..2 {
            let rows_of = (0..rows).map(|row| (row as u32, vec![plain(Core::Identity, 0.5)]));
            let group = LoraGroup {
                v: Some(store.get(v)),
                u: Some(Expand::Rows(store.get(u[layer]))),
                rows: rows_of.collect(),
            };
            let layers = vec![(store.get(w[layer]), vec![group])];
            let call = Call { x: noise.values(rows * in_width), rows, layers };
            call.check(&cpu, &call.run(&Reference, false), "repacked");
        }
    }
}

/// A task that panics reaches the caller, and nobody waits for it.
#[test]
fn a_panic_ends_the_turn() {
    let mut noise = Noise(44);
    let mut store = Store(Vec::new());
    let w = store.add(QuantType::Q4_0, 640, 256, &mut noise);
    let v = store.add(QuantType::Q4_0, 32, 256, &mut noise);
    let u = store.add(QuantType::Q4_0, 640, 32, &mut noise);
    let wrong = store.add(QuantType::Q8_0, 32, 64, &mut noise);
    let rows = vec![(0, vec![plain(Core::Full(store.get(wrong)), 1.0)])];
    let group = LoraGroup { v: Some(store.get(v)), u: Some(Expand::Rows(store.get(u))), rows };
    let call = Call { x: noise.values(256), rows: 1, layers: vec![(store.get(w), vec![group])] };
    for cpu in cpus() {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| call.run(&cpu, false)));
        assert!(result.is_err(), "a core of the wrong size, {}", cpu.label());
    }
}
