//! Packs: thousands of adapters that share bases, in one file and its segments.
//!
#![doc = include_str!("FORMAT.md")]

mod encode;
mod format;
mod index;
mod layout;
mod merge;
mod record;
mod segment;
mod synth;
mod writer;

use std::{
    collections::HashMap,
    sync::{Arc, OnceLock},
};

use lory_kernels::backend::BAND;

use crate::{
    Error, Result, Tensor,
    gguf::{Array, Gguf, Metadata, TensorInfo, Value},
};

use super::{
    Adapter, BaseCheck, BaseInfo, Basis, Factors, Fingerprint, Site, SiteShapes, finite, hash::Hasher,
    site::MAX_LAYERS, unknown_name,
};

use format::{Factor, NO_CLUSTER, VERSION, key, parse_factor_name};
use index::{IndexFile, Names, Slot};
use record::Record;

pub use encode::{NewAdapter, NewCore, NewMatrix, StorageTypes};
pub use format::ADAPTER_TYPE;
pub use index::check_name;
pub use layout::{ULayout, row_type};
pub use merge::merge;
pub use record::{AdapterMeta, SiteInfo};
pub use segment::{open_segments, segment_file_name, segment_files, segment_number};
pub use synth::{SynthSpec, synth_pack};
pub use writer::{BasisSite, PackSpec, PackWriter};

/// An open pack. Opening reads the tables; an adapter is read when it is asked for.
pub struct Pack {
    main: Gguf,
    spec: PackSpec,
    hash: String,
    /// Sites of each cluster, ascending.
    clusters: Vec<Vec<ClusterSite>>,
    bases: Vec<OnceLock<Arc<Basis>>>,
    files: Vec<IndexFile>,
    names: Names,
    next_segment: u32,
}

/// Where a cluster has factors.
#[derive(Clone, Copy, Debug)]
struct ClusterSite {
    site: Site,
    /// Whose V it uses: its own, or an earlier one of the same input.
    v_site: Site,
    /// How U is stored: [`Factor::U`] or [`Factor::UBands`].
    u: Factor,
}

/// What the index and an adapter's record say about it.
#[derive(Clone, Debug)]
pub struct AdapterInfo {
    /// Its name.
    pub name: String,
    /// The file that holds it: the pack or a segment.
    pub file: String,
    /// Its cluster; `None` for an adapter with factors of its own.
    pub cluster: Option<u32>,
    /// Length of its record.
    pub bytes: usize,
    /// Mean err² over its sites, where known.
    pub mean_err2: Option<f32>,
    /// Worst err² of a site, where known.
    pub worst_err2: Option<f32>,
    /// Description and source.
    pub meta: AdapterMeta,
    /// Tokens that switch it on; empty for one that always works.
    pub invocation: Vec<u32>,
    /// Its cores.
    pub sites: Vec<SiteInfo>,
}

impl Pack {
    /// Opens a pack with its segments in ascending order of their numbers.
    ///
    /// Reads the bases' table and the index; nothing of the bases' weights or of any record.
    ///
    /// # Errors
    /// Errors naming file and key or tensor for a file that is no pack, of a newer version, damaged
    /// in its tables, or a segment of another pack (naming both).
    pub fn parse(main: Gguf, segments: Vec<Gguf>) -> Result<Pack> {
        let spec = read_spec(&main)?;
        let m = main.metadata();
        let hash = m.str(key::HASH)?.to_owned();
        if m.opt_u32(key::SEGMENT)?.unwrap_or(0) != 0 {
            return Err(m.error(key::SEGMENT, "is not 0: this is a segment; open the pack it belongs to"));
        }
        let clusters = read_clusters(&main)?;
        let merged = m.opt_u32(key::MERGED)?.unwrap_or(0);
        let mut files = vec![IndexFile::open(&main, clusters.len(), false)?];
        let mut next_segment = merged.checked_add(1).ok_or_else(|| {
            m.error(key::MERGED, format!("is {merged}, which leaves no number for a segment"))
        })?;
        for segment in &segments {
            let number = check_segment(segment, &main, &spec, &hash)?;
            if number <= merged {
                continue;
            }
            if number != next_segment {
                let m = format!("is {number}, expected {next_segment}: a segment is missing or given twice");
                return Err(segment.metadata().error(key::SEGMENT, m));
            }
            next_segment = next_segment.saturating_add(1);
            files.push(IndexFile::open(segment, clusters.len(), true)?);
        }
        let names = Names::collect(&files)?;
        let bases = clusters.iter().map(|_| OnceLock::new()).collect();
        Ok(Pack { spec, hash, clusters, bases, files, names, next_segment, main })
    }

