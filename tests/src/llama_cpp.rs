//! llama.cpp itself, as an oracle: one model, one context, at most one LoRA.

use std::{
    ffi::{CString, c_char, c_void},
    path::Path,
    ptr,
};

use llama_cpp_sys_2 as sys;

/// A model and a context of f32 keys and values on one thread.
pub struct LlamaCpp {
    model: *mut sys::llama_model,
    context: *mut sys::llama_context,
    vocab: usize,
}

fn path(path: &Path) -> CString {
    CString::new(path.to_str().expect("UTF-8")).expect("no NUL")
}

unsafe extern "C" fn silent(_: sys::ggml_log_level, _: *const c_char, _: *mut c_void) {}

impl LlamaCpp {
    /// Loads a model to run on the CPU with `n_ctx` tokens of context.
    pub fn load(file: &Path, n_ctx: u32) -> LlamaCpp {
        // SAFETY: the callback takes any arguments and keeps none of them.
        unsafe { sys::llama_log_set(Some(silent), ptr::null_mut()) };
        // SAFETY: the parameters are llama.cpp's own, changed in plain numbers only; the path outlives the call;
        // the model is not freed before its context (see `drop`).
        unsafe {
            sys::llama_backend_init();
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            // Repacked weights would be other formats.
            params.use_extra_bufts = false;
            let model = sys::llama_model_load_from_file(path(file).as_ptr(), params);
            assert!(!model.is_null(), "llama.cpp refuses {}", file.display());
            let mut params = sys::llama_context_default_params();
            (params.n_ctx, params.n_batch, params.n_ubatch) = (n_ctx, n_ctx, n_ctx);
            (params.n_threads, params.n_threads_batch) = (1, 1);
            (params.type_k, params.type_v) = (sys::GGML_TYPE_F32, sys::GGML_TYPE_F32);
            params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_DISABLED;
            let context = sys::llama_init_from_model(model, params);
            assert!(!context.is_null(), "llama.cpp gives no context for {}", file.display());
            let vocab = sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model)) as usize;
            LlamaCpp { model, context, vocab }
        }
    }

    /// From now on the model runs with this LoRA alone, at weight 1.
    pub fn set_lora(&mut self, file: &Path) {
        // SAFETY: both arrays have the one entry that is announced; the adapter belongs to the model, which
        // frees it.
        unsafe {
            let adapter = sys::llama_adapter_lora_init(self.model, path(file).as_ptr());
            assert!(!adapter.is_null(), "llama.cpp refuses {}", file.display());
            let (mut adapters, mut scales) = ([adapter], [1.0f32]);
            let set =
                sys::llama_set_adapters_lora(self.context, adapters.as_mut_ptr(), 1, scales.as_mut_ptr());
            assert_eq!(set, 0, "{}", file.display());
        }
    }

    /// Logits after every one of `tokens`, which stand at the beginning of an empty context.
    pub fn logits(&mut self, tokens: &[u32]) -> Vec<f32> {
        let n = i32::try_from(tokens.len()).expect("a short text");
        let mut out = Vec::with_capacity(tokens.len() * self.vocab);
        // SAFETY: the batch is made for `n` tokens of one sequence each, and every field is written for just
        // these; logits were asked for every token and have `vocab` numbers each.
        unsafe {
            sys::llama_memory_clear(sys::llama_get_memory(self.context), true);
            let mut batch = sys::llama_batch_init(n, 0, 1);
            batch.n_tokens = n;
            for (i, token) in tokens.iter().enumerate() {
                *batch.token.add(i) = *token as i32;
                *batch.pos.add(i) = i as i32;
                *batch.n_seq_id.add(i) = 1;
                **batch.seq_id.add(i) = 0;
                *batch.logits.add(i) = 1;
            }
            assert_eq!(sys::llama_decode(self.context, batch), 0);
            for i in 0..n {
                let row = sys::llama_get_logits_ith(self.context, i);
                assert!(!row.is_null());
                out.extend_from_slice(std::slice::from_raw_parts(row, self.vocab));
            }
            sys::llama_batch_free(batch);
        }
        out
    }

    /// The most likely continuation of `tokens`, the whole text computed anew for every token.
    pub fn greedy(&mut self, tokens: &[u32], n: usize) -> Vec<u32> {
        let mut text = tokens.to_vec();
        for _ in 0..n {
            let logits = self.logits(&text);
            let last = &logits[logits.len() - self.vocab..];
            let best = (0..self.vocab).max_by(|a, b| last[*a].total_cmp(&last[*b])).expect("a vocabulary");
            text.push(best as u32);
        }
        text.split_off(tokens.len())
    }
}

impl Drop for LlamaCpp {
    fn drop(&mut self) {
        // SAFETY: both came from llama.cpp and are freed once, the context first.
        unsafe {
            sys::llama_free(self.context);
            sys::llama_model_free(self.model);
        }
    }
}
