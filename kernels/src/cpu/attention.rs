//! Attention in tiles with an online softmax (source: Milakov and Gimelshein, arXiv 1805.02867;
//! Dao et al., arXiv 2205.14135).
//!
//! Positions are divided by their number alone, never by who asks: pages into blocks of [`BLOCK`], all
//! positions into spans of whole pages, about [`SPAN`] positions each. A query's maximum, sum and output are updated block after
//! block within a span, and the spans' results are merged in order. So a row's bits depend
//! neither on its batch nor on which thread took which span.
//!
//! Error against exact arithmetic on the cached values, for weights p and n visible positions: scores to
//! `(dims + 3) · 2⁻²⁴ · scale · Σ |q·k|`, which the exponential carries over to p relatively, and the sums to
//! `(n + 2 · blocks + 8) · 2⁻²⁴ · Σ p |v|`.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::activations::Shared;
use super::kv::{CpuKv, HeadLayout};
use super::simd::{Op, Simd, exp, tanh};
use super::{Isa, ThreadPool};
use crate::backend::{AttentionParams, AttentionRow};
use crate::ops::attention::first_visible;

/// Positions at a time: keys and values of 128 dimensions, widened, are 16 KiB each.
const BLOCK: usize = 32;
/// Positions of a part that one thread may do alone.
const SPAN: usize = 512;
/// Queries (rows × heads of one kv head) that share widened keys and values at most.
const QUERIES: usize = 64;

/// Rows of one sequence that follow each other, on one kv head.
struct Task {
    rows: Range<usize>,
    kv_head: usize,
}

/// What is the same for all tasks.
struct Call<'a> {
    kv: &'a CpuKv,
    layer: usize,
    q: &'a [f32],
    rows: &'a [AttentionRow<'a>],
    params: &'a AttentionParams,
    /// Query heads per kv head.
    group: usize,
    /// Positions of a span.
    span: usize,
    layout: HeadLayout,
}

/// Per query: the largest score, the sum of exponentials, and their weighted values (`dims / 16` vectors).
struct Partial<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    out: &'a mut [[f32; 16]],
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
    let span = (SPAN / shape.page_len).max(1) * shape.page_len;
    let call = Call { kv, layer, q, rows, params, group, span, layout: kv.layout() };
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

    fn seen(&self, row: usize) -> Range<usize> {
        let row = &self.rows[row];
        first_visible(row.position, self.params.window) as usize..row.position as usize + 1
    }

    /// Positions that any row of the task sees.
    fn positions(&self, task: &Task) -> Range<usize> {
        let start = task.rows.clone().map(|r| self.seen(r).start).min().unwrap_or(0);
        let end = task.rows.clone().map(|r| self.seen(r).end).max().unwrap_or(0);
        start..end
    }

    fn spans(&self, task: &Task) -> Range<usize> {
        let positions = self.positions(task);
        positions.start / self.span..positions.end.div_ceil(self.span)
    }

    fn queries(&self, task: &Task) -> usize {
        task.rows.len() * self.group
    }

    fn scratch(&self, task: &Task) -> Scratch {
        Scratch::new(self.queries(task), self.layout.dims)
    }

    /// Where query `i` of a task stands, in `q` and in `out`.
    fn line(&self, task: &Task, i: usize) -> usize {
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

/// All blocks of one span for one task.
struct Span<'a> {
    call: &'a Call<'a>,
    task: &'a Task,
    span: usize,
    part: Partial<'a>,
}

