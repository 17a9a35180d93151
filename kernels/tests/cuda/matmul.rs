//! Products: within the derived bounds, and the same bits in every batch.

use lory_kernels::backend::{Backend, MatmulJob};
use lory_kernels::quant::dequantize_row;
use lory_kernels::quant::format::{dot_row, exact_row};
use lory_kernels::{Cuda, QMatrix, QuantType};

use super::{Noise, TYPES, assert_same, device, emulated, put, quantized, take};

fn matmul<B: Backend>(b: &B, w: &[QMatrix<'_>], x: &[f32], rows: usize) -> Vec<Vec<f32>> {
    let x = put(b, x);
    let mut out: Vec<_> = w.iter().map(|w| put(b, &vec![f32::NAN; rows * w.rows()])).collect();
    let mut jobs: Vec<_> =
        w.iter().zip(&mut out).map(|(weight, out)| MatmulJob { weight: *weight, out }).collect();
    b.matmul(&x, rows, &mut jobs).unwrap();
    w.iter().zip(&out).map(|(w, out)| take(b, out, rows * w.rows())).collect()
}

/// Blocks of any bits, but with scales (the half-precision fields) that are numbers.
fn arbitrary(ty: QuantType, n: usize, noise: &mut Noise) -> Vec<u8> {
    let mut bytes = quantized(ty, &noise.values(n));
    let halves: &[usize] = match ty {
        QuantType::Q4_K | QuantType::Q5_K => &[0, 2],
        QuantType::Q6_K => &[208],
        _ => &[0],
    };
    for block in bytes.chunks_mut(ty.block_bytes()) {
        for (i, byte) in block.iter_mut().enumerate() {
            let fresh = noise.bits() as u8;
            if !halves.iter().any(|h| i == *h || i == h + 1) {
                *byte = fresh;
            }
        }
    }
    bytes
}

/// Integer formats and F32 lie within the bound of `exact_row`, and near the reference, whose activations are the same; BF16
/// and F16 within the bounds that `matmul_float.cu` derives.
fn check(w: QMatrix<'_>, x: &[f32], got: &[f32], what: &str) {
    let (n, k, ty) = (w.rows(), w.cols(), w.ty());
    for (row, x) in x.chunks(k).enumerate() {
        if x.iter().any(|v| v.abs() > 3.3e38) {
            // Rounded to BF16, these are infinite.
            continue;
        }
        for i in 0..n {
            let got = f64::from(got[row * n + i]);
            let reference = f64::from(dot_row(ty, w.row(i), x).unwrap());
            let exact = exact_row(ty, w.row(i), x).unwrap();
            let mut weights = vec![0.0; k];
            dequantize_row(ty, w.row(i), &mut weights).unwrap();
            let size: f64 = weights.iter().zip(x).map(|(w, x)| (f64::from(*w) * f64::from(*x)).abs()).sum();
            if size > 1e37 || !got.is_finite() && !reference.is_finite() {
                // A partial sum may be infinite in one order and not in the other.
                continue;
            }
            let rounding = match ty {
                QuantType::BF16 => Some(2f64.powi(-8)),
                QuantType::F16 => Some(2f64.powi(-11)),
                _ => None,
            };
            let bound = match rounding {
                Some(of_activations) => {
                    // Denormal numbers lose more, or all.
                    let flushed: f64 = weights
                        .iter()
                        .zip(x)
                        .map(|(w, x)| 2.0 + f64::from(w.abs()) + f64::from(x.abs()))
                        .sum();
                    size * (of_activations + (k as f64 + 16.0) * 2f64.powi(-23)) + flushed * 2f64.powi(-126)
                }
                // The strands' eight additions are more roundings than short rows have.
                None => exact.bound + 16.0 * 2f64.powi(-24) * size,
            };
            let error = (got - exact.value).abs();
            assert!(
                error <= bound,
                "{what}: output {i} of row {row}: {got:e} for {:e}, bound {bound:e}",
                exact.value
            );
            if ty.block_len() > 1 {
                let near = exact.bound / 100.0 + 16.0 * 2f64.powi(-24) * size;
                assert!(
                    (got - reference).abs() <= near,
                    "{what}: {got:e}, reference {reference:e}, bound {near:e}"
                );
            }
        }
    }
}

fn weight_bytes(ty: QuantType, n: usize, noise: &mut Noise) -> Vec<u8> {
    if ty.block_len() == 1 { quantized(ty, &noise.values(n)) } else { arbitrary(ty, n, noise) }
}

#[test]
fn products_are_within_their_bounds() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(1);
    for ty in TYPES {
        let step = ty.block_len().max(1);
        // (weight rows, columns, rows)
        let mut shapes = vec![
            (1, step, 1),
            (16, 2 * step, 7),
            (17, 3 * step, 8),
            (70, 256, 9),
            (33, 1024 + 3 * step, 3),
            (5, 512, 70),
            (40, 5 * step.max(64), 17),
        ];
        if step == 1 {
            shapes.extend([(3, 15, 2), (20, 17, 9), (7, 529, 20), (4, 33, 65), (66, 40, 66)]);
        }
        if !emulated(cuda) {
            shapes.extend([(4096, 4096, 1), (1024, 14336, 8), (300, 4096, 200)]);
        }
        for (n, k, rows) in shapes {
            let x = noise.values(rows * k);
            let bytes = weight_bytes(ty, n * k, &mut noise);
            let w = QMatrix::new(ty, n, k, &bytes).unwrap();
            let got = matmul(cuda, &[w], &x, rows);
            check(w, &x, &got[0], &format!("{ty} {n} x {k}, {rows} rows"));
        }
    }
}

