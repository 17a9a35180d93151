//! Launches that are sent together and as graphs: the same bits as one by one, whatever happens between them.

use lory_kernels::backend::{Activation, Backend, MatmulJob, Rope, RopeStyle};
use lory_kernels::cuda::{CudaBuffer, LaunchCounts};
use lory_kernels::{Cuda, QMatrix, QuantType};

use super::adapters::Pack;
use super::{Noise, emulated, emulator, opening, own_device, put, quantized, take};

const WIDTH: usize = 64;
const ROWS: usize = 16;
/// Kernels of a layer: two norms, activations and product, the unit, the sum.
const KERNELS: u64 = 6;

type Buffers = [CudaBuffer; 3];

/// A device without graphs, and one with them if the driver has them.
fn both() -> Option<[Cuda; 2]> {
    let (plain, graphs) = (own_device()?, own_device()?);
    plain.set_graphs(false).unwrap();
    Some([plain, graphs])
}

fn buffers(cuda: &Cuda) -> Buffers {
    [(); 3].map(|()| cuda.alloc(ROWS * WIDTH).unwrap())
}

/// What steps are made of.
struct Layers {
    weights: Vec<Vec<u8>>,
    norms: Vec<Vec<f32>>,
    x: Vec<f32>,
}

/// Operations over some lines; `eps` is an argument of one kernel in each layer.
#[derive(Clone, Copy)]
struct Step {
    layers: usize,
    rows: usize,
    eps: f32,
}

impl Layers {
    fn new(n: usize) -> Layers {
        let mut noise = Noise(9);
        Layers {
            weights: (0..n).map(|_| quantized(QuantType::Q8_0, &noise.values(WIDTH * WIDTH))).collect(),
            norms: (0..n).map(|_| noise.values(WIDTH)).collect(),
            x: noise.values(ROWS * WIDTH),
        }
    }

    fn weight(&self, i: usize) -> QMatrix<'_> {
        QMatrix::new(QuantType::Q8_0, WIDTH, WIDTH, &self.weights[i]).unwrap()
    }

    /// Buffers of a device that has the weights from now on.
    fn load(&self, cuda: &Cuda) -> Buffers {
        (0..self.weights.len()).for_each(|i| cuda.load(self.weight(i)).unwrap());
        buffers(cuda)
    }

    fn launch(&self, cuda: &Cuda, [x, h, y]: &mut Buffers, step: Step) {
        let len = step.rows * WIDTH;
        for i in 0..step.layers {
            cuda.rms_norm(x, step.rows, &self.norms[i], step.eps, h).unwrap();
            cuda.matmul(h, step.rows, &mut [MatmulJob { weight: self.weight(i), out: y }]).unwrap();
            cuda.rms_norm_inplace(y, step.rows, &self.norms[i], 1e-5).unwrap();
            cuda.glu(Activation::Silu, y, h, len).unwrap();
            cuda.add(x, y, len).unwrap();
        }
    }

    /// The values after a step from the same beginning.
    fn run(&self, cuda: &Cuda, buffers: &mut Buffers, step: Step) -> Vec<f32> {
        cuda.upload(&self.x, &mut buffers[0]).unwrap();
        self.launch(cuda, buffers, step);
        take(cuda, &buffers[0], step.rows * WIDTH)
    }
}

/// How kernels were launched between two counts: plain, in graphs, graphs, graphs made, nodes changed.
fn since(before: LaunchCounts, now: LaunchCounts) -> [u64; 5] {
    [
        now.plain - before.plain,
        now.in_graphs - before.in_graphs,
        now.graphs - before.graphs,
        now.made - before.made,
        now.changed - before.changed,
    ]
}

