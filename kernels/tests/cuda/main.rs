//! The CUDA backend against the reference: on the device where there is one, else on the emulated driver
//! (with `LORY_REQUIRE_CUDA`, on a device only).

mod adapters;
mod attention;
mod copies;
mod finding;
mod launches;
mod lora;
mod matmul;
mod pointwise;
mod tables;
mod top_k;

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use lory_kernels::quant::format::quantize_row;
use lory_kernels::{Backend, Cuda, QuantType};

/// What the kernels read.
const TYPES: [QuantType; 8] = [
    QuantType::Q8_0,
    QuantType::Q4_0,
    QuantType::Q4_K,
    QuantType::Q5_K,
    QuantType::Q6_K,
    QuantType::F16,
    QuantType::BF16,
    QuantType::F32,
];

/// The emulated driver, built and loaded; `None`, with a line that says so, without a C++ compiler. With
/// `LORY_CUDA_SANITIZE` it is built under sanitizers, whose library must have been preloaded.
fn emulator() -> Option<&'static libloading::Library> {
    static LIBRARY: OnceLock<Option<libloading::Library>> = OnceLock::new();
    let library = LIBRARY.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/emulator/build.sh");
        let sanitize = std::env::var_os("LORY_CUDA_SANITIZE").is_some();
        let folder =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(if sanitize { "sanitized" } else { "emulator" });
        let mut command = Command::new("bash");
        command.arg(script).arg(&folder).args(sanitize.then_some("--sanitize"));
        // Not for the compiler.
        command.env_remove("LD_PRELOAD");
        match command.output() {
            Ok(built) if built.status.success() => {}
            failed if std::env::var_os("CI").is_some() || sanitize => panic!("the emulator: {failed:?}"),
            failed => {
                println!("skipped: the emulated driver does not build here: {failed:?}");
                return None;
            }
        }
        // SAFETY: its initializers only register kernels.
        Some(unsafe { libloading::Library::new(folder.join("libcuda.so")) }.unwrap())
    });
    library.as_ref()
}

/// Held by who opens a device, or lets the driver be another for a while.
fn opening() -> MutexGuard<'static, ()> {
    static OPENING: Mutex<()> = Mutex::new(());
    OPENING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device.
fn device() -> Option<&'static Cuda> {
    static DEVICE: OnceLock<Option<Cuda>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| {
        match Cuda::open(0) {
            Ok(cuda) => println!("on {}", cuda.label()),
            Err(error) => {
                assert!(
                    std::env::var_os("LORY_REQUIRE_CUDA").is_none(),
                    "LORY_REQUIRE_CUDA asks for a device: {error}"
                );
                println!("no device ({error}): on the emulated driver");
                // By its name the backend finds it now.
                emulator()?;
            }
        }
        Some(Cuda::open(0).unwrap())
    });
    device.as_ref()
}

/// A device that no other test uses.
fn own_device() -> Option<Cuda> {
    device()?;
    let _opening = opening();
    Some(Cuda::open(0).unwrap())
}

/// Whether the device is the emulated one.
fn emulated(cuda: &Cuda) -> bool {
    cuda.label().contains("Emulated")
}

/// Between two barriers the threads of a block may run in any order: from the first to the last and from the last to the first
/// give the same.
fn in_both_orders<T: PartialEq + std::fmt::Debug>(run: impl Fn() -> T) {
    let Some(library) = device().filter(|cuda| emulated(cuda)).and_then(|_| emulator()) else {
        println!("skipped: needs the emulated driver");
        return;
    };
    // SAFETY: the signature in libcuda.cpp.
    let order: libloading::Symbol<'_, unsafe extern "C" fn(i32)> =
        unsafe { library.get(b"lory_emulate_order") }.unwrap();
    static TURNED: Mutex<()> = Mutex::new(());
    let _turned = TURNED.lock().unwrap_or_else(PoisonError::into_inner);
    let forwards = run();
    // SAFETY: sets a flag; other tests get the same results in either order.
    unsafe { order(1) };
    let backwards = run();
    // SAFETY: as above.
    unsafe { order(0) };
    assert_eq!(forwards, backwards);
}

/// Deterministic noise (a multiplicative generator, the upper bits of each state).
struct Noise(u64);

impl Noise {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// In −1 .. 1.
    fn value(&mut self) -> f32 {
        self.bits() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

fn quantized(ty: QuantType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; ty.bytes_for(values.len()).unwrap()];
    quantize_row(ty, values, &mut bytes).unwrap();
    bytes
}

/// A buffer with these values, on any backend.
fn put<B: Backend>(b: &B, values: &[f32]) -> B::Buffer {
    let mut buffer = b.alloc(values.len()).unwrap();
    b.upload(values, &mut buffer).unwrap();
    buffer
}

/// The first `len` values of a buffer.
fn take<B: Backend>(b: &B, buffer: &B::Buffer, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    b.download(buffer, 0, &mut values).unwrap();
    values
}

/// Equal bits, or both not a number.
fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let same = g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan();
        assert!(same, "{what}: at {i} of {}: got {g:e}, want {w:e}", got.len());
    }
}

/// Within `bound` of each other, or both infinite or not a number.
fn assert_near(got: &[f32], want: &[f32], bound: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let near = (g - w).abs() <= bound || !g.is_finite() && !w.is_finite();
        assert!(near, "{what}: at {i} of {}: got {g:e}, want {w:e}, bound {bound:e}", got.len());
    }
}
