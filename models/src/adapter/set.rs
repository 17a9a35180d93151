//! The adapters of one session, with their weights.

use std::sync::Arc;

use crate::{Error, Result};

use super::{Adapter, activation::last_occurrence};

/// Adapters that work together on one row, each with its weight λ; the delta is `Σ λ_j ΔW_j`.
///
/// Sums are made in an order that depends on the adapters alone, not on the order given here. A set
/// with activated adapters says what works at the end of a sequence; [`Phases`](super::Phases) says
/// what works where.
#[derive(Clone, Debug, Default)]
pub struct AdapterSet {
    entries: Vec<(Arc<Adapter>, f32)>,
}

/// What a set is to a key-value cache: equal keys, equal results. Adapters with λ = 0 do not count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterKey(Vec<(u128, u32)>);

impl AdapterKey {
    /// Whether this is the base alone.
    pub fn is_base(&self) -> bool {
        self.0.is_empty()
    }

    /// (identity, bits of λ), ascending.
    pub fn entries(&self) -> &[(u128, u32)] {
        &self.0
    }
}

impl AdapterSet {
    /// Checks the set.
    ///
    /// # Errors
    /// [`Error::Request`] for a λ that is not finite, and for an adapter that stands twice.
    pub fn new(entries: Vec<(Arc<Adapter>, f32)>) -> Result<AdapterSet> {
        for (i, (adapter, scale)) in entries.iter().enumerate() {
            let name = adapter.name();
            if !scale.is_finite() {
                return Err(Error::Request(format!("adapter `{name}`: scale {scale} is not finite")));
            }
            let twin = entries.iter().take(i).find(|(a, _)| a.identity() == adapter.identity());
            if let Some((twin, _)) = twin {
                let alias =
                    if twin.name() == name { "stands twice" } else { "is the same adapter as another" };
                let m = format!("adapter `{name}` {alias} (`{}`) in one set; add their scales", twin.name());
                return Err(Error::Request(m));
            }
        }
        Ok(AdapterSet { entries })
    }

    /// A part of a set that was checked.
    pub(super) fn checked(entries: Vec<(Arc<Adapter>, f32)>) -> AdapterSet {
        AdapterSet { entries }
    }

    /// From which position of `prompt` on each entry works: 0 for a plain adapter, for one with
    /// [`Adapter::invocation`] tokens the start of their last occurrence, `None` without any.
    pub fn activations(&self, prompt: &[u32]) -> Vec<Option<usize>> {
        let start = |(adapter, _): &(Arc<Adapter>, f32)| match adapter.invocation() {
            [] => Some(0),
            tokens => last_occurrence(prompt, tokens),
        };
        self.entries.iter().map(start).collect()
    }

    /// One adapter with λ = 1.
    pub fn single(adapter: Arc<Adapter>) -> AdapterSet {
        AdapterSet { entries: vec![(adapter, 1.0)] }
    }

    /// The entries in the order given.
    pub fn entries(&self) -> &[(Arc<Adapter>, f32)] {
        &self.entries
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What a key-value cache must compare before anything computed under one set serves another.
    pub fn key(&self) -> AdapterKey {
        let active = self.entries.iter().filter(|(_, scale)| *scale != 0.0);
        let mut key: Vec<_> = active.map(|(a, scale)| (a.identity(), scale.to_bits())).collect();
        key.sort_unstable();
        AdapterKey(key)
    }

    /// The one entry of the key, or that there is none; `None` where there may be more.
    fn only(&self) -> Option<Option<(u128, u32)>> {
        let of = |(a, scale): &(Arc<Adapter>, f32)| (*scale != 0.0).then(|| (a.identity(), scale.to_bits()));
        (self.entries.len() <= 1).then(|| self.entries.first().and_then(of))
    }
}

/// By [`AdapterSet::key`].
impl PartialEq for AdapterSet {
    fn eq(&self, other: &Self) -> bool {
        // A switch between single adapters is a matter of a microsecond, and a key is a list.
        match (self.only(), other.only()) {
            (Some(a), Some(b)) => a == b,
            _ => self.key() == other.key(),
        }
    }
}
