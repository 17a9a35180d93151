//! Activation rows quantized for the integer tiles.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::borrow::Cow;
use std::mem::MaybeUninit;

use super::simd::{Op, Simd};
use super::{Isa, ThreadPool};
use crate::quant::Q8Block;

/// How rows are dealt to tiles: as evenly as the largest tile allows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tiles {
    rows: usize,
    count: usize,
}

impl Tiles {
    /// Tiles of at most `largest` rows.
    pub fn new(rows: usize, largest: usize) -> Tiles {
        Tiles { rows, count: rows.div_ceil(largest) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of tiles.
    pub fn count(&self) -> usize {
        self.count
    }

    /// First row of tile `t`; of `count` it is the number of rows.
    pub fn start(&self, t: usize) -> usize {
        t * (self.rows / self.count) + t.min(self.rows % self.count)
    }

    /// The tile of a row.
    fn of(&self, row: usize) -> usize {
        let (least, longer) = (self.rows / self.count, self.rows % self.count);
        let in_longer = row / (least + 1);
        if in_longer < longer { in_longer } else { (row - longer) / least }
    }

    /// Where a row stands among lines of `columns`, interleaved within each tile.
    pub fn place(&self, row: usize, columns: usize) -> Interleaved {
        let tile = self.of(row);
        let start = self.start(tile);
        Interleaved { start, step: self.start(tile + 1) - start, at: row - start, columns }
    }
}

/// Values that a task quantizes at least: fewer are done sooner than another thread.
const TASK_VALUES: usize = 4096;

/// Rows of [`Q8Block`]s, interleaved within each tile of `m` rows: `q[k / 4][row]` are four codes,
/// `scales[k / 32][row]`, `sums[k / 16][row]`. A tile's step then reads its
/// operands from consecutive addresses. Tile `t` starts at `start(t) · columns / n`.
pub(crate) struct Activations<'a> {
    pub tiles: Tiles,
    pub columns: usize,
    pub q: Cow<'a, [[i8; 4]]>,
    pub scales: Cow<'a, [f32]>,
    pub sums: Cow<'a, [i32]>,
}

/// A pointer that tasks share, each for a part of its own.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub *mut T);
// SAFETY: whoever dereferences it states why its part is nobody else's.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// They exist, and nobody else uses them at the same time.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice<'a>(&self, start: usize, len: usize) -> &'a mut [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }

    /// The same to read.
    ///
    /// # Safety
    /// They exist, and nobody writes to them any more.
    pub unsafe fn view<'a>(&self, start: usize, len: usize) -> &'a [T] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.0.add(start), len) }
    }
}

impl Activations<'_> {
    /// Quantizes `rows` lines of `columns`, which are a multiple of 32, for tiles of at most `largest` rows.
    pub fn new(isa: Isa, pool: &ThreadPool, x: &[f32], columns: usize, rows: usize, largest: usize) -> Self {
        // Else blocks at the ends of rows would stay unwritten.
        assert!(columns.is_multiple_of(Q8Block::LEN), "whole blocks");
        let x = &x[..rows * columns];
        let tiles = Tiles::new(rows, largest);
        let mut q = Vec::with_capacity(rows * columns / 4);
        let mut scales = Vec::with_capacity(rows * columns / 32);
        let mut sums = Vec::with_capacity(rows * columns / 16);
        let parts = (
            Shared(q.spare_capacity_mut().as_mut_ptr()),
            Shared(scales.spare_capacity_mut().as_mut_ptr()),
            Shared(sums.spare_capacity_mut().as_mut_ptr()),
        );
        // A task is some tiles, or a part of a tile's blocks where there are fewer tiles than threads.
        let blocks = columns / Q8Block::LEN;
        let parts_of_tile = (rows * columns / (TASK_VALUES * tiles.count().max(1)))
            .clamp(1, pool.threads().div_ceil(tiles.count().max(1)))
            .min(blocks.max(1));
        let step = (TASK_VALUES * tiles.count() / (rows * columns).max(1)).max(1);
        pool.run(tiles.count().div_ceil(step) * parts_of_tile, &|task| {
            let parts = &parts;
            let first = task / parts_of_tile * step;
            let part = task % parts_of_tile;
            let (from, to) = (part * blocks / parts_of_tile, (part + 1) * blocks / parts_of_tile);
            for t in first..(first + step).min(tiles.count()) {
                let (start, end) = (tiles.start(t), tiles.start(t + 1));
                let m = end - start;
                // SAFETY: tiles are disjoint ranges of rows, parts of blocks, and each is visited once.
                let (q, scales, sums) = unsafe {
                    (
                        parts.0.slice((start * blocks + from * m) * 8, (to - from) * m * 8),
                        parts.1.slice(start * blocks + from * m, (to - from) * m),
                        parts.2.slice((start * blocks + from * m) * 2, (to - from) * m * 2),
                    )
                };
                isa.run(Quantize {
                    x: &x[start * columns..end * columns],
                    columns,
                    from,
                    rows: m,
                    q,
                    scales,
                    sums,
                });
            }
        });
        // SAFETY: every tile has written its part, and the tiles are all rows.
        unsafe {
            q.set_len(rows * columns / 4);
            scales.set_len(rows * columns / 32);
            sums.set_len(rows * columns / 16);
        }
        Activations { tiles, columns, q: q.into(), scales: scales.into(), sums: sums.into() }
    }

    /// Some rows, for tiles of at most `largest` rows. A row that is a tile of its own is not copied.
    pub fn select(&self, rows: &[u32], largest: usize) -> Activations<'_> {
        let (columns, n) = (self.columns, rows.len());
        let tiles = Tiles::new(n, largest);
        if let Some(row) = self.lone(rows) {
            let of = |unit: usize| row * columns / unit..(row + 1) * columns / unit;
            let (q, scales, sums) = (&self.q[of(4)], &self.scales[of(32)], &self.sums[of(16)]);
            return Activations { tiles, columns, q: q.into(), scales: scales.into(), sums: sums.into() };
        }
        let mut q = vec![[0; 4]; n * columns / 4];
        let mut scales = vec![0.0; n * columns / 32];
        let mut sums = vec![0; n * columns / 16];
        for (place, row) in rows.iter().enumerate() {
            let (from, to) = (self.tiles.place(*row as usize, columns), tiles.place(place, columns));
            from.copy(4, &self.q, to, &mut q);
            from.copy(32, &self.scales, to, &mut scales);
            from.copy(16, &self.sums, to, &mut sums);
        }
        Activations { tiles, columns, q: q.into(), scales: scales.into(), sums: sums.into() }
    }

    /// The one row of a list, if every row is a tile of its own.
    pub fn lone(&self, rows: &[u32]) -> Option<usize> {
        match rows {
            [row] if self.tiles.count == self.tiles.rows => Some(*row as usize),
            _ => None,
        }
    }

    /// What a tile's accumulators start from, or what minima are multiplied with, per group of
    /// `group` columns and row: `−zero · Σ q` as integers, or `−(scale · Σ q)` as the bits of floats.
    pub fn offsets(&self, group: usize, offset: Offset) -> Vec<i32> {
        let halves = group / 16;
        let mut out = vec![0; self.sums.len() / halves];
        for t in 0..self.tiles.count() {
            let (start, end) = (self.tiles.start(t), self.tiles.start(t + 1));
            let (m, per_row) = (end - start, self.columns / 16);
            let sums = &self.sums[start * per_row..end * per_row];
            let scales = &self.scales[start * per_row / 2..];
            let out = &mut out[start * per_row / halves..];
            for (g, sums) in sums.chunks_exact(m * halves).enumerate() {
                for r in 0..m {
                    let sum: i32 = (0..halves).map(|h| sums[h * m + r]).sum();
                    out[g * m + r] = match offset {
                        Offset::Zero(zero) => -zero * sum,
                        Offset::Min => (-(scales[g * group / 32 * m + r] * sum as f32)).to_bits() as i32,
                    };
                }
            }
        }
        out
    }
}

