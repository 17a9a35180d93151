//! The adapters to be compressed: found, checked, and read one module at a time.
//!
//! Every file is opened once from end to end, which checks all of it; what is kept is where each module's
//! factors lie. Later passes read just those ranges, so that memory holds one module, not the collection.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use faer::Mat;
use lory_kernels::QuantType;
use lory_models::adapter::pack::check_name;
use lory_models::adapter::peft::{PeftAdapter, PeftFolder, PermutedHeads};
use lory_models::adapter::{Adapter, BaseInfo, CoreMatrix, Delta, Site, gguf_lora};
use lory_models::gguf::Gguf;
use lory_models::{Bytes, Tensor};
use rayon::prelude::*;

use crate::factors::{Factors, Stack};
use crate::progress::{Progress, check};
use crate::storage::read_matrix;
use crate::{Error, Result};

/// What kind of file an adapter came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceKind {
    /// A GGUF file with one LoRA.
    Gguf,
    /// A folder with `adapter_config.json`.
    Peft,
}

/// An adapter that was found but not read yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name: the stem of the file, or the folder's name.
    pub name: String,
    /// File or folder.
    pub path: PathBuf,
    /// Which of the two.
    pub kind: SourceKind,
}

impl Source {
    /// Recognises one adapter; `None` for a folder that is not a PEFT adapter.
    fn recognise(path: &Path) -> Result<Option<Source>> {
        let meta = fs::metadata(path).map_err(Error::io(path))?;
        let (kind, name) = if meta.is_dir() {
            if !path.join("adapter_config.json").exists() {
                return Ok(None);
            }
            // `.` and `..` have a name only once resolved.
            let named = fs::canonicalize(path).map_err(Error::io(path))?;
            (SourceKind::Peft, named.file_name().map(|n| n.to_string_lossy().into_owned()))
        } else if meta.is_file() {
            (SourceKind::Gguf, path.file_stem().map(|n| n.to_string_lossy().into_owned()))
        } else {
            let message = format!("{}: is neither a file nor a folder", path.display());
            return Err(Error::Request(message));
        };
        let name = name.filter(|n| !n.is_empty());
        let name = name.ok_or_else(|| Error::Request(format!("{}: has no name", path.display())))?;
        Ok(Some(Source { name, path: path.into(), kind }))
    }

    /// All adapters of the given paths in order: each an adapter, or a folder of adapters (one level deep,
    /// by name; what is neither a `.gguf` file nor a PEFT folder is passed over).
    ///
    /// # Errors
    /// Paths that cannot be read, a folder without an adapter, two adapters of one name (naming both paths).
    pub fn find(paths: &[PathBuf]) -> Result<Vec<Source>> {
        let mut found = Vec::new();
        for path in paths {
            match Source::recognise(path)? {
                Some(source) => found.push(source),
                None => found.extend(Source::folder(path)?),
            }
        }
        let mut seen: HashMap<&str, &Path> = HashMap::new();
        for s in &found {
            // Known now, and not when the pack is written at the end.
            check_name(&s.name).map_err(|e| Error::Request(format!("{}: {e}", s.path.display())))?;
            if let Some(first) = seen.insert(&s.name, &s.path) {
                return Err(Error::Request(format!(
                    "two adapters are called `{}`: {} and {}; rename one of them",
                    s.name,
                    first.display(),
                    s.path.display()
                )));
            }
        }
        Ok(found)
    }

    fn folder(path: &Path) -> Result<Vec<Source>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path).map_err(Error::io(path))? {
            entries.push(entry.map_err(Error::io(path))?.path());
        }
        entries.sort();
        let mut found = Vec::new();
        for entry in entries {
            let gguf = entry.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
            if gguf || entry.is_dir() {
                found.extend(Source::recognise(&entry)?);
            }
        }
        if found.is_empty() {
            let message = format!(
                "{}: holds no adapter, neither a .gguf file nor a folder with adapter_config.json",
                path.display()
            );
            return Err(Error::Request(message));
        }
        Ok(found)
    }

    /// Reads and checks the adapter, whole. `gguf` gives the base's weights to adapters that need them.
    ///
    /// # Errors
    /// Everything that is wrong with the file, or with the file on this base.
    pub fn load(&self, base: &BaseInfo, gguf: Option<&Gguf>) -> Result<Loaded> {
        match self.kind {
            SourceKind::Gguf => {
                let bytes: Arc<Vec<u8>> = Arc::new(read_regular(&self.path)?);
                let shown: Arc<str> = self.path.to_string_lossy().into();
                let file = Gguf::parse(vec![(shown, bytes.clone() as Bytes)])?;
                let adapter = gguf_lora::load(&self.name, &file, base)?;
                Ok(Loaded { adapter, files: vec![(self.path.clone(), bytes)], kind: "lora".into() })
            }
            SourceKind::Peft => self.load_peft(base, gguf),
        }
    }

    fn load_peft(&self, base: &BaseInfo, gguf: Option<&Gguf>) -> Result<Loaded> {
        let at = PeftFolder::find(&self.path)?;
        let config = Arc::new(read_regular(&at.config)?);
        let weights = Arc::new(read_regular(&at.weights)?);
        let permuted = match gguf {
            Some(gguf) => PermutedHeads::from_metadata(gguf.metadata())?,
            None => None,
        };
        let peft = PeftAdapter::read(&self.name, &config, weights.clone() as Bytes, base, permuted)?;
        let adapter = peft.into_adapter(base, |site| weight(gguf?, base, site))?;
        let dora = adapter.cores().iter().any(|(_, core)| core.row_scale.is_some());
        let kind = if dora { "dora" } else { "lora" };
        let files = vec![(at.config, config), (at.weights, weights)];
        Ok(Loaded { adapter, files, kind: kind.into() })
    }
}

