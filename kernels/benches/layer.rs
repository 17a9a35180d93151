//! Where the time of one transformer layer goes: every operation of a Llama layer (2048 wide, 8192 inner, 32/8 heads of 64)
//! for prompts, single tokens and batches, in microseconds and per cent of the layer.
//!
//! `cargo bench -p lory-kernels --bench layer [-- FORMAT]`; `LORY_ISA` and `LORY_THREADS` as usual. Figures are the fastest of several runs.

use std::time::{Duration, Instant};

use lory_kernels::backend::{
    Activation, AttentionParams, AttentionRow, Backend, Core, KvShape, KvType, LoraGroup, LoraJob, LoraTerm,
    MatmulJob, Rope, RopeStyle,
};
use lory_kernels::cpu::{Cpu, CpuKv, Isa};
use lory_kernels::quant::format::quantize_row;
use lory_kernels::{QMatrix, QuantType};

const WIDTH: usize = 2048;
const INNER: usize = 8192;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 64;
const PAGE: usize = 32;
const RANK: usize = 64;

struct Bytes(QuantType, usize, usize, Vec<u8>);

impl Bytes {
    fn new(ty: QuantType, rows: usize, cols: usize) -> Bytes {
        let line = noise(cols * 16);
        let mut bytes = vec![0; ty.bytes_for(line.len()).expect("whole blocks")];
        quantize_row(ty, &line, &mut bytes).expect("a native format");
        Bytes(ty, rows, cols, bytes.repeat(rows / 16))
    }

    fn matrix(&self) -> QMatrix<'_> {
        QMatrix::new(self.0, self.1, self.2, &self.3).expect("whole rows")
    }
}

fn noise(n: usize) -> Vec<f32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Times named operations.
struct Profile {
    times: Vec<(&'static str, f64)>,
    quick: bool,
}

impl Profile {
    fn time(&mut self, name: &'static str, mut work: impl FnMut()) {
        let budget = Duration::from_millis(if self.quick { 0 } else { 150 });
        let (start, mut best, mut runs) = (Instant::now(), f64::INFINITY, 0);
        while runs < 3 || start.elapsed() < budget {
            let before = Instant::now();
            work();
            best = best.min(before.elapsed().as_secs_f64());
            runs += 1;
        }
        self.times.push((name, best));
    }

    fn print(&self, title: &str) {
        let total: f64 = self.times.iter().filter(|t| !t.0.starts_with("lora")).map(|t| t.1).sum();
        println!("{title}: {:.0} us without adapters", total * 1e6);
        for (name, time) in &self.times {
            println!("    {name:12} {:>9.1} us {:>6.1} %", time * 1e6, 100.0 * time / total);
        }
    }
}

fn main() {
    let quick = std::env::args().any(|a| a == "--quick" || a == "--test");
    let ty = std::env::args().skip(1).find_map(|a| QuantType::from_name(&a)).unwrap_or(QuantType::Q4_0);
    let isa = Isa::from_env().unwrap_or_else(|error| panic!("{error}"));
    let cpu = Cpu::new(std::env::var("LORY_THREADS").ok().and_then(|n| n.parse().ok()), isa);
    println!("{}, {ty}", cpu.label());
    let layer = Layer::new(ty);
    // (sequences, rows of each, positions before them)
    let cases: &[(usize, usize, usize)] = if quick {
        &[(1, 4, 30), (2, 1, 30)]
    } else {
        &[(1, 512, 0), (1, 512, 4096), (1, 1, 512), (1, 1, 4096), (8, 1, 512), (32, 1, 512)]
    };
    for (sequences, rows, depth) in cases {
        for ty in [KvType::F16, KvType::Q8_0] {
            layer.profile(&cpu, (*sequences, *rows, *depth), ty, quick);
        }
    }
}

struct Layer {
    qkv: [Bytes; 3],
    o: Bytes,
    gate_up: [Bytes; 2],
    down: Bytes,
    v: Bytes,
    u: Bytes,
    cores: Vec<Bytes>,
}

impl Layer {
    fn new(ty: QuantType) -> Layer {
        let kv = KV_HEADS * HEAD_DIM;
        Layer {
            qkv: [Bytes::new(ty, WIDTH, WIDTH), Bytes::new(ty, kv, WIDTH), Bytes::new(ty, kv, WIDTH)],
            o: Bytes::new(ty, WIDTH, WIDTH),
            gate_up: [Bytes::new(ty, INNER, WIDTH), Bytes::new(ty, INNER, WIDTH)],
            down: Bytes::new(ty, WIDTH, INNER),
            v: Bytes::new(QuantType::Q8_0, RANK, WIDTH),
            u: Bytes::new(QuantType::Q8_0, INNER, RANK),
            cores: (0..32).map(|_| Bytes::new(QuantType::Q8_0, RANK, RANK)).collect(),
        }
    }