/// One row of a tile: the tile's first row, its number of rows, and which of them.
#[derive(Clone, Copy)]
pub(crate) struct Interleaved {
    start: usize,
    step: usize,
    at: usize,
    columns: usize,
}

impl Interleaved {
    /// Copies what there is one of for each `unit` columns.
    pub fn copy<T: Copy>(self, unit: usize, from: &[T], to: Interleaved, into: &mut [T]) {
        let n = self.columns / unit;
        let from = from[self.start * n..][..self.step * n].chunks_exact(self.step);
        let into = into[to.start * n..][..to.step * n].chunks_exact_mut(to.step);
        into.zip(from).for_each(|(into, from)| into[to.at] = from[self.at]);
    }
}

/// See [`Activations::offsets`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Offset {
    /// The format's code of weight 0.
    Zero(i32),
    /// The format has minima.
    Min,
}

/// Some blocks of one tile by [`Q8Block::quantize`], with vectors. Writes all of the last three.
struct Quantize<'a> {
    x: &'a [f32],
    columns: usize,
    /// The first of the blocks.
    from: usize,
    rows: usize,
    q: &'a mut [MaybeUninit<[i8; 4]>],
    scales: &'a mut [MaybeUninit<f32>],
    sums: &'a mut [MaybeUninit<i32>],
}

impl Op for Quantize<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let m = self.rows;
        // Block by block and not row by row: what is written lies together.
        let outputs = self.q.chunks_exact_mut(8 * m).zip(self.scales.chunks_exact_mut(m));
        for (b, ((q, scales), sums)) in outputs.zip(self.sums.chunks_exact_mut(2 * m)).enumerate() {
            for r in 0..m {
                let (halves, _) = self.x[r * self.columns + (self.from + b) * Q8Block::LEN..][..Q8Block::LEN]
                    .as_chunks::<16>();
                let (low, high) = (s.load(&halves[0]), s.load(&halves[1]));
                let magnitude = s.splat_i(0x7fff_ffff);
                let largest = s.max_i(s.and(s.bits(low), magnitude), s.and(s.bits(high), magnitude));
                // As integers, so that no NaN is lost.
                let amax = f32::from_bits(s.largest_i(largest) as u32);
                let scale = amax / 127.0;
                let usable = amax.is_finite() && scale >= f32::MIN_POSITIVE;
                let mut codes = [[0i8; 16]; 2];
                if usable {
                    let inverse = s.splat(127.0 / amax);
                    s.store_i8(s.mul(low, inverse), &mut codes[0]);
                    s.store_i8(s.mul(high, inverse), &mut codes[1]);
                }
                scales[r].write(match (amax.is_finite(), usable) {
                    (false, _) => f32::NAN,
                    (true, false) => 0.0,
                    (true, true) => scale,
                });
                for (h, codes) in codes.iter().enumerate() {
                    let mut sum = 0;
                    for q in codes {
                        sum += i32::from(*q);
                    }
                    sums[h * m + r].write(sum);
                    for (i, four) in codes.as_chunks::<4>().0.iter().enumerate() {
                        q[(4 * h + i) * m + r].write(*four);
                    }
                }
            }
        }
    }
}