/// A file's bytes; never waits for a FIFO or reads a device.
fn read_regular(path: &Path) -> Result<Vec<u8>> {
    if !fs::metadata(path).map_err(Error::io(path))?.is_file() {
        return Err(Error::Request(format!("{}: is not a regular file", path.display())));
    }
    fs::read(path).map_err(Error::io(path))
}

/// The base's weight at a site, cut out of a fused tensor where there is one.
fn weight(gguf: &Gguf, base: &BaseInfo, site: Site) -> Option<Tensor> {
    if let Ok(t) = gguf.tensor(&format!("{site}.weight"))
        && base.shapes.get(site)?.out_features == t.rows()
    {
        return Some(t);
    }
    if site == Site::OUTPUT {
        // Tied: the embedding is the output too.
        return gguf.tensor("token_embd.weight").ok();
    }
    let layer = site.layer_index()?;
    ["attn_qkv", "ffn_up"].into_iter().find_map(|fused| {
        let name = format!("blk.{layer}.{fused}");
        let (_, rows) = base.targets(&name)?.into_iter().find(|(s, _)| *s == site)?;
        gguf.tensor(&format!("{name}.weight")).ok()?.slice_rows(rows).ok()
    })
}

/// An adapter in memory, with the files that its tensors may point into.
pub struct Loaded {
    /// The adapter.
    pub adapter: Adapter,
    /// Each file read, with its bytes.
    pub files: Vec<(PathBuf, Arc<Vec<u8>>)>,
    /// What it was: `lora`, `dora` …
    pub kind: String,
}

/// A range of a file that holds one matrix.
#[derive(Clone, Debug)]
struct Region {
    /// Index into the entry's files; `None` for the collection's scratch file.
    file: Option<usize>,
    offset: u64,
    ty: QuantType,
    rows: usize,
    cols: usize,
}

/// Where one adapter's delta at one module lies, and what else it does there.
#[derive(Clone, Debug)]
pub struct SiteEntry {
    u: Region,
    v: Region,
    core: Option<Vec<f32>>,
    /// r of the factors.
    pub rank: usize,
    /// The resolved scale.
    pub scale: f32,
    /// Bytes of the factors as they were stored.
    pub bytes: u64,
}

/// The row scales and biases that an adapter has at a module beside its delta.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// g.
    pub delta_scale: Option<Vec<f32>>,
    /// s.
    pub row_scale: Option<Vec<f32>>,
    /// b.
    pub bias: Option<Vec<f32>>,
}

/// One checked adapter of a collection.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Where it came from.
    pub source: Source,
    /// What it was: `lora`, `dora` …
    pub kind: String,
    /// A hash of its files.
    pub source_hash: String,
    /// Bytes of its factors as they were stored.
    pub bytes: u64,
    /// Its deltas by site.
    pub sites: BTreeMap<Site, SiteEntry>,
    /// What it has beside deltas.
    pub extras: BTreeMap<Site, Extras>,
    /// Tokens that switch it on.
    pub invocation: Vec<u32>,
    files: Vec<(PathBuf, u64, Option<SystemTime>)>,
}

/// Adapters of one base, ready to be read module by module.
pub struct Collection {
    /// The base.
    pub base: BaseInfo,
    /// The adapters, in the order given.
    pub entries: Vec<Entry>,
    /// Matrices that no file holds as they are needed (turned, permuted, joined while reading).
    scratch: Mutex<Scratch>,
}

struct Scratch {
    file: Option<File>,
    len: u64,
}

