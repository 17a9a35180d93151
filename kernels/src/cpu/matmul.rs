//! Deals matrix products out to the threads.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::activations::{Activations, Offset, Shared};
#[cfg(target_arch = "x86_64")]
use super::avx512_bf16::{Bf16, Bf16Strip, Rounded};
use super::float_matmul::{self, FloatStrip};
use super::int_matmul::{IntKernel, ROW_BLOCK, Strip};
use super::panel::ROWS;
use super::repack::Repacked;
use super::{Isa, Level, ThreadPool};
use crate::QuantType;
use crate::quant::{FormatError, QMatrix};

/// Activations that one or several weights are multiplied with.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    /// rows × `columns`.
    pub x: &'a [f32],
    /// How many lines.
    pub rows: usize,
    /// Their length.
    pub columns: usize,
}

/// One product.
pub(crate) struct Product<'a> {
    /// Which of the inputs.
    pub input: usize,
    /// The weight.
    pub weight: QMatrix<'a>,
    /// The same repacked, if it was.
    pub repacked: Option<&'a Repacked>,
    /// Receives lines of `weight.rows()`.
    pub out: Output<'a>,
}

/// Where the lines of a product go.
#[derive(Clone, Copy)]
pub(crate) struct Output<'a> {
    out: Shared<f32>,
    len: usize,
    /// Line `i` of the product is added to line `lines[i]`; `None`: it becomes line `i`.
    lines: Option<&'a [u32]>,
    borrow: PhantomData<&'a mut [f32]>,
}

impl<'a> Output<'a> {
    /// Line after line.
    pub fn set(out: &'a mut [f32]) -> Output<'a> {
        Output { out: Shared(out.as_mut_ptr()), len: out.len(), lines: None, borrow: PhantomData }
    }

    /// Adds line `i` to line `lines[i]` of `len` floats at `out`.
    ///
    /// # Safety
    /// They stay valid for `'a`, the lines are distinct, and until the product is done nothing else
    /// uses them.
    pub unsafe fn add(out: Shared<f32>, len: usize, lines: &'a [u32]) -> Output<'a> {
        Output { out, len, lines: Some(lines), borrow: PhantomData }
    }

    fn check(&self, rows: usize, width: usize) {
        let lines = match self.lines {
            None => rows,
            Some(lines) => {
                assert!(lines.len() == rows);
                lines.iter().max().map_or(0, |line| *line as usize + 1)
            }
        };
        assert!(lines * width <= self.len, "{lines} lines of {width} in {} floats", self.len);
    }

    /// Writes columns `start ..` of line `row`.
    ///
    /// # Safety
    /// They lie within the output, and no other thread uses them.
    #[inline(always)]
    pub unsafe fn put(&self, row: usize, width: usize, start: usize, values: &[f32]) {
        let line = self.lines.map_or(row, |lines| lines[row] as usize);
        // SAFETY: the caller's promise.
        let out = unsafe { self.out.slice(line * width + start, values.len()) };
        if let (Ok(out), Ok(values)) = (<&mut [f32; ROWS]>::try_from(&mut *out), values.try_into()) {
            // Nearly always; what has a known length is a few instructions and no call.
            let values: &[f32; ROWS] = values;
            match self.lines {
                Some(_) => out.iter_mut().zip(values).for_each(|(out, v)| *out += v),
                None => *out = *values,
            }
        } else if self.lines.is_some() {
            out.iter_mut().zip(values).for_each(|(out, v)| *out += v);
        } else {
            out.copy_from_slice(values);
        }
    }
}

/// Tasks per thread: enough that a slow thread does not hold up the others for long.
const TASKS_PER_THREAD: usize = 12;

/// Multiplications and additions of a task at most, where a strip has fewer: some 100 µs of one thread, since at the end the
/// others wait for the last.
const TASK_PRODUCTS: usize = 1 << 25;

/// Bytes of weights in a group of strips, a part of the second-level cache.
const GROUP_BYTES: usize = 256 << 10;

/// Up to so many products at once, each falls into its own number of tasks.
const MANY: usize = 4;

/// How one product falls into tasks: strips of weight rows × blocks of activation rows.
struct Plan<'a> {
    weight: QMatrix<'a>,
    out: Output<'a>,
    x: Form<'a>,
    /// Weight rows of a strip, strips, and how many a task takes.
    strip: usize,
    strips: usize,
    per_task: usize,
    /// Strips that meet all blocks of a task before the next ones do.
    group: usize,
    /// Blocks of activation rows, how many a task takes, and how many units (rows, or integer tiles) make one.
    blocks: usize,
    blocks_per_task: usize,
    per_block: usize,
}

/// What a weight is multiplied with.
#[derive(Clone, Copy)]
enum Form<'a> {
    Int {
        kernel: &'static IntKernel,
        repacked: Option<&'a Repacked>,
        x: &'a Activations,
        offsets: &'a [i32],
    },
    Float {
        x: &'a [f32],
        stride: usize,
        rows: usize,
    },
    #[cfg(target_arch = "x86_64")]
    Bf16 {
        x: &'a Rounded,
        rows: usize,
    },
}

