//! Putting an adapter together, with every check that its later use relies on.

use std::{collections::BTreeMap, sync::Arc};

use lory_kernels::{QuantType, quant::dequantize_row};

use crate::{Error, Result, Tensor};

use super::{Adapter, Basis, Core, CoreMatrix, Delta, Site, SiteShapes, core::size, hash::Hasher};

/// Collects an adapter's cores; [`AdapterBuilder::build`] checks them against the base.
#[derive(Debug)]
pub struct AdapterBuilder {
    name: Arc<str>,
    basis: Option<Arc<Basis>>,
    cores: BTreeMap<Site, Core>,
    twice: Option<Site>,
    invocation: Vec<u32>,
    identity: Option<u128>,
}

impl AdapterBuilder {
    /// An adapter without a site yet.
    pub fn new(name: &str) -> Self {
        AdapterBuilder {
            name: name.into(),
            basis: None,
            cores: BTreeMap::new(),
            twice: None,
            invocation: Vec::new(),
            identity: None,
        }
    }

    /// The basis of its [`Delta::Shared`] cores.
    pub fn basis(mut self, basis: Arc<Basis>) -> Self {
        self.basis = Some(basis);
        self
    }

    /// Tokens that switch it on ([`Adapter::invocation`]).
    pub fn invocation(mut self, tokens: Vec<u32>) -> Self {
        self.invocation = tokens;
        self
    }

    /// A hash of the content that is already known; otherwise one is computed over all tensors.
    pub fn identity(mut self, identity: u128) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Adds what happens at `site`; once per site.
    pub fn core(&mut self, site: Site, core: Core) -> &mut Self {
        if self.cores.insert(site, core).is_some() {
            self.twice = Some(site);
        }
        self
    }

    /// The adapter, if everything fits the base's `shapes`.
    ///
    /// # Errors
    /// [`Error::Request`] or [`Error::Tensor`] naming the adapter, the site and the sizes: a site
    /// twice or not in the base, a scale that is not finite, a core or vector of another size.
    pub fn build(self, shapes: &SiteShapes) -> Result<Adapter> {
        let name = &*self.name;
        let fail = |message: String| Err(Error::Request(format!("adapter `{name}`: {message}")));
        if let Some(site) = self.twice {
            return fail(format!("{site} stands twice"));
        }
        if self.cores.is_empty() {
            return fail("has no weights".into());
        }
        for (site, core) in &self.cores {
            let Some(shape) = shapes.get(*site) else {
                return fail(format!("{site} is not in the base, which has {} layers", shapes.n_layers()));
            };
            let shared = self.basis.as_ref().and_then(|b| b.factors(*site));
            core.check(name, *site, shape, shared)?;
        }
        let mut cores = Vec::with_capacity(self.cores.len());
        let mut index = vec![0; Site::count(shapes.n_layers())];
        for (site, core) in self.cores {
            if let (Some(slot), Some(shape)) = (index.get_mut(site.index()), shapes.get(site)) {
                *slot = cores.len() as u32 + 1;
                cores.push((site, fold_scale(core, shape.out_features)?));
            }
        }
        let identity =
            self.identity.unwrap_or_else(|| content_hash(self.basis.as_deref(), &cores, &self.invocation));
        let bytes = cores.iter().flat_map(|(_, c)| c.own_tensors()).map(size).sum();
        let adds = cores.iter().map(|(_, core)| core.adds()).collect();
        let AdapterBuilder { name, basis, invocation, .. } = self;
        Ok(Adapter { name, identity, basis, cores, index, adds, bytes, invocation })
    }
}

/// A term has one factor for all of its parts; where the delta has a scale of its own beside a
/// row scale or a bias, it goes into g.
fn fold_scale(mut core: Core, out_features: usize) -> Result<Core> {
    if core.scale == 1.0 || (core.row_scale.is_none() && core.bias.is_none()) {
        return Ok(core);
    }
    let mut g = vec![1.0; out_features];
    if let Some(t) = &core.delta_scale {
        dequantize_row(t.ty(), t.matrix().bytes(), &mut g)
            .map_err(|e| Error::tensor(t.file(), t.name(), e.to_string()))?;
    }
    let bytes = g.iter().flat_map(|v| (v * core.scale).to_le_bytes()).collect();
    core.delta_scale = Some(Tensor::owned("delta_scale", QuantType::F32, 1, out_features, bytes)?);
    core.scale = 1.0;
    Ok(core)
}

fn content_hash(basis: Option<&Basis>, cores: &[(Site, Core)], invocation: &[u32]) -> u128 {
    let mut h = Hasher::new();
    h.bytes(&basis.map_or(0, Basis::identity).to_le_bytes());
    h.number(invocation.len() as u64);
    for t in invocation {
        h.number(u64::from(*t));
    }
    for (site, core) in cores {
        let form = |m: &CoreMatrix| match m {
            CoreMatrix::Full(_) => 1,
            CoreMatrix::Diagonal(_) => 2,
            CoreMatrix::Identity => 3,
        };
        let form = match &core.delta {
            Delta::Shared(m) => form(m),
            Delta::Private(_, m) => 4 + form(m),
            Delta::None => 0,
        };
        let vectors = [&core.delta_scale, &core.row_scale, &core.bias];
        let flags = vectors.iter().fold(form, |f, v| f * 2 + u64::from(v.is_some()));
        h.number(site.index() as u64).number(flags).number(u64::from(core.scale.to_bits()));
        for t in core.own_tensors() {
            h.tensor(t);
        }
    }
    h.finish()
}
