//! Attention of some queries to the positions of one span.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::ops::Range;

use super::attention::{BLOCK, Call, Partial, Piece, Task, VECTORS, WIDE};
use super::kv::{Byte, Element, Halved, Keys, Single, Source, Values, Widened};
use super::simd::{Op, Simd, exp, tanh};
use crate::backend::KvType;

/// Up to so many queries, keys and values are widened at each use; beyond, once for all.
const FEW: usize = 4;

/// All blocks of one span for one task.
pub(super) struct Span<'a> {
    pub call: &'a Call<'a>,
    pub task: &'a Task,
    pub span: usize,
    pub part: Partial<'a>,
}

/// Scores, then weights, of one query and one block.
type Weights = [[f32; 16]; VECTORS];

impl Op for Span<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        for each_alone in [false, true] {
            match self.call.layout.ty {
                KvType::F32 => self.blocks::<S, Single>(s, each_alone),
                KvType::F16 => self.blocks::<S, Halved>(s, each_alone),
                KvType::Q8_0 => self.blocks::<S, Byte>(s, each_alone),
            }
            // Positions that a query does not see have weight 0, which makes no difference unless their values are infinite.
            if self.part.out.as_flattened().iter().all(|x| x.is_finite()) {
                break;
            }
        }
    }
}

/// How many queries meet a key or a value that is loaded once.
const fn most_queries<S: Simd>() -> usize {
    if S::FLOAT_ROWS == 1 || S::FEW_REGISTERS { 2 } else { 4 }
}

