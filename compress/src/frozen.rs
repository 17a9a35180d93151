//! Cores on a basis that does not change: what compression stores, and how an adapter joins later.
//!
//! The basis is the one that readers will see, quantised, so its columns are no longer orthonormal. The least
//! squares core is then (UᵀU)⁻¹ Uᵀ ΔW V (VᵀV)⁻¹, or for diagonal cores [(UᵀU)⊙(VᵀV)]⁻¹ diag(Uᵀ ΔW V), and
//! ‖ΔW − U C Vᵀ‖² = ‖ΔW‖² − 2⟨C, UᵀΔWV⟩ + ⟨C, UᵀU C VᵀV⟩ needs r × r matrices only.

use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::factors::{Stack, trace_of_product};
use crate::linalg;

/// The form of the cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// r × r per adapter and module, U and V orthonormal before quantisation.
    Full,
    /// r numbers per adapter and module.
    Diag,
}

/// A basis ready to take adapters.
#[derive(Clone, Debug)]
pub struct Frozen {
    method: Method,
    u: Mat<f32>,
    v: Mat<f32>,
    gram_u: Mat<f64>,
    gram_v: Mat<f64>,
    /// (UᵀU)⁻¹, or the inverse of the Hadamard product for diagonal cores.
    inverse_u: Mat<f64>,
    /// (VᵀV)⁻¹; unused for diagonal cores.
    inverse_v: Mat<f64>,
}

