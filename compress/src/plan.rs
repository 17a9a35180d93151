//! Before the work: which adapters share a basis, and which rank each module gets.

use std::sync::atomic::AtomicBool;

use lory_models::adapter::Site;
use rayon::prelude::*;

use crate::allocate::{Allocation, Choice, Form, Goal, Prices, Unit, allocate, leading_energies};
use crate::cluster::{ClusterOptions, Clustering, Work, cluster};
use crate::collection::Collection;
use crate::diag::jd_diag;
use crate::factors::Stack;
use crate::frozen::{Frozen, Method};
use crate::full::{FullOptions, jd_full};
use crate::options::{CLUSTER_ERROR, CLUSTER_RANK, Options, SINGLE_BASIS, single_basis_rank};
use crate::pipeline::mean_error;
use crate::progress::{Progress, Silent, check};
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
/// Ranks that `--auto` gives to bases …
const STEPS: [usize; 12] = [4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128];
/// … with diagonal cores, each of which needs a fit of its own.
const DIAGONAL_STEPS: [usize; 4] = [8, 16, 32, 64];

/// Clusters and ranks.
pub(crate) struct Plan {
    pub sites: Vec<Site>,
    pub clustering: Clustering,
    /// What every site gets.
    pub ranks: Ranks,
    /// What `--auto` expected: mean err² and bytes.
    pub expected: Option<(f64, u64)>,
}

/// Ranks of bases, and who uses them.
pub(crate) enum Ranks {
    /// The same everywhere, and everyone shares.
    Uniform(usize),
    /// By site and cluster.
    Chosen(Vec<Vec<Assigned>>),
}

/// A [`Choice`] with the adapters it is about.
pub(crate) struct Assigned {
    /// Rank of the basis; 0 for none.
    pub rank: usize,
    /// Adapters with factors of their own and their rank, ascending by adapter; all others share.
    pub own: Vec<(usize, usize)>,
}

impl Plan {
    /// The rank of a cluster's basis at a site, before it is capped by what the adapters there have.
    pub(crate) fn rank(&self, site: Site, cluster: usize) -> usize {
        match &self.ranks {
            Ranks::Uniform(rank) => *rank,
            Ranks::Chosen(_) => self.assigned(site, cluster).map_or(0, |a| a.rank),
        }
    }

    /// The largest rank at a site.
    pub(crate) fn largest_rank(&self, site: Site) -> usize {
        (0..self.clustering.clusters).map(|c| self.rank(site, c)).max().unwrap_or(0)
    }

    /// The rank of an adapter's own factors at a site; `None` for one that shares.
    pub(crate) fn own_rank(&self, site: Site, adapter: usize) -> Option<usize> {
        let cluster = self.clustering.assignment.get(adapter).copied()?;
        let own = &self.assigned(site, cluster)?.own;
        own.binary_search_by_key(&adapter, |o| o.0).ok().and_then(|i| own.get(i)).map(|o| o.1)
    }

