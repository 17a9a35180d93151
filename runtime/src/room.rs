//! Who gets the KV cache when it is full.

use lory_kernels::Backend;

use crate::{
    Error, Result,
    scheduler::{Scheduler, SequenceId},
    sequence::Sequence,
};

/// What happens when the KV cache has no room for a request to go on.
///
/// Whatever is dropped is computed again, bit for bit, when its session goes on; sessions whose keys
/// and values are a mixture ([`crate::OnSwitch::Keep`]) could not be, and never lose them. A request
/// that would not fit into an empty cache ends with an error, at nobody's cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvPolicy {
    /// Idle sessions lose their keys and values, the least recently used first; then requests whose
    /// readers do not read; then the requests that come last by priority and arrival, which wait.
    #[default]
    Evict,
    /// Idle sessions keep what they have, and so do readers that are slow. Requests wait for each
    /// other, the last ones for the first; when there is nothing left to wait for, the first one ends
    /// with an error and leaves what it has to the next.
    Queue,
    /// Nobody loses anything: a request that finds no room ends with an error at once.
    Refuse,
}

impl<B: Backend> Scheduler<B> {
    /// Slots for the next `len` rows of a sequence. `in_step` says who is part of this step already
    /// and cannot lose anything.
    ///
    /// # Errors
    /// [`lory_models::Error::KvFull`] if there is no room now; the request may wait for it unless
    /// [`Scheduler::can_never_fit`]. Errors of the device.
    pub(crate) fn reserve(
        &mut self,
        backend: &B,
        id: SequenceId,
        len: usize,
        in_step: impl Fn(SequenceId) -> bool,
    ) -> Result<Vec<u32>> {
        loop {
            let Some(s) = self.sequences.get_mut(&id) else { return Ok(Vec::new()) };
            if self.cache.pages_needed(&s.pages, len) <= self.cache.free_pages() {
                return Ok(self.cache.extend(backend, &mut s.pages, len)?);
            }
            if self.can_never_fit(id) || !self.take_from_others(id, &in_step) {
                return Err(self.full(id, len));
            }
        }
    }

    /// Whether even an empty cache could not hold the sequence.
    pub(crate) fn can_never_fit(&self, id: SequenceId) -> bool {
        let tokens = self.get(id).tokens.len();
        tokens.div_ceil(self.cache.shape().page_len) > self.cache.total_pages()
    }

    fn full(&self, id: SequenceId, len: usize) -> Error {
        let needed = self.cache.pages_needed(&self.get(id).pages, len);
        let (free, total) = (self.cache.free_pages(), self.cache.total_pages());
        lory_models::Error::KvFull { needed, free, total }.into()
    }

    /// Makes one other sequence give up its pages; `false` if there is none that must.
    fn take_from_others(&mut self, wanting: SequenceId, in_step: impl Fn(SequenceId) -> bool) -> bool {
        let others = |idle: bool| {
            let in_step = &in_step;
            self.sequences.iter().filter(move |(id, s)| {
                **id != wanting
                    && !in_step(**id)
                    && s.is_pure()
                    && !s.pinned
                    && !s.pages.is_empty()
                    && s.active.is_none() == idle
            })
        };
        let victim = match self.policy {
            KvPolicy::Refuse => None,
            KvPolicy::Evict => others(true).min_by_key(|(_, s)| s.last_used).map(|(id, _)| (*id, true)),
            KvPolicy::Queue => None,
        };
        let victim = victim.or_else(|| {
            // Who asks for nothing takes from nobody who does.
            let own = self.get(wanting).rank()?;
            let paused = |s: &Sequence| s.active.as_ref().is_some_and(|a| a.is_paused());
            let may_lose = |s: &Sequence| match self.policy {
                KvPolicy::Evict => true,
                KvPolicy::Queue => !paused(s),
                KvPolicy::Refuse => false,
            };
            let last =
                others(false).filter(|(_, s)| may_lose(s)).max_by_key(|(_, s)| (paused(s), s.rank()))?;
            (paused(last.1) || last.1.rank() > Some(own)).then_some((*last.0, false))
        });
        let Some((id, idle)) = victim else { return false };
        match idle {
            true => self.metrics.evictions += 1,
            false => self.metrics.preemptions += 1,
        }
        self.cut(id, 0);
        true
    }
}
