//! Deals matrix products out to the threads.

use std::ops::Range;
use std::sync::OnceLock;

use super::output::Output;
use super::panel::ROWS;
use super::prepared::{Form, Prepared, units_of};
use super::repack::Repacked;
use super::{Isa, ThreadPool};
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

/// Tasks per thread: enough that a slow thread does not hold up the others for long.
const TASKS_PER_THREAD: usize = 12;

/// Strips of a task at least, as long as each thread has a task, where all its rows are computed at once: rows that are apart are read the faster
/// the farther they are (`benches/NOTES.md`).
const STRIPS_AT_ONCE: usize = 4;

/// Multiplications and additions of a task at most, where a strip has fewer: some 100 µs of one thread, since at the end the
/// others wait for the last.
const TASK_PRODUCTS: usize = 1 << 25;

/// Bytes of weights in a group of strips, a part of the second-level cache.
const GROUP_BYTES: usize = 256 << 10;

/// Up to so many products at once, each falls into its own number of tasks.
const MANY: usize = 4;

/// How one product falls into tasks: strips of weight rows × blocks of activation rows.
pub(super) struct Plan<'a> {
    weight: QMatrix<'a>,
    /// What receives the lines.
    pub out: Output<'a>,
    x: Form<'a>,
    /// Weight rows of a strip, strips, and how many a task takes.
    strip: usize,
    strips: usize,
    per_task: usize,
    /// Strips that meet all blocks of a task before the next ones do.
    group: usize,
    /// Units of activations (rows, or integer tiles), their blocks, how many of these a task takes, and how many units make one.
    units: usize,
    blocks: usize,
    blocks_per_task: usize,
    per_block: usize,
    threads: usize,
}

impl<'a> Plan<'a> {
    /// All products together have `all_strips`.
    pub fn new(
        isa: Isa,
        pool: &ThreadPool,
        product: &Product<'a>,
        x: &'a Prepared<'_>,
        all_strips: usize,
    ) -> Self {
        let weight = product.weight;
        let x = x.form(isa, weight, product.repacked);
        let strip = x.strip(isa);
        let (units, most) = units_of(isa, weight.ty(), x.rows());
        let per_block = units_per_block(pool, units, most, all_strips);
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
        let products = strip * weight.cols() * (x.rows() * blocks_per_task).div_ceil(blocks);
        let most = (TASK_PRODUCTS / products.max(1)).max(if together { group } else { 1 });
        let at_once = x.most_rows(isa, weight, units.min(per_block)) / strip;
        let least = STRIPS_AT_ONCE.min(at_once).min(strips.div_ceil(pool.threads()));
        let per_task = per_task.max(of_many).max(least).min(most).min(strips);
        Plan {
            weight,
            out: product.out,
            x,
            strip,
            strips,
            per_task,
            group,
            units,
            blocks,
            blocks_per_task,
            per_block,
            threads: pool.threads(),
        }
    }

    /// Into how many tasks the product falls.
    pub fn tasks(&self) -> usize {
        self.strips.div_ceil(self.per_task) * self.blocks.div_ceil(self.blocks_per_task)
    }

    /// Whether all activation rows are one block.
    pub fn has_one_block(&self) -> bool {
        self.blocks == 1
    }

    /// The strips of a task.
    pub fn strips_of(&self, task: usize) -> Range<usize> {
        let tasks = self.strips.div_ceil(self.per_task);
        // Neighbours in number share blocks of activations.
        let task = if self.has_one_block() { dealt(task, tasks, self.threads) } else { task % tasks };
        let first = task * self.per_task;
        first..(first + self.per_task).min(self.strips)
    }

    /// The weight rows of some strips.
    pub fn weight_rows(&self, strips: &Range<usize>) -> Range<usize> {
        (strips.start * self.strip).min(self.weight.rows())..(strips.end * self.strip).min(self.weight.rows())
    }

    /// A task of a thread that goes on, as far as can be told, with the `later`-th one from there.
    ///
    /// # Safety
    /// No one else runs this task, and `out` holds all rows.
    pub unsafe fn run(&self, isa: Isa, task: usize, later: usize) -> Result<(), FormatError> {
        let strips = self.strips_of(task);
        let block = task / self.strips.div_ceil(self.per_task) * self.blocks_per_task;
        let blocks = block..(block + self.blocks_per_task).min(self.blocks);
        for first in strips.clone().step_by(self.group) {
            for block in blocks.clone() {
                let next = match (block + 1 < blocks.end, first + self.group < strips.end) {
                    (true, _) => None,
                    (false, true) => Some(first + self.group),
                    (false, false) => {
                        Some(task + later).filter(|t| *t < self.tasks()).map(|t| self.strips_of(t).start)
                    }
                };
                let these = first..(first + self.group).min(strips.end);
                // SAFETY: the caller's promises.
                unsafe { self.strips(isa, these, block, next, self.out)? };
            }
        }
        Ok(())
    }