impl Collection {
    /// Reads and checks every adapter; `scratch_folder` takes what cannot be read in place later.
    ///
    /// # Errors
    /// The first adapter in order that cannot be used on this base; [`Error::Interrupted`].
    pub fn open(
        base: BaseInfo,
        gguf: Option<&Gguf>,
        sources: &[Source],
        scratch_folder: &Path,
        progress: &dyn Progress,
        cancel: &AtomicBool,
    ) -> Result<Collection> {
        progress.stage("reading adapters", sources.len());
        let scratch = Mutex::new(Scratch { file: None, len: 0 });
        let one = |source: &Source| {
            check(cancel)?;
            let entry = index(source, source.load(&base, gguf)?, &scratch, scratch_folder);
            progress.step();
            entry
        };
        let results: Vec<Result<Entry>> = sources.par_iter().map(one).collect();
        let entries = results.into_iter().collect::<Result<Vec<_>>>()?;
        if entries.is_empty() {
            return Err(Error::Request("no adapter was given".into()));
        }
        Ok(Collection { base, entries, scratch })
    }

    /// Number of adapters.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The sites where any adapter has a delta that shares a basis, ascending. The token embedding is not
    /// among them: its factor has one row per token, and few adapters have one.
    pub fn sites(&self) -> Vec<Site> {
        let mut sites: Vec<Site> = self.entries.iter().flat_map(|e| e.sites.keys().copied()).collect();
        sites.sort_unstable();
        sites.dedup();
        sites.retain(|s| *s != Site::TOKEN_EMBD);
        sites
    }

    /// (d_out, d_in) of a site.
    pub fn shape(&self, site: Site) -> (usize, usize) {
        self.base.shapes.get(site).map_or((0, 0), |s| (s.out_features, s.in_features))
    }

    /// One adapter's delta at a site, scale and inner core folded into B; `None` if it has none there.
    ///
    /// # Errors
    /// A file that changed since it was checked; a delta that overflows, or whose norm is not zero and no normal f32.
    pub fn factors(&self, adapter: usize, site: Site) -> Result<Option<Factors>> {
        let Some(entry) = self.entries.get(adapter) else { return Ok(None) };
        let Some(at) = entry.sites.get(&site) else { return Ok(None) };
        let u = self.read(entry, &at.u)?;
        let v = self.read(entry, &at.v)?;
        let v = if site == Site::TOKEN_EMBD { v.transpose().to_owned() } else { v };
        let u = match &at.core {
            None => u,
            Some(c) if c.len() == at.rank => Mat::from_fn(u.nrows(), at.rank, |i, j| u[(i, j)] * c[j]),
            Some(c) => {
                let core = faer::MatRef::from_row_major_slice(c, at.rank, at.rank);
                crate::linalg::mul(u.as_ref(), core)
            }
        };
        let b = Mat::from_fn(u.nrows(), u.ncols(), |i, j| u[(i, j)] * at.scale);
        let factors = Factors { b, a: v };
        match factors.fault() {
            None => Ok(Some(factors)),
            Some(m) => Err(Error::Request(format!("{}: {site}: {m}", entry.source.path.display()))),
        }
    }

    /// All adapters' deltas at a site.
    ///
    /// # Errors
    /// Those of [`Collection::factors`].
    pub fn stack(&self, site: Site) -> Result<Stack> {
        let with: Vec<usize> =
            (0..self.len()).filter(|&i| self.entries[i].sites.contains_key(&site)).collect();
        let read = |&i: &usize| Ok(self.factors(i, site)?.map(|f| (i, f)));
        let items: Vec<Option<(usize, Factors)>> = with.par_iter().map(read).collect::<Result<_>>()?;
        let items: Vec<(usize, Factors)> = items.into_iter().flatten().collect();
        let (d_out, d_in) = self.shape(site);
        Ok(Stack::new(d_out, d_in, &items))
    }

    /// Bytes that [`Collection::stack`] takes for a site, about.
    pub fn stack_bytes(&self, site: Site) -> usize {
        let (d_out, d_in) = self.shape(site);
        let rank: usize = self.entries.iter().filter_map(|e| e.sites.get(&site)).map(|s| s.rank).sum();
        rank * (d_out + d_in) * size_of::<f32>()
    }

    fn read(&self, entry: &Entry, region: &Region) -> Result<Mat<f32>> {
        let numbers = region.rows * region.cols;
        let len = region.ty.bytes_for(numbers).unwrap_or(0);
        let mut bytes = vec![0u8; len];
        match region.file.and_then(|i| entry.files.get(i)) {
            Some((path, size, modified)) => {
                let mut file = File::open(path).map_err(Error::io(path))?;
                let meta = file.metadata().map_err(Error::io(path))?;
                if meta.len() != *size || meta.modified().ok() != *modified {
                    return Err(Error::Request(format!(
                        "{}: changed while it was compressed",
                        path.display()
                    )));
                }
                file.seek(SeekFrom::Start(region.offset)).map_err(Error::io(path))?;
                file.read_exact(&mut bytes).map_err(Error::io(path))?;
            }
            None => {
                let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(file) = &mut scratch.file {
                    file.seek(SeekFrom::Start(region.offset))?;
                    file.read_exact(&mut bytes)?;
                }
            }
        }
        Ok(read_matrix(region.ty, region.rows, region.cols, &bytes)?)
    }
}

