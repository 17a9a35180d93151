//! The few dense operations the algorithms need, over `faer`, always sequential inside.
//!
//! Parallelism is over modules, clusters and fixed blocks of rows: a result never depends on how
//! many threads there were, because no sum is ever split by thread.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj,
};
use faer::linalg::matmul::matmul;
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::prelude::{Reborrow, ReborrowMut};
use faer::{Accum, Conj, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::rng::Rng;

/// Rows of one block of a parallel product; fixed, so that results do not depend on the threads.
const BLOCK_ROWS: usize = 1024;

/// A · B, by blocks of rows of A in parallel.
pub(crate) fn mul<T: faer::traits::RealField>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> Mat<T> {
    let mut out = Mat::zeros(a.nrows(), b.ncols());
    mul_into(out.as_mut(), a, b);
    out
}

/// `out = A · B`, by blocks of rows of A in parallel.
pub(crate) fn mul_into<T: faer::traits::RealField>(out: MatMut<'_, T>, a: MatRef<'_, T>, b: MatRef<'_, T>) {
    if a.nrows() <= BLOCK_ROWS || a.ncols() * b.ncols() < 4096 {
        matmul(out, Accum::Replace, a, b, T::one_impl(), Par::Seq);
        return;
    }
    out.par_row_chunks_mut(BLOCK_ROWS).enumerate().for_each(|(i, out)| {
        let rows = a.subrows(i * BLOCK_ROWS, out.nrows());
        matmul(out, Accum::Replace, rows, b, T::one_impl(), Par::Seq);
    });
}

/// Aᵀ · B.
pub(crate) fn mul_tn<T: faer::traits::RealField>(a: MatRef<'_, T>, b: MatRef<'_, T>) -> Mat<T> {
    mul(a.transpose(), b)
}

/// ‖A‖²_F, added up in f64.
pub(crate) fn norm2(a: MatRef<'_, f32>) -> f64 {
    let mut sum = 0.0f64;
    for col in a.col_iter() {
        for x in col.iter() {
            sum += f64::from(*x) * f64::from(*x);
        }
    }
    sum
}

/// The same numbers in f64.
pub(crate) fn widen(a: MatRef<'_, f32>) -> Mat<f64> {
    Mat::from_fn(a.nrows(), a.ncols(), |i, j| f64::from(a[(i, j)]))
}

/// The same numbers in f32.
pub(crate) fn narrow(a: MatRef<'_, f64>) -> Mat<f32> {
    Mat::from_fn(a.nrows(), a.ncols(), |i, j| a[(i, j)] as f32)
}

/// `rows` × `cols` standard normal numbers.
pub(crate) fn random(rows: usize, cols: usize, rng: &mut Rng) -> Mat<f32> {
    let mut out = Mat::zeros(rows, cols);
    for j in 0..cols {
        for x in out.col_as_slice_mut(j) {
            *x = rng.normal();
        }
    }
    out
}

/// A = Q R by Householder reflections, with Q kept as reflections.
pub(crate) struct Qr {
    basis: Mat<f32>,
    coeff: Mat<f32>,
    size: usize,
}

impl Qr {
    /// Factors `a` (m × n, m ≥ n) in place; rank deficiency is harmless, Q is orthonormal anyway.
    pub(crate) fn new(mut a: Mat<f32>) -> Qr {
        let (m, n) = a.shape();
        let size = m.min(n);
        let block = recommended_block_size::<f32>(m, n);
        let mut coeff = Mat::zeros(block, size);
        let scratch = qr_in_place_scratch::<f32>(m, n, block, Par::Seq, Default::default());
        qr_in_place(
            a.as_mut(),
            coeff.as_mut(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
            Default::default(),
        );
        Qr { basis: a, coeff, size }
    }

    /// The upper triangle, min(m, n) × n.
    pub(crate) fn r(&self) -> Mat<f32> {
        Mat::from_fn(self.size, self.basis.ncols(), |i, j| if i <= j { self.basis[(i, j)] } else { 0.0 })
    }

    /// Q · x for x of min(m, n) rows: back from the reduced coordinates.
    pub(crate) fn lift(&self, x: MatRef<'_, f32>) -> Mat<f32> {
        let mut out = Mat::zeros(self.basis.nrows(), x.ncols());
        out.as_mut().subrows_mut(0, x.nrows()).copy_from(x);
        let scratch = apply_block_householder_sequence_on_the_left_in_place_scratch::<f32>(
            self.basis.nrows(),
            self.coeff.nrows(),
            x.ncols(),
        );
        apply_block_householder_sequence_on_the_left_in_place_with_conj(
            self.basis.as_ref().subcols(0, self.size),
            self.coeff.as_ref(),
            Conj::No,
            out.as_mut(),
            Par::Seq,
            MemStack::new(&mut MemBuffer::new(scratch)),
        );
        out
    }
}

/// An orthonormal basis (m × min(m, n)) that contains the span of `a`.
pub(crate) fn orthonormal(a: Mat<f32>) -> Mat<f32> {
    let size = a.nrows().min(a.ncols());
    let qr = Qr::new(a);
    qr.lift(Mat::<f32>::identity(size, size).as_ref())
}

/// Eigenvalues (falling) and eigenvectors (columns) of a symmetric matrix, whose lower half is read.
pub(crate) fn eigen(g: MatRef<'_, f64>) -> (Vec<f64>, Mat<f64>) {
    let n = g.nrows();
    if n == 0 {
        return (Vec::new(), Mat::zeros(0, 0));
    }
    let mut values = faer::diag::Diag::<f64>::zeros(n);
    let mut vectors = Mat::<f64>::zeros(n, n);
    let scratch = self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, Default::default());
    let solved = self_adjoint_evd(
        g.rb(),
        values.as_mut(),
        Some(vectors.as_mut().rb_mut()),
        Par::Seq,
        MemStack::new(&mut MemBuffer::new(scratch)),
        Default::default(),
    );
    // The only failure is "no convergence", which needs a number that is not finite: those are
    // refused when factors are read. An orthonormal answer keeps the callers' invariants.
    if solved.is_err() {
        return (vec![0.0; n], Mat::identity(n, n));
    }
    let falling: Vec<f64> = (0..n).map(|i| values.column_vector()[n - 1 - i].max(0.0)).collect();
    let columns = Mat::from_fn(n, n, |i, j| vectors[(i, n - 1 - j)]);
    (falling, columns)
}

/// Solves X · S = R for a symmetric positive semidefinite S (r × r) by eigenvalues, with a ridge of
/// 1e-10 of the largest: parallel components of a diagonal fit make S singular.
pub(crate) fn solve_spd_right(r: MatRef<'_, f64>, s: MatRef<'_, f64>) -> Mat<f64> {
    let (values, vectors) = eigen(s);
    let floor = values.first().copied().unwrap_or(0.0) * 1e-10 + f64::MIN_POSITIVE;
    let mut turned = mul(r, vectors.as_ref());
    for (j, value) in values.iter().enumerate() {
        let scale = 1.0 / (value + floor);
        for x in turned.col_as_slice_mut(j) {
            *x *= scale;
        }
    }
    mul(turned.as_ref(), vectors.transpose())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qr_reduces_and_lifts_back() {
        let a = random(50, 7, &mut Rng::new(1));
        let qr = Qr::new(a.clone());
        let back = qr.lift(qr.r().as_ref());
        assert!(norm2((&back - &a).as_ref()) < 1e-9 * norm2(a.as_ref()));
    }

    #[test]
    fn a_rank_deficient_matrix_still_gives_an_orthonormal_basis() {
        let mut a = random(30, 2, &mut Rng::new(2));
        a = Mat::from_fn(30, 6, |i, j| if j == 5 { 0.0 } else { a[(i, j % 2)] });
        let q = orthonormal(a);
        let g = mul_tn(q.as_ref(), q.as_ref());
        assert!(norm2((&g - &Mat::<f32>::identity(6, 6)).as_ref()) < 1e-9);
    }

    #[test]
    fn eigen_is_sorted_and_rebuilds() {
        let x = widen(random(9, 5, &mut Rng::new(3)).as_ref());
        let g = mul_tn(x.as_ref(), x.as_ref());
        let (values, vectors) = eigen(g.as_ref());
        assert!(values.windows(2).all(|w| w[0] >= w[1]));
        let scaled = Mat::from_fn(5, 5, |i, j| vectors[(i, j)] * values[j]);
        let back = mul(scaled.as_ref(), vectors.transpose());
        assert!((&back - &g).norm_l2() < 1e-10);
    }

    #[test]
    fn products_do_not_depend_on_the_number_of_threads() {
        let (a, b) = (random(3000, 70, &mut Rng::new(4)), random(70, 90, &mut Rng::new(5)));
        let with = |n| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| mul(a.as_ref(), b.as_ref()))
        };
        assert_eq!(with(1), with(3));
    }
}
