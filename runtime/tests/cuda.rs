//! Whole models on a CUDA device, or on the emulated driver where there is none, beside the processor.

use std::collections::HashMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use lory_kernels::backend::KvType;
use lory_kernels::{Backend, Cuda, Device, DeviceChoice, QuantType};
use lory_models::adapter::AdapterSet;
use lory_models::adapter::pack::{Pack, SynthSpec, synth_pack};
use lory_models::synth::{self, FileType};
use lory_runtime::mapping::Loading;
use lory_runtime::{
    Bare, BareOptions, DeviceOptions, Engine, EngineOptions, Error, Event, Generation, GpuLayers,
    LoadedModel, OpenOptions, Repacking, Request, SamplerOptions, Session, SessionOptions, open_pack,
};

/// Where it was built, unless `LORY_REPOSITORY` says that it is elsewhere.
fn repository() -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::env::var_os("LORY_REPOSITORY").map_or_else(built, PathBuf::from)
}

/// Whether CUDA devices can be opened: the real one, or the emulated driver, built and loaded here.
fn cuda_is_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(find_or_emulate)
}

/// The emulated driver, if it stands for a device.
static EMULATOR: OnceLock<libloading::Library> = OnceLock::new();

/// Bytes that were copied to the emulated device so far, by all tests.
fn copied() -> Option<usize> {
    let library = EMULATOR.get()?;
    // SAFETY: the signature in libcuda.cpp.
    let copied: libloading::Symbol<'_, unsafe extern "C" fn() -> usize> =
        unsafe { library.get(b"lory_emulate_copied") }.unwrap();
    // SAFETY: reads a number.
    Some(unsafe { copied() })
}

