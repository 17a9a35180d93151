//! One model on one device, shared by all its sessions.

use std::{
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicUsize, Ordering},
    },
};

use lory_kernels::{Backend, Device, DeviceChoice, backend::KvShape, backend::KvType, cpu::ThreadOptions};
use lory_models::{decoder::Scratch, kv_cache::KvCache};

use crate::{
    AdapterStore, Error, GpuLayers, KvPolicy, Metrics, Repacking, Result, Session, SessionOptions, lock,
    mapping::Loading,
    model::{DeviceOptions, LoadedModel, OpenOptions},
    progress::Progress,
    scheduler::{Model, Scheduler},
};

/// Tokens per page of the KV cache: small enough that short sessions waste little, large enough
/// that attention reads long runs.
pub(crate) const PAGE_LEN: usize = 32;

/// Contexts that a KV cache holds for which nothing else is said.
pub(crate) const CONTEXTS: usize = 4;

/// Rows whose logits are computed at a time; bounds the buffer for vocabularies of 256k entries.
const LOGIT_ROWS: usize = 64;

/// How an engine is opened. The defaults suit a chat on the machine at hand.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Where to compute.
    pub device: DeviceChoice,
    /// How many layers a device with memory of its own gets; the processor has the others.
    pub gpu_layers: GpuLayers,
    /// Threads; `None` takes the physical cores.
    pub threads: Option<usize>,
    /// Where they run, and how they wait. Steps also run on the thread that asks for them, which stays where it is
    /// ([`ThreadOptions::settle`]).
    pub thread_options: ThreadOptions,
    /// Longest sequence; `None` takes the trained context, at most 4096.
    pub n_ctx: Option<u32>,
    /// Rows of one step at most: prompt tokens and generating sessions together. There are never more
    /// than the KV cache holds tokens.
    pub n_batch: usize,
    /// Element type of cached keys and values.
    pub kv_type: KvType,
    /// Tokens that the KV cache holds for all sessions together; `None` takes four contexts.
    /// Memory is touched only as it is used.
    pub kv_tokens: Option<usize>,
    /// Bytes that the KV cache may have; with `kv_tokens`, the smaller of both counts.
    pub kv_bytes: Option<usize>,
    /// What happens when the KV cache is full.
    pub kv_policy: KvPolicy,
    /// Whether sessions with the same beginning and the same adapters share its keys and values.
    /// Answers are the same bit for bit.
    pub prefix_sharing: bool,
    /// Bytes that adapters may have for themselves; `None` sets no limit. See
    /// [`AdapterStore::set_budget`].
    pub adapter_bytes: Option<usize>,
    /// Bytes that adapters and their bases may have on a device with memory of its own, where they are copied; `None` is what the model
    /// leaves of that memory, all but 1/32. With less than a batch needs they are copied again where they are used, which takes time and
    /// changes no answer. On the processor, which reads them where they are, it has no effect.
    pub device_adapter_bytes: Option<usize>,
    /// Whether files are mapped or read; [`crate::mapping`] says what mapping promises.
    pub loading: Loading,
    /// Whether weights are copied into a faster order.
    pub repacking: Repacking,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            device: DeviceChoice::Auto,
            gpu_layers: GpuLayers::Fit,
            threads: None,
            thread_options: ThreadOptions::default(),
            n_ctx: None,
            n_batch: 512,
            kv_type: KvType::F16,
            kv_tokens: None,
            kv_bytes: None,
            kv_policy: KvPolicy::default(),
            prefix_sharing: true,
            adapter_bytes: None,
            device_adapter_bytes: None,
            loading: Loading::Map,
            repacking: Repacking::Off,
        }
    }
}

/// Everything that the handles of one engine share.
pub(crate) struct Shared {
    pub model: Arc<LoadedModel>,
    pub backend: Arc<Device>,
    pub adapters: AdapterStore,
    pub n_ctx: usize,
    /// Bytes of a page of keys and values in all layers.
    pub page_bytes: usize,
    scheduler: Mutex<Scheduler<Device>>,
    /// Held while waiting for the scheduler: whoever runs step after step stands in line like
    /// everybody else, so that no call waits for more than the step that is running.
    line: Mutex<()>,
    /// Held by the thread whose turn it is to run a step.
    turn: Mutex<()>,
    pub progress: Arc<Progress>,
    drivers: AtomicUsize,
}

/// A turn at running a step; its end, however it comes, is told to everybody who waits for it.
struct Turn<'a> {
    shared: &'a Shared,
    guard: Option<MutexGuard<'a, ()>>,
    ran: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        // Counted after the turn is free: whoever found it taken sees another count and is woken.
        self.guard.take();
        self.shared.progress.end_turn(self.ran);
    }
}

