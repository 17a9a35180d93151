//! Adapters by name: loaded, replaced and unloaded while sessions run.
//!
//! Every load has an [`AdapterId`] of its own. A session keeps the adapters it was given until it
//! is given others, so replacing or unloading a name never changes an answer that has begun.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use lory_models::{
    adapter::{
        Adapter, AdapterSet, BaseCheck, gguf_lora,
        pack::{Pack, segment_files},
        peft::{PeftAdapter, PermutedHeads},
    },
    gguf::Gguf,
};

use crate::{
    Error, LoadedModel, Result,
    mapping::{self, File, Loading},
};

/// One loading of one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(u64);

impl AdapterId {
    /// The id as a number that foreign code can keep; no two loadings of an engine share one.
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
pub struct AdapterInfo {
    /// The name it answers to.
    pub name: String,
    /// The file or folder it came from.
    pub origin: PathBuf,
    /// Whether it came from a pack, and can be brought in again from there.
    pub in_pack: bool,
    /// Whether it has been brought in.
    pub loaded: bool,
    /// Bytes that belong to this adapter alone; 0 until it has been brought in.
    pub bytes: usize,
}

struct Loaded {
    id: AdapterId,
    adapter: Arc<Adapter>,
    origin: PathBuf,
}

#[derive(Default)]
struct State {
    loaded: BTreeMap<String, Loaded>,
    packs: Vec<(PathBuf, Arc<Pack>)>,
    next: u64,
}

/// The adapters of one engine.
pub struct AdapterStore {
    model: Arc<LoadedModel>,
    loading: Loading,
    state: RwLock<State>,
}

impl AdapterStore {
    pub(crate) fn new(model: Arc<LoadedModel>, loading: Loading) -> Self {
        AdapterStore { model, loading, state: RwLock::default() }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Loads a LoRA, a GGUF file or a PEFT folder, under `name` or the stem of its file name. A
    /// name that is taken is an error; see [`AdapterStore::replace_lora`].
    pub fn load_lora(&self, path: &Path, name: Option<&str>) -> Result<AdapterId> {
        let name = name_of(path, name)?;
        if self.knows(&name) {
            let message =
                format!("an adapter named `{name}` is there already; unload it or give another name");
            return Err(Error::io(&path.to_string_lossy(), message));
        }
        self.replace_lora(path, Some(&name))
    }

    /// Loads a LoRA as [`AdapterStore::load_lora`] does, in place of what had the name before.
    pub fn replace_lora(&self, path: &Path, name: Option<&str>) -> Result<AdapterId> {
        let name = name_of(path, name)?;
        let adapter = if path.is_dir() { self.read_peft(path, &name)? } else { self.read_gguf(path, &name)? };
        Ok(self.insert(name, Arc::new(adapter), path.into()))
    }

    fn read_gguf(&self, path: &Path, name: &str) -> Result<Adapter> {
        let gguf = mapping::open_gguf(path, self.loading)?.gguf;
        Ok(gguf_lora::load(name, &gguf, &self.model.base)?)
    }

    fn read_peft(&self, folder: &Path, name: &str) -> Result<Adapter> {
        let config_path = folder.join("adapter_config.json");
        if !config_path.exists() {
            let message =
                "is a folder without adapter_config.json: give a GGUF file or a folder that PEFT saved";
            return Err(Error::io(&folder.to_string_lossy(), message));
        }
        let weights_path = folder.join("adapter_model.safetensors");
        if !weights_path.exists() && folder.join("adapter_model.bin").exists() {
            let message = "holds its weights as a pickle (adapter_model.bin), which may run code and is never read; save it again with safe_serialization=True";
            return Err(Error::io(&folder.to_string_lossy(), message));
        }
        let config = File::open(&config_path, Loading::Read)?;
        let weights = Arc::new(File::open(&weights_path, self.loading)?);
        let LoadedModel { gguf, base, decoder, .. } = &*self.model;
        let permuted = PermutedHeads::from_metadata(gguf.metadata())?;
        let peft = PeftAdapter::read(name, config.as_ref(), weights, base, permuted)?;
        Ok(peft.into_adapter(base, |site| decoder.weights().at(site).cloned())?)
    }

    fn insert(&self, name: String, adapter: Arc<Adapter>, origin: PathBuf) -> AdapterId {
        let mut state = self.write();
        state.next += 1;
        let id = AdapterId(state.next);
        state.loaded.insert(name, Loaded { id, adapter, origin });
        id
    }

    /// Opens a pack of this base. Its adapters are brought in when they are first asked for.
    /// Returns how many it has.
    pub fn open_pack(&self, path: &Path) -> Result<usize> {
        let pack = open_pack(path, self.loading)?;
        pack.check_base(&self.model.base, BaseCheck::Exact)?;
        let taken = pack.names().find(|name| self.knows(name)).map(str::to_owned);
        if let Some(name) = taken {
            let message = format!("has an adapter named `{name}`, which is there already");
            return Err(Error::io(&path.to_string_lossy(), message));
        }
        let count = pack.len();
        self.write().packs.push((path.into(), Arc::new(pack)));
        Ok(count)
    }

    fn knows(&self, name: &str) -> bool {
        let state = self.read();
        state.loaded.contains_key(name) || state.packs.iter().any(|(_, pack)| pack.contains(name))
    }

    /// All names, loaded or waiting in a pack, in alphabetical order.
    pub fn names(&self) -> Vec<String> {
        let state = self.read();
        let packed = state.packs.iter().flat_map(|(_, pack)| pack.names().map(str::to_owned));
        let mut names: Vec<_> = state.loaded.keys().cloned().chain(packed).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The adapter with this name, brought in from its pack if need be.
    pub fn resolve(&self, name: &str) -> Result<AdapterId> {
        let (origin, pack) = {
            let state = self.read();
            if let Some(loaded) = state.loaded.get(name) {
                return Ok(loaded.id);
            }
            match state.packs.iter().find(|(_, pack)| pack.contains(name)) {
                Some((origin, pack)) => (origin.clone(), pack.clone()),
                None => return Err(self.unknown(&state, name)),
            }
        };
        let adapter = pack.adapter(name)?;
        Ok(self.insert(name.into(), adapter, origin))
    }

    fn unknown(&self, state: &State, name: &str) -> Error {
        /// As many names as fit a line; a pack may have thousands.
        const SHOWN: usize = 8;
        let packed = state.packs.iter().flat_map(|(_, pack)| pack.names());
        let mut names: Vec<_> = state.loaded.keys().map(String::as_str).chain(packed).collect();
        names.sort_unstable();
        names.dedup();
        let hint = match names.len() {
            0 => "none is loaded".to_owned(),
            n if n <= SHOWN => format!("there are {}", names.join(", ")),
            n => format!("there are {n}: {} …", names[..SHOWN].join(", ")),
        };
        Error::Request(format!("no adapter named `{name}`: {hint}"))
    }

    /// Takes a name out of the store. Sessions that use the adapter keep it until they change.
    /// An adapter of a pack can be brought in again.
    pub fn unload(&self, name: &str) -> Result<()> {
        let mut state = self.write();
        match state.loaded.remove(name) {
            Some(_) => Ok(()),
            None => Err(self.unknown(&state, name)),
        }
    }

    /// What is known about a name.
    pub fn info(&self, name: &str) -> Result<AdapterInfo> {
        let state = self.read();
        let packed = state.packs.iter().find(|(_, pack)| pack.contains(name));
        if let Some(loaded) = state.loaded.get(name) {
            return Ok(AdapterInfo {
                name: name.into(),
                origin: loaded.origin.clone(),
                in_pack: packed.is_some(),
                loaded: true,
                bytes: loaded.adapter.bytes(),
            });
        }
        match packed {
            Some((origin, _)) => Ok(AdapterInfo {
                name: name.into(),
                origin: origin.clone(),
                in_pack: true,
                loaded: false,
                bytes: 0,
            }),
            None => Err(self.unknown(&state, name)),
        }
    }

    /// The adapters behind ids, with their weights.
    pub(crate) fn set(&self, adapters: &[(AdapterId, f32)]) -> Result<AdapterSet> {
        let state = self.read();
        let find = |(id, scale): &(AdapterId, f32)| match state.loaded.values().find(|l| l.id == *id) {
            Some(loaded) => Ok((loaded.adapter.clone(), *scale)),
            None => Err(Error::Request(format!("adapter {} was unloaded or replaced", id.0))),
        };
        let entries = adapters.iter().map(find).collect::<Result<Vec<_>>>()?;
        Ok(AdapterSet::new(entries)?)
    }
}

/// Opens a pack and the segments beside it, also while another process merges them into it.
pub fn open_pack(path: &Path, loading: Loading) -> Result<Pack> {
    loop {
        // Segments first: a merge replaces the pack before it deletes what it took in. If one is
        // gone before it could be opened, the pack has taken it in, and the list is short of it
        // the next time.
        let listed = segment_files(path).map_err(|e| Error::io(&path.to_string_lossy(), e))?;
        let opened: Result<Vec<Gguf>> =
            listed.iter().map(|p| Ok(mapping::open_gguf(p, loading)?.gguf)).collect();
        match opened {
            Ok(segments) => return Ok(Pack::parse(mapping::open_gguf(path, loading)?.gguf, segments)?),
            Err(_) if listed.iter().any(|p| !p.exists()) => {}
            Err(e) => return Err(e),
        }
    }
}

fn name_of(path: &Path, name: Option<&str>) -> Result<String> {
    match name {
        Some("") => Err(Error::io(&path.to_string_lossy(), "an adapter needs a name that is not empty")),
        Some(name) => Ok(name.into()),
        None => match path.file_stem() {
            Some(stem) => Ok(stem.to_string_lossy().into_owned()),
            None => Err(Error::io(&path.to_string_lossy(), "has no file name to call the adapter by")),
        },
    }
}
