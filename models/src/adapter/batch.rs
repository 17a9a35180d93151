//! The adapters of a batch of rows, regrouped by basis for the backend.

use std::{collections::BTreeMap, sync::Arc};

use lory_kernels::backend::{Core as CoreRef, LoraGroup, LoraTerm};

use super::{Adapter, AdapterSet, Basis, Core, CoreMatrix, Delta, Site};

/// What each row of a batch adds at each site; built once per step.
///
/// A row's sum is made first over shared bases, then over adapters with factors of their own,
/// each in the order of their content's hash: it depends on the row's own set alone, and is the
/// same in every batch and every process.
#[derive(Clone, Debug, Default)]
pub struct BatchAdapters {
    n_rows: usize,
    /// Every (row, adapter) of the batch with λ ≠ 0, by adapter, then row.
    own: Vec<AdapterRows>,
    /// The same for adapters with a basis, by basis.
    shared: Vec<BasisRows>,
}

#[derive(Clone, Debug)]
struct AdapterRows {
    adapter: Arc<Adapter>,
    rows: Vec<(u32, f32)>,
}

#[derive(Clone, Debug)]
struct BasisRows {
    basis: Arc<Basis>,
    /// Indices into `own`.
    adapters: Vec<usize>,
    /// Row → (index into `own`, λ) in ascending order; rows with equal sets stand together.
    rows: Vec<(u32, Vec<(usize, f32)>)>,
}

impl BatchAdapters {
    /// Regroups the rows' sets; `None` is the base alone.
    pub fn new(rows: &[Option<&AdapterSet>]) -> BatchAdapters {
        let entries = rows.iter().enumerate().flat_map(|(row, set)| {
            let entries = set.map_or(&[][..], |s| s.entries());
            entries.iter().map(move |(adapter, scale)| (row as u32, adapter, *scale))
        });
        BatchAdapters::from_entries(rows.len(), entries)
    }

    /// For a batch of `n_rows` rows without adapters.
    pub fn none(n_rows: usize) -> BatchAdapters {
        BatchAdapters { n_rows, ..Default::default() }
    }

    /// The batch that has row `rows[i]` of this one as its row `i`.
    pub fn select(&self, rows: &[u32]) -> BatchAdapters {
        if self.is_empty() {
            return BatchAdapters::none(rows.len());
        }
        let mut places: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for (new, old) in rows.iter().enumerate() {
            places.entry(*old).or_default().push(new as u32);
        }
        let entries = self.own.iter().flat_map(|own| {
            let places = &places;
            own.rows.iter().flat_map(move |(old, scale)| {
                let new = places.get(old).map_or(&[][..], Vec::as_slice);
                new.iter().map(move |row| (*row, &own.adapter, *scale))
            })
        });
        BatchAdapters::from_entries(rows.len(), entries)
    }

    fn from_entries<'a>(
        n_rows: usize,
        entries: impl Iterator<Item = (u32, &'a Arc<Adapter>, f32)>,
    ) -> BatchAdapters {
        let mut by_adapter: BTreeMap<u128, AdapterRows> = BTreeMap::new();
        for (row, adapter, scale) in entries.filter(|(_, _, scale)| *scale != 0.0) {
            let own = by_adapter
                .entry(adapter.identity())
                .or_insert_with(|| AdapterRows { adapter: adapter.clone(), rows: Vec::new() });
            own.rows.push((row, scale));
        }
        let mut own: Vec<_> = by_adapter.into_values().collect();
        own.iter_mut().for_each(|a| a.rows.sort_unstable_by_key(|(row, _)| *row));
        let shared = BasisRows::collect(&own);
        BatchAdapters { n_rows, own, shared }
    }

    /// Number of rows of the batch.
    pub fn rows(&self) -> usize {
        self.n_rows
    }

    /// Whether no row has an adapter.
    pub fn is_empty(&self) -> bool {
        self.own.is_empty()
    }