    /// Some strips and a block, with outputs that go where the plan's do. The thread goes on with strip `next`.
    ///
    /// # Safety
    /// No one else runs these strips with this block, and `out` holds all rows.
    pub unsafe fn strips(
        &self,
        isa: Isa,
        strips: Range<usize>,
        block: usize,
        next: Option<usize>,
        out: Output<'_>,
    ) -> Result<(), FormatError> {
        let units = block * self.per_block..((block + 1) * self.per_block).min(self.units);
        let next = next.map(|strip| strip * self.strip);
        // SAFETY: the caller's promise.
        unsafe { self.x.run(isa, self.weight, self.weight_rows(&strips), units, next, out) }
    }

    /// Weight rows of a strip.
    pub fn strip(&self) -> usize {
        self.strip
    }

    /// How many weight rows are computed at once, if they are asked for.
    pub fn at_once(&self, isa: Isa) -> usize {
        self.x.most_rows(isa, self.weight, self.units)
    }
}

/// Which of `tasks` neighbours has this number. Threads take numbers in turn, and each shall go on reading where its last task ended, since
/// what lies there has been fetched meanwhile.
fn dealt(number: usize, tasks: usize, threads: usize) -> usize {
    let (thread, turn) = (number % threads, number / threads);
    thread * (tasks / threads) + thread.min(tasks % threads) + turn
}

/// How many units of activations a task takes, `most` at most.
fn units_per_block(pool: &ThreadPool, units: usize, most: usize, all_strips: usize) -> usize {
    // Few weight rows for many threads: then activation rows are divided, too.
    let least = if pool.threads() == 1 { 1 } else { (2 * pool.threads()).div_ceil(all_strips) };
    units.div_ceil(units.div_ceil(most).max(least.min(units)))
}

/// Whether [`Plan`]s for products of these weights have one block of activation rows.
pub(super) fn is_one_block(isa: Isa, pool: &ThreadPool, rows: usize, weights: &[QMatrix<'_>]) -> bool {
    let all_strips = count_strips(isa, weights.iter().copied());
    weights.iter().all(|weight| {
        let (units, most) = units_of(isa, weight.ty(), rows);
        units_per_block(pool, units, most, all_strips) == units
    })
}

/// The strips of some weights, which their plans want to know. Counted as the integer tile has them.
pub(crate) fn count_strips<'a>(isa: Isa, weights: impl Iterator<Item = QMatrix<'a>>) -> usize {
    weights.map(|weight| weight.rows().div_ceil(isa.tile_panels() * ROWS).max(1)).sum()
}

/// `out[row] = W · x[row]` for several weights and inputs, each output in its canonical order.
pub(crate) fn matmul(
    isa: Isa,
    pool: &ThreadPool,
    inputs: &[Input<'_>],
    products: &[Product<'_>],
) -> Result<(), FormatError> {
    let prepare = |pool: &ThreadPool, i: usize| {
        let theirs = products.iter().filter(|p| p.input == i);
        Prepared::new(isa, pool, inputs[i], theirs.map(|p| p.weight.ty()))
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
    let total = count_strips(isa, products.iter().map(|product| product.weight));
    let mut plans = Vec::with_capacity(products.len());
    for product in products {
        let (input, weight) = (inputs[product.input], product.weight);
        assert!(input.columns == weight.cols());
        product.out.check(input.rows, weight.rows());
        if input.columns == 0 {
            for row in 0..input.rows {
                // SAFETY: the output was checked, and no task has begun.
                unsafe { product.out.put(row, 0, &vec![0.0; weight.rows()]) };
            }
        } else if input.rows > 0 && weight.rows() > 0 {
            plans.push(Plan::new(isa, pool, product, &prepared[product.input], total));
        }
    }
    // The number of the first task after each plan's.
    let mut tasks = 0;
    let ends: Vec<usize> = plans
        .iter()
        .map(|plan| {
            tasks += plan.tasks();
            tasks
        })
        .collect();
    pool.try_run(tasks, &|task| {
        let i = ends.partition_point(|end| *end <= task);
        let first = i.checked_sub(1).map_or(0, |before| ends[before]);
        // SAFETY: outputs of distinct tasks are disjoint, and the length of `out` was checked above.
        unsafe { plans[i].run(isa, task - first, pool.threads()) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_dealt_once_and_each_thread_reads_on() {
        for threads in 1..9 {
            for tasks in 1..40 {
                let mut dealt: Vec<usize> = (0..tasks).map(|number| dealt(number, tasks, threads)).collect();
                for (number, task) in dealt.iter().enumerate().skip(threads) {
                    assert_eq!(*task, dealt[number - threads] + 1, "{number} of {tasks}, {threads} threads");
                }
                dealt.sort();
                assert!(dealt.into_iter().eq(0..tasks), "{tasks} tasks, {threads} threads");
            }
        }
    }
}
