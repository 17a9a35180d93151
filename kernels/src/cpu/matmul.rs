//! Deals matrix products out to the threads.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Mutex;

use super::activations::{Activations, Offset, Shared};
use super::float_matmul::{self, FloatStrip};
use super::int_matmul::{IntKernel, ROW_BLOCK, Strip};
use super::panel::ROWS;
use super::{Isa, ThreadPool};
use crate::quant::{FormatError, QMatrix};

/// One product.
pub(crate) struct Product<'a> {
    /// The weight.
    pub weight: QMatrix<'a>,
    /// rows × `weight.rows()`.
    pub out: &'a mut [f32],
}

/// Tasks per thread: enough that a slow thread does not hold up the others for long.
const TASKS_PER_THREAD: usize = 12;

/// How one product falls into tasks: blocks of weight rows × blocks of activation rows (or tiles).
struct Plan<'a> {
    weight: QMatrix<'a>,
    out: Shared<f32>,
    kernel: Option<(&'static IntKernel, usize)>,
    /// Strips of weight rows, and how many a task takes.
    strip: usize,
    strips: usize,
    per_task: usize,
    /// Blocks of activation rows (float) or tiles (integer), and units per block.
    blocks: usize,
    per_block: usize,
}

impl Plan<'_> {
    fn tasks(&self) -> usize {
        self.strips.div_ceil(self.per_task) * self.blocks
    }

    /// Strips and block of a task; neighbours in number share a block, so that they read on in memory.
    fn task(&self, task: usize) -> (Range<usize>, usize) {
        let per_block = self.strips.div_ceil(self.per_task);
        let first = task % per_block * self.per_task;
        (first..(first + self.per_task).min(self.strips), task / per_block)
    }
}

/// `out[row] = W · x[row]` for several weights of equal `cols()`, each output in its canonical order.
pub(crate) fn matmul(
    isa: Isa,
    pool: &ThreadPool,
    x: &[f32],
    rows: usize,
    products: &mut [Product<'_>],
) -> Result<(), FormatError> {
    let Some(columns) = products.first().map(|p| p.weight.cols()) else { return Ok(()) };
    if rows == 0 {
        return Ok(());
    }
    assert!(products.iter().all(|p| p.weight.cols() == columns && p.out.len() >= rows * p.weight.rows()));
    let x = &x[..rows * columns];
    let any = |int: bool| products.iter().any(|p| IntKernel::of(p.weight.ty()).is_some() == int);
    let quantized = any(true).then(|| Activations::new(isa, pool, x, columns, rows, isa.tile_rows()));
    let floats = any(false).then(|| padded(x, columns));
    let mut offsets: Vec<((usize, Offset), Vec<i32>)> = Vec::new();
    let strips = |weight: QMatrix<'_>| weight.rows().div_ceil(isa.tile_panels() * ROWS).max(1);
    let total: usize = products.iter().map(|p| strips(p.weight)).sum();
    let wanted = pool.threads() * TASKS_PER_THREAD;
    let mut plans = Vec::with_capacity(products.len());
    for product in products.iter_mut() {
        let weight = product.weight;
        let kernel = IntKernel::of(weight.ty());
        // Few weight rows for many threads: then activation rows are divided, too.
        let least_blocks = if pool.threads() == 1 { 1 } else { (2 * pool.threads()).div_ceil(total) };
        let (strip, units, most) = match (kernel, &quantized) {
            (Some(_), Some(q)) => (isa.tile_panels() * ROWS, q.tiles.count(), ROW_BLOCK / isa.tile_rows()),
            _ => (float_matmul::STRIP, rows, float_matmul::ROW_BLOCK),
        };
        let blocks = units.div_ceil(most).max(least_blocks.min(units));
        let per_block = units.div_ceil(blocks);
        let strips = weight.rows().div_ceil(strip);
        let kernel = kernel.zip(quantized.as_ref()).map(|(kernel, q)| {
            let key = (kernel.group, kernel.offset(isa));
            let known = offsets.iter().position(|(of, _)| *of == key);
            let index = known.unwrap_or_else(|| {
                offsets.push((key, q.offsets(key.0, key.1)));
                offsets.len() - 1
            });
            (kernel, index)
        });
        plans.push(Plan {
            weight,
            out: Shared(product.out.as_mut_ptr()),
            kernel,
            strip,
            strips,
            per_task: (strips * blocks).div_ceil(wanted).clamp(1, strips.max(1)),
            blocks: units.div_ceil(per_block),
            per_block,
        });
    }
    let failure = Mutex::new(None);
    pool.run(plans.iter().map(Plan::tasks).sum(), &|mut task| {
        for plan in &plans {
            let Some(later) = task.checked_sub(plan.tasks()) else {
                let (strips, block) = plan.task(task);
                for strip in strips {
                    let weight_rows = strip * plan.strip..((strip + 1) * plan.strip).min(plan.weight.rows());
                    let units = block * plan.per_block..(block + 1) * plan.per_block;
                    // SAFETY: outputs of distinct strips and blocks are disjoint, each task has its own, and the
                    // length of `out` was checked above.
                    let done = unsafe {
                        run_strip(isa, plan, weight_rows, units, rows, &quantized, &floats, &offsets)
                    };
                    if let Err(error) = done {
                        *failure.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                    }
                }
                return;
            };
            task = later;
        }
    });
    match failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// # Safety
/// No one else uses these outputs, and `plan.out` has them.
#[allow(clippy::too_many_arguments)]
unsafe fn run_strip(
    isa: Isa,
    plan: &Plan<'_>,
    weight_rows: Range<usize>,
    units: Range<usize>,
    rows: usize,
    quantized: &Option<Activations>,
    floats: &Option<(Cow<'_, [f32]>, usize)>,
    offsets: &[((usize, Offset), Vec<i32>)],
) -> Result<(), FormatError> {
    let weight = plan.weight;
    match (plan.kernel, quantized, floats) {
        (Some((kernel, index)), Some(x), _) => {
            let tiles = units.start..units.end.min(x.tiles.count());
            let strip = Strip { weight, rows: weight_rows, x, offsets: &offsets[index].1, tiles };
            // SAFETY: the caller's promise.
            unsafe { strip.run(isa, kernel, plan.out) };
            Ok(())
        }
        (_, _, Some((x, x_stride))) => {
            let x_rows = units.start..units.end.min(rows);
            let strip = FloatStrip { weight, rows: weight_rows, x, x_stride: *x_stride, x_rows };
            // SAFETY: the caller's promise.
            unsafe { strip.run(isa, plan.out) }
        }
        _ => unreachable!("activations are prepared for every kind of weight"),
    }
}

/// Lines of `columns` rounded up to 16, zeros behind them.
fn padded(x: &[f32], columns: usize) -> (Cow<'_, [f32]>, usize) {
    if columns.is_multiple_of(16) {
        return (Cow::Borrowed(x), columns);
    }
    let stride = columns.next_multiple_of(16);
    let mut out = vec![0.0; x.len() / columns * stride];
    for (out, x) in out.chunks_exact_mut(stride).zip(x.chunks_exact(columns)) {
        out[..columns].copy_from_slice(x);
    }
    (Cow::Owned(out), stride)
}
