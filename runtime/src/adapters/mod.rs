//! Adapters by name: loaded, replaced and unloaded while sessions run.
//!
//! Every loading has an [`AdapterId`] of its own, and later ones have higher numbers. A session keeps
//! the adapters it was given until it is given others, so replacing or unloading a name never changes
//! an answer that has begun.
//!
//! Adapters of a pack are read when they are first asked for, by the thread that asks, outside all
//! locks of running sessions; a device with memory of its own gets its copies then too. Under a byte
//! budget, those that no session uses are given up again, the least recently used first; their ids
//! stay valid, and they are read again when they are needed.

mod open;
mod record;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use lory_kernels::{Backend, Device};
use lory_models::adapter::{Adapter, AdapterSet, BaseCheck, pack::Pack, unknown_name};

use crate::{
    Error, LoadedModel, Result,
    mapping::{File, Loading, OpenGguf},
};

pub use open::open_pack;
pub(crate) use record::Bound;
use record::{Record, Resident};

/// One loading of one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(u64);

impl AdapterId {
    /// The id as a number that foreign code can keep; no two loadings of an engine share one, and of
    /// two loadings of a name the later one has the higher.
    pub fn to_u64(self) -> u64 {
        self.0
    }

    /// The id with this number. One that was never given out is refused where it is used.
    pub fn from_u64(id: u64) -> AdapterId {
        AdapterId(id)
    }
}

/// What the store tells about an adapter.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AdapterInfo {
    /// The name it answers to.
    pub name: String,
    /// The file or folder it came from.
    pub origin: PathBuf,
    /// Whether it came from a pack, and can be brought in again from there.
    pub in_pack: bool,
    /// Whether it is in memory.
    pub loaded: bool,
    /// Bytes that belong to this adapter alone; 0 until it has been brought in.
    pub bytes: usize,
    /// Which loading the name means now ([`AdapterId::to_u64`]); 0 if it was never asked for.
    pub generation: u64,
    /// Requests that used this loading.
    pub uses: u64,
    /// Sessions that have it now.
    pub sessions: usize,
    /// Tokens that switch it on; empty for an adapter that always works, and until it has been
    /// brought in.
    pub invocation: Vec<u32>,
}

/// What all adapters of a store occupy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AdapterUsage {
    /// Adapters in memory, those included that were unloaded or replaced while sessions used them.
    pub loaded: usize,
    /// Bytes that they have for themselves; shared bases do not count.
    pub bytes: usize,
    /// How many there may be.
    pub budget: Option<usize>,
    /// How often one was brought in.
    pub loads: u64,
    /// How often one was given up for the budget.
    pub evictions: u64,
}

struct OpenPack {
    path: PathBuf,
    pack: Arc<Pack>,
    files: Arc<[Arc<File>]>,
}

#[derive(Default)]
struct State {
    records: HashMap<AdapterId, Arc<Record>>,
    names: BTreeMap<String, AdapterId>,
    packs: Vec<OpenPack>,
    resident: Arc<Resident>,
    /// Bases whose pages have been touched.
    warm: HashSet<u128>,
    next: u64,
    budget: Option<usize>,
    loads: u64,
    evictions: u64,
}

/// The adapters of one engine.
pub struct AdapterStore {
    model: Arc<LoadedModel>,
    device: Arc<Device>,
    loading: Loading,
    state: RwLock<State>,
}

