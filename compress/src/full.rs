//! JD-Full: orthonormal U and V that retain the most of every delta, by alternating maximisation.
//!
//! Maximises Σ_i ‖Uᵀ L_i R_iᵀ V‖²_F over the normalised deltas L_i R_iᵀ. Given V, the best U are the top
//! eigenvectors of Σ_i L_i C_i L_iᵀ with C_i = (R_iᵀV)(R_iᵀV)ᵀ, and the same with the sides exchanged
//! (arXiv 2407.00066, section 3). Small problems take the eigenvectors exactly; large ones take one step of
//! block subspace iteration with a Rayleigh–Ritz rotation, which also never lowers the objective: for a
//! positive semidefinite operator the trace over a subspace cannot fall under the operator itself.

use std::borrow::Cow;
use std::ops::Range;

use faer::Mat;
use rayon::prelude::*;

use crate::factors::Stack;
use crate::linalg::{self, Qr};
use crate::rng::Rng;

/// Extra columns of the iterated block, which make its first r columns converge much faster.
const OVERSAMPLE: usize = 8;
/// Steps from a random block to the HOSVD start.
const START_STEPS: usize = 3;

/// How far to take the alternation.
#[derive(Clone, Copy, Debug)]
pub struct FullOptions {
    /// Columns of U and V; capped by the module's dimensions.
    pub rank: usize,
    /// Most sweeps after the HOSVD start.
    pub sweeps: usize,
    /// Stop when the root mean square sine between a sweep's subspaces is below this …
    pub tolerance: f64,
    /// … or when a sweep takes less than this part of what is lost: directions of nearly equal energy turn for a long
    /// time without bringing anything.
    pub gain: f64,
    /// Seed of the starting blocks.
    pub seed: u64,
    /// Up to this dimension a side's operator is formed and diagonalised; above, it is iterated.
    pub exact: usize,
}

impl FullOptions {
    /// The usual stop within 30 sweeps: 1e-3 of movement, or 2e-4 of the error. In collections with independent
    /// starts that ends after about 7 sweeps instead of 15 to 30, within 0.0005 of their err².
    pub fn new(rank: usize, seed: u64) -> Self {
        FullOptions { rank, sweeps: 30, tolerance: 1e-3, gain: 2e-4, seed, exact: 160 }
    }
}

/// A joint basis of one module, or of several that share their input side.
#[derive(Clone, Debug)]
pub struct Full {
    /// One U per stack, d_out × min(r, d_out), orthonormal.
    pub u: Vec<Mat<f32>>,
    /// V for all of them, d_in × min(r, d_in), orthonormal.
    pub v: Mat<f32>,
    /// Σ_i ‖Σ_i‖² over the normalised deltas, after the start and after each sweep: never falls.
    pub objective: Vec<f64>,
}

/// Finds U and V for one module's adapters.
pub fn jd_full(stack: &Stack, options: FullOptions) -> Full {
    jd_full_shared(&[stack], options)
}

/// Finds one V and a U per module for modules with the same input (q, k and v; gate and up).
///
/// All stacks must have the same d_in.
pub fn jd_full_shared(stacks: &[&Stack], options: FullOptions) -> Full {
    let mut lefts: Vec<Side> = stacks
        .iter()
        .enumerate()
        .map(|(m, s)| Side::new(Cow::Borrowed(&s.left), s.spans.clone(), options, m as u64))
        .collect();
    let (factor, spans) = join_right(stacks);
    let mut right = Side::new(factor, spans, options, 1 << 32);

    // HOSVD: each side as if the other were kept whole.
    let whole: Vec<Mat<f32>> =
        stacks.iter().flat_map(|s| s.spans.iter().map(|span| block_gram(&s.left, span))).collect();
    right.start(&whole);
    let mut first = 0;
    for (side, stack) in lefts.iter_mut().zip(stacks) {
        let whole: Vec<Mat<f32>> = stack.spans.iter().map(|span| block_gram(&stack.right, span)).collect();
        side.start(&whole);
        side.step(&right.inner(first..first + stack.len()));
        first += stack.len();
    }

    // Every delta has norm 1: their number is all the energy there is.
    let entries = stacks.iter().map(|s| s.len()).sum::<usize>() as f64;
    let mut objective = vec![right.step(&left_inners(&lefts))];
    for _ in 0..options.sweeps {
        let mut moved = 0.0f64;
        let mut first = 0;
        for (side, stack) in lefts.iter_mut().zip(stacks) {
            let before = side.x.clone();
            side.step(&right.inner(first..first + stack.len()));
            moved = moved.max(side.movement(&before));
            first += stack.len();
        }
        let before = right.x.clone();
        let now = right.step(&left_inners(&lefts));
        moved = moved.max(right.movement(&before));
        let last = objective.last().copied().unwrap_or(0.0);
        objective.push(now);
        // A surplus of rank leaves directions without energy, which may turn for ever.
        let enough = f64::max(1e-7 * now, options.gain * (entries - now));
        if moved < options.tolerance || now - last <= enough {
            break;
        }
    }
    Full { u: lefts.iter().map(Side::lift).collect(), v: right.lift(), objective }
}

