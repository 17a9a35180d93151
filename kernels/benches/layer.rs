//! Where the time of one transformer layer goes: every operation of a Llama layer (2048 wide, 8192 inner, 32/8 heads of 64)
//! for prompts, single tokens and batches, beside the ceilings of this machine and as a share of the layer.
//!
//! `cargo bench -p lory-kernels --bench layer [-- FILTER]`, a filter is `512 rows` or `attention`; `LORY_ISA` and `LORY_THREADS` as
//! usual. Without measuring, a small layer is compared with the reference.

mod measure;

use criterion::Criterion;
use lory_kernels::backend::{
    Activation, AttentionParams, AttentionRow, Backend, KvShape, KvType, MatmulJob, Rope, RopeStyle,
};
use lory_kernels::ceilings::Ceilings;
use lory_kernels::{QuantType, Reference};

use measure::weights::Weights;
use measure::{Machine, Work, noise};

const HEAD_DIM: usize = 64;
const PAGE: usize = 32;

struct Layer {
    width: usize,
    inner: usize,
    heads: usize,
    kv_heads: usize,
    norm: Vec<f32>,
    rope: Rope,
    qkv: [Weights; 3],
    o: Weights,
    gate_up: [Weights; 2],
    down: Weights,
}

/// Rows of some sequences behind some cached tokens.
struct Rows {
    sequences: usize,
    each: usize,
    depth: usize,
    pages: Vec<Vec<u32>>,
    positions: Vec<u32>,
    slots: Vec<u32>,
}

impl Rows {
    fn new(sequences: usize, each: usize, depth: usize) -> Rows {
        let per_sequence = (depth + each).div_ceil(PAGE);
        let page = |s: usize, p: usize| (s * per_sequence + p) as u32;
        let pages: Vec<Vec<u32>> =
            (0..sequences).map(|s| (0..per_sequence).map(|p| page(s, p)).collect()).collect();
        let positions: Vec<u32> = (0..sequences * each).map(|i| (depth + i % each) as u32).collect();
        let slot =
            |(i, p): (usize, &u32)| pages[i / each][*p as usize / PAGE] * PAGE as u32 + p % PAGE as u32;
        let slots = positions.iter().enumerate().map(slot).collect();
        Rows { sequences, each, depth, pages, positions, slots }
    }

    fn len(&self) -> usize {
        self.positions.len()
    }

    fn attention(&self) -> Vec<AttentionRow<'_>> {
        let row = |(i, p): (usize, &u32)| AttentionRow { pages: &self.pages[i / self.each], position: *p };
        self.positions.iter().enumerate().map(row).collect()
    }
}

/// What the operations read and write.
struct State<B: Backend> {
    kv: B::Kv,
    x: Vec<f32>,
    a: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
}

const OPERATIONS: [&str; 10] =
    ["rms_norm", "q, k, v", "rope", "kv_write", "attention", "o", "add", "gate, up", "glu", "down"];

impl Layer {
    fn new(ty: QuantType, [width, inner, heads, kv_heads]: [usize; 4]) -> Layer {
        let kv = kv_heads * HEAD_DIM;
        let inv_freq = (0..HEAD_DIM / 2).map(|i| 5e5f32.powf(-2.0 * i as f32 / HEAD_DIM as f32)).collect();
        Layer {
            width,
            inner,
            heads,
            kv_heads,
            norm: vec![1.0; width],
            rope: Rope { style: RopeStyle::Interleaved, inv_freq, magnitude: 1.0 },
            qkv: [Weights::new(ty, width, width), Weights::new(ty, kv, width), Weights::new(ty, kv, width)],
            o: Weights::new(ty, width, width),
            gate_up: [Weights::new(ty, inner, width), Weights::new(ty, inner, width)],
            down: Weights::new(ty, width, inner),
        }
    }