/// The kernel for few rows and the one for many add up in the same order.
#[test]
fn rows_are_the_same_in_every_batch() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(4);
    for (ty, n, k, rows) in [
        (QuantType::Q8_0, 37, 1184, 20),
        (QuantType::Q4_0, 19, 352, 70),
        (QuantType::Q4_K, 20, 1536, 12),
        (QuantType::Q5_K, 33, 256, 9),
        (QuantType::Q6_K, 16, 2304, 10),
        (QuantType::F16, 18, 1100, 12),
        (QuantType::BF16, 70, 1056, 12),
        (QuantType::F32, 9, 300, 12),
    ] {
        let x = noise.values(rows * k);
        let bytes = weight_bytes(ty, n * k, &mut noise);
        let w = QMatrix::new(ty, n, k, &bytes).unwrap();
        let all = matmul(cuda, &[w], &x, rows).remove(0);
        for (first, count) in [(0, 1), (rows - 1, 1), (1, 8), (0, rows - 1)] {
            let got = matmul(cuda, &[w], &x[first * k..(first + count) * k], count);
            assert_same(
                &got[0],
                &all[first * n..(first + count) * n],
                &format!("{ty}, rows {first} + {count}"),
            );
        }
    }
}

#[test]
fn several_products_of_one_input() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(2);
    let (k, rows) = (512, 9);
    let x = noise.values(rows * k);
    let types =
        [QuantType::Q4_K, QuantType::F16, QuantType::BF16, QuantType::Q8_0, QuantType::F32, QuantType::Q6_K];
    let bytes: Vec<_> = types.iter().map(|ty| quantized(*ty, &noise.values(20 * k))).collect();
    let w: Vec<_> = types.iter().zip(&bytes).map(|(ty, b)| QMatrix::new(*ty, 20, k, b).unwrap()).collect();
    for (w, got) in w.iter().zip(matmul(cuda, &w, &x, rows)) {
        check(*w, &x, &got, "several");
    }
}

#[test]
fn adversarial_values() {
    let Some(cuda) = device() else { return };
    // Two strands.
    let (n, k) = (18, 256);
    let mut noise = Noise(3);
    for rows in [2, 10] {
        let mut outliers = noise.values(rows * k);
        outliers.chunks_mut(32).enumerate().for_each(|(i, block)| block[i % 32] = 1e6);
        let inputs: Vec<(&str, Vec<f32>)> = vec![
            ("zeros", vec![0.0; rows * k]),
            ("denormal", vec![1e-41; rows * k]),
            ("tiny", noise.values(rows * k).iter().map(|v| v * 1e-36).collect()),
            ("largest", (0..rows * k).map(|i| if i % 3 == 0 { f32::MAX } else { -f32::MAX }).collect()),
            ("outliers", outliers),
            ("not a number", (0..rows * k).map(|i| if i == 300 { f32::NAN } else { 1.0 }).collect()),
            ("infinite", (0..rows * k).map(|i| if i == 5 { f32::INFINITY } else { 1.0 }).collect()),
        ];
        for ty in TYPES {
            let len = ty.bytes_for(n * k).unwrap();
            let weights: Vec<Vec<u8>> = vec![
                quantized(ty, &vec![1.0; n * k]),
                // Every bit set: the largest codes with the largest scales of their fields, or not a number.
                vec![0xff; len],
                // The same with a finite half (0x7bff) wherever one may lie.
                [0xff, 0x7b].repeat(len / 2),
                vec![0x80; len],
                vec![0; len],
            ];
            for bytes in &weights {
                let w = QMatrix::new(ty, n, k, bytes).unwrap();
                for (name, x) in &inputs {
                    let got = matmul(cuda, &[w], x, rows);
                    check(w, x, &got[0], &format!("{ty}, {name}"));
                    // What is not a number stays visible, in its own row and nowhere else.
                    for (row, values) in got[0].chunks(n).enumerate() {
                        let broken = x[row * k..(row + 1) * k].iter().any(|v| !v.is_finite());
                        if broken {
                            assert!(values.iter().all(|v| !v.is_finite()), "{ty}, {name}, row {row}");
                        } else if *name == "not a number" && bytes == &weights[0] {
                            assert!(values.iter().all(|v| v.is_finite()), "{ty}, {name}, row {row}");
                        }
                    }
                }
            }
        }
    }
}

/// A weight that was not loaded may change under its address; one that was is what it was.
#[test]
fn addresses_that_are_used_again() {
    let Some(_) = device() else { return };
    let cuda = Cuda::open(0).unwrap();
    let x = vec![1.0; 64];
    let mut values = vec![1.0f32; 64];
    let run = |values: &[f32]| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        bytes
    };
    let mut bytes = run(&values);
    let sum =
        |bytes: &[u8]| matmul(&cuda, &[QMatrix::new(QuantType::F32, 1, 64, bytes).unwrap()], &x, 1)[0][0];
    assert_eq!(sum(&bytes), 64.0);
    values.fill(2.0);
    bytes.copy_from_slice(&run(&values));
    assert_eq!(sum(&bytes), 128.0);
    cuda.load(QMatrix::new(QuantType::F32, 1, 64, &bytes).unwrap()).unwrap();
    assert_eq!(sum(&bytes), 128.0);
}