    fn assigned(&self, site: Site, cluster: usize) -> Option<&Assigned> {
        let Ranks::Chosen(all) = &self.ranks else { return None };
        all.get(self.sites.binary_search(&site).ok()?)?.get(cluster)
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
        // Nothing but embeddings, row scales or biases: everyone keeps what it has.
        let clustering = Clustering::single(collection.len());
        return Ok(Plan { sites, clustering, ranks: Ranks::Uniform(1), expected: None });
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
    Ok(Plan { ranks: Ranks::Uniform(rank), sites, clustering, expected: None })
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

/// One site's units, by cluster, with the adapters that each is about.
type Units = Vec<(Vec<usize>, Unit)>;

/// What is to be known of the sites of `groups` (one site each) with these clusters.
fn units(
    collection: &Collection,
    options: &Options,
    clustering: &Clustering,
    groups: &[Vec<Site>],
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Vec<Units>> {
    modules::for_each(collection, groups, progress, cancel, |_, stacks| {
        let Some(stack) = stacks.first() else {
            return Err(Error::Request("a group without a site".into()));
        };
        let shape = (stack.left.nrows(), stack.right.nrows());
        let one = |c: usize| {
            check(cancel)?;
            let part = stack.select(&clustering.positions(stack, c));
            let shared = shared_errors(&part, options);
            Ok((part.members.clone(), Unit { shape, shared, spectra: part.spectra() }))
        };
        (0..clustering.clusters).into_par_iter().map(one).collect()
    })
}

/// Per entry, err² on a basis of each rank that `--auto` may give, without quantisation.
fn shared_errors(part: &Stack, options: &Options) -> Vec<Vec<f64>> {
    let most = steps(options.method).last().copied().unwrap_or(1);
    let full = jd_full(part, FullOptions { sweeps: 4, ..FullOptions::new(most, options.seed) });
    let Some(u) = full.u.first() else { return Vec::new() };
    match options.method {
        Method::Full => {
            let frozen = Frozen::new(u.clone(), full.v.clone(), Method::Full);
            let energies = leading_energies(&frozen.projections(part));
            let at =
                |e: &Vec<f64>, r: &usize| (1.0 - e.get(*r).or(e.last()).copied().unwrap_or(0.0)).max(0.0);
            energies.iter().map(|e| STEPS.iter().map(|r| at(e, r)).collect()).collect()
        }
        // Components of a smaller fit are not the leading ones of a larger.
        Method::Diag => {
            let mut errors = vec![Vec::new(); part.len()];
            for rank in DIAGONAL_STEPS {
                let fit = jd_diag(part, &full, rank, options.seed);
                let found = fit.map(|d| Frozen::new(d.u, d.v, Method::Diag).fit(part)).unwrap_or_default();
                for (i, errors) in errors.iter_mut().enumerate() {
                    errors.push(found.get(i).map_or(1.0, |f| f.1.max(0.0)));
                }
            }
            errors
        }
    }
}

fn steps(method: Method) -> &'static [usize] {
    match method {
        Method::Full => &STEPS,
        Method::Diag => &DIAGONAL_STEPS,
    }
}

fn choose(units: &[Units], goal: Goal, options: &Options) -> Allocation {
    let prices = Prices { steps: steps(options.method), method: options.method, storage: options.storage };
    let flat: Vec<Unit> = units.iter().flatten().map(|u| u.1.clone()).collect();
    allocate(&flat, goal, prices)
}

/// `--auto`: the number of clusters by a few sites, then bases and own factors by all.
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
    let mut best: Option<(f64, usize)> = None;
    let mut clusters = 1;
    while clusters <= (n / 4).max(1) {
        let settings =
            ClusterOptions { clusters, rank: CLUSTER_RANK, rounds: SEARCH_ROUNDS, seed: options.seed };
        let clustering = cluster_on(collection, &sample, settings, &Silent, cancel)?;
        progress.stage(&format!("trying {clusters} bases"), sample.len());
        let found = units(collection, options, &clustering, &sample, progress, cancel)?;
        let got = choose(&found, scaled, options);
        let score = match scaled {
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
    let found = units(collection, options, &clustering, &modules::single(&sites), progress, cancel)?;
    let allocation = choose(&found, goal, options);
    if allocation.bytes == 0 && allocation.error > 0.0 {
        let Goal::Bytes(budget) = goal else { return Err(Error::Request("no rank was given out".into())) };
        let least = found.iter().flatten().map(|(_, unit)| options.storage.basis_bytes(unit.shape, 1)).min();
        return Err(Error::Request(format!(
            "{budget} bytes hold nothing of {n} adapters: one rank of one module takes {}",
            least.unwrap_or(0)
        )));
    }
    let expected = Some((allocation.error, allocation.bytes));
    let mut choices = allocation.choices.into_iter();
    let of_site = |units: &Units| {
        let of = |((members, _), choice): (&(Vec<usize>, Unit), Choice)| assigned(members, choice);
        units.iter().zip(choices.by_ref()).map(of).collect()
    };
    let ranks = Ranks::Chosen(found.iter().map(of_site).collect());
    Ok(Plan { sites, clustering, ranks, expected })
}

fn assigned(members: &[usize], choice: Choice) -> Assigned {
    let own = members.iter().zip(&choice.forms).filter_map(|(member, form)| match form {
        Form::Shared => None,
        Form::Own(rank) => Some((*member, *rank)),
    });
    let mut own: Vec<(usize, usize)> = own.collect();
    own.sort_unstable();
    Assigned { rank: choice.rank, own }
}
