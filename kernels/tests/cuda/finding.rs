//! Finding a device: what is missing is said in one line. On the emulated driver only.

use std::sync::atomic::{AtomicUsize, Ordering};

use lory_kernels::backend::{Backend, MatmulJob};
use lory_kernels::cpu::{Isa, ThreadOptions};
use lory_kernels::{BackendError, Cuda, Device, DeviceChoice, QMatrix, QuantType};

use super::{Noise, device, emulated, emulator, in_both_orders, opening, put, quantized, take};

#[test]
fn one_clear_line() {
    let Some(cuda) = device() else { return };
    let Some(library) = emulator().filter(|_| emulated(cuda)) else {
        println!("skipped: needs the emulated driver");
        return;
    };
    // SAFETY: the signature in libcuda.cpp.
    let driver: libloading::Symbol<'_, unsafe extern "C" fn(i32, i32)> =
        unsafe { library.get(b"lory_emulate_driver") }.unwrap();
    let _opening = opening();
    let message = |version, count| {
        // SAFETY: sets two numbers.
        unsafe { driver(version, count) };
        let error = Cuda::open(0).err().expect("no device can be opened").to_string();
        // SAFETY: as above.
        unsafe { driver(13_000, 1) };
        error
    };
    let none = message(13_000, 0);
    assert!(none.contains("no CUDA-capable device"), "{none}");
    let old = message(10_020, 1);
    assert!(old.contains("CUDA 10.2") && old.contains("update"), "{old}");
    for text in [none, old] {
        assert!(!text.contains('\n'), "{text}");
    }
    let error = Cuda::open(7).err().unwrap().to_string();
    assert!(error.contains("no device 7"), "{error}");
}

/// The same call on each device that can be chosen; `Auto` is the processor until CUDA has been seen on hardware.
#[test]
fn the_chosen_device() {
    let Some(cuda) = device() else { return };
    let _opening = opening();
    for (choice, label) in [
        (DeviceChoice::Auto, "cpu"),
        (DeviceChoice::Cpu, "cpu"),
        (DeviceChoice::Cuda(0), cuda.label().as_str()),
    ] {
        let device = Device::open(choice, Some(3), &ThreadOptions::default(), Isa::detect()).unwrap();
        assert!(device.label().starts_with(label), "{choice:?}: {}", device.label());
        let bytes = quantized(QuantType::F32, &[1.0, 2.0, 3.0, 4.0]);
        let weight = QMatrix::new(QuantType::F32, 2, 2, &bytes).unwrap();
        let (x, mut out) = (put(&device, &[1.0, 10.0]), device.alloc(2).unwrap());
        device.matmul(&x, 1, &mut [MatmulJob { weight, out: &mut out }]).unwrap();
        device.add(&mut out, &x, 2).unwrap();
        assert_eq!(take(&device, &out, 2), [22.0, 53.0], "{label}");
        let in_place = device.in_place(&mut out).map(|values| values[..2].to_vec());
        assert_eq!(in_place, label.starts_with("cpu").then(|| vec![22.0, 53.0]), "{label}");
        for tasks in [0, 1, 50] {
            let ran: Vec<_> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            device.on_host(tasks, &|i| _ = ran[i].fetch_add(1, Ordering::Relaxed));
            assert!(ran.iter().all(|n| n.load(Ordering::Relaxed) == 1), "{label}: {tasks} tasks of the host");
        }
    }
    let options = ThreadOptions::default();
    let error = Device::open(DeviceChoice::Cuda(9), Some(1), &options, Isa::detect()).err().unwrap();
    assert!(error.to_string().contains("device 9"), "{error}");
}

#[test]
fn too_little_memory() {
    let Some(cuda) = device() else { return };
    let (free, total) = cuda.memory().unwrap();
    assert!(free <= total);
    let Err(BackendError::OutOfMemory { device, bytes, .. }) = cuda.alloc(total) else {
        panic!("four times the memory");
    };
    assert_eq!((device, bytes), (cuda.label(), total * 4));
}

#[test]
fn formats_without_a_kernel() {
    let Some(cuda) = device() else { return };
    let bytes = quantized(QuantType::Q2_K, &[1.0; 256]);
    let weight = QMatrix::new(QuantType::Q2_K, 1, 256, &bytes).unwrap();
    assert!(!cuda.supports(QuantType::Q2_K));
    let (x, mut out) = (put(cuda, &[1.0; 256]), cuda.alloc(1).unwrap());
    let error = cuda.matmul(&x, 1, &mut [MatmulJob { weight, out: &mut out }]).unwrap_err();
    assert!(matches!(error, BackendError::UnsupportedType { ty: QuantType::Q2_K, .. }), "{error}");
}

#[test]
fn the_order_of_threads_changes_nothing() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(41);
    // As many rows as a block of the large products has tokens: what is staged is then read to the last.
    let (n, k, rows) = (70, 512, 64);
    let x = noise.values(rows * k);
    let weight = noise.values(k);
    for ty in [QuantType::Q4_K, QuantType::Q6_K, QuantType::BF16, QuantType::F16] {
        let bytes = quantized(ty, &noise.values(n * k));
        let w = QMatrix::new(ty, n, k, &bytes).unwrap();
        let run = |rows: usize| {
            let (mut x, mut out) = (put(cuda, &x), cuda.alloc(rows * n).unwrap());
            cuda.rms_norm_inplace(&mut x, rows, &weight, 1e-6).unwrap();
            cuda.matmul(&x, rows, &mut [MatmulJob { weight: w, out: &mut out }]).unwrap();
            take(cuda, &out, rows * n)
        };
        for rows in [3, rows] {
            in_both_orders(|| run(rows));
        }
    }
}
