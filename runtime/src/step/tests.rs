//! A device that fails: whose request ends, and who goes on. A device that selects tokens: what is read from it.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use lory_kernels::{
    BackendError, Cpu, QMatrix, QuantType, Reference,
    backend::{
        Activation, AttentionParams, AttentionRow, Backend, KvShape, KvType, Likeliest, LoraJob, MatmulJob,
        Rope,
    },
    cpu::Isa,
};
use lory_models::{
    Tensor,
    adapter::{Adapter, AdapterBuilder, AdapterSet, Core, Delta, Projection, Site},
    decoder::Scratch,
    kv_cache::KvCache,
    synth::{FileType, model, shape},
};

use crate::{
    Event, Hidden, KvPolicy, LoadedModel, OpenOptions, Request, SamplerOptions,
    adapters::Bound,
    mapping::{self, File},
    scheduler::{Model, Scheduler, SequenceId},
    sequence::Active,
    stream::Stream,
};

type Outcome<T = ()> = Result<T, BackendError>;

/// A CPU that fails at one call, counted from its making, or at every call for adapters.
struct Failing {
    cpu: Cpu,
    calls: AtomicUsize,
    fail_at: usize,
    fail_adapters: bool,
    /// Whether it panics where it would fail.
    panics: bool,
    /// The largest k for which it selects tokens.
    most_candidates: usize,
    /// Values that were read from it.
    downloaded: AtomicUsize,
    /// Whether results can be looked at where they are.
    in_place: bool,
    /// How often its threads had something to do with results.
    turns: AtomicUsize,
}

impl Failing {
    fn new(fail_at: usize, fail_adapters: bool) -> Failing {
        Failing {
            cpu: Cpu::new(Some(1), Isa::detect()),
            calls: AtomicUsize::new(0),
            fail_at,
            fail_adapters,
            panics: false,
            most_candidates: usize::MAX,
            downloaded: AtomicUsize::new(0),
            in_place: false,
            turns: AtomicUsize::new(0),
        }
    }

    fn count(&self) -> Outcome {
        match self.calls.fetch_add(1, Ordering::Relaxed) == self.fail_at {
            true if self.panics => panic!("as the test wants it"),
            true => Err(no_memory()),
            false => Ok(()),
        }
    }
}

fn no_memory() -> BackendError {
    BackendError::OutOfMemory { device: "failing".into(), what: "a test", bytes: 1 }
}

type Buffer = <Cpu as Backend>::Buffer;
type Kv = <Cpu as Backend>::Kv;

impl Backend for Failing {
    type Buffer = Buffer;
    type Kv = Kv;

