//! Products: every format, level and thread count gives the bits of the reference.

use lory_kernels::backend::{Backend, MatmulJob};
use lory_kernels::cpu::{Cpu, Level};
use lory_kernels::quant::dequantize_row;
use lory_kernels::quant::format::FORMATS;
use lory_kernels::{QMatrix, QuantType, Reference};

use super::{Noise, assert_same, cpus, levels, quantized};

fn matmul<B: Backend<Buffer = Vec<f32>>>(
    b: &B,
    w: &[QMatrix<'_>],
    x: &Vec<f32>,
    rows: usize,
) -> Vec<Vec<f32>> {
    let mut out: Vec<_> = w.iter().map(|w| vec![f32::NAN; rows * w.rows()]).collect();
    let mut jobs: Vec<_> =
        w.iter().zip(&mut out).map(|(weight, out)| MatmulJob { weight: *weight, out }).collect();
    b.matmul(x, rows, &mut jobs).unwrap();
    out
}

/// Blocks of any bits, but with scales (the half-precision fields) that are numbers.
fn arbitrary(ty: QuantType, n: usize, noise: &mut Noise) -> Vec<u8> {
    let mut bytes = quantized(ty, &noise.values(n));
    let fresh: Vec<u8> = bytes.iter().map(|_| noise.bits() as u8).collect();
    let halves: &[usize] = match ty {
        QuantType::Q4_1 | QuantType::Q5_1 | QuantType::Q4_K | QuantType::Q5_K => &[0, 2],
        QuantType::Q2_K => &[80, 82],
        QuantType::Q3_K => &[108],
        QuantType::Q6_K => &[208],
        _ => &[0],
    };
    for (bytes, fresh) in bytes.chunks_mut(ty.block_bytes()).zip(fresh.chunks(ty.block_bytes())) {
        for i in 0..bytes.len() {
            if !halves.iter().any(|h| i == *h || i == h + 1) {
                bytes[i] = fresh[i];
            }
        }
    }
    bytes
}

/// Checks a product; BF16 weights at the levels that multiply them as such have a bound instead of the reference's bits.
fn check(cpu: &Cpu, w: QMatrix<'_>, x: &[f32], got: &[f32], want: &[f32], what: &str) {
    if w.ty() != QuantType::BF16 || cpu.isa().level() < Level::Avx512Bf16 {
        return assert_same(got, want, what);
    }
    let (n, k) = (w.rows(), w.cols());
    let mut weights = vec![0.0; n * k];
    dequantize_row(w.ty(), w.bytes(), &mut weights).unwrap();
    for (row, x) in x.chunks(k).enumerate() {
        if x.iter().any(|v| v.abs() > 3.3e38) {
            // Rounded, these are infinite.
            continue;
        }
        for (i, w) in weights.chunks(k).enumerate() {
            let (got, want) = (f64::from(got[row * n + i]), f64::from(want[row * n + i]));
            let size: f64 = w.iter().zip(x).map(|(w, x)| (f64::from(*w) * f64::from(*x)).abs()).sum();
            if size > 1e38 {
                // A partial sum may be infinite in one order and not in the other.
                continue;
            }
            let error = 2f64.powi(-8)
                + (k as f64 / 16.0 + 12.0).max(k as f64 / 32.0 + 18.0) * 2f64.powi(-24)
                + (k as f64 / 16.0 + 6.0) * 2f64.powi(-24);
            let flushed: f64 =
                w.iter().zip(x).map(|(w, x)| 2.0 + f64::from(w.abs()) + f64::from(x.abs())).sum();
            let bound = size * error + flushed * 2f64.powi(-126);
            let both_not = !got.is_finite() && !want.is_finite();
            assert!(both_not || (got - want).abs() <= bound, "{what}: {got:e} for {want:e}, bound {bound:e}");
        }
    }
}

fn is_float(ty: QuantType) -> bool {
    ty.block_len() == 1
}

#[test]
fn products_have_the_bits_of_the_reference() {
    let cpus = cpus();
    let mut noise = Noise(1);
    for format in FORMATS {
        let ty = format.ty;
        let step = if is_float(ty) { 1 } else { ty.block_len() };
        // (weight rows, columns, rows)
        let mut shapes = vec![
            (1, step, 1),
            (16, 2 * step, 7),
            (17, 3 * step, 13),
            (100, 256, 5),
            (33, 1024 + 3 * step, 6),
            (5, 512, 70),
            (48, 1536, 2),
            (600, step, 16),
        ];
        if is_float(ty) {
            shapes.extend([(3, 15, 2), (20, 17, 9), (7, 529, 50), (4, 33, 100), (40, 64, 3), (16, 16, 50)]);
            // Several stretches of columns, which are the longer the fewer rows there are.
            shapes.extend([
                (5, 8208, 1),
                (19, 2080, 2),
                (18, 1040, 3),
                (17, 1552, 4),
                (33, 528, 8),
                (9, 560, 11),
            ]);
        }
        // Every remainder of weight rows, activation rows and, where a format has them, columns.
        for i in 0..33 {
            let columns = if is_float(ty) { 1 + 7 * i % 33 } else { step * (1 + i % 3) };
            shapes.push((1 + i, columns, 1 + i % 13));
        }
        for _ in 0..4 {
            let columns = step * (1 + noise.below(1600 / step));
            shapes.push((1 + noise.below(70), columns, 1 + noise.below(40)));
        }
        for (n, k, rows) in shapes {
            let x = noise.values(rows * k);
            let bytes = if is_float(ty) {
                quantized(ty, &noise.values(n * k))
            } else {
                arbitrary(ty, n * k, &mut noise)
            };
            let w = QMatrix::new(ty, n, k, &bytes).unwrap();
            let want = matmul(&Reference, &[w], &x, rows);
            for cpu in &cpus {
                let got = matmul(cpu, &[w], &x, rows);
                check(
                    cpu,
                    w,
                    &x,
                    &got[0],
                    &want[0],
                    &format!("{ty} {n} x {k}, {rows} rows, {}", cpu.label()),
                );
            }
        }
    }
}

/// With few activation rows, the sixteen rows of a panel are apart, as far as a task has panels: here up to five, and eight where all rows would
/// meet in the same sets of a cache.
#[test]
fn panels_whose_rows_are_apart() {
    let mut noise = Noise(9);
    for format in FORMATS.iter().filter(|format| !is_float(format.ty)) {
        let ty = format.ty;
        let mut shapes = vec![(777, 1024, 1), (777, 1024, 3), (777, 1024, 8)];
        if ty == QuantType::Q4_0 {
            // Rows of 2304 bytes.
            shapes.push((16 * 12 * 8, 4096, 2));
        }
        for (n, k, rows) in shapes {
            let (bytes, x) = (arbitrary(ty, n * k, &mut noise), noise.values(rows * k));
            let w = QMatrix::new(ty, n, k, &bytes).unwrap();
            let want = matmul(&Reference, &[w], &x, rows);
            for cpu in &cpus() {
                let got = matmul(cpu, &[w], &x, rows);
                assert_same(&got[0], &want[0], &format!("{ty} {n} x {k}, {rows} rows, {}", cpu.label()));
            }
        }
    }
}

#[test]
fn repacked_weights_give_the_bits_of_the_reference() {
    let mut noise = Noise(7);
    for format in FORMATS {
        let (ty, step) = (format.ty, format.ty.block_len());
        // Weight rows that do and do not fill panels and strips; rows for every kernel: one, few, tiles.
        let shapes = [
            (1, step, 1),
            (16, 2 * step, 2),
            (17, 1024, 3),
            (47, 512 + step, 7),
            (64, 1536, 8),
            (100, 768, 70),
        ];
        for (n, k, rows) in shapes {
            let k = k.next_multiple_of(step);
            let x = noise.values(rows * k);
            let bytes = if is_float(ty) {
                quantized(ty, &noise.values(n * k))
            } else {
                arbitrary(ty, n * k, &mut noise)
            };
            let w = QMatrix::new(ty, n, k, &bytes).unwrap();
            // The same bytes as another matrix: found by its address, but not to be mistaken.
            let half = QMatrix::new(ty, n.div_ceil(2), k, &bytes[..n.div_ceil(2) * w.row_bytes()]).unwrap();
            let want = matmul(&Reference, &[w, half], &x, rows);
            for isa in levels() {
                let cpu = Cpu::new(Some(2), isa).with_repacking();
                cpu.load(w).unwrap();
                let packs =
                    [QuantType::Q8_0, QuantType::Q4_0, QuantType::Q4_K, QuantType::Q5_K, QuantType::Q6_K];
                let repacked = if packs.contains(&ty) { n.next_multiple_of(16) * w.row_bytes() } else { 0 };
                assert_eq!(cpu.repacked_bytes(), repacked.next_multiple_of(64), "{ty} {n} x {k}");
                let got = matmul(&cpu, &[w, half], &x, rows);
                for ((w, got), want) in [w, half].into_iter().zip(&got).zip(&want) {
                    let what = format!("{ty} {} x {k}, {rows} rows, {} repacked", w.rows(), cpu.label());
                    check(&cpu, w, &x, got, want, &what);
                }
            }
        }
    }
}

#[test]
fn several_products_of_one_input() {
    let mut noise = Noise(2);
    let (k, rows) = (512, 9);
    let x = noise.values(rows * k);
    let types = [QuantType::Q4_K, QuantType::Q6_K, QuantType::F16, QuantType::Q8_0, QuantType::Q4_K];
    let bytes: Vec<_> = types.iter().map(|ty| quantized(*ty, &noise.values(40 * k))).collect();
    let w: Vec<_> = types.iter().zip(&bytes).map(|(ty, b)| QMatrix::new(*ty, 40, k, b).unwrap()).collect();
    let want = matmul(&Reference, &w, &x, rows);
    for isa in levels() {
        for threads in [1, 2, 8, 128] {
            let cpu = Cpu::new(Some(threads), isa);
            for (got, want) in matmul(&cpu, &w, &x, rows).iter().zip(&want) {
                assert_same(got, want, &cpu.label());
            }
        }
    }
}

#[test]
fn adversarial_values() {
    let (n, k, rows) = (18, 768, 4);
    let mut noise = Noise(3);
    let outlier = |noise: &mut Noise| {
        let mut x = noise.values(rows * k);
        x.chunks_mut(32).enumerate().for_each(|(i, block)| block[i % 32] = 1e6);
        x
    };
    let inputs: Vec<(&str, Vec<f32>)> = vec![
        ("zeros", vec![0.0; rows * k]),
        ("all equal", vec![-0.7; rows * k]),
        ("denormal", vec![1e-41; rows * k]),
        ("tiny", noise.values(rows * k).iter().map(|v| v * 1e-36).collect()),
        ("largest", (0..rows * k).map(|i| if i % 3 == 0 { f32::MAX } else { -f32::MAX }).collect()),
        ("outliers", outlier(&mut noise)),
        ("alternating", (0..rows * k).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect()),
        ("not a number", (0..rows * k).map(|i| if i == 700 { f32::NAN } else { 1.0 }).collect()),
        ("infinite", (0..rows * k).map(|i| if i == 5 { f32::INFINITY } else { 1.0 }).collect()),
    ];
    let cpus: Vec<Cpu> = levels().into_iter().map(|isa| Cpu::new(Some(1), isa)).collect();
    for format in FORMATS {
        let ty = format.ty;
        let weights: Vec<Vec<u8>> = vec![
            quantized(ty, &vec![1.0; n * k]),
            // Every bit set: the largest codes with the largest scales of their fields, or not a number.
            vec![0xff; ty.bytes_for(n * k).unwrap()],
            // The same with a finite half (0x7bff) wherever one may lie.
            [0xff, 0x7b].repeat(ty.bytes_for(n * k).unwrap() / 2),
            vec![0x80; ty.bytes_for(n * k).unwrap()],
            vec![0; ty.bytes_for(n * k).unwrap()],
        ];
        for bytes in &weights {
            let w = QMatrix::new(ty, n, k, bytes).unwrap();
            for (name, x) in &inputs {
                let want = matmul(&Reference, &[w], x, rows);
                for cpu in &cpus {
                    let got = matmul(cpu, &[w], x, rows);
                    check(cpu, w, x, &got[0], &want[0], &format!("{ty}, {name}, {}", cpu.label()));
                }
            }
        }
    }
}

/// A row's outputs do not depend on its batch or on threads, whatever the level does with BF16.
#[test]
fn rows_are_the_same_in_every_batch() {
    let mut noise = Noise(4);
    let (n, k, rows) = (53, 1056, 60);
    let x = noise.values(rows * k);
    for ty in [QuantType::BF16, QuantType::F16, QuantType::Q5_0] {
        let bytes = quantized(ty, &noise.values(n * k));
        let w = QMatrix::new(ty, n, k, &bytes).unwrap();
        for isa in levels() {
            let want = matmul(&Cpu::new(Some(1), isa), &[w], &x, rows).remove(0);
            for (threads, first, count) in
                [(8, 0, 60), (2, 59, 1), (1, 3, 2), (3, 7, 17), (1, 0, 33), (2, 20, 7)]
            {
                let some = x[first * k..(first + count) * k].to_vec();
                let got = matmul(&Cpu::new(Some(threads), isa), &[w], &some, count);
                let want = &want[first * n..(first + count) * n];
                assert_same(
                    &got[0],
                    want,
                    &format!("{ty}, rows {first} + {count}, {threads} threads, {}", isa.level()),
                );
            }
        }
    }
}