fn find_or_emulate() -> bool {
    match Cuda::open(0) {
        Ok(_) => return true,
        Err(error) => {
            let required = std::env::var_os("LORY_REQUIRE_CUDA").is_some();
            assert!(!required, "LORY_REQUIRE_CUDA asks for a device: {error}");
            println!("no device ({error}): on the emulated driver");
        }
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    let script = repository().join("kernels/src/cuda/emulator/build.sh");
    match Command::new("bash").arg(script).arg(&folder).output() {
        Ok(built) if built.status.success() => {}
        failed => {
            println!("skipped: the emulated driver does not build here: {failed:?}");
            return false;
        }
    }
    // SAFETY: its initializers only register kernels. It stays loaded, so that the driver is found by its name.
    EMULATOR.get_or_init(|| unsafe { libloading::Library::new(folder.join("libcuda.so")) }.unwrap());
    true
}

fn model(name: &str) -> PathBuf {
    repository().join("tests/fixtures/models").join(name)
}

fn device(model: &LoadedModel, choice: DeviceChoice, gpu_layers: GpuLayers) -> Result<Device, Error> {
    model.device(&DeviceOptions { choice, gpu_layers, threads: Some(1), ..DeviceOptions::default() })
}

/// Logits after each of `tokens`, `at_once` in a pass.
fn logits<B: Backend>(backend: &B, model: &LoadedModel, tokens: &[u32], at_once: usize) -> Vec<f32> {
    let options = BareOptions { sequences: 1, tokens: 64, n_batch: at_once, kv_type: KvType::F16 };
    let mut bare = Bare::new(backend, &model.decoder, options).unwrap();
    let mut all = Vec::new();
    bare.score(0, tokens, &mut |_, logits| all.extend_from_slice(logits)).unwrap();
    all
}

/// The models are in F32, so that only the order of sums differs; a prompt at once and token by token give the same bits.
#[test]
fn models_and_an_engine() {
    if !cuda_is_there() {
        return;
    }
    for name in ["llama.gguf", "qwen3.gguf", "gemma2.gguf", "phi3.gguf"] {
        let options = OpenOptions { n_ctx: Some(64), loading: Loading::Map };
        let model = LoadedModel::open(&model(name), &options).unwrap();
        let tokens: Vec<u32> = (0..19).map(|i| 17 + i * 11).collect();
        let open = |choice| device(&model, choice, GpuLayers::Fit).unwrap();
        let (cpu, cuda) = (open(DeviceChoice::Auto), open(DeviceChoice::Cuda(0)));
        assert!(matches!((&cpu, &cuda), (Device::Cpu(_), Device::Cuda(_))));
        let want = logits(&cpu, &model, &tokens, 19);
        let got = logits(&cuda, &model, &tokens, 19);
        let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        let worst = got.iter().zip(&want).fold(0f32, |m, (g, w)| m.max((g - w).abs()));
        // A key or value may be rounded to the other neighbour in half precision: 2⁻¹¹ of it, here and there.
        assert!(worst <= largest * 2e-3, "{name}: {worst} of {largest}");
        assert_eq!(logits(&cuda, &model, &tokens, 1), got, "{name}: token by token");
    }
    let open = |device| {
        let options = EngineOptions {
            device,
            n_ctx: Some(64),
            kv_tokens: Some(128),
            threads: Some(1),
            ..EngineOptions::default()
        };
        Engine::open(&model("llama.gguf"), &options)
    };
    assert!(open(DeviceChoice::Auto).unwrap().device().starts_with("cpu"));
    assert!(open(DeviceChoice::Cuda(0)).unwrap().device().starts_with("cuda ("));
    let error = open(DeviceChoice::Cuda(9)).err().unwrap().to_string();
    assert!(error.contains("device 9"), "{error}");
}

/// What is repacked is counted wherever the processor has part of a model.
#[test]
fn repacked_weights_of_some_layers() {
    if !cuda_is_there() {
        return;
    }
    let (shape, ty) = (synth::shape("llama-tiny").unwrap(), FileType::from_name("Q4_0").unwrap());
    let file = tempfile::NamedTempFile::new().unwrap();
    synth::model(shape, ty, 1, file.as_file(), |_| ()).unwrap();
    let model = LoadedModel::open(file.path(), &OpenOptions::default()).unwrap();
    let bytes = |gpu_layers| {
        let choice = if gpu_layers == 0 { DeviceChoice::Cpu } else { DeviceChoice::Cuda(0) };
        let gpu_layers = GpuLayers::Last(gpu_layers);
        let (threads, repacking) = (Some(1), Repacking::On);
        let options = DeviceOptions { choice, gpu_layers, threads, repacking, ..DeviceOptions::default() };
        model.device(&options).unwrap().repacked_bytes()
    };
    let layers = model.decoder.weights().layers.len();
    let (all, some, none) = (bytes(0), bytes(1), bytes(layers + 1));
    assert!(0 < some && some < all && none == 0, "{all}, {some}, {none}");
}

/// Any number of layers on the device, and as many as there is room for.
#[test]
fn some_layers_on_the_device() {
    if !cuda_is_there() {
        return;
    }
    let (model, pack) = model_and_pack();
    let cpu = device(&model, DeviceChoice::Cpu, GpuLayers::Fit).unwrap();
    let want = with_adapters(&cpu, &model, &pack, 2);
    let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let layers = model.decoder.weights().layers.len();
    for n in 0..=layers + 1 {
        let some = device(&model, DeviceChoice::Cuda(0), GpuLayers::Last(n)).unwrap();
        match n {
            0 => assert!(matches!(some, Device::Cpu(_))),
            n if n > layers => assert!(matches!(some, Device::Cuda(_))),
            _ => assert!(some.label().ends_with(&cpu.label()), "{}", some.label()),
        }
        let got = with_adapters(&some, &model, &pack, 2);
        let worst = got.iter().zip(&want).fold(0f32, |m, (g, w)| m.max((g - w).abs()));
        println!("{}: {worst} of {largest}", some.label());
        assert!(worst <= largest * 2e-3, "{n} layers: {worst} of {largest}");
        let Device::Split(split) = &some else { continue };
        let (pool, needed) = (split.device().adapter_pool(), adapter_bytes(&pack, ADAPTERS, layers - n));
        println!("{pool:?}, {needed} bytes needed");
        assert_eq!(pool.late, 0, "{n} layers: {pool:?}");
        assert!((needed..needed + needed / 8).contains(&pool.bytes), "{n} layers: {pool:?}, {needed}");
    }
    // Caches of which the device has room for all, one, none.
    let (free, total) = cuda_memory(&model);
    let fit = |cache_bytes, adapter_bytes| {
        let options = DeviceOptions { choice: DeviceChoice::Cuda(0), threads: Some(1), ..Default::default() };
        model.device(&DeviceOptions { cache_bytes, adapter_bytes, ..options })
    };
    let room = free - total / 8;
    assert!(matches!(fit(0, None).unwrap(), Device::Cuda(_)));
    for budget in [None, Some(0)] {
        let one = fit(room / 10 * 7, budget).unwrap();
        assert!(one.label().contains(&format!("layers before {}", layers - 1)), "{}", one.label());
    }
    for (cache_bytes, budget) in [(room * 2, None), (room / 10 * 7, Some(free / 2))] {
        let error = fit(cache_bytes, budget).err().unwrap().to_string();
        assert!(error.contains("out of memory") && error.contains("a single layer"), "{error}");
    }
}

/// Bytes of the first adapters of a pack and of their bases in the layers from `first` on, each once.
fn adapter_bytes(pack: &Pack, adapters: usize, first: usize) -> usize {
    let adapters: Vec<_> = (0..adapters).map(|i| pack.adapter(&adapter_name(i)).unwrap()).collect();
    let matrices = adapters.iter().flat_map(|adapter| adapter.matrices());
    let there = matrices.filter(|(site, _)| site.layer_index().is_some_and(|layer| layer >= first));
    let places: HashMap<_, _> =
        there.map(|(_, matrix)| (matrix.bytes().as_ptr(), matrix.bytes().len())).collect();
    places.values().sum()
}

/// (free, total) bytes of the device.
fn cuda_memory(model: &LoadedModel) -> (usize, usize) {
    device(model, DeviceChoice::Cuda(0), GpuLayers::Last(1)).unwrap().memory().unwrap().unwrap()
}

const ADAPTERS: usize = 6;

/// A pack of adapters of two bases for a model, in a file.
fn pack_for(model: &LoadedModel, folder: &Path) -> PathBuf {
    let spec = SynthSpec {
        n_adapters: ADAPTERS,
        clusters: 2,
        rank: 8,
        diagonal: false,
        share_v: true,
        basis_type: QuantType::F32,
        core_type: QuantType::F16,
        seed: 3,
    };
    let bytes = synth_pack(&model.base, &spec, Cursor::new(Vec::new())).unwrap().into_inner();
    let path = folder.join("pack.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn model_and_pack() -> (LoadedModel, Pack) {
    let folder = tempfile::tempdir().unwrap();
    let options = OpenOptions { n_ctx: Some(64), loading: Loading::Map };
    let model = LoadedModel::open(&model("llama.gguf"), &options).unwrap();
    let pack = open_pack(&pack_for(&model, folder.path()), Loading::Read).unwrap();
    (model, pack)
}

fn adapter_name(i: usize) -> String {
    format!("synth-{i:05}")
}

/// The logits after the last of each sequence's tokens, all in one batch; sequence `i` has adapter `i`.
fn with_adapters<B: Backend>(backend: &B, model: &LoadedModel, pack: &Pack, passes: usize) -> Vec<f32> {
    let options = BareOptions { sequences: ADAPTERS + 1, tokens: 64, n_batch: 32, kv_type: KvType::F16 };
    let mut bare = Bare::new(backend, &model.decoder, options).unwrap();
    // The last sequence has none.
    for i in 0..ADAPTERS {
        let adapter = pack.adapter(&adapter_name(i)).unwrap();
        backend.prefetch(&mut model.decoder.weights().lora(&adapter)).unwrap();
        bare.set_adapters(i, AdapterSet::single(adapter));
    }
    let mut all = Vec::new();
    for pass in 0..passes {
        let tokens: Vec<u32> = (0..3).map(|i| 40 + (pass * 3 + i) as u32 * 7).collect();
        let work: Vec<_> = (0..=ADAPTERS).map(|i| (i, &tokens[..])).collect();
        all.extend_from_slice(bare.run(&work).unwrap());
    }
    all
}

/// The bits of adapters do not depend on how many of them the device has room for, and are near the processor's.
#[test]
fn adapters_with_much_and_little_room() {
    if !cuda_is_there() {
        return;
    }
    let (model, pack) = model_and_pack();
    let want = with_adapters(&device(&model, DeviceChoice::Auto, GpuLayers::Fit).unwrap(), &model, &pack, 2);
    let vocab = model.decoder.vocab_size();
    let rows =
        |logits: &[f32]| logits.chunks(vocab).take(ADAPTERS + 1).map(<[f32]>::to_vec).collect::<Vec<_>>();
    assert!(rows(&want).windows(2).all(|two| two[0] != two[1]), "the adapters add nothing");
    let mut first: Option<Vec<f32>> = None;
    for budget in [None, Some(60_000), Some(20_000), Some(0)] {
        let options = DeviceOptions { choice: DeviceChoice::Cuda(0), ..DeviceOptions::default() };
        let device = model.device(&DeviceOptions { adapter_bytes: budget, ..options }).unwrap();
        let Device::Cuda(cuda) = &device else { panic!("asked for CUDA") };
        let got = with_adapters(&device, &model, &pack, 2);
        let pool = cuda.adapter_pool();
        println!("{pool:?}");
        assert_eq!(pool.budget, budget);
        let Some(first) = &first else {
            assert_eq!((pool.late, pool.evicted), (0, 0), "everything was there ahead of its use: {pool:?}");
            let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
            let worst = got.iter().zip(&want).fold(0f32, |m, (g, w)| m.max((g - w).abs()));
            assert!(worst <= largest * 2e-3, "{worst} of {largest}");
            first = Some(got);
            continue;
        };
        assert!(pool.late > 0, "{pool:?}");
        assert_eq!(&got, first, "{budget:?} bytes");
    }
}

/// An engine on the device with the pack of adapters; `budget` is what they may have there.
fn engine_with_pack(gpu_layers: GpuLayers, budget: Option<usize>) -> Engine {
    let folder = tempfile::tempdir().unwrap();
    let options = EngineOptions {
        device: DeviceChoice::Cuda(0),
        gpu_layers,
        n_ctx: Some(64),
        kv_tokens: Some(512),
        prefix_sharing: false,
        device_adapter_bytes: budget,
        loading: Loading::Read,
        ..EngineOptions::default()
    };
    let engine = Engine::open(&model("llama.gguf"), &options).unwrap();
    engine.adapters().open_pack(&pack_for(engine.model(), folder.path())).unwrap();
    engine
}

/// Begins a request with an adapter for the logits of a prompt of three tokens.
fn ask(engine: &Engine, i: usize) -> (Session, Generation) {
    let id = engine.adapters().resolve(&adapter_name(i)).unwrap();
    let mut session =
        engine.session(&SessionOptions { adapters: vec![(id, 1.0)], ..Default::default() }).unwrap();
    let request = Request {
        tokens: vec![30 + i as u32, 31, 77],
        max_new_tokens: 0,
        prompt_logits: true,
        ..Request::default()
    };
    let generation = session.generate(request).unwrap();
    (session, generation)
}

fn answer((_session, generation): (Session, Generation)) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    for event in generation {
        if let Event::Logits { values, .. } = event.unwrap() {
            all.push(values);
        }
    }
    assert_eq!(all.len(), 3);
    all
}

/// Sessions of an engine with different adapters, each the bits that it has alone, while other adapters arrive from a second thread.
#[test]
fn sessions_while_adapters_arrive() {
    if !cuda_is_there() {
        return;
    }
    let engine = engine_with_pack(GpuLayers::Fit, None);
    let alone: Vec<_> = (0..3).map(|i| answer(ask(&engine, i))).collect();
    let running = AtomicBool::new(true);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for i in (3..ADAPTERS).cycle().take(1000) {
                if !running.load(Ordering::Relaxed) {
                    break;
                }
                let name = adapter_name(i);
                engine.adapters().prefetch(&[&name]).unwrap();
                engine.adapters().unload(&name).unwrap();
            }
        });
        let together: Vec<_> = (0..3).map(|i| ask(&engine, i)).collect();
        let together: Vec<_> = together.into_iter().map(answer).collect();
        running.store(false, Ordering::Relaxed);
        assert_eq!(together, alone);
    });
}