    /// The pack's file.
    pub fn file(&self) -> &str {
        self.main.file()
    }

    /// Base, shapes and name.
    pub fn spec(&self) -> &PackSpec {
        &self.spec
    }

    /// The hash of all bases, by which segments name their pack.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The number that a new segment gets.
    pub fn next_segment(&self) -> u32 {
        self.next_segment
    }

    /// Number of clusters: of bases.
    pub fn n_clusters(&self) -> usize {
        self.clusters.len()
    }

    /// Number of adapters.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Names of all adapters in ascending order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.names.iter().map(|(name, _)| name)
    }

    /// Whether there is an adapter of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.names.get(name).is_some()
    }

    /// Compares base and pack.
    ///
    /// # Errors
    /// [`Error::WrongBase`] naming both.
    pub fn check_base(&self, base: &BaseInfo, check: BaseCheck) -> Result<()> {
        base.check(self.file(), &self.spec.architecture, self.spec.fingerprint, check)?;
        // Equal fingerprints of equal shapes: only a forged or broken pack comes further.
        let differs = self.spec.shapes.iter().find(|(site, shape)| base.shapes.get(*site) != Some(*shape));
        match differs {
            None => Ok(()),
            Some((site, s)) => {
                let message = format!(
                    "has {site} as {} x {}, the base {} does not",
                    s.out_features, s.in_features, base.file
                );
                Err(Error::WrongBase { file: self.file().into(), message })
            }
        }
    }

    /// The basis of a cluster; read whole when first asked for: its identity is that of its bytes, whatever the file says.
    ///
    /// # Errors
    /// [`Error::Request`] for a cluster that is not there; errors naming the tensor for factors that do not fit each
    /// other or the pack's sites, or have a weight that is not a finite number.
    pub fn basis(&self, cluster: u32) -> Result<Arc<Basis>> {
        let slot = self.clusters.get(cluster as usize).zip(self.bases.get(cluster as usize));
        let (sites, once) = slot.ok_or_else(|| {
            Error::Request(format!("{}: cluster {cluster} of {}", self.file(), self.clusters.len()))
        })?;
        if let Some(basis) = once.get() {
            return Ok(basis.clone());
        }
        let mut factors = Vec::with_capacity(sites.len());
        for ClusterSite { site, v_site, u: form } in sites.iter().copied() {
            let u = self.main.tensor(&format::factor_name(cluster, site, form))?;
            let v = self.main.tensor(&format::factor_name(cluster, v_site, Factor::V))?;
            let shape = self.spec.shapes.get(site).ok_or_else(|| {
                Error::tensor(self.file(), u.name(), format!("{site} is not in the pack's table of sites"))
            })?;
            finite::check_type(&u)?;
            finite::check_type(&v)?;
            let pair = match form {
                Factor::UBands => Factors::in_bands(site, shape, u, v)?,
                Factor::U | Factor::V => Factors::new(site, shape, u, v)?,
            };
            factors.push((site, pair));
        }
        let mut identity = Hasher::new();
        for t in stored_once(sites, factors.iter().map(|(_, f)| f)) {
            finite::check_finite(t)?;
            identity.bytes(t.name().as_bytes()).tensor(t);
        }
        let basis = Arc::new(Basis::new(identity.finish(), cluster, factors));
        Ok(once.get_or_init(|| basis).clone())
    }

    /// An adapter by name, read and checked now; the pack keeps no copy.
    ///
    /// # Errors
    /// [`Error::Request`] for a name that is not there; errors naming the adapter, its site and
    /// the numbers for a damaged record.
    pub fn adapter(&self, name: &str) -> Result<Arc<Adapter>> {
        let slot = self.slot(name)?;
        let record = self.record(name, slot);
        let basis = match record.cluster {
            NO_CLUSTER => None,
            cluster => Some(self.basis(cluster)?),
        };
        record.decode(&self.spec.shapes, basis).map(Arc::new)
    }

    /// What is known about an adapter without reading its weights.
    pub fn info(&self, name: &str) -> Result<AdapterInfo> {
        let slot = self.slot(name)?;
        let record = self.record(name, slot);
        let (meta, invocation, sites) = record.describe(&self.spec.shapes)?;
        let known = |e: f32| Some(e).filter(|e| *e >= 0.0);
        Ok(AdapterInfo {
            name: name.into(),
            file: (**record.file).into(),
            cluster: Some(record.cluster).filter(|c| *c != NO_CLUSTER),
            bytes: record.len,
            mean_err2: known(slot.err2[0]),
            worst_err2: known(slot.err2[1]),
            meta,
            invocation,
            sites,
        })
    }

    /// Reads everything: the bases' hash and weights, every adapter. Slow; for tools.
    pub fn verify(&self) -> Result<()> {
        self.check_hash()?;
        self.names().try_for_each(|name| self.adapter(name).map(drop))
    }

    /// Compares the bases with the hash that the file gives of them all.
    fn check_hash(&self) -> Result<()> {
        let mut hash = Hasher::new();
        for (cluster, sites) in self.clusters.iter().enumerate() {
            let basis = self.basis(cluster as u32)?;
            for t in stored_once(sites, basis.iter().map(|(_, f)| f)) {
                hash.bytes(t.name().as_bytes()).tensor(t);
            }
        }
        match format!("{:032x}", hash.finish()) == self.hash {
            true => Ok(()),
            false => {
                let m = "is not the hash of the bases: the file is damaged";
                Err(self.main.metadata().error(key::HASH, m))
            }
        }
    }

    /// The site of a cluster whose V is used at `site`: itself, or an earlier one with the same input.
    fn v_site(&self, cluster: u32, site: Site) -> Option<Site> {
        let sites = self.clusters.get(cluster as usize)?;
        sites.iter().find(|s| s.site == site).map(|s| s.v_site)
    }

    /// Rank of every cluster's factors as stored.
    fn stored_ranks(&self) -> HashMap<(u32, Site), usize> {
        let rank = |info: &TensorInfo| match parse_factor_name(&info.name)? {
            (cluster, site, Factor::U) => Some(((cluster, site), info.cols())),
            (cluster, site, Factor::UBands) => Some(((cluster, site), info.cols() / BAND)),
            (_, _, Factor::V) => None,
        };
        self.main.tensors().filter_map(rank).collect()
    }

    fn slot(&self, name: &str) -> Result<&Slot> {
        self.names.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.names().collect();
            let hint = unknown_name(name, &names);
            Error::Request(format!("{}: has no adapter `{name}`: {hint}", self.file()))
        })
    }

    fn record<'a>(&'a self, name: &'a str, slot: &Slot) -> Record<'a> {
        let file = &self.files[slot.file];
        Record {
            file: &file.file,
            name,
            bytes: &file.bytes,
            start: slot.start,
            len: slot.len,
            cluster: slot.cluster,
            hash: slot.hash,
        }
    }
}

