//! Keys and values in pages, shared between sequences and copied when written (as PagedAttention,
//! arXiv 2309.06180).
//!
//! A page holds [`KvShape::page_len`] consecutive tokens of one sequence in all layers. Sequences
//! that share a beginning share its pages; whoever writes into a shared page gets a copy first.
//! With [`KvCache::with_sharing`] full pages are kept after their sequences have gone, as long as
//! nobody needs the room, and are found again by later sequences with the same beginning.

mod prefix;

use lory_kernels::backend::{Backend, KvShape};

use crate::{Error, Result, adapter::Phases};

use prefix::{PageKey, PrefixIndex};

/// The pages of one sequence. Give it back with [`KvCache::release`]; a dropped one keeps its
/// pages occupied.
#[derive(Debug, Default)]
pub struct Pages {
    ids: Vec<u32>,
    len: usize,
}

impl Pages {
    /// Page numbers in order of position.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A pool of pages on one device.
pub struct KvCache<B: Backend> {
    store: B::Kv,
    shape: KvShape,
    /// How many sequences hold each page.
    refs: Vec<u32>,
    free: Vec<u32>,
    index: Option<PrefixIndex>,
    dropped: u64,
}

impl<B: Backend> KvCache<B> {
    /// A pool of `pages` empty pages.
    pub fn new(backend: &B, shape: KvShape, pages: usize) -> Result<Self> {
        let count = u32::try_from(pages)
            .ok()
            .filter(|n| (*n as usize).checked_mul(shape.page_len).is_some_and(|t| t <= u32::MAX as usize))
            .ok_or_else(|| Error::Request(format!("a cache of {pages} pages is beyond 32-bit positions")))?;
        let store = backend.kv_alloc(shape, pages)?;
        let free = (0..count).rev().collect();
        Ok(KvCache { store, shape, refs: vec![0; pages], free, index: None, dropped: 0 })
    }

    /// Lets sequences share what they have in common ([`KvCache::publish`], [`KvCache::adopt`]).
    pub fn with_sharing(self) -> Self {
        KvCache { index: Some(PrefixIndex::default()), ..self }
    }

    /// Shape of the pages.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// What attention reads.
    pub fn store(&self) -> &B::Kv {
        &self.store
    }

    /// What the forward pass writes to.
    pub fn store_mut(&mut self) -> &mut B::Kv {
        &mut self.store
    }

    /// All pages.
    pub fn total_pages(&self) -> usize {
        self.refs.len()
    }

    /// Pages that no sequence holds, those included that are kept to be found again.
    pub fn free_pages(&self) -> usize {
        self.free.len() + self.kept_pages()
    }

    /// Pages that no sequence holds but that are kept to be found again.
    pub fn kept_pages(&self) -> usize {
        self.index.as_ref().map_or(0, PrefixIndex::idle)
    }

    /// Pages that can be found by their contents.
    pub fn shared_pages(&self) -> usize {
        self.index.as_ref().map_or(0, PrefixIndex::len)
    }

    /// How many kept pages were given up for room since the cache was made.
    pub fn dropped_pages(&self) -> u64 {
        self.dropped
    }

    /// Pages that appending `n` tokens to `pages` would take.
    pub fn pages_needed(&self, pages: &Pages, n: usize) -> usize {
        let total = (pages.len + n).div_ceil(self.shape.page_len);
        let copy = n > 0 && !pages.len.is_multiple_of(self.shape.page_len) && self.last_is_shared(pages);
        total.saturating_sub(pages.ids.len()) + usize::from(copy)
    }

    fn last_is_shared(&self, pages: &Pages) -> bool {
        let page = pages.ids.get(pages.len / self.shape.page_len);
        page.and_then(|id| self.refs.get(*id as usize)).is_some_and(|n| *n > 1)
    }

    /// Makes room for `n` more tokens and returns their slots (page · page_len + offset).
    /// Without enough free pages it is [`Error::KvFull`], and nothing has changed.
    pub fn extend(&mut self, backend: &B, pages: &mut Pages, n: usize) -> Result<Vec<u32>> {
        let needed = self.pages_needed(pages, n);
        if needed > self.free_pages() {
            return Err(Error::KvFull { needed, free: self.free_pages(), total: self.refs.len() });
        }
        let page_len = self.shape.page_len;
        if n > 0 && !pages.len.is_multiple_of(page_len) {
            self.own_last(backend, pages)?;
        }
        while pages.ids.len() * page_len < pages.len + n {
            let page = self.take();
            pages.ids.push(page);
        }
        let slot = |p: usize| pages.ids[p / page_len] * page_len as u32 + (p % page_len) as u32;
        let slots = (pages.len..pages.len + n).map(slot).collect();
        pages.len += n;
        Ok(slots)
    }

