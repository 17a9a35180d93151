//! Before the work: which adapters share a basis, and which rank each module gets.

use std::sync::atomic::AtomicBool;

use lory_models::adapter::Site;
use rayon::prelude::*;

use crate::allocate::{Allocation, Goal, ModuleCurve, allocate, leading_energy};
use crate::cluster::{ClusterOptions, Clustering, Work, cluster};
use crate::collection::Collection;
use crate::frozen::{Frozen, Method};
use crate::full::{FullOptions, jd_full};
use crate::options::{CLUSTER_ERROR, CLUSTER_RANK, Options, SINGLE_BASIS, single_basis_rank};
use crate::pipeline::mean_error;
use crate::progress::{Progress, Silent};
use crate::{Error, Result, modules};

/// Most modules that adapters are assigned by: the assignment is one for all modules, and further ones hardly
/// change it, while each costs a pass over its factors in every round …
const CLUSTER_SITES: usize = 14;
/// … so that large collections get by with fewer: this many bytes of factors, but at least three modules.
const CLUSTER_BYTES: usize = 1 << 30;
/// Modules that the number of clusters is chosen by under `--auto`.
const SEARCH_SITES: usize = 4;
/// Most reassignment rounds, in the choice of the number of clusters and for good.
const SEARCH_ROUNDS: usize = 2;
const ROUNDS: usize = 10;
/// Ranks that `--auto` gives out.
const STEPS: [usize; 12] = [4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128];

/// Clusters and ranks.
pub(crate) struct Plan {
    pub sites: Vec<Site>,
    pub clustering: Clustering,
    /// One per site.
    pub ranks: Vec<usize>,
    /// What `--auto` expected.
    pub expected: Option<Allocation>,
}

impl Plan {
    /// The rank of a group: the largest of its sites'.
    pub(crate) fn rank(&self, group: &[Site]) -> usize {
        let of = |s: &Site| self.sites.binary_search(s).ok().and_then(|i| self.ranks.get(i)).copied();
        group.iter().filter_map(of).max().unwrap_or(1)
    }

    /// The sites as groups that share V: q, k and v of a layer, and gate and up; else each by itself.
    pub(crate) fn groups(&self, share_v: bool) -> Vec<Vec<Site>> {
        let mut groups: Vec<Vec<Site>> = Vec::new();
        for &site in &self.sites {
            match groups.last_mut() {
                Some(last) if share_v && last.first().is_some_and(|f| f.input() == site.input()) => {
                    last.push(site)
                }
                _ => groups.push(vec![site]),
            }
        }
        groups
    }
}

