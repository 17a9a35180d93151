//! Operations on single lines: norms, rotations, activations.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::activations::Shared;
use super::simd::{Op, Simd, sigmoid, tanh};
use super::{Isa, ThreadPool};
use crate::backend::{Activation, Rope};
use crate::ops::glu::{GELU_A, GELU_B};
use crate::ops::rope::{rotate, table};
use crate::quant::FormatError;

/// Floats below which a second thread is not worth waking.
const SERIAL: usize = 16_384;

/// Calls `work` with ranges of `0..lines` that together are all of it, on all threads if the lines
/// of `width` are worth it.
pub(crate) fn split(pool: &ThreadPool, lines: usize, width: usize, work: &(dyn Fn(Range<usize>) + Sync)) {
    let tasks = count_tasks(pool, lines, width);
    pool.run(tasks, &|t| work(lines * t / tasks..lines * (t + 1) / tasks));
}

/// The same for work that may fail.
pub(crate) fn try_split(
    pool: &ThreadPool,
    lines: usize,
    width: usize,
    work: &(dyn Fn(Range<usize>) -> Result<(), FormatError> + Sync),
) -> Result<(), FormatError> {
    let tasks = count_tasks(pool, lines, width);
    pool.try_run(tasks, &|t| work(lines * t / tasks..lines * (t + 1) / tasks))
}

fn count_tasks(pool: &ThreadPool, lines: usize, width: usize) -> usize {
    let most = (lines * width / (SERIAL / 4)).clamp(1, 4 * pool.threads());
    if lines * width < SERIAL { 1 } else { most.min(lines) }
}

/// Applies `f` to 16 values at a time; the last few stand before zeros.
macro_rules! each16 {
    ($s:ident, $x:expr, $y:expr, |$a:ident, $b:ident| $f:expr) => {{
        let (x, x_tail) = $x.as_chunks_mut::<16>();
        let (y, y_tail) = $y.as_chunks::<16>();
        for (x, y) in x.iter_mut().zip(y) {
            let ($a, $b) = ($s.load(x), $s.load(y));
            $s.store($f, x);
        }
        if !x_tail.is_empty() {
            let (mut x, mut y) = ([0.0; 16], [0.0; 16]);
            x[..x_tail.len()].copy_from_slice(x_tail);
            y[..y_tail.len()].copy_from_slice(y_tail);
            let ($a, $b) = ($s.load(&x), $s.load(&y));
            $s.store($f, &mut x);
            x_tail.copy_from_slice(&x[..x_tail.len()]);
        }
    }};
}

/// `gate = act(gate) · up`.
pub(crate) struct Glu<'a> {
    pub act: Activation,
    pub gate: &'a mut [f32],
    pub up: &'a [f32],
}

impl Op for Glu<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let up = &self.up[..self.gate.len()];
        match self.act {
            Activation::Silu => each16!(s, self.gate, up, |x, up| s.mul(s.mul(x, sigmoid(s, x)), up)),
            Activation::GeluTanh => each16!(s, self.gate, up, |x, up| {
                let inner = s.fma(s.mul(s.mul(s.splat(GELU_B), x), x), x, x);
                s.mul(s.mul(x, sigmoid(s, s.mul(s.splat(GELU_A), inner))), up)
            }),
        }
    }
}

/// `x = cap · tanh(x / cap)`.
pub(crate) struct Softcap<'a> {
    pub x: &'a mut [f32],
    pub cap: f32,
}

impl Op for Softcap<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cap = s.splat(self.cap);
        let none: &[f32] = &vec![0.0; self.x.len() % 16];
        let (x, tail) = self.x.as_chunks_mut::<16>();
        for x in x {
            let y = s.mul(cap, tanh(s, s.div(s.load(x), cap)));
            s.store(y, x);
        }
        each16!(s, tail, none, |x, _none| s.mul(cap, tanh(s, s.div(x, cap))));
    }
}

/// [`crate::ops::norm::rms_norm`] on whole lines.
pub(crate) struct RmsNorm<'a> {
    pub x: &'a mut [f32],
    pub weight: &'a [f32],
    pub eps: f32,
}

