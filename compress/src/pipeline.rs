//! From a collection to a pack: clusters, ranks, bases and cores, then one atomic file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use faer::Mat;
use lory_models::adapter::{Site, publish::folder_of};
use rayon::prelude::*;

use crate::allocate::leading_energy;
use crate::baseline::Single;
use crate::cluster::Clustering;
use crate::collection::Collection;
use crate::diag::jd_diag;
use crate::factors::Stack;
use crate::frozen::{Frozen, Method};
use crate::full::{Full, FullOptions, jd_full_shared};
use crate::options::Options;
use crate::own::truncate;
use crate::plan::Plan;
use crate::progress::{Progress, check};
use crate::report::{ModuleReport, Report, Run};
use crate::storage::{Storage, Stored};
use crate::{Error, Result, modules, output, plan};

/// Compresses `collection` and writes the pack at `path`, whole or not at all.
///
/// An interrupted run leaves nothing behind and is simply started again: everything it does is determined
/// by the adapters and the options.
///
/// # Errors
/// Options that make no sense, files that changed or cannot be written, [`Error::Interrupted`].
pub fn compress(
    collection: &Collection,
    options: &Options,
    path: &Path,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Report> {
    let start = Instant::now();
    let mut run = Run::new(collection, options);
    let folder = folder_of(path);
    output::check_place(path, folder)?;
    let compressed = solve(collection, options, folder, &mut run, progress, cancel)?;
    progress.stage("writing the pack", collection.len());
    output::write_pack(collection, options, &compressed, path, progress, cancel)?;
    run.seconds.write = start.elapsed().as_secs_f64() - run.seconds.total();
    let pack_bytes = std::fs::metadata(path).map_err(Error::io(path))?.len();
    Ok(Report::new(collection, options, &compressed, run, pack_bytes))
}

/// Everything that goes into a pack, the bases on disk.
pub(crate) struct Compressed {
    pub plan: Plan,
    /// In the order of [`Compressed::modules`] and, inside, of clusters.
    pub modules: Vec<ModuleResult>,
    /// Per adapter and site (in the order of modules), what represents it there.
    pub cores: Vec<Vec<Option<AdapterCore>>>,
    /// Adapters that keep their own factors, and the mean err² that made them.
    pub private: Vec<Option<f64>>,
    spool: std::sync::Mutex<Spool>,
}

/// One site's bases.
pub(crate) struct ModuleResult {
    pub site: Site,
    pub report: ModuleReport,
    pub bases: Vec<Option<BasisPlace>>,
    pub singles: Vec<Single>,
}

impl ModuleResult {
    /// The adapters' spectra with what a rank costs in a pack.
    pub(crate) fn stored_singles(&self, options: &Options) -> Vec<Single> {
        // By the cost of the full rank: it steps where the layout changes.
        let shape = (self.report.d_out, self.report.d_in);
        let of = |s: &Single| {
            let rank = s.spectrum.len().max(1);
            let rank_bytes = options.storage.basis_bytes(shape, rank) as f64 / rank as f64;
            Single { spectrum: s.spectrum.clone(), rank_bytes }
        };
        self.singles.iter().map(of).collect()
    }
}

/// One cluster's U and V at a site, in the spool.
#[derive(Clone, Debug)]
pub(crate) struct BasisPlace {
    /// r.
    pub rank: usize,
    u: Place,
    /// `None` where an earlier module's V is used.
    v: Option<Place>,
}

impl BasisPlace {
    /// Whether V is that of an earlier module with the same input.
    pub(crate) fn shares_v(&self) -> bool {
        self.v.is_none()
    }
}

#[derive(Clone, Debug)]
struct Place {
    offset: u64,
    shape: Stored,
}

/// What represents one adapter at one site.
#[derive(Clone, Debug)]
pub(crate) struct AdapterCore {
    pub form: CoreForm,
    /// The adapter's norm there, which scales what represents its normalised delta.
    pub scale: f32,
    pub err2: f64,
}

#[derive(Clone, Debug)]
pub(crate) enum CoreForm {
    /// A core on the shared basis: r × r row-major, or r.
    Shared(Vec<f32>),
    /// Factors of its own.
    Own(BasisPlace),
    /// Left out: its bytes do more elsewhere.
    Nothing,
}

/// Quantised bases wait here, module by module, until they are written cluster by cluster.
struct Spool {
    file: File,
    folder: PathBuf,
    len: u64,
}

impl Spool {
    fn put(&mut self, mut stored: Stored) -> Result<Place> {
        let bytes = std::mem::take(&mut stored.bytes);
        let written = self.file.seek(SeekFrom::Start(self.len)).and_then(|_| self.file.write_all(&bytes));
        written.map_err(Error::io(&self.folder))?;
        let place = Place { offset: self.len, shape: stored };
        self.len += bytes.len() as u64;
        Ok(place)
    }

    fn get(&mut self, place: &Place) -> Result<Mat<f32>> {
        let mut stored = place.shape.clone();
        stored.bytes = vec![0; stored.byte_len()];
        let read = self.file.seek(SeekFrom::Start(place.offset));
        read.and_then(|_| self.file.read_exact(&mut stored.bytes)).map_err(Error::io(&self.folder))?;
        Ok(stored.read()?)
    }
}

impl Compressed {
    /// U (d_out × r) and V (r × d_in; nothing where it is shared) of a basis, as readers will see them.
    pub(crate) fn basis(&self, place: &BasisPlace) -> Result<(Mat<f32>, Mat<f32>)> {
        let mut spool = self.spool.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let u = spool.get(&place.u)?;
        let v = match &place.v {
            Some(v) => spool.get(v)?,
            None => Mat::zeros(0, 0),
        };
        Ok((u, v))
    }
}

fn solve(
    collection: &Collection,
    options: &Options,
    folder: &Path,
    run: &mut Run,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Compressed> {
    options.check()?;
    let file = tempfile::tempfile_in(folder).map_err(Error::io(folder))?;
    let spool = Spool { file, folder: folder.into(), len: 0 };
    let spool = std::sync::Mutex::new(spool);
    let clock = Instant::now();
    let plan = plan::plan(collection, options, progress, cancel)?;
    run.seconds.plan = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    let groups = plan.groups(options.share_v);
    progress.stage("compressing modules", groups.len());
    let solved = modules::for_each(collection, &groups, progress, cancel, |sites, stacks| {
        solve_group(sites, &stacks, &plan, options, &spool, cancel)
    })?;
    run.seconds.compress = clock.elapsed().as_secs_f64();
    let mut modules: Vec<ModuleResult> = Vec::new();
    let mut cores = vec![vec![None; plan.sites.len()]; collection.len()];
    for (module, members) in solved.into_iter().flatten() {
        let column = plan.sites.binary_search(&module.site).unwrap_or(0);
        for (member, core) in members {
            cores[member][column] = Some(core);
        }
        modules.push(module);
    }
    modules.sort_by_key(|m| m.site);
    run.curves(collection, options, &plan, progress, cancel)?;
    let private = cores.iter().map(|row| above(row, options.max_error)).collect();
    Ok(Compressed { plan, modules, cores, private, spool })
}

/// The adapter's mean err², if it is above the limit.
fn above(cores: &[Option<AdapterCore>], limit: Option<f64>) -> Option<f64> {
    let known: Vec<f64> = cores.iter().flatten().map(|c| c.err2).collect();
    let mean = known.iter().sum::<f64>() / known.len().max(1) as f64;
    limit.filter(|l| mean > *l).map(|_| mean)
}

type Members = Vec<(usize, AdapterCore)>;

/// One group of sites (most have one), all clusters.
fn solve_group(
    sites: &[Site],
    stacks: &[Stack],
    plan: &Plan,
    options: &Options,
    spool: &std::sync::Mutex<Spool>,
    cancel: &AtomicBool,
) -> Result<Vec<(ModuleResult, Members)>> {
    let clustering = &plan.clustering;
    let one = |c: usize| {
        check(cancel)?;
        let parts: Vec<Stack> =
            sites.iter().zip(stacks).map(|(site, s)| s.select(&sharing(plan, *site, s, c))).collect();
        let rank = sites.first().map_or(0, |s| plan.rank(*s, c));
        solve_cluster(&parts, rank, options)
    };
    let clusters: Vec<Vec<Option<ClusterSite>>> =
        (0..clustering.clusters).into_par_iter().map(one).collect::<Result<_>>()?;
    // Where V is shared, the first module of a cluster that has one keeps it for the others.
    let mut keeps_v: Vec<Option<Site>> = vec![None; clusters.len()];
    let mut per_cluster: Vec<_> = clusters.into_iter().map(Vec::into_iter).collect();
    let mut results = Vec::with_capacity(sites.len());
    for (site, stack) in sites.iter().zip(stacks) {
        let shape = (stack.left.nrows(), stack.right.nrows());
        let mut module = ModuleResult {
            site: *site,
            report: ModuleReport::new(*site, shape, stack.len()),
            bases: Vec::with_capacity(clustering.clusters),
            singles: singles(stack, shape, options.storage),
        };
        let mut members = Vec::new();
        for (of_cluster, keeper) in per_cluster.iter_mut().zip(&mut keeps_v) {
            let Some(found) = of_cluster.next().flatten() else {
                module.bases.push(None);
                continue;
            };
            let own_v = *keeper.get_or_insert(*site) == *site;
            module.report.add_cluster(found.rank, &found.energy, own_v, found.members.len(), options);
            members.extend(found.members);
            let mut spool = spool.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let u = spool.put(found.u)?;
            let v = if own_v { Some(spool.put(found.v)?) } else { None };
            module.bases.push(Some(BasisPlace { rank: found.rank, u, v }));
        }
        members.extend(own_factors(*site, stack, plan, options, spool, cancel)?);
        for (_, core) in &members {
            if let CoreForm::Own(place) = &core.form {
                module.report.core_bytes += options.storage.basis_bytes(shape, place.rank);
            }
        }
        module.report.set_errors(members.iter().map(|(_, core)| core.err2).collect());
        results.push((module, members));
    }
    Ok(results)
}

/// The entries of a stack that use cluster `c`'s basis at the site.
fn sharing(plan: &Plan, site: Site, stack: &Stack, c: usize) -> Vec<usize> {
    let mut positions = plan.clustering.positions(stack, c);
    positions.retain(|p| plan.own_rank(site, stack.members[*p]).is_none());
    positions
}

/// Everyone at a site who does not share there.
fn own_factors(
    site: Site,
    stack: &Stack,
    plan: &Plan,
    options: &Options,
    spool: &std::sync::Mutex<Spool>,
    cancel: &AtomicBool,
) -> Result<Members> {
    let entries = (0..stack.len()).filter_map(|e| Some((e, plan.own_rank(site, stack.members[e])?)));
    let one = |(entry, rank): (usize, usize)| {
        check(cancel)?;
        let scale = stack.norms[entry] as f32;
        if rank == 0 {
            return Ok((stack.members[entry], AdapterCore { form: CoreForm::Nothing, scale, err2: 1.0 }));
        }
        let own = truncate(stack, entry, rank, options.storage)?;
        let mut spool = spool.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let place = BasisPlace { rank, u: spool.put(own.u)?, v: Some(spool.put(own.v)?) };
        Ok((stack.members[entry], AdapterCore { form: CoreForm::Own(place), scale, err2: own.err2 }))
    };
    entries.collect::<Vec<_>>().into_par_iter().map(one).collect()
}

fn singles(stack: &Stack, (d_out, d_in): (usize, usize), storage: Storage) -> Vec<Single> {
    let ty = storage.basis;
    let bits = ty.block_bytes() as f64 / ty.block_len() as f64;
    let rank_bytes = (d_out + d_in) as f64 * bits;
    stack.spectra().into_iter().map(|spectrum| Single { spectrum, rank_bytes }).collect()
}

/// One cluster at one site, ready to be written.
struct ClusterSite {
    rank: usize,
    u: Stored,
    v: Stored,
    members: Members,
    /// Energy of the leading r × r blocks before quantisation, r from 0.
    energy: Vec<f64>,
}

/// One cluster at the sites of a group; `None` where it has no adapter.
fn solve_cluster(parts: &[Stack], rank: usize, options: &Options) -> Result<Vec<Option<ClusterSite>>> {
    let present: Vec<&Stack> = parts.iter().filter(|s| !s.is_empty()).collect();
    if present.is_empty() {
        return Ok(parts.iter().map(|_| None).collect());
    }
    // More columns than the cluster's factors have would be empty.
    let useful = present.iter().map(|s| s.left.ncols().min(s.left.nrows().max(s.right.nrows()))).max();
    let rank = rank.min(useful.unwrap_or(rank)).max(1);
    let full = jd_full_shared(&present, FullOptions::new(rank, options.seed));
    let mut bases = full.u.iter();
    let mut results = Vec::with_capacity(parts.len());
    for stack in parts {
        let basis = if stack.is_empty() { None } else { bases.next() };
        results.push(basis.map(|u| finish(stack, u, &full, rank, options)).transpose()?);
    }
    Ok(results)
}

/// Quantises a basis, and fits the cores to what readers will see.
fn finish(stack: &Stack, u: &Mat<f32>, full: &Full, rank: usize, options: &Options) -> Result<ClusterSite> {
    let exact = Frozen::new(u.clone(), full.v.clone(), Method::Full);
    let energy = leading_energy(&exact.projections(stack));
    let diag = match options.method {
        Method::Full => None,
        Method::Diag => {
            let own = Full { u: vec![u.clone()], v: full.v.clone(), objective: Vec::new() };
            jd_diag(stack, &own, rank, options.seed)
        }
    };
    let (u, v) = diag.as_ref().map_or((u, &full.v), |d| (&d.u, &d.v));
    let at = |m: &Mat<f32>, i: usize, j: usize| if j < m.ncols() { m[(i, j)] } else { 0.0 };
    let u = Stored::u(options.storage.basis, stack.left.nrows(), rank, |i, j| at(u, i, j))?;
    let v = Stored::new(options.storage.basis, rank, stack.right.nrows(), |i, j| at(v, j, i))?;
    let frozen = Frozen::new(u.read()?, v.read()?.transpose().to_owned(), options.method);
    let mut members = Vec::with_capacity(stack.len());
    for (entry, projection) in frozen.projections(stack).iter().enumerate() {
        let core = stored_core(&frozen.core(projection), options.storage)?;
        let err2 = frozen.error2(projection, &core).max(0.0);
        let numbers = (0..core.nrows()).flat_map(|i| (0..core.ncols()).map(move |j| (i, j)));
        let numbers = numbers.map(|p| core[p] as f32).collect();
        let scale = stack.norms[entry] as f32;
        let form = CoreForm::Shared(numbers);
        members.push((stack.members[entry], AdapterCore { form, scale, err2 }));
    }
    Ok(ClusterSite { rank, u, v, members, energy })
}

/// A core as readers will see it.
pub(crate) fn stored_core(core: &Mat<f64>, storage: Storage) -> Result<Mat<f64>> {
    let (r, c) = core.shape();
    let seen = if c == 1 {
        Stored::new(storage.core, 1, r, |_, j| core[(j, 0)] as f32)?.read()?.transpose().to_owned()
    } else {
        Stored::new(storage.core, r, c, |i, j| core[(i, j)] as f32)?.read()?
    };
    Ok(Mat::from_fn(r, c, |i, j| f64::from(seen[(i, j)])))
}

/// Mean err² of one stack at rank `rank` with these clusters, by real bases without quantisation.
pub(crate) fn mean_error(stack: &Stack, clustering: &Clustering, rank: usize, options: &Options) -> f64 {
    let lost: f64 = (0..clustering.clusters)
        .into_par_iter()
        .map(|c| {
            let part = stack.select(&clustering.positions(stack, c));
            if part.is_empty() {
                return 0.0;
            }
            let full = jd_full_shared(&[&part], FullOptions::new(rank, options.seed));
            let kept = match options.method {
                Method::Full => full.objective.last().copied().unwrap_or(0.0),
                Method::Diag => {
                    part.len() as f64 - jd_diag(&part, &full, rank, options.seed).map_or(0.0, |d| d.error)
                }
            };
            part.len() as f64 - kept
        })
        .collect::<Vec<f64>>()
        .iter()
        .sum();
    (lost / stack.len().max(1) as f64).max(0.0)
}
