//! Adapters' matrices on the device: what is copied when, what gives way, and that answers never depend on it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use lory_kernels::backend::{Backend, Core, Expand, LoraGroup, LoraJob, LoraTerm, LoraWeight, MatmulJob};
use lory_kernels::quant::Keeper;
use lory_kernels::{Cuda, QMatrix, QuantType};

use super::{Noise, emulated, emulator, own_device, put, quantized, take};

const RANK: usize = 64;
const CORE: usize = RANK * RANK * 2;
/// Cores of an adapter, one behind the other, and bytes before the next adapter's.
const CORES: usize = 3;
const GAP: usize = 8 << 10;
const IN: usize = 96;
const OUT: usize = 80;

/// A file of adapters over one basis.
pub(super) struct Pack {
    file: Keeper,
    basis: [Vec<u8>; 2],
    x: Vec<f32>,
}

impl Pack {
    pub fn new(adapters: usize) -> Pack {
        let mut noise = Noise(71);
        let mut file = Vec::new();
        for _ in 0..adapters {
            file.extend(quantized(QuantType::F16, &noise.values(CORES * RANK * RANK)));
            file.resize(file.len() + GAP, 0xff);
        }
        let basis = [RANK * IN, OUT * RANK].map(|n| quantized(QuantType::F16, &noise.values(n)));
        Pack { file: Arc::new(file), basis, x: noise.values(IN) }
    }

    /// The cores of an adapter, with their owner or without.
    fn cores(&self, adapter: usize, kept: bool) -> impl Iterator<Item = QMatrix<'_>> {
        (0..CORES).map(move |core| {
            let start = adapter * (CORES * CORE + GAP) + core * CORE;
            let bytes = &(*self.file).as_ref()[start..start + CORE];
            let matrix = QMatrix::new(QuantType::F16, RANK, RANK, bytes).unwrap();
            if kept { matrix.kept_by(&self.file) } else { matrix }
        })
    }

    fn factors(&self) -> [QMatrix<'_>; 2] {
        let [v, u] = &self.basis;
        [(RANK, IN, v), (OUT, RANK, u)]
            .map(|(n, k, bytes)| QMatrix::new(QuantType::F16, n, k, bytes).unwrap())
    }

    /// Bytes of an adapter on a device.
    pub fn bytes(&self) -> usize {
        CORES * CORE
    }

    pub fn load(&self, cuda: &Cuda) {
        self.factors().into_iter().for_each(|factor| cuda.load(factor).unwrap());
    }

    pub fn prefetch(&self, cuda: &Cuda, adapter: usize) {
        // A device that has all layers does not ask for which one.
        let [layer, _] = self.factors();
        cuda.prefetch(&mut self.cores(adapter, true).map(|weight| LoraWeight { layer, weight })).unwrap();
    }

    /// Launches what these adapters add, each to a row of its own: the output, and the input, whose end would wait.
    pub fn launch<B: Backend>(&self, b: &B, adapters: &[usize], kept: bool) -> [B::Buffer; 2] {
        let [v, u] = self.factors();
        let rows = adapters.iter().enumerate().map(|(row, adapter)| {
            let term = |core| LoraTerm {
                core: Core::Full(core),
                scale: 0.25,
                delta_scale: None,
                row_scale: None,
                bias: None,
            };
            (row as u32, self.cores(*adapter, kept).map(term).collect())
        });
        let groups = [LoraGroup { v: Some(v), u: Some(Expand::Rows(u)), rows: rows.collect() }];
        let x = put(b, &self.x.repeat(adapters.len()));
        let mut out = b.alloc(adapters.len() * OUT).unwrap();
        b.lora(&x, IN, &mut [LoraJob { out: &mut out, width: OUT, groups: &groups }]).unwrap();
        [out, x]
    }

    fn run<B: Backend>(&self, b: &B, adapters: &[usize], kept: bool) -> Vec<f32> {
        take(b, &self.launch(b, adapters, kept)[0], adapters.len() * OUT)
    }
}

