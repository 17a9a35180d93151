//! Writing a pack or a segment: bases first, then adapters one by one, then the tables.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::{Seek, SeekFrom, Write},
};

use lory_kernels::QuantType;

use crate::{
    Error, Result, Tensor,
    adapter::{BaseInfo, Fingerprint, Site, SiteShape, SiteShapes, hash::Hasher, unknown_name},
    gguf::Writer,
};

use super::{
    Pack,
    encode::{NewAdapter, quantize},
    format::{
        ADAPTER_TYPE, DATA, EntryKind, Factor, INDEX, IndexEntry, NAMES, NO_CLUSTER, RECORD_ALIGN, VERSION,
        factor_name, key,
    },
    index::{check_name, index_hash},
    layout::{self, ULayout},
};

/// What a pack says of itself and of its base.
#[derive(Clone, Debug)]
pub struct PackSpec {
    /// `general.name`.
    pub name: Option<String>,
    /// The base's architecture.
    pub architecture: String,
    /// The base in words, for messages.
    pub base_name: String,
    /// The base's fingerprint.
    pub fingerprint: Fingerprint,
    /// The base's linear layers.
    pub shapes: SiteShapes,
}

impl PackSpec {
    /// For adapters of `base`.
    pub fn of(base: &BaseInfo) -> PackSpec {
        PackSpec {
            name: None,
            architecture: base.architecture.clone(),
            base_name: base.name.clone().unwrap_or_else(|| base.file.to_string()),
            fingerprint: base.fingerprint,
            shapes: base.shapes.clone(),
        }
    }
}

/// One cluster's factors at one site, before they are written.
#[derive(Clone, Copy, Debug)]
pub struct BasisSite {
    /// Whose.
    pub cluster: u32,
    /// Where.
    pub site: Site,
    /// r.
    pub rank: usize,
    /// Format of U; where r is not whole blocks of it, it lies in bands or becomes F16, see [`ULayout`].
    pub u_type: QuantType,
    /// Format of V; may become F16.
    pub v_type: QuantType,
    /// Whether it has no V of its own, but uses that of the last site before it in the cluster which has the
    /// same input ([`Site::input`]) and a V.
    pub shared_v: bool,
}

/// A [`BasisSite`] as it is stored.
#[derive(Clone, Copy, Debug)]
struct Stored {
    given: BasisSite,
    shape: SiteShape,
    u: ULayout,
    v_type: QuantType,
}

impl Stored {
    fn plan(given: BasisSite, shapes: &SiteShapes) -> Result<Stored> {
        let BasisSite { cluster, site, rank, u_type, v_type, .. } = given;
        let fail = |m: String| Err(Error::Request(format!("basis of cluster {cluster}, {site}: {m}")));
        let Some(shape) = shapes.get(site) else {
            return fail("is not in the base".into());
        };
        if rank == 0 || rank > crate::adapter::MAX_RANK {
            return fail(format!("rank {rank}, expected 1 to {}", crate::adapter::MAX_RANK));
        }
        let u = ULayout::plan(u_type, shape.out_features, rank);
        Ok(Stored { given, shape, u, v_type: layout::v_type(site, v_type, u.rank, shape) })
    }

    /// Name, rows and columns of U as stored.
    fn u(&self) -> (String, usize, usize) {
        let factor = if self.u.bands { Factor::UBands } else { Factor::U };
        let (rows, cols) = self.u.size(self.shape.out_features);
        (factor_name(self.given.cluster, self.given.site, factor), rows, cols)
    }

    /// Name of V.
    fn v_name(&self) -> String {
        factor_name(self.given.cluster, self.given.site, Factor::V)
    }

    /// Rows and columns of V as stored.
    fn v_size(&self) -> (usize, usize) {
        match self.given.site {
            Site::TOKEN_EMBD => (self.shape.in_features, self.u.rank),
            _ => (self.u.rank, self.shape.in_features),
        }
    }
}

/// Streams a pack to a file (or to memory). The header is written twice: its length is known at
/// once, the sizes in it only at the end, so a file that was not finished says it has no adapter.
pub struct PackWriter<W> {
    out: W,
    spec: PackSpec,
    /// Factors still to come, in reverse order.
    factors: Vec<Stored>,
    layout: Vec<Stored>,
    ranks: HashMap<(u32, Site), usize>,
    clusters: u32,
    hash: Hasher,
    /// Given for segments: the hash of the pack's bases.
    fixed_hash: Option<String>,
    segment: u32,
    merged: u32,
    /// For segments: the names of the pack.
    known: Option<HashSet<String>>,
    header_len: usize,
    /// Bytes of `adapters.data` so far.
    data: u64,
    entries: BTreeMap<String, (IndexEntry, Option<String>)>,
}

