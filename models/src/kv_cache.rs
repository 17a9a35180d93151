//! Keys and values in pages, shared between sequences and copied when written (as PagedAttention,
//! arXiv 2309.06180).
//!
//! A page holds [`KvShape::page_len`] consecutive tokens of one sequence in all layers. Sequences
//! that share a beginning share its pages; whoever writes into a shared page gets a copy first.

use lory_kernels::backend::{Backend, KvShape};

use crate::{Error, Result};

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
}

impl<B: Backend> KvCache<B> {
    /// A pool of `pages` empty pages.
    pub fn new(backend: &B, shape: KvShape, pages: usize) -> Result<Self> {
        let count = u32::try_from(pages)
            .ok()
            .filter(|n| (*n as usize).checked_mul(shape.page_len).is_some_and(|t| t <= u32::MAX as usize))
            .ok_or_else(|| Error::Request(format!("a cache of {pages} pages is beyond 32-bit positions")))?;
        let store = backend.kv_alloc(shape, pages)?;
        Ok(KvCache { store, shape, refs: vec![0; pages], free: (0..count).rev().collect() })
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

    /// Pages that nobody holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
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
        if needed > self.free.len() {
            return Err(Error::KvFull { needed, free: self.free.len(), total: self.refs.len() });
        }
        let page_len = self.shape.page_len;
        if n > 0 && !pages.len.is_multiple_of(page_len) && self.last_is_shared(pages) {
            let index = pages.len / page_len;
            let copy = self.take();
            let shared = std::mem::replace(&mut pages.ids[index], copy);
            backend.kv_copy_page(&mut self.store, shared, copy)?;
            self.drop_page(shared);
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

    fn take(&mut self) -> u32 {
        let page = self.free.pop().expect("`extend` counted the free pages");
        self.refs[page as usize] = 1;
        page
    }

    fn drop_page(&mut self, page: u32) {
        let refs = &mut self.refs[page as usize];
        *refs -= 1;
        if *refs == 0 {
            self.free.push(page);
        }
    }

    /// Forgets all tokens from position `len` on.
    pub fn truncate(&mut self, pages: &mut Pages, len: usize) {
        pages.len = pages.len.min(len);
        let keep = pages.len.div_ceil(self.shape.page_len);
        for page in pages.ids.split_off(keep.min(pages.ids.len())) {
            self.drop_page(page);
        }
    }

    /// A second sequence with the same first `len` tokens, sharing their pages.
    pub fn fork(&mut self, pages: &Pages, len: usize) -> Pages {
        let len = len.min(pages.len);
        let ids = pages.ids[..len.div_ceil(self.shape.page_len)].to_vec();
        for id in &ids {
            self.refs[*id as usize] += 1;
        }
        Pages { ids, len }
    }

    /// Gives all pages of a sequence back.
    pub fn release(&mut self, pages: &mut Pages) {
        self.truncate(pages, 0);
    }
}