impl std::fmt::Debug for Pack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} adapters, {} clusters)", self.file(), self.len(), self.n_clusters())
    }
}

/// The tensors of a cluster's factors in file order, a V that several sites share where it lies.
fn stored_once<'a>(
    sites: &'a [ClusterSite],
    factors: impl Iterator<Item = &'a Factors>,
) -> impl Iterator<Item = &'a Tensor> {
    sites.iter().zip(factors).flat_map(|(s, f)| {
        let v = (s.v_site == s.site).then(|| f.v());
        std::iter::once(f.stored_u()).chain(v)
    })
}

fn read_spec(gguf: &Gguf) -> Result<PackSpec> {
    let m = gguf.metadata();
    let kind = m.opt_str("general.type")?.unwrap_or("model");
    if kind != "adapter" {
        return Err(
            m.error("general.type", format!("is `{kind}`, expected `adapter`: this is no pack of adapters"))
        );
    }
    let ty = m.str("adapter.type")?;
    if ty != ADAPTER_TYPE {
        return Err(m.error("adapter.type", format!("is `{ty}`, expected `{ADAPTER_TYPE}`: this is no pack")));
    }
    let version = m.u32(key::VERSION)?;
    if version != VERSION {
        let what = format!("{}: pack version {version}, this program reads version {VERSION}", key::VERSION);
        return Err(Error::unsupported(m.file(), what));
    }
    let hex = m.str(key::BASE_FINGERPRINT)?;
    let fingerprint: Fingerprint =
        hex.parse().map_err(|()| m.error(key::BASE_FINGERPRINT, "is not 32 hexadecimal digits"))?;
    Ok(PackSpec {
        name: m.opt_str("general.name")?.map(Into::into),
        architecture: m.str("general.architecture")?.into(),
        base_name: m.opt_str(key::BASE_NAME)?.unwrap_or_default().into(),
        fingerprint,
        shapes: read_shapes(m)?,
    })
}

