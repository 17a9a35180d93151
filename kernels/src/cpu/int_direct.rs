//! The integer kernel for few activation rows: weights go from memory to the dot product in registers.
//!
//! With few rows a panel in between would cost more than it saves: its stores alone
//! take as long as the unpacking. Bits are those of the tile, since the order of a lane is the same.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;

use super::activations::Activations;
use super::frame;
use super::int_sum::GroupSum;
use super::lanes::Lanes;
use super::panel::{PanelBlock, ROWS, Sink};
use super::simd::{Op, Simd};
use super::source::Source;

/// Bytes of a line of cache.
const LINE: usize = 64;

/// The way through the weights.
#[derive(Clone, Copy)]
pub(crate) struct Walk {
    /// How many panels of sixteen rows.
    pub panels: usize,
    /// What [`Source::advance`] takes from one to the next.
    pub bytes: usize,
    /// Bytes from each row to what is fetched ahead meanwhile; 0: nothing is.
    pub ahead: usize,
    /// The same for the last panel.
    pub ahead_of_last: usize,
    /// Accumulators from one activation row's to the next one's.
    pub acc_stride: usize,
}

/// Some panels of sixteen weight rows × one tile of activations, over all columns.
///
/// Where the columns are few, a call for each panel would cost as much as the panel.
pub(crate) struct Direct<'a, B, R, const MIN: bool, const MOST: u8> {
    /// The first block of each row of the first panel.
    pub from: R,
    /// How to go on from there.
    pub walk: Walk,
    /// The right-hand side.
    pub x: &'a Activations<'a>,
    /// From [`Activations::offsets`].
    pub offsets: &'a [i32],
    /// Which tile of it; at most [`Simd::DIRECT_ROWS`] rows.
    pub tile: usize,
    /// Receives `acc[row · acc_stride + panel]`.
    pub acc: *mut [f32; ROWS],
    /// The format.
    pub block: PhantomData<B>,
}

impl<B: PanelBlock, R: Source, const MIN: bool, const MOST: u8> Op for Direct<'_, B, R, MIN, MOST> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if B::LEN > 32 {
            // What is known of a large block does not fit registers anyway.
            frame::align();
        }
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

impl<B: PanelBlock, R: Source, const MIN: bool, const MOST: u8> Direct<'_, B, R, MIN, MOST> {
    #[inline(always)]
    fn tile<S: Simd, const M: usize>(self, s: S) {
        let (columns, start) = (self.x.columns, self.x.tiles.start(self.tile));
        let q = self.x.q[start * columns / 4..][..M * columns / 4].as_ptr();
        let scales = self.x.scales[start * columns / 32..][..M * columns / 32].as_ptr();
        let offsets = self.offsets[start * columns / B::GROUP..][..M * columns / B::GROUP].as_ptr();
        let (blocks, walk) = (columns / B::LEN, self.walk);
        let mut panel = self.from;
        for p in 0..walk.panels {
            let (l, h) = s.halves();
            let mut low = Dot::<S::Low, M, MIN, MOST>::new(l, q, scales, offsets);
            let mut high = Dot::<S::High, M, MIN, MOST>::new(h, q, scales, offsets);
            let distance = if p + 1 < walk.panels { walk.ahead } else { walk.ahead_of_last };
            let parts = if S::FEW_REGISTERS { 2 * B::LEN / B::GROUP } else { 1 };
            let mut ahead = Ahead::new(panel, distance, blocks, size_of::<B>(), parts);
            let mut from = panel;
            for _ in 0..blocks {
                // SAFETY: the caller's rows have so many blocks.
                unsafe {
                    if S::FEW_REGISTERS {
                        B::unpack(l, &from, &mut Fetching { dot: &mut low, ahead: &mut ahead });
                        B::unpack(h, &from, &mut Fetching { dot: &mut high, ahead: &mut ahead });
                    } else {
                        ahead.step(s);
                        B::unpack(l, &from, &mut low);
                    }
                }
                from.advance(size_of::<B>());
            }
            for m in 0..M {
                // SAFETY: the caller's accumulators.
                let acc = unsafe { &mut *self.acc.add(m * walk.acc_stride + p) };
                l.store(low.acc[m], acc);
                if S::FEW_REGISTERS {
                    h.store(high.acc[m], acc);
                }
            }
            panel.advance(walk.bytes);
        }
    }
}

/// Prefetches in the order of use, a share with each block or group, so that all lines are asked for equally early. In the order
/// of memory, the last row's would come just before they are used.
struct Ahead<R> {
    from: R,
    /// Bytes of a part in all rows, and of those that were not asked for yet.
    share: usize,
    due: usize,
    /// Which four rows are next, and how far.
    quarter: usize,
    offset: usize,
}

impl<R: Source> Ahead<R> {
    /// Fetches what lies `distance` bytes ahead in each row, for `blocks` blocks of `size` bytes, each in `parts`; nothing for 0.
    #[inline(always)]
    fn new(from: R, distance: usize, blocks: usize, size: usize, parts: usize) -> Ahead<R> {
        let (bytes, size) = if distance == 0 { (0, 0) } else { (blocks * size, size) };
        // What the last lines have too much is asked for at once, so that all are when the last block comes.
        let due = ROWS * (bytes.next_multiple_of(LINE) - bytes);
        Ahead { from, share: (ROWS * size).div_ceil(parts), due, quarter: 0, offset: distance }
    }