/// Sizes and hashes that are known at the end.
struct Totals {
    data: usize,
    index: usize,
    names: usize,
    hash: String,
    index_hash: String,
}

impl<W: Write + Seek> PackWriter<W> {
    /// Starts a pack with the bases in `layout`, in ascending order of (cluster, site).
    ///
    /// # Errors
    /// [`Error::Request`] for a layout that does not fit the base or is out of order; failures of
    /// `out`.
    pub fn new(out: W, spec: PackSpec, layout: &[BasisSite]) -> Result<Self> {
        if !layout.is_sorted_by(|a, b| (a.cluster, a.site) < (b.cluster, b.site)) {
            return Err(Error::Request("the bases are not in ascending order of cluster and site".into()));
        }
        let clusters = layout.last().map_or(0, |l| l.cluster.saturating_add(1));
        let mut numbers = layout.iter().map(|l| l.cluster).collect::<Vec<_>>();
        numbers.dedup();
        if numbers.len() != clusters as usize {
            return Err(Error::Request(format!(
                "of {clusters} clusters only {} have a basis",
                numbers.len()
            )));
        }
        let stored: Vec<_> = layout.iter().map(|l| Stored::plan(*l, &spec.shapes)).collect::<Result<_>>()?;
        check_shared(&stored)?;
        Self::start(out, spec, stored, clusters, None, 0)
    }

    /// Starts the next segment of `pack`, which adds, replaces, renames and removes adapters.
    pub fn segment(out: W, pack: &Pack) -> Result<Self> {
        let clusters = pack.n_clusters() as u32;
        let mut w = Self::start(
            out,
            pack.spec().clone(),
            Vec::new(),
            clusters,
            Some(pack.hash().into()),
            pack.next_segment(),
        )?;
        w.known = Some(pack.names().map(Into::into).collect());
        w.ranks = pack.stored_ranks();
        Ok(w)
    }

    fn start(
        out: W,
        spec: PackSpec,
        layout: Vec<Stored>,
        clusters: u32,
        fixed_hash: Option<String>,
        segment: u32,
    ) -> Result<Self> {
        let mut w = PackWriter {
            out,
            spec,
            factors: layout.iter().rev().copied().collect(),
            ranks: layout.iter().map(|s| ((s.given.cluster, s.given.site), s.u.rank)).collect(),
            layout,
            clusters,
            hash: Hasher::new(),
            fixed_hash,
            segment,
            merged: 0,
            known: None,
            header_len: 0,
            data: 0,
            entries: BTreeMap::new(),
        };
        let nothing = "0".repeat(32);
        let header =
            w.header(&Totals { data: 1, index: 1, names: 1, hash: nothing.clone(), index_hash: nothing })?;
        w.out.write_all(&header).map_err(write_error)?;
        w.header_len = header.len();
        Ok(w)
    }

    /// Says that segments up to this number are already in this pack.
    pub(super) fn set_merged(&mut self, merged: u32) {
        self.merged = merged;
    }

    fn header(&self, t: &Totals) -> Result<Vec<u8>> {
        let sizes = |get: fn(SiteShape) -> usize| -> Vec<u32> {
            let shapes = &self.spec.shapes;
            Site::all(shapes.n_layers()).map(|s| shapes.get(s).map_or(0, |s| get(s) as u32)).collect()
        };
        let mut w = Writer::new();
        w.set_alignment(RECORD_ALIGN as u32)
            .set("general.type", "adapter")
            .set("general.architecture", self.spec.architecture.as_str())
            .set("adapter.type", ADAPTER_TYPE);
        if let Some(name) = &self.spec.name {
            w.set("general.name", name.as_str());
        }
        w.set(key::VERSION, VERSION)
            .set(key::BASE_NAME, self.spec.base_name.as_str())
            .set(key::BASE_FINGERPRINT, self.spec.fingerprint.to_hex())
            .set(key::BLOCK_COUNT, self.spec.shapes.n_layers() as u32)
            .set(key::SITE_OUT, sizes(|s| s.out_features))
            .set(key::SITE_IN, sizes(|s| s.in_features))
            .set(key::CLUSTERS, self.clusters)
            .set(key::HASH, t.hash.as_str())
            .set(key::ADAPTERS, self.entries.len() as u32)
            .set(key::INDEX_HASH, t.index_hash.as_str())
            .set(key::SEGMENT, self.segment)
            .set(key::MERGED, self.merged);
        for s in &self.layout {
            let ((u, u_rows, u_cols), (v_rows, v_cols)) = (s.u(), s.v_size());
            w.tensor(&u, s.u.ty, &[u_cols, u_rows]);
            if !s.given.shared_v {
                w.tensor(&s.v_name(), s.v_type, &[v_cols, v_rows]);
            }
        }
        w.tensor(DATA, QuantType::I8, &[t.data]).tensor(INDEX, QuantType::I8, &[t.index]).tensor(
            NAMES,
            QuantType::I8,
            &[t.names],
        );
        let mut header = Vec::new();
        w.start(&mut header).map_err(write_error)?;
        Ok(header)
    }

