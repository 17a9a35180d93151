//! Sixteen weight rows side by side, as the integer tile wants them.

use std::marker::PhantomData;

use super::lanes::Lanes;
use super::simd::{Op, Simd};
use super::source::Source;
use crate::quant::IntBlock;

/// Columns that a panel holds: two super-blocks. The two panels of a tile take 24 KiB, and stay in the
/// first-level cache while all activation rows pass.
pub(crate) const COLUMNS: usize = 512;
/// Weight rows of a panel.
pub(crate) const ROWS: usize = 16;
/// Groups that are open at a time, at most.
pub(crate) const OPEN: usize = 8;

/// Up to [`COLUMNS`] columns of 16 weight rows, taken apart: `codes[k / 4]` holds four codes
/// of each row, `scales[g]` and `mins[g]` one number per row.
#[repr(C, align(64))]
pub(crate) struct Panel {
    pub codes: [[u8; 64]; COLUMNS / 4],
    pub scales: [[f32; ROWS]; COLUMNS / 16],
    /// Written only for formats with minima.
    pub mins: [[f32; ROWS]; COLUMNS / 16],
}

/// A format that can be unpacked 16 rows at a time: [`IntBlock::codes`] with vectors.
pub(crate) trait PanelBlock: IntBlock {
    /// No code is larger.
    const MOST: u8;

    /// Takes one block of each of 16 rows apart and hands its groups over in order.
    ///
    /// # Safety
    /// There is a block.
    unsafe fn unpack<S: Lanes>(s: S, from: &impl Source, sink: &mut impl Sink<S>);
}

/// What becomes of groups of `4 · STEPS` columns. They come in parts, and up to [`OPEN`] at a time, so that few registers hold what
/// there is at a time.
pub(crate) trait Sink<S: Lanes> {
    /// Codes `4 · step .. 4 · step + 4` of the `group`-th of the open groups, of each row. A group's steps come in order; where there
    /// are many registers ([`Lanes::FEW_REGISTERS`]), no group's come before the one before has ended.
    fn step<const STEPS: usize>(&mut self, s: S, group: usize, step: usize, codes: S::I);

    /// Ends a group, the first of the open ones first. `mins` counts only in formats that have them.
    fn end<const STEPS: usize>(&mut self, s: S, group: usize, scales: S::F, mins: S::F);

    /// Goes on behind so many groups, which have ended: as many as belong to whole blocks of activations.
    fn advance<const STEPS: usize>(&mut self, groups: usize);
}

/// Fills one panel.
pub(crate) struct Fill<B, R> {
    /// The first block of each row.
    pub from: R,
    /// Blocks per row, at most `COLUMNS / B::LEN`.
    pub blocks: usize,
    /// Receives them.
    pub panel: *mut Panel,
    /// The format.
    pub block: PhantomData<B>,
}

/// Stores groups one after the other.
struct Store {
    panel: *mut Panel,
    code: usize,
    group: usize,
    mins: bool,
}

impl<S: Simd> Sink<S> for Store {
    #[inline(always)]
    fn step<const STEPS: usize>(&mut self, s: S, group: usize, step: usize, codes: S::I) {
        // SAFETY: `Fill` makes no more groups than the panel has room for.
        unsafe {
            let to: *mut [u8; 64] = (&raw mut (*self.panel).codes).cast();
            s.store_i(codes, &mut *to.add(self.code + group * STEPS + step));
        }
    }

    #[inline(always)]
    fn end<const STEPS: usize>(&mut self, s: S, group: usize, scales: S::F, mins: S::F) {
        // SAFETY: as above.
        unsafe {
            let to: *mut [f32; ROWS] = (&raw mut (*self.panel).scales).cast();
            s.store(scales, &mut *to.add(self.group + group));
            if self.mins {
                let to: *mut [f32; ROWS] = (&raw mut (*self.panel).mins).cast();
                s.store(mins, &mut *to.add(self.group + group));
            }
        }
    }

    #[inline(always)]
    fn advance<const STEPS: usize>(&mut self, groups: usize) {
        self.code += groups * STEPS;
        self.group += groups;
    }
}

impl<B: PanelBlock, R: Source> Op for Fill<B, R> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        assert!(self.blocks <= COLUMNS / B::LEN);
        let mut from = self.from;
        let mut store = Store { panel: self.panel, code: 0, group: 0, mins: B::HAS_MIN };
        for _ in 0..self.blocks {
            // SAFETY: the caller's rows have `blocks` blocks.
            unsafe { B::unpack(s, &from, &mut store) };
            from.advance(size_of::<B>());
        }
    }
}