impl AdapterStore {
    pub(crate) fn new(
        model: Arc<LoadedModel>,
        device: Arc<Device>,
        loading: Loading,
        budget: Option<usize>,
    ) -> Self {
        let state = RwLock::new(State { budget, ..State::default() });
        AdapterStore { model, device, loading, state }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Loads a LoRA, a GGUF file or a PEFT folder, under `name` or the stem of its file name. A
    /// name that is taken is an error; see [`AdapterStore::replace_lora`].
    pub fn load_lora(&self, path: &Path, name: Option<&str>) -> Result<AdapterId> {
        let name = open::name_of(path, name)?;
        self.check_free(&path.to_string_lossy(), &name)?;
        let (adapter, files) = open::lora(&self.model, self.loading, path, &name)?;
        self.insert(name, adapter, path.into(), files, false)
    }

    /// Loads a LoRA as [`AdapterStore::load_lora`] does, in place of what had the name before.
    /// Requests that run go on with what they began with.
    pub fn replace_lora(&self, path: &Path, name: Option<&str>) -> Result<AdapterId> {
        let name = open::name_of(path, name)?;
        let (adapter, files) = open::lora(&self.model, self.loading, path, &name)?;
        self.insert(name, adapter, path.into(), files, true)
    }

    /// Loads a GGUF LoRA from a container that is open already, such as bytes in memory
    /// ([`crate::mapping::parse`]). `replace` says whether the name may be taken.
    pub fn load_open_lora(&self, open: OpenGguf, name: &str, replace: bool) -> Result<AdapterId> {
        let origin = PathBuf::from(open.gguf.file());
        if !replace {
            self.check_free(open.gguf.file(), name)?;
        }
        let (adapter, files) = open::gguf_lora(&self.model, open, name)?;
        self.insert(name.into(), adapter, origin, files, replace)
    }

    fn check_free(&self, file: &str, name: &str) -> Result<()> {
        match self.read().knows(name) {
            true => Err(taken(file, name)),
            false => Ok(()),
        }
    }

    fn insert(
        &self,
        name: String,
        adapter: Adapter,
        origin: PathBuf,
        files: Vec<Arc<File>>,
        replace: bool,
    ) -> Result<AdapterId> {
        let line = format!("{}: adapter `{name}`, {} bytes", origin.display(), adapter.bytes());
        let mut state = self.write();
        if !replace && state.knows(&name) {
            return Err(taken(&origin.to_string_lossy(), &name));
        }
        let old = if replace { state.names.get(&name).copied() } else { None };
        state.make_room(&name, adapter.bytes(), old)?;
        let (id, adapter) = (state.next_id(), Some(Arc::new(adapter)));
        let record = Record::new(id, name, origin, files.into(), None, adapter, &state.resident);
        state.loads += 1;
        let id = state.put(record);
        drop(state);
        // Without the lock: who takes the log may ask for adapters.
        tracing::info!("{line}");
        Ok(id)
    }

    /// Opens a pack of this base. Its adapters are brought in when they are first asked for.
    /// Returns how many it has.
    pub fn open_pack(&self, path: &Path) -> Result<usize> {
        let (pack, files) = open::pack(path, self.loading)?;
        self.add_pack(path.into(), pack, files)
    }

    /// Opens a pack whose files are open already: the pack and its segments in ascending order.
    pub fn open_pack_files(&self, main: OpenGguf, segments: Vec<OpenGguf>) -> Result<usize> {
        let path = PathBuf::from(main.gguf.file());
        let (pack, files) = open::parse_pack(main, segments)?;
        self.add_pack(path, pack, files)
    }

    fn add_pack(&self, path: PathBuf, pack: Pack, files: Vec<Arc<File>>) -> Result<usize> {
        pack.check_base(&self.model.base, BaseCheck::Exact)?;
        let mut state = self.write();
        if let Some(name) = pack.names().find(|name| state.knows(name)) {
            let message = format!("has an adapter named `{name}`, which is there already");
            return Err(Error::io(&path.to_string_lossy(), message));
        }
        let count = pack.len();
        state.packs.push(OpenPack { path, pack: Arc::new(pack), files: files.into() });
        Ok(count)
    }

    /// Opens a pack again that was opened from the same path, with what was added, replaced and
    /// removed since. Requests that run go on with what they began with; from now on names mean what
    /// the new file says. Returns how many adapters it has.
    pub fn reopen_pack(&self, path: &Path) -> Result<usize> {
        let (pack, files) = open::pack(path, self.loading)?;
        pack.check_base(&self.model.base, BaseCheck::Exact)?;
        let mut state = self.write();
        let Some(old) = state.packs.iter().position(|p| p.path == path) else {
            return Err(Error::io(&path.to_string_lossy(), "was not opened as a pack; open it first"));
        };
        let foreign = |name: &&str| {
            state.packs.iter().enumerate().any(|(i, p)| i != old && p.pack.contains(name))
                || state.names.get(*name).and_then(|id| state.records.get(id)).is_some_and(|r| !r.is_packed())
        };
        if let Some(name) = pack.names().find(foreign) {
            let message = format!("has an adapter named `{name}`, which is there from elsewhere");
            return Err(Error::io(&path.to_string_lossy(), message));
        }
        let count = pack.len();
        state.drop_pack(old);
        state.packs.push(OpenPack { path: path.into(), pack: Arc::new(pack), files: files.into() });
        Ok(count)
    }

    /// Takes a pack and all its names out of the store. Sessions keep what they use.
    pub fn close_pack(&self, path: &Path) -> Result<()> {
        let mut state = self.write();
        match state.packs.iter().position(|p| p.path == path) {
            Some(at) => {
                state.drop_pack(at);
                Ok(())
            }
            None => Err(Error::io(&path.to_string_lossy(), "was not opened as a pack")),
        }
    }

    /// All names, loaded or waiting in a pack, in alphabetical order.
    pub fn names(&self) -> Vec<String> {
        self.read().all_names().into_iter().map(str::to_owned).collect()
    }

    /// The adapter with this name, brought in from its pack if need be. Reading happens here, in
    /// the calling thread: no running session waits for it.
    pub fn resolve(&self, name: &str) -> Result<AdapterId> {
        let known = self.read().find(name);
        let record = match known {
            Some(record) => record,
            None => self.write().place(name)?,
        };
        self.bring_in(&record)?;
        Ok(record.id())
    }

    /// Brings adapters in ahead of their first use, to the device as well, with the bases that they share. Returns the
    /// bytes that they have for themselves.
    pub fn prefetch(&self, names: &[&str]) -> Result<usize> {
        let mut bytes = 0;
        for name in names {
            let id = self.resolve(name)?;
            let record = self.read().records.get(&id).cloned();
            if let Some(record) = record {
                let adapter = self.bring_in(&record)?;
                self.warm(&adapter)?;
                bytes += adapter.bytes();
            }
        }
        Ok(bytes)
    }

    fn bring_in(&self, record: &Arc<Record>) -> Result<Arc<Adapter>> {
        record.touch();
        let mut read = false;
        let adapter = record.adapter(|adapter| {
            let mut state = self.write();
            state.make_room(record.name(), adapter.bytes(), None)?;
            state.resident.add(adapter.bytes());
            state.loads += 1;
            read = true;
            Ok(())
        })?;
        if read {
            tracing::info!("adapter `{}`: {} bytes", record.name(), adapter.bytes());
        }
        Ok(adapter)
    }

    /// Has everything at hand that a step with this adapter needs, so that no step waits for it.
    fn warm(&self, adapter: &Adapter) -> Result<()> {
        self.warm_basis(adapter);
        let copied = self.device.prefetch(&mut self.model.decoder.weights().lora(adapter));
        Ok(copied.map_err(lory_models::Error::from)?)
    }

    /// Touches a basis' pages, so that the first step with it reads no disk.
    fn warm_basis(&self, adapter: &Adapter) {
        let Some(basis) = adapter.basis() else { return };
        if self.loading == Loading::Read || self.read().warm.contains(&basis.identity()) {
            return;
        }
        for (_, factors) in basis.iter() {
            for tensor in [factors.stored_u(), factors.v()] {
                let sum = tensor.matrix().bytes().iter().step_by(4096).fold(0u8, |a, b| a.wrapping_add(*b));
                std::hint::black_box(sum);
            }
        }
        self.write().warm.insert(basis.identity());
    }

    /// Takes a name out of the store and frees it as soon as no session uses it. Sessions that do
    /// keep it until they change. An adapter of a pack can be brought in again.
    pub fn unload(&self, name: &str) -> Result<()> {
        let mut state = self.write();
        match state.names.get(name).copied() {
            Some(id) => {
                state.retire(id);
                Ok(())
            }
            None => Err(state.unknown(name)),
        }
    }

    /// What is known about a name.
    pub fn info(&self, name: &str) -> Result<AdapterInfo> {
        let state = self.read();
        if let Some(record) = state.find(name) {
            return Ok(record.info());
        }
        match state.packs.iter().find(|p| p.pack.contains(name)) {
            Some(pack) => Ok(AdapterInfo {
                name: name.into(),
                origin: pack.path.clone(),
                in_pack: true,
                loaded: false,
                bytes: 0,
                generation: 0,
                uses: 0,
                sessions: 0,
                invocation: Vec::new(),
            }),
            None => Err(state.unknown(name)),
        }
    }

    /// What all adapters occupy.
    pub fn usage(&self) -> AdapterUsage {
        let state = self.read();
        let (loaded, bytes) = (state.resident.count(), state.resident.bytes());
        let State { budget, loads, evictions, .. } = *state;
        AdapterUsage { loaded, bytes, budget, loads, evictions }
    }

    /// Bytes that adapters may have for themselves. When more are needed, adapters of packs that no
    /// session uses are given up, the least recently used first; if that is not enough, bringing in
    /// another one is [`Error::AdapterBudget`].
    pub fn set_budget(&self, bytes: Option<usize>) {
        let mut state = self.write();
        state.budget = bytes;
        // What is in use stays, whatever the budget says.
        let _ = state.make_room("", 0, None);
    }

    /// The adapters behind ids, with their weights, held for a session. Cold ones are read here.
    pub(crate) fn bind(&self, adapters: &[(AdapterId, f32)]) -> Result<Bound> {
        let records = {
            let state = self.read();
            let find = |(id, scale): &(AdapterId, f32)| match state.records.get(id) {
                // Counted as used before it is read, so that the budget leaves it alone.
                Some(record) => Ok((record.hold(), *scale)),
                None => Err(Error::Request(format!("adapter {} was unloaded or replaced", id.0))),
            };
            adapters.iter().map(find).collect::<Result<Vec<_>>>()?
        };
        let mut entries = Vec::with_capacity(records.len());
        for (held, scale) in &records {
            held.files().iter().try_for_each(|f| f.check_unchanged())?;
            let adapter = self.bring_in(held.record())?;
            self.warm(&adapter)?;
            entries.push((adapter, *scale));
        }
        Ok(Bound::new(AdapterSet::new(entries)?, records))
    }
}

impl State {
    fn next_id(&mut self) -> AdapterId {
        self.next += 1;
        AdapterId(self.next)
    }