/// Runs that repeat themselves, with other arguments, other grids, more and fewer operations, in any order.
#[test]
fn graphs_change_no_bit() {
    let Some([plain, graphs]) = both() else { return };
    let layers = Layers::new(20);
    let (mut on_plain, mut on_graphs) = (layers.load(&plain), layers.load(&graphs));
    let usual = Step { layers: 20, rows: 3, eps: 1e-5 };
    let other = Step { eps: 1e-2, ..usual };
    let many = Step { rows: 11, ..usual };
    let short = Step { layers: 9, ..usual };
    let steps =
        [usual, usual, usual, usual, other, other, many, usual, many, other, short, many, usual, short];
    let mut counts = Vec::new();
    for (i, step) in steps.into_iter().chain(steps).enumerate() {
        let want = layers.run(&plain, &mut on_plain, step);
        let before = graphs.launch_counts();
        let got = layers.run(&graphs, &mut on_graphs, step);
        assert!(got.iter().all(|v| v.is_finite()));
        assert_eq!(got, want, "step {i}");
        counts.push(since(before, graphs.launch_counts()));
        assert_eq!(counts[i][0] + counts[i][1], step.layers as u64 * KERNELS);
    }
    assert_eq!(plain.launch_counts().graphs, 0);
    if graphs.launch_counts().graphs == 0 {
        assert!(!emulated(&graphs));
        println!("this driver has no graphs");
        return;
    }
    // 32, 64 and 24 launches: seen, made, launched.
    let all = 20 * KERNELS;
    let [_, _, third, fourth, ..] = counts[..] else { panic!() };
    assert_eq!((third[0], third[2]), (0, 3), "{counts:?}");
    assert_eq!(fourth, [0, all, 3, 0, 0], "{counts:?}");
    // One argument of a norm in each layer, there and back.
    assert_eq!(counts[4], [0, all, 3, 0, 20], "{counts:?}");
    assert_eq!((counts[5], counts[7]), ([0, all, 3, 0, 0], [0, all, 3, 0, 20]), "{counts:?}");
    // Another kernel for many rows, which was not seen before.
    assert_eq!(counts[6], [all, 0, 0, 0, 0], "{counts:?}");
    assert_eq!(counts[8], [0, all, 3, 3, 0], "{counts:?}");
    for (i, counts) in counts[14..].iter().enumerate() {
        assert_eq!((counts[0], counts[3]), (0, 0), "step {i}: {counts:?}");
    }
}

/// Short runs go one by one.
#[test]
fn short_runs_are_not_graphs() {
    let Some(cuda) = own_device() else { return };
    let layers = Layers::new(1);
    let mut buffers = layers.load(&cuda);
    (0..4).for_each(|_| drop(layers.run(&cuda, &mut buffers, Step { layers: 1, rows: 2, eps: 1e-5 })));
    let counts = cuda.launch_counts();
    assert_eq!((counts.plain, counts.graphs), (4 * KERNELS, 0), "{counts:?}");
}

/// More different runs than are remembered: their buffers are all others.
#[test]
fn runs_give_way() {
    let Some([plain, graphs]) = both() else { return };
    let layers = Layers::new(2);
    let run = |cuda: &Cuda| {
        let mut buffers: Vec<_> = (0..150).map(|_| layers.load(cuda)).collect();
        let mut all = Vec::new();
        for round in 0..5 {
            for (i, buffers) in buffers.iter_mut().enumerate().skip(50 * (round / 2)) {
                let step = Step { layers: 2, rows: 1 + i % 2, eps: 1e-5 };
                all.extend(layers.run(cuda, buffers, step));
            }
        }
        all
    };
    assert_eq!(run(&graphs), run(&plain));
    let counts = graphs.launch_counts();
    if emulated(&graphs) {
        assert!(counts.made > 0 && counts.plain > 150 * 2 * KERNELS, "{counts:?}");
    }
}

