//! Phi-3 and Phi-4: q, k, v fused in `attn_qkv`, gate and up fused in `ffn_up`; LongRoPE.
//!
//! The `sliding_window` key of the 4k models is not read, as in llama.cpp: their window is their
//! whole trained context.

use crate::{
    Result,
    config::{Config, Keys},
};

pub(super) fn refine(_keys: &Keys<'_>, config: &mut Config) -> Result<()> {
    config.fused = true;
    Ok(())
}
