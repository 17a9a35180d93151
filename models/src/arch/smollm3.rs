//! SmolLM3: a Llama in which every fourth layer has no position embedding.

use crate::{
    Result,
    config::{Config, Keys},
};

/// The step is fixed in the family; files do not carry it.
const NO_ROPE_STEP: usize = 4;

pub(super) fn refine(_keys: &Keys<'_>, config: &mut Config) -> Result<()> {
    for layer in config.layers.iter_mut().skip(NO_ROPE_STEP - 1).step_by(NO_ROPE_STEP) {
        layer.rope = None;
    }
    Ok(())
}