impl<'a> Plan<'a> {
    fn new(isa: Isa, pool: &ThreadPool, product: &Product<'a>, x: &'a Prepared<'_>, strips: usize) -> Self {
        let weight = product.weight;
        #[cfg(target_arch = "x86_64")]
        if let Some(rounded) = x.rounded.as_ref().filter(|_| is_rounded(isa, weight.ty())) {
            let form = Form::Bf16 { x: rounded, rows: x.rows };
            let block = float_matmul::ROW_BLOCK;
            return Plan::divide(pool, product, form, float_matmul::STRIP, x.rows, (x.rows, block), strips);
        }
        let (form, strip, units, most) = match (IntKernel::of(weight.ty()), &x.quantized, &x.floats) {
            (Some(kernel), Some(q), _) => {
                let key = (kernel.group, kernel.offset(isa));
                let offsets = x.offsets.iter().find(|(of, _)| *of == key).map_or(&[][..], |(_, o)| o);
                let form = Form::Int { kernel, repacked: product.repacked, x: q, offsets };
                (form, isa.tile_panels() * ROWS, q.tiles.count(), ROW_BLOCK / isa.tile_rows())
            }
            (_, _, Some((floats, stride))) => {
                let form = Form::Float { x: floats, stride: *stride, rows: x.rows };
                (form, float_matmul::STRIP, x.rows, float_matmul::ROW_BLOCK)
            }
            _ => unreachable!("inputs are prepared for every weight"),
        };
        Plan::divide(pool, product, form, strip, x.rows, (units, most), strips)
    }

    /// `rows` of activations in so many units, of which a block takes `most`; all products together have `all_strips`.
    fn divide(
        pool: &ThreadPool,
        product: &Product<'a>,
        x: Form<'a>,
        strip: usize,
        rows: usize,
        (units, most): (usize, usize),
        all_strips: usize,
    ) -> Self {
        let weight = product.weight;
        // Few weight rows for many threads: then activation rows are divided, too.
        let least = if pool.threads() == 1 { 1 } else { (2 * pool.threads()).div_ceil(all_strips) };
        let per_block = units.div_ceil(units.div_ceil(most).max(least.min(units)));
        let blocks = units.div_ceil(per_block);
        let strips = weight.rows().div_ceil(strip);
        let tasks = pool.threads() * TASKS_PER_THREAD;
        // Floats meet few rows at a time, since their accumulators are many: lest all weights come from memory for every block,
        // some of them stay in the cache while all blocks pass.
        let together = !matches!(x, Form::Int { .. }) && all_strips >= tasks;
        let blocks_per_task = if together { blocks } else { 1 };
        let group = (GROUP_BYTES / (strip * weight.row_bytes()).max(1)).max(1);
        let per_task = (strips * blocks / blocks_per_task).div_ceil(tasks);
        // Of very many products each needs only few tasks.
        let of_many = (all_strips * blocks / blocks_per_task).div_ceil(tasks * MANY);
        let products = strip * weight.cols() * (rows * blocks_per_task).div_ceil(blocks);
        let most = (TASK_PRODUCTS / products.max(1)).max(if together { group } else { 1 });
        let per_task = per_task.max(of_many).min(most).min(strips);
        Plan {
            weight,
            out: product.out,
            x,
            strip,
            strips,
            per_task,
            group,
            blocks,
            blocks_per_task,
            per_block,
        }
    }

