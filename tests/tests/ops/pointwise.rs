//! Norms, rotations, activations: the bits of the reference, too.

use lory_kernels::backend::{Activation, Backend, Rope, RopeStyle};
use lory_kernels::{QMatrix, QuantType, Reference};

use super::{Noise, assert_same, cpus, quantized};

/// Sizes with and without tails, below and above what is worth a second thread.
const SIZES: [(usize, usize); 7] = [(1, 16), (3, 64), (2, 5), (1, 37), (40, 129), (64, 2048), (7, 8192)];

#[test]
fn rms_norm() {
    let mut noise = Noise(11);
    for (rows, width) in SIZES {
        let (x, weight) = (noise.values(rows * width), noise.values(width));
        let mut want = vec![0.0; rows * width];
        Reference.rms_norm(&x, rows, &weight, 1e-5, &mut want).unwrap();
        for cpu in cpus() {
            let what = format!("{rows} x {width}, {}", cpu.label());
            let (mut out, mut inplace) = (vec![f32::NAN; rows * width], x.clone());
            cpu.rms_norm(&x, rows, &weight, 1e-5, &mut out).unwrap();
            assert_same(&out, &want, &what);
            cpu.rms_norm_inplace(&mut inplace, rows, &weight, 1e-5).unwrap();
            assert_same(&inplace, &want, &what);
        }
        // And the reference is right: against double precision.
        for (x, out) in x.chunks(width).zip(want.chunks(width)) {
            let square: f64 = x.iter().map(|v| f64::from(*v).powi(2)).sum();
            let scale = 1.0 / (square / width as f64 + 1e-5).sqrt();
            for ((x, w), out) in x.iter().zip(&weight).zip(out) {
                let exact = f64::from(*x) * scale * f64::from(*w);
                let bound = exact.abs() * (width as f64 / 16.0 + 12.0) * 2f64.powi(-24) + 1e-45;
                assert!((f64::from(*out) - exact).abs() <= bound, "{out} for {exact}");
            }
        }
    }
}

#[test]
fn gated_units_and_soft_caps() {
    let mut noise = Noise(12);
    for (rows, width) in SIZES {
        let len = rows * width;
        let (mut gate, up): (Vec<f32>, _) =
            (noise.values(len).iter().map(|v| v * 30.0).collect(), noise.values(len));
        gate[0] = -200.0;
        gate[len / 2] = 200.0;
        gate[len - 1] = f32::NAN;
        for act in [Activation::Silu, Activation::GeluTanh] {
            let mut want = gate.clone();
            Reference.glu(act, &mut want, &up, len).unwrap();
            for cpu in cpus() {
                let mut got = gate.clone();
                cpu.glu(act, &mut got, &up, len).unwrap();
                assert_same(&got, &want, &format!("{act:?}, {len}, {}", cpu.label()));
            }
        }
        let mut want = gate.clone();
        Reference.softcap(&mut want, len, 50.0).unwrap();
        for cpu in cpus() {
            let mut got = gate.clone();
            cpu.softcap(&mut got, len, 50.0).unwrap();
            assert_same(&got, &want, &format!("softcap, {len}, {}", cpu.label()));
        }
    }
}

#[test]
fn rope() {
    let mut noise = Noise(13);
    for (heads, head_dim, pairs) in [(4, 64, 32), (3, 80, 20), (1, 8, 4), (2, 128, 64), (2, 6, 3)] {
        for style in [RopeStyle::Interleaved, RopeStyle::Neox] {
            let inv_freq: Vec<f32> = (0..pairs).map(|i| 10_000f32.powf(-(i as f32) / pairs as f32)).collect();
            let rope = Rope { style, inv_freq, magnitude: 1.25 };
            let positions: Vec<u32> = (0..50).map(|i| if i % 7 == 0 { 100_000 + i } else { i }).collect();
            let x = noise.values(positions.len() * heads * head_dim);
            let mut want = x.clone();
            Reference.rope(&mut want, heads, head_dim, &positions, &rope).unwrap();
            for cpu in cpus() {
                // Twice, since the second time finds its table made.
                for _ in 0..2 {
                    let mut got = x.clone();
                    cpu.rope(&mut got, heads, head_dim, &positions, &rope).unwrap();
                    assert_same(&got, &want, &format!("{style:?} {heads} x {head_dim}, {}", cpu.label()));
                }
            }
            let length = |v: &[f32]| v.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            let grown = length(&want[..2 * pairs]) / length(&x[..2 * pairs]);
            if style == RopeStyle::Neox || 2 * pairs == head_dim {
                assert!((grown - 1.25f64.powi(2)).abs() < 1e-5, "{grown}");
            }
        }
    }
}

#[test]
fn sums_biases_gathers_and_embeddings() {
    let mut noise = Noise(14);
    let (rows, width) = (50, 513);
    let (x, y, bias) = (noise.values(rows * width), noise.values(rows * width), noise.values(width));
    let bytes = quantized(QuantType::Q6_K, &noise.values(8 * 512));
    let table = QMatrix::new(QuantType::Q6_K, 8, 512, &bytes).unwrap();
    let want = all(&Reference, &x, &y, &bias, table);
    assert_eq!(want[width - 1], x[width - 1] + y[width - 1] + bias[width - 1]);
    for cpu in cpus() {
        assert_same(&all(&cpu, &x, &y, &bias, table), &want, &cpu.label());
    }
}

fn all<B: Backend<Buffer = Vec<f32>>>(
    b: &B,
    x: &[f32],
    y: &Vec<f32>,
    bias: &[f32],
    table: QMatrix<'_>,
) -> Vec<f32> {
    let (rows, width) = (x.len() / bias.len(), bias.len());
    let (mut x, mut gathered, mut embedded) = (x.to_vec(), vec![0.0; 3 * width], vec![0.0; 4 * table.cols()]);
    b.add(&mut x, y, rows * width - 5).unwrap();
    b.add_bias(&mut x, rows, bias).unwrap();
    b.gather(&x, width, &[49, 0, 12], &mut gathered).unwrap();
    b.embed(table, &[3, 0, 7, 7], 3.0, &mut embedded).unwrap();
    [x, gathered, embedded].concat()
}
