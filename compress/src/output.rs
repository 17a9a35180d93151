//! Writing the pack: bases cluster by cluster, then one record per adapter.

use std::fs::File;
use std::io::BufWriter;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use faer::{Mat, MatRef};
use lory_kernels::QuantType;
use lory_models::adapter::pack::{
    AdapterMeta, BasisSite, NewAdapter, NewCore, NewMatrix, PackSpec, PackWriter, StorageTypes, segment_files,
};
use lory_models::adapter::publish::remove_abandoned;
use lory_models::adapter::{Existing, Site, publish};

use crate::collection::{Collection, Entry, Extras};
use crate::factors::Factors;
use crate::frozen::Method;
use crate::options::Options;
use crate::pipeline::{AdapterCore, Compressed, CoreForm};
use crate::progress::{Progress, check};
use crate::{Error, Result};

/// Whether a pack can stand at `path`: known before the long work, not behind it. What a run that was killed left in
/// the folder goes.
pub(crate) fn check_place(path: &Path, folder: &Path) -> Result<()> {
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        return Err(Error::Request(format!("{}: is there already and is no regular file", path.display())));
    }
    remove_abandoned(folder);
    let old = segment_files(path).map_err(Error::io(folder))?;
    match old.first() {
        None => Ok(()),
        Some(segment) => Err(Error::Request(format!(
            "{}: belongs to the pack that stood at {}; merge or delete it first",
            segment.display(),
            path.display()
        ))),
    }
}

/// Writes everything beside `path` and moves it there when it is complete.
pub(crate) fn write_pack(
    collection: &Collection,
    options: &Options,
    compressed: &Compressed,
    path: &Path,
    progress: &dyn Progress,
    cancel: &AtomicBool,
) -> Result<()> {
    publish(path, Existing::Replace, |file| {
        let out = BufWriter::with_capacity(1 << 20, file);
        let mut writer = PackWriter::new(out, PackSpec::of(&collection.base), &layout(options, compressed))?;
        write_bases(&mut writer, compressed, cancel)?;
        for adapter in 0..collection.len() {
            check(cancel)?;
            writer.adapter(&new_adapter(collection, options, compressed, adapter)?)?;
            progress.step();
        }
        let mut out = writer.finish()?;
        std::io::Write::flush(&mut out)?;
        Ok(())
    })
    .map_err(|e: Error| e.at(path))
}

/// Clusters that have a basis anywhere, renumbered without gaps: an all-zero adapter may be alone in one.
fn numbering(compressed: &Compressed) -> Vec<Option<u32>> {
    let mut next = 0;
    (0..compressed.plan.clustering.clusters)
        .map(|c| {
            let used = compressed.modules.iter().any(|m| m.bases.get(c).is_some_and(Option::is_some));
            used.then(|| {
                next += 1;
                next - 1
            })
        })
        .collect()
}

fn layout(options: &Options, compressed: &Compressed) -> Vec<BasisSite> {
    let numbers = numbering(compressed);
    let mut layout = Vec::new();
    for (c, number) in numbers.iter().enumerate() {
        let Some(cluster) = *number else { continue };
        for module in &compressed.modules {
            if let Some(Some(basis)) = module.bases.get(c) {
                let (u_type, v_type) = (options.storage.basis, options.storage.basis);
                let (site, rank, shared_v) = (module.site, basis.rank, basis.shares_v());
                layout.push(BasisSite { cluster, site, rank, u_type, v_type, shared_v });
            }
        }
    }
    layout
}

fn write_bases(
    writer: &mut PackWriter<BufWriter<&mut File>>,
    compressed: &Compressed,
    cancel: &AtomicBool,
) -> Result<()> {
    for c in 0..compressed.plan.clustering.clusters {
        for module in &compressed.modules {
            check(cancel)?;
            if let Some(Some(place)) = module.bases.get(c) {
                let (u, v) = compressed.basis(place)?;
                writer.factors(&row_major(u.as_ref()), &row_major(v.as_ref()))?;
            }
        }
    }
    Ok(())
}

fn row_major(m: MatRef<'_, f32>) -> Vec<f32> {
    m.row_iter().flat_map(|row| row.iter().copied().collect::<Vec<f32>>()).collect()
}

fn new_adapter(
    collection: &Collection,
    options: &Options,
    compressed: &Compressed,
    adapter: usize,
) -> Result<NewAdapter> {
    let Some(entry) = collection.entries.get(adapter) else {
        return Err(Error::Request(format!("adapter {adapter} is not in the collection")));
    };
    let private = compressed.private.get(adapter).copied().flatten().is_some();
    let cluster = compressed.plan.clustering.assignment.get(adapter).copied().unwrap_or(0);
    let number = numbering(compressed).get(cluster).copied().flatten();
    let cores = new_cores(collection, adapter, |site| {
        let column = compressed.plan.sites.binary_search(&site).ok().filter(|_| !private);
        let core = column.and_then(|c| compressed.cores.get(adapter)?.get(c)?.as_ref());
        core.map(|core| packed_core(compressed, core, options)).transpose()
    })?;
    Ok(NewAdapter {
        name: entry.name.clone(),
        cluster: if private { None } else { number },
        meta: meta(entry),
        invocation: entry.invocation.clone(),
        cores,
        types: storage_types(options.storage.core),
    })
}