    /// Writes the next factors of the layout: `u` is out × r, `v` r × in (for the token embedding
    /// in × r), both row-major; `v` is empty where it is shared.
    pub fn factors(&mut self, u: &[f32], v: &[f32]) -> Result<()> {
        let s = self.next_factors()?;
        let BasisSite { cluster, site, rank, shared_v, .. } = s.given;
        let fail = |m: String| Error::Request(format!("basis of cluster {cluster}, {site}: {m}"));
        let SiteShape { out_features, in_features } = s.shape;
        let v_len = if shared_v { 0 } else { in_features * rank };
        if u.len() != out_features * rank || v.len() != v_len {
            let m = format!(
                "U has {} numbers and V {}, expected {} and {}",
                u.len(),
                v.len(),
                out_features * rank,
                v_len
            );
            return Err(fail(m));
        }
        let ((_, u_rows, u_cols), (v_rows, v_cols)) = (s.u(), s.v_size());
        let u = quantize(s.u.ty, u_rows, u_cols, &s.u.stored(u), u_cols).map_err(fail)?;
        if shared_v {
            return self.put_factors(&s, &u, None);
        }
        let v = quantize(s.v_type, v_rows, v_cols, v, v_cols).map_err(fail)?;
        self.put_factors(&s, &u, Some(&v))
    }

    /// Copies factors that are stored already; they must have the layout's formats and sizes.
    pub(super) fn copy_factors(&mut self, u: &Tensor, v: &Tensor) -> Result<()> {
        let s = self.next_factors()?;
        let same = |t: &Tensor, ty, rows, cols| (t.ty(), t.rows(), t.cols()) == (ty, rows, cols);
        let ((_, u_rows, u_cols), (v_rows, v_cols)) = (s.u(), s.v_size());
        if !same(u, s.u.ty, u_rows, u_cols) || !same(v, s.v_type, v_rows, v_cols) {
            return Err(Error::tensor(u.file(), u.name(), "has another format than its copy would get"));
        }
        let v = (!s.given.shared_v).then(|| v.matrix().bytes());
        self.put_factors(&s, u.matrix().bytes(), v)
    }

    fn next_factors(&mut self) -> Result<Stored> {
        self.factors.pop().ok_or_else(|| Error::Request("all factors of the layout are written".into()))
    }

    fn put_factors(&mut self, s: &Stored, u: &[u8], v: Option<&[u8]>) -> Result<()> {
        let ((u_name, u_rows, u_cols), (v_rows, v_cols)) = (s.u(), s.v_size());
        self.hash.bytes(u_name.as_bytes()).stored(s.u.ty, u_rows, u_cols, u);
        if let Some(v) = v {
            self.hash.bytes(s.v_name().as_bytes()).stored(s.v_type, v_rows, v_cols, v);
        }
        for bytes in [Some(u), v].into_iter().flatten() {
            self.out.write_all(bytes).map_err(write_error)?;
            let padding = bytes.len().next_multiple_of(RECORD_ALIGN) - bytes.len();
            self.out.write_all(&vec![0; padding]).map_err(write_error)?;
        }
        Ok(())
    }

    /// Writes one adapter, after all factors.
    ///
    /// # Errors
    /// [`Error::Request`] naming adapter, site and sizes for what does not fit; failures of the output.
    pub fn adapter(&mut self, adapter: &NewAdapter) -> Result<()> {
        if let Some(c) = adapter.cluster.filter(|c| *c >= self.clusters) {
            let m = format!("adapter `{}`: cluster {c} of {}", adapter.name, self.clusters);
            return Err(Error::Request(m));
        }
        let ranks = &self.ranks;
        let record = adapter.encode(&self.spec.shapes, |c, site| ranks.get(&(c, site)).copied())?;
        self.record(&adapter.name, adapter.cluster.unwrap_or(NO_CLUSTER), adapter.err2(), &record)
    }

    /// Writes a record that is encoded already.
    pub(super) fn record(&mut self, name: &str, cluster: u32, err2: [f32; 2], record: &[u8]) -> Result<()> {
        if !self.factors.is_empty() {
            return Err(Error::Request(format!(
                "{} factors are to be written before adapters",
                self.factors.len()
            )));
        }
        let entry = IndexEntry {
            name_offset: 0,
            name_len: 0,
            kind: EntryKind::Record,
            offset: self.data,
            len: record.len() as u64,
            cluster,
            hash: xxhash_rust::xxh3::xxh3_128(record),
            err2,
        };
        self.insert(name, entry, None)?;
        self.out.write_all(record).map_err(write_error)?;
        let padding = record.len().next_multiple_of(RECORD_ALIGN) - record.len();
        self.out.write_all(&vec![0; padding]).map_err(write_error)?;
        self.data += (record.len() + padding) as u64;
        Ok(())
    }