    fn label(&self) -> String {
        "failing".into()
    }
    fn supports(&self, ty: QuantType) -> bool {
        self.cpu.supports(ty)
    }
    fn load(&self, weight: QMatrix<'_>) -> Outcome {
        self.cpu.load(weight)
    }
    fn alloc(&self, len: usize) -> Outcome<Buffer> {
        self.count()?;
        self.cpu.alloc(len)
    }
    fn upload(&self, src: &[f32], dst: &mut Buffer) -> Outcome {
        self.count()?;
        self.cpu.upload(src, dst)
    }
    fn download(&self, src: &Buffer, offset: usize, dst: &mut [f32]) -> Outcome {
        self.count()?;
        self.downloaded.fetch_add(dst.len(), Ordering::Relaxed);
        self.cpu.download(src, offset, dst)
    }
    fn in_place<'a>(&self, buffer: &'a mut Buffer) -> Option<&'a mut [f32]> {
        self.cpu.in_place(buffer).filter(|_| self.in_place)
    }
    fn gather(&self, src: &Buffer, width: usize, rows: &[u32], dst: &mut Buffer) -> Outcome {
        self.count()?;
        self.cpu.gather(src, width, rows, dst)
    }
    fn embed(&self, table: QMatrix<'_>, tokens: &[u32], scale: f32, out: &mut Buffer) -> Outcome {
        self.count()?;
        self.cpu.embed(table, tokens, scale, out)
    }
    fn matmul(&self, x: &Buffer, rows: usize, jobs: &mut [MatmulJob<'_, Buffer>]) -> Outcome {
        self.count()?;
        self.cpu.matmul(x, rows, jobs)
    }
    fn lora(&self, x: &Buffer, in_width: usize, jobs: &mut [LoraJob<'_, Buffer>]) -> Outcome {
        self.count()?;
        if self.fail_adapters {
            return Err(no_memory());
        }
        self.cpu.lora(x, in_width, jobs)
    }
    fn add_bias(&self, x: &mut Buffer, rows: usize, bias: &[f32]) -> Outcome {
        self.count()?;
        self.cpu.add_bias(x, rows, bias)
    }
    fn add(&self, x: &mut Buffer, y: &Buffer, len: usize) -> Outcome {
        self.count()?;
        self.cpu.add(x, y, len)
    }
    fn rms_norm(&self, x: &Buffer, rows: usize, weight: &[f32], eps: f32, out: &mut Buffer) -> Outcome {
        self.count()?;
        self.cpu.rms_norm(x, rows, weight, eps, out)
    }
    fn rms_norm_inplace(&self, x: &mut Buffer, rows: usize, weight: &[f32], eps: f32) -> Outcome {
        self.count()?;
        self.cpu.rms_norm_inplace(x, rows, weight, eps)
    }
    fn rope(&self, x: &mut Buffer, heads: usize, head_dim: usize, positions: &[u32], rope: &Rope) -> Outcome {
        self.count()?;
        self.cpu.rope(x, heads, head_dim, positions, rope)
    }
    fn glu(&self, act: Activation, gate: &mut Buffer, up: &Buffer, len: usize) -> Outcome {
        self.count()?;
        self.cpu.glu(act, gate, up, len)
    }
    fn softcap(&self, x: &mut Buffer, len: usize, cap: f32) -> Outcome {
        self.count()?;
        self.cpu.softcap(x, len, cap)
    }
    fn top_k(
        &self,
        logits: &Buffer,
        width: usize,
        real: usize,
        rows: &[u32],
        k: usize,
    ) -> Outcome<Option<Vec<Likeliest>>> {
        self.count()?;
        match k <= self.most_candidates {
            true => Reference.top_k(logits, width, real, rows, k),
            false => Ok(None),
        }
    }
    fn kv_alloc(&self, shape: KvShape, pages: usize) -> Outcome<Kv> {
        self.cpu.kv_alloc(shape, pages)
    }
    fn kv_write(&self, kv: &mut Kv, layer: usize, k: &Buffer, v: &Buffer, slots: &[u32]) -> Outcome {
        self.count()?;
        self.cpu.kv_write(kv, layer, k, v, slots)
    }
    fn kv_copy_page(&self, kv: &mut Kv, from: u32, to: u32) -> Outcome {
        self.count()?;
        self.cpu.kv_copy_page(kv, from, to)
    }
    fn kv_read_page(&self, kv: &Kv, page: u32) -> Outcome<Vec<u8>> {
        self.cpu.kv_read_page(kv, page)
    }
    fn kv_write_page(&self, kv: &mut Kv, page: u32, bytes: &[u8]) -> Outcome {
        self.cpu.kv_write_page(kv, page, bytes)
    }
    fn attention(
        &self,
        kv: &Kv,
        layer: usize,
        q: &Buffer,
        rows: &[AttentionRow<'_>],
        params: &AttentionParams,
        out: &mut Buffer,
    ) -> Outcome {
        self.count()?;
        self.cpu.attention(kv, layer, q, rows, params, out)
    }
    fn flush(&self) -> Outcome {
        self.count()?;
        self.cpu.flush()
    }
    fn on_host(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.turns.fetch_add(usize::from(tasks > 1), Ordering::Relaxed);
        self.cpu.on_host(tasks, task);
    }
}

pub(crate) fn loaded() -> LoadedModel {
    let file =
        model(shape("llama-tiny").unwrap(), FileType::from_name("Q4_0").unwrap(), 3, Vec::new(), |_| ());
    let open = mapping::parse(vec![Arc::new(File::from_memory(file.unwrap(), "tiny.gguf"))]).unwrap();
    LoadedModel::from_gguf(open, &OpenOptions { n_ctx: Some(64), ..OpenOptions::default() }).unwrap()
}

/// Biases on two layers are adapter enough; that of the output makes token 5 the likeliest.
fn adapter(model: &LoadedModel) -> Arc<Adapter> {
    let mut builder = AdapterBuilder::new("bias");
    for site in [Site::layer(0, Projection::AttnQ), Site::OUTPUT] {
        let n = model.base.shapes.get(site).unwrap().out_features;
        let value = |i| if i == 5 { 100f32 } else { 0.5 };
        let bytes = (0..n).flat_map(|i| value(i).to_le_bytes()).collect();
        let mut core = Core::new(Delta::None, 1.0);
        core.bias = Some(Tensor::owned("bias", QuantType::F32, 1, n, bytes).unwrap());
        builder.core(site, core);
    }
    Arc::new(builder.build(&model.base.shapes).unwrap())
}

struct World<'a> {
    model: &'a LoadedModel,
    backend: Failing,
    scheduler: Scheduler<Failing>,
}

impl<'a> World<'a> {
    /// `backend` fails only from here on.
    fn new(model: &'a LoadedModel, backend: Failing) -> World<'a> {
        let sound = Failing::new(usize::MAX, false);
        let c = model.decoder.config();
        let shape = KvShape {
            layers: c.n_layers(),
            kv_heads: c.n_kv_heads,
            head_dim: c.head_dim,
            page_len: 4,
            ty: KvType::F16,
        };
        let cache = KvCache::new(&sound, shape, 32).unwrap().with_sharing();
        let scratch = Scratch::new(&sound, &model.decoder, 16, 4).unwrap();
        World { model, backend, scheduler: Scheduler::new(cache, scratch, KvPolicy::Evict) }
    }

    fn add(&mut self, adapters: &[&Arc<Adapter>]) -> SequenceId {
        let set = AdapterSet::new(adapters.iter().map(|a| ((*a).clone(), 1.0)).collect()).unwrap();
        self.scheduler.add(Arc::new(Bound::new(set, Vec::new())), 0)
    }

    fn ask(&mut self, id: SequenceId, tokens: &[u32], n: usize) -> Arc<Stream> {
        self.ask_with(id, tokens, n, SamplerOptions::greedy())
    }

    fn ask_with(&mut self, id: SequenceId, tokens: &[u32], n: usize, sampler: SamplerOptions) -> Arc<Stream> {
        let request = Request {
            tokens: tokens.into(),
            max_new_tokens: n,
            sampler,
            ignore_eos: true,
            ..Request::default()
        };
        self.submit(id, &request)
    }

    fn submit(&mut self, id: SequenceId, request: &Request) -> Arc<Stream> {
        let stream = Arc::new(Stream::new(256));
        let active = Active::new(request, 64, self.model, stream.clone()).unwrap();
        self.scheduler.submit(id, &request.tokens, active, &self.model.tokenizer).unwrap();
        stream
    }

    fn run(&mut self) {
        let LoadedModel { decoder, tokenizer, .. } = self.model;
        while self.scheduler.step(&Model { backend: &self.backend, decoder, tokenizer }) {}
    }
}

/// Tokens, and the error if there was one.
fn outcome(stream: &Stream) -> (Vec<u32>, Option<String>) {
    let mut tokens = Vec::new();
    loop {
        match stream.poll() {
            std::task::Poll::Ready(Some(Ok(Event::Token { id, .. }))) => tokens.push(id),
            std::task::Poll::Ready(Some(Ok(_))) => {}
            std::task::Poll::Ready(Some(Err(e))) => return (tokens, Some(e.to_string())),
            std::task::Poll::Ready(None) => return (tokens, None),
            std::task::Poll::Pending => panic!("it never ends"),
        }
    }
}

#[test]
fn out_of_memory_for_one_adapter_ends_its_request_alone() {
    let model = loaded();
    let adapter = adapter(&model);
    let mut world = World::new(&model, Failing::new(usize::MAX, false));
    let id = world.add(&[]);
    let stream = world.ask(id, &[1, 2, 3], 6);
    world.run();
    let want = outcome(&stream);
    assert_eq!((want.0.len(), &want.1), (6, &None));

    let mut world = World::new(&model, Failing::new(usize::MAX, true));
    let ids = [world.add(&[]), world.add(&[&adapter]), world.add(&[])];
    let streams = ids.map(|id| world.ask(id, &[1, 2, 3], 6));
    world.run();
    assert_eq!(outcome(&streams[0]), want);
    assert_eq!(outcome(&streams[2]), want);
    let (tokens, error) = outcome(&streams[1]);
    assert!(tokens.is_empty() && error.is_some_and(|e| e.contains("out of memory")));
    // Its session is as it was before, and runs again where it can.
    assert_eq!(world.scheduler.get(ids[1]).tokens, [1, 2, 3]);
    world.backend.fail_adapters = false;
    let stream = world.ask(ids[1], &[], 6);
    world.run();
    let adapted = outcome(&stream);
    assert_eq!(adapted, (vec![5; 6], None));
    assert_ne!(adapted.0, want.0, "the adapter works");
}

#[test]
fn r10_a_failure_at_any_call_is_an_error_and_nothing_more() {
    let model = loaded();
    let adapter = adapter(&model);
    let run = |fail_at: usize| {
        let mut world = World::new(&model, Failing::new(fail_at, false));
        let a = world.add(&[]);
        let b = world.add(&[&adapter]);
        let first = [world.ask(a, &[1, 2, 3, 4, 5, 6], 2), world.ask(b, &[7, 8], 2)];
        world.run();
        // The fork writes into a page that both hold: a copy.
        let c = world.scheduler.fork(a);
        let second = [world.ask(a, &[9], 2), world.ask(c, &[10], 2)];
        world.run();
        let outcomes: Vec<_> = first.iter().chain(&second).map(|s| outcome(s)).collect();
        let calls = world.backend.calls.load(Ordering::Relaxed);
        for id in [a, b, c] {
            world.scheduler.remove(id);
        }
        assert_eq!(world.scheduler.cache().free_pages(), 32, "call {fail_at} loses a page");
        (outcomes, calls)
    };
    let (want, calls) = run(usize::MAX);
    assert!(want.iter().all(|(tokens, error)| tokens.len() == 2 && error.is_none()));
    let mut failures = 0;
    for fail_at in 0..calls {
        let (got, _) = run(fail_at);
        for (i, ((tokens, error), (all, _))) in got.iter().zip(&want).enumerate() {
            // A failed first request leaves another history for the second.
            let same_history = i < 2 || got[0].1.is_none();
            assert!(!same_history || *tokens == all[..tokens.len()], "call {fail_at}: {got:?}");
            failures += usize::from(error.is_some());
            assert!(error.is_some() || tokens.len() == 2, "call {fail_at}: {got:?}");
        }
    }
    // Most failures pass with the second try, where each request runs alone.
    assert!(failures > 0 && failures < calls, "{failures} of {calls}");
}

/// A step that panics is not there for those that follow: they compute what it did not.
#[test]
fn after_a_panic_the_answers_are_the_same() {
    let model = loaded();
    let adapter = adapter(&model);
    let run = |fail_at: usize| {
        let backend = Failing { panics: true, ..Failing::new(fail_at, false) };
        let mut world = World::new(&model, backend);
        let ids = [world.add(&[]), world.add(&[&adapter])];
        let streams = [world.ask(ids[0], &[1, 2, 3, 4, 5, 6], 3), world.ask(ids[1], &[7, 8], 3)];
        let panicked = catch_unwind(AssertUnwindSafe(|| world.run())).is_err();
        world.run();
        let outcomes = streams.map(|s| outcome(&s));
        (outcomes, panicked, world.backend.calls.load(Ordering::Relaxed))
    };
    let (want, panicked, calls) = run(usize::MAX);
    assert!(!panicked && want.iter().all(|(tokens, error)| tokens.len() == 3 && error.is_none()));
    for fail_at in 0..calls {
        let (got, panicked, _) = run(fail_at);
        assert!(panicked && got == want, "call {fail_at}: {got:?}");
    }
}

/// Requests that need a few tokens, whole rows, and more tokens than the device selects: each draws what it draws from whole
/// rows, and only those of the last two kinds are read.
#[test]
fn rows_are_read_where_candidates_are_not_enough() {
    let model = loaded();
    let vocab = model.decoder.vocab_size();
    let top =
        |top_k, seed| SamplerOptions { top_k, seed: Some(seed), temp: 2.0, ..SamplerOptions::default() };
    let penalized = SamplerOptions { repeat_penalty: 1.5, ..top(40, 4) };
    let requests = [
        (top(40, 1), false),
        (penalized, true),
        (SamplerOptions { logprobs: Some(2), ..top(40, 2) }, true),
        (SamplerOptions::greedy(), false),
        (top(101, 3), true),
        (top(100, 5), false),
        (top(0, 6), true),
    ];
    // Four rows of logits at a time, and seven sequences.
    let run = |most_candidates, requests: &[(SamplerOptions, bool)]| {
        let backend = Failing { most_candidates, ..Failing::new(usize::MAX, false) };
        let mut world = World::new(&model, backend);
        let ask = |(i, (options, _)): (usize, &(SamplerOptions, bool))| {
            let id = world.add(&[]);
            world.ask_with(id, &[1, 2 + i as u32], 5, options.clone())
        };
        let streams: Vec<_> = requests.iter().enumerate().map(ask).collect();
        world.run();
        let tokens: Vec<_> = streams.iter().map(|s| outcome(s)).collect();
        (tokens, world.backend.downloaded.load(Ordering::Relaxed) / vocab)
    };
    let (want, rows) = run(0, &requests);
    assert_eq!(rows, 5 * requests.len(), "a processor reads all of them");
    assert!(want.iter().all(|(tokens, error)| tokens.len() == 5 && error.is_none()));
    let (got, rows) = run(100, &requests);
    assert_eq!(got, want);
    assert_eq!(rows, 5 * requests.iter().filter(|(_, whole)| *whole).count());
}

/// Rows of every kind in one step, each looked at by some thread: whoever asked gets what it would get alone.
#[test]
fn what_is_handed_out_together_is_what_each_gets_alone() {
    let model = loaded();
    let request = |i: u32, top_k, reported: bool, hidden| Request {
        tokens: (1 + i..8 + i).collect(),
        max_new_tokens: 4,
        ignore_eos: true,
        prompt_logits: reported && i != 3,
        prompt_logprobs: reported.then_some(2),
        hidden,
        sampler: SamplerOptions { top_k, seed: Some(i.into()), temp: 2.0, ..SamplerOptions::default() },
        ..Request::default()
    };
    let requests = [
        request(0, 40, false, Hidden::None),
        // More than this device selects.
        request(1, 200, false, Hidden::Last),
        request(2, 40, true, Hidden::All),
        request(3, 0, true, Hidden::None),
        request(4, 5, false, Hidden::All),
    ];
    let run = |requests: &[Request], threads, in_place| {
        let cpu = Cpu::new(Some(threads), Isa::detect());
        let backend = Failing { most_candidates: 100, cpu, in_place, ..Failing::new(usize::MAX, false) };
        let mut world = World::new(&model, backend);
        let ids: Vec<_> = requests.iter().map(|_| world.add(&[])).collect();
        let streams: Vec<_> = ids.iter().zip(requests).map(|(id, r)| world.submit(*id, r)).collect();
        world.run();
        let events = |stream: &Arc<Stream>| {
            let next = || match stream.poll() {
                std::task::Poll::Ready(event) => event.map(Result::unwrap),
                std::task::Poll::Pending => panic!("it never ends"),
            };
            std::iter::from_fn(next).map(|event| format!("{event:?}")).collect::<Vec<_>>()
        };
        (streams.iter().map(events).collect::<Vec<_>>(), world.backend.turns.load(Ordering::Relaxed))
    };
    let alone: Vec<_> =
        requests.iter().flat_map(|request| run(std::slice::from_ref(request), 1, false).0).collect();
    // Tokens; log-probabilities of six; logits of seven; states of seven, or of one. Not what was held back of a text.
    let counted = |events: &Vec<String>| events.iter().filter(|event| !event.starts_with("Text")).count();
    assert_eq!(alone.iter().map(counted).collect::<Vec<_>>(), [4, 4 + 1, 4 + 6 + 7 + 7, 4 + 6, 4 + 7]);
    for (threads, in_place) in [(1, false), (1, true), (3, false), (3, true)] {
        let (together, turns) = run(&requests, threads, in_place);
        assert_eq!(together, alone, "{threads} threads, in place: {in_place}");
        assert!(turns > 4, "{turns} turns of the threads");
    }
}