/// Everything an adapter does, by site: as `packed` has it, else by itself.
pub(crate) fn new_cores(
    collection: &Collection,
    adapter: usize,
    packed: impl Fn(Site) -> Result<Option<NewCore>>,
) -> Result<Vec<(Site, NewCore)>> {
    let Some(entry) = collection.entries.get(adapter) else { return Ok(Vec::new()) };
    let all = sites(entry);
    let mut cores: Vec<(Site, NewCore)> = Vec::new();
    for &site in &all {
        let mut core = match packed(site)? {
            Some(core) => core,
            None => match collection.factors(adapter, site)? {
                // A delta that is zero needs nothing.
                Some(f) if f.norm2() > 0.0 => private_core(site, f)?,
                _ => NewCore::shared(NewMatrix::None, 0, 1.0, None),
            },
        };
        add_extras(&mut core, entry.extras.get(&site));
        // One that was left out stays, to say what is lost there.
        let nothing = matches!(core.matrix, NewMatrix::None) && core.err2.is_none();
        let empty = nothing && !entry.extras.contains_key(&site);
        // An adapter that does nothing at all still needs one place to say so.
        if !empty || (cores.is_empty() && all.last() == Some(&site)) {
            cores.push((site, core));
        }
    }
    Ok(cores)
}

pub(crate) fn meta(entry: &Entry) -> AdapterMeta {
    AdapterMeta {
        source: entry.source.path.to_string_lossy().into_owned(),
        source_hash: entry.source_hash.clone(),
        kind: entry.kind.clone(),
        ..AdapterMeta::default()
    }
}

/// Factors that were an adapter's own before are not rounded to the bases' format: halves, as [`private_core`] counts on.
pub(crate) fn storage_types(core: QuantType) -> StorageTypes {
    StorageTypes { core, factors: QuantType::F16, vectors: QuantType::F32 }
}

fn sites(entry: &Entry) -> Vec<Site> {
    let mut sites: Vec<Site> = entry.sites.keys().chain(entry.extras.keys()).copied().collect();
    sites.sort_unstable();
    sites.dedup();
    sites
}

fn packed_core(compressed: &Compressed, core: &AdapterCore, options: &Options) -> Result<NewCore> {
    let err2 = Some(core.err2 as f32);
    match &core.form {
        CoreForm::Shared(numbers) => Ok(shared_core(numbers, core.scale, core.err2, options.method)),
        CoreForm::Own(place) => {
            let (u, v) = compressed.basis(place)?;
            let mut new = NewCore::shared(NewMatrix::Identity, place.rank, core.scale, err2);
            new.factors = Some((row_major(u.as_ref()), row_major(v.as_ref())));
            new.factor_type = Some(options.storage.basis);
            Ok(new)
        }
        CoreForm::Nothing => Ok(NewCore::shared(NewMatrix::None, 0, 1.0, err2)),
    }
}

pub(crate) fn shared_core(numbers: &[f32], scale: f32, err2: f64, method: Method) -> NewCore {
    let (matrix, rank) = match method {
        Method::Full => (NewMatrix::Full(numbers.to_vec()), numbers.len().isqrt()),
        Method::Diag => (NewMatrix::Diagonal(numbers.to_vec()), numbers.len()),
    };
    NewCore::shared(matrix, rank, scale, Some(err2 as f32))
}

/// Own factors, normalised and halved in scale between them so that F16 holds them, with their rounding as err².
pub(crate) fn private_core(site: Site, f: Factors) -> Result<NewCore> {
    let norm = f.norm2().sqrt();
    let balance = (crate::linalg::norm2(f.a.as_ref()) / crate::linalg::norm2(f.b.as_ref())).sqrt().sqrt();
    let sb = (balance / norm.sqrt()) as f32;
    let sa = (1.0 / (balance * norm.sqrt())) as f32;
    let half = |x: f32| f32::from(half::f16::from_f32(x));
    let b = Mat::from_fn(f.b.nrows(), f.b.ncols(), |i, j| half(f.b[(i, j)] * sb));
    let a = Mat::from_fn(f.a.nrows(), f.a.ncols(), |i, j| half(f.a[(i, j)] * sa));
    let rank = f.b.ncols();
    let scale = norm as f32;
    // ‖BA − scale·B'A'‖² as the norm of one product of twice the rank.
    let both = Factors {
        b: Mat::from_fn(
            b.nrows(),
            2 * rank,
            |i, j| if j < rank { f.b[(i, j)] } else { -scale * b[(i, j - rank)] },
        ),
        a: Mat::from_fn(2 * rank, a.ncols(), |i, j| if i < rank { f.a[(i, j)] } else { a[(i - rank, j)] }),
    };
    let err2 = both.norm2() / (norm * norm);
    let v = if site == Site::TOKEN_EMBD { row_major(a.transpose()) } else { row_major(a.as_ref()) };
    let mut core = NewCore::shared(NewMatrix::Identity, rank, scale, Some(err2 as f32));
    core.factors = Some((row_major(b.as_ref()), v));
    Ok(core)
}

fn add_extras(core: &mut NewCore, extras: Option<&Extras>) {
    let Some(extras) = extras else { return };
    core.delta_scale = extras.delta_scale.clone();
    core.row_scale = extras.row_scale.clone();
    core.bias = extras.bias.clone();
}
