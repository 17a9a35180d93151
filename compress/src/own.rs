//! Factors of an adapter's own: the truncated SVD of one delta, as it will be stored.

use faer::{Mat, MatRef};

use crate::Result;
use crate::factors::{Stack, trace_of_product};
use crate::linalg::{self, Qr};
use crate::storage::{Storage, Stored};

/// One delta by itself.
pub(crate) struct Own {
    /// d_out × rank.
    pub u: Stored,
    /// rank × d_in.
    pub v: Stored,
    /// err² of the unit-norm delta, truncation and rounding together.
    pub err2: f64,
}

/// The best factors of `rank` for an entry of a stack, through two QRs and one r_i × r_i eigenproblem.
pub(crate) fn truncate(stack: &Stack, entry: usize, rank: usize, storage: Storage) -> Result<Own> {
    let span = &stack.spans[entry];
    let left = stack.left.as_ref().subcols(span.start, span.len());
    let right = stack.right.as_ref().subcols(span.start, span.len());
    let (b, a) = leading(left, right, rank);
    let at = |m: &Mat<f32>, i: usize, j: usize| if j < m.ncols() { m[(i, j)] } else { 0.0 };
    let u = Stored::u(storage.basis, b.nrows(), rank, |i, j| at(&b, i, j))?;
    let v = Stored::new(storage.basis, rank, a.nrows(), |i, j| at(&a, j, i))?;
    let (seen_b, seen_a) = (linalg::widen(u.read()?.as_ref()), linalg::widen(v.read()?.transpose()));
    let (left, right) = (linalg::widen(left), linalg::widen(right));
    let cross = linalg::mul_tn(left.as_ref(), seen_b.as_ref());
    let crossed = linalg::mul_tn(right.as_ref(), seen_a.as_ref());
    let gram = |x: &Mat<f64>| linalg::mul_tn(x.as_ref(), x.as_ref());
    let own = trace_of_product(&gram(&seen_b), &gram(&seen_a));
    let whole = trace_of_product(&gram(&left), &gram(&right));
    let err2 = (whole - 2.0 * trace_of_product(&cross, &crossed) + own) / whole;
    Ok(Own { u, v, err2: err2.max(0.0) })
}

/// B (d_out × k) and Aᵀ (d_in × k) of the leading k ≤ `rank` singular directions of L Rᵀ, the singular values shared
/// evenly between them.
fn leading(left: MatRef<'_, f32>, right: MatRef<'_, f32>, rank: usize) -> (Mat<f32>, Mat<f32>) {
    let (ql, qr) = (Qr::new(left.to_owned()), Qr::new(right.to_owned()));
    let (rl, rr) = (linalg::widen(ql.r().as_ref()), linalg::widen(qr.r().as_ref()));
    let inner = linalg::mul(rl.as_ref(), rr.transpose());
    let (values, vectors) = linalg::eigen(linalg::mul_tn(inner.as_ref(), inner.as_ref()).as_ref());
    // A direction without energy would be divided by nothing.
    let kept = values.iter().take(rank).filter(|v| **v > 1e-14 * values[0]).count().max(1);
    let root: Vec<f64> = values.iter().map(|v| v.max(f64::MIN_POSITIVE).sqrt().sqrt()).collect();
    let v = Mat::from_fn(vectors.nrows(), kept, |i, j| vectors[(i, j)] * root[j]);
    let turned = linalg::mul(inner.as_ref(), vectors.as_ref().subcols(0, kept));
    let u = Mat::from_fn(turned.nrows(), kept, |i, j| turned[(i, j)] / root[j]);
    (ql.lift(linalg::narrow(u.as_ref()).as_ref()), qr.lift(linalg::narrow(v.as_ref()).as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factors::tests::random_items;
    use lory_kernels::QuantType;

    #[test]
    fn truncation_loses_the_tail_of_the_spectrum() {
        for dims in [(40, 33), (5, 40)] {
            let stack = Stack::new(dims.0, dims.1, &random_items(3, dims, 6, false));
            let storage = Storage { basis: QuantType::F32, core: QuantType::F32 };
            for (entry, spectrum) in stack.spectra().iter().enumerate() {
                for rank in 1..=6 {
                    let tail: f64 = spectrum.iter().skip(rank).sum();
                    let own = truncate(&stack, entry, rank, storage).unwrap();
                    assert!((own.err2 - tail).abs() < 1e-5, "{rank}: {} {tail}", own.err2);
                    assert_eq!((own.u.rows, own.v.cols), dims);
                }
            }
        }
    }
}
