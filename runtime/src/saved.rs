//! Sessions in files: tokens, and the keys and values that were computed for them.
//!
//! A file is little-endian: a header that says what it fits ([`Header`]), the adapters, the tokens,
//! the pages as the device lays them out, and XXH3-128 over everything before. It is restored only
//! where model, cache and adapters are the same, and only if all of it is sound; until then it is in
//! nobody's way, and a failed restore leaves nothing behind. Since whoever can write the file can
//! write a sound checksum, restored pages are never shared with other sessions.

use std::{
    fs,
    io::{self, BufReader, BufWriter, Read, Write},
    path::Path,
    sync::Arc,
};

use lory_kernels::{
    Backend,
    backend::{KvShape, KvType, RopeStyle},
};
use lory_models::adapter::{AdapterSet, Existing, Phases, publish};
use xxhash_rust::xxh3::Xxh3;

use crate::{
    Engine, Error, Result, Session, SessionOptions, engine::Shared, mapping::open_regular, memory,
    sequence::works_from,
};

const MAGIC: [u8; 8] = *b"LORYKV\x1a\n";
const VERSION: u32 = 1;

/// Why a file cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RestoreProblem {
    /// It is no saved session.
    Foreign,
    /// It was saved by another version of the format.
    Version,
    /// It is cut off, or its bytes are not those that were written.
    Damaged,
    /// It belongs to another model, or to this one with other positions.
    OtherModel,
    /// Its keys and values have another type, shape or layout than this engine's.
    OtherCache,
    /// It belongs to other adapters or weights of adapters.
    OtherAdapters,
    /// It has more tokens than the context or the cache holds.
    TooLong,
}

/// What a file must agree with.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Header {
    /// Shapes and weights of the base.
    base: [u64; 2],
    /// Hash of the rotary frequencies, which may depend on the context length.
    rope: u64,
    shape: KvShape,
    /// What the device makes of given keys and values; tells layouts apart.
    layout: u128,
    page_bytes: u64,
    mixed: bool,
    adapters: u32,
    tokens: u64,
    cached: u64,
}

/// (identity, bits of λ, the position from which on it works).
type SavedAdapter = (u128, u32, Option<u64>);

/// What is saved besides the pages.
struct Contents {
    header: Header,
    adapters: Vec<SavedAdapter>,
    tokens: Vec<u32>,
}

impl Session {
    /// Saves the session, running or not: its tokens and what is cached of them. The file appears
    /// whole or not at all. Other sessions wait for no more than a page at a time.
    pub fn save(&self, path: &Path) -> Result<()> {
        let pinned = self.pinned_fork();
        let contents = pinned.contents()?;
        let write = |file: &mut fs::File| -> io::Result<()> {
            let mut out = BufWriter::new(file);
            pinned.write(&contents, &mut out)?;
            out.flush()
        };
        publish(path, Existing::Replace, write).map_err(|e| Error::io(&path.to_string_lossy(), e))
    }

    /// [`Session::save`] to anything that takes bytes.
    pub fn save_to(&self, out: &mut dyn Write) -> Result<()> {
        let pinned = self.pinned_fork();
        let contents = pinned.contents()?;
        pinned.write(&contents, out).map_err(|e| Error::io("(a saved session)", e))
    }

    /// A fork whose pages nobody can take.
    fn pinned_fork(&self) -> Session {
        let mut scheduler = self.shared.scheduler();
        let id = scheduler.fork(self.id);
        scheduler.pin(id, true);
        drop(scheduler);
        Session { shared: self.shared.clone(), id }
    }

    fn contents(&self) -> Result<Contents> {
        let scheduler = self.shared.scheduler();
        let s = scheduler.get(self.id);
        let adapters = saved_adapters(&s.adapters.set, &s.phases);
        let tokens = memory::copied(&s.tokens, "the tokens of a session")?;
        let (cached, mixed) = (s.pages.len() as u64, s.mixed);
        let shape = scheduler.cache().shape();
        drop(scheduler);
        let header = Header {
            mixed,
            adapters: adapters.len() as u32,
            tokens: tokens.len() as u64,
            cached,
            ..Header::of(&self.shared, shape)?
        };
        Ok(Contents { header, adapters, tokens })
    }