impl Op for Span<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let (call, layout) = (self.call, self.call.layout);
        let page_len = call.kv.shape().page_len;
        self.part.max.fill(f32::NEG_INFINITY);
        self.part.sum.fill(0.0);
        self.part.out.fill([0.0; 16]);
        let mut keys = vec![[[0.0; 16]; 2]; layout.dims];
        let mut values = vec![[0.0; 16]; BLOCK * layout.dims / 16];
        let mut weights = vec![[[0.0; 16]; 2]; call.queries(self.task)];
        let positions = call.positions(self.task);
        let until = positions.end.min((self.span + 1) * call.span);
        let mut position = positions.start.max(self.span * call.span);
        // Blocks start at multiples of BLOCK from their page's start.
        position -= position % page_len % BLOCK;
        while position < until {
            let (page, offset) = (position / page_len, position % page_len);
            let end = position + BLOCK.min(page_len - offset);
            let used = position..end.min(until);
            let (k, v) = call.kv.head(
                call.layer,
                call.rows[self.task.rows.start].pages[page] as usize,
                self.task.kv_head,
            );
            let vectors = used.len().div_ceil(16);
            layout.keys(s, k, offset, vectors, &mut keys);
            layout.values(s, v, offset, &mut values[..used.len() * layout.dims / 16]);
            self.scores(s, &keys, vectors, &mut weights);
            self.softmax(s, used.clone(), vectors, &mut weights);
            self.weigh(s, &weights, &values, used.len());
            position = end;
        }
    }
}