    fn tasks(&self) -> usize {
        self.strips.div_ceil(self.per_task) * self.blocks.div_ceil(self.blocks_per_task)
    }

    /// # Safety
    /// No one else runs this task, and `out` holds all rows.
    unsafe fn run(&self, isa: Isa, task: usize) -> Result<(), FormatError> {
        // Neighbours in number share blocks of activations and read on in the weights.
        let per_block = self.strips.div_ceil(self.per_task);
        let (strip, block) = (task % per_block * self.per_task, task / per_block * self.blocks_per_task);
        let strips = strip..(strip + self.per_task).min(self.strips);
        let blocks = block..(block + self.blocks_per_task).min(self.blocks);
        for first in strips.clone().step_by(self.group) {
            for block in blocks.clone() {
                for strip in first..(first + self.group).min(strips.end) {
                    // SAFETY: the caller's promises.
                    unsafe { self.strip(isa, strip, block)? };
                }
            }
        }
        Ok(())
    }

    /// # Safety
    /// No one else runs this strip with this block, and `out` holds all rows.
    unsafe fn strip(&self, isa: Isa, strip: usize, block: usize) -> Result<(), FormatError> {
        let units = block * self.per_block..(block + 1) * self.per_block;
        let rows = strip * self.strip..((strip + 1) * self.strip).min(self.weight.rows());
        match self.x {
            Form::Int { kernel, repacked, x, offsets } => {
                let tiles = units.start..units.end.min(x.tiles.count());
                let strip = Strip { weight: self.weight, repacked, rows, x, offsets, tiles };
                // SAFETY: the caller's promise.
                unsafe { strip.run(isa, kernel, self.out) };
            }
            #[cfg(target_arch = "x86_64")]
            Form::Bf16 { x, rows: n } => {
                let x_rows = units.start..units.end.min(n);
                // SAFETY: the caller's promise.
                unsafe { Bf16Strip { weight: self.weight, rows, x, x_rows }.run(self.out) };
            }
            Form::Float { x, stride, rows: n } => {
                let x_rows = units.start..units.end.min(n);
                let strip = FloatStrip { weight: self.weight, rows, x, x_stride: stride, x_rows };
                // SAFETY: the caller's promise.
                unsafe { strip.run(isa, self.out)? };
            }
        }
        Ok(())
    }
}

/// An input in the forms that its weights want.
struct Prepared<'x> {
    rows: usize,
    quantized: Option<Activations>,
    /// Lines of the second number's length.
    floats: Option<(Cow<'x, [f32]>, usize)>,
    #[cfg(target_arch = "x86_64")]
    rounded: Option<Rounded>,
    /// Of `quantized`, for the formats that occur.
    offsets: Vec<((usize, Offset), Vec<i32>)>,
}

impl<'x> Prepared<'x> {
    fn new(isa: Isa, pool: &ThreadPool, input: Input<'x>, weights: &[QMatrix<'_>]) -> Self {
        let Input { x, rows, columns } = input;
        let x = &x[..rows * columns];
        // Without columns there is nothing to prepare, and no product asks for it.
        let weights = if columns > 0 { weights } else { &[] };
        let kernels = || weights.iter().map(|w| IntKernel::of(w.ty()));
        let quantized = kernels()
            .any(|k| k.is_some())
            .then(|| Activations::new(isa, pool, x, columns, rows, isa.rows_of_tile(rows)));
        let float = |w: &QMatrix<'_>| IntKernel::of(w.ty()).is_none() && !is_rounded(isa, w.ty());
        let floats = weights.iter().any(float).then(|| padded(x, columns, rows));
        #[cfg(target_arch = "x86_64")]
        let rounded = Bf16::of(isa)
            .filter(|_| weights.iter().any(|w| is_rounded(isa, w.ty())))
            .map(|proof| Rounded::new(proof, x, columns));
        let mut offsets: Vec<((usize, Offset), Vec<i32>)> = Vec::new();
        for (kernel, q) in kernels().flatten().zip(quantized.iter().cycle()) {
            let key = (kernel.group, kernel.offset(isa));
            if offsets.iter().all(|(of, _)| *of != key) {
                offsets.push((key, q.offsets(key.0, key.1)));
            }
        }
        Prepared {
            rows,
            quantized,
            floats,
            #[cfg(target_arch = "x86_64")]
            rounded,
            offsets,
        }
    }
}

