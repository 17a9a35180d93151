//! Which adapters share a basis: normalised k-means on the cores, then reassignment by error.
//!
//! One assignment holds for all modules, since an adapter in a running batch has one cluster. The start is
//! k-means on the flattened cores C_i of one common JD-Full, each adapter's vector normalised to length 1
//! (without that, norms that differ eightfold make most clusters singletons). Cores of one subspace that mix
//! its directions differently lie far apart in that picture, so a second start uses C_iC_iᵀ and C_iᵀC_i, which
//! only see the subspaces; the start with the least error is taken. Then, until nothing moves: a basis per
//! cluster, and every adapter to the cluster where it loses least over the modules together.

use faer::Mat;
use rayon::prelude::*;

use crate::factors::Stack;
use crate::frozen::{Frozen, Method};
use crate::full::{FullOptions, jd_full};
use crate::linalg;
use crate::rng::Rng;

/// Sweeps of the bases that only serve to assign; the last percent of fit does not move adapters.
const ASSIGN_SWEEPS: usize = 4;
/// Most columns of the common basis that k-means looks through.
const FEATURE_RANK: usize = 48;
/// Lloyd iterations of k-means.
const KMEANS_ITERATIONS: usize = 30;
/// Starts of k-means, of which the tightest is taken.
const KMEANS_STARTS: u64 = 4;

/// How to cluster.
#[derive(Clone, Copy, Debug)]
pub struct ClusterOptions {
    /// Number of clusters; capped by the number of adapters.
    pub clusters: usize,
    /// Rank of the bases that adapters are assigned by.
    pub rank: usize,
    /// Most reassignment rounds.
    pub rounds: usize,
    /// Seed of k-means and of the bases.
    pub seed: u64,
}

/// A clustering and how it came about.
#[derive(Clone, Debug)]
pub struct Clustering {
    /// The cluster of every adapter of the collection, below `clusters`.
    pub assignment: Vec<usize>,
    /// Number of clusters, none of them empty.
    pub clusters: usize,
    /// Mean err² over adapters and modules at the start of each round.
    pub history: Vec<f64>,
}

impl Clustering {
    /// Everything in one cluster.
    pub fn single(adapters: usize) -> Clustering {
        Clustering { assignment: vec![0; adapters], clusters: 1, history: Vec::new() }
    }

    /// The entries of a stack that belong to cluster `c`.
    pub fn positions(&self, stack: &Stack, c: usize) -> Vec<usize> {
        (0..stack.len()).filter(|&p| self.assignment[stack.members[p]] == c).collect()
    }
}

/// Clusters `adapters` adapters by the given modules.
///
/// `visit` runs its argument on every module's stack, in parallel if it likes, and returns the results in
/// the order of the modules; its error ends the clustering.
///
/// # Errors
/// Those of `visit`.
pub fn cluster<E>(adapters: usize, options: ClusterOptions, visit: &Visit<'_, E>) -> Result<Clustering, E> {
    let k = options.clusters.clamp(1, adapters.max(1));
    if k == 1 {
        return Ok(Clustering::single(adapters));
    }
    let [cores, spans] = features(adapters, options, visit)?;
    let mut assignment = kmeans(&cores, k, options.seed);
    let mut first = losses(adapters, k, &assignment, options, visit)?;
    let other = kmeans(&spans, k, options.seed);
    let second = losses(adapters, k, &other, options, visit)?;
    if total(&second, &other) < total(&first, &assignment) {
        (assignment, first) = (other, second);
    }
    drop((cores, spans));
    let mut best = (f64::INFINITY, assignment.clone());
    let mut history = Vec::new();
    let mut known = Some(first);
    for round in 0..=options.rounds {
        let losses = match known.take() {
            Some(losses) => losses,
            None => losses(adapters, k, &assignment, options, visit)?,
        };
        let total = total(&losses, &assignment);
        let sites = losses.iter().map(|l| l.last().copied().unwrap_or(0.0)).sum::<f64>().max(1.0);
        history.push(total / sites);
        if total < best.0 {
            best = (total, assignment.clone());
        }
        // Rounds that gain a thousandth of the error cost more than they bring.
        let stalled = history.len() > 1 && history[history.len() - 2] - total / sites < 1e-3 * total / sites;
        if round == options.rounds || stalled {
            break;
        }
        let mut next: Vec<usize> = losses.iter().map(|l| least(&l[..k])).collect();
        repair(&mut next, k, &losses);
        if next == assignment {
            break;
        }
        assignment = next;
    }
    Ok(Clustering { assignment: best.1, clusters: k, history })
}

