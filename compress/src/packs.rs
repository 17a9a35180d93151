//! Packs that change: adapters join, leave and get other names, without rewriting the others.
//!
//! Every change is a segment file that appears whole beside the pack; readers that have the pack mapped keep
//! what they see. Two programs that change a pack at the same moment cannot both take the next segment's
//! name, so one of them is told to try again.

use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use faer::Mat;
use lory_kernels::QuantType;
use lory_models::adapter::pack::{
    NewAdapter, Pack, PackWriter, merge, open_segments, segment_file_name, segment_files, segment_number,
};
use lory_models::adapter::publish::{folder_of, remove_abandoned};
use lory_models::adapter::{Basis, CoreMatrix, Delta, Existing, Site, publish};
use lory_models::gguf::Gguf;
use lory_models::{Bytes, Tensor};
use rayon::prelude::*;

use crate::collection::Collection;
use crate::factors::Stack;
use crate::frozen::{Frozen, Method};
use crate::output::{meta, new_cores, shared_core, storage_types};
use crate::pipeline::stored_core;
use crate::progress::{Progress, check};
use crate::storage::{Storage, read_matrix, u_of};
use crate::{Error, Result, modules};

/// How files become bytes: mapped by the caller, or read.
pub type ReadFile<'a> = dyn Fn(&Path) -> Result<Bytes> + 'a;

/// Reads whole files into memory, for callers that cannot map.
pub fn read_file(path: &Path) -> Result<Bytes> {
    Ok(Arc::new(std::fs::read(path).map_err(Error::io(path))?))
}

/// Parses one GGUF file.
///
/// # Errors
/// Those of `read` and of the parser.
pub fn open_gguf(path: &Path, read: &ReadFile<'_>) -> Result<Gguf> {
    let name: Arc<str> = path.to_string_lossy().into();
    Ok(Gguf::parse(vec![(name, read(path)?)])?)
}

/// Opens a pack with the segments beside it.
///
/// # Errors
/// A file that cannot be read or is damaged; a segment that is missing.
pub fn open_pack(path: &Path, read: &ReadFile<'_>) -> Result<Pack> {
    let segments = open_segments(path, |e| Error::io(path)(e), |segment| open_gguf(segment, read))?;
    Ok(Pack::parse(open_gguf(path, read)?, segments)?)
}

/// What adding one adapter gave.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Added {
    /// Its name.
    pub name: String,
    /// The cluster it joined; `None` with factors of its own.
    pub cluster: Option<u32>,
    /// Mean err² over its modules on that cluster's basis, quantisation included.
    pub mean_err2: f64,
    /// The worst module.
    pub worst_err2: f64,
    /// Whether the basis fits it much worse than nearly all adapters that it was made from, or hardly at all.
    pub poor: bool,
}

/// Options of [`add`].
#[derive(Clone, Copy, Debug, Default)]
pub struct AddOptions {
    /// Adapters whose mean err² is above this keep their own factors.
    pub max_error: Option<f64>,
    /// Take the place of adapters of the same name, instead of refusing them.
    pub replace: bool,
}

/// Modules that decide which cluster a new adapter joins.
const CHOICE_SITES: usize = 8;
/// A newcomer always fits worse than adapters that the basis was made from; the fit is called poor from this
/// multiple of their 95th percentile on …
const POOR_RATIO: f64 = 2.0;
/// … and never below this err², where nobody could tell the difference in answers.
const POOR_FLOOR: f64 = 0.1;
/// Whatever is usual, and where nobody knows: with a larger mean err² little is left of an adapter.
pub const LITTLE_LEFT: f64 = 0.7;
/// Adapters of the pack whose errors are looked at to know what is usual.
const USUAL_SAMPLE: usize = 500;