/// `out[row] = W · x[row]` for several weights and inputs, each output in its canonical order.
pub(crate) fn matmul(
    isa: Isa,
    pool: &ThreadPool,
    inputs: &[Input<'_>],
    products: &[Product<'_>],
) -> Result<(), FormatError> {
    let prepare = |pool: &ThreadPool, i: usize| {
        let weights: Vec<_> = products.iter().filter(|p| p.input == i).map(|p| p.weight).collect();
        Prepared::new(isa, pool, inputs[i], &weights)
    };
    let prepared: Vec<Prepared<'_>> = if inputs.len() < 2 * pool.threads() {
        (0..inputs.len()).map(|i| prepare(pool, i)).collect()
    } else {
        // Many small ones: each by one thread.
        let serial = ThreadPool::new(1);
        let done: Vec<OnceLock<Prepared<'_>>> = inputs.iter().map(|_| OnceLock::new()).collect();
        pool.run(inputs.len(), &|i| drop(done[i].set(prepare(&serial, i))));
        done.into_iter().filter_map(OnceLock::into_inner).collect()
    };
    let strips = |weight: QMatrix<'_>| weight.rows().div_ceil(isa.tile_panels() * ROWS).max(1);
    let total: usize = products.iter().map(|p| strips(p.weight)).sum();
    let mut plans = Vec::with_capacity(products.len());
    for product in products {
        let (input, weight) = (inputs[product.input], product.weight);
        assert!(input.columns == weight.cols());
        product.out.check(input.rows, weight.rows());
        if input.columns == 0 {
            for row in 0..input.rows {
                // SAFETY: the output was checked, and no task has begun.
                unsafe { product.out.put(row, weight.rows(), 0, &vec![0.0; weight.rows()]) };
            }
        } else if input.rows > 0 && weight.rows() > 0 {
            plans.push(Plan::new(isa, pool, product, &prepared[product.input], total));
        }
    }
    let failure = Mutex::new(None);
    // The number of the first task after each plan's.
    let mut tasks = 0;
    let ends: Vec<usize> = plans
        .iter()
        .map(|plan| {
            tasks += plan.tasks();
            tasks
        })
        .collect();
    pool.run(tasks, &|task| {
        let i = ends.partition_point(|end| *end <= task);
        let first = i.checked_sub(1).map_or(0, |before| ends[before]);
        // SAFETY: outputs of distinct tasks are disjoint, and the length of `out` was checked above.
        if let Err(error) = unsafe { plans[i].run(isa, task - first) } {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Whether products with this type take activations rounded to it.
fn is_rounded(isa: Isa, ty: QuantType) -> bool {
    ty == QuantType::BF16 && isa.level() == Level::Avx512Bf16
}

/// Lines of `columns` rounded up to 16, zeros behind them. Many lines of whole half-pages move apart by another half, so that
/// the rows of a tile do not share cache sets.
fn padded(x: &[f32], columns: usize, rows: usize) -> (Cow<'_, [f32]>, usize) {
    let apart = rows >= 16 && columns.is_multiple_of(512);
    if columns.is_multiple_of(16) && !apart {
        return (Cow::Borrowed(x), columns);
    }
    let stride = if apart { columns.next_multiple_of(1024) + 512 } else { columns.next_multiple_of(16) };
    let mut out = vec![0.0; x.len() / columns * stride];
    for (out, x) in out.chunks_exact_mut(stride).zip(x.chunks_exact(columns)) {
        out[..columns].copy_from_slice(x);
    }
    (Cow::Owned(out), stride)
}
