//! JD-Diag: free U and V with one diagonal core per adapter, by alternating least squares.
//!
//! min Σ_i ‖L_i R_iᵀ − U diag(σ_i) Vᵀ‖² over the normalised deltas; in tensor words a CP decomposition.
//! Plain ALS stalls, so it first runs on the small core tensor of a JD-Full solution from several starts
//! (a round there costs n·r³), then in the full space from the best of them, and the best round is kept.

use faer::{Mat, MatRef};

use crate::factors::Stack;
use crate::full::Full;
use crate::linalg;
use crate::rng::Rng;

/// Rounds on the core tensor, the authors' number.
const CORE_ROUNDS: usize = 100;
/// Rounds in the full space.
const FULL_ROUNDS: usize = 20;
/// Random starts beside the two that are derived from the cores.
const RANDOM_STARTS: u64 = 2;
/// Stop when a round improves the mean squared error by less than this part of it.
const GAIN: f64 = 1e-6;

/// A basis with diagonal cores.
#[derive(Clone, Debug)]
pub struct Diag {
    /// d_out × r, columns of unit norm.
    pub u: Mat<f32>,
    /// d_in × r, columns of unit norm.
    pub v: Mat<f32>,
    /// Σ_i err²_i over the normalised deltas.
    pub error: f64,
}

/// Fits `rank` components to the stack, starting from JD-Full's subspaces.
pub fn jd_diag(stack: &Stack, full: &Full, rank: usize, seed: u64) -> Option<Diag> {
    let u0 = full.u.first()?;
    let tl = linalg::mul_tn(stack.left.as_ref(), u0.as_ref());
    let tr = linalg::mul_tn(stack.right.as_ref(), full.v.as_ref());
    let cores: Vec<Mat<f64>> = stack
        .spans
        .iter()
        .map(|s| {
            let core =
                linalg::mul_tn(tl.as_ref().subrows(s.start, s.len()), tr.as_ref().subrows(s.start, s.len()));
            linalg::widen(core.as_ref())
        })
        .collect();
    let (p, q) = best_on_cores(&cores, (u0.ncols(), full.v.ncols()), rank, seed);
    let u = linalg::mul(u0.as_ref(), linalg::narrow(p.as_ref()).as_ref());
    let v = linalg::mul(full.v.as_ref(), linalg::narrow(q.as_ref()).as_ref());
    Some(polish(stack, u, v))
}

/// σ for one delta: [(UᵀU)⊙(VᵀV)]⁻¹ h, and what it explains, σᵀh, given h = rowsum((UᵀB)⊙(VᵀAᵀ)).
fn solve(inverse: &Mat<f64>, h: &[f64]) -> (Vec<f64>, f64) {
    let sigma: Vec<f64> = (0..h.len()).map(|i| (0..h.len()).map(|j| inverse[(i, j)] * h[j]).sum()).collect();
    let explained = sigma.iter().zip(h).map(|(s, h)| s * h).sum();
    (sigma, explained)
}

/// [(UᵀU)⊙(VᵀV)]⁻¹.
fn hadamard_inverse(gu: &Mat<f64>, gv: &Mat<f64>) -> Mat<f64> {
    let r = gu.ncols();
    let g = Mat::from_fn(r, r, |i, j| gu[(i, j)] * gv[(i, j)]);
    linalg::solve_spd_right(Mat::<f64>::identity(r, r).as_ref(), g.as_ref())
}

fn gram(x: MatRef<'_, f64>) -> Mat<f64> {
    linalg::mul_tn(x, x)
}

/// Columns of unit norm; the diagonal cores take the scale.
fn unit_columns(x: &mut Mat<f64>) {
    for j in 0..x.ncols() {
        let col = x.col_as_slice_mut(j);
        let norm = col.iter().map(|v| v * v).sum::<f64>().sqrt();
        if norm > 0.0 {
            col.iter_mut().for_each(|v| *v /= norm);
        }
    }
}

/// Σ_i D_i G D_i, elementwise G ⊙ Σ_i σ_iσ_iᵀ.
fn weighted_gram(g: &Mat<f64>, sigmas: &[Vec<f64>]) -> Mat<f64> {
    let r = g.ncols();
    let mut outer = Mat::<f64>::zeros(r, r);
    for s in sigmas {
        for j in 0..r {
            for i in 0..r {
                outer[(i, j)] += s[i] * s[j];
            }
        }
    }
    Mat::from_fn(r, r, |i, j| outer[(i, j)] * g[(i, j)])
}

