//! One module's adapters, stacked: what the algorithms see of a collection.

use std::ops::Range;

use faer::{Mat, MatRef};

use crate::linalg;

/// One adapter's delta at one module, ΔW = B A with the adapter's scale already folded into B.
#[derive(Clone, Debug)]
pub struct Factors {
    /// d_out × r_i.
    pub b: Mat<f32>,
    /// r_i × d_in.
    pub a: Mat<f32>,
}

impl Factors {
    /// ‖B A‖²_F through r_i × r_i products only: tr((BᵀB)(A Aᵀ)).
    pub fn norm2(&self) -> f64 {
        let gb = gram(self.b.as_ref());
        let ga = gram(self.a.transpose());
        trace_of_product(&gb, &ga).max(0.0)
    }

    /// Whether every number is finite.
    pub fn is_finite(&self) -> bool {
        self.b.is_all_finite() && self.a.is_all_finite()
    }

    /// Why these cannot be compressed, if so: cores carry their delta's norm as an f32.
    pub(crate) fn fault(&self) -> Option<String> {
        if !self.is_finite() {
            return Some("times its scale B has a number that is not finite".into());
        }
        let norm = self.norm2().sqrt();
        let fits = norm == 0.0 || (norm as f32).is_normal();
        (!fits).then(|| format!("the norm of its delta is {norm:e}, which is not a normal f32"))
    }
}

/// XᵀX in f64, for an X with few columns.
fn gram(x: MatRef<'_, f32>) -> Mat<f64> {
    let wide = linalg::widen(x);
    linalg::mul_tn(wide.as_ref(), wide.as_ref())
}

/// tr(P Q) for symmetric P and Q.
pub(crate) fn trace_of_product(p: &Mat<f64>, q: &Mat<f64>) -> f64 {
    let mut sum = 0.0;
    for j in 0..p.ncols() {
        for i in 0..p.nrows() {
            sum += p[(i, j)] * q[(i, j)];
        }
    }
    sum
}

/// The adapters that touch one module, as two tall matrices of their factors' columns.
///
/// Each delta is divided by its norm, which *is* the weight w_i = 1/‖B_iA_i‖² of the objective, and
/// the two factors share the scale evenly, so that f32 holds them whatever the adapters' sizes.
#[derive(Clone, Debug)]
pub struct Stack {
    /// d_out × Σ r_i: the B_i side by side.
    pub left: Mat<f32>,
    /// d_in × Σ r_i: the A_iᵀ side by side.
    pub right: Mat<f32>,
    /// The columns of each adapter in the stack.
    pub spans: Vec<Range<usize>>,
    /// Which adapter of the collection each entry is.
    pub members: Vec<usize>,
    /// ‖B_iA_i‖_F of each entry, before normalisation.
    pub norms: Vec<f64>,
}

impl Stack {
    /// Stacks factors of (d_out, d_in); adapters without this module are simply not in `items`, and
    /// those whose delta is zero are left out, since any basis represents them.
    pub fn new(d_out: usize, d_in: usize, items: &[(usize, Factors)]) -> Stack {
        let norms: Vec<f64> = items.iter().map(|(_, f)| f.norm2().sqrt()).collect();
        let kept: Vec<usize> = (0..items.len()).filter(|&i| norms[i] > 0.0).collect();
        let width = kept.iter().map(|&i| items[i].1.b.ncols()).sum();
        let mut stack = Stack {
            left: Mat::zeros(d_out, width),
            right: Mat::zeros(d_in, width),
            spans: Vec::with_capacity(kept.len()),
            members: kept.iter().map(|&i| items[i].0).collect(),
            norms: kept.iter().map(|&i| norms[i]).collect(),
        };
        let mut at = 0;
        for &i in &kept {
            let f = &items[i].1;
            let (nb, na) = (linalg::norm2(f.b.as_ref()).sqrt(), linalg::norm2(f.a.as_ref()).sqrt());
            let sb = (na / (nb * norms[i])).sqrt();
            let sa = (nb / (na * norms[i])).sqrt();
            for k in 0..f.b.ncols() {
                for (to, from) in stack.left.col_as_slice_mut(at + k).iter_mut().zip(f.b.col(k).iter()) {
                    *to = (f64::from(*from) * sb) as f32;
                }
                for (to, from) in stack.right.col_as_slice_mut(at + k).iter_mut().zip(f.a.row(k).iter()) {
                    *to = (f64::from(*from) * sa) as f32;
                }
            }
            stack.spans.push(at..at + f.b.ncols());
            at += f.b.ncols();
        }
        stack
    }

