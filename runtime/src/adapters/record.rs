//! One adapter of the store, in memory or waiting in its pack, and its use by sessions.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, TryLockError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use lory_models::adapter::{Adapter, AdapterSet, pack::Pack};

use super::{AdapterId, AdapterInfo};
use crate::{Result, lock, mapping::File};

/// What all adapters in memory occupy, also those that only sessions know any more, and when they are
/// used.
#[derive(Debug, Default)]
pub(super) struct Resident {
    bytes: AtomicUsize,
    count: AtomicUsize,
    /// Counts uses, so that "least recently used" is defined.
    clock: AtomicU64,
}

impl Resident {
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Acquire)
    }

    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    pub(super) fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
        self.count.fetch_add(1, Ordering::AcqRel);
    }

    fn remove(&self, bytes: usize) {
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.count.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One loading of one adapter.
pub(crate) struct Record {
    id: AdapterId,
    name: String,
    origin: PathBuf,
    /// The files that it and its basis lie in.
    files: Arc<[Arc<File>]>,
    /// Where it can be read again.
    pack: Option<Arc<Pack>>,
    adapter: Mutex<Option<Arc<Adapter>>>,
    /// Of `adapter`; 0 while there is none.
    bytes: AtomicUsize,
    uses: AtomicU64,
    sessions: AtomicUsize,
    last_used: AtomicU64,
    resident: Arc<Resident>,
}

impl Drop for Record {
    fn drop(&mut self) {
        self.evict();
    }
}

impl Record {
    pub(super) fn new(
        id: AdapterId,
        name: String,
        origin: PathBuf,
        files: Arc<[Arc<File>]>,
        pack: Option<Arc<Pack>>,
        adapter: Option<Arc<Adapter>>,
        resident: &Arc<Resident>,
    ) -> Record {
        let bytes = AtomicUsize::new(adapter.as_ref().map_or(0, |a| a.bytes()));
        if let Some(adapter) = &adapter {
            resident.add(adapter.bytes());
        }
        let (uses, sessions, last_used) = Default::default();
        let resident = resident.clone();
        Record {
            id,
            name,
            origin,
            files,
            pack,
            adapter: Mutex::new(adapter),
            bytes,
            uses,
            sessions,
            last_used,
            resident,
        }
    }

    pub(super) fn id(&self) -> AdapterId {
        self.id
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn is_packed(&self) -> bool {
        self.pack.is_some()
    }

    pub(super) fn is_of(&self, pack: &Arc<Pack>) -> bool {
        self.pack.as_ref().is_some_and(|p| Arc::ptr_eq(p, pack))
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Acquire)
    }

    pub(super) fn sessions(&self) -> usize {
        self.sessions.load(Ordering::Acquire)
    }

    pub(super) fn last_used(&self) -> u64 {
        self.last_used.load(Ordering::Relaxed)
    }

    /// Notes that it is used now.
    pub(super) fn touch(&self) {
        let now = self.resident.clock.fetch_add(1, Ordering::Relaxed) + 1;
        self.last_used.fetch_max(now, Ordering::Relaxed);
    }

    /// The adapter, read from its pack if it is not in memory; `admit` may refuse what was read, or
    /// counts it as resident. Others who ask for this one wait for the reading, nobody else does.
    pub(super) fn adapter(&self, admit: impl FnOnce(&Adapter) -> Result<()>) -> Result<Arc<Adapter>> {
        let mut slot = lock(&self.adapter);
        if let Some(adapter) = &*slot {
            return Ok(adapter.clone());
        }
        let Some(pack) = &self.pack else {
            return Err(crate::Error::Request(format!("adapter `{}` is not in memory", self.name)));
        };
        self.files.iter().try_for_each(|f| f.check_unchanged())?;
        let adapter = pack.adapter(&self.name)?;
        admit(&adapter)?;
        self.bytes.store(adapter.bytes(), Ordering::Release);
        *slot = Some(adapter.clone());
        Ok(adapter)
    }

    /// Gives up the adapter unless somebody is at it; the bytes that this frees.
    pub(super) fn evict(&self) -> Option<usize> {
        let mut slot = match self.adapter.try_lock() {
            Ok(slot) => slot,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        slot.take()?;
        let bytes = self.bytes.swap(0, Ordering::AcqRel);
        self.resident.remove(bytes);
        Some(bytes)
    }

    /// Counts a session that uses it.
    pub(super) fn hold(self: &Arc<Self>) -> Held {
        self.sessions.fetch_add(1, Ordering::AcqRel);
        Held(self.clone())
    }

    pub(super) fn info(&self) -> AdapterInfo {
        let invocation = match self.adapter.try_lock() {
            Ok(slot) => slot.as_ref().map_or_else(Vec::new, |a| a.invocation().to_vec()),
            Err(_) => Vec::new(),
        };
        AdapterInfo {
            name: self.name.clone(),
            origin: self.origin.clone(),
            in_pack: self.is_packed(),
            loaded: self.bytes() > 0,
            bytes: self.bytes(),
            generation: self.id.to_u64(),
            uses: self.uses.load(Ordering::Relaxed),
            sessions: self.sessions(),
            invocation,
        }
    }
}

/// A record that a session uses.
pub(crate) struct Held(Arc<Record>);

impl Held {
    pub(super) fn record(&self) -> &Arc<Record> {
        &self.0
    }

    pub(super) fn files(&self) -> &[Arc<File>] {
        &self.0.files
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.touch();
        self.0.sessions.fetch_sub(1, Ordering::AcqRel);
    }
}

/// The adapters of a session, held for as long as it or a fork of it uses them.
#[derive(Default)]
pub(crate) struct Bound {
    pub set: Arc<AdapterSet>,
    records: Vec<(Held, f32)>,
}

impl Bound {
    pub(crate) fn new(set: AdapterSet, records: Vec<(Held, f32)>) -> Bound {
        Bound { set: Arc::new(set), records }
    }

    /// The mapped files that a step may read for these adapters.
    pub(crate) fn files(&self) -> impl Iterator<Item = &File> {
        self.records.iter().flat_map(|(held, _)| held.files()).map(|f| &**f)
    }

    /// Counts a request.
    pub(crate) fn count_use(&self) {
        for (held, _) in &self.records {
            held.0.touch();
            held.0.uses.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// (id, name, λ) of each.
    pub(crate) fn entries(&self) -> impl Iterator<Item = (AdapterId, &str, f32)> {
        self.records.iter().map(|(held, scale)| (held.0.id, held.0.name.as_str(), *scale))
    }
}