fn total(losses: &[Vec<f64>], assignment: &[usize]) -> f64 {
    losses.iter().zip(assignment).map(|(l, &c)| l[c]).sum()
}

/// Numbers of some adapters, each with its index.
pub type PerAdapter = Vec<(usize, Vec<f64>)>;
/// What is to be done with one module's stack.
pub type Work<'a> = dyn Fn(&Stack) -> PerAdapter + Sync + 'a;
/// Does it to every module's stack; see [`cluster`].
pub type Visit<'a, E> = dyn Fn(&Work<'_>) -> Result<Vec<PerAdapter>, E> + 'a;

/// Per adapter, two descriptions on one common basis per module, each laid end to end and normalised: the
/// cores, and the subspaces that the cores span on both sides.
fn features<E>(
    adapters: usize,
    options: ClusterOptions,
    visit: &Visit<'_, E>,
) -> Result<[Vec<Vec<f64>>; 2], E> {
    // The common basis must see every cluster's directions, not only those of the largest.
    let rank = (options.rank * options.clusters).min(FEATURE_RANK).max(options.rank);
    let per_module = visit(&|stack| {
        let full = FullOptions { sweeps: ASSIGN_SWEEPS, ..FullOptions::new(rank, options.seed) };
        let full = jd_full(stack, full);
        let Some(u) = full.u.into_iter().next() else { return Vec::new() };
        let frozen = Frozen::new(u, full.v, Method::Full);
        let cores = frozen.projections(stack);
        let flat = cores.iter().map(|c| c.col_iter().flat_map(|col| col.iter().copied()).collect());
        let shape = |core: Vec<f64>| [vec![frozen.rank() as f64], core].concat();
        stack.members.iter().copied().zip(flat.map(shape)).collect()
    })?;
    let mut cores = vec![Vec::new(); adapters];
    let mut spans = vec![Vec::new(); adapters];
    for module in per_module {
        let described: Vec<(usize, Vec<f64>, Vec<f64>)> = module
            .into_iter()
            .map(|(member, shaped)| {
                let (rank, core) = shaped.split_first().map_or((0, &[][..]), |(r, c)| (*r as usize, c));
                let core_spans = subspaces(core, rank);
                (member, core.to_vec(), core_spans)
            })
            .collect();
        let Some((_, core, span)) = described.first() else { continue };
        let (core_width, span_width) = (core.len(), span.len());
        let (core_at, span_at) = (cores[0].len(), spans[0].len());
        cores.iter_mut().for_each(|f| f.resize(core_at + core_width, 0.0));
        spans.iter_mut().for_each(|f| f.resize(span_at + span_width, 0.0));
        for (member, core, span) in described {
            cores[member][core_at..].copy_from_slice(&core);
            spans[member][span_at..].copy_from_slice(&span);
        }
    }
    normalise(&mut cores);
    normalise(&mut spans);
    Ok([cores, spans])
}

/// C Cᵀ and CᵀC of a core given column by column.
fn subspaces(core: &[f64], rows: usize) -> Vec<f64> {
    if rows == 0 {
        return Vec::new();
    }
    let c = faer::MatRef::from_column_major_slice(core, rows, core.len() / rows);
    let both = [linalg::mul(c, c.transpose()), linalg::mul_tn(c, c)];
    both.iter().flat_map(|m| m.col_iter()).flat_map(|col| col.iter().copied()).collect()
}

fn normalise(features: &mut [Vec<f64>]) {
    for f in features {
        let norm = f.iter().map(|x| x * x).sum::<f64>().sqrt();
        if norm > 0.0 {
            f.iter_mut().for_each(|x| *x /= norm);
        }
    }
}

/// Per adapter, the summed err² under each cluster, and last the number of modules it has.
fn losses<E>(
    adapters: usize,
    k: usize,
    assignment: &[usize],
    options: ClusterOptions,
    visit: &Visit<'_, E>,
) -> Result<Vec<Vec<f64>>, E> {
    let per_module = visit(&|stack| {
        let bases: Vec<Option<Pair>> = (0..k)
            .into_par_iter()
            .map(|c| {
                let positions: Vec<usize> =
                    (0..stack.len()).filter(|&p| assignment[stack.members[p]] == c).collect();
                if positions.is_empty() {
                    return None;
                }
                let full =
                    FullOptions { sweeps: ASSIGN_SWEEPS, ..FullOptions::new(options.rank, options.seed) };
                let full = jd_full(&stack.select(&positions), full);
                Some((full.u.into_iter().next()?, full.v))
            })
            .collect();
        let columns = errors_under(stack, &bases);
        let row = |p: usize| columns.iter().map(|c| c[p]).chain([1.0]).collect();
        stack.members.iter().enumerate().map(|(p, &m)| (m, row(p))).collect()
    })?;
    let mut sums = vec![vec![0.0; k + 1]; adapters];
    for (member, errors) in per_module.into_iter().flatten() {
        for (sum, e) in sums[member].iter_mut().zip(errors) {
            *sum += e;
        }
    }
    Ok(sums)
}

