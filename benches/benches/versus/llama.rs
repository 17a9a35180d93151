//! llama.cpp through its C interface.

use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use crate::side::{N_UBATCH, Side};

/// Tokens handed to `llama_decode` at once (llama-bench's `-b 2048`).
const N_BATCH: usize = 2048;

/// A loaded model.
pub struct Llama {
    model: NonNull<sys::llama_model>,
}

/// The last lines that llama.cpp logged, shown only when something fails.
static LOG: std::sync::Mutex<String> = std::sync::Mutex::new(String::new());

unsafe extern "C" fn log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if level >= sys::GGML_LOG_LEVEL_WARN
        && let Ok(mut log) = LOG.lock()
    {
        // SAFETY: llama.cpp gives a string that ends with a zero.
        log.push_str(&unsafe { CStr::from_ptr(text) }.to_string_lossy());
    }
}

fn failed(what: &str) -> String {
    let log = LOG.lock().map(|mut log| std::mem::take(&mut *log)).unwrap_or_default();
    format!("llama.cpp: {what}\n{log}")
}

/// What llama.cpp says of the processor features it was built for.
pub fn system_info() -> String {
    // SAFETY: a constant string that ends with a zero.
    unsafe { CStr::from_ptr(sys::llama_print_system_info()) }.to_string_lossy().trim().to_owned()
}

impl Llama {
    /// Loads a file with the defaults of llama-bench: mapped, weights repacked where that pays.
    pub fn open(path: &Path) -> Result<Llama, String> {
        let name = CString::new(path.to_string_lossy().as_bytes()).map_err(|e| e.to_string())?;
        // SAFETY: the callback lives as long as the program; the defaults are a plain value; `name`
        // ends with a zero.
        let model = unsafe {
            sys::llama_log_set(Some(log), std::ptr::null_mut());
            sys::llama_backend_init();
            sys::llama_model_load_from_file(name.as_ptr(), sys::llama_model_default_params())
        };
        let model = NonNull::new(model).ok_or_else(|| failed(&format!("cannot load {}", path.display())))?;
        Ok(Llama { model })
    }

    /// Its type in words, such as `llama 1B Q4_0`.
    pub fn description(&self) -> String {
        let mut text = [0u8; 128];
        // SAFETY: the buffer has the given length and is ended with a zero.
        unsafe {
            sys::llama_model_desc(self.model.as_ptr(), text.as_mut_ptr().cast(), text.len());
            CStr::from_ptr(text.as_ptr().cast()).to_string_lossy().into_owned()
        }
    }

    /// Empty sequences, each of at most `tokens` tokens.
    pub fn context(&self, threads: usize, sequences: usize, tokens: usize) -> Result<Context<'_>, String> {
        // SAFETY: plain values; the model is loaded, and outlives the context by its lifetime.
        unsafe {
            let mut params = sys::llama_context_default_params();
            params.n_ctx = (sequences * tokens.next_multiple_of(256)) as u32;
            (params.n_batch, params.n_ubatch) = (N_BATCH as u32, N_UBATCH as u32);
            params.n_seq_max = sequences as u32;
            (params.n_threads, params.n_threads_batch) = (threads as i32, threads as i32);
            let context = sys::llama_init_from_model(self.model.as_ptr(), params);
            let context = NonNull::new(context).ok_or_else(|| failed("cannot make a context"))?;
            let mut pool = sys::ggml_threadpool_params_default(threads as i32);
            let pool = sys::ggml_threadpool_new(&mut pool);
            sys::llama_attach_threadpool(context.as_ptr(), pool, pool);
            Ok(Context {
                context,
                pool,
                batch: sys::llama_batch_init(N_BATCH as i32, 0, 1),
                vocab: sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(self.model.as_ptr())) as usize,
                lengths: vec![0; sequences],
                loras: Vec::new(),
                ends: Vec::new(),
                model: PhantomData,
            })
        }
    }
}

/// A LoRA of a model, which frees it when it ends.
pub struct Lora<'m> {
    adapter: NonNull<sys::llama_adapter_lora>,
    model: PhantomData<&'m Llama>,
}

impl Llama {
    /// Loads a GGUF LoRA.
    pub fn lora(&self, path: &Path) -> Result<Lora<'_>, String> {
        let name = CString::new(path.to_string_lossy().as_bytes()).map_err(|e| e.to_string())?;
        // SAFETY: the model is loaded; `name` ends with a zero.
        let adapter = unsafe { sys::llama_adapter_lora_init(self.model.as_ptr(), name.as_ptr()) };
        let adapter =
            NonNull::new(adapter).ok_or_else(|| failed(&format!("cannot load {}", path.display())))?;
        Ok(Lora { adapter, model: PhantomData })
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: loaded by `open`, freed once; contexts have ended.
        unsafe { sys::llama_model_free(self.model.as_ptr()) }
    }
}

