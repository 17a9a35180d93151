//! Norms, rotations, gated units, and what only moves lines.

use lory_kernels::backend::{Activation, Backend, Rope, RopeStyle};
use lory_kernels::{QMatrix, Reference};

use super::{Noise, TYPES, assert_near, assert_same, device, put, quantized, take};

#[test]
fn norms() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(11);
    for (rows, width) in [(1, 1), (3, 7), (2, 256), (5, 1000), (300, 64)] {
        let x: Vec<f32> = noise.values(rows * width).iter().map(|v| v * 50.0).collect();
        let weight = noise.values(width);
        let run = |inplace: bool| {
            let mut x = put(cuda, &x);
            if inplace {
                cuda.rms_norm_inplace(&mut x, rows, &weight, 1e-5).unwrap();
                return take(cuda, &x, rows * width);
            }
            let mut out = put(cuda, &vec![f32::NAN; rows * width]);
            cuda.rms_norm(&x, rows, &weight, 1e-5, &mut out).unwrap();
            take(cuda, &out, rows * width)
        };
        let mut want = x.clone();
        Reference.rms_norm_inplace(&mut want, rows, &weight, 1e-5).unwrap();
        let got = run(false);
        let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        // Sums in another order: (width / 16 + width / 256 + 20) roundings, halved by the root.
        let bound = largest * (width as f32 / 24.0 + 20.0) * 2f32.powi(-24);
        assert_near(&got, &want, bound, &format!("{rows} x {width}"));
        assert_same(&run(true), &got, "in place");
    }
}

#[test]
fn rotations() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(12);
    for style in [RopeStyle::Interleaved, RopeStyle::Neox] {
        for (heads, head_dim, pairs) in [(1, 2, 1), (3, 64, 32), (2, 80, 20)] {
            let rope = Rope {
                style,
                inv_freq: (0..pairs).map(|i| 10_000f32.powf(-(i as f32) / pairs as f32)).collect(),
                magnitude: 1.25,
            };
            // Twice, so that the second finds its table; then others.
            for positions in [&[0u32, 1, 131_071, 77][..], &[0, 1, 131_071, 77], &[5]] {
                let x = noise.values(positions.len() * heads * head_dim);
                let mut got = put(cuda, &x);
                cuda.rope(&mut got, heads, head_dim, positions, &rope).unwrap();
                let mut want = x.clone();
                Reference.rope(&mut want, heads, head_dim, positions, &rope).unwrap();
                // The sines of two libraries differ in the last bit of a double: one in a float at most.
                assert_near(&take(cuda, &got, x.len()), &want, 4e-7, &format!("{style:?} {positions:?}"));
            }
        }
    }
}

#[test]
fn gated_units_and_caps_have_the_bits_of_the_reference() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(13);
    let n = 1500;
    let mut x: Vec<f32> = noise.values(n).iter().map(|v| v * 120.0).collect();
    x[..6].copy_from_slice(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40]);
    let y = noise.values(n);
    for act in [Activation::Silu, Activation::GeluTanh] {
        let mut got = put(cuda, &x);
        cuda.glu(act, &mut got, &put(cuda, &y), n - 3).unwrap();
        let mut want = x.clone();
        Reference.glu(act, &mut want, &y, n - 3).unwrap();
        assert_same(&take(cuda, &got, n), &want, &format!("{act:?}"));
    }
    let mut got = put(cuda, &x);
    cuda.softcap(&mut got, n - 1, 30.0).unwrap();
    let mut want = x.clone();
    Reference.softcap(&mut want, n - 1, 30.0).unwrap();
    assert_same(&take(cuda, &got, n), &want, "softcap");
}

#[test]
fn lines_that_move() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(14);
    let (rows, width) = (50, 37);
    let (x, y, bias) = (noise.values(rows * width), noise.values(rows * width), noise.values(width));
    fn all<B: Backend>(b: &B, x: &[f32], y: &[f32], bias: &[f32]) -> Vec<f32> {
        let (rows, width) = (x.len() / bias.len(), bias.len());
        let (mut x, y) = (put(b, x), put(b, y));
        b.add(&mut x, &y, rows * width - 5).unwrap();
        b.add_bias(&mut x, rows, bias).unwrap();
        let mut gathered = b.alloc(3 * width).unwrap();
        b.gather(&x, width, &[49, 0, 12], &mut gathered).unwrap();
        [take(b, &x, rows * width), take(b, &gathered, 3 * width)].concat()
    }
    assert_same(&all(cuda, &x, &y, &bias), &all(&Reference, &x, &y, &bias), "lines");
    let mut one = [0.0];
    cuda.download(&put(cuda, &x), 17, &mut one).unwrap();
    assert_eq!(one[0], x[17]);
    // The same array with other values: not the copy of before.
    let mut bias = vec![1.0f32; 4];
    let mut z = put(cuda, &[0.0; 4]);
    cuda.add_bias(&mut z, 1, &bias).unwrap();
    bias.fill(10.0);
    cuda.add_bias(&mut z, 1, &bias).unwrap();
    assert_eq!(take(cuda, &z, 4), [11.0; 4]);
}

#[test]
fn embeddings_have_the_bits_of_the_reference() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(15);
    for ty in TYPES {
        let bytes = quantized(ty, &noise.values(8 * 512));
        let table = QMatrix::new(ty, 8, 512, &bytes).unwrap();
        let tokens = [3, 0, 7, 7];
        let mut got = put(cuda, &[f32::NAN; 4 * 512]);
        cuda.embed(table, &tokens, 3.0, &mut got).unwrap();
        let mut want = vec![0.0; 4 * 512];
        Reference.embed(table, &tokens, 3.0, &mut want).unwrap();
        assert_same(&take(cuda, &got, want.len()), &want, ty.name());
    }
}
