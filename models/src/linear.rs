//! The linear layer: the one place where adapters enter a model.

use lory_kernels::backend::{Backend, LinearJob};

use crate::{
    Result, Tensor,
    adapter::{BatchAdapters, Site},
};

/// `y = W x + bias`, at a site that adapters know by its number.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Vec<f32>>,
    site: Site,
}

impl Linear {
    /// A linear layer; `bias`, if any, has `weight.rows()` entries.
    pub fn new(weight: Tensor, bias: Option<Vec<f32>>, site: Site) -> Self {
        Linear { weight, bias, site }
    }

    /// out_features × in_features.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// Added to every output.
    pub fn bias(&self) -> Option<&[f32]> {
        self.bias.as_deref()
    }

    /// Where it stands in the model.
    pub fn site(&self) -> Site {
        self.site
    }
}

/// Carries `rows` lines of `x` through several layers that share this input (q, k, v; gate, up):
/// per layer `y = s ⊙ W x + g ⊙ (U · C · Vᵀ x) + b`, the adapters' part as `adapters` says for
/// each row, then the layer's own bias.
pub fn forward<B: Backend>(
    backend: &B,
    x: &B::Buffer,
    rows: usize,
    outputs: &mut [(&Linear, &mut B::Buffer)],
    adapters: &BatchAdapters,
) -> Result<()> {
    let groups: Vec<_> = outputs.iter().map(|(linear, _)| adapters.groups(linear.site)).collect();
    let mut jobs: Vec<_> = outputs
        .iter_mut()
        .zip(&groups)
        .map(|((linear, out), groups)| LinearJob { weight: linear.weight.matrix(), out: &mut **out, groups })
        .collect();
    backend.linear(x, rows, &mut jobs)?;

    for (linear, out) in outputs {
        if let Some(bias) = &linear.bias {
            backend.add_bias(out, rows, bias)?;
        }
    }
    Ok(())
}