    /// In a segment: takes an adapter of the pack away.
    pub fn remove(&mut self, name: &str) -> Result<()> {
        self.check_known(name)?;
        self.insert(name, change(EntryKind::Tombstone), None)
    }

    /// In a segment: gives an adapter of the pack another name.
    pub fn rename(&mut self, from: &str, to: &str) -> Result<()> {
        self.check_known(from)?;
        self.insert(to, change(EntryKind::Rename), Some(from.into()))
    }

    fn check_known(&self, name: &str) -> Result<()> {
        match &self.known {
            None => Err(Error::Request("only a segment removes and renames adapters".into())),
            Some(known) if !known.contains(name) => {
                let mut names: Vec<&str> = known.iter().map(String::as_str).collect();
                names.sort_unstable();
                let hint = unknown_name(name, &names);
                Err(Error::Request(format!("the pack has no adapter `{name}`: {hint}")))
            }
            Some(_) => Ok(()),
        }
    }

    fn insert(&mut self, name: &str, entry: IndexEntry, from: Option<String>) -> Result<()> {
        check_name(name).map_err(|e| Error::Request(format!("adapter `{name}`: {e}")))?;
        if self.entries.contains_key(name) {
            return Err(Error::Request(format!("adapter `{name}` is already there")));
        }
        self.entries.insert(name.into(), (entry, from));
        Ok(())
    }

    /// Writes the tables and the final header, and gives the output back, flushed.
    pub fn finish(mut self) -> Result<W> {
        if !self.factors.is_empty() {
            return Err(Error::Request(format!("{} factors were not written", self.factors.len())));
        }
        if self.data == 0 {
            // A tensor has at least one element.
            self.out.write_all(&[0; RECORD_ALIGN]).map_err(write_error)?;
            self.data = RECORD_ALIGN as u64;
        }
        let (mut index, mut names) = (Vec::new(), Vec::new());
        for (name, (entry, from)) in &self.entries {
            let mut entry =
                IndexEntry { name_offset: names.len() as u32, name_len: name.len() as u16, ..*entry };
            names.extend_from_slice(name.as_bytes());
            if let Some(from) = from {
                (entry.offset, entry.len) = (names.len() as u64, from.len() as u64);
                names.extend_from_slice(from.as_bytes());
            }
            index.extend_from_slice(&entry.encode());
        }
        if u32::try_from(names.len()).is_err() {
            return Err(Error::Request(format!("{} bytes of names are too many", names.len())));
        }
        for table in [&mut index, &mut names] {
            table.resize(table.len().max(1).next_multiple_of(RECORD_ALIGN), 0);
            self.out.write_all(table).map_err(write_error)?;
        }
        let totals = Totals {
            data: self.data as usize,
            index: index.len(),
            names: names.len(),
            hash: self.fixed_hash.clone().unwrap_or_else(|| format!("{:032x}", self.hash.finish())),
            index_hash: index_hash(&index, &names),
        };
        let header = self.header(&totals)?;
        if header.len() != self.header_len {
            return Err(Error::Request("the header changed its length".into()));
        }
        self.out.seek(SeekFrom::Start(0)).map_err(write_error)?;
        self.out.write_all(&header).map_err(write_error)?;
        self.out.seek(SeekFrom::End(0)).map_err(write_error)?;
        self.out.flush().map_err(write_error)?;
        Ok(self.out)
    }
}

/// Every site without a V of its own has one before it, of its own rank.
fn check_shared(layout: &[Stored]) -> Result<()> {
    let mut own: Option<&Stored> = None;
    for s in layout {
        let BasisSite { cluster, site, shared_v, .. } = s.given;
        if !shared_v {
            own = Some(s);
            continue;
        }
        let fits = |o: &&Stored| {
            (o.given.cluster, o.given.site.input(), o.u.rank) == (cluster, site.input(), s.u.rank)
        };
        if own.filter(fits).is_none() {
            let m =
                format!("basis of cluster {cluster}, {site}: no V of rank {} before it to share", s.u.rank);
            return Err(Error::Request(m));
        }
    }
    Ok(())
}

fn change(kind: EntryKind) -> IndexEntry {
    let (offset, len) = (0, 0);
    IndexEntry {
        name_offset: 0,
        name_len: 0,
        kind,
        offset,
        len,
        cluster: NO_CLUSTER,
        hash: 0,
        err2: [-1.0; 2],
    }
}

fn write_error(e: std::io::Error) -> Error {
    Error::Write(e.to_string())
}
