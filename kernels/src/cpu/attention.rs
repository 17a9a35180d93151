//! Attention in tiles with an online softmax (source: Milakov and Gimelshein, arXiv 1805.02867;
//! Dao et al., arXiv 2205.14135).
//!
//! Positions are divided by their number alone, never by who asks: into blocks of about [`BLOCK`] (whole
//! pages, or parts of a long one) and spans of whole blocks, about [`SPAN`] each. A query's maximum, sum and output are updated block after
//! block within a span, and the spans' results are merged in order. So a row's bits depend
//! neither on its batch nor on which thread took which span.
//!
//! Error against exact arithmetic on the cached values, for weights p and n visible positions: scores to
//! `(dims + 3) · 2⁻²⁴ · scale · Σ |q·k|`, which the exponential carries over to p relatively, and the sums to
//! `(n + 2 · blocks + 8) · 2⁻²⁴ · Σ p |v|`.

use std::ops::Range;

use super::activations::Shared;
use super::attention_span::Span;
use super::kv::{CpuKv, HeadLayout};
use super::simd::{Op, Simd};
use super::{Isa, ThreadPool};
use crate::backend::{AttentionParams, AttentionRow};
use crate::ops::attention::first_visible;

/// Positions whose scores are turned into weights together.
pub(super) const BLOCK: usize = 128;
/// Vectors of 16 positions in a block, the last one of each page perhaps partly filled.
pub(super) const VECTORS: usize = BLOCK / 16;
/// Positions whose keys or values are widened together: 16 KiB in 128 dimensions.
pub(super) const WIDE: usize = 32;
/// Positions of a part that one thread may do alone.
const SPAN: usize = 512;
/// Queries (rows × heads of one kv head) that share widened keys and values at most.
const QUERIES: usize = 64;

/// Rows of one sequence that follow each other, on one kv head.
pub(super) struct Task {
    pub rows: Range<usize>,
    pub kv_head: usize,
}

/// What is the same for all tasks.
pub(super) struct Call<'a> {
    pub kv: &'a CpuKv,
    pub layer: usize,
    pub q: &'a [f32],
    pub rows: &'a [AttentionRow<'a>],
    pub params: &'a AttentionParams,
    /// Query heads per kv head.
    pub group: usize,
    /// How positions are divided.
    pub division: Division,
    pub layout: HeadLayout,
}

/// Blocks and spans, which depend on the page's length alone.
#[derive(Clone, Copy)]
pub(super) struct Division {
    pub page_len: usize,
    /// Positions of a block; in pages longer than [`BLOCK`] the page's last one may be shorter.
    pub block: usize,
    /// Positions of a span.
    pub span: usize,
}

impl Division {
    fn new(page_len: usize) -> Division {
        let pages = VECTORS / page_len.div_ceil(16);
        let (block, unit) = if pages > 0 { (pages * page_len, pages * page_len) } else { (BLOCK, page_len) };
        Division { page_len, block, span: (SPAN / unit).max(1) * unit }
    }

    /// The block that holds a position.
    pub fn block(&self, position: usize) -> Range<usize> {
        if self.page_len <= self.block {
            let start = position - position % self.block;
            return start..start + self.block;
        }
        let page = position - position % self.page_len;
        let start = position - (position - page) % self.block;
        start..(start + self.block).min(page + self.page_len)
    }

    /// The pieces of some positions of a block, and how many there are.
    pub fn pieces(&self, positions: Range<usize>) -> ([Piece; VECTORS], usize) {
        let mut pieces = [Piece::default(); VECTORS];
        let (mut n, mut vector, mut first) = (0, 0, positions.start);
        while first < positions.end {
            let (page, offset) = (first / self.page_len, first % self.page_len);
            let len = WIDE.min(self.page_len - offset).min(positions.end - first);
            pieces[n] = Piece { page, offset, first, len, vector };
            (n, vector, first) = (n + 1, vector + len.div_ceil(16), first + len);
        }
        (pieces, n)
    }
}

