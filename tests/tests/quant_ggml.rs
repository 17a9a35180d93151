//! Every weight format against ggml itself, which is the oracle: what it writes we read bit for bit,
//! what we write it reads bit for bit, and our quantizers are as good as its own.
#![cfg(feature = "ggml")]

use llama_cpp_sys_2 as ggml;
use lory_kernels::backend::{Backend, MatmulJob};
use lory_kernels::cpu::Isa;
use lory_kernels::quant::{Dot, FORMATS, dequantize_row, dot_row, exact_row, quantize_row};
use lory_kernels::{Cpu, QMatrix, QuantType, Reference};

/// A xorshift generator: the same data on every machine.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Roughly normal, deviation 1.
    fn normals(&mut self, n: usize) -> Vec<f32> {
        let mut value = || (self.bits() >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
        (0..n).map(|_| (0..12).map(|_| value()).sum::<f32>() / 2.0).collect()
    }
}

const N: usize = 2048;

fn ggml_quantized(ty: QuantType, x: &[f32]) -> Vec<u8> {
    let mut buffer = vec![0u64; ty.bytes_for(x.len()).unwrap().div_ceil(8)];
    // SAFETY: one row of whole blocks; the buffer has the row's size and is aligned; no format
    // that this test writes asks for importances.
    let written = unsafe {
        assert!(!ggml::ggml_quantize_requires_imatrix(ty as _));
        let (src, dst) = (x.as_ptr(), buffer.as_mut_ptr().cast());
        ggml::ggml_quantize_chunk(ty as _, src, dst, 0, 1, x.len() as i64, std::ptr::null())
    };
    let mut bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_ne_bytes()).collect();
    bytes.truncate(written);
    assert_eq!(Some(written), ty.bytes_for(x.len()));
    bytes
}

fn ggml_dequantized(ty: QuantType, bytes: &[u8]) -> Vec<f32> {
    let n = bytes.len() / ty.block_bytes() * ty.block_len();
    let mut out = vec![0f32; n];
    let mut aligned = vec![0u64; bytes.len().div_ceil(8)];
    for (word, chunk) in aligned.iter_mut().zip(bytes.chunks(8)) {
        let mut padded = [0; 8];
        padded[..chunk.len()].copy_from_slice(chunk);
        *word = u64::from_ne_bytes(padded);
    }
    // SAFETY: the type is in ggml's table; the buffer holds `n` weights and is aligned.
    unsafe {
        match (*ggml::ggml_get_type_traits(ty as _)).to_float {
            Some(to_float) => to_float(aligned.as_ptr().cast(), out.as_mut_ptr(), n as i64),
            None if ty == QuantType::F32 => {
                out = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            }
            None => panic!("ggml does not read {ty}"),
        }
    }
    out
}

fn quantized(ty: QuantType, x: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; ty.bytes_for(x.len()).unwrap()];
    quantize_row(ty, x, &mut bytes).unwrap();
    bytes
}

fn dequantized(ty: QuantType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / ty.block_bytes() * ty.block_len()];
    dequantize_row(ty, bytes, &mut out).unwrap();
    out
}

/// Equal bits, or both NaN (whose payload C does not define).
fn assert_same(ty: QuantType, name: &str, ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len());
    for (k, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let same = a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(same, "{ty}, {name}, weight {k}: ours {a:e}, ggml's {b:e}");
    }
}

fn rmse(x: &[f32], y: &[f32]) -> f64 {
    let squares = x.iter().zip(y).map(|(x, y)| (f64::from(*x) - f64::from(*y)).powi(2));
    (squares.sum::<f64>() / x.len() as f64).sqrt()
}