/// Without room for adapters on the device every step copies what it needs, and nothing else is different.
#[test]
fn an_engine_without_room_for_adapters() {
    if !cuda_is_there() {
        return;
    }
    let (model, pack) = model_and_pack();
    let layers = model.decoder.weights().layers.len();
    for (gpu_layers, first) in [(GpuLayers::Fit, 0), (GpuLayers::Last(1), layers - 1)] {
        let want = answer(ask(&engine_with_pack(gpu_layers, None), 0));
        let engine = engine_with_pack(gpu_layers, Some(0));
        let steps = (0..20).filter_map(|_| {
            let before = copied()?;
            assert_eq!(answer(ask(&engine, 0)), want);
            Some(copied()? - before)
        });
        // Other tests copy meanwhile.
        let (least, needed) = (steps.min(), adapter_bytes(&pack, 1, first));
        assert!(least.is_none_or(|least| least >= needed), "{least:?} bytes in a step that needs {needed}");
    }
}

/// Sessions that draw from candidates which the device selects, beside one that looks at whole rows, draw what they draw when all
/// look at whole rows (log-probabilities are of those), wherever the output layer is.
#[test]
fn candidates_from_the_device() {
    if !cuda_is_there() {
        return;
    }
    let top =
        |top_k, seed| SamplerOptions { top_k, seed: Some(seed), temp: 3.0, ..SamplerOptions::default() };
    let samplers = [
        SamplerOptions::greedy(),
        top(40, 1),
        SamplerOptions { repeat_penalty: 1.3, ..top(40, 2) },
        SamplerOptions { min_p: 0.0, top_p: 1.0, ..top(200, 3) },
        SamplerOptions { typical_p: 0.6, ..top(7, 4) },
    ];
    for gpu_layers in [GpuLayers::Fit, GpuLayers::Last(1)] {
        let options = EngineOptions {
            device: DeviceChoice::Cuda(0),
            gpu_layers,
            n_ctx: Some(64),
            kv_tokens: Some(512),
            threads: Some(1),
            ..EngineOptions::default()
        };
        let engine = Engine::open(&model("llama.gguf"), &options).unwrap();
        let tokens = |logprobs| -> Vec<Vec<u32>> {
            let ask = |(i, sampler): (u32, &SamplerOptions)| {
                let mut session = engine.session(&SessionOptions::default()).unwrap();
                let request = Request {
                    tokens: vec![30 + i, 31, 77],
                    max_new_tokens: 8,
                    ignore_eos: true,
                    sampler: SamplerOptions { logprobs, ..sampler.clone() },
                    ..Request::default()
                };
                let generation = session.generate(request).unwrap();
                (session, generation)
            };
            let running: Vec<_> = (0..).zip(&samplers).map(ask).collect();
            let ids = |generation: Generation| {
                let id = |event| match event {
                    Ok(Event::Token { id, .. }) => Some(id),
                    Ok(_) => None,
                    Err(error) => panic!("{error}"),
                };
                generation.filter_map(id).collect()
            };
            running.into_iter().map(|(_session, generation)| ids(generation)).collect()
        };
        let got = tokens(None);
        assert!(got.iter().all(|ids| ids.len() == 8), "{got:?}");
        assert_eq!(got, tokens(Some(0)), "{}", engine.device());
    }
}