/// Adapters arrive and give way while launches that read them are noted and have not been sent.
#[test]
fn adapters_between_noted_launches() {
    let Some([plain, graphs]) = both() else { return };
    let pack = Pack::new(4);
    let (layers, step) = (Layers::new(3), Step { layers: 3, rows: 2, eps: 1e-5 });
    let run = |cuda: &Cuda| {
        pack.load(cuda);
        // Room for one of them.
        cuda.set_adapter_budget(Some(pack.bytes()));
        let mut buffers = layers.load(cuda);
        let mut all = Vec::new();
        pack.prefetch(cuda, 0);
        for i in 0..16 {
            cuda.upload(&layers.x, &mut buffers[0]).unwrap();
            layers.launch(cuda, &mut buffers, step);
            let launched = pack.launch(cuda, &[i % 4], true);
            layers.launch(cuda, &mut buffers, Step { layers: 1, ..step });
            if i % 3 > 0 {
                pack.prefetch(cuda, (i + 1) % 4);
            }
            all.extend(take(cuda, &launched[0], launched[0].len()));
            all.extend(take(cuda, &buffers[0], step.rows * WIDTH));
        }
        assert!(cuda.adapter_pool().evicted > 8, "{:?}", cuda.adapter_pool());
        all
    };
    assert_eq!(run(&graphs), run(&plain));
}

/// A launch that the driver refuses: its kernel is named, once, by the call that sends it, or by the next if that could not.
#[test]
fn errors_come_later() {
    let Some([plain, graphs]) = both() else { return };
    // More rows than a grid has in its second dimension.
    let n = 8 * 65_536;
    let bytes = vec![0; n * 4];
    let weight = QMatrix::new(QuantType::F32, n, 1, &bytes).unwrap();
    for (cuda, graphs) in [(plain, false), (graphs, true)] {
        cuda.load(weight).unwrap();
        let mut x = put(&cuda, &[1.0, 2.0]);
        for freed in [false, true] {
            let mut out = cuda.alloc(n).unwrap();
            let launched = cuda.matmul(&x, 1, &mut [MatmulJob { weight, out: &mut out }]);
            assert!(launched.is_err() || graphs);
            if freed {
                drop(out);
            }
            let error = launched.and_then(|()| cuda.wait()).expect_err("the grid is too large").to_string();
            assert!(error.contains("matmul_f32"), "{error}");
            cuda.wait().unwrap();
            let y = put(&cuda, &[3.0]);
            cuda.add(&mut x, &y, 1).unwrap();
        }
        assert_eq!(take(&cuda, &x, 2), [7.0, 2.0]);
    }
}

/// Refuses a coming launch of the thread that calls it, once.
fn refuser(cuda: &Cuda) -> Option<libloading::Symbol<'static, unsafe extern "C" fn(i32) -> i32>> {
    let Some(library) = emulator().filter(|_| emulated(cuda)) else {
        println!("skipped: needs the emulated driver");
        return None;
    };
    // SAFETY: the signature in libcuda.cpp.
    Some(unsafe { library.get(b"lory_emulate_refused_launch") }.unwrap())
}

/// A launch that is refused to the thread that brings an adapter is the error of who asked for the launch, and nothing after it is launched
/// until it is told.
#[test]
fn errors_are_told_to_whose_they_are() {
    let Some(cuda) = own_device() else { return };
    let Some(refuse) = refuser(&cuda) else { return };
    let pack = Pack::new(2);
    pack.load(&cuda);
    // Room for one of them.
    cuda.set_adapter_budget(Some(pack.bytes()));
    pack.prefetch(&cuda, 0);
    let (layers, step) = (Layers::new(1), Step { layers: 1, rows: 2, eps: 1e-5 });
    let mut buffers = layers.load(&cuda);
    let want = layers.run(&cuda, &mut buffers, step);
    cuda.upload(&layers.x, &mut buffers[0]).unwrap();
    let before = cuda.launch_counts();
    layers.launch(&cuda, &mut buffers, step);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: sets a number for this thread.
            unsafe { refuse(3) };
            pack.prefetch(&cuda, 1);
        });
    });
    layers.launch(&cuda, &mut buffers, step);
    let error = cuda.flush().expect_err("the third launch was refused").to_string();
    assert!(error.contains("matmul_small_q8_0: out of memory"), "{error}");
    cuda.flush().unwrap();
    assert_eq!(cuda.launch_counts().plain - before.plain, 2);
    assert_eq!(layers.run(&cuda, &mut buffers, step), want);
}

