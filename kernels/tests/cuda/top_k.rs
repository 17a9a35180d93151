//! The likeliest tokens of rows of logits: the bits of the reference.

use lory_kernels::Reference;
use lory_kernels::backend::{Backend, Likeliest};

use super::{Noise, device, in_both_orders, put};

/// Beyond this the device leaves the selection to the host.
const MOST: usize = 1024;

/// Tokens and the bits of their logits; NaN has many.
fn bits(rows: Option<Vec<Likeliest>>) -> Option<Vec<Vec<(u32, u32)>>> {
    let bits = |row: Likeliest| row.into_iter().map(|(token, logit)| (token, logit.to_bits())).collect();
    rows.map(|rows| rows.into_iter().map(bits).collect())
}

/// Compares with the reference; returns what it found.
fn check(
    logits: &[f32],
    width: usize,
    real: usize,
    rows: &[u32],
    k: usize,
    what: &str,
) -> Vec<Vec<(u32, u32)>> {
    let Some(cuda) = device() else { return Vec::new() };
    let got = bits(cuda.top_k(&put(cuda, logits), width, real, rows, k).unwrap()).unwrap();
    let want = bits(Reference.top_k(&logits.to_vec(), width, real, rows, k).unwrap()).unwrap();
    assert_eq!(got.len(), rows.len(), "{what}");
    for ((got, want), row) in got.iter().zip(&want).zip(rows) {
        let first = got.iter().zip(want).position(|(g, w)| g != w);
        assert!(got == want, "{what}, {k} of {real}: row {row} differs first at {first:?}");
    }
    got
}

/// Widths within one piece, of one, just beyond it, and of so many that they are reduced more than twice.
#[test]
fn any_shape() {
    let mut noise = Noise(51);
    for (width, real) in [(1, 1), (37, 33), (4096, 4096), (4099, 4097), (9001, 8999), (70_001, 70_000)] {
        // Coarse ones with many ties, too.
        for coarse in [false, true] {
            let logits: Vec<f32> = (0..3 * width)
                .map(|_| if coarse { (noise.value() * 40.0).round() / 4.0 } else { noise.value() * 20.0 })
                .collect();
            for k in [1, 2, 40, 255, MOST].into_iter().filter(|k| width < 10_000 || [1, MOST].contains(k)) {
                check(&logits, width, real, &[2, 0], k, &format!("coarse: {coarse}"));
            }
        }
    }
}

#[test]
fn values_without_a_place_among_numbers() {
    const INF: f32 = f32::INFINITY;
    let width = 5000;
    let mut noise = Noise(52);
    let row = |change: &[(usize, f32)], noise: &mut Noise| {
        let mut row = noise.values(width);
        change.iter().for_each(|(at, value)| row[*at] = *value);
        row
    };
    let logits = [
        vec![-INF; width],
        vec![1.5; width],
        // The lowest of those that are no number first, whatever they are.
        row(&[(4500, INF), (4097, -f32::NAN), (4999, f32::NAN)], &mut noise),
        row(&[(3, INF), (4999, f32::NAN)], &mut noise),
        // Zeros of both signs, subnormal numbers, the largest ones.
        (0..width).map(|i| [0.0, -0.0, 1e-45, -1e-45][i % 4]).collect(),
        row(&[(0, f32::MAX), (1, f32::MIN), (2, -INF)], &mut noise),
        // All but a few are forbidden.
        (0..width).map(|i| if i % 1000 == 7 { i as f32 } else { -INF }).collect(),
    ]
    .concat();
    let rows: Vec<u32> = (0..7).collect();
    for k in [1, 40, MOST] {
        let found = check(&logits, width, width - 1, &rows, k, "special values");
        if device().is_some() {
            assert!(found[0].is_empty());
            assert_eq!(found[1].first(), Some(&(0, 1.5f32.to_bits())));
            assert_eq!((found[2][0].0, found[3][0]), (4097, (3, INF.to_bits())));
            assert_eq!(found[6].len(), k.min(5));
        }
    }
    // The NaN is padding.
    let found = check(&logits, width, 4999, &[3], 2, "padding");
    assert!(found.iter().all(|row| row[1].0 != 4999));
}

#[test]
fn bounds() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(53);
    let width = 1500;
    let logits = noise.values(70 * width);
    let rows: Vec<u32> = (0..70).rev().collect();
    // More rows than go at a time, any of them more than once.
    check(&logits, width, width, &[&rows[..], &[5, 5]].concat(), 3, "many rows");
    check(&logits, width, width, &[], 3, "no rows");
    check(&logits, width, 0, &[1], 3, "no tokens");
    check(&logits, width, width, &[1], 0, "none");
    // All of few tokens are no more than there are.
    check(&logits, width, 900, &[1], 5000, "all");
    assert_eq!(cuda.top_k(&put(cuda, &logits), width, width, &[1], MOST + 1).unwrap(), None);
}

#[test]
fn the_order_of_threads_does_not_matter() {
    let mut noise = Noise(54);
    let logits: Vec<f32> = (0..9000).map(|_| (noise.value() * 50.0).round()).collect();
    in_both_orders(|| check(&logits, 9000, 9000, &[0], 300, "either order"));
}
