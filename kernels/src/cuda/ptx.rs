//! The compiled kernels, and the threads of a block of each.

/// A module's PTX, ending with a zero as the driver wants it, and its kernels.
pub(super) struct Module {
    pub ptx: &'static str,
    pub kernels: &'static [(&'static str, u32)],
}

macro_rules! module {
    ($file:literal, $($kernel:literal: $threads:literal),+) => {
        Module { ptx: concat!(include_str!(concat!("ptx/", $file, ".ptx")), "\0"), kernels: &[$(($kernel, $threads)),+] }
    };
}

/// All of them. The threads are those of the kernels' `KERNEL(name, threads, …)`.
pub(super) const MODULES: &[Module] = &[
    module!("activations", "quantize_activations": 256, "activations_to_bf16": 256, "activations_to_tf32": 256),
    module!(
        "matmul_int",
        "matmul_small_q8_0": 256, "matmul_small_q4_0": 256, "matmul_small_q4_k": 256, "matmul_small_q5_k": 256,
        "matmul_small_q6_k": 256, "matmul_large_q8_0": 128, "matmul_large_q4_0": 128, "matmul_large_q4_k": 128,
        "matmul_large_q5_k": 128, "matmul_large_q6_k": 128
    ),
    module!(
        "matmul_float",
        "matmul_small_bf16": 256, "matmul_small_f16": 256, "matmul_large_bf16": 128, "matmul_large_f16": 128,
        "matmul_f32": 256
    ),
    module!("rows", "gather": 256, "embed": 256, "add": 256, "add_bias": 256),
    module!("pointwise", "glu": 256, "softcap": 256),
    module!("norm", "rms_norm": 256),
    module!("rope", "rope_table": 256, "rope": 256),
    module!("kv", "kv_write": 256),
    module!(
        "attention",
        "attention_span_f16": 256, "attention_prompt_f16": 256, "attention_span_f32": 256, "attention_span_q8_0": 256,
        "attention_merge": 128
    ),
    module!("top_k", "top_k_logits": 256, "top_k_keys": 256, "top_k_rank": 256),
    module!("lora", "lora_core": 256, "lora_expand_bands": 256, "lora_apply": 256),
];