/// Up to [`WIDE`] positions of one page.
#[derive(Clone, Copy, Default)]
pub(super) struct Piece {
    pub page: usize,
    pub offset: usize,
    /// First position and number of positions.
    pub first: usize,
    pub len: usize,
    /// First of its vectors in the block's weights.
    pub vector: usize,
}

/// Per query: the largest score, the sum of exponentials, and their weighted values (`dims / 16` vectors).
pub(super) struct Partial<'a> {
    pub max: &'a mut [f32],
    pub sum: &'a mut [f32],
    pub out: &'a mut [[f32; 16]],
}

/// The memory of one task.
struct Scratch {
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Vec<[f32; 16]>,
}

impl Scratch {
    fn new(queries: usize, dims: usize) -> Scratch {
        Scratch {
            max: vec![0.0; queries],
            sum: vec![0.0; queries],
            out: vec![[0.0; 16]; queries * dims / 16],
        }
    }

    fn part(&mut self) -> Partial<'_> {
        Partial { max: &mut self.max, sum: &mut self.sum, out: &mut self.out }
    }
}

/// `out[row] = softmax(scale · q[row] · Kᵀ) V` per head.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention(
    isa: Isa,
    pool: &ThreadPool,
    kv: &CpuKv,
    layer: usize,
    q: &[f32],
    rows: &[AttentionRow<'_>],
    params: &AttentionParams,
    out: &mut [f32],
) {
    let shape = kv.shape();
    let group = params.n_heads / shape.kv_heads;
    let width = params.n_heads * shape.head_dim;
    let (q, out) = (&q[..rows.len() * width], &mut out[..rows.len() * width]);
    let division = Division::new(shape.page_len);
    let call = Call { kv, layer, q, rows, params, group, division, layout: kv.layout() };
    let tasks = call.tasks();
    let spans: Vec<Range<usize>> = tasks.iter().map(|t| call.spans(t)).collect();
    let out = Shared(out.as_mut_ptr());
    if tasks.len() >= 3 * pool.threads() || pool.threads() == 1 || spans.iter().all(|s| s.len() <= 1) {
        pool.run(tasks.len(), &|t| {
            let (mut total, mut part) = (call.scratch(&tasks[t]), call.scratch(&tasks[t]));
            for span in spans[t].clone() {
                isa.run(Span { call: &call, task: &tasks[t], span, part: part.part() });
                isa.run(Merge { total: total.part(), part: part.part(), first: span == spans[t].start });
            }
            // SAFETY: tasks own disjoint rows and heads of `out`.
            unsafe { call.finish(&tasks[t], &total, &out) };
        });
        return;
    }
    // Long contexts of few rows: every span is a task, and then every task's parts are merged.
    let mut parts: Vec<Vec<Scratch>> =
        tasks.iter().zip(&spans).map(|(task, s)| s.clone().map(|_| call.scratch(task)).collect()).collect();
    let jobs: Vec<(usize, usize)> =
        spans.iter().enumerate().flat_map(|(t, s)| (0..s.len()).map(move |i| (t, i))).collect();
    let slots: Vec<Shared<Scratch>> = parts.iter_mut().map(|p| Shared(p.as_mut_ptr())).collect();
    pool.run(jobs.len(), &|job| {
        let (t, i) = jobs[job];
        // SAFETY: each part is one job's.
        let part = unsafe { &mut slots[t].slice(i, 1)[0] };
        isa.run(Span { call: &call, task: &tasks[t], span: spans[t].start + i, part: part.part() });
    });
    for (task, parts) in tasks.iter().zip(&mut parts) {
        let mut total = call.scratch(task);
        for (i, part) in parts.iter_mut().enumerate() {
            isa.run(Merge { total: total.part(), part: part.part(), first: i == 0 });
        }
        // SAFETY: no other thread is at work.
        unsafe { call.finish(task, &total, &out) };
    }
}