/// The best CP factors (ru × r, rv × r) of the core tensor over all starts.
fn best_on_cores(
    cores: &[Mat<f64>],
    (ru, rv): (usize, usize),
    rank: usize,
    seed: u64,
) -> (Mat<f64>, Mat<f64>) {
    let mut starts = vec![(identity_like(ru, rank), identity_like(rv, rank)), dominant(cores, ru, rv, rank)];
    for s in 0..RANDOM_STARTS {
        let mut rng = Rng::stream(seed, 1000 + s);
        let p = linalg::widen(linalg::random(ru, rank, &mut rng).as_ref());
        starts.push((p, linalg::widen(linalg::random(rv, rank, &mut rng).as_ref())));
    }
    let mut best: Option<(f64, Mat<f64>, Mat<f64>)> = None;
    for (p, q) in starts {
        let found = als_on_cores(cores, p, q);
        if best.as_ref().is_none_or(|b| found.0 > b.0) {
            best = Some(found);
        }
    }
    let (_, p, q) = best.unwrap_or_else(|| (0.0, identity_like(ru, rank), identity_like(rv, rank)));
    (p, q)
}

/// Unit vectors, and a little of everything beyond the dimension, so that no column is zero.
fn identity_like(rows: usize, cols: usize) -> Mat<f64> {
    Mat::from_fn(rows, cols, |i, j| if i == j % rows.max(1) { 1.0 } else { 0.01 * ((i + 2 * j) % 5) as f64 })
}

/// Singular directions of the mean core after its signs are aligned with the largest one.
fn dominant(cores: &[Mat<f64>], ru: usize, rv: usize, rank: usize) -> (Mat<f64>, Mat<f64>) {
    let mut mean = Mat::<f64>::zeros(ru, rv);
    for core in cores {
        let sign = if crate::factors::trace_of_product(&mean, core) < 0.0 { -1.0 } else { 1.0 };
        mean = Mat::from_fn(ru, rv, |i, j| mean[(i, j)] + sign * core[(i, j)]);
    }
    let (_, left) = linalg::eigen(gram(mean.transpose()).as_ref());
    let (_, right) = linalg::eigen(gram(mean.as_ref()).as_ref());
    let pick = |m: &Mat<f64>, n: usize| {
        Mat::from_fn(n, rank, |i, j| m[(i, j % n.max(1))] + 1e-3 * (j / n.max(1)) as f64)
    };
    (pick(&left, ru), pick(&right, rv))
}

/// ALS on Σ_i ‖S_i − P diag(σ_i) Qᵀ‖²; returns what it explains, and P and Q.
fn als_on_cores(cores: &[Mat<f64>], mut p: Mat<f64>, mut q: Mat<f64>) -> (f64, Mat<f64>, Mat<f64>) {
    let mut last = f64::NEG_INFINITY;
    let mut best = (last, p.clone(), q.clone());
    for _ in 0..CORE_ROUNDS {
        unit_columns(&mut p);
        unit_columns(&mut q);
        let (gp, gq) = (gram(p.as_ref()), gram(q.as_ref()));
        let inverse = hadamard_inverse(&gp, &gq);
        let mut explained = 0.0;
        let mut sigmas = Vec::with_capacity(cores.len());
        let mut sq = Vec::with_capacity(cores.len());
        for core in cores {
            let product = linalg::mul(core.as_ref(), q.as_ref());
            let h: Vec<f64> = (0..p.ncols())
                .map(|j| p.col(j).iter().zip(product.col(j).iter()).map(|(a, b)| a * b).sum())
                .collect();
            let (sigma, gained) = solve(&inverse, &h);
            explained += gained;
            sigmas.push(sigma);
            sq.push(product);
        }
        if explained > best.0 {
            best = (explained, p.clone(), q.clone());
        }
        if explained - last < GAIN * (cores.len() as f64 - explained).max(1e-9) {
            break;
        }
        last = explained;
        let mut sum = Mat::<f64>::zeros(p.nrows(), p.ncols());
        for (product, sigma) in sq.iter().zip(&sigmas) {
            add_scaled_columns(&mut sum, product, sigma);
        }
        p = linalg::solve_spd_right(sum.as_ref(), weighted_gram(&gq, &sigmas).as_ref());
        let mut sum = Mat::<f64>::zeros(q.nrows(), q.ncols());
        for (core, sigma) in cores.iter().zip(&sigmas) {
            add_scaled_columns(&mut sum, &linalg::mul_tn(core.as_ref(), p.as_ref()), sigma);
        }
        q = linalg::solve_spd_right(sum.as_ref(), weighted_gram(&gram(p.as_ref()), &sigmas).as_ref());
    }
    best
}

/// sum += x · diag(sigma).
fn add_scaled_columns(sum: &mut Mat<f64>, x: &Mat<f64>, sigma: &[f64]) {
    for (j, s) in sigma.iter().enumerate() {
        for (to, from) in sum.col_as_slice_mut(j).iter_mut().zip(x.col_as_slice(j)) {
            *to += s * from;
        }
    }
}