/// The right factors of all stacks as one, borrowed when there is only one.
fn join_right<'a>(stacks: &[&'a Stack]) -> (Cow<'a, Mat<f32>>, Vec<Range<usize>>) {
    if let [one] = stacks {
        return (Cow::Borrowed(&one.right), one.spans.clone());
    }
    let width = stacks.iter().map(|s| s.right.ncols()).sum();
    let mut all = Mat::zeros(stacks.first().map_or(0, |s| s.right.nrows()), width);
    let (mut at, mut spans) = (0, Vec::new());
    for s in stacks {
        all.as_mut().subcols_mut(at, s.right.ncols()).copy_from(&s.right);
        spans.extend(s.spans.iter().map(|span| at + span.start..at + span.end));
        at += s.right.ncols();
    }
    (Cow::Owned(all), spans)
}

/// The C_i for the right side: one list over all left sides, in the order of their stacks.
fn left_inners(lefts: &[Side]) -> Vec<Mat<f32>> {
    lefts.iter().flat_map(|side| side.inner(0..side.spans.len())).collect()
}

fn block_gram(factor: &Mat<f32>, span: &Range<usize>) -> Mat<f32> {
    let block = factor.as_ref().subcols(span.start, span.len());
    linalg::mul_tn(block, block)
}

/// Whether the triangle of a d × n side saves more products than the QR costs (2dn² operations, against two
/// products of d × n with the block in every step).
fn worth_reducing(d: usize, n: usize, rank: usize, options: FullOptions) -> bool {
    // Structured collections seldom need more sweeps than this.
    let steps = START_STEPS + options.sweeps.min(15);
    n < d && (n <= options.exact || d * n < 2 * steps * (rank + OVERSAMPLE) * (d - n))
}

/// One side's factors, its current block of directions and their products.
struct Side<'a> {
    /// d × N, or its triangle after QR when N < d.
    factor: Cow<'a, Mat<f32>>,
    /// The reflections that lead back from the triangle.
    qr: Option<Qr>,
    spans: Vec<Range<usize>>,
    /// Columns asked for.
    rank: usize,
    exact: bool,
    /// The block of directions, most energetic first; at least `rank` columns.
    x: Mat<f32>,
    /// factorᵀ · x, N × columns of x.
    t: Mat<f32>,
    rng: Rng,
}

impl<'a> Side<'a> {
    fn new(factor: Cow<'a, Mat<f32>>, spans: Vec<Range<usize>>, options: FullOptions, id: u64) -> Self {
        let rank = options.rank.min(factor.nrows());
        let rng = Rng::stream(options.seed, id);
        let (factor, qr) = if worth_reducing(factor.nrows(), factor.ncols(), rank, options) {
            let qr = Qr::new(factor.into_owned());
            (Cow::Owned(qr.r()), Some(qr))
        } else {
            (factor, None)
        };
        let exact = factor.nrows() <= options.exact;
        Side { factor, qr, spans, rank, exact, x: Mat::zeros(0, 0), t: Mat::zeros(0, 0), rng }
    }

    /// Columns of the block: the reduced dimension bounds them.
    fn width(&self) -> usize {
        (self.rank + OVERSAMPLE).min(self.factor.nrows())
    }

    /// Columns of the answer, without those that a reduced side cannot have.
    fn kept(&self) -> usize {
        self.rank.min(self.factor.nrows())
    }

    /// The HOSVD directions: those of Σ L_i C_i L_iᵀ with the other side whole.
    fn start(&mut self, inner: &[Mat<f32>]) {
        if !self.exact {
            let block = linalg::random(self.factor.nrows(), self.width(), &mut self.rng);
            self.x = linalg::orthonormal(block);
            self.t = linalg::mul_tn(self.factor.as_ref().as_ref(), self.x.as_ref());
            for _ in 0..START_STEPS {
                self.iterate(inner);
            }
        } else {
            self.diagonalise(inner);
        }
    }

    /// Moves the block towards the top directions for these C_i; returns the energy they retain.
    fn step(&mut self, inner: &[Mat<f32>]) -> f64 {
        if self.exact { self.diagonalise(inner) } else { self.iterate(inner) }
    }

