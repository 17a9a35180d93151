//! The integer kernel for few activation rows: weights go from memory to the dot product in registers.
//!
//! With few rows a panel in between would cost more than it saves: its stores alone
//! take as long as the unpacking. Bits are those of the tile, since the order of a lane is the same.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;

use super::activations::Activations;
use super::panel::{PanelBlock, ROWS, Sink};
use super::simd::{Op, Simd};
use super::source::Source;

/// The way through the weights.
#[derive(Clone, Copy)]
pub(crate) struct Walk {
    /// How many panels of sixteen rows.
    pub panels: usize,
    /// What [`Source::advance`] takes from one to the next.
    pub bytes: usize,
    /// Bytes of a row, from each to what is fetched ahead; 0: nothing is.
    pub ahead: usize,
    /// Accumulators from one activation row's to the next one's.
    pub acc_stride: usize,
}

/// Some panels of sixteen weight rows × one tile of activations, over all columns.
///
/// Where the columns are few, a call for each panel would cost as much as the panel.
pub(crate) struct Direct<'a, B, R, const MIN: bool, const WIDE: bool> {
    /// The first block of each row of the first panel.
    pub from: R,
    /// How to go on from there.
    pub walk: Walk,
    /// The right-hand side.
    pub x: &'a Activations,
    /// From [`Activations::offsets`].
    pub offsets: &'a [i32],
    /// Which tile of it; at most [`Simd::DIRECT_ROWS`] rows.
    pub tile: usize,
    /// Receives `acc[row · acc_stride + panel]`.
    pub acc: *mut [f32; ROWS],
    /// The format.
    pub block: PhantomData<B>,
}

impl<B: PanelBlock, R: Source, const MIN: bool, const WIDE: bool> Op for Direct<'_, B, R, MIN, WIDE> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.x.tiles.start(self.tile + 1) - self.x.tiles.start(self.tile) {
            1 => self.tile::<S, 1>(s),
            2 => self.tile::<S, 2>(s),
            3 if S::DIRECT_ROWS >= 3 => self.tile::<S, 3>(s),
            4 if S::DIRECT_ROWS >= 4 => self.tile::<S, 4>(s),
            5 if S::DIRECT_ROWS >= 5 => self.tile::<S, 5>(s),
            6 if S::DIRECT_ROWS >= 6 => self.tile::<S, 6>(s),
            7 if S::DIRECT_ROWS >= 7 => self.tile::<S, 7>(s),
            8 if S::DIRECT_ROWS >= 8 => self.tile::<S, 8>(s),
            rows => unreachable!("{rows} rows"),
        }
    }
}

impl<B: PanelBlock, R: Source, const MIN: bool, const WIDE: bool> Direct<'_, B, R, MIN, WIDE> {
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(self, s: S) {
        let (columns, start) = (self.x.columns, self.x.tiles.start(self.tile));
        let q = self.x.q[start * columns / 4..][..M * columns / 4].as_ptr();
        let scales = self.x.scales[start * columns / 32..][..M * columns / 32].as_ptr();
        let offsets = self.offsets[start * columns / B::GROUP..][..M * columns / B::GROUP].as_ptr();
        let (blocks, walk) = (columns / B::LEN, self.walk);
        let mut panel = self.from;
        for p in 0..walk.panels {
            let mut dot = Dot::<S, M, MIN, WIDE> { acc: [s.splat(0.0); M], q, scales, offsets, odd: false };
            let mut ahead = Ahead::new(panel, walk.ahead, blocks, size_of::<B>());
            let mut from = panel;
            for _ in 0..blocks {
                ahead.step(s);
                // SAFETY: the caller's rows have so many blocks.
                unsafe { B::unpack(s, &from, &mut dot) };
                from.advance(size_of::<B>());
            }
            for m in 0..M {
                // SAFETY: the caller's accumulators.
                s.store(dot.acc[m], unsafe { &mut *self.acc.add(m * walk.acc_stride + p) });
            }
            panel.advance(walk.bytes);
        }
    }
}

/// Prefetches in the order of use, a share with each block, so that all lines are asked for equally early. In the order
/// of memory, the last row's would come just before they are used.
struct Ahead<R> {
    from: R,
    /// Lines per block, rounded up.
    per_block: usize,
    left: usize,
    row: usize,
    offset: usize,
}

impl<R: Source> Ahead<R> {
    /// Fetches what lies `distance` bytes ahead in each row, for `blocks` blocks of `size` bytes; nothing for 0.
    #[inline(always)]
    fn new(from: R, distance: usize, blocks: usize, size: usize) -> Ahead<R> {
        let left = if distance == 0 { 0 } else { ROWS * (blocks * size).div_ceil(64) };
        Ahead { from, per_block: left.div_ceil(blocks.max(1)), left, row: 0, offset: distance }
    }

    /// The share of one block.
    #[inline(always)]
    fn step<S: Simd>(&mut self, s: S) {
        let n = self.per_block.min(self.left);
        self.left -= n;
        for _ in 0..n {
            s.prefetch(self.from.ahead(self.row, self.offset));
            self.row += 1;
            if self.row == ROWS {
                (self.row, self.offset) = (0, self.offset + 64);
            }
        }
    }
}

/// Multiplies groups as they come.
struct Dot<S: Simd, const M: usize, const MIN: bool, const WIDE: bool> {
    acc: [S::F; M],
    q: *const [i8; 4],
    scales: *const f32,
    offsets: *const i32,
    /// Of groups of 16, whether the next is the second of its activation block.
    odd: bool,
}

impl<S: Simd, const M: usize, const MIN: bool, const WIDE: bool> Sink<S> for Dot<S, M, MIN, WIDE> {
    #[inline(always)]
    fn group<const STEPS: usize>(&mut self, s: S, codes: [S::I; STEPS], scales: S::F, mins: S::F) {
        // SAFETY: `tile` gives operands for all columns, and no more groups come than those have.
        let (q, x, offsets) = unsafe {
            (
                std::slice::from_raw_parts(self.q, STEPS * M),
                &*self.scales.cast::<[f32; M]>(),
                &*self.offsets.cast::<[i32; M]>(),
            )
        };
        // Two chains for few rows, since one would wait for the latency of the dot product; the sums are exact in any order.
        let chains = if M <= 2 { 2 } else { 1 };
        let mut sums = [[s.splat_i(0); 2]; M];
        for m in 0..M {
            if !MIN {
                sums[m][0] = s.splat_i(offsets[m]);
            }
        }
        for step in 0..STEPS {
            for m in 0..M {
                sums[m][step % chains] =
                    s.dot4::<WIDE>(sums[m][step % chains], codes[step], &q[step * M + m]);
            }
        }
        for m in 0..M {
            let sum = if chains == 2 { s.add_i(sums[m][0], sums[m][1]) } else { sums[m][0] };
            self.acc[m] = s.fma(s.to_f(sum), s.mul(scales, s.splat(x[m])), self.acc[m]);
            if MIN {
                self.acc[m] = s.fma(mins, s.splat(f32::from_bits(offsets[m] as u32)), self.acc[m]);
            }
        }
        self.q = self.q.wrapping_add(STEPS * M);
        self.offsets = self.offsets.wrapping_add(M);
        if STEPS == 8 || self.odd {
            self.scales = self.scales.wrapping_add(M);
        }
        self.odd = !self.odd;
    }
}
