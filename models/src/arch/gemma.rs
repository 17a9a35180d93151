//! Gemma 2 and Gemma 3 (text).
//!
//! Embeddings scaled by √d, norms around both sublayers, GELU, layers with a sliding window
//! between layers that see everything. The file's norm weights already include Gemma's `1 +`.

use lory_kernels::backend::Activation;

use crate::{
    Result,
    arch::Arch,
    config::{Config, Keys, NormPlacement, QkNorm},
};

pub(super) fn refine(keys: &Keys<'_>, config: &mut Config) -> Result<()> {
    let three = config.arch == Arch::Gemma3;
    let n_layers = config.n_layers();
    config.embed_scale = (config.n_embd as f32).sqrt();
    config.activation = Activation::GeluTanh;
    config.norms = NormPlacement::PreAndPost;
    config.final_softcap = keys.opt_f32("final_logit_softcapping")?.filter(|c| *c > 0.0);
    if three {
        config.qk_norm = QkNorm::PerHead;
    } else {
        config.attention_softcap = Some(keys.opt_positive("attn_logit_softcapping")?.unwrap_or(50.0));
        config.final_softcap = config.final_softcap.or(Some(30.0));
    }
    // The 27 B models alone scale by the residual's share of a head, not by the head; their files
    // have no key for it, so it goes by the number of layers, as in llama.cpp.
    let is_27b = n_layers == if three { 62 } else { 46 };
    if is_27b && keys.opt_f32("attention.scale")?.is_none() {
        config.attention_scale = 1.0 / ((config.n_embd / config.n_heads) as f32).sqrt();
    }

    let default_window = if three { None } else { Some(4096) };
    let window = keys.opt_u32("attention.sliding_window")?.or(default_window).filter(|w| *w > 0);
    let slides = keys.window_pattern(n_layers, if three { 6 } else { 2 })?;
    let global_base = config.ropes[0].base;
    let default_local = if three { 10000.0 } else { global_base };
    let local_base = keys.opt_positive("rope.freq_base_swa")?.unwrap_or(default_local);
    // Gemma 2 rotates all layers alike; Gemma 3 stretches only the layers that see everything.
    let local = if three { config.ropes[0].unscaled(local_base) } else { config.ropes[0].clone() };
    config.ropes.push(local);
    for (layer, slides) in config.layers.iter_mut().zip(slides) {
        if slides && window.is_some() {
            layer.window = window;
            layer.rope = Some(1);
        }
    }
    Ok(())
}