impl Span<'_> {
    /// With `each_alone` a query meets only the values that it sees.
    #[inline(always)]
    fn blocks<S: Simd, E: Element>(&mut self, s: S, each_alone: bool) {
        let (call, layout) = (self.call, self.call.layout);
        self.part.max.fill(f32::NEG_INFINITY);
        self.part.sum.fill(0.0);
        self.part.out.fill([0.0; 16]);
        let queries = call.queries(self.task);
        let mut weights: Vec<Weights> = vec![[[0.0; 16]; VECTORS]; queries];
        let wide = if queries > FEW { WIDE * layout.dims / 16 } else { 0 };
        let mut scratch = vec![[0.0; 16]; wide];
        let positions = call.positions(self.task);
        let until = positions.end.min((self.span + 1) * call.division.span);
        let mut position = positions.start.max(self.span * call.division.span);
        while position < until {
            let block = call.division.block(position);
            let (pieces, n) = call.division.pieces(block.start..block.end.min(until));
            let pieces = &pieces[..n];
            for piece in pieces {
                let (keys, values) = call.head(self.task, piece.page);
                // The page's values are needed a few microseconds later.
                prefetch(s, values);
                let vectors = piece.len.div_ceil(16);
                let keys = Keys::<E>::new(layout, keys, piece.offset, vectors);
                // SAFETY: the keys have `dims` lines of so many vectors.
                unsafe {
                    if queries > FEW {
                        let keys = Widened::fill(s, &keys, layout.dims, vectors, &mut scratch);
                        self.scores(s, &keys, piece, &mut weights);
                    } else {
                        self.scores(s, &keys, piece, &mut weights);
                    }
                }
            }
            self.softmax(s, pieces, &mut weights);
            if block.end < until {
                for page in block.end / call.division.page_len
                    ..=(until - 1).min(block.end + BLOCK) / call.division.page_len
                {
                    prefetch(s, call.head(self.task, page).0);
                }
            }
            for piece in pieces {
                let (_, values) = call.head(self.task, piece.page);
                let values = Values::<E>::new(layout, values, piece.offset, piece.len);
                // SAFETY: the values have `len` lines of `dims` numbers.
                unsafe {
                    if queries > FEW {
                        let values = Widened::fill(s, &values, piece.len, layout.dims / 16, &mut scratch);
                        self.weigh(s, &values, piece, &weights, each_alone);
                    } else {
                        self.weigh(s, &values, piece, &weights, each_alone);
                    }
                }
            }
            position = block.end;
        }
    }

    /// `weights[query][piece.vector + n]` = q · k of 16 positions.
    ///
    /// # Safety
    /// The keys have a line per dimension and all vectors of the piece.
    #[inline(always)]
    unsafe fn scores<S: Simd>(&self, s: S, keys: &impl Source, piece: &Piece, weights: &mut [Weights]) {
        let queries = weights.len();
        let most = most_queries::<S>();
        let two = piece.len > 16;
        let mut i = 0;
        while i < queries {
            let m = match (queries - i).min(most) {
                4 => 4,
                2 | 3 => 2,
                _ => 1,
            };
            // SAFETY: the caller's promise.
            unsafe {
                match (m, two) {
                    (4, true) => self.score_tile::<S, 4, 2>(s, keys, i, piece.vector, weights),
                    (4, false) => self.score_tile::<S, 4, 1>(s, keys, i, piece.vector, weights),
                    (2, true) => self.score_tile::<S, 2, 2>(s, keys, i, piece.vector, weights),
                    (2, false) => self.score_tile::<S, 2, 1>(s, keys, i, piece.vector, weights),
                    (_, true) => self.score_tile::<S, 1, 2>(s, keys, i, piece.vector, weights),
                    (_, false) => self.score_tile::<S, 1, 1>(s, keys, i, piece.vector, weights),
                }
            }
            i += m;
        }
    }

    /// # Safety
    /// See [`Span::scores`].
    #[inline(always)]
    unsafe fn score_tile<S: Simd, const M: usize, const N: usize>(
        &self,
        s: S,
        keys: &impl Source,
        first: usize,
        vector: usize,
        weights: &mut [Weights],
    ) {
        let head_dim = self.call.kv.shape().head_dim;
        let mut q: [&[f32]; M] = [&[]; M];
        for (m, q) in q.iter_mut().enumerate() {
            *q = &self.call.q[self.call.line(self.task, first + m)..][..head_dim];
        }
        let mut acc = [[s.splat(0.0); N]; M];
        for d in 0..head_dim {
            let mut k = [s.splat(0.0); N];
            for n in 0..N {
                // SAFETY: the caller's promise.
                k[n] = unsafe { keys.vector(s, d, n) };
            }
            for m in 0..M {
                // SAFETY: every line of `q` has `head_dim` numbers.
                let x = s.splat(unsafe { *q[m].get_unchecked(d) });
                for n in 0..N {
                    acc[m][n] = s.fma(x, k[n], acc[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                s.store(acc[m][n], &mut weights[first + m][vector + n]);
            }
        }
    }

    /// Scores become weights relative to the new maximum; sum and output are scaled to it.
    #[inline(always)]
    fn softmax<S: Simd>(&mut self, s: S, pieces: &[Piece], weights: &mut [Weights]) {
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
            let mut largest = lowest;
            for piece in pieces {
                let used = piece.first..piece.first + piece.len;
                for (n, from) in used.clone().step_by(16).enumerate() {
                    let weights = &mut weights[piece.vector + n];
                    let mut score = s.mul(s.load(weights), scale);
                    if let Some(cap) = call.params.softcap {
                        let cap = s.splat(cap);
                        score = s.mul(cap, tanh(s, s.div(score, cap)));
                    }
                    if seen.start > from || seen.end < from + 16 || used.end < from + 16 {
                        // Relative to the vector, so that they are exact as floats.
                        let low = seen.start.saturating_sub(from) as f32;
                        let high = seen.end.min(used.end).saturating_sub(from) as f32;
                        score = s.select_gt(s.splat(high), lanes, score, lowest);
                        score = s.select_gt(s.splat(low), lanes, lowest, score);
                    }
                    s.store(score, weights);
                    largest = s.max(score, largest);
                }
            }
            let vectors = pieces.last().map_or(0, |p| p.vector + p.len.div_ceil(16));
            let max = s.largest(largest).max(self.part.max[i]);
            if max == f32::NEG_INFINITY {
                // Nothing of it seen so far, or nothing that is a number.
                if weights[..vectors].as_flattened().iter().any(|score| score.is_nan()) {
                    self.part.sum[i] = f32::NAN;
                }
                *weights = [[0.0; 16]; VECTORS];
                continue;
            }
            let shift = s.splat(max);
            let mut sum = s.splat(0.0);
            for weights in &mut weights[..vectors] {
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
    ///
    /// # Safety
    /// The values have a line per position of the piece.
    #[inline(always)]
    unsafe fn weigh<S: Simd>(
        &mut self,
        s: S,
        values: &impl Source,
        piece: &Piece,
        weights: &[Weights],
        each_alone: bool,
    ) {
        let all = 0..piece.len;
        let most = most_queries::<S>();
        let mut i = 0;
        while i < weights.len() {
            // SAFETY: the caller's promise.
            i += unsafe {
                match (weights.len() - i).min(most) {
                    _ if each_alone => {
                        let seen = self.call.seen(self.task.rows.start + i / self.call.group);
                        let within = |at: usize| at.saturating_sub(piece.first).min(piece.len);
                        self.weigh_rows::<S, 1>(
                            s,
                            i,
                            weights,
                            values,
                            piece,
                            within(seen.start)..within(seen.end),
                        )
                    }
                    4 => self.weigh_rows::<S, 4>(s, i, weights, values, piece, all.clone()),
                    2 | 3 => self.weigh_rows::<S, 2>(s, i, weights, values, piece, all.clone()),
                    _ => self.weigh_rows::<S, 1>(s, i, weights, values, piece, all.clone()),
                }
            };
        }
    }

    /// # Safety
    /// See [`Span::weigh`].
    #[inline(always)]
    unsafe fn weigh_rows<S: Simd, const M: usize>(
        &mut self,
        s: S,
        first: usize,
        weights: &[Weights],
        values: &impl Source,
        piece: &Piece,
        positions: Range<usize>,
    ) -> usize {
        let per_query = self.call.layout.dims / 16;
        let mut p: [&[f32]; M] = [&[]; M];
        for m in 0..M {
            p[m] = &weights[first + m][piece.vector..].as_flattened()[..piece.len];
        }
        let mut d = 0;
        // SAFETY: the caller's promise, and columns below `per_query`.
        unsafe {
            while d + 4 <= per_query {
                self.weigh_tile::<S, M, 4>(s, first, d, p, values, positions.clone());
                d += 4;
            }
            while d < per_query {
                self.weigh_tile::<S, M, 1>(s, first, d, p, values, positions.clone());
                d += 1;
            }
        }
        M
    }

    /// # Safety
    /// See [`Span::weigh`]; columns `d .. d + D` exist, and `positions` in every line of `p`.
    #[inline(always)]
    unsafe fn weigh_tile<S: Simd, const M: usize, const D: usize>(
        &mut self,
        s: S,
        first: usize,
        d: usize,
        p: [&[f32]; M],
        values: &impl Source,
        positions: Range<usize>,
    ) {
        let per_query = self.call.layout.dims / 16;
        let mut acc = [[s.splat(0.0); D]; M];
        for m in 0..M {
            for j in 0..D {
                acc[m][j] = s.load(&self.part.out[(first + m) * per_query + d + j]);
            }
        }
        for position in positions {
            let mut v = [s.splat(0.0); D];
            for j in 0..D {
                // SAFETY: the caller's promise.
                v[j] = unsafe { values.vector(s, position, d + j) };
            }
            for m in 0..M {
                // SAFETY: the caller's promise.
                let weight = s.splat(unsafe { *p[m].get_unchecked(position) });
                for j in 0..D {
                    acc[m][j] = s.fma(weight, v[j], acc[m][j]);
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

/// Fetches all of `bytes` ahead of its use.
#[inline(always)]
fn prefetch<S: Simd>(s: S, bytes: &[u8]) {
    for line in (0..bytes.len()).step_by(64) {
        s.prefetch(bytes[line..].as_ptr());
    }
}