/// Decides everything that is not linear algebra.
pub(crate) fn plan(
    collection: &Collection,
    options: &Options,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Plan> {
    let sites = collection.sites();
    if sites.is_empty() {
        return Err(Error::Request("no adapter has a delta that could share a basis".into()));
    }
    if let Some(goal) = options.auto {
        return auto(collection, options, goal, sites, progress, cancel);
    }
    let n = collection.len();
    let (rank, clusters) = match (options.rank, options.clusters) {
        (Some(rank), clusters) => (rank, clusters.unwrap_or(1)),
        (None, Some(clusters)) => (CLUSTER_RANK, clusters),
        (None, None) if n <= SINGLE_BASIS => (single_basis_rank(n), 1),
        (None, None) => (CLUSTER_RANK, paper_clusters(collection, options, &sites, progress, cancel)?),
    };
    let clustering = clusters_for(collection, options, &sites, clusters, rank, progress, cancel)?;
    Ok(Plan { ranks: vec![rank; sites.len()], sites, clustering, expected: None })
}

/// Runs the clustering on a sample of the sites.
fn clusters_for(
    collection: &Collection,
    options: &Options,
    sites: &[Site],
    clusters: usize,
    rank: usize,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Clustering> {
    let n = collection.len();
    if clusters <= 1 {
        return Ok(Clustering::single(n));
    }
    let drawn = modules::sample(sites, CLUSTER_SITES, options.seed);
    let bytes = drawn.iter().map(|s| collection.stack_bytes(*s)).sum::<usize>().max(1);
    let most = (drawn.len() as f64 * CLUSTER_BYTES as f64 / bytes as f64) as usize;
    let sample = modules::single(&modules::sample(&drawn, most.max(3), options.seed));
    let settings = ClusterOptions { clusters, rank, rounds: ROUNDS, seed: options.seed };
    cluster_on(collection, &sample, settings, progress, cancel)
}

fn cluster_on(
    collection: &Collection,
    sample: &[Vec<Site>],
    settings: ClusterOptions,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Clustering> {
    // The rounds that are needed are not known; bars grow stage by stage instead.
    let visit = |work: &Work<'_>| {
        progress.stage(&format!("clustering ({} bases)", settings.clusters), sample.len());
        modules::for_each(collection, sample, progress, cancel, |_, stacks| {
            Ok(stacks.first().map(work).unwrap_or_default())
        })
    };
    cluster(collection.len(), settings, &visit)
}

/// The paper's rule: the fewest clusters with a mean err² below 0.6 on one module in the middle.
fn paper_clusters(
    collection: &Collection,
    options: &Options,
    sites: &[Site],
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<usize> {
    let Some(middle) = sites.get(sites.len() / 2) else { return Ok(1) };
    let sample = modules::single(&[*middle]);
    let stack = collection.stack(*middle)?;
    let most = (collection.len() / 4).max(1);
    let mut clusters = 1;
    loop {
        let settings =
            ClusterOptions { clusters, rank: CLUSTER_RANK, rounds: SEARCH_ROUNDS, seed: options.seed };
        let clustering = cluster_on(collection, &sample, settings, progress, cancel)?;
        if mean_error(&stack, &clustering, CLUSTER_RANK, options) < CLUSTER_ERROR || clusters == most {
            return Ok(clusters);
        }
        clusters = (clusters + clusters.div_ceil(2)).min(most);
    }
}

/// Curves of the sites of `groups` (one site each) with these clusters.
fn curves(
    collection: &Collection,
    clustering: &Clustering,
    groups: &[Vec<Site>],
    most: usize,
    seed: u64,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Vec<ModuleCurve>> {
    modules::for_each(collection, groups, progress, cancel, |_, stacks| {
        let Some(stack) = stacks.first() else {
            return Err(Error::Request("a group without a site".into()));
        };
        let energies: Vec<Option<Vec<f64>>> = (0..clustering.clusters)
            .into_par_iter()
            .map(|c| {
                let part = stack.select(&clustering.positions(stack, c));
                if part.is_empty() {
                    return None;
                }
                let full = jd_full(&part, FullOptions { sweeps: 4, ..FullOptions::new(most, seed) });
                let frozen = Frozen::new(full.u.into_iter().next()?, full.v, Method::Full);
                Some(leading_energy(&frozen.projections(&part)))
            })
            .collect();
        let mut error = vec![stack.len() as f64; most + 1];
        for energy in energies.iter().flatten() {
            for (r, e) in error.iter_mut().enumerate() {
                *e -= energy.get(r).or(energy.last()).copied().unwrap_or(0.0);
            }
        }
        Ok(ModuleCurve {
            shape: (stack.left.nrows(), stack.right.nrows()),
            adapters: stack.len(),
            clusters: energies.iter().flatten().count(),
            error: error.into_iter().map(|e| e.max(0.0)).collect(),
        })
    })
}

/// `--auto`: the number of clusters by a few sites, then the ranks by all.
fn auto(
    collection: &Collection,
    options: &Options,
    goal: Goal,
    sites: Vec<Site>,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Plan> {
    let n = collection.len();
    let sample = modules::single(&modules::sample(&sites, SEARCH_SITES, options.seed));
    let weight = |s: &Site| {
        let (d_out, d_in) = collection.shape(*s);
        (d_out + d_in) as f64
    };
    let share = sample.iter().flatten().map(weight).sum::<f64>() / sites.iter().map(weight).sum::<f64>();
    let scaled = match goal {
        Goal::Bytes(b) => Goal::Bytes((b as f64 * share) as u64),
        error => error,
    };
    let most = STEPS[STEPS.len() - 1];
    let mut best: Option<(f64, usize)> = None;
    let mut clusters = 1;
    while clusters <= (n / 4).max(1) {
        let settings =
            ClusterOptions { clusters, rank: CLUSTER_RANK, rounds: SEARCH_ROUNDS, seed: options.seed };
        let clustering = cluster_on(collection, &sample, settings, &Silent, cancel)?;
        progress.stage(&format!("trying {clusters} bases"), sample.len());
        let found = curves(collection, &clustering, &sample, most, options.seed, progress, cancel)?;
        let got = allocate(&found, &STEPS, scaled, options.method, options.storage);
        let score = match scaled {
            // Above the budget even at the smallest ranks: only fewer clusters can help.
            Goal::Bytes(b) if got.bytes > b => f64::INFINITY,
            Goal::Bytes(_) => got.error,
            Goal::Error(e) if got.error > e => f64::INFINITY,
            Goal::Error(_) => got.bytes as f64,
        };
        if best.is_none_or(|b| score < b.0) {
            best = Some((score, clusters));
        }
        clusters *= 2;
    }
    let clusters = best.map_or(1, |b| b.1);
    let clustering = clusters_for(collection, options, &sites, clusters, CLUSTER_RANK, progress, cancel)?;
    progress.stage("measuring every module", sites.len());
    let groups = modules::single(&sites);
    let found = curves(collection, &clustering, &groups, most, options.seed, progress, cancel)?;
    let allocation = allocate(&found, &STEPS, goal, options.method, options.storage);
    let ranks = allocation.ranks.iter().map(|r| (*r).max(1)).collect();
    Ok(Plan { sites, clustering, ranks, expected: Some(allocation) })
}
