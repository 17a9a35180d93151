//! Operations that go over rows of numbers once, which `layer` does not have: embeddings of every format, rows gathered, biases,
//! norms of heads, soft caps, pages copied; beside the ceilings of this machine.
//!
//! `cargo bench -p lory-kernels --bench pointwise [-- FILTER]`, a filter is `embed` or `/512`; `LORY_ISA` and `LORY_THREADS` as usual.
//! Without measuring, each is compared with the reference.

mod measure;

use criterion::Criterion;
use lory_kernels::backend::{Backend, KvShape, KvType};
use lory_kernels::quant::format::FORMATS;
use lory_kernels::{Cpu, Reference};

use measure::weights::Weights;
use measure::{Machine, Work, noise};

/// Numbers of a row.
const WIDTH: usize = 2048;
/// Of a head.
const HEAD: usize = 64;
/// Rows of an embedding table, some of which are looked up.
const VOCABULARY: usize = 4096;

/// What an operation gets and leaves.
struct State {
    x: Vec<f32>,
    out: Vec<f32>,
    tokens: Vec<u32>,
    bias: Vec<f32>,
}

impl State {
    fn new(rows: usize) -> State {
        // Far apart, as tokens of a text are.
        let tokens = (0..rows).map(|i| (i * 2_654_435 % VOCABULARY) as u32).collect();
        State { x: noise(rows * WIDTH), out: vec![0.0; rows * WIDTH], tokens, bias: noise(WIDTH) }
    }
}

const OPERATIONS: [&str; 4] = ["gather", "add_bias", "rms_norm of heads", "softcap"];

fn run<B: Backend<Buffer = Vec<f32>>>(b: &B, rows: usize, operation: &str, s: &mut State) {
    let done = match operation {
        "gather" => {
            let from: Vec<u32> = (0..rows as u32).rev().collect();
            b.gather(&s.x, WIDTH, &from, &mut s.out)
        }
        "add_bias" => b.add_bias(&mut s.out, rows, &s.bias),
        "rms_norm of heads" => b.rms_norm_inplace(&mut s.out, rows * WIDTH / HEAD, &s.bias[..HEAD], 1e-5),
        _ => b.softcap(&mut s.out, rows * WIDTH, 30.0),
    };
    done.expect("works");
}

/// Operations of one number.
fn ops(operation: &str) -> usize {
    match operation {
        "gather" => 0,
        "add_bias" => 1,
        "rms_norm of heads" => 4,
        // A hyperbolic tangent counts as 20.
        _ => 22,
    }
}

fn embed<B: Backend<Buffer = Vec<f32>>>(b: &B, table: &Weights, s: &mut State) {
    b.embed(table.matrix(), &s.tokens, 1.5, &mut s.out).expect("works");
}

/// A cache of Llama 3.2 1B: copying a page reads and writes all layers.
fn measure_pages(machine: &Machine, criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("kv_copy_page");
    for ty in [KvType::F16, KvType::Q8_0] {
        let shape = KvShape { layers: 16, kv_heads: 8, head_dim: HEAD, page_len: 32, ty };
        let pages = 64;
        let mut kv = machine.cpu.kv_alloc(shape, pages).expect("room");
        let work = Work { bytes: 2 * shape.page_bytes(), ops: 0, peak: |c| c.f32 };
        let mut turn = 0;
        machine.time(&mut group, &format!("{ty:?}"), work, || {
            turn = (turn + 1) % (pages as u32 / 2);
            machine.cpu.kv_copy_page(&mut kv, turn, turn + pages as u32 / 2).expect("works");
        });
    }
    group.finish();
}

fn measure(machine: &Machine, criterion: &mut Criterion, rows: usize) {
    let mut state = State::new(rows);
    for operation in OPERATIONS {
        let mut group = criterion.benchmark_group(operation);
        let work = Work { bytes: 8 * rows * WIDTH, ops: ops(operation) * rows * WIDTH, peak: |c| c.f32 };
        machine.time(&mut group, &rows.to_string(), work, || {
            run(&machine.cpu, rows, operation, &mut state);
        });
        group.finish();
    }
    let mut group = criterion.benchmark_group("embed");
    for ty in FORMATS.iter().map(|format| format.ty) {
        let table = Weights::new(ty, VOCABULARY, WIDTH);
        let bytes = rows * (table.bytes() / VOCABULARY + 4 * WIDTH);
        let work = Work { bytes, ops: 2 * rows * WIDTH, peak: |c| c.f32 };
        machine.time(&mut group, &format!("{ty}/{rows}"), work, || {
            embed(&machine.cpu, &table, &mut state);
        });
    }
    group.finish();
}

fn check(cpu: &Cpu, rows: usize) {
    let (mut got, mut want) = (State::new(rows), State::new(rows));
    let compare = |what: &str, got: &mut State, want: &State| {
        for (a, b) in got.out.iter().zip(&want.out) {
            // So that NaN fails too.
            assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{what}: {a} and not {b}");
        }
        got.out.clone_from(&want.out);
    };
    for operation in OPERATIONS {
        run(cpu, rows, operation, &mut got);
        run(&Reference, rows, operation, &mut want);
        compare(operation, &mut got, &want);
    }
    for ty in FORMATS.iter().map(|format| format.ty) {
        let table = Weights::new(ty, VOCABULARY, WIDTH);
        embed(cpu, &table, &mut got);
        embed(&Reference, &table, &mut want);
        compare(ty.name(), &mut got, &want);
    }
    println!("{rows} rows: as the reference computes them");
}

fn main() {
    let machine = Machine::new();
    if machine.is_quick() {
        [1, 3].iter().for_each(|rows| check(&machine.cpu, *rows));
        return;
    }
    let mut criterion = measure::criterion();
    [1, 32, 512].iter().for_each(|rows| measure(&machine, &mut criterion, *rows));
    measure_pages(&machine, &mut criterion);
    criterion.final_summary();
}