/// Finite rows, with names: what quantizers meet and what breaks them.
fn rows() -> Vec<(&'static str, Vec<f32>)> {
    let noise = Random(0x5eed).normals(N);
    let scaled = |factor: f32| noise.iter().map(|v| v * factor).collect::<Vec<f32>>();
    let mut outliers = scaled(0.01);
    outliers.iter_mut().step_by(32).for_each(|v| *v = 10.0);
    let mut negative_outliers = scaled(0.01);
    negative_outliers.iter_mut().skip(5).step_by(32).for_each(|v| *v = -10.0);
    vec![
        ("normal", noise.clone()),
        ("weights of a model", scaled(0.02)),
        ("uniform", (0..N).map(|k| (k as f32 * 0.618).fract() - 0.5).collect()),
        ("heavy tails", noise.iter().map(|v| v * v * v).collect()),
        ("shifted up", noise.iter().map(|v| v + 5.0).collect()),
        ("shifted down", noise.iter().map(|v| v - 5.0).collect()),
        ("sparse", noise.iter().enumerate().map(|(k, v)| if k % 7 == 0 { *v } else { 0.0 }).collect()),
        ("ramp", (0..N).map(|k| k as f32 / N as f32 - 0.5).collect()),
        ("one outlier per block", outliers),
        ("one negative outlier per block", negative_outliers),
        ("all equal", vec![0.3; N]),
        ("all equal and negative", vec![-0.3; N]),
        ("two values", (0..N).map(|k| if k % 3 == 0 { 1.0 } else { -1.0 }).collect()),
        ("zeros", vec![0.0; N]),
        ("small", scaled(1e-4)),
        ("denormal", scaled(1e-40)),
        ("large", scaled(1e4)),
    ]
}

#[test]
fn the_tables_agree() {
    for ty in QuantType::all() {
        // SAFETY: every number of our table is one of ggml's.
        let traits = unsafe { &*ggml::ggml_get_type_traits(ty as _) };
        // SAFETY: a constant of ggml, ended by zero.
        let name = unsafe { std::ffi::CStr::from_ptr(traits.type_name) }.to_str().unwrap();
        assert!(ty.name().eq_ignore_ascii_case(name), "{ty} is {name}");
        assert_eq!(ty.block_len() as i64, traits.blck_size, "{ty}");
        assert_eq!(ty.block_bytes(), traits.type_size, "{ty}");
        let readable = traits.to_float.is_some() || ty == QuantType::F32;
        assert_eq!(ty.is_readable(), readable, "{ty}");
    }
}

#[test]
fn what_ggml_writes_we_read_bit_for_bit() {
    for (name, x) in rows() {
        for format in FORMATS {
            let bytes = ggml_quantized(format.ty, &x);
            let theirs = ggml_dequantized(format.ty, &bytes);
            assert_same(format.ty, name, &dequantized(format.ty, &bytes), &theirs);
        }
    }
}

#[test]
fn any_bytes_mean_the_same() {
    let mut random = Random(0xb17e5);
    for format in FORMATS {
        let ty = format.ty;
        let bytes: Vec<u8> = (0..ty.block_bytes() * 512).map(|_| (random.bits() >> 56) as u8).collect();
        assert_same(ty, "random bytes", &dequantized(ty, &bytes), &ggml_dequantized(ty, &bytes));
    }
}

#[test]
fn what_we_write_ggml_reads_bit_for_bit() {
    for (name, x) in rows() {
        for format in FORMATS {
            let bytes = quantized(format.ty, &x);
            let theirs = ggml_dequantized(format.ty, &bytes);
            assert_same(format.ty, name, &dequantized(format.ty, &bytes), &theirs);
        }
    }
}

#[test]
fn float_and_legacy_formats_are_written_as_ggml_writes_them() {
    use QuantType as T;
    for (name, x) in rows() {
        // Below half precision's steps ggml divides by zero on the way; and it writes codes
        // for scales that are zero.
        if name == "denormal" {
            continue;
        }
        for ty in [T::F32, T::F16, T::BF16, T::Q8_0, T::Q4_0, T::Q4_1, T::Q5_0, T::Q5_1] {
            assert_eq!(quantized(ty, &x), ggml_quantized(ty, &x), "{ty}, {name}");
        }
    }
}

#[test]
fn our_quantizers_are_as_good_as_ggml_s() {
    let mut worse = Vec::new();
    for (name, x) in rows() {
        for format in FORMATS {
            let ours = rmse(&x, &dequantized(format.ty, &quantized(format.ty, &x)));
            let theirs = rmse(&x, &ggml_dequantized(format.ty, &ggml_quantized(format.ty, &x)));
            println!(
                "{:8} {name:32} ours {ours:.4e} ggml {theirs:.4e} ratio {:.3}",
                format.ty,
                ours / theirs
            );
            if ours > 1.03 * theirs {
                worse.push(format!("{}, {name}: {ours:e} against {theirs:e}", format.ty));
            }
        }
    }
    assert!(worse.is_empty(), "worse than 1.03 times ggml's error:\n{}", worse.join("\n"));
}