impl Shared {
    /// The state of all sessions, after the step that is running.
    pub(crate) fn scheduler(&self) -> MutexGuard<'_, Scheduler<Device>> {
        let _line = lock(&self.line);
        lock(&self.scheduler)
    }

    /// Changes what sessions ask for or hold, and tells those who wait.
    pub(crate) fn change<T>(&self, change: impl FnOnce(&mut Scheduler<Device>) -> T) -> T {
        let changed = change(&mut self.scheduler());
        self.progress.announce();
        changed
    }

    /// Runs one step for all sessions, unless another thread is doing so (`None`). `false` if there
    /// was nothing to run.
    pub(crate) fn try_step(&self) -> Option<bool> {
        let guard = match self.turn.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        // A step that panics may have run something.
        let mut turn = Turn { shared: self, guard: Some(guard), ran: true };
        turn.ran = self.scheduler().step(&self.model());
        Some(turn.ran)
    }

    pub(crate) fn model(&self) -> Model<'_, Device> {
        let LoadedModel { decoder, tokenizer, .. } = &*self.model;
        Model { backend: &self.backend, decoder, tokenizer }
    }

    /// Whether a thread runs the steps by itself.
    pub(crate) fn is_driven(&self) -> bool {
        self.drivers.load(Ordering::Acquire) > 0
    }
}

