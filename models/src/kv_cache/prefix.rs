//! Finds full pages by what they hold, so that sequences with the same beginning share them.
//!
//! A page's keys and values depend on all tokens up to its end and on the adapters that read them.
//! Its key is therefore its tokens, the adapters of each, and the page before it, named by a number
//! that is given once and never again. Equal keys are compared field by field: a hash only finds the
//! place, so no collision can serve a page to a sequence that it does not belong to. (vLLM's
//! automatic prefix caching trusts its hashes there.)

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use crate::adapter::{AdapterKey, Phases};

/// The page before the first one.
const ROOT: u64 = 0;

/// What a page holds.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct PageKey {
    before: u64,
    /// The adapters from each offset on.
    adapters: Vec<(u32, Arc<AdapterKey>)>,
    tokens: Box<[u32]>,
}

impl PageKey {
    /// The page of `tokens`, which begin at `start`, behind the page numbered `before`.
    pub fn new(before: u64, start: usize, tokens: &[u32], phases: &Phases) -> PageKey {
        let end = start + tokens.len();
        let mut adapters = vec![(0, phases.at(start).key.clone())];
        let inner = phases.runs().iter().filter(|run| run.start > start && run.start < end);
        adapters.extend(inner.map(|run| ((run.start - start) as u32, run.key.clone())));
        adapters.dedup_by(|next, run| next.1 == run.1);
        PageKey { before, adapters, tokens: tokens.into() }
    }
}

#[derive(Debug)]
struct Entry {
    number: u64,
    key: Arc<PageKey>,
    /// When its last holder left; `None` while it has one.
    idle_since: Option<u64>,
}

/// The pages that can be found, and those among them that nobody holds, longest idle first.
///
/// Whoever holds a page holds all pages before it, and gives them back last page first. So a page
/// has been idle at most as long as the pages after it, and taking the longest idle one never
/// leaves a page behind that has lost its beginning.
#[derive(Debug, Default)]
pub(super) struct PrefixIndex {
    pages: HashMap<Arc<PageKey>, u32>,
    entries: HashMap<u32, Entry>,
    idle: BTreeMap<u64, u32>,
    clock: u64,
    numbers: u64,
}

impl PrefixIndex {
    /// The number of `page`, as the page before another one; `None` if it cannot be found.
    pub fn number(&self, page: Option<u32>) -> Option<u64> {
        match page {
            None => Some(ROOT),
            Some(page) => self.entries.get(&page).map(|e| e.number),
        }
    }

    pub fn contains(&self, page: u32) -> bool {
        self.entries.contains_key(&page)
    }

    pub fn find(&self, key: &PageKey) -> Option<u32> {
        self.pages.get(key).copied()
    }

    /// Makes `page`, which somebody holds, findable.
    pub fn insert(&mut self, key: PageKey, page: u32) {
        self.numbers += 1;
        let key = Arc::new(key);
        self.pages.insert(key.clone(), page);
        self.entries.insert(page, Entry { number: self.numbers, key, idle_since: None });
    }

    /// Forgets what `page` holds.
    pub fn remove(&mut self, page: u32) {
        if let Some(entry) = self.entries.remove(&page) {
            self.pages.remove(&entry.key);
            entry.idle_since.map(|since| self.idle.remove(&since));
        }
    }

    /// Nobody holds `page` any more. `false` if it cannot be found, and is simply free.
    pub fn rest(&mut self, page: u32) -> bool {
        let Some(entry) = self.entries.get_mut(&page) else { return false };
        self.clock += 1;
        entry.idle_since = Some(self.clock);
        self.idle.insert(self.clock, page);
        true
    }

    /// Somebody holds `page` again.
    pub fn wake(&mut self, page: u32) {
        let since = self.entries.get_mut(&page).and_then(|e| e.idle_since.take());
        since.map(|since| self.idle.remove(&since));
    }

    /// Gives up the page that has been idle for longest.
    pub fn take_idle(&mut self) -> Option<u32> {
        let (_, page) = self.idle.pop_first()?;
        if let Some(entry) = self.entries.remove(&page) {
            self.pages.remove(&entry.key);
        }
        Some(page)
    }

    /// Pages that nobody holds.
    pub fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Pages that can be found.
    pub fn len(&self) -> usize {
        self.entries.len()
    }
}