/// Angles that may not have been computed are not taken for those of their positions.
#[test]
fn angles_after_a_failure() {
    let Some(cuda) = own_device() else { return };
    let Some(refuse) = refuser(&cuda) else { return };
    let rope = Rope { style: RopeStyle::Neox, inv_freq: vec![1.0, 0.1, 0.01, 0.001], magnitude: 1.0 };
    let x = Noise(5).values(3 * 8);
    let mut buffer = cuda.alloc(x.len()).unwrap();
    let turn = |buffer: &mut CudaBuffer, positions: &[u32]| {
        cuda.rope(buffer, 1, 8, positions, &rope)?;
        cuda.flush()
    };
    let turned = |buffer: &mut CudaBuffer| {
        cuda.upload(&x, buffer).unwrap();
        turn(buffer, &[7, 8, 9]).unwrap();
        take(&cuda, buffer, x.len())
    };
    let want = turned(&mut buffer);
    for unsaid in [false, true] {
        turn(&mut buffer, &[1, 2, 3]).unwrap();
        let mut other = put(&cuda, &x);
        if unsaid {
            cuda.softcap(&mut other, x.len(), 1.0).unwrap();
        }
        // SAFETY: sets a number for this thread.
        unsafe { refuse(1) };
        // Sends what is noted, and cannot say that it failed.
        drop(other);
        let error = turn(&mut buffer, &[7, 8, 9]).unwrap_err().to_string();
        assert!(error.contains(if unsaid { "softcap" } else { "rope_table" }), "{error}");
        assert_eq!(turned(&mut buffer), want);
    }
}

/// The emulated driver refuses to make graphs, to change them, to launch them; or it is too old to have them.
#[test]
fn without_graphs_launches_are_plain() {
    let Some(plain) = own_device() else { return };
    let Some(library) = emulator().filter(|_| emulated(&plain)) else {
        println!("skipped: needs the emulated driver");
        return;
    };
    plain.set_graphs(false).unwrap();
    // SAFETY: the signature in libcuda.cpp.
    let refuse: libloading::Symbol<'_, unsafe extern "C" fn(i32)> =
        unsafe { library.get(b"lory_emulate_refusal") }.unwrap();
    // SAFETY: the signature in libcuda.cpp.
    let driver: libloading::Symbol<'_, unsafe extern "C" fn(i32, i32)> =
        unsafe { library.get(b"lory_emulate_driver") }.unwrap();
    let old = || {
        let _opening = opening();
        // SAFETY: sets two numbers.
        unsafe { driver(11_080, 1) };
        let cuda = Cuda::open(0);
        // SAFETY: as above.
        unsafe { driver(13_000, 1) };
        cuda.unwrap()
    };
    let layers = Layers::new(4);
    let mut on_plain = layers.load(&plain);
    for what in 0..=4 {
        let Some(cuda) = (if what < 4 { own_device() } else { Some(old()) }) else { return };
        let mut buffers = layers.load(&cuda);
        for i in 0..8 {
            // SAFETY: sets a number for this thread.
            unsafe { refuse(if i >= 4 && what < 4 { what } else { 0 }) };
            // From the fourth step on other arguments each time, or another run.
            let eps = 1e-5 * (1 + i / 4 * i) as f32;
            let step = Step { layers: 4, rows: if what == 1 && i >= 4 { 9 } else { 2 }, eps };
            let want = layers.run(&plain, &mut on_plain, step);
            assert_eq!(layers.run(&cuda, &mut buffers, step), want, "refusal {what}, step {i}");
        }
        // SAFETY: as above.
        unsafe { refuse(0) };
        let counts = cuda.launch_counts();
        assert_eq!(counts.plain + counts.in_graphs, 8 * 4 * KERNELS, "{counts:?}");
        match what {
            0 => assert!(counts.graphs >= 6, "{counts:?}"),
            4 => assert_eq!(counts.graphs, 0),
            _ => assert!((2..=3).contains(&counts.graphs), "refusal {what}: {counts:?}"),
        }
    }
}