    /// Number of adapters in it.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether no adapter touches the module.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The entries at `positions`, copied out: one cluster's stack.
    pub fn select(&self, positions: &[usize]) -> Stack {
        let width = positions.iter().map(|&p| self.spans[p].len()).sum();
        let mut out = Stack {
            left: Mat::zeros(self.left.nrows(), width),
            right: Mat::zeros(self.right.nrows(), width),
            spans: Vec::with_capacity(positions.len()),
            members: positions.iter().map(|&p| self.members[p]).collect(),
            norms: positions.iter().map(|&p| self.norms[p]).collect(),
        };
        let mut at = 0;
        for &p in positions {
            for j in self.spans[p].clone() {
                out.left.col_as_slice_mut(at).copy_from_slice(self.left.col_as_slice(j));
                out.right.col_as_slice_mut(at).copy_from_slice(self.right.col_as_slice(j));
                at += 1;
            }
            out.spans.push(at - self.spans[p].len()..at);
        }
        out
    }

    /// Per entry, the squared singular values of its normalised delta, falling, adding up to 1: what
    /// an SVD of that adapter alone keeps at each rank.
    pub fn spectra(&self) -> Vec<Vec<f64>> {
        use rayon::prelude::*;
        self.spans
            .par_iter()
            .map(|span| {
                let gl = gram(self.left.as_ref().subcols(span.start, span.len()));
                let gr = gram(self.right.as_ref().subcols(span.start, span.len()));
                product_spectrum(&gl, &gr)
            })
            .collect()
    }
}

/// Eigenvalues of G_L G_R (= the squared singular values of L Rᵀ) as those of the symmetric
/// G_R^½ G_L G_R^½.
fn product_spectrum(gl: &Mat<f64>, gr: &Mat<f64>) -> Vec<f64> {
    let (values, vectors) = linalg::eigen(gr.as_ref());
    let root = Mat::from_fn(gr.nrows(), gr.ncols(), |i, j| vectors[(i, j)] * values[j].sqrt());
    let inner = linalg::mul(gl.as_ref(), root.as_ref());
    linalg::eigen(linalg::mul_tn(root.as_ref(), inner.as_ref()).as_ref()).0
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::rng::Rng;

    /// `n` random adapters of rank `rank`; `shared` repeats one A with small changes.
    pub(crate) fn random_items(
        n: usize,
        (d_out, d_in): (usize, usize),
        rank: usize,
        shared: bool,
    ) -> Vec<(usize, Factors)> {
        let base = linalg::random(rank, d_in, &mut Rng::new(99));
        (0..n)
            .map(|i| {
                let mut rng = Rng::stream(5, i as u64);
                let mut a = linalg::random(rank, d_in, &mut rng);
                if shared {
                    a = Mat::from_fn(rank, d_in, |r, c| base[(r, c)] + 0.2 * a[(r, c)]);
                }
                let b = linalg::random(d_out, rank, &mut rng);
                let scale = 0.1 + 0.3 * i as f32;
                (i, Factors { b: Mat::from_fn(d_out, rank, |r, c| scale * b[(r, c)]), a })
            })
            .collect()
    }

    #[test]
    fn the_norm_is_that_of_the_dense_delta() {
        let f = &random_items(1, (20, 30), 4, false)[0].1;
        let dense = linalg::mul(f.b.as_ref(), f.a.as_ref());
        let want = linalg::norm2(dense.as_ref());
        assert!((f.norm2() - want).abs() < 1e-5 * want);
    }

    #[test]
    fn a_stack_is_normalised_and_drops_zero_deltas() {
        let mut items = random_items(3, (12, 10), 2, false);
        items[1].1.b = Mat::zeros(12, 2);
        let stack = Stack::new(12, 10, &items);
        assert_eq!(stack.members, [0, 2]);
        for span in &stack.spans {
            let l = stack.left.as_ref().subcols(span.start, span.len());
            let r = stack.right.as_ref().subcols(span.start, span.len());
            let dense = linalg::mul(l, r.transpose());
            assert!((linalg::norm2(dense.as_ref()) - 1.0).abs() < 1e-5);
        }
        for spectrum in stack.spectra() {
            assert!((spectrum.iter().sum::<f64>() - 1.0).abs() < 1e-5);
        }
        assert_eq!(stack.select(&[1]).members, [2]);
    }
}