    fn write(&self, contents: &Contents, out: &mut dyn Write) -> io::Result<()> {
        let mut out = Hashing { inner: out, hash: Xxh3::new() };
        out.write_all(&contents.header.to_bytes())?;
        for (identity, scale, works_from) in &contents.adapters {
            out.write_all(&identity.to_le_bytes())?;
            out.write_all(&scale.to_le_bytes())?;
            out.write_all(&works_from.unwrap_or(u64::MAX).to_le_bytes())?;
        }
        for token in &contents.tokens {
            out.write_all(&token.to_le_bytes())?;
        }
        for i in 0..contents.header.pages() {
            let page = {
                let scheduler = self.shared.scheduler();
                let id = scheduler.get(self.id).pages.ids().get(i).copied();
                let id = id.ok_or_else(|| io::Error::other("the session lost a page"))?;
                self.shared.backend.kv_read_page(scheduler.cache().store(), id).map_err(io::Error::other)?
            };
            out.write_all(&page)?;
        }
        let checksum = out.hash.digest128();
        out.inner.write_all(&checksum.to_le_bytes())
    }
}

impl Engine {
    /// A session from a file that [`Session::save`] wrote, of the same model, with the same adapters
    /// and weights, which `options` give.
    ///
    /// # Errors
    /// [`Error::Restore`] with the reason; [`lory_models::Error::KvFull`] if there is no room. Nothing
    /// of the file remains then.
    pub fn restore(&self, path: &Path, options: &SessionOptions) -> Result<Session> {
        let name = path.to_string_lossy();
        self.restore_from(&mut BufReader::new(open_regular(path)?), &name, options)
    }

    /// [`Engine::restore`] from anything that gives bytes; `name` is what errors call it.
    pub fn restore_from(
        &self,
        input: &mut dyn Read,
        name: &str,
        options: &SessionOptions,
    ) -> Result<Session> {
        let session = self.session(options)?;
        self.shared.scheduler().pin(session.id, true);
        let mut input = Input { inner: input, hash: Xxh3::new(), name };
        session.fill(&mut input)?;
        self.shared.change(|scheduler| scheduler.pin(session.id, false));
        Ok(session)
    }
}

impl Session {
    /// Fills an empty session that nobody has seen yet.
    fn fill(&self, input: &mut Input<'_>) -> Result<()> {
        let (shape, set) = {
            let scheduler = self.shared.scheduler();
            (scheduler.cache().shape(), scheduler.get(self.id).adapters.set.clone())
        };
        let here = Header::of(&self.shared, shape)?;
        let header = input.header()?;
        input.check_fits(&header, &here)?;
        let phases = input.adapters(header.adapters, &set)?;
        self.check_length(input, &header)?;
        let tokens = input.tokens(&header, self.shared.model.decoder.vocab_size())?;

        let (cached, page_len) = (header.cached as usize, shape.page_len);
        {
            let mut scheduler = self.shared.scheduler();
            scheduler.start_restore(self.id, tokens, phases, header.mixed);
        }
        let mut page = Vec::new();
        memory::reserve(&mut page, header.page_bytes as usize, "a page of keys and values")?;
        for i in 0..header.pages() {
            // The length is this engine's own, checked above.
            page.resize(header.page_bytes as usize, 0);
            input.read(&mut page)?;
            let len = page_len.min(cached - i * page_len);
            let mut scheduler = self.shared.scheduler();
            scheduler.reserve(&self.shared.backend, self.id, len, |_| false)?;
            scheduler.write_page(&self.shared.backend, self.id, i, &page)?;
        }
        input.finish()
    }

    fn check_length(&self, input: &Input<'_>, header: &Header) -> Result<()> {
        let (n_ctx, scheduler) = (self.shared.n_ctx, self.shared.scheduler());
        let room = scheduler.cache().total_pages() * scheduler.cache().shape().page_len;
        let most = n_ctx.min(room) as u64;
        if header.cached > header.tokens {
            let m = format!("has {} tokens, of which {} are cached", header.tokens, header.cached);
            return Err(input.problem(RestoreProblem::Damaged, m));
        }
        if header.tokens > most {
            let m = format!(
                "has {} tokens; the context holds {n_ctx}, the KV cache {room}; raise the smaller",
                header.tokens
            );
            return Err(input.problem(RestoreProblem::TooLong, m));
        }
        Ok(())
    }
}

fn saved_adapters(set: &AdapterSet, phases: &Phases) -> Vec<SavedAdapter> {
    let entry = |(adapter, scale): &(Arc<lory_models::adapter::Adapter>, f32)| {
        let works_from = works_from(phases, adapter).map(|start| start as u64);
        (adapter.identity(), scale.to_bits(), works_from)
    };
    set.entries().iter().map(entry).collect()
}

impl Header {
    const BYTES: usize = 8 + 4 + 16 + 8 + 5 * 4 + 16 + 8 + 4 + 4 + 8 + 8;

