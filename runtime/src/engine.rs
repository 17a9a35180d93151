//! One model on one device, shared by all its sessions.

use std::{
    path::Path,
    sync::{Arc, Condvar, Mutex, TryLockError},
};

use lory_kernels::{
    Backend,
    backend::KvShape,
    backend::KvType,
    cpu::{Cpu, Isa},
};
use lory_models::{decoder::Scratch, kv_cache::KvCache};

use crate::{
    AdapterStore, Error, Result, Session, SessionOptions, lock,
    mapping::Loading,
    model::{LoadedModel, OpenOptions},
    scheduler::{Model, Scheduler},
};

/// Tokens per page of the KV cache: small enough that short sessions waste little, large enough
/// that attention reads long runs.
pub(crate) const PAGE_LEN: usize = 32;

/// Rows whose logits are computed at a time; bounds the buffer for vocabularies of 256k entries.
const LOGIT_ROWS: usize = 64;

/// How an engine is opened. The defaults suit a chat on the machine at hand.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Threads; `None` takes the physical cores.
    pub threads: Option<usize>,
    /// Longest sequence; `None` takes the trained context, at most 4096.
    pub n_ctx: Option<u32>,
    /// Rows of one step at most: prompt tokens and generating sessions together.
    pub n_batch: usize,
    /// Element type of cached keys and values.
    pub kv_type: KvType,
    /// Tokens that the KV cache holds for all sessions together; `None` takes four contexts.
    /// Memory is touched only as it is used.
    pub kv_tokens: Option<usize>,
    /// Whether files are mapped or read; [`crate::mapping`] says what mapping promises.
    pub loading: Loading,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            threads: None,
            n_ctx: None,
            n_batch: 512,
            kv_type: KvType::F16,
            kv_tokens: None,
            loading: Loading::Map,
        }
    }
}

/// Everything that the handles of one engine share.
pub(crate) struct Shared {
    pub model: Arc<LoadedModel>,
    pub backend: Cpu,
    pub adapters: AdapterStore,
    pub scheduler: Mutex<Scheduler<Cpu>>,
    pub n_ctx: usize,
    steps: Mutex<u64>,
    stepped: Condvar,
}

impl Shared {
    /// How many steps have ended; for [`Shared::wait_for_step`].
    pub(crate) fn steps_seen(&self) -> u64 {
        *lock(&self.steps)
    }

    /// Runs one step for all sessions, unless another thread is doing so (`None`).
    pub(crate) fn try_step(&self) -> Option<Result<bool>> {
        let mut scheduler = match self.scheduler.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let LoadedModel { decoder, tokenizer, .. } = &*self.model;
        let ran = scheduler.step(&Model { backend: &self.backend, decoder, tokenizer });
        drop(scheduler);
        // Counted after the lock is free, so that whoever saw it taken and the old count is woken.
        *lock(&self.steps) += 1;
        self.stepped.notify_all();
        Some(ran)
    }

    /// Sleeps until a step has ended since `seen` was read.
    pub(crate) fn wait_for_step(&self, seen: u64) {
        let steps = lock(&self.steps);
        drop(self.stepped.wait_while(steps, |steps| *steps == seen));
    }
}

/// A model ready to answer; cheap to clone, shared between threads.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
}

impl Engine {
    /// Opens a GGUF model (the first of its shards, if it is split).
    pub fn open(path: &Path, options: &EngineOptions) -> Result<Engine> {
        let model = LoadedModel::open(path, &OpenOptions { n_ctx: options.n_ctx, loading: options.loading })?;
        Engine::with_model(model, options)
    }

    /// An engine over a model that is already loaded.
    pub fn with_model(model: LoadedModel, options: &EngineOptions) -> Result<Engine> {
        let model = Arc::new(model);
        let backend = Cpu::new(options.threads, Isa::from_env().map_err(Error::Request)?);
        for tensor in model.decoder.weights().matrices() {
            if !backend.supports(tensor.ty()) {
                let error =
                    lory_kernels::BackendError::UnsupportedType { device: backend.label(), ty: tensor.ty() };
                return Err(
                    lory_models::Error::tensor(tensor.file(), tensor.name(), error.to_string()).into()
                );
            }
            backend.load(tensor.matrix()).map_err(lory_models::Error::from)?;
        }
        let config = model.decoder.config();
        let n_ctx = model.n_ctx as usize;
        if options.n_batch == 0 {
            return Err(Error::Request("a batch of 0 rows cannot run anything: give at least 1".into()));
        }
        let max_rows = options.n_batch.min(n_ctx.max(1));
        let shape = KvShape {
            layers: config.n_layers(),
            kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            page_len: PAGE_LEN,
            ty: options.kv_type,
        };
        let kv_tokens = options.kv_tokens.unwrap_or(4 * n_ctx).max(1);
        let cache = KvCache::new(&backend, shape, kv_tokens.div_ceil(PAGE_LEN))?;
        let scratch = Scratch::new(&backend, &model.decoder, max_rows, LOGIT_ROWS.min(max_rows))?;
        let adapters = AdapterStore::new(model.clone(), options.loading);
        Ok(Engine {
            shared: Arc::new(Shared {
                model,
                backend,
                adapters,
                scheduler: Mutex::new(Scheduler::new(cache, scratch)),
                n_ctx,
                steps: Mutex::new(0),
                stepped: Condvar::new(),
            }),
        })
    }

    /// The model: configuration, tokenizer, chat template, metadata.
    pub fn model(&self) -> &LoadedModel {
        &self.shared.model
    }

    /// Adapters by name.
    pub fn adapters(&self) -> &AdapterStore {
        &self.shared.adapters
    }

    /// Longest sequence of a session, in tokens.
    pub fn n_ctx(&self) -> usize {
        self.shared.n_ctx
    }

    /// The device in words.
    pub fn device(&self) -> String {
        self.shared.backend.label()
    }

    /// A new, empty conversation.
    pub fn session(&self, options: &SessionOptions) -> Result<Session> {
        Session::new(self.shared.clone(), options)
    }

    /// Runs one step for all sessions that have something to run; `false` if none has, or if
    /// another thread is running one. For hosts that schedule their own time; iterating a
    /// [`crate::Generation`] does it by itself.
    pub fn step(&self) -> Result<bool> {
        self.shared.try_step().unwrap_or(Ok(false))
    }

    /// Tokens of KV cache in use and in all.
    pub fn kv_usage(&self) -> (usize, usize) {
        let scheduler = lock(&self.shared.scheduler);
        let cache = scheduler.cache();
        let used = cache.total_pages() - cache.free_pages();
        (used * PAGE_LEN, cache.total_pages() * PAGE_LEN)
    }
}