    fn knows(&self, name: &str) -> bool {
        self.names.contains_key(name) || self.packs.iter().any(|p| p.pack.contains(name))
    }

    fn find(&self, name: &str) -> Option<Arc<Record>> {
        self.names.get(name).and_then(|id| self.records.get(id)).cloned()
    }

    /// The record of a name, made if a pack has it and nobody asked for it before.
    fn place(&mut self, name: &str) -> Result<Arc<Record>> {
        if let Some(record) = self.find(name) {
            return Ok(record);
        }
        let Some(pack) = self.packs.iter().find(|p| p.pack.contains(name)) else {
            return Err(self.unknown(name));
        };
        let (origin, files, pack) = (pack.path.clone(), pack.files.clone(), pack.pack.clone());
        let id = self.next_id();
        let record = Record::new(id, name.into(), origin, files, Some(pack), None, &self.resident);
        let id = self.put(record);
        self.records.get(&id).cloned().ok_or_else(|| self.unknown(name))
    }

    fn put(&mut self, record: Record) -> AdapterId {
        if let Some(old) = self.names.get(record.name()).copied() {
            self.retire(old);
        }
        let id = record.id();
        self.names.insert(record.name().into(), id);
        self.records.insert(id, Arc::new(record));
        id
    }

    fn retire(&mut self, id: AdapterId) {
        let Some(record) = self.records.remove(&id) else { return };
        if self.names.get(record.name()) == Some(&id) {
            self.names.remove(record.name());
        }
    }

