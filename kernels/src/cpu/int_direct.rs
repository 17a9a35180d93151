//! The integer kernel for few activation rows: weights go from memory to the dot product in registers.
//!
//! With few rows a panel in between would cost more than it saves: its stores alone
//! take as long as the unpacking. Bits are those of the tile, since the order of a lane is the same.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;
use std::ops::Range;

use super::activations::Activations;
use super::frame;
use super::int_sum::GroupSum;
use super::lanes::Lanes;
use super::panel::{OPEN, PanelBlock, ROWS, Sink};
use super::simd::{Op, Simd};
use super::source::{LINE, Source};

/// How many blocks ahead large blocks are fetched.
const BLOCKS_AHEAD: usize = 2;

/// How far behind the next panel lines are fetched early where rows are neighbours.
const EARLY: usize = 48 << 10;

/// The way through the weights.
#[derive(Clone, Copy)]
pub(crate) struct Walk {
    /// How many panels of sixteen rows.
    pub panels: usize,
    /// What [`Source::advance`] takes from one to the next.
    pub bytes: usize,
    /// Accumulators from one activation row's to the next one's.
    pub acc_stride: usize,
    /// Where the weights end, beyond which nothing is fetched.
    pub end: *const u8,
}

/// Some panels of sixteen weight rows × one tile of activations, or two, over all columns.
///
/// Where the columns are few, a call for each panel would cost as much as the panel.
///
/// Each number of rows M is a function of its own: in one for all of them, what needs few registers suffers from what needs many.
pub(crate) struct Direct<'a, B, R, const M: usize, const MIN: bool, const MOST: u8> {
    /// The first block of each row of the first panel.
    pub from: R,
    /// How to go on from there.
    pub walk: Walk,
    /// The right-hand side.
    pub x: &'a Activations<'a>,
    /// From [`Activations::offsets`].
    pub offsets: &'a [i32],
    /// Which tiles of it, together M rows: one, of at most [`Lanes::DIRECT_ROWS`] rows, or up to [`direct_tiles`].
    pub tiles: Range<usize>,
    /// Receives `acc[row · acc_stride + panel]`.
    pub acc: *mut [f32; ROWS],
    /// The format.
    pub block: PhantomData<B>,
}

impl<B: PanelBlock, R: Source, const M: usize, const MIN: bool, const MOST: u8> Op
    for Direct<'_, B, R, M, MIN, MOST>
{
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if const { M > S::DIRECT_ROWS * direct_tiles(S::DIRECT_TILES, B::GROUP) } {
            unreachable!("{M} rows");
        }
        if B::LEN > 32 {
            // What is known of a large block does not fit registers anyway.
            frame::align();
        }
        self.rows(s);
    }
}

/// How many tiles of activations are multiplied at once with weights whose groups have `group` columns.
pub(crate) const fn direct_tiles(tiles: usize, group: usize) -> usize {
    // Half groups have twice as many sums.
    if group == 32 { tiles } else { 1 }
}