/// Projects every adapter of `collection` onto the pack's bases and writes them as the next segment.
///
/// # Errors
/// A name that the pack has, a base that is not the pack's, a segment that another program wrote meanwhile.
pub fn add(
    path: &Path,
    pack: &Pack,
    collection: &Collection,
    options: AddOptions,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<Vec<Added>> {
    pack.check_base(&collection.base, lory_models::adapter::BaseCheck::Exact)?;
    if !options.replace
        && let Some(entry) = collection.entries.iter().find(|e| pack.contains(&e.name))
    {
        return Err(Error::Request(format!("{}: has an adapter `{}` already", path.display(), entry.name)));
    }
    let style = Style::of(pack)?;
    let usual = usual_error(pack)?;
    progress.stage("adding adapters", collection.len());
    let one = |i: usize| {
        check(cancel)?;
        let joined = join(pack, collection, i, &style, usual, options);
        progress.step();
        joined
    };
    let joined: Vec<(Added, NewAdapter)> =
        (0..collection.len()).into_par_iter().map(one).collect::<Result<_>>()?;
    write_segment(path, pack, |w| joined.iter().try_for_each(|(_, new)| Ok(w.adapter(new)?)))?;
    Ok(joined.into_iter().map(|(added, _)| added).collect())
}

/// How the pack stores its cores.
struct Style {
    method: Method,
    core: QuantType,
}

impl Style {
    fn of(pack: &Pack) -> Result<Style> {
        for name in pack.names() {
            if pack.info(name)?.cluster.is_none() {
                continue;
            }
            for (_, core) in pack.adapter(name)?.cores() {
                match &core.delta {
                    Delta::Shared(CoreMatrix::Full(t)) => {
                        return Ok(Style { method: Method::Full, core: t.ty() });
                    }
                    Delta::Shared(CoreMatrix::Diagonal(t)) => {
                        return Ok(Style { method: Method::Diag, core: t.ty() });
                    }
                    _ => {}
                }
            }
        }
        Ok(Style { method: Method::Full, core: Storage::default().core })
    }
}

/// The 95th percentile of the mean err² of the pack's adapters that share a basis.
fn usual_error(pack: &Pack) -> Result<Option<f64>> {
    let mut known = Vec::new();
    for name in pack.names().take(USUAL_SAMPLE) {
        let info = pack.info(name)?;
        if info.cluster.is_some() {
            known.extend(info.mean_err2.map(f64::from));
        }
    }
    Ok((!known.is_empty()).then(|| crate::report::Errors::of(known).p95))
}

fn join(
    pack: &Pack,
    collection: &Collection,
    adapter: usize,
    style: &Style,
    usual: Option<f64>,
    options: AddOptions,
) -> Result<(Added, NewAdapter)> {
    let entry = &collection.entries[adapter];
    let mut stacks: Vec<(Site, Stack)> = Vec::new();
    for site in entry.sites.keys().copied().filter(|s| *s != Site::TOKEN_EMBD) {
        if let Some(f) = collection.factors(adapter, site)? {
            let (d_out, d_in) = collection.shape(site);
            stacks.push((site, Stack::new(d_out, d_in, &[(0, f)])));
        }
    }
    stacks.retain(|(_, s)| !s.is_empty());
    let cluster = nearest(pack, &stacks, style)?;
    let mut cores: Vec<(Site, Fitted)> = Vec::new();
    if let Some(c) = cluster {
        let basis = pack.basis(c)?;
        let fitted: Vec<Option<(Site, Fitted)>> =
            stacks.par_iter().map(|(site, stack)| fit(&basis, *site, stack, style)).collect::<Result<_>>()?;
        cores = fitted.into_iter().flatten().collect();
    }
    let errors: Vec<f64> = cores.iter().map(|(_, c)| c.err2).collect();
    let errors = crate::report::Errors::of(errors);
    let private = cores.is_empty() || options.max_error.is_some_and(|limit| errors.mean > limit);
    let new = NewAdapter {
        name: entry.name.clone(),
        cluster: cluster.filter(|_| !private),
        meta: meta(entry),
        invocation: entry.invocation.clone(),
        cores: new_cores(collection, adapter, |site| {
            let core = cores.iter().find(|(s, _)| *s == site).filter(|_| !private);
            Ok(core.map(|(_, c)| shared_core(&c.numbers, c.scale, c.err2, style.method)))
        })?,
        types: storage_types(style.core),
    };
    let added = Added {
        name: entry.name.clone(),
        cluster: new.cluster,
        mean_err2: errors.mean,
        worst_err2: errors.worst,
        poor: !private
            && errors.mean > usual.map_or(LITTLE_LEFT, |u| (POOR_RATIO * u).clamp(POOR_FLOOR, LITTLE_LEFT)),
    };
    Ok((added, new))
}

/// The cluster with the least error on a few of the adapter's modules.
fn nearest(pack: &Pack, stacks: &[(Site, Stack)], style: &Style) -> Result<Option<u32>> {
    let sites: Vec<Site> = stacks.iter().map(|s| s.0).collect();
    let sample = modules::sample(&sites, CHOICE_SITES, 0);
    let sample: Vec<&(Site, Stack)> = stacks.iter().filter(|s| sample.contains(&s.0)).collect();
    let error = |c: u32| {
        let basis = pack.basis(c)?;
        let mut sum = 0.0;
        for (site, stack) in &sample {
            // Without a basis there the adapter would keep its own factors: as costly as a lost module.
            sum += fit(&basis, *site, stack, style)?.map_or(1.0, |f| f.1.err2);
        }
        Ok((c, sum))
    };
    let errors: Vec<(u32, f64)> =
        (0..pack.n_clusters() as u32).into_par_iter().map(error).collect::<Result<_>>()?;
    Ok(errors.into_iter().min_by(|a, b| a.1.total_cmp(&b.1)).map(|best| best.0))
}

/// A core on a basis that is there already.
struct Fitted {
    numbers: Vec<f32>,
    scale: f32,
    err2: f64,
}

/// The best core of one delta on a basis as it is stored; `None` where the basis has no factors.
fn fit(basis: &Basis, site: Site, stack: &Stack, style: &Style) -> Result<Option<(Site, Fitted)>> {
    let Some(factors) = basis.factors(site) else { return Ok(None) };
    let (u, v) = (u_of(factors)?, numbers(factors.v())?);
    let frozen = Frozen::new(u, v.transpose().to_owned(), style.method);
    let Some(projection) = frozen.projections(stack).into_iter().next() else { return Ok(None) };
    let storage = Storage { core: style.core, ..Storage::default() };
    let core = stored_core(&frozen.core(&projection), storage)?;
    let err2 = frozen.error2(&projection, &core).max(0.0);
    let places = (0..core.nrows()).flat_map(|i| (0..core.ncols()).map(move |j| (i, j)));
    let numbers = places.map(|p| core[p] as f32).collect();
    let scale = stack.norms.first().copied().unwrap_or(0.0) as f32;
    Ok(Some((site, Fitted { numbers, scale, err2 })))
}

fn numbers(t: &Tensor) -> Result<Mat<f32>> {
    let m = t.matrix();
    Ok(read_matrix(m.ty(), m.rows(), m.cols(), m.bytes())?)
}

/// Takes adapters out of a pack; their bytes go at the next merge.
///
/// # Errors
/// A name that is not there.
pub fn remove(path: &Path, pack: &Pack, names: &[String]) -> Result<PathBuf> {
    write_segment(path, pack, |w| names.iter().try_for_each(|n| Ok(w.remove(n)?)))
}

/// Gives an adapter another name.
///
/// # Errors
/// A name that is not there, or one that is taken.
pub fn rename(path: &Path, pack: &Pack, from: &str, to: &str) -> Result<PathBuf> {
    if pack.contains(to) {
        return Err(Error::Request(format!("{}: has an adapter `{to}` already", path.display())));
    }
    write_segment(path, pack, |w| Ok(w.rename(from, to)?))
}

/// Puts a pack and its segments into one file, in the pack's place, and deletes the segments.
///
/// # Errors
/// Damaged records; a file that cannot be written, after which everything is as before.
pub fn merge_segments(path: &Path, pack: &Pack) -> Result<()> {
    remove_abandoned(folder_of(path));
    publish(path, Existing::Replace, |file| {
        let mut out = merge(pack, BufWriter::with_capacity(1 << 20, file))?;
        Ok::<_, Error>(out.flush()?)
    })
    .map_err(|e| e.at(path))?;
    for segment in segment_files(path).map_err(Error::io(path))? {
        // Another program may have added one meanwhile.
        if segment_number(path, &segment).is_none_or(|number| number >= pack.next_segment()) {
            continue;
        }
        match std::fs::remove_file(&segment) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::Io { path: segment, source: e }),
            _ => {}
        }
    }
    Ok(())
}

fn write_segment(
    path: &Path,
    pack: &Pack,
    fill: impl FnOnce(&mut PackWriter<BufWriter<&mut std::fs::File>>) -> Result<()>,
) -> Result<PathBuf> {
    remove_abandoned(folder_of(path));
    let segment = segment_file_name(path, pack.next_segment());
    let written = publish(&segment, Existing::Keep, |file| {
        let mut w = PackWriter::segment(BufWriter::new(file), pack)?;
        fill(&mut w)?;
        Ok::<_, Error>(w.finish()?.flush()?)
    });
    match written.map_err(|e| e.at(&segment)) {
        Ok(()) => Ok(segment),
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::AlreadyExists => Err(Error::Request(
            format!("{}: another program changed the pack at the same moment; try again", path.display()),
        )),
        Err(e) => Err(e),
    }
}