fn read_shapes(m: &Metadata) -> Result<SiteShapes> {
    let n_layers = m.u32(key::BLOCK_COUNT)?;
    if n_layers > MAX_LAYERS {
        return Err(m.error(key::BLOCK_COUNT, format!("is {n_layers}, at most {MAX_LAYERS} make sense")));
    }
    let n_sites = Site::count(n_layers as usize);
    let sizes = |k: &str| match m.get(k) {
        Some(Value::Array(Array::U32(a))) if a.len() == n_sites => Ok(a.as_slice()),
        _ => Err(m.error(k, format!("must be an array of {n_sites} uint32 for {n_layers} layers"))),
    };
    let (out, inp) = (sizes(key::SITE_OUT)?, sizes(key::SITE_IN)?);
    let mut shapes = SiteShapes::new(n_layers as usize);
    for (site, (out, inp)) in Site::all(n_layers as usize).zip(out.iter().zip(inp)) {
        match (*out, *inp) {
            (0, 0) => {}
            (0, _) | (_, 0) => return Err(m.error(key::SITE_OUT, format!("{site} is {out} x {inp}"))),
            (out, inp) => shapes.set(site, out as usize, inp as usize),
        }
    }
    Ok(shapes)
}

/// Finds every cluster's factors; each tensor of the file must be a factor or one of the tables.
fn read_clusters(gguf: &Gguf) -> Result<Vec<Vec<ClusterSite>>> {
    let m = gguf.metadata();
    let n = m.u32(key::CLUSTERS)?;
    // Every cluster has factors, so their number is bounded by the tensors that the file lists.
    if n as usize > gguf.tensors().len() {
        return Err(
            m.error(key::CLUSTERS, format!("is {n}, but the file has {} tensors", gguf.tensors().len()))
        );
    }
    let mut clusters: Vec<Vec<(Site, Factor)>> = vec![Vec::new(); n as usize];
    for info in gguf.tensors() {
        if [format::DATA, format::INDEX, format::NAMES].contains(&&*info.name) {
            continue;
        }
        let Some((cluster, site, factor)) = parse_factor_name(&info.name) else {
            return Err(Error::tensor(
                &info.file,
                &info.name,
                "is no part of a pack that this program knows",
            ));
        };
        let Some(sites) = clusters.get_mut(cluster as usize) else {
            let m = format!("belongs to cluster {cluster}, the pack says it has {n}");
            return Err(Error::tensor(&info.file, &info.name, m));
        };
        sites.push((site, factor));
    }
    let pair = |(cluster, mut found): (usize, Vec<(Site, Factor)>)| {
        found.sort_unstable();
        let mut own: Option<Site> = None;
        let mut sites = Vec::with_capacity(found.len());
        for parts in found.chunk_by(|a, b| a.0 == b.0) {
            let Some((site, first)) = parts.first().copied() else { continue };
            let name = |factor| format::factor_name(cluster as u32, site, factor);
            let has = |wanted| parts.iter().any(|(_, factor)| *factor == wanted);
            let u = match (has(Factor::U), has(Factor::UBands)) {
                (true, true) => {
                    let message = format!("`{}` says the same another way", name(Factor::UBands));
                    return Err(Error::tensor(gguf.file(), &name(Factor::U), message));
                }
                (true, false) => Some(Factor::U),
                (false, true) => Some(Factor::UBands),
                (false, false) => None,
            };
            if has(Factor::V) {
                own = Some(site);
            }
            match own.filter(|o| o.input() == site.input()).zip(u) {
                Some((v_site, u)) => sites.push(ClusterSite { site, v_site, u }),
                None => {
                    let lacks = name(if u.is_some() { Factor::V } else { Factor::U });
                    let message = format!("its counterpart `{lacks}` is missing");
                    return Err(Error::tensor(gguf.file(), &name(first), message));
                }
            }
        }
        if sites.is_empty() {
            return Err(m.error(key::CLUSTERS, format!("is {n}, but cluster {cluster} has no factors")));
        }
        Ok(sites)
    };
    clusters.into_iter().enumerate().map(pair).collect()
}

fn check_segment(segment: &Gguf, main: &Gguf, spec: &PackSpec, hash: &str) -> Result<u32> {
    let m = segment.metadata();
    let theirs = read_spec(segment)?;
    let other = m.str(key::HASH)?;
    if other != hash || theirs.fingerprint != spec.fingerprint || theirs.shapes != spec.shapes {
        let message = format!(
            "is a segment of another pack: its bases have hash {other}, those of {} have {hash}",
            main.file()
        );
        return Err(Error::WrongBase { file: m.file().into(), message });
    }
    match m.u32(key::SEGMENT)? {
        0 => Err(m.error(key::SEGMENT, "is 0: this is a pack of its own, not a segment")),
        n => Ok(n),
    }
}