/// Notes where everything lies; the adapter itself is dropped by the caller.
fn index(source: &Source, loaded: Loaded, scratch: &Mutex<Scratch>, folder: &Path) -> Result<Entry> {
    let mut files = Vec::new();
    let mut hash = Fnv::default();
    for (path, bytes) in &loaded.files {
        let meta = fs::metadata(path).map_err(Error::io(path))?;
        files.push((path.clone(), bytes.len() as u64, meta.modified().ok()));
        hash.add(bytes);
    }
    let mut entry = Entry {
        name: source.name.clone(),
        source: source.clone(),
        kind: loaded.kind.clone(),
        source_hash: hash.finish(),
        bytes: 0,
        sites: BTreeMap::new(),
        extras: BTreeMap::new(),
        invocation: loaded.adapter.invocation().to_vec(),
        files,
    };
    for (site, core) in loaded.adapter.cores() {
        let extras = Extras {
            delta_scale: vector(&core.delta_scale)?,
            row_scale: vector(&core.row_scale)?,
            bias: vector(&core.bias)?,
        };
        if extras.delta_scale.is_some() || extras.row_scale.is_some() || extras.bias.is_some() {
            entry.extras.insert(*site, extras);
        }
        let (factors, matrix) = match &core.delta {
            Delta::Private(factors, matrix) if !factors.is_in_bands() => (factors, matrix),
            Delta::None => continue,
            _ => {
                return Err(Error::Request(format!("{}: is part of a pack already", source.path.display())));
            }
        };
        let core_numbers = match matrix {
            CoreMatrix::Full(t) | CoreMatrix::Diagonal(t) => Some(numbers(t)?),
            CoreMatrix::Identity => None,
        };
        let place = |t: &Tensor| locate(t, &loaded.files, scratch, folder);
        let at = SiteEntry {
            u: place(factors.stored_u())?,
            v: place(factors.v())?,
            core: core_numbers,
            rank: factors.rank(),
            scale: core.scale,
            bytes: factors.bytes() as u64,
        };
        entry.bytes += at.bytes;
        entry.sites.insert(*site, at);
    }
    Ok(entry)
}

fn numbers(t: &Tensor) -> Result<Vec<f32>> {
    let m = t.matrix();
    let mut out = vec![0.0; m.rows() * m.cols()];
    lory_kernels::quant::dequantize_row(m.ty(), m.bytes(), &mut out)?;
    Ok(out)
}

fn vector(t: &Option<Tensor>) -> Result<Option<Vec<f32>>> {
    t.as_ref().map(numbers).transpose()
}

/// The file range of a tensor that points into a file's bytes; any other is put into the scratch file.
fn locate(
    t: &Tensor,
    files: &[(PathBuf, Arc<Vec<u8>>)],
    scratch: &Mutex<Scratch>,
    folder: &Path,
) -> Result<Region> {
    let m = t.matrix();
    let region = |file, offset| Region { file, offset, ty: m.ty(), rows: m.rows(), cols: m.cols() };
    let start = m.bytes().as_ptr() as usize;
    for (i, (_, bytes)) in files.iter().enumerate() {
        let offset = start.wrapping_sub(bytes.as_ptr() as usize);
        if offset.checked_add(m.bytes().len()).is_some_and(|end| end <= bytes.len()) {
            return Ok(region(Some(i), offset as u64));
        }
    }
    let mut scratch = scratch.lock().unwrap_or_else(PoisonError::into_inner);
    let offset = scratch.len;
    let file = match &mut scratch.file {
        Some(file) => file,
        none => none.insert(tempfile::tempfile_in(folder).map_err(Error::io(folder))?),
    };
    file.seek(SeekFrom::Start(offset)).and_then(|_| file.write_all(m.bytes())).map_err(Error::io(folder))?;
    scratch.len += m.bytes().len() as u64;
    Ok(region(None, offset))
}

/// FNV-1a over 64-bit words, twice: a name for content, not a defence.
#[derive(Default)]
struct Fnv(u64, u64);

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for w in words {
            self.word(u64::from_le_bytes(*w));
        }
        for b in rest {
            self.word(u64::from(*b));
        }
        self.word(bytes.len() as u64);
    }

    fn word(&mut self, w: u64) {
        self.0 = (self.0 ^ w).wrapping_mul(0x0000_0100_0000_01B3);
        self.1 = (self.1 ^ w.rotate_left(32)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
    }

    fn finish(&self) -> String {
        format!("{:016x}{:016x}", self.0, self.1)
    }
}