    fn profile(&self, cpu: &Cpu, (sequences, rows, depth): (usize, usize, usize), ty: KvType, quick: bool) {
        let n = sequences * rows;
        let shape = KvShape { layers: 1, kv_heads: KV_HEADS, head_dim: HEAD_DIM, page_len: PAGE, ty };
        let per_sequence = (depth + rows).div_ceil(PAGE);
        let pages: Vec<Vec<u32>> = (0..sequences)
            .map(|s| (0..per_sequence).map(|p| (s * per_sequence + p) as u32).collect())
            .collect();
        let mut kv = cpu.kv_alloc(shape, sequences * per_sequence).expect("room");
        self.fill(cpu, &mut kv, sequences * per_sequence * PAGE);
        let positions: Vec<u32> = (0..n).map(|i| (depth + i % rows) as u32).collect();
        let attend: Vec<_> = positions
            .iter()
            .enumerate()
            .map(|(i, p)| AttentionRow { pages: &pages[i / rows], position: *p })
            .collect();
        let slots: Vec<u32> = positions
            .iter()
            .zip(&attend)
            .map(|(p, a)| a.pages[*p as usize / PAGE] * PAGE as u32 + p % PAGE as u32)
            .collect();
        let rope = Rope {
            style: RopeStyle::Interleaved,
            inv_freq: (0..HEAD_DIM / 2).map(|i| 5e5f32.powf(-2.0 * i as f32 / HEAD_DIM as f32)).collect(),
            magnitude: 1.0,
        };
        let params = AttentionParams { n_heads: HEADS, scale: 0.125, softcap: None, window: None };
        let (x, weight) = (noise(n * WIDTH), vec![1.0; WIDTH]);
        let kv_width = KV_HEADS * HEAD_DIM;
        let (mut a, mut k, mut v) = (x.clone(), noise(n * kv_width), noise(n * kv_width));
        let (mut q, mut gate, mut up) = (noise(n * WIDTH), noise(n * INNER), noise(n * INNER));
        let mut p = Profile { times: Vec::new(), quick };
        p.time("rms_norm", || cpu.rms_norm(&x, n, &weight, 1e-5, &mut a).expect("works"));
        p.time("q, k, v", || {
            let [wq, wk, wv] = &self.qkv;
            let jobs = [(wq, &mut q), (wk, &mut k), (wv, &mut v)];
            let mut jobs = jobs.map(|(w, out)| MatmulJob { weight: w.matrix(), out });
            cpu.matmul(&a, n, &mut jobs).expect("works");
        });
        p.time("rope", || {
            cpu.rope(&mut q, HEADS, HEAD_DIM, &positions, &rope).expect("works");
            cpu.rope(&mut k, KV_HEADS, HEAD_DIM, &positions, &rope).expect("works");
        });
        p.time("kv_write", || cpu.kv_write(&mut kv, 0, &k, &v, &slots).expect("works"));
        p.time("attention", || cpu.attention(&kv, 0, &q, &attend, &params, &mut a).expect("works"));
        p.time("o", || {
            let mut job = [MatmulJob { weight: self.o.matrix(), out: &mut q }];
            cpu.matmul(&a, n, &mut job).expect("works");
        });
        p.time("add", || cpu.add(&mut a, &q, n * WIDTH).expect("works"));
        p.time("gate, up", || {
            let jobs = [(&self.gate_up[0], &mut gate), (&self.gate_up[1], &mut up)];
            let mut jobs = jobs.map(|(w, out)| MatmulJob { weight: w.matrix(), out });
            cpu.matmul(&x, n, &mut jobs).expect("works");
        });
        p.time("glu", || cpu.glu(Activation::Silu, &mut gate, &up, n * INNER).expect("works"));
        p.time("down", || {
            let mut job = [MatmulJob { weight: self.down.matrix(), out: &mut q }];
            cpu.matmul(&gate, n, &mut job).expect("works");
        });
        if n <= 32 {
            self.adapters(cpu, n, &x, &mut gate, &mut p);
        }
        p.print(&format!("{sequences} x {rows} rows at depth {depth}, cache {ty:?}"));
    }

    /// An adapter of rank 64 on gate and up, a core of its own for every row.
    fn adapters(&self, cpu: &Cpu, n: usize, x: &Vec<f32>, y: &mut Vec<f32>, p: &mut Profile) {
        let rows = |cores: &mut dyn Iterator<Item = Core<'static>>| -> Vec<(u32, Vec<LoraTerm<'static>>)> {
            let term = |core| LoraTerm { core, scale: 1.0, delta_scale: None, row_scale: None, bias: None };
            cores.enumerate().map(|(i, core)| (i as u32, vec![term(core)])).collect()
        };
        let group = LoraGroup {
            v: Some(self.v.matrix()),
            u: Some(self.u.matrix()),
            rows: self.cores[..n]
                .iter()
                .enumerate()
                .map(|(i, c)| {
                    let core = Core::Full(c.matrix());
                    let term = LoraTerm { core, scale: 1.0, delta_scale: None, row_scale: None, bias: None };
                    (i as u32, vec![term])
                })
                .collect(),
        };
        let groups = [group];
        let mut other = y.clone();
        p.time("lora gate, up", || {
            let mut jobs = [
                LoraJob { out: &mut *y, width: INNER, groups: &groups },
                LoraJob { out: &mut other, width: INNER, groups: &groups },
            ];
            cpu.lora(x, WIDTH, &mut jobs).expect("works");
        });
        let plain = [LoraGroup {
            v: Some(self.v.matrix()),
            u: Some(self.u.matrix()),
            rows: rows(&mut (0..n).map(|_| Core::Identity)),
        }];
        p.time("lora no core", || {
            let mut jobs = [LoraJob { out: &mut *y, width: INNER, groups: &plain }];
            cpu.lora(x, WIDTH, &mut jobs).expect("works");
        });
    }

    fn fill(&self, cpu: &Cpu, kv: &mut CpuKv, slots: usize) {
        let lines = noise(256 * KV_HEADS * HEAD_DIM);
        for first in (0..slots).step_by(256) {
            let slots: Vec<u32> = (first as u32..(first + 256).min(slots) as u32).collect();
            cpu.kv_write(kv, 0, &lines, &lines, &slots).expect("works");
        }
    }
}
