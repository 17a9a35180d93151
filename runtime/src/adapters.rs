//! Adapters by name: loaded, replaced and unloaded while sessions run.
//!
//! Every load has an [`AdapterId`] of its own. A session keeps the adapters it was given until it
//! is given others, so replacing or unloading a name never changes an answer that has begun.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use lory_models::adapter::{Adapter, AdapterSet, BaseInfo, gguf_lora};

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
    /// Bytes that belong to this adapter alone.
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
            let message =
                format!("an adapter named `{name}` is there already; unload it or give another name");
            return Err(Error::io(&path.to_string_lossy(), message));
        }
        self.replace_lora(path, Some(&name))
    }

    /// Loads a GGUF LoRA under `name` or its file's stem, in place of what had the name before.
    pub fn replace_lora(&self, path: &Path, name: Option<&str>) -> Result<AdapterId> {
        let name = name_of(path, name)?;
        let gguf = mapping::open_gguf(path, self.loading)?.gguf;
        let adapter = Arc::new(gguf_lora::load(&name, &gguf, &self.base)?);
        Ok(self.insert(name, adapter, path.into()))
    }

    fn insert(&self, name: String, adapter: Arc<Adapter>, origin: PathBuf) -> AdapterId {
        let mut state = self.write();
        state.next += 1;
        let id = AdapterId(state.next);
        state.loaded.insert(name, Loaded { id, adapter, origin });
        id
    }

    fn knows(&self, name: &str) -> bool {
        self.read().loaded.contains_key(name)
    }

    /// All names in alphabetical order.
    pub fn names(&self) -> Vec<String> {
        self.read().loaded.keys().cloned().collect()
    }

    /// The adapter with this name.
    pub fn resolve(&self, name: &str) -> Result<AdapterId> {
        let state = self.read();
        state.loaded.get(name).map(|l| l.id).ok_or_else(|| self.unknown(&state, name))
    }

    fn unknown(&self, state: &State, name: &str) -> Error {
        let hint = match state.loaded.len() {
            0 => "none is loaded".to_owned(),
            n => format!("{n} are there, listed by their names"),
        };
        Error::Request(format!("no adapter named `{name}`: {hint}"))
    }

    /// Takes a name out of the store. Sessions that use the adapter keep it until they change.
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
        match state.loaded.get(name) {
            Some(loaded) => Ok(AdapterInfo {
                name: name.into(),
                origin: loaded.origin.clone(),
                bytes: loaded.adapter.bytes(),
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