impl Frozen {
    /// From U (d_out × r) and V (d_in × r) as readers will see them.
    pub fn new(u: Mat<f32>, v: Mat<f32>, method: Method) -> Frozen {
        let gram = |x: MatRef<'_, f32>| {
            let wide = linalg::widen(x);
            linalg::mul_tn(wide.as_ref(), wide.as_ref())
        };
        let (gram_u, gram_v) = (gram(u.as_ref()), gram(v.as_ref()));
        let r = gram_u.ncols();
        let inverse = |g: &Mat<f64>| {
            linalg::solve_spd_right(Mat::<f64>::identity(g.nrows(), g.nrows()).as_ref(), g.as_ref())
        };
        let (inverse_u, inverse_v) = match method {
            Method::Full => (inverse(&gram_u), inverse(&gram_v)),
            Method::Diag => {
                let g = Mat::from_fn(r, r, |i, j| gram_u[(i, j)] * gram_v[(i, j)]);
                (inverse(&g), Mat::zeros(0, 0))
            }
        };
        Frozen { method, u, v, gram_u, gram_v, inverse_u, inverse_v }
    }

    /// Columns of U and V.
    pub fn rank(&self) -> usize {
        self.u.ncols()
    }

    /// Uᵀ L_iR_iᵀ V of every entry of a stack, r × r.
    pub fn projections(&self, stack: &Stack) -> Vec<Mat<f64>> {
        let tl = linalg::mul_tn(stack.left.as_ref(), self.u.as_ref());
        let tr = linalg::mul_tn(stack.right.as_ref(), self.v.as_ref());
        stack
            .spans
            .par_iter()
            .map(|s| {
                let l = linalg::widen(tl.as_ref().subrows(s.start, s.len()));
                let r = linalg::widen(tr.as_ref().subrows(s.start, s.len()));
                linalg::mul_tn(l.as_ref(), r.as_ref())
            })
            .collect()
    }

    /// The best core for a projection: r × r, or r × 1 for diagonal cores.
    pub fn core(&self, projection: &Mat<f64>) -> Mat<f64> {
        match self.method {
            Method::Full => {
                let half = linalg::mul(self.inverse_u.as_ref(), projection.as_ref());
                linalg::mul(half.as_ref(), self.inverse_v.as_ref())
            }
            Method::Diag => {
                let h = Mat::from_fn(self.rank(), 1, |i, _| projection[(i, i)]);
                linalg::mul(self.inverse_u.as_ref(), h.as_ref())
            }
        }
    }

    /// err² of a unit-norm delta with this projection, represented by `core`; at most rounding below 0.
    pub fn error2(&self, projection: &Mat<f64>, core: &Mat<f64>) -> f64 {
        match self.method {
            Method::Full => {
                let turned = linalg::mul(
                    linalg::mul(self.gram_u.as_ref(), core.as_ref()).as_ref(),
                    self.gram_v.as_ref(),
                );
                1.0 - 2.0 * trace_of_product(core, projection) + trace_of_product(core, &turned)
            }
            Method::Diag => {
                let r = self.rank();
                let mut error = 1.0;
                for i in 0..r {
                    error -= 2.0 * core[(i, 0)] * projection[(i, i)];
                    for j in 0..r {
                        error += core[(i, 0)] * self.gram_u[(i, j)] * self.gram_v[(i, j)] * core[(j, 0)];
                    }
                }
                error
            }
        }
    }

    /// Both at once for every entry of a stack: what adding those adapters gives and costs.
    pub fn fit(&self, stack: &Stack) -> Vec<(Mat<f64>, f64)> {
        self.projections(stack)
            .iter()
            .map(|p| {
                let core = self.core(p);
                let error = self.error2(p, &core);
                (core, error)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factors::tests::random_items;
    use crate::rng::Rng;
    use crate::{FullOptions, jd_diag, jd_full};

    fn dense_error(stack: &Stack, entry: usize, approximation: MatRef<'_, f32>) -> f64 {
        let s = &stack.spans[entry];
        let l = stack.left.as_ref().subcols(s.start, s.len());
        let r = stack.right.as_ref().subcols(s.start, s.len());
        linalg::norm2((&linalg::mul(l, r.transpose()) - approximation).as_ref())
    }

    #[test]
    fn errors_equal_the_dense_residual_even_on_a_skewed_basis() {
        let stack = Stack::new(40, 36, &random_items(9, (40, 36), 4, true));
        let full = jd_full(&stack, FullOptions::new(8, 1));
        let noise = linalg::random(40, 8, &mut Rng::new(8));
        let u = Mat::from_fn(40, 8, |i, j| full.u[0][(i, j)] + 0.05 * noise[(i, j)]);
        let frozen = Frozen::new(u.clone(), full.v.clone(), Method::Full);
        let diag = jd_diag(&stack, &full, 8, 1).unwrap();
        let sum: f64 = {
            let frozen = Frozen::new(diag.u.clone(), diag.v.clone(), Method::Diag);
            let fits = frozen.fit(&stack);
            for (i, (core, error)) in fits.iter().enumerate() {
                let us = Mat::from_fn(40, 8, |r, c| diag.u[(r, c)] * core[(c, 0)] as f32);
                let back = linalg::mul(us.as_ref(), diag.v.transpose());
                assert!((error - dense_error(&stack, i, back.as_ref())).abs() < 1e-5);
            }
            fits.iter().map(|f| f.1).sum()
        };
        assert!((sum - diag.error).abs() < 1e-4, "{sum} {}", diag.error);
        for (i, (core, error)) in frozen.fit(&stack).iter().enumerate() {
            let back = linalg::mul(u.as_ref(), linalg::narrow(core.as_ref()).as_ref());
            let back = linalg::mul(back.as_ref(), full.v.transpose());
            assert!((error - dense_error(&stack, i, back.as_ref())).abs() < 1e-5);
        }
    }

    #[test]
    fn the_core_is_the_best_one() {
        let stack = Stack::new(20, 24, &random_items(3, (20, 24), 3, false));
        let u = linalg::random(20, 4, &mut Rng::new(1));
        let v = linalg::random(24, 4, &mut Rng::new(2));
        for method in [Method::Full, Method::Diag] {
            let frozen = Frozen::new(u.clone(), v.clone(), method);
            for (p, (core, error)) in frozen.projections(&stack).iter().zip(frozen.fit(&stack)) {
                for i in 0..core.nrows() {
                    for step in [-1e-3, 1e-3] {
                        let mut other = core.clone();
                        other[(i, 0)] += step;
                        assert!(frozen.error2(p, &other) >= error - 1e-12);
                    }
                }
            }
        }
    }
}
