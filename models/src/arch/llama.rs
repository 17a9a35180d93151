//! Llama 2 and 3.x, Mistral, TinyLlama, SmolLM2.
//!
//! q and k are permuted in the file for interleaved rotation; Llama 3's frequency scaling comes
//! as the tensor `rope_freqs`. A `sliding_window` key is not read, as in llama.cpp: the Mistral
//! 7B v0.1 files that carry one are run with full attention everywhere.

use crate::{
    Result,
    config::{Config, Keys},
};

pub(super) fn refine(keys: &Keys<'_>, config: &mut Config) -> Result<()> {
    let n_dims = config.ropes[0].n_dims;
    if n_dims != config.head_dim {
        let message = format!("is {n_dims}, must be the head's {} in this family", config.head_dim);
        return Err(keys.error("rope.dimension_count", message));
    }
    Ok(())
}