/// An adapter arrives in one copy, is not copied again, and has the bits of one that is copied for each operation.
#[test]
fn resident_adapters_are_not_copied_again() {
    let Some(cuda) = own_device() else { return };
    let pack = Pack::new(5);
    pack.load(&cuda);
    let all = [0, 1, 2, 3, 4, 1];
    let want = pack.run(&cuda, &all, false);
    let passing = cuda.adapter_pool();
    assert_eq!((passing.parcels, passing.late), (0, (all.len() * CORES) as u64));
    (0..5).for_each(|i| pack.prefetch(&cuda, i));
    (0..5).for_each(|i| pack.prefetch(&cuda, i));
    let before = cuda.adapter_pool();
    assert_eq!((before.parcels, before.prefetched, before.bytes), (5, 5, 5 * CORES * CORE));
    assert_eq!(pack.run(&cuda, &all, true), want);
    assert_eq!(pack.run(&cuda, &[3, 0], true), [&want[3 * OUT..4 * OUT], &want[..OUT]].concat());
    assert_eq!(cuda.adapter_pool(), before);

    let Some(library) = emulator().filter(|_| emulated(&cuda)) else { return };
    // SAFETY: the signature in libcuda.cpp.
    let copied: libloading::Symbol<'_, unsafe extern "C" fn() -> usize> =
        unsafe { library.get(b"lory_emulate_copied") }.unwrap();
    // SAFETY: reads a number. Other tests copy meanwhile, so that only the least of some runs tells.
    let bytes = || unsafe { copied() };
    let switching = (0..200).map(|i| {
        let start = bytes();
        pack.run(&cuda, &[i % 5], true);
        bytes() - start
    });
    // The input, zeros, and descriptors of a row.
    let least = switching.min().unwrap();
    assert!(least < CORE / 4, "{least} bytes for a switch, a core has {CORE}");
}

/// A factor that does not lie at a multiple of 16 bytes from its neighbour arrives alone, so that the kernels find it at one.
#[test]
fn neighbours_that_are_not_aligned_alike() {
    let Pack { basis: [v, u], x, .. } = Pack::new(0);
    for (gap, parcels) in [(16, 1), (8, 2), (2, 2)] {
        let Some(cuda) = own_device() else { return };
        let file: Keeper = Arc::new([&v[..], &vec![0xff; gap], &u].concat());
        let bytes = (*file).as_ref();
        let factors = [(RANK, IN, &bytes[..v.len()]), (OUT, RANK, &bytes[v.len() + gap..])]
            .map(|(n, k, bytes)| QMatrix::new(QuantType::F16, n, k, bytes).unwrap());
        let kept = factors.map(|factor| factor.kept_by(&file));
        cuda.prefetch(&mut kept.iter().map(|weight| LoraWeight { layer: factors[0], weight: *weight }))
            .unwrap();
        let expanded = |u| {
            let (x, mut out) = (put(&cuda, &x), cuda.alloc(OUT).unwrap());
            cuda.matmul(&x, 1, &mut [MatmulJob { weight: u, out: &mut out }]).unwrap();
            take(&cuda, &out, OUT)
        };
        let got = expanded(kept[1]);
        let pool = cuda.adapter_pool();
        assert_eq!((pool.parcels, pool.late), (parcels, 0), "{gap} bytes between: {pool:?}");
        assert_eq!(got, expanded(factors[1]), "{gap} bytes between");
    }
}

/// With room for less than a batch, for one parcel, for none.
#[test]
fn little_room_changes_no_bit() {
    let Some(cuda) = own_device() else { return };
    let pack = Pack::new(6);
    pack.load(&cuda);
    let all = [5, 0, 3, 1, 4, 2];
    let want = pack.run(&cuda, &all, false);
    for budget in [0, CORE, CORES * CORE, 4 * CORES * CORE] {
        let Some(cuda) = own_device() else { return };
        cuda.set_adapter_budget(Some(budget));
        pack.load(&cuda);
        for round in 0..3 {
            if round == 1 {
                (0..6).for_each(|i| pack.prefetch(&cuda, i));
            }
            assert_eq!(pack.run(&cuda, &all, true), want, "{budget} bytes, round {round}");
            for (i, want) in all.into_iter().zip(want.chunks(OUT)) {
                assert_eq!(pack.run(&cuda, &[i], true), want, "{budget} bytes, {i} alone");
            }
        }
        let pool = cuda.adapter_pool();
        assert!(pool.bytes <= budget && pool.late > 0, "{pool:?}");
        assert_eq!(pool.evicted > 0, budget > 0, "{pool:?}");
    }
}