impl Span<'_> {
    /// `weights[query][n]` = q · k of 16 positions.
    #[inline(always)]
    fn scores<S: Simd>(&self, s: S, keys: &[[[f32; 16]; 2]], vectors: usize, weights: &mut [[[f32; 16]; 2]]) {
        let queries = weights.len();
        let most = if S::FLOAT_ROWS >= 4 { 4 } else { 2 };
        let mut i = 0;
        while i < queries {
            let m = match (queries - i).min(most) {
                4 => 4,
                2 | 3 => 2,
                _ => 1,
            };
            match (m, vectors) {
                (4, 2) => self.score_tile::<S, 4, 2>(s, keys, i, weights),
                (4, _) => self.score_tile::<S, 4, 1>(s, keys, i, weights),
                (2, 2) => self.score_tile::<S, 2, 2>(s, keys, i, weights),
                (2, _) => self.score_tile::<S, 2, 1>(s, keys, i, weights),
                (_, 2) => self.score_tile::<S, 1, 2>(s, keys, i, weights),
                (_, _) => self.score_tile::<S, 1, 1>(s, keys, i, weights),
            }
            i += m;
        }
    }

    #[inline(always)]
    fn score_tile<S: Simd, const M: usize, const N: usize>(
        &self,
        s: S,
        keys: &[[[f32; 16]; 2]],
        first: usize,
        weights: &mut [[[f32; 16]; 2]],
    ) {
        let head_dim = self.call.kv.shape().head_dim;
        let mut q: [&[f32]; M] = [&[]; M];
        for (m, q) in q.iter_mut().enumerate() {
            *q = &self.call.q[self.call.line(self.task, first + m)..][..head_dim];
        }
        let mut acc = [[s.splat(0.0); N]; M];
        for (d, keys) in keys[..head_dim].iter().enumerate() {
            for m in 0..M {
                let x = s.splat(q[m][d]);
                for n in 0..N {
                    acc[m][n] = s.fma(x, s.load(&keys[n]), acc[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                s.store(acc[m][n], &mut weights[first + m][n]);
            }
        }
    }

    /// Scores become weights relative to the new maximum; sum and output are scaled to it.
    #[inline(always)]
    fn softmax<S: Simd>(&mut self, s: S, used: Range<usize>, vectors: usize, weights: &mut [[[f32; 16]; 2]]) {
        let call = self.call;
        let per_query = call.layout.dims / 16;
        let scale = s.splat(call.params.scale);
        let lowest = s.splat(f32::NEG_INFINITY);
        let mut lanes = [0.0; 16];
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane = l as f32;
        }
        let lanes = s.load(&lanes);
        for (i, weights) in weights.iter_mut().enumerate() {
            let seen = call.seen(self.task.rows.start + i / call.group);
            // Relative to the block, so that they are exact as floats.
            let low = seen.start.saturating_sub(used.start) as f32;
            let high = seen.end.min(used.end).saturating_sub(used.start) as f32;
            let mut largest = lowest;
            for n in 0..vectors {
                let mut score = s.mul(s.load(&weights[n]), scale);
                if let Some(cap) = call.params.softcap {
                    let cap = s.splat(cap);
                    score = s.mul(cap, tanh(s, s.div(score, cap)));
                }
                let position = s.add(lanes, s.splat(16.0 * n as f32));
                score = s.select_gt(s.splat(high), position, score, lowest);
                score = s.select_gt(s.splat(low), position, lowest, score);
                s.store(score, &mut weights[n]);
                largest = s.max(score, largest);
            }
            let max = s.largest(largest).max(self.part.max[i]);
            if max == f32::NEG_INFINITY {
                // Nothing of it seen so far.
                *weights = [[0.0; 16]; 2];
                continue;
            }
            let shift = s.splat(max);
            let mut sum = s.splat(0.0);
            for weights in weights[..vectors].iter_mut() {
                let p = exp(s, s.sub(s.load(weights), shift));
                sum = s.add(sum, p);
                s.store(p, weights);
            }
            if max != self.part.max[i] {
                let factor = crate::ops::exp::exp(self.part.max[i] - max);
                self.part.sum[i] *= factor;
                for out in &mut self.part.out[i * per_query..(i + 1) * per_query] {
                    s.store(s.mul(s.load(out), s.splat(factor)), out);
                }
                self.part.max[i] = max;
            }
            self.part.sum[i] += s.fold(sum);
        }
    }

    /// Adds the weighted values.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, s: S, weights: &[[[f32; 16]; 2]], values: &[[f32; 16]], n: usize) {
        let most = if S::FLOAT_ROWS >= 4 { 4 } else { 2 };
        let mut i = 0;
        while i < weights.len() {
            i += match (weights.len() - i).min(most) {
                4 => self.weigh_rows::<S, 4>(s, i, weights, values, n),
                2 | 3 => self.weigh_rows::<S, 2>(s, i, weights, values, n),
                _ => self.weigh_rows::<S, 1>(s, i, weights, values, n),
            };
        }
    }

    #[inline(always)]
    fn weigh_rows<S: Simd, const M: usize>(
        &mut self,
        s: S,
        first: usize,
        weights: &[[[f32; 16]; 2]],
        values: &[[f32; 16]],
        n: usize,
    ) -> usize {
        let per_query = self.call.layout.dims / 16;
        let mut d = 0;
        while d + 4 <= per_query {
            self.weigh_tile::<S, M, 4>(s, first, d, weights, values, n);
            d += 4;
        }
        while d < per_query {
            self.weigh_tile::<S, M, 1>(s, first, d, weights, values, n);
            d += 1;
        }
        M
    }

    #[inline(always)]
    fn weigh_tile<S: Simd, const M: usize, const D: usize>(
        &mut self,
        s: S,
        first: usize,
        d: usize,
        weights: &[[[f32; 16]; 2]],
        values: &[[f32; 16]],
        n: usize,
    ) {
        let per_query = self.call.layout.dims / 16;
        let mut acc = [[s.splat(0.0); D]; M];
        for m in 0..M {
            for j in 0..D {
                acc[m][j] = s.load(&self.part.out[(first + m) * per_query + d + j]);
            }
        }
        let weights = &weights[first..first + M];
        for (p, values) in values[..n * per_query].chunks_exact(per_query).enumerate() {
            let values = &values[d..d + D];
            for m in 0..M {
                let weight = s.splat(weights[m][p / 16][p % 16]);
                for j in 0..D {
                    acc[m][j] = s.fma(weight, s.load(&values[j]), acc[m][j]);
                }
            }
        }
        for m in 0..M {
            for j in 0..D {
                s.store(acc[m][j], &mut self.part.out[(first + m) * per_query + d + j]);
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
            if first || total.max[i] == f32::NEG_INFINITY {
                (total.max[i], total.sum[i]) = (part.max[i], part.sum[i]);
                total.out[lines.clone()].copy_from_slice(&part.out[lines]);
            } else if part.max[i] != f32::NEG_INFINITY {
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