    fn diagonalise(&mut self, inner: &[Mat<f32>]) -> f64 {
        let y = self.weighted(inner, self.factor.transpose().to_owned());
        let l = linalg::widen(self.factor.as_ref().as_ref());
        let g = linalg::mul(l.as_ref(), linalg::widen(y.as_ref()).as_ref());
        let (values, vectors) = linalg::eigen(g.as_ref());
        self.x = linalg::narrow(vectors.as_ref().subcols(0, self.width()));
        self.t = linalg::mul_tn(self.factor.as_ref().as_ref(), self.x.as_ref());
        values.iter().take(self.kept()).sum()
    }

    fn iterate(&mut self, inner: &[Mat<f32>]) -> f64 {
        let y = self.weighted(inner, self.t.clone());
        let z = linalg::mul(self.factor.as_ref().as_ref(), y.as_ref());
        let q = linalg::orthonormal(z);
        let t = linalg::mul_tn(self.factor.as_ref().as_ref(), q.as_ref());
        let y = self.weighted(inner, t.clone());
        let h = linalg::mul_tn(linalg::widen(t.as_ref()).as_ref(), linalg::widen(y.as_ref()).as_ref());
        let (values, vectors) = linalg::eigen(h.as_ref());
        let turn = linalg::narrow(vectors.as_ref());
        self.x = linalg::mul(q.as_ref(), turn.as_ref());
        self.t = linalg::mul(t.as_ref(), turn.as_ref());
        values.iter().take(self.kept()).sum()
    }

    /// Each entry's rows of `t` multiplied by its C_i.
    fn weighted(&self, inner: &[Mat<f32>], mut t: Mat<f32>) -> Mat<f32> {
        for (span, c) in self.spans.iter().zip(inner) {
            let mut rows = t.as_mut().subrows_mut(span.start, span.len());
            let product = linalg::mul(c.as_ref(), rows.as_ref());
            rows.copy_from(&product);
        }
        t
    }

    /// C_i for the other side: T_i T_iᵀ over the answer's columns, for the entries in `range`.
    fn inner(&self, range: Range<usize>) -> Vec<Mat<f32>> {
        self.spans[range]
            .par_iter()
            .map(|span| {
                let t = self.t.as_ref().submatrix(span.start, 0, span.len(), self.kept());
                linalg::mul(t, t.transpose())
            })
            .collect()
    }

    /// Root mean square sine of the angles between the answer's subspace and that of `before`.
    fn movement(&self, before: &Mat<f32>) -> f64 {
        let k = self.kept();
        let cosines = linalg::mul_tn(before.as_ref().subcols(0, k), self.x.as_ref().subcols(0, k));
        (1.0 - linalg::norm2(cosines.as_ref()) / k.max(1) as f64).max(0.0).sqrt()
    }