/// Wherever a launch is refused, a request gets the tokens that it should or an error, and the next one with the same prompt, which may find
/// pages in the cache, gets the tokens that it should.
#[test]
fn launches_that_fail() {
    if !cuda_is_there() {
        return;
    }
    let Some(library) = EMULATOR.get() else {
        println!("skipped: needs the emulated driver");
        return;
    };
    // SAFETY: the signature in libcuda.cpp.
    let refuse: libloading::Symbol<'_, unsafe extern "C" fn(i32) -> i32> =
        unsafe { library.get(b"lory_emulate_refused_launch") }.unwrap();
    // Three steps for the prompt, of which two read nothing back; pages of it are full.
    let prompt: Vec<u32> = (0..40).map(|i| 17 + i * 5).collect();
    let ask = |engine: &Engine| {
        let mut session = engine.session(&SessionOptions::default()).unwrap();
        let request = Request {
            tokens: prompt.clone(),
            max_new_tokens: 2,
            ignore_eos: true,
            sampler: SamplerOptions::greedy(),
            ..Request::default()
        };
        let mut ids = Vec::new();
        for event in session.generate(request).unwrap() {
            if let Event::Token { id, .. } = event? {
                ids.push(id);
            }
        }
        Ok::<_, Error>(ids)
    };
    let options = EngineOptions {
        device: DeviceChoice::Cuda(0),
        n_ctx: Some(64),
        kv_tokens: Some(128),
        n_batch: 16,
        threads: Some(1),
        ..EngineOptions::default()
    };
    let open = || Engine::open(&model("llama.gguf"), &options).unwrap();
    let want = ask(&open()).unwrap();
    let mut failed = 0;
    for n in (1..).step_by(7) {
        let engine = open();
        // SAFETY: sets a number for this thread, which is the one that runs the steps.
        unsafe { refuse(n) };
        let got = ask(&engine);
        // SAFETY: as above.
        let refused = unsafe { refuse(0) } == 0;
        match &got {
            Ok(ids) => assert_eq!(*ids, want, "launch {n}"),
            Err(error) => assert!(error.to_string().contains("out of memory"), "{error}"),
        }
        failed += usize::from(got.is_err());
        assert_eq!(ask(&engine).unwrap(), want, "after launch {n}");
        if !refused {
            break;
        }
    }
    println!("{failed} requests failed");
    assert!(failed > 5, "{failed}");
}