    /// Makes the last page, which is to be written into, the sequence's own.
    fn own_last(&mut self, backend: &B, pages: &mut Pages) -> Result<()> {
        let index = pages.len / self.shape.page_len;
        let Some(page) = pages.ids.get(index).copied() else { return Ok(()) };
        if self.last_is_shared(pages) {
            let copy = self.take();
            if let Err(e) = backend.kv_copy_page(&mut self.store, page, copy) {
                self.drop_page(copy);
                return Err(e.into());
            }
            pages.ids[index] = copy;
            self.drop_page(page);
        } else if let Some(prefixes) = &mut self.index {
            // A rewound sequence writes over what the page was known for.
            prefixes.remove(page);
        }
        Ok(())
    }

    fn take(&mut self) -> u32 {
        let page = self.free.pop().or_else(|| {
            self.dropped += 1;
            self.index.as_mut().and_then(PrefixIndex::take_idle)
        });
        let page = page.expect("`extend` counted the free pages");
        self.refs[page as usize] = 1;
        page
    }

    fn hold_page(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        *refs += 1;
        if *refs == 1
            && let Some(index) = &mut self.index
        {
            index.wake(page);
        }
    }

    fn drop_page(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        *refs -= 1;
        if *refs == 0 && !self.index.as_mut().is_some_and(|index| index.rest(page)) {
            self.free.push(page);
        }
    }

    /// Forgets all tokens from position `len` on.
    pub fn truncate(&mut self, pages: &mut Pages, len: usize) {
        pages.len = pages.len.min(len);
        let keep = pages.len.div_ceil(self.shape.page_len);
        // Last page first, as the index of shared pages relies on.
        for page in pages.ids.split_off(keep.min(pages.ids.len())).into_iter().rev() {
            self.drop_page(page);
        }
    }

    /// A second sequence with the same first `len` tokens, sharing their pages.
    pub fn fork(&mut self, pages: &Pages, len: usize) -> Pages {
        let len = len.min(pages.len);
        let ids = pages.ids[..len.div_ceil(self.shape.page_len)].to_vec();
        ids.iter().for_each(|id| self.hold_page(*id));
        Pages { ids, len }
    }

    /// Gives all pages of a sequence back.
    pub fn release(&mut self, pages: &mut Pages) {
        self.truncate(pages, 0);
    }

    /// Appends pages that hold a continuation of `pages`, as far as there are any: full pages of
    /// `tokens` (the whole sequence) read by the adapters that `phases` says. Returns how many
    /// tokens that added.
    pub fn adopt(&mut self, pages: &mut Pages, tokens: &[u32], phases: &Phases) -> usize {
        let (page_len, before) = (self.shape.page_len, pages.len);
        if !before.is_multiple_of(page_len) {
            return 0;
        }
        while let Some(page) = self.next_shared(pages, tokens, phases) {
            self.hold_page(page);
            pages.ids.push(page);
            pages.len += page_len;
        }
        pages.len - before
    }

    fn next_shared(&self, pages: &Pages, tokens: &[u32], phases: &Phases) -> Option<u32> {
        let index = self.index.as_ref()?;
        let own = tokens.get(pages.len..pages.len + self.shape.page_len)?;
        let before = index.number(pages.ids.last().copied())?;
        index.find(&PageKey::new(before, pages.len, own, phases))
    }

    /// Lets other sequences find the full pages of this one. `tokens` and `phases` are what they
    /// hold: keys and values that were computed in any other way must not be published. Where the
    /// same is there already, the sequence's own copy is given back for it.
    pub fn publish(&mut self, pages: &mut Pages, tokens: &[u32], phases: &Phases) {
        let page_len = self.shape.page_len;
        let full = pages.len / page_len;
        let Some(index) = &self.index else { return };
        let known = pages.ids[..full].iter().rposition(|page| index.contains(*page)).map_or(0, |i| i + 1);
        for i in known..full {
            let Some(index) = &mut self.index else { return };
            let before = index.number(i.checked_sub(1).map(|i| pages.ids[i]));
            let own = tokens.get(i * page_len..(i + 1) * page_len);
            let (Some(before), Some(own)) = (before, own) else { return };
            let key = PageKey::new(before, i * page_len, own, phases);
            match index.find(&key) {
                None => index.insert(key, pages.ids[i]),
                Some(twin) => {
                    self.hold_page(twin);
                    let own = std::mem::replace(&mut pages.ids[i], twin);
                    self.drop_page(own);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