impl<B: PanelBlock, R: Source, const M: usize, const MIN: bool, const MOST: u8>
    Direct<'_, B, R, M, MIN, MOST>
{
    #[inline(always)]
    fn rows<S: Simd>(self, s: S) {
        let x = [self.operands(self.tiles.start), self.operands(self.tiles.end - 1)];
        // As `Dot` has it.
        let first = self.x.tiles.start(self.tiles.start + 1) - self.x.tiles.start(self.tiles.start);
        assert!(first == M.div_ceil(self.tiles.len()) && self.tiles.len() == M.div_ceil(S::DIRECT_ROWS));
        let (blocks, walk) = (self.x.columns / B::LEN, self.walk);
        let mut panel = self.from;
        for p in 0..walk.panels {
            let (l, h) = s.halves();
            let mut from = panel;
            let mut ahead = Ahead::of(&panel, walk);
            let mut low = Dot::<S::Low, M, MIN, MOST>::new(l, x);
            if B::LEN > 32 && S::FEW_REGISTERS {
                // The same instructions for both halves: twice as many would be more than the processor keeps decoded.
                let (mut from, mut acc) = ([from, from.upper()], [low.acc; 2]);
                for _ in 0..blocks {
                    let x = low.x;
                    for (from, acc) in from.iter_mut().zip(&mut acc) {
                        (low.x, low.acc) = (x, *acc);
                        // SAFETY: the caller's rows have so many blocks.
                        unsafe { unpack::<B, _, _>(l, from, &mut ahead, &mut low) };
                        *acc = low.acc;
                        from.advance(size_of::<B>());
                    }
                }
                let mut upper = [0.0; ROWS];
                for m in 0..M {
                    // SAFETY: the caller's accumulators.
                    let out = unsafe { &mut *self.acc.add(m * walk.acc_stride + p) };
                    l.store(acc[1][m], &mut upper);
                    out[ROWS / 2..].copy_from_slice(&upper[..ROWS / 2]);
                    l.store(acc[0][m], out);
                }
            } else {
                let mut high = Dot::<S::High, M, MIN, MOST>::new(h, x);
                for _ in 0..blocks {
                    if M == 1 {
                        // The same operands, as the compiler then knows, which loads them once. Those of more rows it would have to put aside.
                        high.x = low.x;
                    }
                    // SAFETY: as above.
                    unsafe {
                        unpack::<B, _, _>(l, &from, &mut ahead, &mut low);
                        if S::FEW_REGISTERS {
                            unpack::<B, _, _>(h, &from, &mut ahead, &mut high);
                        }
                    }
                    from.advance(size_of::<B>());
                }
                for m in 0..M {
                    // SAFETY: as above.
                    let out = unsafe { &mut *self.acc.add(m * walk.acc_stride + p) };
                    l.store(low.acc[m], out);
                    if S::FEW_REGISTERS {
                        h.store(high.acc[m], out);
                    }
                }
            }
            panel.advance(walk.bytes);
        }
    }

    /// Those of a tile.
    #[inline(always)]
    fn operands(&self, tile: usize) -> Operands {
        let (columns, start) = (self.x.columns, self.x.tiles.start(tile));
        let of = |unit: usize| start * columns / unit..self.x.tiles.start(tile + 1) * columns / unit;
        Operands {
            q: self.x.q[of(4)].as_ptr(),
            scales: self.x.scales[of(32)].as_ptr(),
            offsets: self.offsets[of(B::GROUP)].as_ptr(),
        }
    }
}

/// A tile of activations, from the first open group on.
#[derive(Clone, Copy)]
struct Operands {
    q: *const [i8; 4],
    scales: *const f32,
    offsets: *const i32,
}

/// Takes a block apart. Meanwhile what comes next is fetched: panels of neighbours in the order of memory; of rows that are apart, these
/// rows' large blocks. Small ones the processor follows by itself, since it
/// meets every line several times; of large ones it meets the lines in no order that it would recognize.
///
/// # Safety
/// There is a block.
#[inline(always)]
unsafe fn unpack<B: PanelBlock, L: Lanes, R: Source>(
    s: L,
    from: &R,
    ahead: &mut Ahead,
    sink: &mut impl Sink<L>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        if L::NEIGHBOURS {
            B::unpack(s, from, &mut InOrder::<B, _> { sink, ahead, block: PhantomData });
        } else if B::LEN > 32 {
            let rows = if L::FEW_REGISTERS { ROWS / 2 } else { ROWS };
            B::unpack(s, from, &mut Fetching::<B, _, _> { sink, from, rows, step: 0, block: PhantomData });
        } else {
            B::unpack(s, from, sink);
        }
    }
}

/// Multiplies groups as they come.
struct Dot<S: Lanes, const M: usize, const MIN: bool, const MOST: u8> {
    acc: [S::F; M],
    /// Of the open groups. Two chains for few rows, since one would wait for the latency of the dot product; the sums are exact
    /// in any order.
    sums: [[[GroupSum<S, MOST>; 2]; M]; OPEN],
    /// The group's codes, unless they are multiplied at once ([`Lanes::FEW_REGISTERS`]).
    codes: [S::I; 8],
    /// Of one tile, or two.
    x: [Operands; 2],
}

/// Where a row is among a [`Dot`]'s operands.
struct Place {
    tile: usize,
    /// The tile's.
    rows: usize,
    row: usize,
}