    /// Of this engine, with nothing in it.
    fn of(shared: &Shared, shape: KvShape) -> Result<Header> {
        let fingerprint = shared.model.base.fingerprint;
        Ok(Header {
            base: [fingerprint.shapes, fingerprint.weights],
            rope: rope_hash(shared),
            shape,
            layout: layout_probe(&*shared.backend, shape)?,
            page_bytes: shared.page_bytes as u64,
            mixed: false,
            adapters: 0,
            tokens: 0,
            cached: 0,
        })
    }

    fn pages(&self) -> usize {
        (self.cached as usize).div_ceil(self.shape.page_len)
    }

    fn to_bytes(self) -> Vec<u8> {
        let KvShape { layers, kv_heads, head_dim, page_len, ty } = self.shape;
        let mut out = Vec::with_capacity(Header::BYTES);
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        self.base.iter().for_each(|v| out.extend(v.to_le_bytes()));
        out.extend(self.rope.to_le_bytes());
        let sizes = [layers, kv_heads, head_dim, page_len].map(|v| v as u32);
        sizes.iter().for_each(|v| out.extend(v.to_le_bytes()));
        out.extend(kv_type_number(ty).to_le_bytes());
        out.extend(self.layout.to_le_bytes());
        out.extend(self.page_bytes.to_le_bytes());
        out.extend(u32::from(self.mixed).to_le_bytes());
        out.extend(self.adapters.to_le_bytes());
        out.extend(self.tokens.to_le_bytes());
        out.extend(self.cached.to_le_bytes());
        debug_assert_eq!(out.len(), Header::BYTES);
        out
    }
}

fn kv_type_number(ty: KvType) -> u32 {
    match ty {
        KvType::F32 => 0,
        KvType::F16 => 1,
        KvType::Q8_0 => 2,
    }
}

fn rope_hash(shared: &Shared) -> u64 {
    let mut hash = Xxh3::new();
    for rope in &shared.model.decoder.weights().ropes {
        let style = match rope.style {
            RopeStyle::Interleaved => 0u32,
            RopeStyle::Neox => 1,
        };
        hash.update(&style.to_le_bytes());
        hash.update(&(rope.inv_freq.len() as u64).to_le_bytes());
        rope.inv_freq.iter().for_each(|f| hash.update(&f.to_le_bytes()));
        hash.update(&rope.magnitude.to_le_bytes());
    }
    hash.digest()
}

/// A hash of how the device stores given keys and values. A page's bytes are the device's own
/// affair; this finds out when they mean something else, without a number that must be kept up.
fn layout_probe<B: Backend>(backend: &B, shape: KvShape) -> Result<u128> {
    let probe = || -> std::result::Result<Vec<u8>, lory_kernels::BackendError> {
        let mut kv = backend.kv_alloc(KvShape { layers: 1, ..shape }, 1)?;
        let n = shape.page_len * shape.kv_heads * shape.head_dim;
        let ramp = |step: f32| (0..n).map(|i| (i % 251) as f32 * step - 1.0).collect::<Vec<f32>>();
        let (mut k, mut v) = (backend.alloc(n)?, backend.alloc(n)?);
        backend.upload(&ramp(0.008), &mut k)?;
        backend.upload(&ramp(-0.03), &mut v)?;
        let slots: Vec<u32> = (0..shape.page_len as u32).collect();
        backend.kv_write(&mut kv, 0, &k, &v, &slots)?;
        backend.kv_read_page(&kv, 0)
    };
    Ok(xxhash_rust::xxh3::xxh3_128(&probe().map_err(lory_models::Error::from)?))
}

/// Passes bytes on and hashes them.
struct Hashing<'a> {
    inner: &'a mut dyn Write,
    hash: Xxh3,
}

impl Hashing<'_> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.inner.write_all(bytes)
    }
}

/// A file being read.
struct Input<'a> {
    inner: &'a mut dyn Read,
    hash: Xxh3,
    name: &'a str,
}