    /// What [`Backend::lora`](lory_kernels::backend::Backend::lora) does at `site`; nothing is
    /// allocated where no row's adapter adds anything.
    ///
    /// At [`Site::TOKEN_EMBD`] a group's `v` has one row per token instead of one per rank.
    pub fn groups(&self, site: Site) -> Vec<LoraGroup<'_>> {
        let mut groups = Vec::new();
        for shared in &self.shared {
            groups.extend(shared.group(&self.own, site));
        }
        for own in &self.own {
            groups.extend(own.group(site));
        }
        groups
    }
}

impl BasisRows {
    fn collect(own: &[AdapterRows]) -> Vec<BasisRows> {
        type Terms = BTreeMap<u32, Vec<(usize, f32)>>;
        let mut bases: BTreeMap<u128, (Arc<Basis>, Vec<usize>, Terms)> = BTreeMap::new();
        for (i, AdapterRows { adapter, rows }) in own.iter().enumerate() {
            let Some(basis) = adapter.basis() else { continue };
            let (_, adapters, terms) =
                bases.entry(basis.identity()).or_insert_with(|| (basis.clone(), Vec::new(), BTreeMap::new()));
            adapters.push(i);
            for (row, scale) in rows {
                terms.entry(*row).or_default().push((i, *scale));
            }
        }
        let finish = |(basis, adapters, terms): (_, _, Terms)| {
            let mut rows: Vec<_> = terms.into_iter().collect();
            // Stable: rows of one adapter stay in ascending order, beside each other.
            rows.sort_by(|(_, a), (_, b)| a.iter().map(|t| t.0).cmp(b.iter().map(|t| t.0)));
            BasisRows { basis, adapters, rows }
        };
        bases.into_values().map(finish).collect()
    }

    fn group<'a>(&'a self, own: &'a [AdapterRows], site: Site) -> Option<LoraGroup<'a>> {
        let term = |i: usize, scale: f32| {
            let core = own.get(i)?.adapter.adding_core(site)?;
            match &core.delta {
                Delta::Shared(matrix) => Some(term(core, matrix, scale)),
                _ => None,
            }
        };
        if !self.adapters.iter().any(|i| term(*i, 1.0).is_some()) {
            return None;
        }
        let factors = self.basis.factors(site)?;
        let rows = self.rows.iter().filter_map(|(row, terms)| {
            let terms: Vec<_> = terms.iter().filter_map(|(i, scale)| term(*i, *scale)).collect();
            (!terms.is_empty()).then_some((*row, terms))
        });
        Some(LoraGroup { v: Some(factors.v().matrix()), u: Some(factors.expand()), rows: rows.collect() })
    }
}

impl AdapterRows {
    fn group(&self, site: Site) -> Option<LoraGroup<'_>> {
        let core = self.adapter.adding_core(site)?;
        let (factors, matrix) = match &core.delta {
            Delta::Shared(_) => return None,
            Delta::Private(factors, matrix) => (Some(factors), matrix),
            Delta::None => (None, &CoreMatrix::Identity),
        };
        Some(LoraGroup {
            v: factors.map(|f| f.v().matrix()),
            u: factors.map(|f| f.expand()),
            rows: self.rows.iter().map(|(row, scale)| (*row, vec![term(core, matrix, *scale)])).collect(),
        })
    }
}

fn term<'a>(core: &'a Core, matrix: &'a CoreMatrix, scale: f32) -> LoraTerm<'a> {
    let vector = |t: &'a Option<crate::Tensor>| t.as_ref().map(|t| t.matrix());
    LoraTerm {
        core: match matrix {
            CoreMatrix::Full(c) => CoreRef::Full(c.matrix()),
            CoreMatrix::Diagonal(c) => CoreRef::Diagonal(c.matrix()),
            CoreMatrix::Identity => CoreRef::Identity,
        },
        scale: scale * core.scale,
        delta_scale: vector(&core.delta_scale),
        row_scale: vector(&core.row_scale),
        bias: vector(&core.bias),
    }
}