impl Op for RmsNorm<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x.chunks_exact_mut(self.weight.len()) {
            let mut sum = s.splat(0.0);
            let (chunks, tail) = x.as_chunks::<16>();
            for x in chunks {
                sum = s.fma(s.load(x), s.load(x), sum);
            }
            let mut last = [0.0; 16];
            last[..tail.len()].copy_from_slice(tail);
            sum = s.fma(s.load(&last), s.load(&last), sum);
            let scale = 1.0 / (s.fold(sum) / x.len() as f32 + self.eps).sqrt();
            each16!(s, x, self.weight, |x, w| s.mul(s.mul(x, s.splat(scale)), w));
        }
    }
}

/// [`rotate`] on lines of heads, compiled with the level's instructions.
struct Rotate<'a> {
    x: &'a mut [f32],
    heads: usize,
    head_dim: usize,
    style: crate::backend::RopeStyle,
    tables: &'a [[f32; 2]],
}

impl Op for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let pairs = self.tables.len() / (self.x.len() / (self.heads * self.head_dim)).max(1);
        if pairs == 0 {
            return;
        }
        let lines = self.x.chunks_exact_mut(self.heads * self.head_dim);
        for (line, table) in lines.zip(self.tables.chunks_exact(pairs)) {
            for head in line.chunks_exact_mut(self.head_dim) {
                rotate(head, self.style, table);
            }
        }
    }
}

/// Tables of the last positions: queries and keys of all layers ask for the same ones.
#[derive(Default)]
pub(crate) struct RopeTables(Mutex<Vec<Arc<RopeTable>>>);

struct RopeTable {
    inv_freq: Vec<f32>,
    magnitude: f32,
    positions: Vec<u32>,
    values: Vec<[f32; 2]>,
}

/// Models with two kinds of layers have two; the others are for changing batches.
const TABLES: usize = 4;

impl RopeTables {
    fn get(&self, pool: &ThreadPool, rope: &Rope, positions: &[u32]) -> Arc<RopeTable> {
        let mut tables = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |t: &Arc<RopeTable>| {
            t.positions == positions && t.inv_freq == rope.inv_freq && t.magnitude == rope.magnitude
        };
        if let Some(found) = tables.iter().find(|t| same(t)) {
            return Arc::clone(found);
        }
        let pairs = rope.inv_freq.len();
        let mut values = vec![[0.0; 2]; pairs * positions.len()];
        let out = Shared(values.as_mut_ptr());
        // A sine costs as much as some 16 multiplications.
        split(pool, positions.len(), 16 * pairs, &|range| {
            let out = &out;
            let mut line = Vec::with_capacity(pairs);
            for i in range {
                table(positions[i], rope, &mut line);
                // SAFETY: line `i` belongs to this range alone.
                unsafe { out.slice(i * pairs, pairs) }.copy_from_slice(&line);
            }
        });
        let made = Arc::new(RopeTable {
            inv_freq: rope.inv_freq.clone(),
            magnitude: rope.magnitude,
            positions: positions.to_vec(),
            values,
        });
        tables.truncate(TABLES - 1);
        tables.insert(0, Arc::clone(&made));
        made
    }

    /// Rotates `heads` heads of `head_dim` in each line of `x`.
    pub fn rotate(
        &self,
        isa: Isa,
        pool: &ThreadPool,
        x: &mut [f32],
        (heads, head_dim): (usize, usize),
        positions: &[u32],
        rope: &Rope,
    ) {
        let (width, pairs) = (heads * head_dim, rope.inv_freq.len());
        let x = &mut x[..positions.len() * width];
        let tables = self.get(pool, rope, positions);
        let lines = Shared(x.as_mut_ptr());
        split(pool, positions.len(), width, &|range| {
            // SAFETY: these lines belong to this range alone.
            let x = unsafe { lines.slice(range.start * width, range.len() * width) };
            let tables = &tables.values[range.start * pairs..range.end * pairs];
            isa.run(Rotate { x, heads, head_dim, style: rope.style, tables });
        });
    }
}