    fn state<B: Backend<Buffer = Vec<f32>>>(&self, b: &B, rows: &Rows, ty: KvType) -> State<B> {
        let (n, kv_width) = (rows.len(), self.kv_heads * HEAD_DIM);
        let shape = KvShape { layers: 1, kv_heads: self.kv_heads, head_dim: HEAD_DIM, page_len: PAGE, ty };
        let pages: usize = rows.pages.iter().map(Vec::len).sum();
        let mut kv = b.kv_alloc(shape, pages).expect("room");
        let lines = noise(256 * kv_width);
        for first in (0..pages * PAGE).step_by(256) {
            let slots: Vec<u32> = (first as u32..(first + 256).min(pages * PAGE) as u32).collect();
            b.kv_write(&mut kv, 0, &lines, &lines, &slots).expect("works");
        }
        State {
            kv,
            x: noise(n * self.width),
            a: noise(n * self.width),
            q: noise(n * self.width),
            k: noise(n * kv_width),
            v: noise(n * kv_width),
            gate: noise(n * self.inner),
            up: noise(n * self.inner),
        }
    }

    /// Carries one operation out.
    fn run<B: Backend<Buffer = Vec<f32>>>(&self, b: &B, rows: &Rows, s: &mut State<B>, operation: &str) {
        let n = rows.len();
        let done = match operation {
            "rms_norm" => b.rms_norm(&s.x, n, &self.norm, 1e-5, &mut s.a),
            "q, k, v" => {
                let [q, k, v] = &self.qkv;
                let jobs = [(q, &mut s.q), (k, &mut s.k), (v, &mut s.v)];
                b.matmul(&s.a, n, &mut jobs.map(|(w, out)| MatmulJob { weight: w.matrix(), out }))
            }
            "rope" => b
                .rope(&mut s.q, self.heads, HEAD_DIM, &rows.positions, &self.rope)
                .and_then(|()| b.rope(&mut s.k, self.kv_heads, HEAD_DIM, &rows.positions, &self.rope)),
            "kv_write" => b.kv_write(&mut s.kv, 0, &s.k, &s.v, &rows.slots),
            "attention" => {
                let n_heads = self.heads;
                let params = AttentionParams { n_heads, scale: 0.125, softcap: None, window: None };
                b.attention(&s.kv, 0, &s.q, &rows.attention(), &params, &mut s.a)
            }
            "o" => b.matmul(&s.a, n, &mut [MatmulJob { weight: self.o.matrix(), out: &mut s.q }]),
            "add" => b.add(&mut s.a, &s.q, n * self.width),
            "gate, up" => {
                let [gate, up] = &self.gate_up;
                let jobs = [(gate, &mut s.gate), (up, &mut s.up)];
                b.matmul(&s.x, n, &mut jobs.map(|(w, out)| MatmulJob { weight: w.matrix(), out }))
            }
            "glu" => b.glu(Activation::Silu, &mut s.gate, &s.up, n * self.inner),
            _ => b.matmul(&s.gate, n, &mut [MatmulJob { weight: self.down.matrix(), out: &mut s.q }]),
        };
        done.expect("works");
    }

