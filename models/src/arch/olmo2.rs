//! OLMo 2: norms after each sublayer only, and over the whole of q and of k.

use crate::{
    Result,
    config::{Config, Keys, NormPlacement, QkNorm},
};

pub(super) fn refine(keys: &Keys<'_>, config: &mut Config) -> Result<()> {
    config.norms = NormPlacement::Post;
    config.qk_norm = QkNorm::Full;
    config.may_tie = false;
    // OLMo 3 uses the same name in files: three layers in four slide, rotated without stretching.
    if let Some(window) = keys.opt_u32("attention.sliding_window")?.filter(|w| *w > 0) {
        let base = keys.opt_positive("rope.freq_base_swa")?.unwrap_or(config.ropes[0].base);
        config.ropes.push(config.ropes[0].unscaled(base));
        let slides = keys.window_pattern(config.n_layers(), 4)?;
        for layer in config.layers.iter_mut().zip(slides).filter_map(|(l, s)| s.then_some(l)) {
            layer.window = Some(window);
            layer.rope = Some(1);
        }
    }
    Ok(())
}
