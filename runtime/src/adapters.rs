//! Adapters by name: loaded, replaced and unloaded while sessions run.
//!
//! Every load has an [`AdapterId`] of its own. A session keeps the adapters it was given until it
//! is given others, so replacing or unloading a name never changes an answer that has begun.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use lory_models::adapter::{Adapter, AdapterSet, BaseInfo, gguf_lora, pack::Pack};

use crate::{
    Error, Result,
    mapping::{self, Loading},
};

/// One loading of one adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(u64);

/// What the store tells about an adapter.
#[derive(Clone, Debug)]
pub struct AdapterInfo {
    /// The name it answers to.
    pub name: String,
    /// The file it came from.
    pub origin: PathBuf,
    /// The pack's name for it, if it came from a pack.
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
    base: Arc<BaseInfo>,
    loading: Loading,
    state: RwLock<State>,
}

impl AdapterStore {
    pub(crate) fn new(base: Arc<BaseInfo>, loading: Loading) -> Self {
        AdapterStore { base, loading, state: RwLock::default() }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Loads a GGUF LoRA under `name`, or under its file's stem. A name that is taken is an
    /// error; see [`AdapterStore::replace_lora`].
    pub fn load_lora(&self, path: &Path, name: Option<&str>) -> Result<AdapterId> {
        let name = name_of(path, name)?;
        if self.knows(&name) {
            let message = format!("an adapter named `{name}` is there already; unload it or give another name");
            return Err(Error::io(&path.to_string_lossy(), message));
        }
        self.replace_lora(path, Some(&name))
    }

    /// Loads a GGUF LoRA under `name` or its file's stem, in place of what had the name before.
    pub fn replace_lora(&self, path: &Path, name: Option<&str>) -> Result<AdapterId> {
        let name = name_of(path, name)?;
        let gguf = mapping::open_gguf(path, self.loading)?.gguf;
        let adapter = Arc::new(gguf_lora::load(&gguf, &self.base, &name)?);
        Ok(self.insert(name, adapter, path.into()))
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
        pack.check_base(&self.base)?;
        let taken = pack.names().find(|name| self.knows(name)).map(str::to_owned);
        if let Some(name) = taken {
            let message = format!("has an adapter named `{name}`, which is there already");
            return Err(Error::io(&path.to_string_lossy(), message));
        }
        let count = pack.names().count();
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
        let total = state.loaded.len() + state.packs.iter().map(|(_, p)| p.names().count()).sum::<usize>();
        let hint = match total {
            0 => "none is loaded".to_owned(),
            n => format!("{n} are there, listed by their names"),
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

/// Opens a pack and its segments.
pub fn open_pack(path: &Path, loading: Loading) -> Result<Pack> {
    let main = mapping::open_gguf(path, loading)?.gguf;
    let segments = Pack::segment_paths(path)
        .iter()
        .map(|segment| Ok(mapping::open_gguf(segment, loading)?.gguf))
        .collect::<Result<Vec<_>>>()?;
    Ok(Pack::parse(main, segments)?)
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
