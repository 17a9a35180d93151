//! Adapters: every mixture of bases, cores and scales gives the bits of the reference.

use lory_kernels::backend::{Backend, Core, Expand, LoraGroup, LoraJob, LoraTerm};
use lory_kernels::{QMatrix, QuantType, Reference};

use super::{Noise, assert_same, cpus, quantized};

/// Matrices that outlive their borrowers.
pub struct Store(pub Vec<(QuantType, usize, usize, Vec<u8>)>);

impl Store {
    pub fn add(&mut self, ty: QuantType, rows: usize, cols: usize, noise: &mut Noise) -> usize {
        let values: Vec<f32> = noise.values(rows * cols).iter().map(|v| v * 0.3).collect();
        self.0.push((ty, rows, cols, quantized(ty, &values)));
        self.0.len() - 1
    }

    pub fn get(&self, i: usize) -> QMatrix<'_> {
        let (ty, rows, cols, bytes) = &self.0[i];
        QMatrix::new(*ty, *rows, *cols, bytes).unwrap()
    }
}

fn run<B: Backend<Buffer = Vec<f32>>>(
    b: &B,
    x: &Vec<f32>,
    in_width: usize,
    y: &[(Vec<f32>, usize)],
    groups: &[Vec<LoraGroup<'_>>],
) -> Vec<Vec<f32>> {
    let mut out: Vec<_> = y.iter().map(|(y, _)| y.clone()).collect();
    let mut jobs: Vec<_> = out
        .iter_mut()
        .zip(y)
        .zip(groups)
        .map(|((out, (_, width)), groups)| LoraJob { out, width: *width, groups })
        .collect();
    b.lora(x, in_width, &mut jobs).unwrap();
    out
}

#[test]
fn mixed_batches() {
    let mut noise = Noise(31);
    let cpus = cpus();
    for (ty, rank) in
        [(QuantType::Q8_0, 64), (QuantType::F16, 7), (QuantType::Q4_0, 32), (QuantType::F32, 16)]
    {
        let (in_width, widths, rows) = (256, [96, 40], 11);
        let core_ty = if rank % 32 == 0 { ty } else { QuantType::F32 };
        let mut store = Store(Vec::new());
        let v: Vec<_> = (0..4).map(|_| store.add(ty, rank, in_width, &mut noise)).collect();
        let u_ty = if rank % 32 == 0 { ty } else { QuantType::F16 };
        let u: Vec<_> = (0..4).map(|i| store.add(u_ty, widths[i / 2], rank, &mut noise)).collect();
        let full: Vec<_> = (0..3).map(|_| store.add(core_ty, rank, rank, &mut noise)).collect();
        let diagonal = store.add(QuantType::F16, 1, rank, &mut noise);
        let lines: Vec<_> = widths.iter().map(|w| store.add(QuantType::F32, 1, *w, &mut noise)).collect();
        let plain = |core, scale| LoraTerm { core, scale, delta_scale: None, row_scale: None, bias: None };
        let group = |job: usize, basis: usize| {
            let line = Some(store.get(lines[job]));
            let core = |i: usize| match i % 5 {
                0 => Core::Identity,
                1 => Core::Diagonal(store.get(diagonal)),
                i => Core::Full(store.get(full[i - 2])),
            };
            let rows = (0..rows).filter(|row| basis == 0 || row % 3 != 1).map(|row| {
                let terms = match row % 4 {
                    0 => vec![plain(core(row), 1.0)],
                    1 => vec![plain(core(row), 0.5), plain(core(row + 1), -0.25)],
                    2 => vec![LoraTerm { delta_scale: line, bias: line, ..plain(core(row), 0.75) }],
                    _ => vec![
                        plain(core(row), 0.5),
                        LoraTerm { delta_scale: line, row_scale: line, ..plain(core(row + 2), 1.5) },
                    ],
                };
                (row as u32, terms)
            });
            let (v, u) = (store.get(v[job * 2 + basis]), store.get(u[job * 2 + basis]));
            LoraGroup { v: Some(v), u: Some(Expand::Rows(u)), rows: rows.collect() }
        };
        let bare = |job: usize| {
            let line = Some(store.get(lines[job]));
            let term = LoraTerm { row_scale: line, bias: line, ..plain(Core::Identity, 0.5) };
            LoraGroup { v: None, u: None, rows: vec![(9, vec![term]), (2, vec![term])] }
        };
        let groups: Vec<_> = (0..2).map(|job| vec![group(job, 0), group(job, 1), bare(job)]).collect();
        let x = noise.values(rows * in_width);
        let y: Vec<_> = widths.iter().map(|w| (noise.values(rows * w), *w)).collect();
        let want = run(&Reference, &x, in_width, &y, &groups);
        assert!(want[0] != y[0].0);
        for cpu in &cpus {
            for (got, want) in run(cpu, &x, in_width, &y, &groups).iter().zip(&want) {
                assert_same(got, want, &format!("{ty} rank {rank}, {}", cpu.label()));
            }
        }
    }
}

/// U C Vᵀ x in double precision, for one plain term.
#[test]
fn the_reference_is_right() {
    let mut noise = Noise(32);
    let (in_width, width, rank) = (64, 96, 8);
    let mut store = Store(Vec::new());
    let (v, u) = (
        store.add(QuantType::F32, rank, in_width, &mut noise),
        store.add(QuantType::F32, width, rank, &mut noise),
    );
    let c = store.add(QuantType::F32, rank, rank, &mut noise);
    let (x, y) = (noise.values(in_width), noise.values(width));
    let product = |i: usize, x: &[f64]| -> Vec<f64> {
        let (_, _, cols, bytes) = &store.0[i];
        let values: Vec<f64> =
            bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect();
        values.chunks(*cols).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
    };
    let exact = product(u, &product(c, &product(v, &x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>())));
    let core = Core::Full(store.get(c));
    let term = LoraTerm { core, scale: 0.5, delta_scale: None, row_scale: None, bias: None };
    // The same U in bands: of 32 outputs the first column, then the second …
    let rows = store.0[u].3.as_chunks::<4>().0;
    let number = |i: usize| rows[(i / (32 * rank) * 32 + i % 32) * rank + i / 32 % rank];
    let bands: Vec<u8> = (0..width * rank).flat_map(number).collect();
    let bands = QMatrix::new(QuantType::F32, width / 32, 32 * rank, &bands).unwrap();
    for u in [Expand::Rows(store.get(u)), Expand::Bands(bands)] {
        let group = LoraGroup { v: Some(store.get(v)), u: Some(u), rows: vec![(0, vec![term])] };
        let got = run(&Reference, &x, in_width, &[(y.clone(), width)], &[vec![group]]);
        for ((got, y), exact) in got[0].iter().zip(&y).zip(&exact) {
            assert!((f64::from(*got) - (f64::from(*y) + 0.5 * exact)).abs() < 1e-5, "{got}");
        }
    }
}

/// Embeddings look their shrink up: without V the input is what U expands.
#[test]
fn input_that_was_shrunk_already() {
    let mut noise = Noise(33);
    let (rank, width, rows) = (12, 40, 5);
    let mut store = Store(Vec::new());
    let u = store.add(QuantType::F16, width, rank, &mut noise);
    let c = store.add(QuantType::F32, rank, rank, &mut noise);
    let plain = |core, scale| LoraTerm { core, scale, delta_scale: None, row_scale: None, bias: None };
    let group = LoraGroup {
        v: None,
        u: Some(Expand::Rows(store.get(u))),
        rows: vec![
            (3, vec![plain(Core::Identity, 0.5)]),
            (0, vec![plain(Core::Full(store.get(c)), 1.0), plain(Core::Identity, -2.0)]),
        ],
    };
    let x = noise.values(rows * rank);
    let y = [(noise.values(rows * width), width)];
    let groups = [vec![group]];
    let want = run(&Reference, &x, rank, &y, &groups);
    assert!(want[0][3 * width..4 * width] != y[0].0[3 * width..4 * width]);
    for cpu in cpus() {
        assert_same(&run(&cpu, &x, rank, &y, &groups)[0], &want[0], &cpu.label());
    }
}

/// Groups of plain terms go straight onto the outputs; those with rows in common must keep their order.
#[test]
fn overlapping_plain_groups() {
    let mut noise = Noise(33);
    let (in_width, width, rank, rows) = (128, 72, 32, 9);
    let mut store = Store(Vec::new());
    let bases: Vec<_> = (0..4)
        .map(|_| {
            let v = store.add(QuantType::Q8_0, rank, in_width, &mut noise);
            (v, store.add(QuantType::Q8_0, width, rank, &mut noise))
        })
        .collect();
    let c = store.add(QuantType::Q8_0, rank, rank, &mut noise);
    let term = |core| LoraTerm { core, scale: 0.7, delta_scale: None, row_scale: None, bias: None };
    let group = |basis: usize, rows: &[u32]| LoraGroup {
        v: Some(store.get(bases[basis].0)),
        u: Some(Expand::Rows(store.get(bases[basis].1))),
        rows: rows
            .iter()
            .map(|row| {
                let core = if row % 2 == 0 { Core::Full(store.get(c)) } else { Core::Identity };
                (*row, vec![term(core), term(Core::Identity)])
            })
            .collect(),
    };
    let groups =
        vec![vec![group(0, &[0, 2, 5]), group(1, &[1, 3]), group(2, &[2, 3, 8]), group(3, &[0, 1, 2, 3, 4])]];
    let x = noise.values(rows * in_width);
    let y = [(noise.values(rows * width), width)];
    let want = run(&Reference, &x, in_width, &y, &groups);
    for cpu in cpus() {
        assert_same(&run(&cpu, &x, in_width, &y, &groups)[0], &want[0], &cpu.label());
    }
}

/// Rows come sorted by adapter, in any order, and one of many bases may have a single row.
#[test]
fn rows_in_any_order_over_many_bases() {
    let mut noise = Noise(34);
    let (in_width, widths, rank, rows) = (128, [96, 40], 32, 24);
    let mut store = Store(Vec::new());
    let cores: Vec<_> = (0..rows)
        .map(|i| store.add([QuantType::F16, QuantType::F32, QuantType::Q8_0][i % 3], rank, rank, &mut noise))
        .collect();
    let bases: Vec<Vec<(usize, usize)>> = widths
        .iter()
        .map(|width| {
            let basis = |i: usize| {
                let ty = [QuantType::Q4_0, QuantType::F16][i % 2];
                (store.add(ty, rank, in_width, &mut noise), store.add(ty, *width, rank, &mut noise))
            };
            (0..9).map(basis).collect()
        })
        .collect();
    let bias = store.add(QuantType::F32, 1, widths[1], &mut noise);
    // The first basis has every row; of the others each has those with its number, the last one none.
    let members =
        |basis: usize| (0..rows).map(|i| i * 7 % rows).filter(move |r| basis == 0 || r % 9 == basis - 1);
    for with_bias in [false, true] {
        let group = |job: usize, basis: usize| {
            let bias = (with_bias && job == 1 && basis == 2).then(|| store.get(bias));
            let term = |row: usize| LoraTerm {
                core: Core::Full(store.get(cores[row])),
                scale: if row.is_multiple_of(2) { 1.0 } else { 0.3 },
                delta_scale: None,
                row_scale: None,
                bias,
            };
            let (v, u) = bases[job][basis];
            let rows = members(basis).map(|row| (row as u32, vec![term(row)])).collect();
            LoraGroup { v: Some(store.get(v)), u: Some(Expand::Rows(store.get(u))), rows }
        };
        let groups: Vec<Vec<_>> = (0..2).map(|job| (0..9).map(|basis| group(job, basis)).collect()).collect();
        let x = noise.values(rows * in_width);
        let y: Vec<_> = widths.iter().map(|w| (noise.values(rows * w), *w)).collect();
        let want = run(&Reference, &x, in_width, &y, &groups);
        for cpu in cpus() {
            for (got, want) in run(&cpu, &x, in_width, &y, &groups).iter().zip(&want) {
                assert_same(got, want, &format!("bias {with_bias}, {}", cpu.label()));
            }
        }
    }
}