/// Gives its bytes back when it goes, so that the next owner has the same address.
struct Lent {
    bytes: Vec<u8>,
    back: Arc<Mutex<Vec<u8>>>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.back.lock().unwrap() = std::mem::take(&mut self.bytes);
    }
}

/// Another adapter at the address of one that was freed is another adapter.
#[test]
fn an_address_is_used_again() {
    let Some(cuda) = own_device() else { return };
    let (place, shelf) = (Pack::new(1), Pack::new(3));
    place.load(&cuda);
    let back = Arc::new(Mutex::new((*place.file).as_ref().to_vec()));
    let mut addresses = Vec::new();
    for (i, ahead) in [(2, true), (0, true), (1, false), (2, false), (2, true), (1, true)] {
        let mut bytes = std::mem::take(&mut *back.lock().unwrap());
        let start = i * (CORES * CORE + GAP);
        bytes[..CORES * CORE].copy_from_slice(&(*shelf.file).as_ref()[start..start + CORES * CORE]);
        addresses.push(bytes.as_ptr());
        let file: Keeper = Arc::new(Lent { bytes, back: back.clone() });
        let pack = Pack { file, basis: shelf.basis.clone(), x: shelf.x.clone() };
        pack.load(&cuda);
        if ahead {
            pack.prefetch(&cuda, 0);
        }
        for _ in 0..2 {
            assert_eq!(pack.run(&cuda, &[0], true), shelf.run(&cuda, &[i], false), "adapter {i}");
        }
        std::mem::forget(pack.basis);
    }
    assert!(addresses.windows(2).all(|two| two[0] == two[1]));
    // Only the last one's is known, although its owner is gone as well.
    assert_eq!(cuda.adapter_pool().parcels, 1);
}

/// What was launched reads its own adapter, although another one has got its place before it ran.
#[test]
fn what_gives_way_is_read_to_the_end() {
    let Some(cuda) = own_device() else { return };
    let pack = Pack::new(3);
    pack.load(&cuda);
    let want: Vec<_> = (0..3).map(|i| pack.run(&cuda, &[i], false)).collect();
    cuda.set_adapter_budget(Some(CORES * CORE));
    pack.prefetch(&cuda, 0);
    for i in 0..9 {
        let launched = pack.launch(&cuda, &[i % 3], true);
        pack.prefetch(&cuda, (i + 1) % 3);
        assert_eq!(take(&cuda, &launched[0], OUT), want[i % 3], "{i}");
    }
    let pool = cuda.adapter_pool();
    assert_eq!((pool.prefetched, pool.evicted, pool.parcels), (10, 9, 1));
    assert_eq!(pool.late, (3 * CORES) as u64, "the comparison alone");
}

/// Adapters arrive from two threads while a third runs batches.
#[test]
fn arrivals_beside_running_batches() {
    let Some(cuda) = own_device() else { return };
    let pack = Pack::new(8);
    pack.load(&cuda);
    let want: Vec<_> = (0..8).map(|i| pack.run(&cuda, &[i], false)).collect();
    cuda.set_adapter_budget(Some(3 * CORES * CORE));
    let running = AtomicBool::new(true);
    std::thread::scope(|scope| {
        for step in [1, 3] {
            let (pack, cuda, running) = (&pack, &cuda, &running);
            scope.spawn(move || {
                let mut i = 0;
                while running.load(Ordering::Relaxed) {
                    i = (i + step) % 8;
                    pack.prefetch(cuda, i);
                }
            });
        }
        let mut noise = Noise(5);
        for round in 0..60 {
            let adapters: Vec<usize> = (0..1 + round % 4).map(|_| noise.bits() as usize % 8).collect();
            let got = pack.run(&cuda, &adapters, true);
            let same = got.chunks(OUT).zip(&adapters).all(|(got, i)| got == want[*i]);
            running.fetch_and(same, Ordering::Relaxed);
            assert!(same, "round {round}: {adapters:?}");
        }
        running.store(false, Ordering::Relaxed);
    });
    let pool = cuda.adapter_pool();
    assert!(pool.bytes <= 3 * CORES * CORE && pool.prefetched > 0, "{pool:?}");
}