impl Input<'_> {
    fn problem(&self, problem: RestoreProblem, message: impl Into<String>) -> Error {
        Error::Restore { file: self.name.into(), problem, message: message.into() }
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.read_unhashed(bytes)?;
        self.hash.update(bytes);
        Ok(())
    }

    fn read_unhashed(&mut self, bytes: &mut [u8]) -> Result<()> {
        self.inner.read_exact(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => self.problem(RestoreProblem::Damaged, "is cut off"),
            _ => Error::io(self.name, e),
        })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn u128(&mut self) -> Result<u128> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    fn header(&mut self) -> Result<Header> {
        if self.array::<8>()? != MAGIC {
            return Err(self.problem(RestoreProblem::Foreign, "is no saved session"));
        }
        let version = self.u32()?;
        if version != VERSION {
            let m = format!("has version {version} of the format, this program reads version {VERSION}");
            return Err(self.problem(RestoreProblem::Version, m));
        }
        let base = [self.u64()?, self.u64()?];
        let rope = self.u64()?;
        let sizes = [self.u32()?, self.u32()?, self.u32()?, self.u32()?];
        let [layers, kv_heads, head_dim, page_len] = sizes.map(|v| v as usize);
        let ty = match self.u32()? {
            0 => KvType::F32,
            1 => KvType::F16,
            2 => KvType::Q8_0,
            other => {
                let m = format!("has keys and values of an unknown type ({other})");
                return Err(self.problem(RestoreProblem::Damaged, m));
            }
        };
        let shape = KvShape { layers, kv_heads, head_dim, page_len, ty };
        let layout = self.u128()?;
        let page_bytes = self.u64()?;
        let mixed = match self.u32()? {
            0 => false,
            1 => true,
            other => return Err(self.problem(RestoreProblem::Damaged, format!("has flags {other:#x}"))),
        };
        let (adapters, tokens, cached) = (self.u32()?, self.u64()?, self.u64()?);
        Ok(Header { base, rope, shape, layout, page_bytes, mixed, adapters, tokens, cached })
    }

    fn check_fits(&self, header: &Header, here: &Header) -> Result<()> {
        if header.base != here.base || header.rope != here.rope {
            let short =
                |h: &Header| format!("{:08x}-{:08x}-{:08x}", h.base[0] >> 32, h.base[1] >> 32, h.rope >> 32);
            let m = format!(
                "belongs to another model, or to another context length of one whose positions depend on it: {}, here {}",
                short(header),
                short(here)
            );
            return Err(self.problem(RestoreProblem::OtherModel, m));
        }
        let other =
            (header.shape, header.layout, header.page_bytes) != (here.shape, here.layout, here.page_bytes);
        if other {
            let m = format!(
                "has keys and values as {:?} in pages of {} bytes, here they are {:?} in pages of {} bytes",
                header.shape, header.page_bytes, here.shape, here.page_bytes
            );
            return Err(self.problem(RestoreProblem::OtherCache, m));
        }
        Ok(())
    }

    /// Reads the adapters, which must be those of `set`.
    fn adapters(&mut self, count: u32, set: &Arc<AdapterSet>) -> Result<Phases> {
        let entries = set.entries();
        if count as usize != entries.len() {
            let m = format!("was saved with {count} adapters, the session is given {}", entries.len());
            return Err(self.problem(RestoreProblem::OtherAdapters, m));
        }
        let mut activations = vec![None; entries.len()];
        let mut seen = vec![false; entries.len()];
        for _ in 0..count {
            let (identity, scale, works_from) = (self.u128()?, self.u32()?, self.u64()?);
            let found = entries.iter().position(|(a, s)| (a.identity(), s.to_bits()) == (identity, scale));
            let Some(i) = found.filter(|i| !seen[*i]) else {
                let m =
                    "was saved with other adapters, or with other weights of them, than the session is given";
                return Err(self.problem(RestoreProblem::OtherAdapters, m));
            };
            seen[i] = true;
            activations[i] = usize::try_from(works_from).ok().filter(|_| works_from != u64::MAX);
        }
        Ok(Phases::starting(set, &activations))
    }

    /// `header.tokens` was checked against the context.
    fn tokens(&mut self, header: &Header, vocab: usize) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        memory::reserve(&mut tokens, header.tokens as usize, "the tokens of a session")?;
        for _ in 0..header.tokens {
            let token = self.u32()?;
            if token as usize >= vocab {
                let m = format!("holds token {token}, the vocabulary has {vocab}");
                return Err(self.problem(RestoreProblem::Damaged, m));
            }
            tokens.push(token);
        }
        Ok(tokens)
    }

    fn finish(&mut self) -> Result<()> {
        let want = self.hash.digest128();
        let mut checksum = [0; 16];
        self.read_unhashed(&mut checksum)?;
        if u128::from_le_bytes(checksum) != want {
            let m = "does not have the checksum it was written with: the file is damaged";
            return Err(self.problem(RestoreProblem::Damaged, m));
        }
        match self.inner.read(&mut [0]).map_err(|e| Error::io(self.name, e))? {
            0 => Ok(()),
            _ => Err(self.problem(RestoreProblem::Damaged, "goes on behind its end")),
        }
    }
}
