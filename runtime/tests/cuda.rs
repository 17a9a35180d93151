//! Whole models on a CUDA device, or on the emulated driver where there is none, beside the processor.

use std::path::{Path, PathBuf};
use std::process::Command;

use lory_kernels::backend::KvType;
use lory_kernels::{Backend, Cuda, Device, DeviceChoice};
use lory_runtime::mapping::Loading;
use lory_runtime::{Bare, BareOptions, Engine, EngineOptions, LoadedModel, OpenOptions, Repacking};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Whether CUDA devices can be opened: the real one, or the emulated driver, built and loaded here.
fn cuda_is_there() -> bool {
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
    std::mem::forget(unsafe { libloading::Library::new(folder.join("libcuda.so")) }.unwrap());
    true
}

fn model(name: &str) -> PathBuf {
    repository().join("tests/fixtures/models").join(name)
}

/// Logits after each of `tokens`, `at_once` in a pass.
fn logits<B: Backend>(backend: &B, model: &LoadedModel, tokens: &[u32], at_once: usize) -> Vec<f32> {
    let options = BareOptions { sequences: 1, tokens: 64, n_batch: at_once, kv_type: KvType::F16 };
    let mut bare = Bare::new(backend, &model.decoder, options).unwrap();
    let mut all = Vec::new();
    bare.score(0, tokens, &mut |_, logits| all.extend_from_slice(logits)).unwrap();
    all
}

/// The models are in F32, so that only the order of sums differs; a prompt at once and token by token give the same bits. One
/// test, because it loads the driver that the second part needs.
#[test]
fn models_and_an_engine() {
    if !cuda_is_there() {
        return;
    }
    for name in ["llama.gguf", "qwen3.gguf", "gemma2.gguf", "phi3.gguf"] {
        let options = OpenOptions { n_ctx: Some(64), loading: Loading::Map };
        let model = LoadedModel::open(&model(name), &options).unwrap();
        let tokens: Vec<u32> = (0..19).map(|i| 17 + i * 11).collect();
        let open = |choice| model.device(choice, Some(1), Repacking::Off).unwrap();
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
