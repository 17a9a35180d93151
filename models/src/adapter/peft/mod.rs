//! Adapters as PEFT saves them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! LoRA with rsLoRA, rank and alpha patterns, biases, DoRA and activation tokens, on linear layers
//! and on the embedding, and AdaLoRA. PiSSA, OLoRA and CorDA only in their converted form. What is
//! neither computed as PEFT computes it nor without effect is an error that names it: no setting
//! and no tensor is passed over.
//!
//! Reading takes two steps, because only the second needs the base's weights:
//! [`PeftAdapter::read`] resolves everything to factors per [`Site`], and
//! [`PeftAdapter::into_adapter`] adds DoRA's row norms.

mod config;
mod container;
mod factors;
mod folder;
mod modules;
mod resolve;
mod settings;
mod targets;
mod write;

use std::{collections::BTreeMap, sync::Arc};

use lory_kernels::QuantType;

use crate::{Bytes, Error, Result, Tensor};

use super::{Adapter, AdapterBuilder, BaseInfo, Core, CoreMatrix, Delta, Factors as SharedForm, Site};

pub use self::{
    config::{Kind, PeftConfig},
    factors::{Factors, Matrix},
    folder::PeftFolder,
    modules::PermutedHeads,
    write::PeftFiles,
};

use self::{container::View, factors::Module, modules::Part, resolve::BaseCopy};

/// A PEFT adapter's factors in memory, in the base's row order.
pub struct PeftAdapter {
    name: String,
    file: String,
    sites: BTreeMap<Site, Factors>,
    invocation: Vec<u32>,
    copies: Vec<(Site, BaseCopy)>,
    bytes: Bytes,
}