/// U and V of one cluster at one module.
type Pair = (Mat<f32>, Mat<f32>);

/// err² of every entry under every basis. All bases go through the factors in one product per side: skinny
/// products would read the factors once per cluster.
fn errors_under(stack: &Stack, bases: &[Option<Pair>]) -> Vec<Vec<f64>> {
    let sides = |side: fn(&Pair) -> &Mat<f32>, factor: &Mat<f32>| {
        let width = bases.iter().flatten().map(|b| side(b).ncols()).sum();
        let mut joined = Mat::<f32>::zeros(factor.nrows(), width);
        let mut at = 0;
        let mut starts = Vec::with_capacity(bases.len());
        for basis in bases {
            starts.push(at);
            if let Some(x) = basis.as_ref().map(side) {
                joined.as_mut().subcols_mut(at, x.ncols()).copy_from(x);
                at += x.ncols();
            }
        }
        (linalg::mul_tn(factor.as_ref(), joined.as_ref()), starts)
    };
    let (tl, left_starts) = sides(|b| &b.0, &stack.left);
    let (tr, right_starts) = sides(|b| &b.1, &stack.right);
    (0..bases.len())
        .into_par_iter()
        .map(|c| {
            // A cluster without an adapter at this module would represent nothing there.
            let Some((u, v)) = &bases[c] else { return vec![1.0; stack.len()] };
            let error = |s: &std::ops::Range<usize>| {
                let l = tl.as_ref().submatrix(s.start, left_starts[c], s.len(), u.ncols());
                let r = tr.as_ref().submatrix(s.start, right_starts[c], s.len(), v.ncols());
                // On an orthonormal basis the projection is the core: err² = 1 − ‖core‖².
                1.0 - linalg::norm2(linalg::mul_tn(l, r).as_ref())
            };
            stack.spans.iter().map(error).collect()
        })
        .collect()
}

/// Index of the least value; the first of equals.
fn least(values: &[f64]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v < values[best] {
            best = i;
        }
    }
    best
}

/// Gives every empty cluster the adapter that fits its own cluster worst, out of those with company.
fn repair(assignment: &mut [usize], k: usize, losses: &[Vec<f64>]) {
    for c in 0..k {
        let mut sizes = vec![0usize; k];
        assignment.iter().for_each(|&a| sizes[a] += 1);
        if sizes[c] > 0 {
            continue;
        }
        let movable = (0..assignment.len()).filter(|&i| sizes[assignment[i]] > 1);
        let worst = movable
            .max_by(|&a, &b| losses[a][assignment[a]].total_cmp(&losses[b][assignment[b]]).then(b.cmp(&a)));
        if let Some(i) = worst {
            assignment[i] = c;
        }
    }
}

/// k-means with k-means++ starts; every cluster ends with at least one point (`k` ≤ points).
fn kmeans(points: &[Vec<f64>], k: usize, seed: u64) -> Vec<usize> {
    let all = Mat::from_fn(points.first().map_or(0, Vec::len), points.len(), |i, j| points[j][i]);
    let norms: Vec<f64> = points.iter().map(|p| p.iter().map(|x| x * x).sum()).collect();
    let run = |start: u64| {
        let mut rng = Rng::stream(seed, 77 + start);
        let mut centres = spread_centres(points, k, &mut rng);
        let mut assignment = vec![0; points.len()];
        for _ in 0..KMEANS_ITERATIONS {
            let distances = distances(&all, &norms, &centres);
            let mut next: Vec<usize> = distances.iter().map(|d| least(d)).collect();
            repair(&mut next, k, &distances);
            if next == assignment {
                break;
            }
            assignment = next;
            centres = means(points, &assignment, k);
        }
        let spread: f64 = points.iter().zip(&assignment).map(|(p, &a)| distance2(p, &centres[a])).sum();
        (spread, assignment)
    };
    let runs: Vec<(f64, Vec<usize>)> = (0..KMEANS_STARTS).into_par_iter().map(run).collect();
    let tightest = runs.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
    tightest.map(|r| r.1).unwrap_or_default()
}