/// Sequences and what computes them.
pub struct Context<'m> {
    context: NonNull<sys::llama_context>,
    pool: *mut sys::ggml_threadpool,
    batch: sys::llama_batch,
    vocab: usize,
    lengths: Vec<usize>,
    /// One for each sequence, or none at all.
    loras: Vec<Lora<'m>>,
    /// Where the last token of each entry stood in the last batch, if it was there.
    ends: Vec<Option<i32>>,
    model: PhantomData<&'m Llama>,
}

impl<'m> Context<'m> {
    /// Gives every sequence its LoRA. A context has one set at a time, so that from now on each sequence runs in a
    /// batch of its own.
    pub fn with_loras(mut self, loras: Vec<Lora<'m>>) -> Self {
        self.loras = loras;
        self
    }

    fn set_lora(&mut self, sequence: usize) -> Result<(), String> {
        let Some(lora) = self.loras.get(sequence) else { return Ok(()) };
        let (mut adapter, mut scale) = (lora.adapter.as_ptr(), 1.0);
        // SAFETY: the context and the adapter of its model live; one adapter, one scale.
        let status =
            unsafe { sys::llama_set_adapters_lora(self.context.as_ptr(), &mut adapter, 1, &mut scale) };
        if status == 0 { Ok(()) } else { Err(failed("cannot set an adapter")) }
    }

    /// Appends one row to the batch.
    fn push(&mut self, sequence: usize, token: u32, last: bool) {
        let row = self.batch.n_tokens as usize;
        assert!(row < N_BATCH);
        // SAFETY: the batch was made for `N_BATCH` tokens of one sequence each.
        unsafe {
            *self.batch.token.add(row) = token as i32;
            *self.batch.pos.add(row) = self.lengths[sequence] as i32;
            *self.batch.n_seq_id.add(row) = 1;
            **self.batch.seq_id.add(row) = sequence as i32;
            *self.batch.logits.add(row) = i8::from(last);
        }
        self.batch.n_tokens += 1;
        self.lengths[sequence] += 1;
    }

    fn decode(&mut self) -> Result<(), String> {
        // SAFETY: the context lives, and `push` has filled `n_tokens` rows.
        let status = unsafe {
            let status = sys::llama_decode(self.context.as_ptr(), self.batch);
            sys::llama_synchronize(self.context.as_ptr());
            status
        };
        self.batch.n_tokens = 0;
        if status == 0 { Ok(()) } else { Err(failed(&format!("llama_decode returned {status}"))) }
    }
}

impl Side for Context<'_> {
    fn run(&mut self, work: &[(usize, &[u32])]) -> Result<(), String> {
        self.ends = vec![None; work.len()];
        for (entry, (sequence, tokens)) in work.iter().enumerate() {
            if !self.loras.is_empty() {
                if entry > 0 {
                    self.decode()?;
                    self.ends.fill(None);
                }
                self.set_lora(*sequence)?;
            }
            for (i, token) in tokens.iter().enumerate() {
                if self.batch.n_tokens as usize == N_BATCH {
                    self.decode()?;
                    self.ends.fill(None);
                }
                let last = i + 1 == tokens.len();
                if last {
                    self.ends[entry] = Some(self.batch.n_tokens);
                }
                self.push(*sequence, *token, last);
            }
        }
        self.decode()
    }

    fn logits(&mut self, entry: usize) -> Result<&[f32], String> {
        let row = self.ends.get(entry).copied().flatten();
        let row = row.ok_or_else(|| format!("there are no logits of entry {entry}"))?;
        // SAFETY: the row asked for logits in the last batch; they are `vocab` values that stay until
        // the next call.
        unsafe {
            let logits = sys::llama_get_logits_ith(self.context.as_ptr(), row);
            let logits = NonNull::new(logits).ok_or_else(|| failed("no logits"))?;
            Ok(std::slice::from_raw_parts(logits.as_ptr(), self.vocab))
        }
    }

    fn truncate(&mut self, sequence: usize, len: usize) -> Result<(), String> {
        // SAFETY: the context lives, and has this sequence.
        let done = unsafe {
            let memory = sys::llama_get_memory(self.context.as_ptr());
            sys::llama_memory_seq_rm(memory, sequence as i32, len as i32, -1)
        };
        self.lengths[sequence] = self.lengths[sequence].min(len);
        if done { Ok(()) } else { Err(failed("cannot forget part of a sequence")) }
    }
}

impl Drop for Context<'_> {
    fn drop(&mut self) {
        // SAFETY: each was made in `Llama::context` and is freed once, the pool after its user.
        unsafe {
            sys::llama_batch_free(self.batch);
            sys::llama_free(self.context.as_ptr());
            sys::ggml_threadpool_free(self.pool);
        }
    }
}
