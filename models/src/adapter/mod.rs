//! Adapters: what is added to a base model's linear layers, and the files it comes from.
//!
//! The native form, which every kind of adapter is brought to when it is loaded:
//!
//! ```text
//! y = s ⊙ W x  +  scale · g ⊙ ( U · C · Vᵀ x )  +  b
//! ```
//!
//! U and V are a [`Basis`] shared by many adapters, or an adapter's own [`Factors`]; C, s, g and b
//! are its [`Core`] at one [`Site`].

mod activation;
mod base;
mod batch;
mod builder;
mod core;
mod finite;
pub mod gguf_lora;
mod hash;
pub mod pack;
pub mod peft;
pub mod publish;
mod set;
mod similar;
mod site;

use std::sync::Arc;

use lory_kernels::QMatrix;

pub use self::{
    activation::{Phase, Phases, last_occurrence},
    base::{BaseCheck, BaseInfo, Fingerprint, synthetic_base},
    batch::BatchAdapters,
    builder::AdapterBuilder,
    core::{Basis, Core, CoreMatrix, Delta, Factors, MAX_RANK},
    publish::{Existing, publish},
    set::{AdapterKey, AdapterSet},
    similar::unknown_name,
    site::{Projection, Site, SiteShape, SiteShapes},
};

/// One adapter: its cores by site. Cheap to keep: tensors point into mapped files.
#[derive(Debug)]
pub struct Adapter {
    name: Arc<str>,
    identity: u128,
    basis: Option<Arc<Basis>>,
    cores: Vec<(Site, Core)>,
    /// By [`Site::index`]: 1 + index into `cores`, or 0.
    index: Vec<u32>,
    /// By index into `cores`: whether it adds anything.
    adds: Vec<bool>,
    bytes: usize,
    invocation: Vec<u32>,
}

impl Adapter {
    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A hash of its content: the same weights under another name, or loaded again, have the
    /// same identity; other weights under the same name have another.
    pub fn identity(&self) -> u128 {
        self.identity
    }

    /// The factors it shares with other adapters.
    pub fn basis(&self) -> Option<&Arc<Basis>> {
        self.basis.as_ref()
    }

    /// What it adds at `site`.
    pub fn core(&self, site: Site) -> Option<&Core> {
        let i = self.index.get(site.index())?.checked_sub(1)?;
        self.cores.get(i as usize).map(|(_, core)| core)
    }

    /// What it adds at `site`, if that is anything: a delta that was stored as zero costs nothing.
    pub(super) fn adding_core(&self, site: Site) -> Option<&Core> {
        let i = self.index.get(site.index())?.checked_sub(1)? as usize;
        self.cores.get(i).filter(|_| self.adds.get(i) == Some(&true)).map(|(_, core)| core)
    }

    /// Sites and cores, in ascending order of sites.
    pub fn cores(&self) -> &[(Site, Core)] {
        &self.cores
    }

    /// U and V at `site`, shared or its own.
    pub fn factors(&self, site: Site) -> Option<&Factors> {
        match &self.core(site)?.delta {
            Delta::Shared(_) => self.basis.as_ref()?.factors(site),
            Delta::Private(factors, _) => Some(factors),
            Delta::None => None,
        }
    }

    /// Every matrix that a batch with it may need, with its site: its own where it adds anything, and the factors that it shares.
    pub fn matrices(&self) -> impl Iterator<Item = (Site, QMatrix<'_>)> {
        let adding = self.cores.iter().zip(&self.adds).filter(|(_, adds)| **adds);
        let own = adding.flat_map(|((site, core), _)| core.own_tensors().map(|tensor| (*site, tensor)));
        let shared = self.basis.iter().flat_map(|basis| basis.iter());
        let shared = shared.flat_map(|(site, f)| [(site, f.stored_u()), (site, f.v())]);
        own.chain(shared).map(|(site, tensor)| (site, tensor.matrix()))
    }

    /// Bytes that belong to it alone; a shared basis does not count.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// An *activated* LoRA works only from the last place on where these tokens stand in the
    /// prompt; empty for an adapter that always works.
    pub fn invocation(&self) -> &[u32] {
        &self.invocation
    }
}