/// ‖p − c‖² of every point under every centre, as one product: vectors are long and Lloyd asks often.
fn distances(points: &Mat<f64>, norms: &[f64], centres: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let joined = Mat::from_fn(points.nrows(), centres.len(), |i, j| centres[j][i]);
    let sizes: Vec<f64> = centres.iter().map(|c| c.iter().map(|x| x * x).sum()).collect();
    let dots = linalg::mul_tn(points.as_ref(), joined.as_ref());
    let of = |p: usize| (0..centres.len()).map(move |c| (p, c));
    let row = |p: usize| of(p).map(|(p, c)| (norms[p] + sizes[c] - 2.0 * dots[(p, c)]).max(0.0)).collect();
    (0..norms.len()).map(row).collect()
}

/// k-means++: each further centre is a point drawn with probability ∝ its squared distance to the others.
fn spread_centres(points: &[Vec<f64>], k: usize, rng: &mut Rng) -> Vec<Vec<f64>> {
    let mut centres = vec![points[rng.below(points.len())].clone()];
    let mut nearest: Vec<f64> = points.iter().map(|p| distance2(p, &centres[0])).collect();
    while centres.len() < k {
        let mut at = rng.uniform() * nearest.iter().sum::<f64>();
        let drawn = nearest.iter().position(|d| {
            at -= d;
            at < 0.0
        });
        // All points equal: any will do, `repair` spreads them.
        let centre = points[drawn.unwrap_or(points.len() - 1)].clone();
        for (n, p) in nearest.iter_mut().zip(points) {
            *n = n.min(distance2(p, &centre));
        }
        centres.push(centre);
    }
    centres
}

fn means(points: &[Vec<f64>], assignment: &[usize], k: usize) -> Vec<Vec<f64>> {
    let width = points.first().map_or(0, Vec::len);
    let mut sums = vec![(0.0f64, vec![0.0; width]); k];
    for (p, &a) in points.iter().zip(assignment) {
        sums[a].0 += 1.0;
        sums[a].1.iter_mut().zip(p).for_each(|(s, x)| *s += x);
    }
    for (count, sum) in &mut sums {
        sum.iter_mut().for_each(|s| *s /= count.max(1.0));
    }
    sums.into_iter().map(|s| s.1).collect()
}

fn distance2(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| (x - y) * (x - y)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::factors::Factors;

    /// Adapters of `families` that have nothing in common, interleaved: adapter i is of family i mod `families`.
    fn families(n: usize, families: usize, d: usize) -> Stack {
        let items: Vec<_> = (0..n)
            .map(|i| {
                let f = (i % families) as u64;
                let u = linalg::random(d, 3, &mut Rng::stream(1, f));
                let v = linalg::random(3, d, &mut Rng::stream(2, f));
                let mix = linalg::random(3, 3, &mut Rng::stream(3, i as u64));
                let size = 1.0 + 7.0 * (i as f32 / n as f32);
                let b = linalg::mul(u.as_ref(), mix.as_ref());
                (i, Factors { b: Mat::from_fn(d, 3, |r, c| size * b[(r, c)]), a: v })
            })
            .collect();
        Stack::new(d, d, &items)
    }

    fn run(stacks: &[Stack], n: usize, k: usize) -> Clustering {
        let visit = |work: &Work<'_>| Ok::<_, ()>(stacks.iter().map(work).collect());
        let options = ClusterOptions { clusters: k, rank: 3, rounds: 8, seed: 1 };
        cluster(n, options, &visit).unwrap()
    }

    #[test]
    fn finds_families_and_loses_nothing_then() {
        let n = 24;
        let stacks = [families(n, 4, 40), families(n, 4, 50)];
        let found = run(&stacks, n, 4);
        for i in 0..n {
            assert_eq!(found.assignment[i], found.assignment[i % 4], "{:?}", found.assignment);
        }
        assert!(*found.history.last().unwrap() < 1e-4, "{:?}", found.history);
    }

    #[test]
    fn no_cluster_is_empty_even_with_equal_adapters() {
        let n = 6;
        let items: Vec<_> = (0..n)
            .map(|i| {
                let b = linalg::random(10, 2, &mut Rng::new(1));
                (i, Factors { b, a: linalg::random(2, 12, &mut Rng::new(2)) })
            })
            .collect();
        let found = run(&[Stack::new(10, 12, &items)], n, 4);
        for c in 0..4 {
            assert!(found.assignment.contains(&c), "{:?}", found.assignment);
        }
    }

    #[test]
    fn does_not_depend_on_the_number_of_threads() {
        let stacks = [families(20, 3, 30)];
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| run(&stacks, 20, 5).assignment)
        };
        assert_eq!(with(1), with(4));
    }
}