/// ALS in the full space; keeps the best round.
fn polish(stack: &Stack, u: Mat<f32>, v: Mat<f32>) -> Diag {
    let (mut u, mut v) = (linalg::widen(u.as_ref()), linalg::widen(v.as_ref()));
    let n = stack.len() as f64;
    let mut best: Option<Diag> = None;
    let mut last = f64::INFINITY;
    for _ in 0..FULL_ROUNDS {
        unit_columns(&mut u);
        unit_columns(&mut v);
        let (gu, gv) = (gram(u.as_ref()), gram(v.as_ref()));
        let (nu, nv) = (linalg::narrow(u.as_ref()), linalg::narrow(v.as_ref()));
        let tl = linalg::mul_tn(stack.left.as_ref(), nu.as_ref());
        let mut tr = linalg::mul_tn(stack.right.as_ref(), nv.as_ref());
        let (sigmas, explained) = sigmas(stack, &tl, &tr, &hadamard_inverse(&gu, &gv));
        let error = n - explained;
        if best.as_ref().is_none_or(|b| error < b.error) {
            best = Some(Diag { u: nu, v: nv, error });
        }
        if last - error < GAIN * error.max(1e-9) {
            break;
        }
        last = error;
        scale_rows(stack, &mut tr, &sigmas);
        let sum = linalg::widen(linalg::mul(stack.left.as_ref(), tr.as_ref()).as_ref());
        u = linalg::solve_spd_right(sum.as_ref(), weighted_gram(&gv, &sigmas).as_ref());
        let mut tl = linalg::mul_tn(stack.left.as_ref(), linalg::narrow(u.as_ref()).as_ref());
        scale_rows(stack, &mut tl, &sigmas);
        let sum = linalg::widen(linalg::mul(stack.right.as_ref(), tl.as_ref()).as_ref());
        v = linalg::solve_spd_right(sum.as_ref(), weighted_gram(&gram(u.as_ref()), &sigmas).as_ref());
    }
    best.unwrap_or_else(|| Diag { u: linalg::narrow(u.as_ref()), v: linalg::narrow(v.as_ref()), error: n })
}

/// Every entry's σ, and the sum of what they explain; `tl` and `tr` are factorsᵀ · basis.
fn sigmas(stack: &Stack, tl: &Mat<f32>, tr: &Mat<f32>, inverse: &Mat<f64>) -> (Vec<Vec<f64>>, f64) {
    let mut explained = 0.0;
    let all = stack
        .spans
        .iter()
        .map(|span| {
            let h: Vec<f64> = (0..tl.ncols())
                .map(|j| span.clone().map(|i| f64::from(tl[(i, j)]) * f64::from(tr[(i, j)])).sum())
                .collect();
            let (sigma, gained) = solve(inverse, &h);
            explained += gained;
            sigma
        })
        .collect();
    (all, explained)
}

/// Each entry's rows multiplied by its σ, column by column.
fn scale_rows(stack: &Stack, t: &mut Mat<f32>, sigmas: &[Vec<f64>]) {
    for (span, sigma) in stack.spans.iter().zip(sigmas) {
        for (j, s) in sigma.iter().enumerate() {
            for x in &mut t.col_as_slice_mut(j)[span.clone()] {
                *x = (f64::from(*x) * s) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Factors;
    use crate::factors::tests::random_items;
    use crate::full::{FullOptions, jd_full};

    #[test]
    fn recovers_deltas_that_are_diagonal_in_one_basis() {
        let (u, v) = (linalg::random(40, 5, &mut Rng::new(1)), linalg::random(30, 5, &mut Rng::new(2)));
        let items: Vec<_> = (0..20)
            .map(|i| {
                let s = linalg::random(5, 1, &mut Rng::stream(3, i));
                let b = Mat::from_fn(40, 5, |r, c| u[(r, c)] * s[(c, 0)]);
                (i as usize, Factors { b, a: v.transpose().to_owned() })
            })
            .collect();
        let stack = Stack::new(40, 30, &items);
        let full = jd_full(&stack, FullOptions::new(5, 1));
        let diag = jd_diag(&stack, &full, 5, 1).unwrap();
        assert!(diag.error / 20.0 < 1e-3, "{}", diag.error / 20.0);
    }

    #[test]
    fn never_beats_full_cores_of_the_same_rank_and_improves_with_rank() {
        for shared in [true, false] {
            let stack = Stack::new(48, 40, &random_items(15, (48, 40), 4, shared));
            let mut last = 15.0;
            for rank in [4, 8, 16] {
                let full = jd_full(&stack, FullOptions::new(rank, 1));
                let diag = jd_diag(&stack, &full, rank, 1).unwrap();
                assert!(diag.error < last, "rank {rank}: {} after {last}", diag.error);
                assert!(diag.error > 15.0 - full.objective.last().unwrap() - 1e-3);
                last = diag.error;
            }
        }
    }
}