impl PeftAdapter {
    /// Reads an adapter called `name` from the contents of its folder's two files. `permuted` says
    /// how the base's file keeps q and k ([`PermutedHeads::from_metadata`]).
    ///
    /// # Errors
    /// Everything that [`PeftConfig::parse`] refuses; a broken container; [`Error::WrongBase`] for
    /// modules or sizes that the base does not have; [`Error::Tensor`] for a tensor that is missing,
    /// disagrees with the configuration, holds NaN, or would not be used.
    pub fn read(
        name: &str,
        config: &[u8],
        weights: Bytes,
        base: &BaseInfo,
        permuted: Option<PermutedHeads>,
    ) -> Result<PeftAdapter> {
        let file = format!("{name}/adapter_model.safetensors");
        let config = PeftConfig::parse(&format!("{name}/adapter_config.json"), config)?;
        if let Some(t) = config.invocation.iter().find(|t| **t as usize >= base.n_vocab) {
            let message = format!("holds token {t}, the base has {}", base.n_vocab);
            return Err(Error::key(config.file(), "alora_invocation_tokens", message));
        }
        let mut sites = BTreeMap::new();
        let mut copies = Vec::new();
        let views = container::parse(&file, (*weights).as_ref())?;
        let mut seen = std::collections::BTreeSet::new();
        for module in modules(&file, &views)? {
            let places = modules::locate(&file, &module.path, base)?;
            if !config.targets(&module.path)? {
                let message = format!(
                    "has weights for `{}`, which `target_modules` and its companions in the configuration \
                     leave out",
                    module.path
                );
                return Err(Error::container(&file, message));
            }
            if let Some((site, _)) = places.iter().find(|(site, _)| !seen.insert(*site)) {
                let message = format!("has weights for {site} twice, the second time as `{}`", module.path);
                return Err(Error::container(&file, message));
            }
            if let (Some(view), [(site, _)]) = (module.parts.get(&Part::BaseWeight), places.as_slice()) {
                copies.push((*site, copy(view)?));
            }
            sites.extend(module.factors(&config, &places, base, permuted)?);
        }
        if sites.is_empty() {
            return Err(Error::container(&file, "holds no weights that add anything to the base"));
        }
        let invocation = config.invocation;
        Ok(PeftAdapter { name: name.into(), file, sites, invocation, copies, bytes: weights })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its factors by site.
    pub fn sites(&self) -> &BTreeMap<Site, Factors> {
        &self.sites
    }

    /// Tokens that switch it on; empty for an adapter that always works.
    pub fn invocation(&self) -> &[u32] {
        &self.invocation
    }

    /// The adapter for the base described by `base`. `weight` gives the base's weights, which are
    /// read once for DoRA, and where the file carries copies of the base's own.
    ///
    /// # Errors
    /// [`Error::WrongBase`] for a copy of another base; a base without a weight that is needed.
    pub fn into_adapter(self, base: &BaseInfo, weight: impl Fn(Site) -> Option<Tensor>) -> Result<Adapter> {
        let weight = |site: Site| {
            weight(site).ok_or_else(|| {
                let message =
                    format!("needs the weights of {site}, which the base {} does not have", base.file);
                Error::WrongBase { file: self.file.clone(), message }
            })
        };
        for (site, copy) in &self.copies {
            copy.check(&self.file, (*self.bytes).as_ref(), &weight(*site)?)?;
        }
        let mut builder = AdapterBuilder::new(&self.name).invocation(self.invocation.clone());
        for (site, factors) in &self.sites {
            let shape = base.shapes.get(*site).ok_or_else(|| Error::WrongBase {
                file: self.file.clone(),
                message: format!("the base has no {site}"),
            })?;
            let rows = match &factors.magnitude {
                Some(m) => {
                    Some(self.vector(*site, "s", resolve::dora_scales(&weight(*site)?, factors, m)?)?)
                }
                None => None,
            };
            let delta = if factors.a.rows == 0 {
                Delta::None
            } else {
                let v = match *site {
                    Site::TOKEN_EMBD => self.tensor(*site, "lora_a", factors.a.transposed())?,
                    _ => self.tensor(*site, "lora_a", factors.a.clone())?,
                };
                let u = self.tensor(*site, "lora_b", factors.b.clone())?;
                Delta::Private(SharedForm::new(*site, shape, u, v)?, CoreMatrix::Identity)
            };
            let mut core = Core::new(delta, factors.scale);
            core.delta_scale = rows.clone();
            core.row_scale = rows;
            core.bias = factors.bias.clone().map(|b| self.vector(*site, "bias", b)).transpose()?;
            builder.core(*site, core);
        }
        builder.build(&base.shapes)
    }

    fn vector(&self, site: Site, what: &str, data: Vec<f32>) -> Result<Tensor> {
        self.tensor(site, what, Matrix { rows: 1, cols: data.len(), data })
    }

    fn tensor(&self, site: Site, what: &str, m: Matrix) -> Result<Tensor> {
        let bytes: Vec<u8> = m.data.iter().flat_map(|v| v.to_le_bytes()).collect();
        let range = 0..bytes.len();
        let name = format!("{site}.{what}");
        Tensor::new(self.file.as_str().into(), &name, QuantType::F32, m.rows, m.cols, Arc::new(bytes), range)
    }
}

impl std::fmt::Debug for PeftAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PEFT adapter `{}` with {} sites", self.name, self.sites.len())
    }
}

/// The tensors by module; every tensor finds its place.
fn modules<'v, 'a>(file: &str, views: &'v [View<'a>]) -> Result<Vec<Module<'v, 'a>>> {
    let mut found: BTreeMap<&str, BTreeMap<Part, &'v View<'a>>> = BTreeMap::new();
    for view in views {
        let (path, part) = modules::split_key(file, &view.name)?;
        if let Some(other) = found.entry(path).or_default().insert(part, view) {
            return Err(view.error(format!("is a second `{}`", other.name)));
        }
    }
    Ok(found.into_iter().map(|(path, parts)| Module { path: path.into(), parts }).collect())
}

fn copy(view: &View<'_>) -> Result<BaseCopy> {
    let [rows, cols] = *view.shape.as_slice() else {
        return Err(view.error(format!("has shape {:?}, expected a matrix", view.shape)));
    };
    Ok(BaseCopy { name: view.name.clone(), dtype: view.dtype, rows, cols, start: view.start })
}