    /// The share of one part: four lines at a time, since to choose each would take several times as long as to ask for it.
    #[inline(always)]
    fn step<S: Lanes>(&mut self, s: S) {
        self.due += self.share;
        while self.due >= 4 * LINE {
            self.due -= 4 * LINE;
            self.from.fetch(s, self.quarter, self.offset);
            self.quarter += 1;
            if self.quarter == 4 {
                (self.quarter, self.offset) = (0, self.offset + LINE);
            }
        }
    }
}

/// Multiplies groups as they come.
struct Dot<S: Lanes, const M: usize, const MIN: bool, const MOST: u8> {
    acc: [S::F; M],
    /// Of the group that has begun. Two chains for few rows, since one would wait for the latency of the dot product; the sums are exact
    /// in any order.
    sums: [[GroupSum<S, MOST>; 2]; M],
    /// The group's codes, unless they are multiplied at once ([`Lanes::FEW_REGISTERS`]).
    codes: [S::I; 8],
    q: *const [i8; 4],
    scales: *const f32,
    offsets: *const i32,
    /// Of groups of 16, whether the next is the second of its activation block.
    odd: bool,
}

impl<S: Lanes, const M: usize, const MIN: bool, const MOST: u8> Dot<S, M, MIN, MOST> {
    const CHAINS: usize = if M <= 2 && !S::PAIRS { 2 } else { 1 };

    /// Nothing yet.
    #[inline(always)]
    fn new(s: S, q: *const [i8; 4], scales: *const f32, offsets: *const i32) -> Self {
        let (acc, sums) = ([s.splat(0.0); M], [[GroupSum::new(s, 0); 2]; M]);
        Dot { acc, sums, codes: [s.splat_i(0); 8], q, scales, offsets, odd: false }
    }

    /// What the group's sum of row `m` starts from.
    #[inline(always)]
    fn offset(&self, m: usize) -> i32 {
        // SAFETY: `tile` gives operands for all columns, and no more groups come than those have.
        if MIN { 0 } else { unsafe { *self.offsets.add(m) } }
    }

    /// Adds the products of one step.
    #[inline(always)]
    fn multiply<const STEPS: usize>(&mut self, s: S, step: usize, codes: S::I) {
        for m in 0..M {
            if step == 0 {
                self.sums[m] = [GroupSum::new(s, self.offset(m)), GroupSum::new(s, 0)];
            }
            // SAFETY: as above.
            let q = unsafe { &*self.q.add(step * M + m) };
            self.sums[m][step % Self::CHAINS].add::<STEPS>(s, step, codes, q);
        }
    }
}

impl<S: Lanes, const M: usize, const MIN: bool, const MOST: u8> Sink<S> for Dot<S, M, MIN, MOST> {
    #[inline(always)]
    fn step<const STEPS: usize>(&mut self, s: S, step: usize, codes: S::I) {
        if S::FEW_REGISTERS {
            self.multiply::<STEPS>(s, step, codes);
        } else {
            self.codes[step] = codes;
        }
    }

    #[inline(always)]
    fn end<const STEPS: usize>(&mut self, s: S, scales: S::F, mins: S::F) {
        if !S::FEW_REGISTERS {
            for step in 0..STEPS {
                self.multiply::<STEPS>(s, step, self.codes[step]);
            }
        }
        for m in 0..M {
            let sum = self.sums[m][0].get::<STEPS>(s, self.offset(m));
            let sum = if Self::CHAINS == 2 { s.add_i(sum, self.sums[m][1].get::<STEPS>(s, 0)) } else { sum };
            // SAFETY: as above.
            let (x, offset) = unsafe { (*self.scales.add(m), *self.offsets.add(m)) };
            let mut acc = s.fma(s.to_f(sum), s.mul(scales, s.splat(x)), self.acc[m]);
            if MIN {
                acc = s.fma(mins, s.splat(f32::from_bits(offset as u32)), acc);
            }
            // Before the next group: the compiler would keep what it is made of for all groups of a block. With groups of 16 and one row, it
            // better does: there are as many conversions as products.
            self.acc[m] = if STEPS == 8 || M > 2 { s.pin_f(acc) } else { acc };
        }
        self.q = self.q.wrapping_add(STEPS * M);
        self.offsets = self.offsets.wrapping_add(M);
        if STEPS == 8 || self.odd {
            self.scales = self.scales.wrapping_add(M);
        }
        self.odd = !self.odd;
    }
}

/// Multiplies, and fetches with every group: a large block's lines at once would take all of the first cache's slots for misses, and what is taken
/// apart would wait behind them. Branches between the groups cost nothing where their order is fixed anyway.
struct Fetching<'a, D, R> {
    dot: &'a mut D,
    ahead: &'a mut Ahead<R>,
}

impl<S: Lanes, D: Sink<S>, R: Source> Sink<S> for Fetching<'_, D, R> {
    #[inline(always)]
    fn step<const STEPS: usize>(&mut self, s: S, step: usize, codes: S::I) {
        self.dot.step::<STEPS>(s, step, codes);
    }

    #[inline(always)]
    fn end<const STEPS: usize>(&mut self, s: S, scales: S::F, mins: S::F) {
        self.dot.end::<STEPS>(s, scales, mins);
        self.ahead.step(s);
    }
}