/// A model ready to answer; cheap to clone, shared between threads.
#[derive(Clone)]
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
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
        let config = model.decoder.config();
        let n_ctx = model.n_ctx as usize;
        if options.n_batch == 0 {
            return Err(Error::Request("a batch of 0 rows cannot run anything: give at least 1".into()));
        }
        let shape = KvShape {
            layers: config.n_layers(),
            kv_heads: config.n_kv_heads,
            head_dim: config.head_dim,
            page_len: PAGE_LEN,
            ty: options.kv_type,
        };
        let page_of_layer = shape.page_bytes();
        let pages = kv_pages(options, n_ctx, page_of_layer * shape.layers)?;
        // Every row has a place of its own in the cache.
        let max_rows = options.n_batch.min(pages.saturating_mul(PAGE_LEN));
        let max_logits = LOGIT_ROWS.min(max_rows);
        let backend = Arc::new(model.device(&DeviceOptions {
            choice: options.device,
            gpu_layers: options.gpu_layers,
            threads: options.threads,
            thread_options: options.thread_options,
            repacking: options.repacking,
            cache_bytes: pages.saturating_mul(page_of_layer),
            working_bytes: Scratch::<Device>::bytes(&model.decoder, max_rows, max_logits),
            adapter_bytes: options.device_adapter_bytes,
        })?);
        let page_bytes = page_bytes(&backend, shape)?;
        let cache = kv_cache(&backend, shape, options, n_ctx, page_bytes)?;
        let cache = if options.prefix_sharing { cache.with_sharing() } else { cache };
        let scratch = Scratch::new(&*backend, &model.decoder, max_rows, max_logits)?;
        let adapters =
            AdapterStore::new(model.clone(), backend.clone(), options.loading, options.adapter_bytes);
        let (file, device) = (model.gguf.metadata().file(), backend.label());
        tracing::info!("{file}: {} layers, context {n_ctx}, on {device}", config.n_layers());
        Ok(Engine {
            shared: Arc::new(Shared {
                model,
                backend,
                adapters,
                n_ctx,
                page_bytes,
                scheduler: Mutex::new(Scheduler::new(cache, scratch, options.kv_policy)),
                line: Mutex::new(()),
                turn: Mutex::new(()),
                progress: Arc::default(),
                drivers: AtomicUsize::new(0),
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

    /// Bytes of repacked weights; see [`EngineOptions::repacking`].
    pub fn repacked_bytes(&self) -> usize {
        self.shared.backend.repacked_bytes()
    }

    /// A new, empty conversation.
    pub fn session(&self, options: &SessionOptions) -> Result<Session> {
        Session::new(self.shared.clone(), options)
    }

    /// Runs one step for all sessions that have something to run; `false` if none has, or if
    /// another thread is running one. For hosts that schedule their own time; iterating a
    /// [`crate::Generation`] does it by itself.
    pub fn step(&self) -> Result<bool> {
        Ok(self.shared.try_step().unwrap_or(false))
    }

    /// Runs steps, and sleeps while there is nothing to run, until `go_on` is false; it is asked
    /// before every step and after every change of a session. While a thread is in here,
    /// [`crate::Generation`]s that are polled as streams leave the steps to it. To let it notice a
    /// change of `go_on` while it sleeps, call [`Engine::wake_drivers`].
    pub fn drive(&self, go_on: impl Fn() -> bool) {
        struct Driving<'a>(&'a Shared);
        impl Drop for Driving<'_> {
            fn drop(&mut self) {
                self.0.drivers.fetch_sub(1, Ordering::AcqRel);
                // Whoever leaves the steps to this thread has to run them now, also who has asked
                // about it before and is about to wait.
                self.0.progress.end_turn(false);
            }
        }
        self.shared.drivers.fetch_add(1, Ordering::AcqRel);
        let _driving = Driving(&self.shared);
        loop {
            // Before the question: who changes its answer and wakes this thread after it is not overheard.
            let seen = self.shared.progress.seen();
            if !go_on() {
                break;
            }
            match self.shared.try_step() {
                Some(true) => {}
                Some(false) => self.shared.progress.wait_for_change(seen),
                None => self.shared.progress.wait_for_step(seen),
            }
        }
    }

    /// Lets threads in [`Engine::drive`] ask again whether to go on.
    pub fn wake_drivers(&self) {
        self.shared.progress.announce();
    }

    /// Tokens of KV cache in use and in all. Pages that no session holds, but that are kept in case
    /// a session with the same beginning comes, do not count as used.
    pub fn kv_usage(&self) -> (usize, usize) {
        let scheduler = self.shared.scheduler();
        let cache = scheduler.cache();
        let used = cache.total_pages() - cache.free_pages();
        (used * PAGE_LEN, cache.total_pages() * PAGE_LEN)
    }

    /// What the engine has done so far, and what it holds now.
    pub fn metrics(&self) -> Metrics {
        let mut metrics = self.shared.scheduler().metrics();
        metrics.kv_page_bytes = self.shared.page_bytes;
        metrics.adapters = self.shared.adapters.usage();
        metrics
    }
}

/// Bytes of one page in all layers, as this device lays it out.
fn page_bytes(backend: &Device, shape: KvShape) -> Result<usize> {
    let one = backend.kv_alloc(shape, 1).map_err(lory_models::Error::from)?;
    Ok(backend.kv_read_page(&one, 0).map_err(lory_models::Error::from)?.len())
}

fn kv_cache(
    backend: &Device,
    shape: KvShape,
    options: &EngineOptions,
    n_ctx: usize,
    page_bytes: usize,
) -> Result<KvCache<Device>> {
    let cache = KvCache::new(backend, shape, kv_pages(options, n_ctx, page_bytes)?);
    if cache.is_ok() || options.kv_tokens.is_some() || options.kv_bytes.is_some() {
        return Ok(cache?);
    }
    // The context is what decides; memory is touched only as it is used, so asking costs nothing.
    let pages = |tokens: usize| tokens.saturating_mul(CONTEXTS).div_ceil(PAGE_LEN);
    let fits = |tokens: usize| {
        u32::try_from(pages(tokens).saturating_mul(PAGE_LEN)).is_ok()
            && backend.kv_alloc(shape, pages(tokens)).is_ok()
    };
    let (mut fitting, mut too_many) = (0, n_ctx);
    while too_many - fitting > PAGE_LEN.max(fitting / 64) {
        let middle = fitting + (too_many - fitting) / 2;
        if fits(middle) { fitting = middle } else { too_many = middle }
    }
    let bytes = pages(n_ctx) as u128 * page_bytes as u128;
    Err(Error::ContextTooLong { n_ctx, bytes, fitting: fitting / PAGE_LEN * PAGE_LEN })
}

fn kv_pages(options: &EngineOptions, n_ctx: usize, page_bytes: usize) -> Result<usize> {
    let tokens = options.kv_tokens.unwrap_or(n_ctx.saturating_mul(CONTEXTS)).max(1);
    let Some(bytes) = options.kv_bytes else { return Ok(tokens.div_ceil(PAGE_LEN)) };
    let fitting = bytes / page_bytes.max(1);
    if fitting == 0 {
        let message = format!(
            "a KV cache of {bytes} bytes holds no page of {PAGE_LEN} tokens, which takes {page_bytes}; give more"
        );
        return Err(Error::Request(message));
    }
    Ok(match options.kv_tokens {
        Some(_) => tokens.div_ceil(PAGE_LEN).min(fitting),
        None => fitting,
    })
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::AtomicBool,
        task::{Wake, Waker},
    };

    use super::*;

    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Ordering::Release);
        }
    }

    #[test]
    fn a_driver_that_leaves_wakes_who_is_about_to_wait_for_it() {
        let model = crate::step::tests::loaded();
        let options = EngineOptions { threads: Some(1), ..EngineOptions::default() };
        let engine = Engine::with_model(model, &options).unwrap();
        let seen = engine.shared.progress.seen();
        engine.drive(|| false);
        let woken = Arc::new(Woken(AtomicBool::new(false)));
        engine.shared.progress.wake_after_step(seen, &Waker::from(woken.clone()));
        assert!(woken.0.load(Ordering::Acquire));
    }
}