    /// The answer in the module's own coordinates.
    fn lift(&self) -> Mat<f32> {
        let x = self.x.as_ref().subcols(0, self.kept());
        match &self.qr {
            Some(qr) => qr.lift(x),
            None => x.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factors::tests::random_items;

    /// err² of every entry by the identity, and by the dense residual.
    fn errors(stack: &Stack, u: &Mat<f32>, v: &Mat<f32>) -> Vec<(f64, f64)> {
        stack
            .spans
            .iter()
            .map(|span| {
                let l = stack.left.as_ref().subcols(span.start, span.len());
                let r = stack.right.as_ref().subcols(span.start, span.len());
                let core = linalg::mul(
                    linalg::mul_tn(u.as_ref(), l).as_ref(),
                    linalg::mul_tn(r, v.as_ref()).as_ref(),
                );
                let back = linalg::mul(linalg::mul(u.as_ref(), core.as_ref()).as_ref(), v.transpose());
                let dense = linalg::mul(l, r.transpose());
                (1.0 - linalg::norm2(core.as_ref()), linalg::norm2((&dense - &back).as_ref()))
            })
            .collect()
    }

    #[test]
    fn lossless_when_the_rank_allows_it() {
        let stack = Stack::new(60, 50, &random_items(5, (60, 50), 4, false));
        let full = jd_full(&stack, FullOptions::new(20, 1));
        for (identity, dense) in errors(&stack, &full.u[0], &full.v) {
            assert!(identity.abs() < 1e-5, "{identity}");
            assert!(dense < 1e-5, "{dense}");
        }
    }

    #[test]
    fn the_objective_never_falls_and_the_identity_holds_exactly_and_iterated() {
        // 40 adapters of rank 8 on 300-dimensional sides are above the exact limit, 10 are below.
        for (n, dims, shared) in [(10, (90, 120), true), (40, (300, 310), false), (40, (300, 310), true)] {
            let stack = Stack::new(dims.0, dims.1, &random_items(n, dims, 8, shared));
            let full = jd_full(&stack, FullOptions::new(12, 3));
            for pair in full.objective.windows(2) {
                assert!(pair[1] >= pair[0] - 1e-5 * pair[0], "{:?}", full.objective);
            }
            let errors = errors(&stack, &full.u[0], &full.v);
            for (identity, dense) in &errors {
                assert!((identity - dense).abs() < 1e-5, "{identity} {dense}");
            }
            let retained: f64 = errors.iter().map(|e| 1.0 - e.0).sum();
            assert!((retained - full.objective.last().unwrap()).abs() < 1e-4 * retained);
        }
    }

    #[test]
    fn iteration_reaches_what_exact_sweeps_reach() {
        for shared in [true, false] {
            let dims = (100, 90);
            let stack = Stack::new(dims.0, dims.1, &random_items(40, dims, 4, shared));
            let options = FullOptions { sweeps: 100, gain: 0.0, ..FullOptions::new(10, 3) };
            let exact = jd_full(&stack, options).objective;
            let iterated = jd_full(&stack, FullOptions { exact: 0, ..options }).objective;
            let (exact, iterated) = (exact.last().unwrap(), iterated.last().unwrap());
            assert!((exact - iterated).abs() < 0.01 * exact, "{exact} {iterated}");
        }
    }

    #[test]
    fn stopping_at_little_gain_costs_little() {
        for shared in [true, false] {
            let dims = (300, 310);
            let stack = Stack::new(dims.0, dims.1, &random_items(40, dims, 8, shared));
            let run = |gain| jd_full(&stack, FullOptions { gain, ..FullOptions::new(12, 3) }).objective;
            let (short, long) = (run(FullOptions::new(12, 3).gain), run(0.0));
            assert!(short.len() < long.len(), "{} {}", short.len(), long.len());
            let (short, long) = (40.0 - short.last().unwrap(), 40.0 - long.last().unwrap());
            assert!(short < 1.005 * long, "{short} {long}");
        }
    }

    #[test]
    fn orthogonal_adapters_obey_the_bound() {
        // ΔW_i = e_p e_qᵀ for distinct (p, q): mutually orthogonal and of unit norm.
        let n = 49;
        let items: Vec<_> = (0..n)
            .map(|i| {
                let mut b = Mat::zeros(7, 1);
                let mut a = Mat::zeros(1, 7);
                b[(i / 7, 0)] = 1.0;
                a[(0, i % 7)] = 1.0;
                (i, crate::Factors { b, a })
            })
            .collect();
        let stack = Stack::new(7, 7, &items);
        for r in 1..=7usize {
            let full = jd_full(&stack, FullOptions::new(r, 2));
            let mean = 1.0 - full.objective.last().unwrap() / n as f64;
            let bound = 1.0 - (r * r) as f64 / n as f64;
            assert!(mean >= bound - 1e-6 && mean <= bound + 1e-6, "r {r}: {mean} against {bound}");
        }
    }

    #[test]
    fn retained_energy_is_below_the_spectrum_of_the_whole_deltas() {
        let dims = (20, 16);
        let stack = Stack::new(dims.0, dims.1, &random_items(12, dims, 3, false));
        let mut vecs = Mat::<f64>::zeros(dims.0 * dims.1, stack.len());
        for (i, span) in stack.spans.iter().enumerate() {
            let l = stack.left.as_ref().subcols(span.start, span.len());
            let r = stack.right.as_ref().subcols(span.start, span.len());
            let dense = linalg::mul(l, r.transpose());
            for (k, x) in dense.col_iter().flat_map(|c| c.iter()).enumerate() {
                vecs[(k, i)] = f64::from(*x);
            }
        }
        let (values, _) = linalg::eigen(linalg::mul_tn(vecs.as_ref(), vecs.as_ref()).as_ref());
        for r in 1..6usize {
            let full = jd_full(&stack, FullOptions::new(r, 2));
            let bound: f64 = values.iter().take(r * r).sum();
            assert!(*full.objective.last().unwrap() <= bound + 1e-6);
        }
    }

    #[test]
    fn a_shared_input_side_costs_error_but_holds_the_identity() {
        let (q, k) = ((64, 48), (32, 48));
        let items = [random_items(8, q, 4, true), random_items(8, k, 4, true)];
        let stacks = [Stack::new(q.0, q.1, &items[0]), Stack::new(k.0, k.1, &items[1])];
        let options = FullOptions::new(6, 1);
        let shared = jd_full_shared(&[&stacks[0], &stacks[1]], options);
        let own: f64 = stacks.iter().map(|s| jd_full(s, options).objective.last().unwrap().to_owned()).sum();
        let joint = *shared.objective.last().unwrap();
        assert!(joint <= own + 1e-4 && joint > 0.5 * own, "{joint} {own}");
        for (stack, u) in stacks.iter().zip(&shared.u) {
            for (identity, dense) in errors(stack, u, &shared.v) {
                assert!((identity - dense).abs() < 1e-5);
            }
        }
    }
}