impl<S: Lanes, const M: usize, const MIN: bool, const MOST: u8> Dot<S, M, MIN, MOST> {
    const CHAINS: usize = if M <= 2 && !S::PAIRS { 2 } else { 1 };
    /// Rows of the first tile, the larger one.
    const FIRST: usize = M.div_ceil(M.div_ceil(S::DIRECT_ROWS));

    /// Nothing yet.
    #[inline(always)]
    fn new(s: S, x: [Operands; 2]) -> Self {
        let (acc, sums) = ([s.splat(0.0); M], [[[GroupSum::new(s, 0); 2]; M]; OPEN]);
        Dot { acc, sums, codes: [s.splat_i(0); 8], x }
    }

    #[inline(always)]
    const fn place(m: usize) -> Place {
        match m < Self::FIRST {
            true => Place { tile: 0, rows: Self::FIRST, row: m },
            false => Place { tile: 1, rows: M - Self::FIRST, row: m - Self::FIRST },
        }
    }

    /// What belongs to a group and row `m`: the sum that products are subtracted from, or what minima are multiplied with.
    #[inline(always)]
    fn offset(&self, group: usize, m: usize) -> i32 {
        let Place { tile, rows, row } = Self::place(m);
        // SAFETY: `Direct` gives operands for all columns, and no more groups come than those have.
        unsafe { *self.x[tile].offsets.add(group * rows + row) }
    }

    /// Adds the products of one step.
    #[inline(always)]
    fn multiply<const STEPS: usize>(&mut self, s: S, group: usize, step: usize, codes: S::I) {
        for m in 0..M {
            if step == 0 {
                let offset = if MIN { 0 } else { self.offset(group, m) };
                self.sums[group][m] = [GroupSum::new(s, offset), GroupSum::new(s, 0)];
            }
            let Place { tile, rows, row } = Self::place(m);
            // SAFETY: as above.
            let q = unsafe { &*self.x[tile].q.add((group * STEPS + step) * rows + row) };
            self.sums[group][m][step % Self::CHAINS].add::<STEPS>(s, step, codes, q);
        }
    }
}

impl<S: Lanes, const M: usize, const MIN: bool, const MOST: u8> Sink<S> for Dot<S, M, MIN, MOST> {
    #[inline(always)]
    fn step<const STEPS: usize>(&mut self, s: S, group: usize, step: usize, codes: S::I) {
        if S::FEW_REGISTERS {
            self.multiply::<STEPS>(s, group, step, codes);
        } else {
            self.codes[step] = codes;
        }
    }

    #[inline(always)]
    fn end<const STEPS: usize>(&mut self, s: S, group: usize, scales: S::F, mins: S::F) {
        if !S::FEW_REGISTERS {
            for step in 0..STEPS {
                self.multiply::<STEPS>(s, group, step, self.codes[step]);
            }
        }
        for m in 0..M {
            let (sums, offset) = (&self.sums[group][m], self.offset(group, m));
            let sum = sums[0].get::<STEPS>(s, if MIN { 0 } else { offset });
            let sum = if Self::CHAINS == 2 { s.add_i(sum, sums[1].get::<STEPS>(s, 0)) } else { sum };
            let Place { tile, rows, row } = Self::place(m);
            // SAFETY: as for the offset.
            let x = unsafe { *self.x[tile].scales.add(group * STEPS / 8 * rows + row) };
            let mut acc = s.fma(s.to_f(sum), s.mul(scales, s.splat(x)), self.acc[m]);
            if MIN {
                acc = s.fma(mins, s.splat(f32::from_bits(offset as u32)), acc);
            }
            // Before the next group: the compiler would keep what it is made of for all groups of a block. With groups of 16 and one row, it
            // better does: there are as many conversions as products.
            self.acc[m] = if STEPS == 8 || M > 2 { s.pin_f(acc) } else { acc };
        }
    }

    #[inline(always)]
    fn advance<const STEPS: usize>(&mut self, groups: usize) {
        for (x, rows) in self.x.iter_mut().zip([Self::FIRST, M - Self::FIRST]) {
            x.q = x.q.wrapping_add(groups * STEPS * rows);
            x.offsets = x.offsets.wrapping_add(groups * rows);
            x.scales = x.scales.wrapping_add(groups * STEPS / 8 * rows);
        }
    }
}