    fn drop_pack(&mut self, at: usize) {
        let pack = self.packs.remove(at);
        let its = |r: &&Arc<Record>| r.is_of(&pack.pack);
        let ids: Vec<AdapterId> = self.records.values().filter(its).map(|r| r.id()).collect();
        ids.into_iter().for_each(|id| self.retire(id));
    }

    /// Gives up what nobody uses until `needed` more bytes fit. `instead` is about to go, and its bytes
    /// with it.
    fn make_room(&mut self, name: &str, needed: usize, instead: Option<AdapterId>) -> Result<()> {
        let Some(budget) = self.budget else { return Ok(()) };
        let idle = |r: &Record| r.sessions() == 0;
        let going = instead.and_then(|id| self.records.get(&id)).filter(|r| idle(r)).map_or(0, |r| r.bytes());
        let mut busy = HashSet::new();
        loop {
            let used = self.resident.bytes().saturating_sub(going);
            if used.saturating_add(needed) <= budget {
                return Ok(());
            }
            // What can never fit costs nobody anything.
            let cold = self
                .records
                .values()
                .filter(|r| r.is_packed() && idle(r) && r.bytes() > 0 && Some(r.id()) != instead)
                .filter(|r| !busy.contains(&r.id()))
                .filter(|_| needed <= budget)
                .min_by_key(|r| r.last_used());
            let Some(record) = cold else {
                return Err(Error::AdapterBudget { name: name.into(), needed, used, budget });
            };
            match record.evict() {
                Some(_) => self.evictions += 1,
                None => drop(busy.insert(record.id())),
            }
        }
    }

    fn all_names(&self) -> Vec<&str> {
        let packed = self.packs.iter().flat_map(|p| p.pack.names());
        let mut names: Vec<_> = self.names.keys().map(String::as_str).chain(packed).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    fn unknown(&self, name: &str) -> Error {
        let names = self.all_names();
        let hint = if names.is_empty() { "none is loaded".to_owned() } else { unknown_name(name, &names) };
        Error::UnknownAdapter { name: name.into(), hint }
    }
}

fn taken(file: &str, name: &str) -> Error {
    Error::io(file, format!("an adapter named `{name}` is there already; unload it or give another name"))
}
