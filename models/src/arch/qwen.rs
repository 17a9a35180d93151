//! Qwen 2 and 2.5 (biases on q, k, v) and Qwen 3 (norms of q and k per head).

use crate::{
    Result,
    arch::Arch,
    config::{Config, Keys, QkNorm},
};

pub(super) fn refine(_keys: &Keys<'_>, config: &mut Config) -> Result<()> {
    if config.arch == Arch::Qwen3 {
        config.qk_norm = QkNorm::PerHead;
    }
    Ok(())
}