impl Call<'_> {
    fn tasks(&self) -> Vec<Task> {
        let most = (QUERIES / self.group).max(1);
        let same = |a: &AttentionRow<'_>, b: &AttentionRow<'_>| std::ptr::eq(a.pages, b.pages);
        let mut tasks = Vec::new();
        let mut start = 0;
        for run in self.rows.chunk_by(same) {
            let end = start + run.len();
            while start < end {
                let rows = start..(start + most).min(end);
                start = rows.end;
                tasks.extend(
                    (0..self.kv.shape().kv_heads).map(|kv_head| Task { rows: rows.clone(), kv_head }),
                );
            }
        }
        tasks
    }

    pub fn seen(&self, row: usize) -> Range<usize> {
        let row = &self.rows[row];
        first_visible(row.position, self.params.window) as usize..row.position as usize + 1
    }

    /// Positions that any row of the task sees.
    pub fn positions(&self, task: &Task) -> Range<usize> {
        let start = task.rows.clone().map(|r| self.seen(r).start).min().unwrap_or(0);
        let end = task.rows.clone().map(|r| self.seen(r).end).max().unwrap_or(0);
        start..end
    }

    fn spans(&self, task: &Task) -> Range<usize> {
        let positions = self.positions(task);
        positions.start / self.division.span..positions.end.div_ceil(self.division.span)
    }

    /// Keys and values of page `page` of the task's sequence.
    pub fn head(&self, task: &Task, page: usize) -> (&[u8], &[u8]) {
        let page = self.rows[task.rows.start].pages[page];
        self.kv.head(self.layer, page as usize, task.kv_head)
    }

    pub fn queries(&self, task: &Task) -> usize {
        task.rows.len() * self.group
    }

    fn scratch(&self, task: &Task) -> Scratch {
        Scratch::new(self.queries(task), self.layout.dims)
    }

    /// Where query `i` of a task stands, in `q` and in `out`.
    pub fn line(&self, task: &Task, i: usize) -> usize {
        let row = task.rows.start + i / self.group;
        let head = task.kv_head * self.group + i % self.group;
        (row * self.params.n_heads + head) * self.kv.shape().head_dim
    }

    /// # Safety
    /// No one else uses these rows and heads of `out`.
    unsafe fn finish(&self, task: &Task, total: &Scratch, out: &Shared<f32>) {
        let head_dim = self.kv.shape().head_dim;
        for (i, lines) in total.out.chunks_exact(self.layout.dims / 16).enumerate() {
            // SAFETY: the caller's promise.
            let out = unsafe { out.slice(self.line(task, i), head_dim) };
            let inverse = 1.0 / total.sum[i];
            for (out, x) in out.iter_mut().zip(lines.as_flattened()) {
                *out = x * inverse;
            }
        }
    }
}

/// Joins the results of one more span to those of the spans before.
struct Merge<'a> {
    total: Partial<'a>,
    part: Partial<'a>,
    first: bool,
}

impl Op for Merge<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Merge { total, part, first } = self;
        let per_query = total.out.len() / total.max.len().max(1);
        for i in 0..total.max.len() {
            let lines = i * per_query..(i + 1) * per_query;
            // Where nothing was seen, or nothing that is a number, the sum is 0 or NaN.
            if first {
                (total.max[i], total.sum[i]) = (part.max[i], part.sum[i]);
                total.out[lines.clone()].copy_from_slice(&part.out[lines]);
            } else if part.max[i] == f32::NEG_INFINITY {
                total.sum[i] += part.sum[i];
            } else if total.max[i] == f32::NEG_INFINITY {
                total.max[i] = part.max[i];
                total.sum[i] += part.sum[i];
                total.out[lines.clone()].copy_from_slice(&part.out[lines]);
            } else {
                let max = if part.max[i] > total.max[i] { part.max[i] } else { total.max[i] };
                let (a, b) =
                    (crate::ops::exp::exp(total.max[i] - max), crate::ops::exp::exp(part.max[i] - max));
                total.sum[i] = part.sum[i].mul_add(b, total.sum[i] * a);
                total.max[i] = max;
                for (total, part) in total.out[lines.clone()].iter_mut().zip(&part.out[lines]) {
                    let scaled = s.mul(s.load(total), s.splat(a));
                    s.store(s.fma(s.load(part), s.splat(b), scaled), total);
                }
            }
        }
    }
}