/// Passes codes on, and fetches a line with every step or every second one: all of a block's lines at once would take all of the first
/// cache's slots for misses, and what is taken apart would wait behind them.
struct Fetching<'a, B, D, R> {
    sink: &'a mut D,
    from: &'a R,
    rows: usize,
    /// Of the first open group, in the block.
    step: usize,
    block: PhantomData<B>,
}

impl<B: PanelBlock, S: Lanes, D: Sink<S>, R: Source> Sink<S> for Fetching<'_, B, D, R> {
    #[inline(always)]
    fn step<const STEPS: usize>(&mut self, s: S, group: usize, step: usize, codes: S::I) {
        let lines = const { size_of::<B>().div_ceil(LINE) };
        let per_row = B::LEN / 4 / self.rows;
        let (n, every) = (group * STEPS + step, per_row / lines);
        if n % every == 0 && n % per_row / every < lines {
            let row = self.step / per_row + n / per_row;
            self.from.fetch(s, BLOCKS_AHEAD * size_of::<B>(), row, n % per_row / every, lines);
        }
        self.sink.step::<STEPS>(s, group, step, codes);
    }

    #[inline(always)]
    fn end<const STEPS: usize>(&mut self, s: S, group: usize, scales: S::F, mins: S::F) {
        self.sink.end::<STEPS>(s, group, scales, mins);
    }

    #[inline(always)]
    fn advance<const STEPS: usize>(&mut self, groups: usize) {
        self.step += groups * STEPS;
        self.sink.advance::<STEPS>(groups);
    }
}

/// What is fetched of panels of neighbours, in the order of memory: the next panel for use, and again what was asked for long before, since
/// the processor forgets fetches that it has no room for.
struct Ahead {
    next: *const u8,
    early: *const u8,
}

impl Ahead {
    /// Beside a panel. Where there is none to fetch, lines that are there are asked for again.
    #[inline(always)]
    fn of(panel: &impl Source, walk: Walk) -> Ahead {
        let mut next = *panel;
        next.advance(walk.bytes);
        let bytes = next.first().addr() - panel.first().addr();
        let or = |at: *const u8, other| if at.addr() + bytes <= walk.end.addr() { at } else { other };
        let next = or(next.first(), panel.first());
        Ahead { next, early: or(next.wrapping_add(EARLY), next) }
    }
}

/// Passes codes on, and fetches as many bytes ahead with every step as the sixteen rows have there.
struct InOrder<'a, B, D> {
    sink: &'a mut D,
    ahead: &'a mut Ahead,
    block: PhantomData<B>,
}

impl<B: PanelBlock, D> InOrder<'_, B, D> {
    /// Bytes of so many steps.
    #[inline(always)]
    const fn bytes(steps: usize) -> usize {
        ROWS * size_of::<B>() * steps / (B::LEN / 4)
    }
}

impl<B: PanelBlock, S: Lanes, D: Sink<S>> Sink<S> for InOrder<'_, B, D> {
    #[inline(always)]
    fn step<const STEPS: usize>(&mut self, s: S, group: usize, step: usize, codes: S::I) {
        let n = group * STEPS + step;
        let mut at = Self::bytes(n).next_multiple_of(LINE);
        while at < Self::bytes(n + 1) {
            s.prefetch(self.ahead.next.wrapping_add(at));
            s.prefetch_early(self.ahead.early.wrapping_add(at));
            at += LINE;
        }
        self.sink.step::<STEPS>(s, group, step, codes);
    }

    #[inline(always)]
    fn end<const STEPS: usize>(&mut self, s: S, group: usize, scales: S::F, mins: S::F) {
        self.sink.end::<STEPS>(s, group, scales, mins);
    }

    #[inline(always)]
    fn advance<const STEPS: usize>(&mut self, groups: usize) {
        let bytes = Self::bytes(groups * STEPS);
        self.ahead.next = self.ahead.next.wrapping_add(bytes);
        self.ahead.early = self.ahead.early.wrapping_add(bytes);
        self.sink.advance::<STEPS>(groups);
    }
}