    fn work(&self, rows: &Rows, ty: KvType, operation: &str) -> Work {
        let n = rows.len();
        let int8: fn(&Ceilings) -> f64 = |c| c.int8;
        let f32: fn(&Ceilings) -> f64 = |c| c.f32;
        let products = |weights: &[&Weights]| {
            let ops = weights.iter().map(|w| 2 * n * w.numbers()).sum();
            (weights.iter().map(|w| w.bytes()).sum(), ops, int8)
        };
        let [q, k, v] = &self.qkv;
        let [gate, up] = &self.gate_up;
        let kv_width = self.kv_heads * HEAD_DIM;
        let keys: usize = rows.positions.iter().map(|p| *p as usize + 1).sum();
        let bytes_of = |values: usize| if ty == KvType::F16 { 2 * values } else { values * 34 / 32 };
        let (bytes, ops, peak) = match operation {
            "q, k, v" => products(&[q, k, v]),
            "o" => products(&[&self.o]),
            "gate, up" => products(&[gate, up]),
            "down" => products(&[&self.down]),
            "attention" => {
                let cached = rows.sequences * (rows.depth + rows.each) * 2 * kv_width;
                (bytes_of(cached), 4 * keys * self.heads * HEAD_DIM, f32)
            }
            "rope" => (4 * n * (self.width + kv_width), 3 * n * (self.width + kv_width), f32),
            "kv_write" => (8 * n * kv_width, 0, f32),
            "glu" => (8 * n * self.inner, 16 * n * self.inner, f32),
            "add" => (8 * n * self.width, n * self.width, f32),
            _ => (4 * n * self.width, 3 * n * self.width, f32),
        };
        Work { bytes, ops, peak }
    }

    fn profile(&self, machine: &Machine, criterion: &mut Criterion, rows: &Rows, ty: KvType) {
        let title = format!("{} x {} rows at depth {}, {ty:?}", rows.sequences, rows.each, rows.depth);
        let mut group = criterion.benchmark_group(&title);
        let mut state = self.state(&machine.cpu, rows, ty);
        let mut times = Vec::new();
        for operation in OPERATIONS.iter() {
            let work = self.work(rows, ty, operation);
            let time = machine.time(&mut group, operation, work, || {
                self.run(&machine.cpu, rows, &mut state, operation);
            });
            times.extend(time.map(|time| (operation, time)));
        }
        group.finish();
        let layer: f64 = times.iter().map(|t| t.1).sum();
        if times.len() > 1 {
            println!("{title}: {:.0} us", layer * 1e6);
            for (operation, time) in times {
                println!("    {operation:12} {:>9.1} us {:>6.1} %", time * 1e6, 100.0 * time / layer);
            }
        }
    }

    /// Every operation beside the reference, which gets the same inputs.
    fn check(&self, machine: &Machine, rows: &Rows, ty: KvType) {
        let reference = Reference;
        let (mut got, mut want) = (self.state(&machine.cpu, rows, ty), self.state(&reference, rows, ty));
        for operation in OPERATIONS {
            self.run(&machine.cpu, rows, &mut got, operation);
            self.run(&reference, rows, &mut want, operation);
            for (got, want) in [
                (&mut got.a, &want.a),
                (&mut got.q, &want.q),
                (&mut got.k, &want.k),
                (&mut got.v, &want.v),
                (&mut got.gate, &want.gate),
                (&mut got.up, &want.up),
            ] {
                let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                for (a, b) in got.iter().zip(want) {
                    // So that NaN fails too.
                    assert!((a - b).abs() <= 1e-4 * largest, "{operation}: {a} and not {b} of {largest}");
                }
                got.clone_from(want);
            }
        }
    }
}

fn main() {
    let machine = Machine::new();
    if machine.is_quick() {
        let layer = Layer::new(QuantType::Q4_0, [256, 512, 4, 2]);
        for (sequences, each, depth) in [(1, 20, 30), (3, 1, 70)] {
            for ty in [KvType::F16, KvType::Q8_0] {
                layer.check(&machine, &Rows::new(sequences, each, depth), ty);
            }
        }
        println!("as the reference computes them: {}", OPERATIONS.join("; "));
        return;
    }
    let mut criterion = measure::criterion();
    let layer = Layer::new(QuantType::Q4_0, [2048, 8192, 32, 8]);
    for (sequences, each, depth) in
        [(1, 512, 0), (1, 512, 4096), (1, 1, 512), (1, 1, 4096), (8, 1, 512), (32, 1, 512)]
    {
        for ty in [KvType::F16, KvType::Q8_0] {
            layer.profile(&machine, &mut criterion, &Rows::new(sequences, each, depth), ty);
        }
    }
    criterion.final_summary();
}
