//! Adapters in mixed batches, against the formula in double precision.

use lory_kernels::backend::{Backend, Core, Expand, LoraGroup, LoraJob, LoraTerm};
use lory_kernels::quant::dequantize_row;
use lory_kernels::{QMatrix, QuantType, Reference};

use super::{Noise, assert_same, device, put, quantized, take};

/// Matrices that outlive their borrowers.
struct Store(Vec<(QuantType, usize, usize, Vec<u8>)>);

impl Store {
    fn add(&mut self, ty: QuantType, rows: usize, cols: usize, noise: &mut Noise) -> usize {
        let values: Vec<f32> = noise.values(rows * cols).iter().map(|v| v * 0.3).collect();
        self.0.push((ty, rows, cols, quantized(ty, &values)));
        self.0.len() - 1
    }

    fn get(&self, i: usize) -> QMatrix<'_> {
        let (ty, rows, cols, bytes) = &self.0[i];
        QMatrix::new(*ty, *rows, *cols, bytes).unwrap()
    }
}

fn run<B: Backend>(
    b: &B,
    x: &[f32],
    in_width: usize,
    y: &[(Vec<f32>, usize)],
    groups: &[Vec<LoraGroup<'_>>],
) -> Vec<Vec<f32>> {
    let mut out: Vec<_> = y.iter().map(|(y, _)| put(b, y)).collect();
    let mut jobs: Vec<_> = out
        .iter_mut()
        .zip(y)
        .zip(groups)
        .map(|((out, (_, width)), groups)| LoraJob { out, width: *width, groups })
        .collect();
    b.lora(&put(b, x), in_width, &mut jobs).unwrap();
    out.iter().zip(y).map(|(out, (y, _))| take(b, out, y.len())).collect()
}

fn weights(m: QMatrix<'_>) -> Vec<f64> {
    let mut out = vec![0.0; m.rows() * m.cols()];
    dequantize_row(m.ty(), m.bytes(), &mut out).unwrap();
    out.into_iter().map(f64::from).collect()
}

fn matvec(m: QMatrix<'_>, x: &[f64]) -> Vec<f64> {
    weights(m).chunks(m.cols()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
}

fn expand(u: Expand<'_>, z: &[f64]) -> Vec<f64> {
    let bands = match u {
        Expand::Rows(u) => return matvec(u, z),
        Expand::Bands(u) => u,
    };
    let weights = weights(bands);
    let of = |i: usize| {
        let column = |k: usize| weights[i / 32 * bands.cols() + 32 * k + i % 32];
        z.iter().enumerate().map(|(k, z)| column(k) * z).sum()
    };
    (0..u.outputs()).map(of).collect()
}

/// The formula of `Backend::lora`, without any rounding.
fn exact(x: &[f32], in_width: usize, y: &(Vec<f32>, usize), groups: &[LoraGroup<'_>]) -> Vec<f64> {
    let width = y.1;
    let before: Vec<f64> = y.0.iter().map(|v| f64::from(*v)).collect();
    let mut out = before.clone();
    for group in groups {
        for (row, terms) in &group.rows {
            let row = *row as usize;
            let x: Vec<f64> = x[row * in_width..(row + 1) * in_width].iter().map(|v| f64::from(*v)).collect();
            for term in terms {
                let line = |m: Option<QMatrix<'_>>, other: f64| m.map_or(vec![other; width], weights);
                let (g, s, b) =
                    (line(term.delta_scale, 1.0), line(term.row_scale, 1.0), line(term.bias, 0.0));
                let delta = group.u.map_or(vec![0.0; width], |u| {
                    let z = group.v.map_or(x.clone(), |v| matvec(v, &x));
                    let z = match term.core {
                        Core::Identity => z,
                        Core::Diagonal(c) => weights(c).iter().zip(&z).map(|(c, z)| c * z).collect(),
                        Core::Full(c) => matvec(c, &z),
                    };
                    expand(u, &z)
                });
                for i in 0..width {
                    let at = row * width + i;
                    out[at] += f64::from(term.scale) * ((s[i] - 1.0) * before[at] + g[i] * delta[i] + b[i]);
                }
            }
        }
    }
    out
}

/// Within `relative` of the root mean square of what was added.
fn check(got: &[f32], before: &[f32], want: &[f64], relative: f64, what: &str) {
    let added: f64 = want.iter().zip(before).map(|(w, b)| (w - f64::from(*b)).powi(2)).sum();
    let bound = relative * (added / want.len() as f64).sqrt();
    assert!(bound > 0.0, "{what}: nothing was added");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (f64::from(*got) - want).abs() <= bound,
            "{what}: at {i}: got {got}, want {want}, bound {bound}"
        );
    }
}

/// What the activations' rounding allows a random sum to be off, with room: 8 bits, TF32, BF16.
fn tolerance(ty: QuantType) -> f64 {
    match ty {
        QuantType::F32 => 1e-5,
        QuantType::F16 => 5e-3,
        QuantType::BF16 => 3e-2,
        _ => 6e-2,
    }
}

#[test]
fn mixed_batches() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(31);
    for (ty, rank, bands) in [
        (QuantType::Q8_0, 64, false),
        (QuantType::F16, 7, false),
        (QuantType::Q4_0, 32, false),
        (QuantType::BF16, 24, false),
        (QuantType::F32, 16, false),
        (QuantType::Q4_0, 5, true),
        (QuantType::Q8_0, 16, true),
        (QuantType::F32, 3, true),
    ] {
        let (in_width, widths, rows) = (256, if bands { [96, 288] } else { [96, 40] }, 11);
        let core_ty = if rank % 32 == 0 { ty } else { QuantType::F32 };
        let mut store = Store(Vec::new());
        let v: Vec<_> = (0..4).map(|_| store.add(ty, rank, in_width, &mut noise)).collect();
        let u: Vec<_> = (0..4)
            .map(|i| match bands {
                false => store.add(ty, widths[i / 2], rank, &mut noise),
                true => store.add(ty, widths[i / 2] / 32, 32 * rank, &mut noise),
            })
            .collect();
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
            let u = if bands { Expand::Bands(u) } else { Expand::Rows(u) };
            LoraGroup { v: Some(v), u: Some(u), rows: rows.collect() }
        };
        let bare = |job: usize| {
            let line = Some(store.get(lines[job]));
            let term = LoraTerm { row_scale: line, bias: line, ..plain(Core::Identity, 0.5) };
            LoraGroup { v: None, u: None, rows: vec![(9, vec![term]), (2, vec![term])] }
        };
        let groups: Vec<_> = (0..2).map(|job| vec![group(job, 0), group(job, 1), bare(job)]).collect();
        let x = noise.values(rows * in_width);
        let y: Vec<_> = widths.iter().map(|w| (noise.values(rows * w), *w)).collect();
        let got = run(cuda, &x, in_width, &y, &groups);
        for ((got, y), groups) in got.iter().zip(&y).zip(&groups) {
            let want = exact(&x, in_width, y, groups);
            check(got, &y.0, &want, tolerance(ty), &format!("{ty} rank {rank}"));
        }
        // Each row alone: the bits of the batch.
        for row in [0u32, 3, 9] {
            let alone: Vec<Vec<_>> =
                groups.iter().map(|groups| groups.iter().map(|group| only(group, row)).collect()).collect();
            for ((one, all), (_, width)) in run(cuda, &x, in_width, &y, &alone).iter().zip(&got).zip(&y) {
                let line = row as usize * width..(row as usize + 1) * width;
                assert_same(&one[line.clone()], &all[line], &format!("{ty}: row {row} alone"));
            }
        }
    }
}

/// A group's part in one row.
fn only<'a>(group: &LoraGroup<'a>, row: u32) -> LoraGroup<'a> {
    let rows = group.rows.iter().filter(|(r, _)| *r == row).cloned().collect();
    LoraGroup { v: group.v, u: group.u, rows }
}

/// Embeddings look their shrink up: without V the input is what U expands.
#[test]
fn input_that_was_shrunk_already() {
    let Some(cuda) = device() else { return };
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
    let y = (noise.values(rows * width), width);
    let groups = [vec![group]];
    let got = run(cuda, &x, rank, std::slice::from_ref(&y), &groups);
    check(&got[0], &y.0, &exact(&x, rank, &y, &groups[0]), 5e-3, "shrunk already");
    let want = run(&Reference, &x, rank, std::slice::from_ref(&y), &groups);
    let reference: Vec<f64> = want[0].iter().map(|v| f64::from(*v)).collect();
    check(&got[0], &y.0, &reference, 5e-3, "the reference");
}