#[test]
fn products_lie_within_their_bound_of_the_exact_one() {
    // The exact product is taken from ggml's reading of the weights, the bound is derived in
    // `quant::bound`: half a step of each activation, and the roundings of the sum.
    let mut random = Random(0xd07);
    for (name, w) in rows() {
        let x = random.normals(N);
        for format in FORMATS {
            let bytes = ggml_quantized(format.ty, &w);
            let weights = ggml_dequantized(format.ty, &bytes);
            if !weights.iter().all(|w| w.is_finite()) {
                continue;
            }
            let exact: f64 = weights.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let bound = exact_row(format.ty, &bytes, &x).unwrap().bound;
            let error = (f64::from(dot_row(format.ty, &bytes, &x).unwrap()) - exact).abs();
            assert!(error <= bound, "{}, {name}: off by {error:e}, bound {bound:e}", format.ty);
            if matches!(format.dot, Dot::Int(_)) && error > 0.0 {
                assert!(bound < 0.05 * magnitude(&weights, &x), "{}, {name}: {bound:e}", format.ty);
            }
        }
    }
}

fn magnitude(w: &[f32], x: &[f32]) -> f64 {
    w.iter().zip(x).map(|(w, x)| f64::from((w * x).abs())).sum()
}

#[test]
fn other_formats_run_through_ggml() {
    let mut random = Random(0x199);
    let (w, x) = (random.normals(N), random.normals(N));
    let mut seen = 0;
    for ty in QuantType::all().filter(|ty| ty.ggml_reads()) {
        assert!(!ty.is_native() && ty.is_readable(), "{ty}");
        let bytes = quantized(ty, &w);
        let weights = dequantized(ty, &bytes);
        assert_same(ty, "normal", &weights, &ggml_dequantized(ty, &bytes));
        // Ternary formats are made for ternary weights, and on others leave this much.
        let error = rmse(&w, &weights) / rmse(&w, &vec![0.0; N]);
        println!("{ty:8} relative error {error:.3}");
        assert!(error < 0.8, "{ty}: {error}");

        // An odd address reads the same.
        let mut shifted = vec![0u8];
        shifted.extend_from_slice(&bytes);
        let mut again = vec![0.0; N];
        dequantize_row(ty, &shifted[1..], &mut again).unwrap();
        assert_eq!(weights, again, "{ty}");

        let exact: f64 = weights.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        let error = (f64::from(dot_row(ty, &bytes, &x).unwrap()) - exact).abs();
        assert!(error < 1e-5 * magnitude(&weights, &x), "{ty}: {error:e}");
        seen += 1;
    }
    assert_eq!(seen, 13);
}

#[test]
fn both_backends_multiply_other_formats() {
    fn product<B: Backend<Buffer = Vec<f32>>>(backend: &B, weight: QMatrix<'_>, x: &Vec<f32>) -> Vec<f32> {
        assert!(backend.supports(weight.ty()));
        let mut out = vec![0.0; weight.rows() * x.len() / weight.cols()];
        let jobs = &mut [MatmulJob { weight, out: &mut out }];
        backend.matmul(x, x.len() / weight.cols(), jobs).unwrap();
        out
    }
    let mut random = Random(0xbacc);
    let (w, x) = (random.normals(20 * 256), random.normals(3 * 256));
    // Formats without tables that take their time to build; reading is the same for all.
    for ty in [QuantType::MXFP4, QuantType::NVFP4, QuantType::TQ1_0, QuantType::Q2_0] {
        let bytes = quantized(ty, &w);
        let weight = QMatrix::new(ty, 20, 256, &bytes).unwrap();
        let want = product(&Reference, weight, &x);
        assert_eq!(want[21], dot_row(ty, weight.row(1), &x[256..512]).unwrap(), "{ty}");
        assert_eq!(product(&Cpu::new(Some(2), Isa::detect()), weight, &x), want, "{ty}");
    }
}

#[test]
fn other_formats_take_hostile_rows() {
    for (name, x) in rows() {
        for bad in [None, Some(f32::NAN), Some(f32::INFINITY), Some(f32::MIN)] {
            // One block of 256 each: ggml's searches for these formats are slow.
            let mut x = x[256..512].to_vec();
            if let Some(bad) = bad {
                x.iter_mut().step_by(100).for_each(|v| *v = bad);
            }
            for ty in QuantType::all().filter(|ty| ty.ggml_reads()) {
                let weights = dequantized(ty, &quantized(ty, &x));
                assert!(weights.iter().all(|w| w.is_finite()), "{ty}, {name}, {bad:?}");
            }
        }
    }
}