/// A step of decoding copies tables only where they changed, launches the graphs of the step before, and gives the bits of launches one
/// by one.
#[test]
fn decoding_in_graphs() {
    if !cuda_is_there() {
        return;
    }
    let (model, pack) = model_and_pack();
    let run = |graphs| {
        let options = DeviceOptions { choice: DeviceChoice::Cuda(0), ..DeviceOptions::default() };
        let device = model.device(&options).unwrap();
        let Device::Cuda(cuda) = &device else { panic!("asked for CUDA") };
        cuda.set_graphs(graphs).unwrap();
        let options = BareOptions { sequences: 3, tokens: 64, n_batch: 32, kv_type: KvType::F16 };
        let mut bare = Bare::new(&device, &model.decoder, options).unwrap();
        // The last sequence has none.
        for i in 0..2 {
            let adapter = pack.adapter(&adapter_name(i)).unwrap();
            device.prefetch(&mut model.decoder.weights().lora(&adapter)).unwrap();
            bare.set_adapters(i, AdapterSet::single(adapter));
        }
        let prompts = [[5, 6, 7, 8, 9], [90, 91, 92, 93, 94], [15, 14, 13, 12, 11]];
        let work: Vec<_> = prompts.iter().enumerate().map(|(i, prompt)| (i, &prompt[..])).collect();
        let mut all = vec![bare.run(&work).unwrap().to_vec()];
        let mut steps = Vec::new();
        for step in 0..14 {
            let before = (cuda.launch_counts(), cuda.table_copies());
            let tokens = [0, 1, 2].map(|i| [20 + step * 3 + i * 50]);
            let work: Vec<_> = tokens.iter().enumerate().map(|(i, token)| (i, &token[..])).collect();
            all.push(bare.run(&work).unwrap().to_vec());
            let now = (cuda.launch_counts(), cuda.table_copies());
            steps.push([
                now.0.plain - before.0.plain,
                now.0.in_graphs - before.0.in_graphs,
                now.0.made - before.0.made,
                now.0.changed - before.0.changed,
                now.1.copied - before.1.copied,
            ]);
        }
        (all, steps)
    };
    let ((want, plain), (got, steps)) = (run(false), run(true));
    println!("one by one: {plain:?}\nin graphs: {steps:?}");
    assert_eq!(got, want);
    if EMULATOR.get().is_none() && steps.iter().all(|step| step[1] == 0) {
        println!("this driver has no graphs");
        return;
    }
    for (i, [alone, in_graphs, made, changed, copied]) in steps.into_iter().enumerate().skip(2) {
        assert_eq!(alone + in_graphs, plain[i][0], "step {i}");
        assert!(alone < 8 && in_graphs > 0, "step {i}: {alone} of {} one by one", plain[i][0]);
        assert_eq!((made, changed), (0, 0), "step {i}");
        // Tokens, positions, slots, rows of attention; all sequences stay on their first page.
        assert_eq!(copied, 4, "step {i}");
    }
}
